"""The documentation: every block runs or says why not, every name, link and option exists, and the site is built.

`docs_blocks.py` has the convention for blocks, `docs_world.py` what is substituted where they run.
"""

import html.parser
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import hub_server
import pytest
from script_modules import SCRIPTS, load


pytest.importorskip("sybil", reason='needs sybil: pip install "autolora-hf[test]"')
pytest.importorskip("markdown_it", reason='needs markdown-it-py: pip install "autolora-hf[test]"')

from docs_blocks import GIVEN, PAGES, ROOT, blocks, commands, count_by_markdown, problem_of


NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
DOCS = ROOT / "docs"
SUB_PACKAGES = "attacks data evaluation initializers layers objectives postprocessing schedules training".split()
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


# ---- blocks ----


@every_page
def test_every_block_runs_or_says_why_not(page):
    found = blocks(page)
    fenced, indented = count_by_markdown(page)
    assert indented == 0, "indented code blocks cannot be marked and are not run: fence them"
    assert len(found) == fenced
    silent = [f"{b.where}: a {b.language or 'plain'} block" for b in found if not b.runs and b.reason is None]
    assert not silent, f"neither run nor marked with <!-- not run: reason -->: {silent}"
    assert all(len(block.reason) > 4 for block in found if block.reason is not None)
    assert len([b for b in found if b.runs]) + len([b for b in found if b.reason is not None]) == fenced


@every_page
def test_commands_have_the_options_that_pages_give_them(page):
    """Also of those that are not run; and what runs is a command of the package."""
    problems = []
    for block in blocks(page):
        if block.language != "bash":
            continue
        for words in commands(block.source):
            problem = problem_of(words)
            if problem is None and block.runs and words[0] != "autolora":
                problem = "only `autolora` commands run; mark the block"
            if problem:
                problems.append(f"{block.where}: {' '.join(words)}: {problem}")
    assert not problems, "\n".join(problems)


@every_page
def test_python_blocks_are_python(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.source, block.where, "exec")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["autolora", "train", "--model", "x", "--train-data", "y", "--objectiv-kwargs", "z"], "--objectiv-kwargs"),
        (["autolora", "train", "...", "--eps", "8/0"], "--eps"),
        (["autolora", "trian"], "no command"),
        (["autolora", "evaluate", "x"], "--data"),
        (["torchrun", "--nproc-per-node", "8", "-m", "autolora_hf", "evaluate", "x", "--sampels", "1"], "--data"),
        (["python", "scripts/no_such_script.py"], "no script"),
        (["python", "scripts/kill_matrix.py", "--no-such-option"], "no option"),
        (["pip", "install", "autolora-hf[nothing]"], "no extra"),
        (["rm", "-r", "birds"], "no command that"),
    ],
)
def test_wrong_commands_are_found(words, problem):
    assert problem in problem_of(words)


def test_unmarked_and_indented_blocks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("docs_blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nx = 1\n```\n\n```json\n{}\n```\n\n<!-- not run: an excerpt -->\n```python\ny = 2\n"
        "```\n\n<!-- not run: too far -->\n\n```bash\nautolora --help\n```\n\n    autolora --help\n"
    )
    assert [(b.line, b.runs, b.reason) for b in blocks(page)] == [
        (3, True, None),
        (7, False, None),
        (12, False, "an excerpt"),
        (18, True, None),
    ]
    assert count_by_markdown(page) == (4, 1)


# ---- names and links ----


@pytest.fixture(scope="module")
def package():
    """The package as griffe reads it, with the extension that the site has."""
    griffe = pytest.importorskip("griffe", reason='needs griffe: pip install "autolora-hf[docs]"')
    extension = load("docstrings", SCRIPTS / "docs_site").Docstrings()
    loaded = griffe.load(
        "autolora_hf", search_paths=[str(ROOT)], extensions=griffe.load_extensions(extension), resolve_aliases=False
    )
    return loaded, extension


