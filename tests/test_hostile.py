"""Files of strangers: whatever a folder holds, it is loaded or refused with a message, and nothing of it is run.

What could fill memory, open other files or run code is tried in one process of its own, see [`CHILD`]. What is tried
at random is in `scripts/fuzz_loader.py`.
"""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file
from test_coverage import load as load_script
from test_saving import copied_state, logits, same, save_base
from tiny_models import MODELS, MODES, change_everything

from autolora_hf import RobustnessReport, get_autolora_model, load_autolora_model
from autolora_hf.backbones import load_backbone
from autolora_hf.consistency import check_branches
from autolora_hf.files import inside, read_header, read_json
from autolora_hf.hub.model_card import Environment, write_model_card
from autolora_hf.record import RECORD, Record
from autolora_hf.untrusted import check_network


fuzz_loader = load_script("fuzz_loader")
VARIANTS = [(name, mode) for name in ("timm_vit", "hf_vit") for mode in MODES]
NATURAL = "natural/adapter_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A valid folder for each of `VARIANTS` and more, saved once; tests work on copies."""
    root = tmp_path_factory.mktemp("originals")
    for name, mode in (*VARIANTS, ("timm_resnet", "full"), ("hf_resnet", "full"), ("timm_resnet", "adapter")):
        model = MODELS[name].adapted(mode=mode)
        change_everything(model)
        model.save_pretrained(root / f"{name}-{mode}")
    for name in ("timm_vit", "hf_vit"):
        save_base(MODELS[name].fresh(), root / f"{name}-base")
    return root


@pytest.fixture
def copied(originals, tmp_path):
    """`copied(name, mode)` is a copy of a saved model that may be damaged."""

    def copy(name, mode):
        return Path(shutil.copytree(originals / f"{name}-{mode}", tmp_path / f"{name}-{mode}"))

    return copy


def set_in(content, path, value):
    """Sets `content["a"][0]["b"]` for the path `a.0.b`."""
    *parents, last = path.split(".")
    for key in parents:
        content = content[int(key) if isinstance(content, list) else key]
    content[int(last) if isinstance(content, list) else last] = value


def change_json(path, **changes):
    """Changes fields of a JSON file; `__` in a keyword stands for the dot of a path."""
    content = json.loads(path.read_text())
    for where, value in changes.items():
        set_in(content, where.replace("__", "."), value)
    path.write_text(json.dumps(content))


def load(folder):
    name, mode = folder.name.split("-")
    return load_autolora_model(folder, base_model=MODELS[name].fresh() if mode == "adapter" else None)


def refuses(folder, *parts, error=ValueError, live=True):
    """Loading raises, also into a live model, which stays as it is."""
    with pytest.raises(error) as caught:
        load(folder)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 3000 and not any(letter < " " and letter != "\n" for letter in message)
    if live:
        name, mode = folder.name.split("-")
        model = MODELS[name].adapted(mode=mode)
        before = copied_state(model)
        with pytest.raises(error) as caught:
            model.load_weights(folder)
        assert all(part in str(caught.value) for part in parts), caught.value
        assert same(copied_state(model), before)


def weight_files(folder):
    return sorted(folder.rglob("*.safetensors"))


def raw(header, data=b""):
    """A safetensors file, header and all, as no writer would make it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# ---- what could take memory, files or the machine: one process with a limit and a log ----

LOG = """
import os, sys
from pathlib import Path

root, events = Path(sys.argv[1]), []
WATCHED = ("pickle.find_class", "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def watch(event, arguments):
    if event == "open":
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if path.startswith(str(root)):
            events.append(["open", path])
    elif event in ("exec", "compile", "import"):
        if any(str(root) in str(argument) for argument in arguments[:3]):
            events.append([event, str(arguments)[:200]])
    elif event.startswith(WATCHED):
        events.append([event, str(arguments)[:200]])
"""

CHILD = """
import builtins, json, resource, time, warnings

sys.path.insert(0, sys.argv[2])
import torch
import transformers
from tiny_models import MODELS
from autolora_hf import get_autolora_model, load_autolora_model

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
warnings.simplefilter("ignore")


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def attempt(case):
    how = case.name.split("+")[0]
    if how == "base":
        get_autolora_model(str(case / "base"), preprocessing=MODELS["timm_vit"].preprocessing)
    else:
        name, mode = how.split("-")
        load_autolora_model(case / "model", base_model=MODELS[name].fresh() if mode == "adapter" else None)


def asked(*arguments):
    events.append(["input", str(arguments)[:200]])
    return "y"


builtins.input = asked  # a user who says yes to everything
cases = sorted(root.iterdir())
for case in [case for case in cases if case.name.endswith("+good")]:
    attempt(case)  # what is imported late is imported now
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (2 << 30),) * 2)
sys.addaudithook(watch)
results = {}
for case in cases:
    events.clear()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    error, message = None, ""
    try:
        attempt(case)
    except BaseException as caught:
        error, message = type(caught).__name__, str(caught)
    results[case.name] = {
        "error": error,
        "message": message,
        "seconds": time.perf_counter() - start,
        "memory": status("VmHWM") - before,
        "events": [event for event in events if not event[1].endswith("/proc/self/status")],
    }
