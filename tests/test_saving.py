"""Saving and loading: bit for bit, in files that others can read, whole or not at all."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE_SIZE, MODELS, MODES, VARIANTS, change_everything, pixels
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from autolora_hf import (
    AutoLoraConfig,
    Preprocessing,
    ThreatModel,
    files,
    get_autolora_model,
    load_autolora_model,
    saving,
)
from autolora_hf.layout import ROBUST_FACTORS
from autolora_hf.pixels import Normalize
from autolora_hf.record import RECORD, SCHEMA_VERSION


ADAPTERS = ("timm_resnet", "hf_vit")  # one of each library where the rest makes no difference


def changed_model(name, mode="full", layout="released", norm="shared"):
    model = MODELS[name].adapted(mode=mode, layout=layout, norm=norm)
    change_everything(model)
    return model


def base_for(name, mode):
    """What has to be passed to load a model of a backbone that was built in memory."""
    return MODELS[name].fresh() if mode == "adapter" else None


def logits(model, images=None):
    images = pixels() if images is None else images
    with torch.no_grad():
        return {route: model.pixel_space(route)(images) for route in ("robust", "natural")}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def copied_state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- round trips ----


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_round_trip(tmp_path, name, mode, layout, norm):
    model = changed_model(name, mode, layout, norm)
    expected = logits(model)
    assert not torch.equal(expected["robust"], expected["natural"])
    model.save_pretrained(tmp_path)
    assert same(logits(model), expected)  # saving changes nothing

    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["natural"]
    loaded = load_autolora_model(tmp_path, base_model=base_for(name, mode))
    assert not loaded.training
    assert same(logits(loaded), expected)
    assert same(loaded.state_dict(), model.state_dict())
    configs = [{**vars(m.autolora_config), "target_modules": m.lora_layers().keys()} for m in (model, loaded)]
    assert configs[0] == configs[1]
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trainable[0] == trainable[1]

    # A copy of the copy has the same weight files, and loads into a live model too.
    before = contents(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = contents(tmp_path / "again")
    assert again.keys() == before.keys()
    assert all(again[key] == before[key] for key in before if key.endswith(".safetensors"))
    other = MODELS[name].adapted(mode=mode, layout=layout, norm=norm)
    other.load_weights(tmp_path / "again")
    assert same(logits(other), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_natural_route_can_be_deployed(tmp_path, name, mode):
    model = changed_model(name, mode)
    model.save_pretrained(tmp_path)
    loaded = load_autolora_model(tmp_path, route="natural", base_model=base_for(name, mode))
    assert loaded.current_route == "natural"
    expected = logits(model)
    assert torch.equal(loaded.pixel_space()(pixels()), expected["natural"])
    assert same(logits(loaded), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_besides_weights(tmp_path, name, mode):
    preprocessing = Preprocessing((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9, "squash")
    names, threat = ["ant", "bee", "cat", "dog"], ThreatModel("l2", 0.5)
    layer = next(iter(MODELS[name].adapted().lora_layers()))
    config = AutoLoraConfig(mode=mode, r=3, rank_pattern={layer: 2}, use_rslora=True)
    model = get_autolora_model(
        MODELS[name].fresh(), config, preprocessing=preprocessing, label_names=names, threat_model=threat
    )
    model.save_pretrained(tmp_path)
    loaded = load_autolora_model(str(tmp_path), base_model=base_for(name, mode))
    assert loaded.label_names == names
    assert loaded.preprocessing == preprocessing
    assert loaded.threat_model == threat
    assert loaded.num_classes == 4
    assert loaded.autolora_config.head == MODELS[name].head
    assert loaded.autolora_config.target_modules == list(model.lora_layers())
    assert loaded.autolora_config.use_rslora
    ranks = {name: found.r["natural"] for name, found in loaded.lora_layers().items()}
    assert ranks == {name: 2 if name == layer else 3 for name in ranks}
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["versions"].keys() == {"autolora-hf", "torch", "timm", "transformers", "peft"}


@pytest.mark.parametrize("name", MODELS)
def test_the_backbone_of_an_adapter_is_found_by_name(tmp_path, name):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_base(MODELS[name].fresh(), base)
    model = get_autolora_model(str(base), AutoLoraConfig(mode="adapter"), preprocessing=MODELS[name].preprocessing)
    change_everything(model)
    model.save_pretrained(folder)
    loaded = load_autolora_model(folder)
    assert same(logits(loaded), logits(model))
    assert loaded.backbone["name_or_path"] == str(base)
    # Also under another name, with the same weights.
    moved = base.rename(tmp_path / "moved")
    assert same(logits(load_autolora_model(folder, base_model=str(moved))), logits(model))


def test_another_number_of_classes_makes_a_fresh_head(tmp_path):
    """The adapter brings its own head, so that of the backbone does not matter."""
    save_base(MODELS["timm_resnet"].fresh(num_classes=7), tmp_path / "base")
    model = get_autolora_model(
        str(tmp_path / "base"),
        AutoLoraConfig(mode="adapter"),
        num_classes=4,
        preprocessing=MODELS["timm_resnet"].preprocessing,
    )
    change_everything(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(123)
    assert same(logits(load_autolora_model(tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("mode", MODES)
def test_a_backbone_changed_by_hand_has_to_be_passed(tmp_path, mode):
    def build():
        network = MODELS["timm_resnet"].fresh()
        torch.manual_seed(5)
        network.conv1[0] = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False)
        return network

    model = get_autolora_model(build(), AutoLoraConfig(mode=mode), preprocessing=MODELS["timm_resnet"].preprocessing)
    change_everything(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base_model="):
        load_autolora_model(tmp_path)
    assert same(logits(load_autolora_model(tmp_path, base_model=build())), logits(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_over_an_existing_folder(tmp_path, name, mode):
    model = changed_model(name, mode)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = contents(tmp_path)
    change_everything(model, seed=7)
    model.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert after["README.md"] == b"mine"
    assert same(logits(load_autolora_model(tmp_path, base_model=base_for(name, mode))), logits(model))


def test_other_processes_of_a_run_write_nothing(tmp_path):
    changed_model("hf_vit").save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a folder, but .*file is a file"):
        changed_model("hf_vit").save_pretrained(tmp_path / "file")


# ---- without this package ----

STOCK = """
import copy, json, sys, warnings
from pathlib import Path
import timm, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)
results = {}
for case in sorted(Path(sys.argv[1]).iterdir()):
    tensors = load_file(case / "expected.safetensors")
    folder = case / ("base" if "adapter" in case.name else "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.name.startswith("timm"):
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        else:
            model = AutoModelForImageClassification.from_pretrained(folder)
        bare = copy.deepcopy(model)
        if "adapter" in case.name:
            model = PeftModel.from_pretrained(model, case / "model")
        # The adapter in the subfolder is the natural route, on the backbone or on the robust model.
        natural = PeftModel.from_pretrained(bare, case / "model", subfolder="natural")

    def run(network):
        with torch.no_grad():
            output = network.eval()(tensors["images"])
        return output if isinstance(output, torch.Tensor) else output.logits

    logits = run(model)
    results[case.name] = {
        "natural_close": torch.allclose(run(natural), tensors["natural"], rtol=1e-5, atol=1e-5),
        "equal": torch.equal(logits, tensors["logits"]),
        "close": torch.allclose(logits, tensors["logits"], rtol=1e-5, atol=1e-5),
        "difference": (logits - tensors["logits"]).abs().max().item(),
        # About transformers, which PEFT asks for an attribute that it is about to rename.
        "warnings": [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)],
    }
