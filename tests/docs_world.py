"""The world in which the blocks of the documentation run, and the process that runs them.

Blocks read as users write them, `timm.create_model("resnet50", pretrained=True)` on data of their own. So that they
run in seconds and without a network, exactly this is substituted, and nothing else:

- The Hub is `hub_server.py` on this machine. The clients of huggingface-hub, timm, transformers, datasets and PEFT are
  the real ones, logged in as `org`.
- Networks (`SMALL`, `_publish_models`) have their real names and classes, but few channels, 32 x 32 pixels and random
  weights. `model_cards/quickstart-digits` is the real one.
- Data (`_write_files`, `_publish_data`) are small pictures of three colours: `birds/` by class, tar shards of them,
  and a data set on the Hub with the columns and splits of the one whose name it has.
- Trainings (`shorten`) have one epoch, batches of up to 16, and attacks of up to 2 steps; AutoAttack's attacks have 20
  iterations of 100, and its Square 50 queries of 5,000; `autolora quickstart` has the smallest settings that it takes.

As a script it takes the folder of the server's store, reads the path of a page a line from stdin, and answers with a
line of JSON: of every block that ran its line, seconds, and what went wrong.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from docs_blocks import GIVEN, ROOT, Block, autolora_arguments, commands, parse
from hub_server import Store
from PIL import Image
from sybil import Example


# Arguments that make a timm model small; the rest of it is timm's.
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {"resnet50": RESNET, "resnet18": RESNET, "vit_small_patch16_224": VIT}
SIZE = (3, 32, 32)
CLASSES = ("finch", "heron", "robin")
QUICKSTART = ["--epochs", "1", "--train-images", "100", "--test-images", "10", "--attack-steps", "1"]
ITERATIONS, QUERIES = 20, 50


def picture(label: int, random: np.random.Generator, size: int = 36) -> Image.Image:
    """A noisy picture whose colour tells its class."""
    pixels = random.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[..., label % 3] += 120
    return Image.fromarray(pixels)


# ---- what the reader has ----


def _write_files(folder: Path) -> None:
    """Folders `birds/` and `shards/`, `dynacl.pt`, and a copy of a model of the clone in `model_cards/`."""
    import torch
    from test_conversion import RESNET18, acl_file

    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (folder / "birds" / split / name).mkdir(parents=True)
            for index in range(count):
                picture(label, random).save(folder / "birds" / split / name / f"{index:03d}.jpg", quality=95)
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"train-{shard:03d}.tar", "w") as tar:
            for index in range(18):
                buffer = io.BytesIO()
                picture(index % 3, random).save(buffer, "PNG")
                content = {"png": buffer.getvalue(), "cls": str(index % 3).encode()}
                for extension, data in content.items():
                    entry = tarfile.TarInfo(f"{shard}{index:03d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    torch.manual_seed(0)
    torch.save({"state_dict": acl_file(RESNET18)}, folder / "dynacl.pt")
    shutil.copytree(ROOT / "model_cards" / "quickstart-digits", folder / "model_cards" / "quickstart-digits")


def _publish_models(store: Store) -> None:
    """Checkpoints of timm, transformers and this project under the names that the documentation uses."""
    import timm
    import torch
    from safetensors.torch import save
    from timm.models import get_pretrained_cfg
    from tiny_towers import IMAGE_SIZE, save_with_processor, tokenizer, whole_clip
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    for name in SMALL:
        weights = timm.create_model(name).state_dict()
        store.put(get_pretrained_cfg(name).hf_hub_id, {"model.safetensors": save(weights)})
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = ViTConfig(**sizes, image_size=IMAGE_SIZE, patch_size=8, num_labels=10)
        ViTForImageClassification(config).save_pretrained(folder)
        ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
        store.put("google/vit-base-patch16-224", files_of(folder))
    with tempfile.TemporaryDirectory() as folder:
        save_with_processor(whole_clip(), folder)
        tokenizer().save_pretrained(folder)
        store.put("openai/clip-vit-base-patch32", files_of(folder))


def _publish_data(store: Store) -> None:
    """`AI-Lab-Makerere/beans`: leaves of three classes in three splits, as Parquet."""
    import datasets

    random, files = np.random.default_rng(1), {}
    names = ["angular_leaf_spot", "bean_rust", "healthy"]
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.ClassLabel(names=names)})
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", 36), ("validation", 6), ("test", 6)):
            labels = [index % 3 for index in range(count)]
            images = [picture(label, random) for label in labels]
            path = Path(folder, f"{split}.parquet")
            datasets.Dataset.from_dict({"image": images, "labels": labels}, features=features).to_parquet(str(path))
            files[f"data/{split}-00000-of-00001.parquet"] = path.read_bytes()
    store.put("AI-Lab-Makerere/beans", files, kind="dataset")


def files_of(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- what takes long ----


def make_small() -> None:
    """Gives timm's registry small networks under the names in `SMALL`, for images of 32 x 32 pixels."""
    from functools import partial

    from timm.models import _registry as registry

    for name, arguments in SMALL.items():
        whole = registry._model_entrypoints[name]
        registry._model_entrypoints[name] = partial(whole, **arguments)
        tag = f"{name}.{registry.get_pretrained_cfg(name).tag}"
        for key in {name, tag} & registry._model_pretrained_cfgs.keys():
            config = registry._model_pretrained_cfgs[key]
            changes = {"input_size": SIZE, "test_input_size": None, "crop_pct": 1.0, "test_crop_pct": None}
            registry._model_pretrained_cfgs[key] = dataclasses.replace(config, **changes)


