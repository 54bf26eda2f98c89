"""The published adapter on digits, as the quickstart leaves it, and its page."""

import shutil
from pathlib import Path

import pytest

from autolora_hf.demo import launch, open_demo
from autolora_hf.quickstart import NATURAL_MODEL, QuickstartSettings, train_on_digits


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """With a twin that was naturally fine-tuned, though briefly."""
    root = tmp_path_factory.mktemp("digits")
    shutil.copytree(Path(__file__).parents[2] / "model_cards" / "quickstart-digits", root / "model")
    settings = QuickstartSettings(epochs=1, train_images=100)
    twin = train_on_digits("natural", settings, root / "run", quiet=True).model
    twin.save_pretrained(root / "model" / NATURAL_MODEL)
    return root / "model"


@pytest.fixture(scope="session")
def served(digits_folder):
    """Address of the page."""
    gradio = pytest.importorskip("gradio", reason='needs Gradio: pip install "autolora-hf[demo]"')
    _, address, _ = launch(open_demo(digits_folder), host="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield address
    gradio.close_all()