assert "autolora_hf" not in sys.modules
print(json.dumps(results))
"""


def save_base(network, folder):
    if hasattr(network, "save_pretrained"):
        network.save_pretrained(folder)
    else:
        timm.models.save_for_hf(network, folder, safe_serialization=True)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What a process that never imports this package gets of every variant."""
    root = tmp_path_factory.mktemp("stock")
    for variant in VARIANTS:
        name, mode, *_ = variant
        case = root / "-".join(variant)
        model = changed_model(*variant)
        model.save_pretrained(case / "model")
        if mode == "adapter":
            save_base(MODELS[name].fresh(), case / "base")
        images = model.pixel_space().normalize(pixels())
        routes = logits(model)
        expected = {"images": images, "logits": routes["robust"], "natural": routes["natural"]}
        save_file(expected, case / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(root)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_stock_libraries_load_the_deployed_route(stock, name, mode, layout, norm):
    """Mode `adapter` with PEFT, mode `full` with timm or transformers."""
    result = stock["-".join((name, mode, layout, norm))]
    assert result["warnings"] == []
    # An unfolded branch is the same function computed in another order.
    exact = mode == "full" or layout == "peft"
    assert result["equal" if exact else "close"], result["difference"]
    # PEFT computes the sum of two branches as one.
    assert result["natural_close"]


@pytest.mark.parametrize("layout", ["released", "peft"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_adapter_configuration_is_plain_peft(tmp_path, name, layout):
    model = changed_model(name, "adapter", layout)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not config.keys() & {"mode", "layout", "norm", "head"}
    assert config["inference_mode"]
    assert MODELS[name].head in config["modules_to_save"]
    assert sorted(config["target_modules"]) == sorted(model.lora_layers())
    # Stock PEFT would load the natural branch alone, which is trained on top of the robust one.
    assert not any("natural" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_checkpoint(tmp_path, name, mode):
    """The deployed route, merged: timm and transformers load it by themselves, with its classes and preprocessing."""
    model = changed_model(name, mode)
    model.label_names = ["ant", "bee", "cat", "dog"]
    before, expected = copied_state(model), logits(model)
    saving.save_plain(model, tmp_path)
    assert same(copied_state(model), before) and same(logits(model), expected)
    assert not [path for path in tmp_path.rglob("*") if "adapter" in path.name or "autolora" in path.name]
    if name.startswith("timm"):
        plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert tuple(plain.pretrained_cfg["mean"]) == model.preprocessing.mean
        assert json.loads((tmp_path / "config.json").read_text())["label_names"] == model.label_names
    else:
        plain = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert plain.config.id2label == dict(enumerate(model.label_names))
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        assert Preprocessing.from_image_processor(processor) == model.preprocessing
    with torch.no_grad():
        output = plain(Normalize(model.preprocessing)(pixels()))
    found = output if isinstance(output, torch.Tensor) else output.logits
    torch.testing.assert_close(found, expected["robust"], rtol=1e-5, atol=1e-5)


def test_a_plain_checkpoint_needs_a_known_architecture(tmp_path):
    network = MODELS["timm_resnet"].fresh()
    network.conv1[0] = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False)
    model = get_autolora_model(network, preprocessing=MODELS["timm_resnet"].preprocessing)
    with pytest.raises(ValueError, match=r"changed by hand.*merge_and_unload"):
        saving.save_plain(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# ---- what is refused ----


@pytest.fixture(params=[(name, mode) for name in ADAPTERS for mode in MODES], ids="-".join)
def saved(request, tmp_path):
    """A saved model: `(folder, model, load)`, where `load(**kwargs)` loads it."""
    name, mode = request.param
    model = changed_model(name, mode)
    folder = tmp_path / "model"
    model.save_pretrained(folder)

    def load(**kwargs):
        return load_autolora_model(folder, **{"base_model": base_for(name, mode), **kwargs})

    return folder, model, load


def weight_files(folder):
    return sorted(folder.rglob("*.safetensors"))


def refuses(load, model, folder, *parts, error=ValueError):
    """Loading raises, also into a live model, whose weights then are what they were."""
    with pytest.raises(error) as caught:
        load()
    for part in parts:
        assert part in str(caught.value)
    change_everything(model, seed=9)
    before = copied_state(model)
    with pytest.raises(error) as caught:
        model.load_weights(folder)
    for part in parts:
        assert part in str(caught.value)
    assert same(copied_state(model), before)


def test_damaged_weights_are_refused(saved):
    folder, model, load = saved
    for file in weight_files(folder):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-1], whole + b"more"):
            file.write_bytes(damaged)
            refuses(load, model, folder, file.name, "damaged or truncated")
        file.write_bytes(whole)
    load()


def test_missing_weights_are_refused(saved):
    folder, model, load = saved
    for file in weight_files(folder):
        whole = file.read_bytes()
        file.unlink()
        refuses(load, model, folder, file.name, "does not exist", error=FileNotFoundError)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors, key: tensors | {key: torch.cat([tensors[key], tensors[key]])}, "of another shape: "),
        (lambda tensors, key: {k: v for k, v in tensors.items() if k != key}, "missing: "),
        (lambda tensors, key: tensors | {f"{key}.more": torch.zeros(1)}, "unexpected: "),
    ],
    ids=["shape", "missing", "unexpected"],
)
def test_other_tensors_are_refused(saved, change, problem):
    folder, model, load = saved
    for file in weight_files(folder):
        whole = file.read_bytes()
        tensors = load_file(file)
        # The last name, so that others would have been copied before it.
        key = max(name for name, tensor in tensors.items() if tensor.ndim > 0)
        save_file(change(tensors, key), file)
        refuses(load, model, folder, file.name, problem, "Nothing was loaded")
        file.write_bytes(whole)