print("RESULTS" + json.dumps(results))
"""


class _Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


BIG = (10**5, 10**9, 10**30)
NETWORK = r"The recorded .* cannot be built|backbone\.config|layers that .* does not have"
# Variant, path of a field of the record, its value ("BIG": each of these), and what the message must match.
RECORDS = [
    ("timm_vit-full", "num_classes", "BIG", "num_classes"),
    ("hf_vit-adapter", "num_classes", "BIG", "num_classes"),
    ("timm_vit-full", "config.r", "BIG", "config.r"),
    ("timm_vit-full", "config.r", 60_000, "rank 60,000"),
    ("hf_vit-full", "config.r", 60_000, "rank 60,000"),
    ("timm_vit-adapter", "config.r", 60_000, "rank 60,000"),
    ("hf_vit-adapter", "config.r", 60_000, "rank 60,000"),
    ("timm_vit-full", "config.rank_pattern", {"blocks.0.attn.qkv": 60_000}, "rank 60,000"),
    ("timm_vit-full", "config.lora_alpha", 10**9, "config.lora_alpha"),
    ("timm_vit-full", "preprocessing.image_size", [16_384, 16_384], "preprocessing.image_size"),
    ("timm_resnet-full", "preprocessing.image_size", [1, 10**9], "preprocessing.image_size"),
    ("hf_resnet-full", "preprocessing.image_size", [10_000, 10_000], "preprocessing.image_size"),
    ("timm_vit-adapter", "backbone.image_size", [10_000, 10_000], "backbone.image_size"),
    ("timm_vit-full", "backbone.config.model_args.depth", "BIG", NETWORK),
    ("timm_vit-full", "backbone.config.model_args.embed_dim", "BIG", NETWORK),
    ("timm_vit-full", "backbone.config.model_args.mlp_ratio", "BIG", NETWORK),
    ("timm_vit-full", "backbone.config.model_args.img_size", "BIG", NETWORK),
    ("timm_vit-full", "backbone.config.model_args.img_size", [2048, 2048], NETWORK),
    ("timm_vit-full", "backbone.config.model_args.in_chans", "BIG", NETWORK),
    ("timm_vit-full", "backbone.config.num_classes", "BIG", NETWORK),
    ("timm_vit-full", "backbone.config.pretrained_cfg.input_size", [3, 10**5, 10**5], "pretrained_cfg.input_size"),
    ("hf_vit-full", "backbone.config.num_hidden_layers", "BIG", NETWORK),
    ("hf_vit-full", "backbone.config.hidden_size", "BIG", NETWORK),
    ("hf_vit-full", "backbone.config.intermediate_size", "BIG", NETWORK),
    ("hf_vit-full", "backbone.config.image_size", "BIG", NETWORK),
    ("hf_resnet-full", "backbone.config.depths", "BIG", NETWORK),
    ("hf_resnet-full", "backbone.config.hidden_sizes", "BIG", NETWORK),
    ("hf_resnet-full", "backbone.config.depths", [1] * 100_000, NETWORK),
    # Code, files and downloads.
    ("hf_vit-full", "backbone.config.auto_map", {"AutoConfig": "evil.Config"}, "auto_map"),
    ("hf_vit-full", "backbone.config.trust_remote_code", True, "trust_remote_code"),
    ("hf_vit-full", "backbone.config.quantization_config", {"quant_method": "fp8"}, "quantization_config"),
    ("hf_vit-full", "backbone.config._attn_implementation", "evil/kernel", "_attn_implementation"),
    ("hf_vit-full", "backbone.config.attn_implementation", "evil/kernel:f", "attn_implementation"),
    ("hf_vit-full", "backbone.config.transformers_weights", "adapter_model.bin", "transformers_weights"),
    ("hf_vit-full", "backbone.config.backbone_config", {"x": [{"auto_map": {"A": "b.C"}}]}, "auto_map"),
    ("hf_vit-full", "backbone.config.model_type", "evil", "cannot be built"),
    (
        "hf_vit-full",
        "backbone.config",
        {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/x"},
        "no model of timm",
    ),
    (
        "hf_vit-full",
        "backbone.config",
        {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "x.pth"}},
        "checkpoint_path",
    ),
    ("timm_vit-full", "backbone.config.architecture", "hf-hub:evil/x", "no model of timm"),
    ("timm_vit-full", "backbone.config.architecture", "local-dir:/tmp", "no model of timm"),
    ("timm_vit-full", "backbone.config.model_args.checkpoint_path", "pytorch_model.bin", "checkpoint_path"),
    ("timm_vit-full", "backbone.config.model_args.pretrained", True, "pretrained"),
    ("timm_vit-full", "backbone.config.model_args.cache_dir", "/tmp", "cache_dir"),
    ("timm_vit-full", "backbone.config.model_args.features_only", True, "features_only"),
    (
        "timm_vit-full",
        "backbone.config.model_args.pretrained_cfg_overlay",
        {"file": "x.pth"},
        "pretrained_cfg_overlay",
    ),
    (
        "timm_vit-full",
        "backbone.config.model_args.pretrained_cfg",
        {"file": "x.pth", "custom_load": True},
        "cannot be built",
    ),
]
LOADED = [
    # What timm notes about the weights is never followed.
    ("timm_vit-full", "backbone.config.pretrained_cfg.url", "http://127.0.0.1:9/x.pth"),
    ("timm_vit-full", "backbone.config.pretrained_cfg.file", "pytorch_model.bin"),
    ("timm_vit-full", "backbone.config.pretrained_cfg.custom_load", True),
    ("timm_vit-full", "backbone.config.pretrained_cfg.hf_hub_id", "evil/x"),
    ("timm_vit-full", "backbone.config.pretrained_cfg.mean", ["a", None]),
]


def _claim(shape, dtype="F32", size=0):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


# Name, content of the first weight file and what the message must have.
WEIGHTS = [
    ("terabytes", raw(_claim([2**40], size=2**42)), "damaged or truncated"),
    ("overflow", raw(_claim([2**40, 2**40], size=4)), "damaged or truncated"),
    ("negative", raw(_claim([-1], size=4), b"\0" * 4), "damaged or truncated"),
    ("length", struct.pack("<Q", 2**63) + b"{}", "damaged or truncated"),
    ("deep header", raw(b'{"x":' + b"[" * 200_000), "damaged or truncated"),
    ("overlap", raw({**_claim([1], size=4), "y": _claim([1], size=4)["x"]}, b"\0" * 4), "damaged or truncated"),
    ("hole", raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8), "damaged or truncated"),
    ("pickle", pickle.dumps(_Payload("/nowhere/touched"), protocol=2), "damaged or truncated"),
]


def _base(root, originals, name, case):
    folder = root / f"base+{case}" / "base"
    shutil.copytree(originals / f"{name}-base", folder)
    return folder


def _make_cases(root, originals):
    """Writes a folder a case; gives `{name: (error or None, patterns of the message)}`."""
    expected = {}

    def model(variant, case):
        name = f"{variant}+{case}"
        shutil.copytree(originals / variant, root / name / "model")
        for pickled in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "evil.py", "modeling_evil.py"):
            (root / name / "model" / pickled).write_bytes(pickle.dumps(_Payload(root.parent / "touched"), protocol=2))
        return root / name / "model"

    def expect(folder, error, *parts):
        expected[folder.parent.name] = (error, parts)

    for variant in (
        "timm_vit-full",
        "timm_vit-adapter",
        "hf_vit-full",
        "hf_vit-adapter",
        "timm_resnet-full",
        "hf_resnet-full",
    ):
        folder = model(variant, "good")
        # For other libraries; ours does not open it.
        (folder / "adapter_config.json").write_text("[" * 100_000)
        expect(folder, None)
    for number, (variant, path, value, part) in enumerate(RECORDS):
        for big in BIG if value == "BIG" else (None,):
            folder = model(variant, f"record{number}-{big}")
            content = json.loads((folder / RECORD).read_text())
            put = value if big is None else [big, big] if path.endswith(("depths", "sizes")) else big
            set_in(content, path, put)
            if path == "num_classes":
                content["fingerprint"] = None
                part = "num_classes|no weights of a classifier"
            (folder / RECORD).write_text(json.dumps(content))
            expect(folder, "ValueError", part)
    for number, (variant, path, value) in enumerate(LOADED):
        folder = model(variant, f"loaded{number}")
        content = json.loads((folder / RECORD).read_text())
        set_in(content, path, value)
        (folder / RECORD).write_text(json.dumps(content))
        expect(folder, None)
    for variant in ("timm_vit-full", "hf_vit-adapter"):
        for case, content, part in WEIGHTS:
            folder = model(variant, case)
            file = weight_files(folder)[0]
            file.write_bytes(content)
            expect(folder, "ValueError", file.name, part)
        for case, text, part in (
            ("deep", "[" * 10_000_000, "lists and objects"),
            ("less deep", "[" * 100_000, "not valid JSON"),
            ("empty objects", "[" + "{}," * 5_000_000 + "{}]", "lists and objects"),
            ("numbers", "[" + "0," * 30_000_000 + "0]", "bytes, more than"),
            ("long number", '{"schema_version": ' + "9" * 1_000_000 + "}", "not valid JSON"),
            ("names", json.dumps({"schema_version": ["x" * 80] * 100_000}), "schema version"),
        ):
            folder = model(variant, case)
            (folder / RECORD).write_text(text)
            expect(folder, "ValueError", RECORD, part)
        # The lengths alone are enough.
        folder = model(variant, "long header")
        with weight_files(folder)[0].open("wb") as file:
            file.write(struct.pack("<Q", 100 << 20) + b'{"x": ')
            file.truncate(200 << 20)
        expect(folder, "ValueError", weight_files(folder)[0].name, "has a header of 104,857,600 bytes")
        folder = model(variant, "sparse")
        with (folder / RECORD).open("wb") as file:
            file.truncate(1 << 30)
        expect(folder, "ValueError", RECORD, "1,073,741,824 bytes")
        # More names of layers than any model has: a pattern of them would take half a minute to compile.
        folder = model(variant, "names of layers")
        change_json(folder / RECORD, config__target_modules=[f"layer{i}.{'x' * 400}" for i in range(4000)])
        expect(folder, "ValueError", "config.target_modules")

    for name in ("timm_vit", "hf_vit"):
        _base(root, originals, name, f"good {name}")
        expected[f"base+good {name}"] = (None, ())
        # A pickle, alone or in the places where the libraries look for one.
        for case in ("only a pickle", "a pickle and another file", "an index"):
            folder = _base(root, originals, name, f"{case} {name}")
            whole = folder / "model.safetensors"
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(root.parent / "touched"), protocol=2))
            if case == "a pickle and another file":
                whole.rename(folder / "model-00001-of-00001.safetensors")
            elif case == "an index":
                whole.rename(folder / "model-00001-of-00001.safetensors")
                index = {"metadata": {}, "weight_map": {"fc.weight": "pytorch_model.bin"}}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            else:
                whole.unlink()
            part = (
                "must name safetensors files" if case == "an index" and name == "hf_vit" else "no safetensors weights"
            )
            expect(folder, "ValueError", part)
    for case, target in (("parent", "../model.safetensors"), ("absolute", "/etc/passwd"), ("number", 7)):
        folder = _base(root, originals, "hf_vit", case)
        (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
        index = {"metadata": {}, "weight_map": {"classifier.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        expect(folder, "ValueError", "model.safetensors.index.json", "must name safetensors files")
    for name, case, changes, part in (
        ("hf_vit", "quantization", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("hf_vit", "kernel", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("hf_vit", "other weights", {"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
        ("hf_vit", "wrapper", {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/x"}, "no model of timm"),
        (
            "hf_vit",
            "wrapped pickle",
            {"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"checkpoint_path": "x.pth"}},
            "checkpoint_path",
        ),
        (
            "hf_vit",
            "code",
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"},
            },
            "custom code",
        ),
        ("hf_vit", "blocks", {"num_hidden_layers": 10**5}, "far more than its file"),
        ("hf_vit", "more blocks", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("hf_vit", "width", {"hidden_size": 10**5}, "far more than its file"),
        ("hf_vit", "pixels", {"image_size": 10**5}, "image_size"),
        ("hf_vit", "kind", {"model_type": ["vit"]}, "could not be loaded"),
        ("timm_vit", "blocks of timm", {"model_args": {"depth": 10**5}}, "far more than its file"),
        ("timm_vit", "width of timm", {"model_args": {"embed_dim": 10**5}}, "far more than its file"),
        ("timm_vit", "pickle of timm", {"model_args": {"checkpoint_path": "pytorch_model.bin"}}, "checkpoint_path"),
        ("timm_vit", "nested source", {"architecture": "hf-hub:evil/x"}, "could not be loaded"),
    ):
        folder = _base(root, originals, name, case)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))
        (folder / "evil.py").write_text(f"open({str(root.parent / 'touched')!r}, 'w')")
        expect(folder, "ValueError", part)
    folder = _base(root, originals, "hf_vit", "custom code beside a known class")
    change_json(folder / "config.json", auto_map={"AutoModelForImageClassification": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(root.parent / 'touched')!r}, 'w')")
    expect(folder, None)
    # What timm notes about the weights does not make it look elsewhere.
    folder = _base(root, originals, "timm_vit", "noted elsewhere")
    noted = {"url": "http://127.0.0.1:9/x.pth", "file": "/x.pth", "custom_load": True, "hf_hub_id": "evil/x"}
    content = json.loads((folder / "config.json").read_text())
    content["pretrained_cfg"] |= {**noted, "source": "url", "state_dict": {"a": 1}}
    (folder / "config.json").write_text(json.dumps(content))
    expect(folder, None)
    # transformers would load an adapter that lies there as well, and PEFT perhaps from a pickle.
    folder = _base(root, originals, "hf_vit", "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/x", "peft_type": "LORA"}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Payload(root.parent / "touched"), protocol=2))
    expect(folder, "ValueError", "adapter_config.json")
    return expected


@pytest.fixture(scope="module")
def outcomes(originals, tmp_path_factory):
    """What came of every case: `{name: (what was expected, what happened)}`."""
    root = tmp_path_factory.mktemp("cases") / "cases"
    root.mkdir()
    expected = _make_cases(root, originals)
    done = subprocess.run(
        [sys.executable, "-c", LOG + CHILD, str(root), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        # Nothing but the audit hook keeps it from the network.
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        cwd=root.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.split("RESULTS")[-1])
    assert results.keys() == expected.keys()
    assert not (root.parent / "touched").exists()
    return {name: (expected[name], results[name]) for name in results}


def test_every_case_is_loaded_or_refused_with_its_reason(outcomes):
    wrong = []
    for name, ((error, parts), result) in outcomes.items():
        if result["error"] != error or not all(re.search(part, result["message"]) for part in parts):
            wrong.append(f"{name}: wanted {error} {parts}, got {result['error']}: {result['message'][:300]}")
    assert not wrong, "\n".join(wrong)
    long = [name for name, (_, result) in outcomes.items() if len(result["message"]) > 3000]
    assert not long


def test_a_refused_case_takes_little_time_and_memory(outcomes):
    """A loaded one takes what the model takes."""
    greedy = [
        f"{name}: {result['seconds']:.1f} s, {result['memory'] >> 20} MiB"
        for name, (_, result) in outcomes.items()
        if result["seconds"] > 10 or result["memory"] > 300 << 20
    ]
    assert not greedy, "\n".join(greedy)


def test_no_case_runs_code_or_opens_other_files(outcomes):
    """No pickle, no module, no connection, no process, no question; of the folder only JSON and safetensors."""
    for name, (_, result) in outcomes.items():
        for event, what in result["events"]:
            assert event == "open", f"{name}: {event} {what}"
            assert what.endswith((".json", ".safetensors")), f"{name}: opened {what}"
            assert name.startswith("base+") or not what.endswith("adapter_config.json"), f"{name}: opened {what}"


def test_the_log_would_have_shown_it(tmp_path):
    """A pickle and a module, opened on purpose, leave traces of the kind that is looked for."""
    (tmp_path / "evil.py").write_text("x = 1")
    (tmp_path / "p.bin").write_bytes(pickle.dumps(_Payload(tmp_path / "touched"), protocol=2))
    script = f"""{LOG}
