"""Feeds random damage and malice to everything that reads files of strangers, and counts what came of it.

An input may be loaded or refused. It is a failure if anything but `ValueError` or `OSError` is raised, if the message
is empty, endless or would control a terminal, if weights of another shape or that are not finite are loaded, if a
refused file changes a live model, or if it takes more than `MOST_SECONDS` or `MOST_MEMORY`.

    python scripts/fuzz_loader.py --examples 20000 --seed 0
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import timm
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from tiny_models import MODELS, change_everything

from autolora_hf import RobustnessReport, load_autolora_model
from autolora_hf.backbones import load_backbone
from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import Accuracy, AttackResult
from autolora_hf.record import RECORD, Record
from autolora_hf.saving import check_files, deployed_digest


MOST_SECONDS, MOST_MEMORY = 20.0, 600 << 20
# One of each library in each mode.
CASES = (("timm_vit", "full"), ("timm_resnet", "adapter"), ("hf_resnet", "full"), ("hf_vit", "adapter"))
BACKBONES = ("timm_vit", "timm_resnet", "hf_vit", "hf_resnet")


# ---- strategies ----

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 5, 64, 255, 2049, 16_385, 10**5, 10**9, 2**31, 2**63, 2**70, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-45, 1e-300, 1e20, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "\\\\host\\share",
        "a/../b",
        "~",
        "local-dir:",
    ),
    *("local-dir:/", "hf-hub:evil/x", "evil/x", "evil/x@../..", "http://127.0.0.1/x", "file:///etc/passwd", "a\0b"),
    *("a\nb", "\x1b[2J", "\u202egnp", "\ud800", "\u0130", "ﬁ", "(a+)+$", "(?:" * 50, ".*", "[", "^", "|", "a" * 5000),
    *("{{ 7*7 }}", "{% for x in ().__class__ %}", "<script>alert(1)</script>", "float8_e4m3fn", "complex64", "int8"),
    *(
        "os.system",
        "torch.nn.Linear",
        "__class__",
        "forward",
        "resnet50",
        "vit_base_patch16_224",
        "auto",
        "cuda",
        "meta",
    ),
    *([], {}, [[]], [None], [0], [0] * 1000, ["fc"], ["head"], [1, 2, 3, 4], {"": 0}, {"auto_map": {"A": "x.B"}}),
    *([1, [2, [3, [4, [5]]]]], {"a": {"b": {"c": {}}}}, [[1.0] * 4] * 2, [32, 32], [3, 32, 32], [3, 10**5, 10**5]),
]
# Names that mean something to the libraries, for the place of any key.
KEYS = (
    *("auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "trust_remote_code", "dtype"),
    *(
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "features_only",
        "transformers_weights",
    ),
    *("model_args", "img_size", "image_size", "depth", "depths", "embed_dim", "num_classes", "num_labels", "in_chans"),
    *(
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "patch_size",
        "window_size",
        "id2label",
        "label_names",
    ),
    *("architecture", "architectures", "model_type", "backbone_config", "use_timm_backbone", "torch_dtype", "device"),
    *(
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "schema_version",
        "__proto__",
        "__class__",
        "",
        "a\nb",
        "\x1b",
    ),
)

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 300)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(KEYS)
)
random_json = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
nasty = st.sampled_from(NASTY)


@dataclass
class Edit:
    """One change of a JSON value.

    Args:
        where (`int`): Which of its places, by number; counted around.
        how (`str`): What is done there.
        value: What is put there, where `how` needs one.
        key (`str`): Name of an added field.
    """

    where: int
    how: str
    value: Any
    key: str


edits = st.lists(
    st.builds(
        Edit,
        st.integers(0, 2**16),
        st.sampled_from(
            ("replace", "replace", "replace", "near", "near", "near", "delete", "add", "rename", "repeat")
        ),
        nasty | random_json,
        st.sampled_from(KEYS) | st.text(max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def edited(content: Any, changes: list[Edit]) -> Any:
    """`content` with some changes; itself it stays as it is."""
    holder = [copy.deepcopy(content)]
    for change in changes:
        *parents, last = list(_places(holder))[1:][change.where % max(len(list(_places(holder))) - 1, 1)]
        parent: Any = holder
        for key in parents:
            parent = parent[key]
        old = parent[last]
        if change.how == "delete" and parent is not holder:
            del parent[last]
        elif change.how == "rename" and isinstance(parent, dict):
            parent[change.key] = parent.pop(last)
        elif change.how == "add" and isinstance(old, dict):
            old[change.key] = change.value
        elif change.how == "repeat" and isinstance(old, (list, str)):
            parent[last] = old * (1 + change.where % 3)
        elif change.how == "near" and isinstance(old, (int, float)) and isinstance(change.value, (int, float)):
            # Of the same kind and not far off, which gets past the first checks.
            parent[last] = not old if isinstance(old, bool) else old + (change.where % 9 - 4)
        elif change.how == "near" and isinstance(old, (int, float)):
            parent[last] = old * (change.where % 7)
        else:
            parent[last] = copy.deepcopy(change.value)
    return holder[0]


@dataclass
class Damage:
    """One change of a file's bytes: `how` at a share `at` of its length, or of its first 200 bytes if `early`."""

    how: str
    at: float
    early: bool
    content: bytes