def test_another_number_of_classes_is_refused(saved):
    folder, model, load = saved
    name = "hf_vit" if hasattr(model.get_base_model(), "config") else "timm_resnet"
    with pytest.raises(ValueError, match="has 4 classes but the base model has 5"):
        load(base_model=MODELS[name].fresh(num_classes=5))
    other = MODELS[name].adapted(num_classes=5, mode=model.autolora_config.mode)
    before = copied_state(other)
    with pytest.raises(ValueError, match="of another shape"):
        other.load_weights(folder)
    assert same(copied_state(other), before)


def test_another_architecture_is_refused(saved):
    _, model, load = saved
    name = "hf_resnet" if hasattr(model.get_base_model(), "config") else "timm_vit"
    network = MODELS[name].fresh()
    before = copied_state(network)
    problems = "does not have|not what gives the logits|not a layer|does not belong"
    with pytest.raises(ValueError, match=problems):
        load(base_model=network)
    assert same(copied_state(network), before)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_on_other_weights_is_warned_about(tmp_path, caplog, name):
    changed_model(name, "adapter").save_pretrained(tmp_path)

    def tweaked():
        network = MODELS[name].fresh()
        with torch.no_grad():  # a single value of a single tensor
            next(network.parameters()).view(-1)[0] += 1e-6
        return network

    for build in (tweaked, lambda: MODELS[name].fresh(seed=1)):
        caplog.clear()
        loaded = load_autolora_model(tmp_path, base_model=build())
        assert "trained on other weights" in caplog.text and "SHA-256 differ" in caplog.text
        # Saved again, it belongs to the weights it is on now.
        loaded.save_pretrained(tmp_path / "again")
        caplog.clear()
        load_autolora_model(tmp_path / "again", base_model=build())
        assert not caplog.records
    # Its head is another matter: the adapter brings its own.
    network = MODELS[name].fresh()
    network.get_submodule(MODELS[name].head).reset_parameters()
    caplog.clear()
    load_autolora_model(tmp_path, base_model=network)
    assert not caplog.records