sys.addaudithook(watch)
import json, pickle, socket
sys.path.insert(0, {str(tmp_path)!r})
import evil
pickle.load(open({str(tmp_path / "p.bin")!r}, "rb"))
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError:
    pass
print("RESULTS" + json.dumps(sorted({{event for event, _ in events}})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.split("RESULTS")[-1])
    assert {"exec", "open", "pickle.find_class", "socket.connect"} <= set(seen)


# ---- fields of the record ----

BOMBS = (
    "(a+)+$",
    "(?:(?:a|aa)+)+b",
    ".*" * 200,
    "a" * 600,
    "layer\n",
    "a\0b",
    "../x",
    "/x",
    "..",
    "",
    "x.",
    "x y",
    "a|b",
)


@pytest.mark.parametrize("bomb", BOMBS)
def test_patterns_and_paths_are_no_names_of_layers(copied, bomb):
    folder = copied("timm_vit", "adapter")
    content = json.loads((folder / RECORD).read_text())
    start = time.perf_counter()
    for path, value in (
        ("target_modules", bomb),
        ("target_modules", [bomb]),
        ("rank_pattern", {bomb: 2}),
        ("alpha_pattern", {bomb: 2}),
        ("modules_to_save", [bomb]),
        ("head", bomb),
        ("head", [bomb]),
    ):
        changed = {**content, "config": {**content["config"], path: value}}
        with pytest.raises(ValueError, match=f"config.{path}.* must be "):
            Record.from_dict(changed)
    changed = {**content, "backbone": {**content["backbone"], "architecture": bomb}}
    with pytest.raises(ValueError, match=r"backbone\.architecture must be "):
        Record.from_dict(changed)
    assert time.perf_counter() - start < 1
    change_json(folder / RECORD, config__target_modules=bomb)
    refuses(folder, RECORD, "config.target_modules", live=False)


@pytest.mark.parametrize("name", ["layer0.weight.of.none", "head", "pos_drop", "norm", "blocks"])
def test_names_of_no_layer_with_a_branch(copied, name):
    """Well-formed, but not of this network: refused before a pattern is made of them."""
    folder = copied("timm_vit", "full")
    with pytest.raises(ValueError, match=r"does not belong|does not have|missing"):
        change_json(folder / RECORD, config__target_modules=[name])
        load(folder)


@pytest.mark.parametrize("version", [2**70, -1, 1, 3, 0, "2", None, True, 2.0, [2], {}, "2" * 100_000, [0] * 10_000])
def test_unknown_schema_versions(copied, version):
    folder = copied("hf_vit", "full")
    change_json(folder / RECORD, schema_version=version)
    refuses(folder, RECORD, "schema", live=False)


@pytest.mark.parametrize("content", [None, [], 3, "x", {}, [{"schema_version": 2}], {"schema_version": 2}])
def test_records_that_are_none(copied, content):
    folder = copied("hf_vit", "adapter")
    (folder / RECORD).write_text(json.dumps(content))
    refuses(folder, RECORD, live=False)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("config.mode", [None, "both", ["full"], 1]),
        ("config.layout", ["", None, "other"]),
        ("config.norm", ["dual ", 0]),
        ("config.r", [0, -1, 1.0, True, "8", None, [8]]),
        ("config.lora_alpha", [float("nan"), float("inf"), 10**400, "1", None]),
        ("config.lora_dropout", [-0.1, 1.5, True, float("nan")]),
        ("config.use_rslora", [0, "true", None]),
        ("config.init_lora_weights", [1, 0, "pissa", "eva", None, "loftq"]),
        ("config.rank_pattern", [[], {"blocks.0.attn.qkv": True}, {"blocks.0.attn.qkv": 0}, {"blocks.9": 2}]),
        ("config.modules_to_save", [{}, "head", [1], [None]]),
        ("config.target_modules", [[], {}, None, [["head"]], ["x"] * 10_000]),
        ("backbone.library", ["keras", None, ["timm"]]),
        ("backbone.name_or_path", [3, ["x"], "a\nb", "x\x1b[2J", "\udc80", "x" * 5000]),
        ("backbone.revision", [3, "../../x", "a b", "/etc", "x\\y", "\x1b", "..", "x" * 300, ""]),
        ("backbone.config", ["x", [], 3, True]),
        ("backbone.weights_sha256", [None, 3]),
        ("num_classes", [0, -4, 4.0, True, "4", 10**6]),
        (
            "label_names",
            [[], ["a"], ["a"] * 5, "abcd", {"a": 1}, [1, 2, 3, 4], ["a", "b", "c", "\x1b[31m"], ["\ud800"] * 4],
        ),
        ("preprocessing.image_size", [[0, 32], [32], 32, [32.0, 32], ["32", 32], [32, 32, 3], None]),
        ("preprocessing.mean", [[0, 0], [0, 0, float("nan")], ["a"] * 3, 0.5]),
        ("preprocessing.std", [[0, 0, 0], [1, 1, -1], [1, 1, float("inf")]]),
        ("preprocessing.interpolation", ["magic", 3]),
        ("preprocessing.crop_pct", [0, -1, 2, float("nan")]),
        ("preprocessing.crop_mode", ["x", None]),
        ("preprocessing.channel_order", ["gbr"]),
        ("threat_model.norm", ["l0", "linf\n", None, 3]),
        ("threat_model.eps", [0, -0.03, 8, 255, float("nan"), float("inf"), 10**400, "8/255", True]),
        (
            "training",
            [[], "x", {"a": float("nan")}, {"a": "x" * 5000}, {"a": [[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]}],
        ),
        ("results", [None, {}, ["x"], [None], [{"a": float("inf")}], [{}] * 1000]),
        ("fingerprint", [[], {"other": []}, {"robust": []}, {"robust": [[1.0] * 4]}, {"robust": [[1.0] * 3] * 2}]),
        (
            "fingerprint",
            [{"robust": [[1.0] * 4, [1.0] * 5]}, {"robust": [[None] * 4] * 2}, {"robust": [[10**400] * 4] * 2}],
        ),
        ("versions", [None, [], {"torch": 2}, {"torch": "\x1b[31m"}, {"\x1b": "2"}, {"a\nb": "2"}]),
    ],
)
def test_wrong_types_and_values(originals, field, values):
    """Each is refused by a message that names the field, and is short whatever the value is."""
    content = json.loads((originals / "timm_vit-full" / RECORD).read_text())
    for value in values:
        changed = json.loads(json.dumps(content))
        set_in(changed, field, value)
        with pytest.raises(ValueError) as caught:
            Record.from_dict(changed)
        message = str(caught.value)
        assert field.split(".")[-1] in message, (value, message)
        assert len(message) < 600 and "\x1b" not in message


