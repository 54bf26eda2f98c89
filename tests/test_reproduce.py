"""The recipes of the paper's tables, on miniatures with the layout and the file formats of each data set."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import scipy.io
import timm
import torch
from PIL import Image
from script_modules import SCRIPTS, load

from autolora_hf.data import as_pixel_dataset, named_test_set
from autolora_hf.pixels import Preprocessing


FOLDER = SCRIPTS / "reproduce"
data, cells, run, table = (load(name, FOLDER) for name in ("paper_data", "paper_cells", "run", "table"))

KEYS = list(data.DATA_SETS)
CLASSES, TRAIN, TEST = 3, 8, 3


def picture(label, number, size=(48, 40)):
    """An image that no other of its data set has, of its class' colour."""
    generator = np.random.default_rng((label, number))
    pixels = generator.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., label] += 120
    return Image.fromarray(pixels)


def write_picture(path, label, number, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(label, number).convert(mode).save(path, "PNG" if mode == "RGBA" else "JPEG", quality=95)


# ---- miniatures ----


def write_cifar10(root):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    rows = [(label, number) for number in range(TRAIN) for label in range(CLASSES)]
    parts = {f"data_batch_{batch + 1}.bin": rows[batch::5] for batch in range(5)}
    parts["test_batch.bin"] = [(label, TRAIN + number) for number in range(TEST) for label in range(CLASSES)]
    for name, part in parts.items():
        (folder / name).write_bytes(b"".join(bytes([label]) + planes(label, number) for label, number in part))


def write_cifar100(root):
    folder = root / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n")
    (folder / "coarse_label_names.txt").write_text("aquatic_mammals\nfish\n")
    for name, numbers in (("train", range(TRAIN)), ("test", range(TRAIN, TRAIN + TEST))):
        rows = ((label, number) for label in range(CLASSES) for number in numbers)
        content = (bytes([19, label]) + planes(label, number) for label, number in rows)
        (folder / f"{name}.bin").write_bytes(b"".join(content))


def planes(label, number):
    return np.asarray(picture(label, number, (32, 32))).transpose(2, 0, 1).tobytes()


def write_dtd(root):
    folder, lists = root / "dtd", {"train": [], "val": [], "test": []}
    for label, name in enumerate(("banded", "blotchy", "braided")):
        for number in range(TRAIN + TEST):
            file = f"{name}/{name}_{number:04}.jpg"
            write_picture(folder / "images" / file, label, number)
            split = "test" if number >= TRAIN else "train" if number % 2 else "val"
            lists[split].append(file)
    (folder / "labels").mkdir()
    for split, files in lists.items():
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(files) + "\n")


BREEDS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02086240-Shih-Tzu")


def write_dogs(root):
    folder, lists = root / "stanford-dogs", {"train": [], "test": []}
    for label, breed in enumerate(BREEDS):
        for number in range(TRAIN + TEST):
            file = f"{breed}/{breed.split('-')[0]}_{number}.jpg"
            write_picture(folder / "Images" / file, label, number)
            lists["train" if number < TRAIN else "test"].append((file, label + 1))
    for split, rows in lists.items():
        write_mat(folder / f"{split}_list.mat", rows)


def write_mat(path, rows):
    """Columns of cells and of numbers, as MATLAB wrote them."""
    names = np.empty((len(rows), 1), dtype=object)
    names[:, 0] = [file for file, _ in rows]
    annotations = np.empty_like(names)
    annotations[:, 0] = [file.removesuffix(".jpg") for file, _ in rows]
    labels = np.array([[label] for _, label in rows], dtype=np.float64)
    scipy.io.savemat(path, {"file_list": names, "annotation_list": annotations, "labels": labels})


def write_cub(root):
    folder, lines = root / "CUB_200_2011", {"images": [], "image_class_labels": [], "train_test_split": []}
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    index = 0
    for label, name in enumerate(names):
        for number in range(TRAIN + TEST):
            index += 1
            file = f"{name}/{name[4:]}_{number:04}_{index}.jpg"
            write_picture(folder / "images" / file, label, number, "L" if number == 0 else "RGB")
            lines["images"].append(f"{index} {file}")
            lines["image_class_labels"].append(f"{index} {label + 1}")
            lines["train_test_split"].append(f"{index} {int(number < TRAIN)}")
    lines["classes"] = [f"{label + 1} {name}" for label, name in enumerate(names)]
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")