def test_an_adapter_of_a_model_in_memory_asks_for_it(tmp_path):
    changed_model("timm_vit", "adapter").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"created in memory.*`base_model=`"):
        load_autolora_model(tmp_path)


def test_a_newer_schema_is_refused(saved):
    folder, _, load = saved
    record = json.loads((folder / RECORD).read_text())
    for version in (SCHEMA_VERSION + 1, SCHEMA_VERSION - 1, str(SCHEMA_VERSION), None):
        (folder / RECORD).write_text(json.dumps({**record, "schema_version": version}))
        with pytest.raises(ValueError, match=rf"autolora_config.json: schema version {version!r}; .*(upgrade|anew)"):
            load()


def test_a_damaged_record_is_refused(saved):
    folder, _, load = saved
    text = (folder / RECORD).read_text()
    (folder / RECORD).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"autolora_config.json is not valid JSON"):
        load()


def test_folders_of_others_are_refused(tmp_path):
    changed_model("hf_vit", "adapter").save_pretrained(tmp_path)
    (tmp_path / RECORD).unlink()
    with pytest.raises(FileNotFoundError, match=r"plain PEFT adapter: use `PeftModel.from_pretrained`"):
        load_autolora_model(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no autolora_config.json, so it was not saved by autolora_hf.$"):
        load_autolora_model(tmp_path)
    for name in ("no-such-folder", "./no/such", "a/b/c", "../x"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
            load_autolora_model(name)
    with pytest.raises(OSError, match="is not in the cache"):
        load_autolora_model("nobody/nothing")  # the tests run offline


class _Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


PICKLES = ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "natural.bin", "optimizer.pt")


def test_pickles_are_never_opened(saved, tmp_path):
    folder, model, load = saved
    marker = tmp_path / "opened"
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(_Payload(marker), protocol=2))
    assert same(logits(load()), logits(model))
    for file in weight_files(folder):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            load()
        # A pickle under the name of a safetensors file is no better.
        file.write_bytes(pickle.dumps(_Payload(marker), protocol=2))
        with pytest.raises(ValueError, match="damaged or truncated"):
            load()
        file.write_bytes(whole)
    assert not marker.exists()
    pickle.loads((folder / PICKLES[0]).read_bytes())
    assert marker.exists()  # the payload works


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_backbone_that_is_only_a_pickle_is_not_opened(tmp_path, name):
    save_base(MODELS[name].fresh(), tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(tmp_path / "opened"), protocol=2))
    with pytest.raises(Exception):  # noqa: B017 - each library has its own
        get_autolora_model(str(tmp_path / "base"))
    assert not (tmp_path / "opened").exists()