def test_unknown_and_missing_fields(originals):
    content = json.loads((originals / "timm_vit-full" / RECORD).read_text())
    for place in ("", "config", "backbone", "preprocessing", "threat_model"):
        for name in ("evil", "\x1b[2J", "x" * 100_000):
            changed = json.loads(json.dumps(content))
            (changed[place] if place else changed)[name] = 1
            with pytest.raises(ValueError, match="has the unknown") as caught:
                Record.from_dict(changed)
            assert len(str(caught.value)) < 600 and "\x1b" not in str(caught.value)
    for name in content:
        if name != "schema_version":
            with pytest.raises(ValueError, match=f"lacks {name}"):
                Record.from_dict({key: value for key, value in content.items() if key != name})


def test_results_of_a_stranger_are_plain_data(copied):
    """Whoever shows them reads them with [`RobustnessReport.from_dict`], which refuses what is no report."""
    folder = copied("timm_vit", "full")
    change_json(folder / RECORD, results=[{"evil": ["{{ 7*7 }}"]}])
    model = load(folder)
    with pytest.raises(ValueError, match="not a robustness report"):
        RobustnessReport.from_dict(model.results[0])


def test_many_ranks_for_narrow_layers(originals):
    """Files may lie about the width of layers: what a branch will take is counted on the network itself."""
    folder = originals / "timm_resnet-adapter"
    record = Record.read(folder)
    network = MODELS["timm_resnet"].fresh()
    check_branches(network, record, folder)
    record.config["r"] = 4096
    with pytest.raises(ValueError, match="asks for branches of"):
        check_branches(network, record, folder)
    record.config["target_modules"] = ["layer1.0.conv1", "no.such"]
    with pytest.raises(ValueError, match=r"names 1 layers that ResNet does not have, such as no\.such"):
        check_branches(network, record, folder)


