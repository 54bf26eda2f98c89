"""Training with several processes that each hold a copy of the model (DDP): the same steps as one process would make.

Every process gets an equal part of each batch. Where the data do not divide evenly, the last batch of an epoch is
filled up with samples that were seen before; these take part in the forward pass but not in the loss.

BatchNorm is the exception: it normalises with the statistics of the part of the batch that its process has. The
running statistics are those of the main process, in all processes: before every step, in evaluation and in what is
saved. `SyncBatchNorm`, which exists on GPUs, uses those of the whole batch: convert the backbone before
`get_autolora_model`, with `timm.layers.convert_sync_batchnorm` or `torch.nn.SyncBatchNorm.convert_sync_batchnorm`. A
model of mode `full` is then loaded with the backbone as `base_model=`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import has_length

from ..attacks.pgd import random_perturbation
from ..config import ThreatModel


logger = logging.getLogger(__name__)

_USE_DDP = (
    "Launch with `accelerate launch` or `torchrun` and neither FSDP nor DeepSpeed: every process then holds the whole "
    "model (DDP). For less memory use `mode='adapter'`, `activation_checkpointing=True` or `bf16=True`."
)


@dataclass(frozen=True)
class Share:
    """The part of an optimizer step that one process computes in one micro step.

    Args:
        first (`int`): Position of its first sample among all samples of the optimizer step.
        count (`int`): Its own samples, which come first in its batch; what follows repeats samples of others.
        weight (`float`): Of the mean loss of its own samples, so that the mean over processes and micro steps is the
            mean over all samples of the optimizer step.
    """

    first: int
    count: int
    weight: float

    @classmethod
    def whole(cls, count: int) -> Share:
        """A step of one process and one micro step."""
        return cls(0, count, 1.0)


def step_shares(sizes: Sequence[int], args: TrainingArguments, ending: Dataset | None = None) -> list[Share]:
    """What this process computes in each micro step of one optimizer step.

    Args:
        sizes (`Sequence[int]`): Batch size of each micro step, the same in all processes.
        args (`TrainingArguments`): Accelerate gives process r of n the r-th part of a batch.
        ending (`Dataset`, *optional*): The training set, if its last batch is among them.
    """
    rank, processes = args.process_index, args.world_size
    totals = [size * processes for size in sizes]
    # With one process the last batch is smaller; with several it is filled up to the size of the others.
    if ending is not None and totals and processes > 1 and has_length(ending) and not args.dataloader_drop_last:
        totals[-1] = len(ending) % totals[-1] or totals[-1]
    shares, first = [], 0
    for size, total in zip(sizes, totals, strict=True):
        count = min(max(total - rank * size, 0), size)
        shares.append(Share(first + rank * size, count, len(sizes) * processes * count / sum(totals)))
        first += size * processes
    return shares


def random_starts(pixels: Tensor, threat_model: ThreatModel, *key: int, first: int) -> Tensor:
    """First iterates of an attack: a uniform point of the ball around each image, cut to [0, 1].

    Each depends on `key` and the position of its image (`first`, `first` + 1, ...) alone: not on how a batch is split
    over processes and micro steps, nor on where a run was resumed, and the global random state is left alone.
    """
    generator = torch.Generator(device=pixels.device)
    noise = []
    for position, image in enumerate(pixels.split(1), start=first):
        seed = np.random.SeedSequence((*key, position)).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(seed >> 1))
        noise.append(random_perturbation(image, threat_model, generator))
    return (pixels + torch.cat(noise)).clamp_(0, 1)


@torch.no_grad()
def synchronize(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the values that the main one has.

    DDP does so with all weights when training starts, and with all buffers before every training step; but not after
    the last one, when each process has the running statistics (BatchNorm) of its own part of the batch, nor for an
    evaluation without training.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def check_parallelism(args: TrainingArguments) -> None:
    """Refuses ways of running in parallel that would train something else, and keeps to one GPU in one process.

    Raises:
        ValueError: For FSDP, DeepSpeed, tensor, context or sequence parallelism, and for batches that are split in
            another way than Accelerate's default.
    """
    if args.fsdp or _set_by_launcher("FSDP"):
        raise ValueError(
            "FSDP is not supported: attacks run on a copy of the weights, and checkpoints are written from and loaded "
            "into them, neither of which is possible where every process holds only a shard. " + _USE_DDP
        )
    if args.deepspeed or _set_by_launcher("DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: its engine owns optimizer, gradients and checkpoints, which the automatic "
            "learning rate has to read and set. " + _USE_DDP
        )
    if args.parallelism_config is not None or _set_by_launcher("PARALLELISM_CONFIG"):
        raise ValueError(
            "`parallelism_config` (tensor, context or sequence parallelism) is not supported: both routes and the "
            "attack need the whole model in one process. " + _USE_DDP
        )
    options = cast(AcceleratorConfig, args.accelerator_config)
    if options.split_batches or not options.even_batches:
        raise ValueError(
            "`accelerator_config` must leave `split_batches` at False and `even_batches` at True, got "
            f"{options.split_batches} and {options.even_batches}. `per_device_train_batch_size` is the batch of one "
            "process, and processes without a batch of their own would keep the others waiting. Repeated samples are "
            "left out of loss and metrics."
        )
    if args.n_gpu > 1:
        logger.warning(
            "Using one of %d GPUs. To use all of them start one process for each: `accelerate launch "
            "--num_processes %d ...`.",
            args.n_gpu,
            args.n_gpu,
        )
        # `Trainer` would wrap the model in `nn.DataParallel`, whose copies know nothing of routes.
        args._n_gpu = 1


def _set_by_launcher(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() in ("1", "true", "yes", "y", "on")


def check_shared_folder(args: TrainingArguments, file: Path) -> None:
    """Checks that every process sees `file`, which the saving ones have written into the output folder.

    Raises:
        FileNotFoundError: If the machines have output folders of their own, but only one of them saves. Going back to
            the best weights would then happen on that one alone.
    """
    if args.world_size == 1:
        return
    dist.barrier()
    seen = torch.tensor(file.is_file(), dtype=torch.int32, device=args.device)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    if not seen.item():
        raise FileNotFoundError(
            f"Not every process sees {file}: `output_dir` is another folder on another machine. Use a folder that all "
            "machines share, or `save_on_each_node=True`."
        )