# ---- interrupted writers ----


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_save_leaves_the_old_files(saved, monkeypatch, fails_at):
    folder, model, load = saved
    before, expected = contents(folder), logits(model)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError("No space left on device")
        return save_file(*args, **kwargs)

    change_everything(model, seed=3)
    monkeypatch.setattr(files, "save_file", failing)
    # transformers writes the base model of mode `full` itself.
    monkeypatch.setattr(type(model.get_base_model()), "save_pretrained", failing, raising=False)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["natural"]
    assert same(logits(load()), expected)


def test_a_save_that_is_killed_between_two_files_is_never_loaded(saved, monkeypatch):
    """New weights of one file with old ones of another would be a model that nobody trained."""
    folder, model, load = saved
    change_everything(model, seed=3)
    moves = []
    move = os.replace

    def killed(source, target):
        if Path(target).parent == folder:
            moves.append(target)
            if len(moves) == 2:
                raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"has no autolora_config\.json"):
        load()
    model.save_pretrained(folder)
    assert same(logits(load()), logits(model))


def test_a_failed_first_save_leaves_nothing_to_load(tmp_path, monkeypatch):
    model = changed_model("hf_vit")

    def failing(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_a_copied_folder_is_complete(saved, tmp_path):
    folder, model, _ = saved
    shutil.copytree(folder, tmp_path / "elsewhere")
    other = load_autolora_model(
        tmp_path / "elsewhere",
        base_model=None
        if model.autolora_config.mode == "full"
        else MODELS["hf_vit" if hasattr(model.get_base_model(), "config") else "timm_resnet"].fresh(),
    )
    assert same(logits(other), logits(model))


def test_saving_another_mode_takes_the_old_weights_away(tmp_path):
    tiny = MODELS["timm_resnet"]
    (tmp_path / "notes.txt").write_text("mine")
    tiny.adapted(mode="full").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    tiny.adapted(mode="adapter").save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "config.json").exists()
    tiny.adapted(mode="full").save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_adapter_that_stock_peft_cannot_express(tmp_path):
    """A branch on a depthwise convolution: our own file, exact, and nothing that stock PEFT would read wrongly."""

    def convnext():
        torch.manual_seed(0)
        network = timm.create_model("test_convnext", num_classes=4)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return network.eval()

    tiny = Preprocessing((IMAGE_SIZE, IMAGE_SIZE))
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    for folder, config in ((stock, {}), (ours, {"target_modules": "all"})):
        model = get_autolora_model(convnext(), AutoLoraConfig(mode="adapter", **config), preprocessing=tiny)
        depthwise = [name for name in model.lora_layers() if name.endswith("conv_dw")]
        assert bool(depthwise) == (folder == ours)
        change_everything(model)
        model.save_pretrained(folder)
        loaded = load_autolora_model(folder, base_model=convnext())
        assert same(copied_state(loaded), copied_state(model))
        assert same(logits(loaded), logits(model))
        expected = logits(model)["robust"]
        with torch.no_grad():
            merged = model.merge_and_unload()(Normalize(tiny)(pixels()))
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (stock / "adapter_config.json").exists() and not (stock / ROBUST_FACTORS).exists()
    assert (ours / ROBUST_FACTORS).exists() and not (ours / "adapter_config.json").exists()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(convnext(), stock).eval()(Normalize(tiny)(pixels()))
    torch.testing.assert_close(theirs, logits(load_autolora_model(stock, base_model=convnext()))["robust"])

    # One kind over the other leaves no file that belongs to no model.
    load_autolora_model(ours, base_model=convnext()).save_pretrained(stock)
    assert not (stock / "adapter_config.json").exists() and not (stock / "adapter_model.safetensors").exists()
    load_autolora_model(stock, base_model=convnext())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["shared", "robust_stats", "dual"])
