"""Measuring what was trained, and publishing it on the Hub."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..data import PixelDataset, as_pixel_dataset, check_class_names, check_unseen
from ..evaluation import RobustnessReport, evaluate_robustness, training_curves_figure
from ..evaluation.zero_shot import refuse_tower
from ..files import staged
from ..hub.model_card import write_model_card
from ..hub.push import RELEASE_FILES, kept_as_it_is, push_folder
from ..record import RECORD
from ..routes import ROBUST
from .resuming import ResumableTrainer


logger = logging.getLogger(__name__)

CURVES = "training_curves.png"


class PublishingTrainer(ResumableTrainer):
    """The part of [`AutoLoraTrainer`] that comes after the training."""

    # The test data that were compared with what training saw, and what a report on them has to say about it.
    _checked_test_data: PixelDataset | None = None
    _test_notes: Sequence[str] = ()

    def prepare_test_data(self, dataset: Any) -> PixelDataset:
        """Test data as the model wants them, checked against what training saw.

        Raises:
            ValueError: If `dataset` shares images with the training or validation data, compared by origin and by
                content, or has other classes; or if the model is an image tower, which has none.
        """
        if dataset is self._checked_test_data:
            return cast(PixelDataset, dataset)
        refuse_tower(self.model)
        columns: dict[str, Any] = {"image_column": self.args.image_column, "label_column": self.args.label_column}
        test = as_pixel_dataset(dataset, self.model.preprocessing, name="dataset", **columns)
        check_class_names(self.train_dataset.class_names, test.class_names, "dataset")
        # A stream has no rows to look up; `StreamingTrainer` compares with what it has read.
        seen = {"training": self.train_dataset, "validation": self.eval_dataset}
        self._test_notes = check_unseen(test, cast(dict[str, PixelDataset | None], seen))
        self._checked_test_data = test
        return test

    def evaluate_robustness(self, dataset: Any, attack: Any = "autoattack", **kwargs: Any) -> RobustnessReport:
        """[`evaluate_robustness`] of the deployed route on test data, under the threat model of the training.

        The report is remembered as one of `model.results`: it is saved with the model and stands in its card.

        Raises:
            ValueError: If `dataset` shares images with the training or validation data.
        """
        test = self.prepare_test_data(dataset)
        report = evaluate_robustness(self.model, test, self.args.threat_model, attack, **kwargs)
        report.warnings += self._test_notes
        if report.route == ROBUST:
            self.model.add_result(report)
        return report

    def create_model_card(  # type: ignore[override]  # further keywords, for the card
        self,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        language: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **card: Any,
    ) -> None:
        """Writes the card of the model, and its training curves, into `args.output_dir`.

        Args:
            license (`str`), tags (`list[str]`), dataset (`str`), **card (*optional*): See [`write_model_card`].
            model_name (`str`, *optional*): What to load the model by; its name on the Hub if it is to go there.
            dataset_tags (`str` or `list[str]`, *optional*): Names of the datasets on the Hub.
            language, finetuned_from, tasks, dataset_args (*optional*): As in `Trainer`, but not used: the card takes
                backbone, task and data from the model itself.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        figures = dict(card.pop("figures", {}))
        history = self.state.log_history
        for key, what in (("eval_robust_accuracy", "accuracies, loss scalars"), ("eval_clean_loss", "and train loss")):
            if any(key in entry for entry in history):
                training_curves_figure(history, folder / CURVES)
                figures[f"The training: validation {what}, learning rate"] = CURVES
        tags = [tags] if isinstance(tags, str) else tags
        datasets = [dataset_tags] if isinstance(dataset_tags, str) else dataset_tags
        write_model_card(
            folder,
            self.model,
            name=self.hub_model_id or model_name,
            license=license,
            tags=tags,
            dataset=dataset if dataset is None or isinstance(dataset, str) else ", ".join(dataset),
            datasets=datasets,
            figures=figures,
            # What `evaluate_robustness` measured is none of the training data.
            separate=True,
            **card,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Any:
        """Publishes model and card in `args.hub_model_id`, in one commit; see [`push_folder`].

        Args:
            commit_message (`str`), blocking (`bool`), token (`str`), revision (`str`), private (`bool`, *optional*):
                As in `Trainer.push_to_hub`.
            **kwargs: Passed on to [`create_model_card`].

        Returns:
            `CommitInfo`, or a future of it with `blocking=False`; `None` in all but the main process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._push(self.args.output_dir, commit_message, token, revision, run_as_future=not blocking)

    def _push(
        self, folder: str | Path, message: str | None, token: str | None, revision: str | None, **how: Any
    ) -> Any:
        revision = revision if revision is not None else self.args.hub_revision
        return push_folder(
            folder, cast(str, self.hub_model_id), commit_message=message, token=token, revision=revision, **how
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What `hub_strategy` asks for after a checkpoint.

        `Trainer`'s own would push its arguments as a pickle, and would not know the files of this model.
        """
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with staged(Path(self.args.output_dir), last=RECORD) as folder:
            for name in RELEASE_FILES:
                source = Path(checkpoint_folder) / name
                if source.is_file():
                    (folder / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(source, folder / name)
        self.create_model_card()
        message = f"Training in progress, epoch {int(self.state.epoch)}"
        jobs = [self._push(self.args.output_dir, message, self.args.hub_token, None, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = Path(checkpoint_folder).name if strategy == HubStrategy.ALL_CHECKPOINTS else "last-checkpoint"
            jobs.append(self._push_checkpoint(Path(checkpoint_folder), name, f"{message}, checkpoint"))
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        if busy:
            cast(Any, self.push_in_progress).jobs.extend(jobs)
        else:
            self.push_in_progress = cast(Any, PushInProgress(cast(Any, jobs)))

    def _push_checkpoint(self, checkpoint: Path, name: str, message: str) -> Future:
        """Uploads all of a checkpoint in the background, after what is already waiting there."""
        # It may be deleted while it is being uploaded.
        files = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
        kept = kept_as_it_is(checkpoint, files)
        token, branch, repository = self.args.hub_token, self.args.hub_revision, cast(str, self.hub_model_id)

        def push() -> CommitInfo:
            try:
                return HfApi(token=token).upload_folder(
                    repo_id=repository,
                    folder_path=kept,
                    path_in_repo=name,
                    commit_message=message,
                    revision=branch,
                    # An older one may have been of another mode.
                    delete_patterns="*",
                )
            finally:
                shutil.rmtree(kept, ignore_errors=True)

        return huggingface_hub.run_as_future(push)


def _warn_of_failure(job: Future) -> None:
    """The training goes on without a push that failed, but its user should know."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning("A checkpoint was not pushed: %s", job.exception())
