"""Source archive and wheel: what is in them, and that the wheel works in an environment of its own."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import autolora_hf


ROOT = Path(__file__).parents[1]
# Files of the package that are no modules.
DATA = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "autolora_hf").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
}
MODULES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "autolora_hf").rglob("*.py")}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


def run(*command, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is made of it, from a copy of what is in the checkout."""
    for package, least in (("build", 1), ("setuptools", 77)):
        try:
            found = int(version(package).split(".")[0])
        except PackageNotFoundError:
            found = 0
        if found < least:
            # Not in an isolated environment of `build`, which would be filled from the network.
            pytest.skip(f'packaging is tested with {package} {least} or later: pip install "{package}>={least}"')
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    ignored = shutil.ignore_patterns(
        ".git", "__pycache__", "*.egg-info", "build", "dist", ".venv", ".*_cache", "autolora-*"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), cwd=copy)
    (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return source, wheel


def test_what_is_in_the_wheel(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {entry.filename for entry in wheel.infolist() if not entry.is_dir()}
        info = f"autolora_hf-{autolora_hf.__version__}.dist-info"
        metadata = email.message_from_string(wheel.read(f"{info}/METADATA").decode())
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        weights = wheel.read("autolora_hf/assets/quickstart/model.safetensors")
    assert weights == (ROOT / "autolora_hf/assets/quickstart/model.safetensors").read_bytes()
    assert "autolora_hf/py.typed" in DATA, "the comparison below would hold without it"
    assert {name for name in names if not name.startswith(info)} == MODULES | DATA
    assert archives[1].name == f"autolora_hf-{autolora_hf.__version__}-py3-none-any.whl"
    assert metadata["Version"] == autolora_hf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# autolora_hf")
    assert "autolora = autolora_hf.cli:main" in entry_points
    assert archives[1].stat().st_size < 4_000_000


def test_what_is_in_the_source_archive(archives):
    with tarfile.open(archives[0]) as source:
        members = source.getmembers()
    root = f"autolora_hf-{autolora_hf.__version__}/"
    names = {member.name.removeprefix(root) for member in members if member.isfile()}
    assert MODULES | DATA | {"README.md", "LICENSE", "pyproject.toml", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "docs", "scripts", "model_cards", ".git")]
    # setup.cfg: archives do not tell who built them.
    assert {(member.uname, member.gname) for member in members} == {("root", "root")}
    assert archives[0].stat().st_size < 4_000_000


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The folder of commands of a fresh environment that has the wheel, and sees this one's other packages."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(environment), cwd=environment)
    python = environment / "bin" / "python"
    run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(archives[1]), cwd=environment)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others))
    return environment / "bin"


def test_the_installed_package_is_the_one_that_runs(installed, tmp_path):
    assert run(str(installed / "autolora"), "--version", cwd=tmp_path) == f"autolora_hf {autolora_hf.__version__}\n"
    where = run(str(installed / "python"), "-c", "import autolora_hf; print(autolora_hf.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_the_quickstart_runs_away_from_the_checkout(installed, tmp_path):
    options = ["--epochs", "1", "--train-images", "100", "--test-images", "10", "--output-dir", "out"]
    output = run(str(installed / "autolora"), "quickstart", *options, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert "AutoLoRa (this model)" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    record = json.loads((tmp_path / "out" / "autolora_config.json").read_text())
    assert record["results"][0]["versions"]["autolora_hf"] == autolora_hf.__version__