@pytest.mark.parametrize(
    "config", [{"text_config": {"vocab_size": 901_629, "eos_token_id": 250_000}}, {"image_size": 518}]
)
def test_large_numbers_that_models_have(config):
    check_network(config, "config")


# ---- weights ----


def changed_tensors(file, change):
    tensors = load_file(file)
    key = max(name for name, tensor in tensors.items() if tensor.ndim > 1)
    save_file(change(tensors, key), file)
    return key


TENSORS = {
    "nan": (lambda t, k: t | {k: torch.full_like(t[k], torch.nan)}, "NaN or infinite"),
    "infinite": (lambda t, k: t | {k: torch.full_like(t[k], -torch.inf)}, "NaN or infinite"),
    "infinite as float32": (
        lambda t, k: t | {k: torch.full_like(t[k], 1e300, dtype=torch.float64)},
        "NaN or infinite",
    ),
    "nan as half": (lambda t, k: t | {k: torch.full_like(t[k], torch.nan, dtype=torch.float16)}, "NaN or infinite"),
    **{
        str(dtype): (lambda t, k, dtype=dtype: t | {k: torch.zeros_like(t[k], dtype=dtype)}, "of another kind")
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "transposed": (lambda t, k: t | {k: t[k].transpose(0, -1)[:1].contiguous()}, "of another shape"),
    "one more dimension": (lambda t, k: t | {k: t[k][None]}, "of another shape"),
    "empty": (lambda t, k: t | {k: torch.zeros(0)}, "of another shape"),
    "scalar": (lambda t, k: t | {k: torch.zeros(())}, "of another shape"),
    "missing": (lambda t, k: {n: v for n, v in t.items() if n != k}, "missing"),
    "extra": (lambda t, k: t | {"evil": torch.zeros(1)}, "unexpected"),
    "path": (lambda t, k: t | {"../../evil": torch.zeros(1)}, "unexpected"),
    "control": (lambda t, k: t | {"\x1b[2J\0\n": torch.zeros(1)}, "unexpected"),
    "long name": (lambda t, k: t | {"x" * 1_000_000: torch.zeros(1)}, "unexpected"),
    "many": (lambda t, k: t | {f"evil{i}": torch.zeros(0) for i in range(3000)}, "and 2995 more"),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize(("name", "mode"), VARIANTS)
def test_tensors_that_do_not_belong(copied, name, mode, case):
    change, part = TENSORS[case]
    folder = copied(name, mode)
    for file in weight_files(folder):
        whole = file.read_bytes()
        changed_tensors(file, change)
        # The branches are looked for in the header already.
        refused = (ValueError, part) if case not in ("missing",) else (ValueError, "does not belong")
        model = MODELS[name].adapted(mode=mode)
        before = copied_state(model)
        with pytest.raises(refused[0]) as caught:
            model.load_weights(folder)
        message = str(caught.value)
        assert refused[1] in message and file.name in message, message
        assert len(message) < 3000 and "\x1b" not in message
        assert same(copied_state(model), before)
        file.write_bytes(whole)


@pytest.mark.parametrize(("name", "mode"), VARIANTS)
def test_wrong_tensors_are_refused_by_the_loader_too(copied, name, mode):
    folder = copied(name, mode)
    for file in weight_files(folder):
        whole = file.read_bytes()
        changed_tensors(file, TENSORS["nan"][0])
        refuses(folder, file.name, "NaN or infinite")
        file.write_bytes(whole)


def test_a_header_with_the_same_name_twice(copied):
    folder = copied("timm_vit", "full")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length].rstrip()
    key = max(load_file(file))
    entry = json.dumps({key: json.loads(header)[key] | {"dtype": "I32"}})[1:-1].encode()
    file.write_bytes(raw(header[:-1] + b"," + entry + b"}", whole[8 + length :]))
    refuses(folder, "model.safetensors")


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_a_natural_adapter_of_another_model(copied, name):
    folder = copied(name, "adapter")
    other = MODELS[name].adapted(mode="adapter")
    change_everything(other, seed=11)
    other.save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / NATURAL, folder / NATURAL)
    refuses(folder, "was not saved together with the robust one")