def write_caltech256(root):
    folder = root / "256_ObjectCategories"
    for label, name in enumerate(("001.ak47", "002.american-flag", "257.clutter")):
        # The last class has no image to spare for the test.
        for number in range(TRAIN + (TEST if label < 2 else 0)):
            mode = {1: "L", 2: "CMYK", TRAIN: "RGBA"}.get(number, "RGB")
            write_picture(folder / name / f"{name[:3]}_{number + 1:04}.jpg", label, number, mode)
    # As in the archive: a folder and a file that are no images of the class.
    write_picture(folder / "001.ak47" / "greg" / "001_0001.jpg", 0, 0)
    (folder / "002.american-flag" / "RENAME2").write_text("#!/bin/sh\n")


def mini(key, **changes):
    """The description of a miniature: that of the data set with other numbers, and small images."""
    test = CLASSES * TEST if key != "caltech256" else 2 * TEST
    numbers = {"classes": CLASSES, "images": CLASSES * TRAIN + test, "train": CLASSES * TRAIN, "test": test}
    if key == "caltech256":
        numbers |= {"train": None, "test": None, "train_per_class": TRAIN}
    return dataclasses.replace(data.DATA_SETS[key], **{**numbers, "image_size": 32, **changes})


@pytest.fixture(scope="module")
def all_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for key in KEYS:
        globals()[f"write_{key}"](root)
    return root


@pytest.fixture
def own(tmp_path, request):
    """A miniature that a test may damage."""
    globals()[f"write_{request.param}"](tmp_path)
    return tmp_path


def labels(part):
    return as_pixel_dataset(part, Preprocessing((32, 32))).labels


# ---- readers ----


def test_official_numbers():
    numbers = {key: (one.classes, one.images, one.train, one.test) for key, one in data.DATA_SETS.items()}
    assert numbers == {
        "cifar10": (10, 60_000, 50_000, 10_000),
        "cifar100": (100, 60_000, 50_000, 10_000),
        "dtd": (47, 5_640, 3_760, 1_880),
        "dogs": (120, 20_580, 12_000, 8_580),
        "cub": (200, 11_788, 5_994, 5_794),
        "caltech256": (257, 30_607, None, None),
    }
    assert data.DATA_SETS["caltech256"].train_per_class == 150
    assert {key: one.image_size for key, one in data.DATA_SETS.items()} == {
        key: 32 if key.startswith("cifar") else 224 for key in KEYS
    }


NAMES = {
    "cifar10": ["airplane", "automobile", "bird"],
    "cifar100": ["apple", "aquarium_fish", "baby"],
    "dtd": ["banded", "blotchy", "braided"],
    "dogs": ["Chihuahua", "Japanese_spaniel", "Shih-Tzu"],
    "cub": ["Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross"],
    "caltech256": ["ak47", "american-flag", "clutter"],
}


@pytest.mark.parametrize("key", KEYS)
def test_images_labels_and_splits(all_data, key):
    splits = mini(key).load(all_data)
    parts = [as_pixel_dataset(part, Preprocessing((32, 32), crop_pct=1.0)) for part in splits]
    assert [part.class_names for part in parts] == [NAMES[key]] * 2
    counts = [np.bincount(part.labels, minlength=3).tolist() for part in parts]
    assert counts == [[TRAIN] * 3, [TEST, TEST, 0 if key == "caltech256" else TEST]]
    seen = set()
    for part in parts:
        for item in part:
            pixels = item["pixel_values"]
            assert pixels.shape == (3, 32, 32)
            seen.add(pixels.numpy().tobytes())
            channels = pixels.mean((1, 2))
            # Grey images tell nothing of the colour of their class.
            assert channels.max() - channels.min() < 0.02 or channels.argmax() == item["labels"]
    assert len(seen) == sum(map(len, parts))
    # The package refuses to select weights by it.
    assert named_test_set(splits.test) is not None and named_test_set(splits.train) is None


@pytest.mark.parametrize("key", KEYS)
def test_own_folder_and_folder_of_all_are_the_same(all_data, key):
    inside = mini(key).load(all_data / mini(key).folder)
    assert [labels(part) for part in inside] == [labels(part) for part in mini(key).load(all_data)]


def test_cifar_pixels_are_those_of_the_file(all_data):
    for key in ("cifar10", "cifar100"):
        splits = mini(key).load(all_data)
        image, label = splits.test[0]
        assert np.array_equal(image, np.asarray(picture(label, TRAIN, (32, 32))))


