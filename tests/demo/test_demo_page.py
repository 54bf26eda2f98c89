"""The demo's page through its events, the command, and the folder of a Space."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import SpaceCard
from PIL import Image

from autolora_hf.cli import main
from autolora_hf.demo import launch, open_demo, write_space
from autolora_hf.demo import page as html
from autolora_hf.demo.attack import attack_image
from autolora_hf.demo.models import NATURAL_NAME, ROBUST_NAME, ROUTE_NAME


DIGITS = Path(__file__).parents[2] / "model_cards" / "quickstart-digits"
pytest.importorskip("gradio", reason='needs Gradio: pip install "autolora-hf[demo]"')


@pytest.fixture
def client(served):
    from gradio_client import Client

    return Client(served, verbose=False)


@pytest.fixture
def seven(tmp_path):
    path = tmp_path / "seven.png"
    open_demo(DIGITS).examples[7][1].save(path)
    return path


def test_upload_and_attack(client, seven):
    from gradio_client import handle_file

    problem, _, _ = client.predict(handle_file(seven), api_name="/upload")
    assert problem == ""
    _, clean, _ = client.predict("linf", 0, NATURAL_NAME, api_name="/attack")
    assert clean.count("no attack") == 2
    problem, results, curve = client.predict("linf", 0.1, NATURAL_NAME, api_name="/attack")
    assert problem == "" and results.count("data:image/png;base64,") == 6
    assert re.findall(r'data-model="([^"]+)"', results) == [NATURAL_NAME, ROBUST_NAME]
    assert f"Shown the image made against <b>{NATURAL_NAME}</b>" in results
    assert curve.count("<tr") == 8 and "more radii" not in curve and "0.1 = 25.5/255" in curve
    _, results, _ = client.predict("linf", 0.05, ROUTE_NAME, api_name="/attack")
    assert re.findall(r'data-model="([^"]+)"', results) == [ROUTE_NAME, ROBUST_NAME]


def test_bad_uploads_are_answered_in_the_page(client, seven, tmp_path):
    from gradio_client import handle_file

    client.predict(handle_file(seven), api_name="/upload")
    (tmp_path / "bad.png").write_text("no image")
    problem, results, curve = client.predict(handle_file(tmp_path / "bad.png"), api_name="/upload")
    assert 'role="alert"' in problem and "no image of a known format" in problem and curve == ""
    # The image before it is gone, so that nothing is attacked that one does not see.
    problem, results, _ = client.predict("linf", 0.1, ROUTE_NAME, api_name="/attack")
    assert "There is no image yet" in problem and "data-model" not in results


def test_the_title_says_what_the_robust_model_is_compared_with(digits_folder):
    """The natural route shares the backbone and withstands about as much, so it is no contrast."""
    assert "and on one that was not.</p>" in html.introduction(open_demo(digits_folder))
    alone = html.introduction(open_demo(DIGITS))
    assert "on its other route" in alone and "one that was not" not in alone


def test_a_page_that_this_machine_cannot_reach_is_not_shared_instead(monkeypatch):
    """As behind a proxy. Gradio's own advice is `share=True`."""
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)
    with pytest.raises(OSError, match=r"did not answer within 3 seconds at http://127.0.0.1:\d+/.*NO_PROXY=127.0.0.1"):
        launch(open_demo(DIGITS), host="127.0.0.1", prevent_thread_lock=True, quiet=True)


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"Another program has port {port}: choose another one \(`--port`\)"):
            launch(open_demo(DIGITS), host="127.0.0.1", port=port, prevent_thread_lock=True, quiet=True)


def test_names_and_notes_are_escaped(tmp_path):
    demo = open_demo(DIGITS, title="<script>alert(1)</script>")
    demo.label_names[:] = [f"<b>{number}" for number in range(10)]
    image = attack_image(demo.shown(ROUTE_NAME), _grey(), "linf", 0.1, steps=1)
    page = html.introduction(demo) + html.results(demo, image, ["<i>note</i>"]) + html.about(demo)
    assert "<script>" not in page and "<b>0" not in page and "<i>note" not in page
    assert "&lt;script&gt;" in page and "&lt;i&gt;note" in page


def test_page_states_threat_model_attack_and_published_accuracy():
    text = re.sub(r"<[^>]+>", "", html.about(open_demo(DIGITS, steps=7)))
    assert "Linf perturbations up to ε = 0.1 = 25.5/255" in text and "PGD with 7 steps" in text
    assert "No measurement" in text and "robust accuracy 64.67% [56.45%, 72.29%] under AutoAttack" in text


def _grey():
    return torch.full((3, 28, 28), 0.5)


# ---- the command ----


def test_command_without_gradio_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(DIGITS)]) == 1
    assert 'pip install "autolora-hf[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no/such/folder/at/all"], "neither a folder nor a Hub repository"),
        ([str(DIGITS), "--natural", "quickstart"], "Class 0 is 'T-shirt/top'"),
        ([str(DIGITS), "--examples", "no/such/folder"], "There is no folder"),
    ],
)
def test_command_with_wrong_inputs(capsys, options, message):
    assert main(["demo", *options]) == 1
    assert message in capsys.readouterr().err


def test_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["demo", str(DIGITS), "--port", str(port)]) == 1
    assert str(port) in capsys.readouterr().err


# ---- a Space ----


def test_space_is_complete_pinned_and_has_no_secrets(digits_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    (digits_folder / "training_args.json").write_text(json.dumps({"output_dir": str(tmp_path)}))
    assert main(["demo", str(digits_folder), "--space", str(tmp_path / "space"), "--steps", "7"]) == 0
    space = tmp_path / "space"
    assert [path.name for path in tmp_path.iterdir()] == ["space"]
    card = SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    lines = (space / "requirements.txt").read_text().split()
    assert f"gradio=={card.sdk_version}" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    # Either the package itself, or what it needs beside a copy of it.
    assert {"torch", "timm", "transformers", "peft"} <= names
    assert "autolora-hf" in names or (space / "autolora_hf" / "demo" / "style.css").is_file()
    assert "steps=7" in (space / "app.py").read_text()
    assert (space / "model" / "adapter_model.safetensors").is_file()
    assert (space / "natural_model" / "autolora_config.json").is_file()
    assert (space / "examples" / "7" / "07 7.png").is_file()
    for path in space.rglob("*"):
        assert path.name != "training_args.json" and "__pycache__" not in path.parts
        if path.is_file():
            content = path.read_bytes()
            assert b"hf_secretsecretsecret" not in content and str(tmp_path).encode() not in content
    (digits_folder / "training_args.json").unlink()


def test_space_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    demo = open_demo(DIGITS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="name a new folder"):
        write_space(demo, DIGITS, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_space(demo, DIGITS, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_space_of_an_adapter_whose_backbone_stays_here(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "autolora_config.json").read_text())
    record["backbone"]["name_or_path"] = str(tmp_path / "backbone")
    (tmp_path / "backbone").mkdir()
    (tmp_path / "model" / "autolora_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="which a Space does not have"):
        write_space(open_demo(DIGITS), tmp_path / "model", tmp_path / "space")
    assert not (tmp_path / "space").exists()


@pytest.mark.slow
def test_app_of_a_space_runs_alone(tmp_path):
    write_space(open_demo(DIGITS), DIGITS, tmp_path / "space")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=tmp_path / "space", env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5) as answer:
                    config = json.load(answer)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"no answer: {(tmp_path / 'log').read_text()}")
        assert config["title"] == "Attack quickstart-digits" and config["analytics_enabled"] is False
    finally:
        process.terminate()
        process.wait(30)
