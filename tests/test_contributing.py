"""CONTRIBUTING.md does not go stale: its method trains, the paths it names are there, and so are its commands."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_objectives import SCALARS, Logits, batch
from test_stages import trainer_for
from test_trainer import NAMES, logged
from tiny_models import MODELS, pixels

import autolora_hf
from autolora_hf import load_autolora_model
from autolora_hf.objectives import OBJECTIVES, Objective
from autolora_hf.routes import ROBUST


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's objective, imported from a file as a reader would do; nothing of it stays registered."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    file = tmp_path / "mixed.py"
    file.write_text(block)
    before = dict(OBJECTIVES)
    spec = importlib.util.spec_from_file_location("mixed", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mixed", module)
    spec.loader.exec_module(module)
    (name,) = OBJECTIVES.keys() - before.keys()
    yield name, OBJECTIVES[name]
    del OBJECTIVES[name]
    assert before == OBJECTIVES


def test_the_formula_of_the_example(example):
    _, kind = example
    assert issubclass(kind, Objective)
    forward, data = Logits(), batch()
    clean, robust = forward.tables[ROBUST, "clean"], forward.tables[ROBUST, "adversarial"]
    for share in (0.0, 0.3, 1.0):
        loss = kind(share=share)(forward, data, SCALARS).loss
        expected = share * F.cross_entropy(robust, data.labels) + (1 - share) * F.cross_entropy(clean, data.labels)
        assert torch.allclose(loss, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="between 0 and 1"):
        kind(share=2)


@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_the_example_trains_saves_and_loads(example, tmp_path, mode):
    name, kind = example
    options = {"objective": name, "objective_kwargs": {"share": 0.7}}
    trainer = trainer_for(tmp_path / "out", mode=mode, num_train_epochs=2, **options)
    trainer.train()
    assert trainer.plan["objective_options"] == {"share": 0.7}
    assert logged(trainer, "robust_loss"), "its terms are logged"
    trainer.save_model()
    trainer.create_model_card()
    assert kind.description in (tmp_path / "out" / "README.md").read_text().replace("\n", " ")
    base = None if mode == "full" else MODELS["timm_resnet"].fresh(len(NAMES))
    loaded = load_autolora_model(tmp_path / "out", base_model=base)
    expected = trainer.model.eval().pixel_space(ROBUST)(pixels())
    assert torch.allclose(loaded.pixel_space()(pixels()), expected, atol=1e-5)
    with pytest.raises(ValueError, match="has weight, which MixedBatches does not know"):
        trainer_for(tmp_path / "other", objective=name, objective_kwargs={"weight": 1})


def test_what_the_pages_for_contributors_name_is_there():
    text = PAGE + (ROOT / "SECURITY.md").read_text() + (ROOT / "docs" / "compatibility.md").read_text()
    named = {
        path.rstrip("/")
        for path in re.findall(
            r"(?:\(|`|python )((?:autolora_hf|tests|scripts|docs|requirements|model_cards)/[\w./-]*)", text
        )
    }
    assert len(named) > 15
    # What is to be made by following the page.
    missing = [path for path in named - {"autolora_hf/objectives/mixed.py"} if not (ROOT / path).exists()]
    assert not missing


def test_commands_for_contributors_exist():
    """Scripts, tests and options in the blocks of shell commands."""
    pytest.importorskip("sybil", reason='needs sybil: pip install "autolora-hf[test]"')
    pytest.importorskip("markdown_it", reason='needs markdown-it-py: pip install "autolora-hf[test]"')
    from docs_blocks import commands, problem_of

    lines = [words for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for words in commands(block)]
    others = {("python3.11", "-m", "venv"), ("source", ".venv/bin/activate"), ("python", "-m", "mypy")}
    read = [words for words in lines if tuple(words[:3]) not in others and words[0] != "ruff"]
    assert len(read) > 5
    assert not [(words, problem_of(words)) for words in read if problem_of(words)]


def test_the_version_has_one_place():
    assert re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == autolora_hf.__version__
    for name in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r"^\s*version\s*[:=]\s*[\"']?\d", (ROOT / name).read_text(), re.M), name