def shorten() -> None:
    """Trainings and AutoAttack as the head of this file says."""
    import pyautoattack

    from autolora_hf import AutoLoraTrainingArguments

    check = AutoLoraTrainingArguments.__post_init__

    def short(self: AutoLoraTrainingArguments) -> None:
        self.num_train_epochs = 1
        self.attack_steps, self.eval_attack_steps = min(self.attack_steps, 2), min(self.eval_attack_steps, 2)
        self.per_device_train_batch_size = min(self.per_device_train_batch_size, 16)
        check(self)

    AutoLoraTrainingArguments.__post_init__ = short
    suite = pyautoattack.AutoAttack.__init__

    def quick(self: pyautoattack.AutoAttack, *args: object, **kwargs: object) -> None:
        suite(self, *args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted, self.fab):
            attack.n_iter = ITERATIONS
        self.square.n_queries = QUERIES

    pyautoattack.AutoAttack.__init__ = quick


# ---- what a page starts from ----


def _trained(mode: str) -> None:
    """`birds-robust` or another folder, as `autolora train` leaves it."""
    data = "--train-data birds/train --test-data birds/test --eps 4/255"
    run_autolora(f"train --model resnet50 {data} --mode {mode} --output-dir birds-{mode}".split())


def _pixels() -> object:
    import torch

    return torch.rand(2, *SIZE)


def _backbone() -> object:
    import timm

    return timm.create_model("resnet50", pretrained=True, num_classes=len(CLASSES))


def _robust() -> None:
    _trained("full")
    Path("birds-full").rename("birds-robust")


def _robust_full() -> None:
    _trained("full")
    Path("birds-full").rename("birds-robust-full")


def _on_hub(mode: str, name: str) -> None:
    _trained(mode)
    run_autolora(["release", f"birds-{mode}", f"released-{mode}", "--data", "birds/test", "--name", name])
    run_autolora(["push", f"released-{mode}", name])
    shutil.rmtree(f"birds-{mode}")


def _data(split: str) -> object:
    import datasets

    return datasets.load_dataset("imagefolder", data_dir="birds", split=split)


# What `<!-- given: NAME ... -->` on a page makes: a value for the namespace, or (`None`) files or a repository.
GIVES = {
    "pixels": _pixels,
    "backbone": _backbone,
    "base": lambda: "resnet50",
    "data": lambda: _data("train"),
    "train": lambda: _data("train").filter(lambda row, index: index % 4, with_indices=True),
    "validation": lambda: _data("train").filter(lambda row, index: not index % 4, with_indices=True),
    "test": lambda: _data("test"),
    "birds-robust": _robust,
    "birds-robust-full": _robust_full,
    "org/birds-robust": lambda: _on_hub("full", "org/birds-robust"),
    "org/birds-adapter": lambda: _on_hub("adapter", "org/birds-adapter"),
}


# ---- running ----


def run_autolora(arguments: list[str]) -> None:
    """Runs a command in this process; raises `RuntimeError` with its output if it does not succeed."""
    from autolora_hf.cli import main

    if arguments[:1] == ["quickstart"]:
        arguments = [*arguments, *QUICKSTART]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(arguments)
    except SystemExit as stop:  # what argparse does
        status = stop.code
    if status:
        raise RuntimeError(f"`autolora {' '.join(arguments)}` ended with {status}:\n{said.getvalue()[-3000:]}")


def run_block(example: Example) -> None:
    block: Block = example.parsed
    if not block.runs:
        return
    if block.language == "python":
        # Line numbers in tracebacks are those of the page.
        exec(compile("\n" * block.line + block.source, example.path, "exec"), example.namespace)
        return
    for words in commands(block.source):
        arguments = autolora_arguments(words)
        if arguments is None or words[0] != "autolora":
            raise ValueError(f"A bash block that runs holds `autolora` commands only, got {words[0]!r}; mark it.")
        run_autolora(arguments)


@contextlib.contextmanager
def place(files: Path) -> Iterator[None]:
    """A folder with the reader's files as the working directory."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(files, folder, dirs_exist_ok=True)
        before = os.getcwd()
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def run_page(page: Path, files: Path) -> list[dict]:
    """Runs a page up to its first failure; returns of each block its line, seconds, and traceback or `None`."""
    document, done = parse(page, run_block), []
    # Some libraries look for the module that code is in.
    document.namespace["__name__"] = "__main__"
    with place(files):

        def attempt(line: int, action: object) -> bool:
            started, error = time.time(), None
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    action()
            except Exception:
                error = traceback.format_exc()[-20000:]
            done.append({"line": line, "seconds": round(time.time() - started, 1), "error": error})
            return error is None

        given = GIVEN.search(document.text)
        for name in given[1].split() if given else []:
            if not attempt(0, lambda name=name: _give(name, document.namespace)):
                return done
        for example in document.examples():
            if example.parsed.runs and not attempt(example.parsed.line, example.evaluate):
                break
    return done


def _give(name: str, namespace: dict) -> None:
    value = GIVES[name]()
    if value is not None:
        namespace[name] = value


def main() -> None:
    store = Store(sys.argv[1])
    # What is said on the way, by C libraries too, is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    make_small()
    shorten()
    _publish_models(store)
    _publish_data(store)
    with tempfile.TemporaryDirectory() as files:
        _write_files(Path(files))
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(run_page(Path(line.strip()), Path(files))), file=answers, flush=True)


if __name__ == "__main__":
    main()