def test_values_between_the_blocks_of_the_released_layout(copied):
    """Stock PEFT would use them, and this package would not: they would be two models in one file."""
    folder = copied("timm_resnet", "full")
    file = folder / NATURAL
    tensors = load_file(file)
    key = next(key for key, tensor in tensors.items() if tensor.ndim == 4 and (tensor == 0).any())
    tensors[key][tensors[key] == 0] = 0.5
    file.write_bytes(save(tensors, {"format": "pt"}))
    refuses(folder, "are not of the layout that was saved")


def test_a_file_that_is_exchanged_while_it_is_read(copied, monkeypatch):
    """What is checked is what is read: a file is opened once, and a new one under its name is another file."""
    from autolora_hf import files

    folder = copied("timm_vit", "full")
    target = folder / NATURAL
    other = folder.parent / "other.safetensors"
    shutil.copy(target, other)
    key = changed_tensors(other, lambda t, k: t | {k: torch.zeros(1)})
    check = files.check_nothing_wrong

    def exchange(problems, path):
        check(problems, path)
        if path == target:
            os.replace(other, target)

    model = MODELS["timm_vit"].adapted()
    monkeypatch.setattr(files, "check_nothing_wrong", exchange)
    model.load_weights(folder)
    assert not other.exists() and load_file(target)[key].shape == (1,)
    assert same(logits(model), logits(load_copy(folder, target, model)))