damages = st.lists(
    st.builds(
        Damage,
        st.sampled_from(("overwrite", "overwrite", "flip", "insert", "delete", "truncate", "append", "swap")),
        st.floats(0, 1),
        st.booleans(),
        st.binary(min_size=1, max_size=12)
        | st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\x00\x00\xc0\x7f", b"}", b'"')),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, changes: list[Damage]) -> bytes:
    """`content` with some damages."""
    for change in changes:
        at = int(change.at * (min(len(content), 200) if change.early else len(content)))
        size = len(change.content)
        if change.how == "overwrite":
            content = content[:at] + change.content + content[at + size :]
        elif change.how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << size % 8)]) + content[at + 1 :]
        elif change.how == "insert":
            content = content[:at] + change.content + content[at:]
        elif change.how == "delete":
            content = content[:at] + content[at + size :]
        elif change.how == "truncate":
            content = content[:at]
        elif change.how == "append":
            content += change.content
        elif change.how == "swap":
            content = content[at:] + content[:at]
    return content


# ---- what is fed ----


@dataclass
class Saved:
    """A valid folder, of which one file is changed at a time."""

    name: str
    mode: str
    folder: Path
    live: Any

    def load(self) -> Any:
        base = MODELS[self.name].fresh() if self.mode == "adapter" else None
        return load_autolora_model(self.folder, base_model=base)


@cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="hostile-")


@cache
def saved_model(name: str, mode: str) -> Saved:
    model = MODELS[name].adapted(mode=mode)
    change_everything(model)
    folder = Path(_root().name) / f"{name}-{mode}"
    model.results = [{**_report(), "weights_sha256": deployed_digest(model)}]
    model.save_pretrained(folder)
    return Saved(name, mode, folder, model)


@cache
def saved_backbone(name: str) -> Path:
    network, folder = MODELS[name].fresh(), Path(_root().name) / f"{name}-base"
    if hasattr(network, "save_pretrained"):
        network.save_pretrained(folder)
    else:
        timm.models.save_for_hf(network, folder, safe_serialization=True)
    return folder


