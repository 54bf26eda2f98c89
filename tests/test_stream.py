"""Streams: every sample once a pass, in an order that repeats, held out by content; and training on them."""

import io
import itertools
import json
import subprocess
import sys
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from datasets.distributed import split_dataset_by_node
from PIL import Image
from test_trainer import NAMES, StopAfter, arguments, copied_state, logged, pictures, same
from tiny_models import IMAGE_SIZE, MODELS
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from autolora_hf import AutoLoraTrainer, Preprocessing
from autolora_hf.cli import main
from autolora_hf.data import BrokenImageError, as_pixel_dataset, as_pixel_stream, collate, load_shards, stream_sources


PREPROCESSING = Preprocessing((8, 8), crop_pct=1.0)


def picture(number, size=8):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def encoded(number, size=8):
    file = io.BytesIO()
    picture(number, size).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, shards=4, each=10, broken=()):
    """Tar files of PNG images with labels 0, 1, 2 in turn."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for number in range(shard * each, (shard + 1) * each):
                image = b"damaged" if number in broken else encoded(number)
                for name, data in ((f"{number:04d}.png", image), (f"{number:04d}.cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return load_shards(str(folder / "train-*.tar"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def table(count=40, shards=4):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    columns = {"image": [picture(i) for i in range(count)], "label": [i % 3 for i in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset(num_shards=shards)


class Pairs(IterableDataset):
    """(image, label) from a function of the item's number; with `share`, each worker process has a part."""

    def __init__(self, count=40, image=picture, share=True):
        self.count, self.image, self.share = count, image, share

    def __iter__(self):
        worker = get_worker_info() if self.share else None
        numbers = range(self.count) if worker is None else range(worker.id, self.count, worker.num_workers)
        return ((self.image(i), i % 3) for i in numbers)


class Dictionaries(Pairs):
    def __iter__(self):
        return ({"img": image, "labels": torch.tensor(label)} for image, label in super().__iter__())


def identities(items):
    return [(item["labels"], item["pixel_values"].numpy().tobytes()) for item in items]


@cache
def expected(count=40):
    source = [(picture(i), i % 3) for i in range(count)]
    return identities(as_pixel_dataset(source, PREPROCESSING))


KINDS = {"shards": None, "table": table, "pairs": Pairs, "dictionaries": Dictionaries}


@pytest.fixture(params=KINDS)
def source(request, shards):
    return shards if request.param == "shards" else KINDS[request.param]()


# ---- passes ----


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_sample_once(source, shuffle, workers):
    stream = as_pixel_stream(source, PREPROCESSING, shuffle=shuffle, num_workers=workers, buffer_size=7)
    assert len(stream) == 40
    for epoch in range(2):
        stream.set_epoch(epoch)
        loader = DataLoader(stream, batch_size=16, collate_fn=collate)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [16, 16, 8]
        assert len(loader) == 3
        found = [
            (int(label), pixels.numpy().tobytes())
            for batch in batches
            for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
        ]
        assert sorted(found) == sorted(expected())
        if not shuffle and not workers:
            assert found == expected()


def test_a_loader_with_workers_of_its_own(shards):
    loader = DataLoader(as_pixel_stream(shards, PREPROCESSING), batch_size=None, num_workers=2)
    assert sorted(identities(loader)) == sorted(expected())


@pytest.mark.parametrize("workers", [0, 2])
def test_orders(source, workers):
    def orders(seed, epochs=(0, 1, 2)):
        stream = as_pixel_stream(
            source, PREPROCESSING, seed=seed, shuffle=True, buffer_size=20, num_workers=workers, augmentation="crop"
        )
        found = {}
        for epoch in epochs:
            stream.set_epoch(epoch)
            found[epoch] = identities(stream)
        return found

    first = orders(0)
    assert len({tuple(order) for order in first.values()}) == 3
    # Whatever was read before: a resumed run starts in the middle.
    assert orders(0, (2, 0)) == {2: first[2], 0: first[0]}
    assert orders(1, (0,))[0] != first[0]


