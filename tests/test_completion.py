"""Completion in shells: the scripts, used by the shells themselves."""

import shutil
import subprocess

import pytest

from autolora_hf.cli import COMMANDS, main
from autolora_hf.cli import completion as completion_module


pytest.importorskip("shtab", reason='needs shtab: pip install "autolora-hf[completion]"')

# Calls the function that bash would call, with the words of the line so far.
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_autolora
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion_module.SHELLS:
        (folder / shell).write_text(completion_module.completion_script(shell, COMMANDS))
    return folder


@pytest.fixture
def complete(scripts, tmp_path):
    """What bash offers for the last word of a line, in a folder with a few files."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (tmp_path / "birds-robust").mkdir()
    (tmp_path / "birds.json").touch()

    def ask(*words):
        command = ["bash", "--norc", "-c", ASK, "bash", str(scripts / "bash"), "autolora", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        # `compopt` complains where nothing is typed.
        assert "syntax error" not in done.stderr
        return set(done.stdout.split())

    return ask


def test_commands(complete):
    assert complete("") >= set(COMMANDS)
    assert complete("ve") == {"verify"}
    assert complete("--print-completion", "z") == {"zsh"}


@pytest.mark.parametrize("command", COMMANDS)
def test_options(complete, command):
    assert {"--json", "--help"} <= complete(command, "--")


def test_options_of_train(complete):
    """Those that its help lists, in one spelling."""
    found = complete("train", "--")
    assert {"--objective", "--train-data", "--eps", "--report-to"} <= found
    assert not any("_" in option for option in found)
    assert "--adam-beta1" not in found  # of --help-all
    assert complete("train", "--num-train-ep") == {"--num-train-epochs"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluate", "--attack", ""], {"autoattack", "pgd"}),
        (["train", "--objective", "twins"], {"twins-at", "twins-trades"}),
        (["train", "--mode", ""], {"full", "adapter"}),
        (["train", "--report-to", "t"], {"trackio", "tensorboard"}),
        (["convert", "--kind", "m"], {"madry"}),
        # A folder of images, and files that are folders or not.
        (["evaluate", "--data", "birds"], {"birds-robust"}),
        (["train", "--output-dir", "birds"], {"birds-robust"}),
        (["evaluate", "birds"], {"birds-robust", "birds.json"}),
        (["evaluate", "birds-robust", "--output", "birds."], {"birds.json"}),
        (["push", "birds"], {"birds-robust"}),
    ],
)
def test_words(complete, words, expected):
    assert complete(*words) == expected


@pytest.mark.parametrize("shell", completion_module.SHELLS)
def test_shells_can_read_the_scripts(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in (scripts / shell).read_text()


def test_every_named_argument_exists():
    """None of the lists of files, folders and choices has a name that no command knows."""
    known = set()
    for command in COMMANDS:
        module = __import__(f"autolora_hf.cli.{command}", fromlist=["build_parser"])
        known |= {action.dest for action in module.build_parser()._actions}
    named = {*completion_module.FOLDERS, *completion_module.FILES, *completion_module._train_choices()}
    assert named <= known


def test_the_command(capsys, scripts):
    assert main(["--print-completion", "fish"]) == 0
    assert capsys.readouterr().out == (scripts / "fish").read_text() + "\n"
    for wrong in ([], ["cmd"], ["bash", "zsh"]):
        assert main(["--print-completion", *wrong]) == 2
        assert "one of bash, zsh, fish" in capsys.readouterr().err


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert 'pip install "autolora-hf[completion]"' in capsys.readouterr().err