@cache
def _report_text() -> str:
    accuracy = Accuracy.from_counts(2, 3)
    report = RobustnessReport(
        threat_model=ThreatModel(),
        natural=accuracy,
        robust=Accuracy.from_counts(1, 3),
        attacks=[AttackResult("PGD", 2, 1, 1 / 3, 0.5), AttackResult("FAB", left_out="too slow")],
        protocol="custom",
        attack="PGD with 10 steps",
        sample_indices=[0, 2, 5],
        natural_correct=[True, True, False],
        robust_correct=[True, False, False],
        dataset_size=9,
        num_classes=4,
        seed=0,
        route="robust",
        device="cpu",
        seconds=1.5,
        dataset={"name": "digits", "kind": "memory"},
        sample_digests=["0123456789ab"] * 3,
        versions={"torch": "2"},
        warnings=["few images"],
    )
    return json.dumps(report.to_dict())


def _report() -> dict[str, Any]:
    return json.loads(_report_text())


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Within it, `path` has other content."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def _encoded(content: Any) -> bytes:
    # As Python writes it: with NaN, and half surrogate pairs as escapes.
    return json.dumps(content).encode()


def _check_loaded(model: Any) -> None:
    state = model.state_dict()
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    assert not bad, f"loaded weights that are not finite: {bad}"


def _load_into(saved: Saved) -> None:
    """Weights into a live model, as [`AutoLoraModel.load_weights`] does; refused ones must leave it as it was."""
    before = {key: tensor.clone() for key, tensor in saved.live.state_dict().items()}
    try:
        check_files(saved.folder, Record.read(saved.folder))
        saved.live.load_weights(saved.folder)
    except Exception:
        after = saved.live.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before), "a refused file changed the model"
        raise
    after = saved.live.state_dict()
    assert {key: tensor.shape for key, tensor in after.items()} == {key: t.shape for key, t in before.items()}
    _check_loaded(saved.live)
    saved.live.load_state_dict(before)


_cases, _files = st.sampled_from(CASES), st.integers(0, 3)


def feed_record(case: tuple[str, str], changes: list[Edit]) -> None:
    saved = saved_model(*case)
    content = edited(json.loads((saved.folder / RECORD).read_text()), changes)
    with replaced(saved.folder / RECORD, _encoded(content)):
        _check_loaded(saved.load())


def feed_record_bytes(case: tuple[str, str], changes: list[Damage]) -> None:
    saved = saved_model(*case)
    with replaced(saved.folder / RECORD, damaged((saved.folder / RECORD).read_bytes(), changes)):
        _check_loaded(saved.load())


def _weight_file(saved: Saved, number: int) -> Path:
    files = sorted(saved.folder.rglob("*.safetensors"))
    return files[number % len(files)]


def feed_weights_bytes(case: tuple[str, str], number: int, changes: list[Damage]) -> None:
    saved = saved_model(*case)
    path = _weight_file(saved, number)
    with replaced(path, damaged(path.read_bytes(), changes)):
        _load_into(saved)


def feed_weights_header(case: tuple[str, str], number: int, changes: list[Edit]) -> None:
    saved = saved_model(*case)
    path = _weight_file(saved, number)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = _encoded(edited(json.loads(whole[8 : 8 + length]), changes))
    with replaced(path, struct.pack("<Q", len(header)) + header + whole[8 + length :]):
        _load_into(saved)


def feed_spliced_weights(case: tuple[str, str], number: int, other: tuple[str, str], at: float) -> None:
    saved, second = saved_model(*case), saved_model(*other)
    path = _weight_file(saved, number)
    first, second = path.read_bytes(), _weight_file(second, number).read_bytes()
    with replaced(path, first[: int(at * len(first))] + second[int(at * len(second)) :]):
        _load_into(saved)


def feed_backbone(name: str, changes: list[Edit]) -> None:
    folder = saved_backbone(name)
    content = edited(json.loads((folder / "config.json").read_text()), changes)
    with replaced(folder / "config.json", _encoded(content)):
        _check_loaded(load_backbone(str(folder)))


def feed_report(changes: list[Edit]) -> None:
    # Through text, since a report is always read from a file.
    str(RobustnessReport.from_dict(json.loads(_encoded(edited(_report(), changes)))))


