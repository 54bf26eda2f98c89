"""The notebooks: as they are stored, and, in small, as they run."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from hub_server import hub


FOLDER = Path(__file__).parents[1] / "notebooks"
# What makes a run short, inserted after the cell with the tag `parameters`.
SMALL = {
    "first_robust_fine_tuning": "EPOCHS, TRAIN_IMAGES, TEST_IMAGES = 1, 100, 10",
    "publish_and_verify": "EPOCHS, TRAIN_IMAGES, TEST_IMAGES = 1, 100, 10",
    "compare_methods": 'EPOCHS, TRAIN_IMAGES, TEST_IMAGES, OBJECTIVES = 1, 100, 20, ["natural", "pgd-at", "trades"]',
}


def cells(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def outputs(found):
    return [output for cell in found if cell["cell_type"] == "code" for output in cell["outputs"]]


def printed(found):
    """All texts of the outputs."""
    texts = []
    for output in outputs(found):
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        texts.append(text if isinstance(text, str) else "".join(text))
    return "\n".join(texts)


def test_there_are_no_others():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)
    assert all(f"`{name}.ipynb`" in (FOLDER / "README.md").read_text() for name in SMALL)


# ---- as they are stored ----


@pytest.mark.parametrize("name", SMALL)
def test_stored_notebook(name):
    """Valid, run from top to bottom without an error, small, and with nothing of the machine it was run on."""
    text, found = (FOLDER / f"{name}.ipynb").read_text(), cells(name)
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install nbclient ipykernel")
    nbformat.validate(nbformat.reads(text, 4))
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs(found)} <= {"stream", "display_data", "execute_result"}
    said = ["".join(output["text"]) for output in outputs(found) if output.get("name") == "stderr"]
    assert not [text for text in said if re.search("Traceback|Warning|%\\|", text)]
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|var|usr)/[\w.]+", text)
    assert not re.findall(r"\b[A-Z]:\\\\", text)
    assert len(text) < 300_000
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == code[:1]
    # Every name that makes a run short is one of the notebook's.
    own = {line.partition(" = ")[0] for line in "".join(tagged[0]["source"]).splitlines()}
    assert set(SMALL[name].partition(" = ")[0].split(", ")) <= own


def test_links_lead_to_files():
    for path in [*FOLDER.glob("*.ipynb"), FOLDER / "README.md"]:
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
        assert all((FOLDER / target).is_file() for target in targets), path


def test_stored_figures_and_verdicts():
    """What the text of the notebooks leads up to is what their outputs show."""
    pictures = {name: sum("image/png" in output.get("data", {}) for output in outputs(cells(name))) for name in SMALL}
    assert pictures == {"first_robust_fine_tuning": 2, "publish_and_verify": 0, "compare_methods": 1}
    assert "AutoAttack (standard)" in printed(cells("first_robust_fine_tuning"))
    verdicts = printed(cells("publish_and_verify"))
    assert "Every figure holds" in verdicts and "FAILS card" in verdicts and "holds: False" in verdicts
    assert printed(cells("compare_methods")).count("adjusted p ") == 3


# ---- as they run ----


def run(name, folder, parameters="", **environment):
    """Executes a notebook in small, in a kernel with this environment; returns its cells."""
    for package in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs nbclient and ipykernel: pip install nbclient ipykernel")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    first = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(f"{SMALL[name]}\n{parameters}"))
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}})
    # Raises for a cell with an error.
    client.execute(env={**os.environ, **environment})
    return notebook.cells


@pytest.mark.slow
def test_first_robust_fine_tuning(tmp_path):
    found = run("first_robust_fine_tuning", tmp_path)
    assert "AutoAttack (standard)" in printed(found) and "torch.Size([1, 10])" in printed(found)
    assert sum("image/png" in output.get("data", {}) for output in outputs(found)) == 2
    assert (tmp_path / "digits-robust" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_publishing_to_a_folder(tmp_path):
    found = printed(run("publish_and_verify", tmp_path))
    assert "Every figure holds" in found and "FAILS card" in found and "holds: False" in found
    assert (tmp_path / "digits-robust" / "README.md").is_file()


@pytest.mark.slow
def test_publishing_to_a_hub(tmp_path):
    """To a server that speaks the Hub's language, by the same cells."""
    with hub() as server:
        name = 'REPOSITORY = "alice/digits-robust"'
        found = printed(run("publish_and_verify", tmp_path, name, **server.env(token="hf_alice")))
        assert "Every figure holds" in found and "holds: False" in found
        assert "adapter_model.safetensors" in server.store.files("alice/digits-robust")


@pytest.mark.slow
def test_compare_methods(tmp_path):
    found = run("compare_methods", tmp_path)
    # Of three objectives two are robust: one comparison.
    assert printed(found).count("adjusted p ") == 1
    assert sum("image/png" in output.get("data", {}) for output in outputs(found)) == 1