def load_copy(folder, target, model):
    """The model as it was before its file was exchanged."""
    model.save_pretrained(folder.parent / "timm_vit-full2")
    return load_autolora_model(folder.parent / "timm_vit-full2")


def test_a_backbone_with_weights_that_are_not_finite(originals, tmp_path):
    for name in ("timm_vit", "hf_vit"):
        folder = Path(shutil.copytree(originals / f"{name}-base", tmp_path / name))
        changed_tensors(folder / "model.safetensors", TENSORS["nan"][0])
        with pytest.raises(ValueError, match="NaN or infinite"):
            load_backbone(str(folder))


# ---- links and names ----


@pytest.mark.parametrize("name", ["hf_vit", "timm_vit"])
@pytest.mark.parametrize("mode", MODES)
def test_links_out_of_the_folder(copied, name, mode):
    folder = copied(name, mode)
    outside = folder.parent / "outside"
    outside.mkdir()
    for file in (folder / RECORD, *weight_files(folder)):
        moved = outside / file.name
        shutil.move(file, moved)
        for target in (moved, os.path.relpath(moved, file.parent)):
            file.symlink_to(target)
            refuses(folder, file.name, "is a link out of its folder", live=file.name != RECORD)
            file.unlink()
        file.symlink_to("/nowhere")
        refuses(folder, file.name, error=FileNotFoundError, live=file.name != RECORD)
        file.unlink()
        file.symlink_to("/dev/zero")
        refuses(folder, file.name, "is a link out of its folder", live=file.name != RECORD)
        file.unlink()
        shutil.move(moved, file)
    shutil.move(folder / "natural", outside / "natural")
    (folder / "natural").symlink_to(outside / "natural")
    refuses(folder, "natural", "is a link out of its folder")