def test_references_in_docstrings_lead_somewhere(package):
    _, extension = package
    assert extension.references > 200
    assert extension.unresolved == []


def test_documented_arguments_exist(package):
    """Where all of them are known: a class may have fields of a class elsewhere, and a function further arguments."""
    griffe = importlib.import_module("griffe")
    wrong, checked = [], 0
    for item in sys.modules["docstrings"].everything(package[0]):
        if item.docstring is None or not (item.is_function or (item.is_class and not item.bases)):
            continue
        function = item if item.is_function else item.members.get("__init__")
        names = {parameter.name for parameter in getattr(function, "parameters", ())}
        if any(
            parameter.kind is griffe.ParameterKind.var_keyword for parameter in getattr(function, "parameters", ())
        ):
            continue
        names |= {name for name, member in item.members.items() if member.is_attribute}
        for section in griffe.parse_google(item.docstring, warnings=False):
            if section.kind is griffe.DocstringSectionKind.parameters:
                checked += len(section.value)
                wrong += [f"{item.path}: {entry.name}" for entry in section.value if entry.name not in names]
    assert checked > 400
    assert not wrong


def test_pages_show_every_public_name():
    import autolora_hf

    docstrings = load("docstrings", SCRIPTS / "docs_site")
    shown = set(docstrings.shown_names())
    wanted = {name: f"autolora_hf.{name}" for name in autolora_hf.__all__}
    for module in SUB_PACKAGES:
        for name in importlib.import_module(f"autolora_hf.{module}").__all__:
            wanted.setdefault(name, f"autolora_hf.{module}.{name}")
    last = {name.rpartition(".")[2] for name in shown}
    assert {name for name in wanted if name not in last} == set()
    # And nothing is shown that is not there.
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_docstrings_are_read_as_they_are_written():
    docstrings = load("docstrings", SCRIPTS / "docs_site")
    text = "Args:\n    a (`int`, *optional*), b (`str` or `list[str]`): Both,\n        on two lines.\n    **c: Rest."
    assert docstrings.plain_sections(text).split("\n")[1:] == [
        "    a (int, optional): Both,",
        "        on two lines.",
        "    b (str or list[str]): Both,",
        "        on two lines.",
        "    **c: Rest.",
    ]
    assert docstrings.plain_sections("Returns:\n    `Path`: Where.") == "Returns:\n    Path: Where."
    assert docstrings.plain_entries("device (*optional*): Where: there.") == ["device: Where: there."]


@every_page
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z][a-z+.-]*:", target) and not (page.parent / path).exists():
            missing.append(target)
    assert not missing


def test_links_to_files_outside_the_pages():
    links = load("links", SCRIPTS / "docs_site")
    text = "[`scripts/a.py`](../scripts/a.py), [card](../../model_cards/x.md#y), [results](results.md), ![p](../p.png)"
    assert links.rewrite(text, "results.md", None).startswith("`scripts/a.py`, ")
    assert "[results](results.md), ![p](../p.png)" in links.rewrite(text, "results.md", None)
    there = links.rewrite("[card](../../model_cards/x.md#y)", "guides/verify.md", "https://host/o/n/")
    assert there == "[card](https://host/o/n/blob/main/model_cards/x.md#y)"
    assert (
        links.rewrite("[x](https://a/b), [y](../methods.md)", "guides/a.md", None)
        == "[x](https://a/b), [y](../methods.md)"
    )


def test_the_reference_of_the_command_line_is_up_to_date():
    reference = load("cli_reference")
    there = {path.name: path.read_text() for path in (DOCS / "cli").glob("*.md")}
    assert there == reference.pages(), "run `python scripts/cli_reference.py`"