# What is fed, with its inputs and its share of all examples.
KINDS: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy, ...], float]] = {
    "fields of autolora_config.json": (feed_record, (_cases, edits), 0.3),
    "bytes of autolora_config.json": (feed_record_bytes, (_cases, damages), 0.1),
    "bytes of safetensors": (feed_weights_bytes, (_cases, _files, damages), 0.2),
    "headers of safetensors": (feed_weights_header, (_cases, _files, edits), 0.15),
    "two safetensors spliced": (feed_spliced_weights, (_cases, _files, _cases, st.floats(0, 1)), 0.05),
    "config.json of a backbone": (feed_backbone, (st.sampled_from(BACKBONES), edits), 0.1),
    "robustness reports": (feed_report, (edits,), 0.1),
}


# ---- counting ----


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    outcomes: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    most_memory: int = 0
    failures: list[str] = field(default_factory=list)


def _memory(name: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` (the peak) of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _restart_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def feed(kind: str, *case: Any, tally: Tally | None = None) -> str:
    """Feeds one input and returns what came of it: `"loaded"` or the name of the exception.

    Raises:
        AssertionError: If the input does what none may do.
    """
    _restart_peak()
    before, start = _memory("VmRSS"), time.perf_counter()
    outcome = "loaded"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            KINDS[kind][0](*case)
        except AssertionError:
            raise
        except (ValueError, OSError) as error:
            outcome, message = type(error).__name__, str(error)
            assert message.strip(), "the message is empty"
            assert len(message) < 20_000, f"the message has {len(message)} characters"
            assert not any(letter < " " and letter not in "\r\n\t" for letter in message), (
                f"controls a terminal: {message!r}"
            )
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    seconds, memory = time.perf_counter() - start, max(_memory("VmHWM") - before, 0)
    if tally is not None:
        tally.outcomes[outcome] += 1
        tally.slowest, tally.most_memory = max(tally.slowest, seconds), max(tally.most_memory, memory)
    assert seconds < MOST_SECONDS, f"it took {seconds:.0f} s"
    assert memory < MOST_MEMORY, f"it took {memory >> 20} MiB"
    return outcome


def fuzz(kind: str, examples: int, seed: int, *, stop: bool) -> Tally:
    """Feeds `examples` inputs of one kind; with `stop` the first failure is raised, in its smallest form."""
    tally = Tally()

    def attempt(case: tuple[Any, ...]) -> None:
        try:
            feed(kind, *case, tally=tally)
        except AssertionError as error:
            if stop:
                raise
            tally.outcomes["FAILED"] += 1
            if len(tally.failures) < 100:
                tally.failures.append(f"{error}\n    {str(case)[:600]}")

    phases = (Phase.generate, Phase.shrink) if stop else (Phase.generate,)
    options = settings(
        max_examples=examples, phases=phases, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    seeded(seed)(options(given(st.tuples(*KINDS[kind][1]))(attempt)))()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000, help="Inputs of all kinds together.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="One kind alone.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = total = 0
    for kind, (_, _, share) in KINDS.items():
        if arguments.only not in (None, kind):
            continue
        examples = arguments.examples if arguments.only else round(arguments.examples * share)
        start = time.perf_counter()
        tally = fuzz(kind, examples, arguments.seed, stop=False)
        tried = sum(tally.outcomes.values())
        total, failed = total + tried, failed + tally.outcomes["FAILED"]
        print(
            f"{kind}: {tried:,} inputs in {time.perf_counter() - start:.0f} s; "
            + ", ".join(f"{outcome} {count:,}" for outcome, count in tally.outcomes.most_common())
            + f"; slowest {tally.slowest:.1f} s, most memory {tally.most_memory >> 20} MiB",
            flush=True,
        )
        for failure in tally.failures:
            print(f"  {failure}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{total:,} inputs, {failed:,} failures; peak memory of the process {peak:,} MiB")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