def test_first_samples_disturb_nothing(source):
    stream, other = (as_pixel_stream(source, PREPROCESSING, shuffle=True, augmentation="crop-flip") for _ in "ab")
    stream.set_epoch(1)
    other.set_epoch(1)
    before = torch.get_rng_state()
    assert identities(stream.first(5)) == identities(itertools.islice(stream.plain(), 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert identities(stream) == identities(other)


def test_who_shuffled_is_not_shuffled_again():
    def order(dataset, epoch=0, **options):
        stream = as_pixel_stream(dataset, PREPROCESSING, **options)
        stream.set_epoch(epoch)
        return identities(stream)

    mine = table().shuffle(seed=3, buffer_size=10)
    assert order(mine, shuffle=True, seed=5) == order(mine, shuffle=True, seed=6) == order(mine)
    assert order(mine, 1, shuffle=True) != order(mine, shuffle=True)
    assert mine.epoch == 0  # the user's own object stays as it was


def test_unshuffled_passes_have_one_order(source):
    stream = as_pixel_stream(source, PREPROCESSING)
    first = identities(stream)
    stream.set_epoch(3)
    assert identities(stream) == first


def test_formats_and_columns_do_not_matter(shards):
    plain = identities(as_pixel_stream(table(), PREPROCESSING))
    assert identities(as_pixel_stream(table().with_format("torch"), PREPROCESSING)) == plain
    mapped = table().map(lambda row: {"photo": row["image"], "class": row["label"]}, remove_columns=["image", "label"])
    assert mapped.features is None
    stream = as_pixel_stream(mapped, PREPROCESSING, image_column="photo", label_column="class")
    assert identities(stream) == plain
    assert as_pixel_stream(shards, PREPROCESSING).num_classes == 3
    assert as_pixel_stream(table(), PREPROCESSING).class_names == NAMES


@pytest.mark.parametrize("count", [37, 40, 5])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_batch(count, processes):
    stream = as_pixel_stream(Pairs(count), PREPROCESSING, shuffle=True)
    stream.set_epoch(1)
    whole = identities(stream)
    parts = []
    for rank in range(processes):
        shard = IterableDatasetShard(stream, batch_size=4, num_processes=processes, process_index=rank)
        shard.set_epoch(1)
        parts.append(identities(shard))
    step = 4 * processes
    together = [
        parts[rank][start + i] for start in range(0, len(parts[0]), 4) for rank in range(processes) for i in range(4)
    ]
    assert together[: len(whole)] == whole
    # Only the last step is filled up, with samples seen before.
    assert len(together) == -(-len(whole) // step) * step
    assert set(together) == set(whole)


# ---- held-out samples ----


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out(source, seed):
    stream = as_pixel_stream(source, PREPROCESSING, shuffle=True, seed=seed, buffer_size=10)
    kept, held_out = stream.hold_out(0.2)
    assert Counter(held_out.labels.tolist()) in ({0: 3, 1: 3, 2: 2}, {0: 3, 1: 2, 2: 3})
    assert len(kept) == 32
    for epoch in range(2):
        kept.set_epoch(epoch)
        parts = [identities(part) for part in (kept, held_out)]
        assert not set(parts[0]) & set(parts[1])
        assert sorted(parts[0] + parts[1]) == sorted(expected())
        assert sorted(label for label, _ in parts[1]) == sorted(held_out.labels)
    assert sorted(identities(kept.plain())) == sorted(parts[0])


def test_another_seed_holds_out_others():
    parts = [
        frozenset(identities(as_pixel_stream(Pairs(), PREPROCESSING, seed=seed).hold_out(0.2)[1])) for seed in range(6)
    ]
    assert len(set(parts)) == 6


def test_copies_stay_together():
    stream = as_pixel_stream(Pairs(60, lambda i: picture(i // 6)), PREPROCESSING)  # 10 pictures, all in all classes
    for seed in range(5):
        kept, held_out = as_pixel_stream(stream, PREPROCESSING, seed=seed).hold_out(0.3)
        assert not set(identities(kept)) & set(identities(held_out))
    alike = as_pixel_stream(Pairs(30, lambda i: picture(i % 3)), PREPROCESSING)
    with pytest.raises(ValueError, match="are all the same"):
        alike.hold_out(0.3)


class ManyClasses(Pairs):
    """Two images of each class, and of the first two classes one more."""

    def __iter__(self):
        return ((self.image(i), i % 19) for i in range(40))


@pytest.mark.parametrize("size", [1, 10, 19, 39, 40, 100])
def test_a_bounded_stream(size):
    """Exactly as many as asked for, the same in every pass, with classes in proportion: none has to keep one."""
    stream = as_pixel_stream(ManyClasses(), PREPROCESSING, seed=3)
    part = stream.bounded(size)
    first = identities(part)
    assert len(part) == len(first) == min(size, 40)
    assert set(first) <= set(identities(stream)) and len(set(first)) == len(first)
    part.set_epoch(1)
    assert identities(part) == first
    counts = Counter(part.labels.tolist())
    assert max(counts.values()) - min(counts[label] for label in range(19)) <= 1
    assert part.bounded(5) is part or size >= 40


def test_a_validation_stream_is_bounded(tmp_path, caplog):
    args = arguments(tmp_path, max_validation_images=12)
    model = MODELS["hf_vit"].adapted(num_classes=3)
    validation = pictures(30, seed=1).to_iterable_dataset(num_shards=2)
    with caplog.at_level("INFO", "autolora_hf"):
        trainer = AutoLoraTrainer(model, args, train_dataset=pictures(), eval_dataset=validation)
    assert Counter(trainer.eval_dataset.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    assert trainer.plan["validation_images"] == 12
    assert "12 of 30 validation images are used" in caplog.text
    trainer.train()
    assert len(logged(trainer, "eval_robust_accuracy")) == 2


# ---- broken images ----


def test_broken_images(tmp_path, caplog):
    # The last of its class has its substitute at the start of the stream.
    source = write_shards(tmp_path / "data", broken=(4, 38))
    with pytest.raises(BrokenImageError, match=r"png of sample 0004 of train \(.*train-000\.tar\).*cannot be read"):
        list(as_pixel_stream(source, PREPROCESSING, name="train"))
    stream = as_pixel_stream(source, PREPROCESSING, name="train", broken_images="skip")
    for workers in (0, 2):
        skipping = as_pixel_stream(stream, PREPROCESSING, name="train", broken_images="skip", num_workers=workers)
        found = identities(skipping)
        assert len(found) == 40
        whole = [sample for i, sample in enumerate(expected()) if i not in (4, 38)]
        assert set(found) == set(whole)
        assert Counter(label for label, _ in found) == Counter(label for label, _ in expected())
    assert {f"sample {key} of train" in caplog.text for key in ("0004", "0038")} == {True}
    readable = stream.without_broken()
    assert sorted(identities(readable)) == sorted(whole)
    assert len(readable) == 38
    assert sorted(readable.labels) == sorted(label for label, _ in whole)


def test_a_class_of_broken_images(tmp_path):
    source = write_shards(tmp_path / "data", broken=range(1, 40, 3))
    stream = as_pixel_stream(source, PREPROCESSING, broken_images="skip")
    with pytest.raises(BrokenImageError, match="None of the images of class 1"):
        list(stream)


# ---- what is refused ----


@pytest.mark.parametrize("damaged", ["train-000.tar", "train-002.tar"])
@pytest.mark.parametrize("size", [700, 9000])
def test_a_shard_that_was_cut_off(tmp_path, damaged, size):
    write_shards(tmp_path / "data")
    shard = tmp_path / "data" / damaged
    shard.write_bytes(shard.read_bytes()[:size])
    name = damaged if damaged != "train-000.tar" else r"train-(000|\*)\.tar"
    with pytest.raises(ValueError, match=f"Damaged tar file.*data/{name} .*again"):
        as_pixel_stream(load_shards(str(tmp_path / "data" / "train-*.tar")), PREPROCESSING)


@pytest.mark.parametrize("pattern", ["none-*.tar", "none.tar"])
def test_no_shards(tmp_path, pattern):
    with pytest.raises(FileNotFoundError, match=r"There are no shards.*none"):
        load_shards(str(tmp_path / pattern))


def test_shards_as_test_data(shards):
    with pytest.raises(
        TypeError, match=r"test data cannot be a stream.*unpack the tar shards into a folder.*from_list"
    ) as raised:
        as_pixel_dataset(shards, PREPROCESSING)
    assert "streaming=True" not in str(raised.value)


class OneShot(IterableDataset):
    def __init__(self):
        self.items = iter([(picture(i), i % 3) for i in range(20)])

    def __iter__(self):
        return self.items


class Endless(IterableDataset):
    def __iter__(self):
        return ((picture(i % 50), i % 3) for i in itertools.count())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda: Pairs(0), ValueError, "train: The stream is empty"),
        (lambda: table().filter(lambda row: False), ValueError, "train is empty"),
        (OneShot, ValueError, "train can be read only once"),
        (Endless, ValueError, "train seems to have no end: 4096 samples were read, 50 of them"),
        (lambda: table().repeat(None), ValueError, "has no end: it was made with `repeat"),
        (lambda: table().remove_columns("label"), ValueError, "no label column"),
        (lambda: table().cast_column("label", datasets.Value("string")), TypeError, "label of sample 0 of train"),
        (lambda: split_dataset_by_node(table(), 0, 2), ValueError, "Pass the whole stream"),
        (lambda: iter([]), TypeError, "must be a `datasets.IterableDataset`"),
    ],
)
def test_refused(source, error, message):
    with pytest.raises(error, match=message):
        as_pixel_stream(source(), PREPROCESSING, name="train")


def test_no_end_of_new_samples(monkeypatch):
    monkeypatch.setattr(stream_sources, "MOST_SAMPLES", 100)
    with pytest.raises(ValueError, match="no end: 101 samples"):
        as_pixel_stream(Pairs(200), PREPROCESSING)


def test_streams_that_change():
    noisy = Pairs(image=lambda i: picture(int(torch.randint(1 << 30, ()))))
    with pytest.raises(ValueError, match="leave random augmentation to the trainer"):
        as_pixel_stream(noisy, PREPROCESSING).hold_out(0.2)
    for count, found in ((38, "38 instead of the 40"), (45, "more than the 40")):
        pairs = Pairs()
        stream = as_pixel_stream(pairs, PREPROCESSING, name="train")
        pairs.count = count
        with pytest.raises(ValueError, match=f"train gave {found} samples"):
            list(stream)


def test_workers_with_the_same_samples():
    stream = as_pixel_stream(Pairs(share=False), PREPROCESSING, num_workers=2)
    with pytest.raises(ValueError, match="same samples in each of 2 worker processes"):
        list(stream)


# ---- training ----


def new_trainer(folder, train, validation=None, callbacks=None, model="hf_vit", **changes):
    model = MODELS[model].adapted(num_classes=len(NAMES))
    args = arguments(folder, **changes)
    return AutoLoraTrainer(model, args, train_dataset=train, eval_dataset=validation, callbacks=callbacks)


@pytest.mark.parametrize("workers", [0, 2])
def test_training(tmp_path, workers):
    stream = pictures().to_iterable_dataset(num_shards=3)
    trainer = new_trainer(tmp_path, stream, dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0)
    assert (trainer.plan["training_images"], trainer.plan["validation_images"]) == (48, 12)
    assert trainer.plan["steps_per_epoch"] == 3
    before = copied_state(trainer.model)
    trainer.train()
    assert not same(copied_state(trainer.model), before)
    assert trainer.state.global_step == 6
    assert len(logged(trainer, "eval_robust_accuracy")) == 2
    assert len(logged(trainer, "feature_displacement")) == 1
    assert len(logged(trainer, "train_natural_route_accuracy")) == 3
    assert trainer.args.dataloader_num_workers == workers
    # SA by an independent count.
    plain = list(trainer.train_dataset.plain())
    with torch.no_grad():
        images = torch.stack([item["pixel_values"] for item in plain])
        hits = trainer.model.eval().pixel_space("natural")(images).argmax(-1) == torch.tensor(
            [item["labels"] for item in plain]
        )
    assert trainer.natural_training_accuracy() == pytest.approx(hits.double().mean().item())


@pytest.mark.parametrize("model", ["hf_vit", pytest.param("timm_resnet", marks=pytest.mark.slow)])
def test_exact_resume(tmp_path, model):
    stream = pictures().to_iterable_dataset(num_shards=3)
    options = {"model": model, "num_train_epochs": 3, "save_total_limit": None, "load_best_model_at_end": False}
    whole = new_trainer(tmp_path / "whole", stream, **options)
    whole.train()
    first = new_trainer(tmp_path / "parts", stream, callbacks=[StopAfter(2)], **options)
    first.train()
    assert first.state.global_step == 6
    second = new_trainer(tmp_path / "parts", stream, **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step == 9
    assert same(copied_state(second.model), copied_state(whole.model))
    assert not same(copied_state(first.model), copied_state(whole.model))


def test_validation_data(tmp_path, caplog):
    data = pictures()
    stream, other = data.to_iterable_dataset(), pictures(30, seed=1)
    for validation in (other, other.to_iterable_dataset()):
        trainer = new_trainer(tmp_path, stream, validation)
        assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (60, 30)
        assert not trainer.plan["validation_held_out_of_training"]
        assert 0 <= trainer.evaluate()["eval_robust_accuracy"] <= 1
    trainer = new_trainer(tmp_path, stream.skip(20), stream.take(20))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (40, 20)
    assert len(new_trainer(tmp_path, data, other.to_iterable_dataset()).eval_dataset) == 30
    for validation in (stream, stream.take(20), data):
        with pytest.raises(ValueError, match=r"eval_dataset shares .* images with train_dataset.*dataset.skip"):
            new_trainer(tmp_path, stream, validation)
    with pytest.raises(ValueError, match="is the 'test' split"):
        new_trainer(tmp_path, stream, datasets.IterableDataset.from_generator(lambda: iter(other), split="test"))


def test_test_data(tmp_path):
    trainer = new_trainer(tmp_path, pictures().to_iterable_dataset())
    assert len(trainer.prepare_test_data(pictures(30, seed=1))) == 30
    with pytest.raises(ValueError, match=r"shares .* images"):
        trainer.prepare_test_data(pictures())


def test_labels_outside_the_model(tmp_path):
    stream = pictures().cast_column("label", datasets.Value("int64")).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"labels of train_dataset are outside 0 .. 2"):
        new_trainer(tmp_path, stream.map(lambda row: {"label": row["label"] + 2}, features=stream.features))


def test_nothing_is_counted_twice_by_several_processes(tmp_path):
    """What accelerate cuts off the last batch when it gathers."""
    trainer = new_trainer(tmp_path, pictures().to_iterable_dataset())
    stream = trainer.train_dataset  # 48 samples
    trainer.args._n_gpu = 1

    class Two:
        def prepare(self, loader):
            return prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)

    accelerator, trainer.accelerator = trainer.accelerator, Two()
    world = type(trainer.args).world_size
    try:
        type(trainer.args).world_size = 2
        loader = trainer._get_dataloader(stream, "Test", 20)
    finally:
        type(trainer.args).world_size = world
        trainer.accelerator = accelerator
    sizes = [len(batch["labels"]) for batch in loader]
    assert sizes == [20, 20]
    assert loader.remainder == 48 % 40


def test_command(tmp_path):
    write_shards(tmp_path / "data")
    quick = (
        "--num_train_epochs 1 --attack_steps 1 --eval_attack_steps 1 --use_cpu --report_to none --disable_tqdm True"
    )
    data = ["--train-data", str(tmp_path / "data" / "train-*.tar"), "--validation_fraction", "0.2"]
    model = MODELS["hf_vit"].fresh(num_classes=3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}})
    )
    main(["train", "--model", str(tmp_path / "model"), *data, "--output_dir", str(tmp_path / "out"), *quick.split()])
    plan = json.loads((tmp_path / "out" / "training_plan.json").read_text())
    assert (plan["training_images"], plan["validation_images"]) == (32, 8)
    assert main(["train", "--model", "x", "--train-data", "x-*.tar", "--train-split", "train"]) != 0


@pytest.mark.slow
def test_memory():
    script = Path(__file__).parents[1] / "scripts" / "streaming_memory.py"
    command = [sys.executable, str(script), "--allowance", "100", "--factor", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "within" in run.stdout
