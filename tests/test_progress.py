"""Progress bars: on a terminal, in a log file, and where a command would else be silent."""

import io
import sys

import pytest
from test_trainer import new_trainer
from tiny_models import MODELS, change_everything

from autolora_hf import extract_adapter
from autolora_hf import progress as progress_module
from autolora_hf.evaluation.progress import StageBar
from autolora_hf.progress import hidden_progress, progress_bar, redraw_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=[io.StringIO, Terminal])
def stream(request, monkeypatch):
    """Standard error from when it is called on, once as a file and once as a terminal."""

    def begin():
        # Not before the test itself: pytest replaces it between the phases.
        monkeypatch.setattr(sys, "stderr", request.param())
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
        return sys.stderr

    return begin


@pytest.fixture
def clock(monkeypatch):
    """Time passes when the test says so."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr("autolora_hf.evaluation.progress.time.monotonic", lambda: now[0])
    return now


def states(stream, title):
    """How often a bar was drawn."""
    return stream.getvalue().count(f"{title}:")


def test_a_file_gets_a_state_a_minute(stream, clock):
    """An hour of work in 3,600 items."""
    stderr = stream()
    for _ in progress_bar(range(3600), title="work", unit="item", delay=0):
        clock[0] += 1
    if isinstance(stderr, Terminal):
        assert states(stderr, "work") > 1000
    else:
        assert 50 <= states(stderr, "work") <= 62
        # With the time left.
        assert "50%" in stderr.getvalue() and "<30:" in stderr.getvalue()


def test_a_stage_of_an_evaluation(stream, clock):
    """Batches and the passes inside them, in an hour."""
    stderr = stream()
    with StageBar("APGD-CE", [10] * 360, passes=10, correct=None, is_shown=True, leave=True) as bar:
        for index in range(360):
            for _ in range(10):
                clock[0] += 1
                bar.on_pass()
            bar.finish([index])
    if isinstance(stderr, Terminal):
        assert states(stderr, "APGD-CE") > 1000
    else:
        assert 50 <= states(stderr, "APGD-CE") <= 62
    assert "100%" in stderr.getvalue() and "3600/3600" in stderr.getvalue()


def test_short_work_has_no_bar(stream, clock):
    stderr = stream()
    for _ in progress_bar(range(20), title="work", unit="item"):
        clock[0] += 0.1
    assert stderr.getvalue() == ""


def test_where_there_are_none(monkeypatch, stream, clock):
    stderr = stream()

    def drawn():
        stderr.seek(0)
        stderr.truncate()
        for _ in progress_bar(range(9), title="work", unit="item", delay=0):
            clock[0] += 1
        return states(stderr, "work")

    assert drawn()
    with hidden_progress(False):
        assert drawn()
    with hidden_progress(), hidden_progress(False):
        assert not drawn()
    assert drawn()
    monkeypatch.setenv("RANK", "1")
    assert not drawn()


def test_time_between_states(monkeypatch, stream):
    stderr = stream()
    assert redraw_seconds() == (0.1 if isinstance(stderr, Terminal) else 60)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert redraw_seconds() == 0.1


def test_a_training_says_what_it_is_doing(tmp_path, monkeypatch, capsys):
    """Every part that can take long has a bar, and a log file does not grow with the steps."""
    monkeypatch.setattr(progress_module, "_DELAY", 0)
    options = {"finish": "rift", "finish_kwargs": {"epochs": 1, "steps": 1, "points": 2}}
    options |= {"per_device_train_batch_size": 2}
    trainer = new_trainer(tmp_path, "timm_resnet", disable_tqdm=False, num_train_epochs=1, **options)
    trainer.train()
    text = capsys.readouterr().err
    for title in ("robustness of the backbone", "accuracy of the natural route", "RiFT: criticality"):
        assert f"{title}: " in text
    assert "RiFT: fine-tuning: " in text and "RiFT: interpolation: " in text
    assert trainer.state.global_step == 24
    assert text.count("\r") < 40
    quiet = new_trainer(tmp_path / "quiet", "timm_resnet", num_train_epochs=1)
    quiet.train()
    assert "%|" not in capsys.readouterr().err


def test_an_extraction_says_what_it_is_doing(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "_DELAY", 0)
    tiny = MODELS["timm_resnet"]
    model = tiny.adapted(mode="full")
    change_everything(model)
    extract_adapter(model, tiny.fresh(), size=0.5)
    assert "decomposing the weight change: " in capsys.readouterr().err
