"""What a type checker sees of the public API."""

import re
import sys
from pathlib import Path

import pytest


TYPING = Path(__file__).parent / "typing"
ROOT = TYPING.parents[1]


def checked(path: Path, cache: Path) -> list[str]:
    """What mypy in its strict mode says of a file of a user's, who has no configuration for it."""
    api = pytest.importorskip("mypy.api", reason="type checking needs mypy: pip install mypy")
    options = ["--strict", "--config-file=", "--no-error-summary", "--hide-error-context", "--no-color-output"]
    options += [f"--python-executable={sys.executable}", f"--cache-dir={cache}"]
    # Errors inside of packages are not a user's; those that this package has, `mypy` in the root of the project finds.
    options += ["--follow-imports=silent"]
    out, err, status = api.run([*options, str(path)])
    assert status in (0, 1), err
    return out.splitlines()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.slow
@pytest.mark.xdist_group("mypy")
def test_the_public_api_as_users_see_it(cache, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert checked(TYPING / "consumer.py", cache) == []


@pytest.mark.slow
@pytest.mark.xdist_group("mypy")
def test_mistakes_of_users_are_seen(cache, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = (TYPING / "misuse.py").read_text().splitlines()
    expected = [f"{number}: {line.split('# E: ')[1]}" for number, line in enumerate(lines, 1) if "# E: " in line]
    found = [re.match(r".*?:(\d+): error: .*\[([a-z-]+)\]$", line) for line in checked(TYPING / "misuse.py", cache)]
    assert [f"{match[1]}: {match[2]}" for match in found if match] == expected


def test_every_public_name_is_there_for_checkers_and_when_it_is_used():
    import autolora_hf

    source = (ROOT / "autolora_hf" / "__init__.py").read_text()
    seen = re.findall(r"^    from \.[\w.]+ import (.+)$", source, re.M)
    names = {name.strip() for line in seen for name in line.split(",")}
    assert names == set(autolora_hf.__all__) == set(autolora_hf._MODULES)
    for name in names:
        assert getattr(autolora_hf, name).__module__.startswith("autolora_hf.")
    assert (ROOT / "autolora_hf" / "py.typed").is_file()