def test_saving_while_the_natural_route_runs(tmp_path, mode, norm):
    """Its norms stand in for those of the deployed route, which are saved all the same."""
    model = changed_model("timm_resnet", mode, norm=norm)
    expected = logits(model)
    with model.route("natural"):
        model.save_pretrained(tmp_path / "inside")
    resting = load_autolora_model(tmp_path / "inside", "natural", base_model=base_for("timm_resnet", mode))
    resting.save_pretrained(tmp_path / "resting")
    with resting.route("natural"):
        resting.load_weights(tmp_path / "inside")
    for loaded in (
        resting,
        load_autolora_model(tmp_path / "inside", base_model=base_for("timm_resnet", mode)),
        load_autolora_model(tmp_path / "resting", base_model=base_for("timm_resnet", mode)),
    ):
        assert same(logits(loaded), expected)


def test_a_model_can_be_pickled(tmp_path):
    """Some tools copy models so; this package reads no pickle."""
    model = changed_model("hf_vit", "adapter")
    again = pickle.loads(pickle.dumps(model))
    assert same(logits(again), logits(model))


def test_infinite_bounds_of_an_architecture_are_no_damage(tmp_path):
    """Clamps that cut nothing until a checkpoint says otherwise (Gemma's vision tower) hold infinities."""
    bound, weight = torch.tensor([-torch.inf, 1.0]), torch.ones(2)
    path = tmp_path / "model.safetensors"
    expected = {"bound": bound, "weight": weight}
    save_file({"bound": bound, "weight": weight}, path)
    assert torch.equal(files.load_tensors(path, expected)["bound"], bound)
    for damaged in ({"bound": -bound, "weight": weight}, {"bound": bound, "weight": weight / 0}):
        save_file(damaged, path)
        with pytest.raises(ValueError, match="NaN or infinite"):
            files.load_tensors(path, expected)
    save_file({"bound": torch.tensor([torch.nan, 1.0]), "weight": weight}, path)
    with pytest.raises(ValueError, match=r"NaN or infinite \(bound\)"):
        files.load_tensors(path, {"bound": torch.tensor([torch.nan, 1.0]), "weight": weight})
