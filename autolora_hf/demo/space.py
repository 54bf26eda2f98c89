"""A folder that is a Space of the Hugging Face Hub as it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import tomllib
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from ..backbones import SHIPPED
from ..data import to_rgb
from ..download import commit_of
from ..quickstart import NATURAL_MODEL
from ..record import Record
from ..saving import FILES, RECORD, fetch
from .launch import import_gradio
from .models import EXAMPLES, Demo


PACKAGE = Path(__file__).parents[1]
_APP = '''"""The page of this Space; written by `autolora demo --space`."""

from pathlib import Path

import torch

from autolora_hf.demo import launch, open_demo


here = Path(__file__).parent
demo = open_demo(
    {model},
    natural={natural},
    examples={examples},
    steps={steps},
    seed={seed},
    device="cuda" if torch.cuda.is_available() else "cpu",
    title={title},{source}
)

if __name__ == "__main__":
    launch(demo)
'''


def write_space(
    demo: Demo,
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    natural: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Writes the folder of a Space that shows a demo; whole, or not at all.

    Saved models in folders are copied into it; those on the Hub are named with their commit. Where this package was
    not installed from a package index, it is copied too. No token is written: a private model on the Hub needs the
    secret HF_TOKEN of the Space.

    Args:
        demo (`Demo`): What [`open_demo`] opened from `model` and `natural`.
        model (`str`): Folder or Hub repository of the saved model.
        output (`str`): The folder to make; it must not exist yet, or be empty.
        natural (`str`, *optional*): As in [`open_demo`].
        revision (`str`, *optional*), token (*optional*): Of the Hub repository of the model.

    Raises:
        FileExistsError: If `output` has files.
        ValueError: If a model needs a folder of this machine that cannot be copied.
    """
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: name a new folder, or delete it.")
    if natural is None and (Path(model) / NATURAL_MODEL / RECORD).is_file():
        natural = Path(model) / NATURAL_MODEL
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        _write(demo, folder, model, natural, revision, token)
        folder.chmod(0o755)  # temporary folders are private
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return output


def _write(
    demo: Demo,
    folder: Path,
    model: str | os.PathLike,
    natural: str | os.PathLike | None,
    revision: str | None,
    token: str | bool | None,
) -> None:
    places = {"model": _placed(model, folder / "model", revision, token)}
    if natural is not None:
        places["natural"] = _placed(natural, folder / "natural_model", None, token)
    commit = places["model"][1]
    if demo.examples:
        for number, (name, picture) in enumerate(demo.examples):
            # By class, where the class is known.
            place = folder / EXAMPLES / (_file_name(name) if name in (demo.label_names or ()) else "")
            place.mkdir(parents=True, exist_ok=True)
            to_rgb(picture).save(place / f"{number:02d} {_file_name(name)}.png")
    (folder / "app.py").write_text(
        _APP.format(
            model=places["model"][0],
            natural=places["natural"][0] if natural is not None else None,
            examples=f'here / "{EXAMPLES}"' if demo.examples else None,
            steps=demo.steps,
            seed=demo.seed,
            title=repr(demo.title),
            source=f'\n    revision="{commit}",' if commit else "",
        )
    )
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()))
    if not _is_from_index():
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    hub = [str(name) for name in (model, natural) if name is not None and not Path(name).is_dir()]
    card = SpaceCardData(
        title=demo.title.rpartition("/")[2],
        emoji="🛡️",
        colorFrom="blue",
        colorTo="gray",
        sdk="gradio",
        sdk_version=import_gradio().__version__,
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        pinned=False,
        models=hub or None,
        tags=["adversarial-robustness", "autolora"],
    )
    content = f"---\n{card}\n---\n\n{_readme(demo)}"
    SpaceCard(content)
    (folder / "README.md").write_text(content)


def _placed(
    name: str | os.PathLike, place: Path, revision: str | None, token: str | bool | None
) -> tuple[str, str | None]:
    """Copies a model of a folder to `place`; how `app.py` names it, and its commit on the Hub."""
    path = Path(name)
    if not path.is_dir():
        try:
            directory, _ = fetch(name, revision=revision, token=token)
            return repr(str(name)), commit_of(directory)
        except FileNotFoundError:
            return repr(str(name)), None  # a checkpoint of timm or transformers
    files = sorted(file.name for file in path.iterdir() if file.name in ("config.json", "preprocessor_config.json"))
    files += [file.name for file in path.glob("model.safetensors")]
    if (path / RECORD).is_file():
        record = Record.read(path)
        base = record.backbone["name_or_path"]
        if record.mode == "adapter" and base not in SHIPPED and (base is None or Path(base).exists()):
            raise ValueError(
                f"{name} is an adapter of the backbone {base or 'that was made in memory'}, which a Space does not "
                "have. Publish the backbone and pass its Hub name when training, or save a model of mode 'full'."
            )
        files = [RECORD, *(file for file in FILES[record.mode] if (path / file).is_file())]
    if not files:
        raise ValueError(f"{name} holds no files of a model.")
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / file, place / file)
    return f'here / "{place.name}"', None


def _file_name(name: str) -> str:
    return re.sub(r"[^\w -]+", "_", name)[:60]


def _distribution() -> importlib.metadata.Distribution | None:
    """The installed distribution that this code runs from, if it is one."""
    try:
        found = importlib.metadata.distribution("autolora-hf")
    except importlib.metadata.PackageNotFoundError:
        return None
    place = Path(str(found.locate_file(PACKAGE.name)))
    return found if place.exists() and place.resolve() == PACKAGE.resolve() else None


def _is_from_index() -> bool:
    """Whether `pip install autolora-hf==VERSION` gives this code; a folder or a repository leaves a note (PEP 610)."""
    found = _distribution()
    return found is not None and found.read_text("direct_url.json") is None


def _requirements() -> list[str]:
    """What to install, in the versions that are installed here."""
    found = _distribution()
    if found is not None:
        needed = [line for line in found.requires or () if "extra ==" not in line]
    else:
        project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
        needed = project["dependencies"]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    # Without the label of a build, such as +cu130, which package indices do not have.
    lines = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in [*names, "gradio"]]
    return [f"autolora-hf=={found.version}", *lines] if found is not None and _is_from_index() else lines


def _readme(demo: Demo) -> str:
    return (
        f"# Attack {demo.title}\n\n"
        f"A page to attack an image classifier that was made for the threat model {demo.threat_model}, and to see "
        "its answers. It shows single attacks (PGD) and is no measurement of robust accuracy.\n\n"
        "Made with `autolora demo --space`. `python app.py` runs it anywhere, after "
        "`pip install -r requirements.txt`.\n"
    )