def test_the_reference_has_every_option():
    from autolora_hf.cli import COMMANDS

    reference = load("cli_reference")
    for command in COMMANDS:
        text = (DOCS / "cli" / f"{command}.md").read_text()
        for action in reference.parser_of(command)._actions:
            if action.help != "==SUPPRESS==" and action.dest != "help":
                assert f"`{reference._option(action) if action.option_strings else action.dest.upper()}" in text


# ---- the site ----


class Assets(html.parser.HTMLParser):
    """What a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        fetched = ("stylesheet", "preload", "preconnect", "icon", "dns-prefetch", "prefetch")
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found.append(values.get("src") or "")
        elif tag == "link" and any(kind in fetched for kind in (values.get("rel") or "").split()):
            self.found.append(values.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason='needs mkdocs-material: pip install "autolora-hf[docs]"')
    pytest.importorskip("mkdocstrings_handlers.python", reason='needs mkdocstrings: pip install "autolora-hf[docs]"')
    folder = tmp_path_factory.mktemp("site")
    # Without a way out, so that a build that fetches something fails.
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_and_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text())
        assert assets.found
        for target in assets.found:
            assert not re.match(r"(https?:)?//", target), f"{page.relative_to(site)} fetches {target}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet.name


@pytest.mark.slow
def test_references_are_links_on_the_site(site):
    text = (site / "api" / "evaluation" / "index.html").read_text()
    assert re.search(r'href="\.\./models/#autolora_hf\.(modeling\.)?AutoLoraModel"', text)
    for page in (site / "api").rglob("*.html"):
        content = page.read_text()
        assert "<autoref" not in content
        # A name in brackets that was not made a link.
        assert not re.search(r"\[<code>~?[A-Za-z_][\w.]*</code>\](?!\()", content), page
    inventory = (site / "objects.inv").read_bytes()
    assert inventory.startswith(b"# Sphinx inventory version 2")


# ---- running the blocks ----


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    """Runs a page in the one process that runs them all: libraries are imported once, and see the test server."""
    users = {**hub_server.USERS, "hf_org": "org"}
    with pytest.MonkeyPatch.context() as patch, hub_server.hub() as server:
        patch.setattr(hub_server, "USERS", users)
        environment = {**server.env(token="hf_org"), "MPLBACKEND": "Agg"}
        paths = [str(ROOT), str(Path(__file__).parent), environment["PYTHONPATH"]]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        said = tmp_path_factory.mktemp("docs") / "stderr.txt"
        with said.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("docs_world.py")), str(server.store.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
            )

        def ask(page: Path) -> list[dict]:
            timer = threading.Timer(1800, process.kill)
            timer.start()
            try:
                print(page, file=process.stdin, flush=True)
                answer = process.stdout.readline()
            finally:
                timer.cancel()
            assert answer, f"the process that runs the blocks ended: {said.read_text()[-3000:]}"
            return json.loads(answer)

        try:
            assert process.stdout.readline() == "ready\n", said.read_text()[-3000:]
            yield ask
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            process.stdout.close()


RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", RUNNING, ids=[page.relative_to(ROOT).as_posix() for page in RUNNING])
def test_blocks_run(run_page, page):
    results = run_page(page)
    errors = [f"{page.name}, line {result['line']}:\n{result['error']}" for result in results if result["error"]]
    assert not errors, "\n".join(errors)
    ran = [result["line"] for result in results if result["line"]]
    assert ran == [block.line for block in blocks(page) if block.runs]


def test_what_pages_start_from_is_known():
    source = (Path(__file__).parent / "docs_world.py").read_text()
    for page in PAGES:
        for name in (GIVEN.search(page.read_text()) or ["", ""])[1].split():
            assert f'"{name}": ' in source, f"{page.name}: <!-- given: {name} --> is not made by docs_world.py"


def test_contributing_says_what_is_substituted():
    text = (DOCS / "contributing.md").read_text()
    for name in ("tests/docs_world.py", "tests/hub_server.py", "<!-- not run:", "given:", "mkdocs build --strict"):
        assert name in text