def test_a_pipe_is_not_waited_for(copied):
    folder = copied("hf_vit", "full")
    for file in (folder / RECORD, folder / "model.safetensors"):
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(FileNotFoundError, match=file.name):
            load(folder)
        file.unlink()
        file.write_bytes(content)


@pytest.mark.parametrize(("name", "mode"), VARIANTS)
def test_the_cache_of_the_hub_is_made_of_links(originals, tmp_path, name, mode):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    source = originals / f"{name}-{mode}"
    for number, file in enumerate(path for path in source.rglob("*") if path.is_file()):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    base = MODELS[name].fresh() if mode == "adapter" else None
    expected = logits(load_autolora_model(source, base_model=base and MODELS[name].fresh()))
    assert same(logits(load_autolora_model(snapshot, base_model=base)), expected)
    # Links to anything else are refused there too.
    (tmp_path / "secret.json").write_text("{}")
    for target in ("../../../secret.json", "../../blobs/../../secret.json", "../../refs/main"):
        (snapshot / RECORD).unlink()
        (snapshot / RECORD).symlink_to(target)
        with pytest.raises((ValueError, FileNotFoundError), match=r"link out of its folder|has no autolora_config"):
            load_autolora_model(snapshot, base_model=base)


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "a/b/../../c", "/", "\0", "a\0/b", "a\n/b", "org/na me", "x" * 5000, "hf-hub:a/b"]
)
def test_names_that_are_no_repository(name):
    with pytest.raises((FileNotFoundError, OSError, ValueError)):
        load_autolora_model(name)


@pytest.mark.parametrize(
    "name", ["local-dir:/dev", "/dev/null", "local-dir:\0", "local-dir:../../../..", "..", "a/..", "evil/x@../../y"]
)
def test_a_backbone_named_by_a_record_may_be_no_backbone(copied, name):
    """A record may name any place; it is read as a checkpoint of safetensors, or not at all."""
    folder = copied("timm_vit", "adapter")
    change_json(folder / RECORD, backbone__name_or_path=name)
    with pytest.raises((ValueError, OSError)) as caught:
        load_autolora_model(folder)
    assert str(caught.value) and "\0" not in str(caught.value)


def test_inside(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("x")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        inside(tmp_path / "model", "../secret")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        inside(tmp_path / "model", str(tmp_path / "secret"))


def test_json_is_bounded(tmp_path):
    path = tmp_path / "x.json"
    for content, part in (
        (b"\xff", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{" * 2_000_000, "lists and objects"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=part):
            read_json(path)
    path.write_text("[1, 2]")
    assert read_json(path, 6) == [1, 2]
    with pytest.raises(ValueError, match="6 bytes, more than the 5"):
        read_json(path, 5)


def test_a_header_of_usual_length_is_read(tmp_path):
    save_file({f"blocks.{i}.attn.qkv.weight": torch.zeros(1) for i in range(20_000)}, tmp_path / "x.safetensors")
    assert len(read_header(tmp_path / "x.safetensors")) == 20_000


# ---- texts that end up in a card ----


def test_names_are_data_of_a_card_and_no_template(tmp_path, monkeypatch):
    """Jinja renders the template of the package once, and nothing of what it puts in."""
    rendered = []
    make = Environment.from_string
    monkeypatch.setattr(
        Environment, "from_string", lambda self, text, *a, **k: rendered.append(text) or make(self, text)
    )
    names = ["{{ 7*7 }}", "{% for x in ().__class__.__mro__ %}x{% endfor %}", "{# gone #}", "plain"]
    model = get_autolora_model(
        MODELS["timm_vit"].fresh(), preprocessing=MODELS["timm_vit"].preprocessing, label_names=names
    )
    write_model_card(tmp_path, model)
    assert all("7*7" not in text for text in rendered)
    card = (tmp_path / "README.md").read_text()
    assert "49" not in card.split("## ")[0].split("Classes")[-1]


# ---- at random ----


@pytest.mark.parametrize("kind", fuzz_loader.KINDS)
def test_at_random(kind):
    """See `scripts/fuzz_loader.py`, which tries many more."""
    share = fuzz_loader.KINDS[kind][2]
    tally = fuzz_loader.fuzz(kind, round(300 * share), seed=1, stop=True)
    assert sum(tally.outcomes.values()) >= 0.8 * round(300 * share)


def test_the_fuzzer_feeds_valid_files_too():
    """Else everything would be refused for a reason of the fuzzer's own."""
    for kind in fuzz_loader.KINDS:
        strategies = fuzz_loader.KINDS[kind][1]
        case = [("timm_vit", "full"), 0, ("timm_vit", "full"), 0.0] if "spliced" in kind else None
        if case is None:
            first = [] if "report" in kind else ["timm_vit"] if "backbone" in kind else [("timm_vit", "full")]
            case = [*first, *([0] if len(strategies) == 3 else []), []]
        assert fuzz_loader.feed(kind, *case) == "loaded", kind


def test_timm_is_as_it_was_read():
    """The checks rest on what these libraries do; this fails when timm learns to look elsewhere."""
    from timm.models._hub import _PREFERRED_FILES

    assert _PREFERRED_FILES[0] == "model.safetensors", timm.__version__
