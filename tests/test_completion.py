"""Completion in shells: the scripts, used by the shells themselves."""

import shutil
import subprocess

import pytest

from autolora_hf.cli import COMMANDS, main
from autolora_hf.cli import completion as completion_module


pytest.importorskip("shtab", reason='needs shtab: pip install "autolora-hf[completion]"')

# Each prints what a shell offers for the last word of a line; the script of the shell is the first argument.
ASK = {
    # Calls the function that bash would call, with the words of the line so far.
    "bash": """
source "$1"
read -r -a COMP_WORDS <<< "$2"
[[ $2 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_autolora
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "fish": """
source $argv[1]
complete --do-complete $argv[2] | string split --fields 1 \\t | string trim --right --chars /
""",
    # Completion needs a terminal: an interactive shell has one, and prints each match that it is given.
    "zsh": """
zmodload zsh/zpty
zpty shell zsh -f -i
ask() { zpty -w shell $1 }
ask "PS1=; LISTMAX=10000; autoload -Uz compinit; compinit -u -D; source ${(q)1}; compdef _shtab_autolora autolora"
ask 'compadd() { local -a _m; builtin compadd -O _m "$@"; print -rl -- "<"${^_m}">"; builtin compadd "$@" }'
# Keys before the line editor has the terminal would be the terminal's own. What is typed is shown too, and must not be
# taken for the answer.
ask "zle-line-init() { print 'READ''Y' }; zle -N zle-line-init"
zpty -m -r shell _ '*READY*'
zpty -w -n shell "$2"$'\\t\\C-u'
ask exit
while zpty -r shell line; do print -r -- $line; done | grep -ao '<[^<>]*>' | tr -d '<>'
""",
}
START = {"bash": ["bash", "--norc", "-c"], "fish": ["fish", "--no-config", "-c"], "zsh": ["zsh", "-f", "-c"]}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion_module.SHELLS:
        (folder / shell).write_text(completion_module.completion_script(shell, COMMANDS))
    return folder


@pytest.fixture(params=completion_module.SHELLS)
def complete(scripts, tmp_path, monkeypatch, request):
    """What a shell offers for the last word of a line, in a folder with a few files."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "birds-robust").mkdir()
    (tmp_path / "birds.json").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # fish keeps files there

    def ask(*words):
        line = " ".join(["autolora", *words])
        # fish takes the first argument after the commands as the first of `argv`, the others as their name.
        name = [] if shell == "fish" else [shell]
        command = [*START[shell], ASK[shell], *name, str(scripts / shell), line]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=tmp_path, timeout=60)
        # bash's `compopt` complains where nothing is typed.
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
        (["demo", "--natural", "birds"], {"birds-robust", "birds.json"}),
        (["demo", "--examples", "birds"], {"birds-robust"}),
        (["demo", "--space", "birds"], {"birds-robust"}),
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