def test_official_lists_are_followed(all_data):
    dtd = mini("dtd").load(all_data)
    trained = {row["path"].rsplit("/", 1)[1] for row in dtd.train.cast_column("image", undecoded())["image"]}
    assert "banded_0000.jpg" in trained and "banded_0001.jpg" in trained  # of val1.txt and of train1.txt
    caltech = mini("caltech256").load(all_data)
    tested = [row["path"].rsplit("/", 1)[1] for row in caltech.test.cast_column("image", undecoded())["image"]]
    assert tested == [f"00{label}_{TRAIN + number:04}.jpg" for label in (1, 2) for number in (1, 2, 3)]


def undecoded():
    import datasets

    return datasets.Image(decode=False)


@pytest.mark.parametrize("key", KEYS)
def test_missing_data_name_the_page_to_get_them_from(tmp_path, key):
    with pytest.raises(FileNotFoundError) as caught:
        data.DATA_SETS[key].load(tmp_path / "nowhere")
    assert data.DATA_SETS[key].url in str(caught.value) and "README.md" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"is missing|has no folders") as caught:
        data.DATA_SETS[key].load(tmp_path)
    assert data.DATA_SETS[key].url in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_part_of_a_data_set_is_refused(all_data, key):
    with pytest.raises(ValueError, match=r"is not the whole of .*3 classes instead of .* images instead of"):
        dataclasses.replace(mini(key), classes=data.DATA_SETS[key].classes, images=99).load(all_data)


def cut(path, count=-7):
    path.write_bytes(path.read_bytes()[:count])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "cifar-short": (
        "cifar10",
        lambda root: cut(root / "data_batch_3.bin"),
        "data_batch_3.bin is damaged.*whole number",
    ),
    "cifar-empty": ("cifar100", lambda root: cut(root / "test.bin", 0), "test.bin is damaged: 0 bytes"),
    "cifar-label": ("cifar10", lambda root: edit(root / "batches.meta.txt", "bird\n", ""), "has label 2"),
    "cifar-names": ("cifar100", lambda root: (root / "fine_label_names.txt").unlink(), "names.txt is missing"),
    "cifar-binary-names": (
        "cifar100",
        lambda root: (root / "fine_label_names.txt").write_bytes(b"\xff\xfe"),
        "is no text",
    ),
    "dtd-list": ("dtd", lambda root: (root / "labels" / "val1.txt").unlink(), "val1.txt is missing"),
    "dtd-image": (
        "dtd",
        lambda root: (root / "images" / "banded" / "banded_0009.jpg").unlink(),
        "1 of 9 test images are missing.*banded_0009",
    ),
    "dtd-line": ("dtd", lambda root: edit(root / "labels" / "test1.txt", "banded/", "x/y/"), "not CLASS/FILE"),
    "dtd-both": (
        "dtd",
        lambda root: edit(root / "labels" / "test1.txt", "banded_0009", "banded_0001"),
        "1 images are in both splits: banded/banded_0001.jpg",
    ),
    "dtd-outside": ("dtd", lambda root: edit(root / "labels" / "test1.txt", "banded/", "../"), "files outside of it"),
    "dogs-mat": ("dogs", lambda root: cut(root / "test_list.mat", 200), "test_list.mat is damaged"),
    "dogs-other-mat": ("dogs", lambda root: scipy.io.savemat(root / "test_list.mat", {"x": 1}), "KeyError"),
    "dogs-label": (
        "dogs",
        lambda root: write_mat(root / "test_list.mat", [(f"{BREEDS[0]}/n02085620_9.jpg", 2)]),
        "class 2 is n02085782-Japanese_spaniel and n02085620-Chihuahua at once",
    ),
    "cub-split": ("cub", lambda root: edit(root / "train_test_split.txt", "1 1\n", ""), "train_test_split.txt"),
    "cub-flag": ("cub", lambda root: edit(root / "train_test_split.txt", "33 0", "33 yes"), "yes in the place of"),
    "cub-class": ("cub", lambda root: edit(root / "classes.txt", "3 003", "4 003"), "does not have class 3"),
    "cub-line": ("cub", lambda root: edit(root / "images.txt", "33 ", "33 of "), "not NUMBER VALUE: 33 of"),
    "cub-twice": ("cub", lambda root: edit(root / "images.txt", "33 ", "32 "), "numbers occur twice"),
    "caltech-none": ("caltech256", lambda root: shutil.rmtree(root / "002.american-flag"), "2 classes instead of 3"),
    "caltech-few": (
        "caltech256",
        lambda root: [path.unlink() for path in root.rglob("*_00??.jpg") if int(path.stem[4:]) > TRAIN],
        "no class has more than 8 images",
    ),
}


