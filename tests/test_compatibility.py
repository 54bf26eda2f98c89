"""What the package relies on in other libraries without their promise is there, in whatever versions are installed."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
from packaging.requirements import Requirement
from script_modules import load
from torch import nn
from transformers import Trainer, TrainingArguments

from autolora_hf import AutoLoraTrainer


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
SCRIPT = load("compatibility")
NAMES = re.findall(r"^\| `((?:accelerate|datasets|peft|timm|torch|transformers)\.[\w.]+)` \|", PAGE, re.M)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {Requirement(line).name.lower(): Requirement(line) for line in PROJECT["dependencies"]}
# Distributions whose modules are called otherwise.
MODULES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "pyyaml": "yaml"}


def resolved(name):
    """What a dotted name is: of a module, or of a class in one."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_used_without_a_promise_is_there(name):
    resolved(name)


def test_every_hook_of_the_trainer_is_in_the_table():
    """Those that are replaced and those that are called; a hook that is gone is missed by the test above."""
    own = [kind for kind in AutoLoraTrainer.__mro__ if kind.__module__.startswith("autolora_hf")]
    names = {name for kind in own for name in vars(kind)}
    for kind in {kind.__module__ for kind in own}:
        tree = ast.parse(Path(sys.modules[kind].__file__).read_text())
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    private = {name for name in names if re.match(r"_[a-z]", name) and hasattr(Trainer, name)}
    assert private == {name.rpartition(".")[2] for name in NAMES if name.startswith("transformers.Trainer.")}


def test_attributes_of_instances(tmp_path):
    rows = datasets.Dataset.from_dict({"label": [0, 1]})
    assert rows._indices is None and rows.select([1, 0])._indices is not None and rows._fingerprint
    stream = rows.to_iterable_dataset()
    assert stream._ex_iterable is not None and stream._distributed is None
    assert TrainingArguments(str(tmp_path), use_cpu=True)._n_gpu is not None
    layer = nn.Linear(1, 1)
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        assert hasattr(layer, name)


def test_every_library_that_is_imported_is_required():
    found = set()
    for path in (ROOT / "autolora_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    extras = {
        Requirement(line).name.lower()
        for name, lines in PROJECT["optional-dependencies"].items()
        if name != "test"
        for line in lines
    }
    # Named otherwise, or brought by what is required.
    extras = {"imagecorruptions" if name == "imagecorruptions-imaug" else name.replace("-", "_") for name in extras}
    required = {MODULES.get(name, name) for name in REQUIRED}
    assert found - set(sys.stdlib_module_names) - {"autolora_hf"} - extras <= required


def locked(name):
    lines = SCRIPT.lock_file(name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", SCRIPT.LOCKS)
def test_locks_are_of_what_the_project_requires(name):
    found = locked(name)
    for required, requirement in REQUIRED.items():
        assert requirement.specifier.contains(found[required]), required
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if name == "lowest" and lowest:
            # A bound that nothing reaches was never tried.
            assert re.fullmatch(re.escape(lowest[0]) + r"(\.0)*", found[required]), (required, found[required])
    text = SCRIPT.lock_file(name).read_text()
    assert not re.search(r"https?:|file:|--index|--find-links|@ ", text), "no place of this machine"


def test_the_page_has_the_versions_of_the_locks():
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.M)
    lowest, newest = locked("lowest"), locked("newest")
    assert len(rows) > 8
    for name, low, new in rows:
        if name != "Python":
            assert (low, new) == (lowest[name], newest[name]), name
    assert f"torchvision {lowest['torchvision']} and {newest['torchvision']}" in PAGE
    assert set(SCRIPT.SHOWN) <= {name for name, *_ in rows}


def test_the_tests_of_the_script_are_there():
    assert all((ROOT / path).is_file() for path in SCRIPT.TESTS)
    assert len(set(SCRIPT.TESTS)) == len(SCRIPT.TESTS)


@pytest.mark.compat
@pytest.mark.parametrize("name", SCRIPT.LOCKS)
def test_in_an_environment_of_its_own(name):
    script = str(ROOT / "scripts" / "compatibility.py")
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_the_installed_versions_are_supported():
    for name, requirement in REQUIRED.items():
        assert requirement.specifier.contains(version(name), prereleases=True), (name, version(name))