@pytest.mark.parametrize("own", [key for key, _, _ in DAMAGE.values()], ids=list(DAMAGE), indirect=True)
def test_damaged_data_are_refused(own, request):
    key, damage, message = DAMAGE[request.node.callspec.id]
    description = mini(key)
    damage(own / description.folder)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}") as caught:
        description.load(own)
    assert description.url in str(caught.value) and len(str(caught.value)) < 1000


# ---- cells ----


def robust_file(path, network):
    """A checkpoint with the names of robust-models-transfer: twice the network, and its normalisation."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    state = {"normalizer.new_mean": mean, "normalizer.new_std": std}
    state |= {"attacker.normalize.new_mean": mean, "attacker.normalize.new_std": std}
    for prefix in ("model.", "attacker.model."):
        state |= {prefix + name: value for name, value in network.state_dict().items()}
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 89}, path)
    return path


TINY = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
TINY_BACKBONES = {
    "resnet18": dataclasses.replace(cells.BACKBONES["resnet18"], model_args={**TINY}),
    "resnet50": cells.BACKBONES["resnet50"],
}
# The largest radius breaks every image that can be broken with the first attack, which spares the slow ones.
QUICK = [
    *("--num_train_epochs", "1", "--per_device_train_batch_size", "12", "--attack_steps", "1"),
    *("--eval_attack_steps", "1", "--eps", "0.5", "--attack_step_size", "0.5", "--validation_fraction", "0.2"),
    *("--use_cpu", "--disable_tqdm", "True", "--per_device_eval_batch_size", "4"),
]


def arguments(root, checkpoint, output, key, method="autolora", backbone="resnet18", attacked=2):
    return [
        *("--data-set", key, "--data", str(root), "--backbone", backbone, "--method", method, "--seed", "0"),
        *("--checkpoint", str(checkpoint), "--output", str(output), "--attacked", str(attacked), *QUICK),
    ]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return robust_file(tmp_path_factory.mktemp("weights") / "tiny.ckpt", timm.create_model("resnet18", **TINY))


def minis(**changes):
    return {key: mini(key, **changes) for key in KEYS}


@pytest.mark.parametrize(("key", "method"), [("cifar10", "autolora"), ("cub", "trades"), ("dogs", "twins-trades")])
def test_one_command_from_files_to_the_page(all_data, tiny_checkpoint, tmp_path, capsys, key, method):
    argv = arguments(all_data, tiny_checkpoint, tmp_path / "runs", key, method)
    # Above 64 pixels photos are cropped otherwise.
    small = minis() | {"cub": mini("cub", image_size=96)}
    run.main(argv, small, TINY_BACKBONES)
    folder = tmp_path / "runs" / key / "resnet18" / method / "seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["data_set"], result["method"], result["seed"]) == (key, method, 0)
    assert result["settings"]["num_train_epochs"] == 60 and result["changed"]["num_train_epochs"] == 1
    assert result["training"]["plan"]["validation_held_out_of_training"]
    assert result["training"]["training_images"] + result["training"]["validation_images"] == CLASSES * TRAIN
    pgd, auto = (result["reports"][name] for name in ("pgd10", "autoattack"))
    assert len(auto["sample_indices"]) == 2 and pgd["sample_digests"] == auto["sample_digests"]
    assert auto["class_names"] == NAMES[key] and auto["protocol"] != "custom"
    assert pgd["attack_settings"][0]["random_start"] is False
    assert not list((folder / "trainer").glob("checkpoint-*"))

    # Again: nothing is done twice.
    written = (folder / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    run.main(argv, small, TINY_BACKBONES)
    assert "finished" in capsys.readouterr().out
    assert (folder / "result.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"holds another run .*changed was"):
        run.main([*argv, "--weight_decay", "0.1"], small, TINY_BACKBONES)

    page = written_page(tmp_path)
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and "---" not in line and "data set" not in line
    ]
    assert len(rows) == 36
    title = f"| {data.DATA_SETS[key].title} | {cells.METHODS[method].title} | "
    filled = [row for row in rows if "not run" not in row]
    assert len(filled) == 1 and filled[0].startswith(title) and filled[0].endswith("| 0 | 2 |")
    assert f"| {100 * auto['natural']['correct'] / 2:.2f} | " in filled[0]
    assert "1 of 36 cells were run" in page
    # It is not taken for the paper's.
    assert "[1] Not the paper's settings:" in page and "`num_train_epochs = 1`" in page and "other data:" in page


def written_page(tmp_path):
    table.main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.md")])
    return (tmp_path / "page.md").read_text()


def test_what_was_trained_is_not_trained_again(all_data, tiny_checkpoint, tmp_path, monkeypatch):
    argv = arguments(all_data, tiny_checkpoint, tmp_path / "runs", "dtd")

    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_robustness", killed)
        with pytest.raises(KeyboardInterrupt):
            run.main(argv, minis(), TINY_BACKBONES)
    folder = tmp_path / "runs" / "dtd" / "resnet18" / "autolora" / "seed-0"
    trained = (folder / "trained.json").stat().st_mtime_ns
    assert not (folder / "result.json").exists() and "not run" in written_page(tmp_path)
    run.main(argv, minis(), TINY_BACKBONES)
    assert (folder / "result.json").is_file() and (folder / "trained.json").stat().st_mtime_ns == trained
    # Another number of images is attacked without another training.
    run.main(arguments(all_data, tiny_checkpoint, tmp_path / "runs", "dtd", attacked=1), minis(), TINY_BACKBONES)
    result = json.loads((folder / "result.json").read_text())
    assert len(result["reports"]["autoattack"]["sample_indices"]) == result["attacked"] == 1
    assert (folder / "trained.json").stat().st_mtime_ns == trained


def test_interrupted_training_goes_on_to_the_same_weights(all_data, tiny_checkpoint, tmp_path, monkeypatch):
    def argv(name):
        return [*arguments(all_data, tiny_checkpoint, tmp_path / name, "cifar10"), "--num_train_epochs", "2"]

    class Killed(run.AutoLoraTrainer):
        def _save_checkpoint(self, *args, **options):
            super()._save_checkpoint(*args, **options)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "AutoLoraTrainer", Killed)
        with pytest.raises(KeyboardInterrupt):
            run.main(argv("killed"), minis(), TINY_BACKBONES)
    for name in ("killed", "whole"):
        run.main(argv(name), minis(), TINY_BACKBONES)
    folders = [tmp_path / name / "cifar10" / "resnet18" / "autolora" / "seed-0" for name in ("killed", "whole")]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert results[0]["training"]["epochs"] == results[1]["training"]["epochs"] == 2
    assert results[0]["reports"]["pgd10"]["robust"] == results[1]["reports"]["pgd10"]["robust"]


def test_dry_run_tells_steps_and_work(all_data, tmp_path, capsys):
    options = ["--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--dry-run"]
    run.main(["--all", *options])
    out = capsys.readouterr().out
    assert out.count(": not started") == 2 * 6 * 3 * 3
    # 2,500 images are held out, and the last batch is a small one.
    assert "50,000 images, 2,500 of them held out; 60 epochs of 372 steps, 22,320 steps" in out
    assert "10,000 of 10,000 test images" in out and "https://data.caltech.edu" in out
    assert not (tmp_path / "runs").exists()
    run.main(["--all", "--data-set", "cub", "--seed", "1", *options[:1], str(all_data), *options[2:]], minis())
    assert capsys.readouterr().out.count("24 images, 1 of them held out") == 6


def test_settings_are_the_papers():
    settings = cells.Cell("cub", "resnet50", "autolora", 2).settings()
    args = run.AutoLoraTrainingArguments("unused", report_to="none", use_cpu=True, **settings)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.weight_decay) == (60, 128, 1e-4)
    assert (float(args.eps), args.attack_steps, float(args.attack_step_size)) == (8 / 255, 10, 2 / 255)
    assert (args.learning_rate_schedule, args.validation_fraction, args.seed) == ("plateau", 0.05, 2)
    plan = args.method_plan(60)
    assert plan["halving_checkpoints"] == list(range(0, 60, 4)) and plan["scalar_lambda2_max"] == 6
    twins = cells.Cell("caltech256", "resnet50", "twins-trades", 0).settings()
    assert (twins["weight_decay"], twins["objective_kwargs"]) == (1e-3, {"weight": 0.4})
    assert cells.Cell("cub", "resnet50", "twins-trades", 0).settings()["weight_decay"] == 1e-4


def test_only_what_changes_the_method_counts_as_changed():
    cell = cells.Cell("cub", "resnet50", "autolora", 0)
    options = ["--all", "--data", "d", "--output", "o"]
    _, given = run.parse([*options, "--dataloader_num_workers", "4", "--weight_decay", "1e-4"], {}, {})
    assert given["dataloader_num_workers"] == 4 and run._changed(cell, given) == {}
    _, given = run.parse([*options, "--bf16", "--eps", "8/255"], {}, {})
    assert run._changed(cell, given) == {"bf16": True}
    for refused in ("--objective", "--output_dir"):
        with pytest.raises(SystemExit):
            run.parse([*options, refused, "x"], {}, {})
    with pytest.raises(SystemExit):
        run.parse(["--data", "d", "--output", "o", "--backbone", "resnet50"], {}, cells.BACKBONES)


def test_checkpoint_is_found_or_refused(tiny_checkpoint, tmp_path):
    backbone = cells.BACKBONES["resnet18"]
    for path in (None, tmp_path, tmp_path / "nowhere.ckpt"):
        with pytest.raises(FileNotFoundError, match=r"resnet18_linf_eps4.0.ckpt"):
            run.find_checkpoint(path, backbone)
    shutil.copy(tiny_checkpoint, tmp_path / backbone.file)
    assert run.find_checkpoint(tmp_path, backbone) == tmp_path / backbone.file
    with pytest.raises(ValueError, match="is no resnet18"):
        run.load_network(tmp_path / backbone.file, backbone, 3)


def test_converted_folder_is_taken_with_a_new_head(tiny_checkpoint, tmp_path):
    from autolora_hf.initializers.conversion import convert_checkpoint, save_conversion

    conversion = convert_checkpoint(tiny_checkpoint, "resnet18", model_args=TINY)
    folder = save_conversion(conversion, tmp_path / "resnet18")
    assert run.find_checkpoint(tmp_path, TINY_BACKBONES["resnet18"]) == folder
    network = run.load_network(folder, TINY_BACKBONES["resnet18"], 5)
    assert network.fc.weight.shape == (5, 16) and network.fc.weight.std() > 0
    assert torch.equal(network.conv1.weight, conversion.model.conv1.weight)
    with pytest.raises(ValueError, match="holds a resnet18, not a resnet50"):
        run.load_network(folder, TINY_BACKBONES["resnet50"], 5)


def test_mean_and_spread_over_seeds():
    def one(seed, *figures, notes=(), images=100):
        figures = cells.Figures(*figures)
        return table.Run("cub", "resnet50", "autolora", seed, figures, images, (), notes, "cpu, 2026-01-01")

    runs = [one(0, 60, 30, 20), one(1, 62, 32, 24), one(2, 10, 10, 10, notes=("`eps = 1`",))]
    (row,) = (line for line in table.page(runs).splitlines() if "CUB-200 | AutoLoRa" in line and "62.78" in line)
    assert "| 61.00 ± 1.41 | 31.00 ± 1.41 | 22.00 ± 2.83 [1] | 0, 1 | 100 |" in row
    assert "Not the paper's settings" not in table.page(runs)


def test_page_in_the_repository_is_that_of_no_runs(tmp_path):
    page = table.page([])
    assert table.PAGE.read_text() == page or "cells were run" in table.PAGE.read_text()
    assert page.count("not run") == 36 * 3 and "Published figures not at hand" in page
    assert "86.93 / 57.16 / 52.00" in page
    with pytest.raises(ValueError, match=r"is no result of run\.py"):
        path = tmp_path / "a" / "b" / "c" / "seed-0" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        table.read_runs(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(cells.BACKBONES))
@pytest.mark.parametrize("key", KEYS)
def test_every_data_set_with_every_backbone(all_data, tmp_path, key, backbone):
    torch.manual_seed(0)
    checkpoint = robust_file(tmp_path / cells.BACKBONES[backbone].file, timm.create_model(backbone))
    run.main(arguments(all_data, checkpoint, tmp_path / "runs", key, backbone=backbone), minis())
    page = written_page(tmp_path)
    assert page.count("not run") == 35 * 3
