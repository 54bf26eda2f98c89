"""The demo's page as a visitor uses it, in a real browser without a screen."""

import shutil

import numpy as np
import pytest
from PIL import Image

from autolora_hf.demo.models import NATURAL_NAME, ROBUST_NAME, ROUTE_NAME


playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# An attack takes a second; the time is for machines that do much else.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[1280, 400])
def page(browser, served, request):
    """The page, wide and narrow; afterwards nothing may have gone wrong in it or left this machine."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    context.set_default_timeout(PATIENCE)
    page, wrong = context.new_page(), []
    # Gradio itself warns when it closes the stream of an upload's progress.
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda asked: wrong.append(f"{asked.url}: {asked.failure}"))
    hosts = (served, "data:", "blob:")
    page.on("request", lambda asked: None if asked.url.startswith(hosts) else wrong.append(asked.url))
    page.goto(served)
    _finished(page, 0.1)
    yield page
    context.close()
    # Streams of events that the page itself ends are no failures.
    assert [line for line in wrong if "ERR_ABORTED" not in line] == []


def _finished(page, eps):
    """Waits for the chart and the table of an attack with this radius."""
    page.wait_for_function(
        """eps => {
            const chosen = document.querySelector(".al-row-chosen th");
            return chosen && parseFloat(chosen.innerText) === eps && !document.querySelector(".al-wait");
        }""",
        arg=eps,
    )


def _answers(page):
    """Name of each model to its answers to the clean and the adversarial image."""
    cards = page.locator(".al-card").all()
    return {
        card.get_attribute("data-model"): [b.inner_text() for b in card.locator("figcaption .al-answer b").all()]
        for card in cards
    }


def _move(page, key, eps):
    page.get_by_role("slider").focus()
    page.keyboard.press(key)
    _finished(page, eps)


def test_visitor_uploads_moves_the_slider_and_attacks(page, tmp_path):
    # A bright square on black is no digit, but an image.
    array = np.zeros((60, 60, 3), np.uint8)
    array[10:50, 22:38] = 255
    Image.fromarray(array).save(tmp_path / "one.png")
    before = page.locator(".al-card img").first.get_attribute("src")
    page.set_input_files("input[type=file]", tmp_path / "one.png")
    page.wait_for_function("src => document.querySelector('.al-card img')?.src !== src", arg=before)
    _finished(page, 0.1)

    _move(page, "Home", 0)
    answers = _answers(page)
    assert list(answers) == [NATURAL_NAME, ROBUST_NAME]
    assert all(clean == adversarial for clean, adversarial in answers.values())
    assert page.get_by_text("no attack", exact=True).count() >= 2

    _move(page, "End", 0.3)
    page.get_by_role("button", name="Attack").click()
    _finished(page, 0.3)
    changed = _answers(page)
    for name, (clean, adversarial) in changed.items():
        assert clean == answers[name][0] and adversarial != clean
    assert page.locator(".al-verdict").all_inner_texts() == ["✕ fooled"] * 2
    assert page.locator(".al-transfer").count() == 2
    assert "0.3 = 76.5/255" in page.locator(".al-radius").inner_text()


def test_visitor_chooses_example_norm_and_route_by_keyboard(page):
    page.locator("#examples button").nth(7).focus()
    page.keyboard.press("Enter")
    page.get_by_text("This example is labelled 7.").wait_for()
    page.get_by_label("L2", exact=True).focus()
    page.keyboard.press("Space")
    _finished(page, 0.5)
    page.get_by_label(ROUTE_NAME, exact=True).focus()
    page.keyboard.press("Space")
    page.wait_for_function("name => document.querySelector('.al-card')?.dataset.model === name", arg=ROUTE_NAME)
    _finished(page, 0.5)
    assert _answers(page)[ROBUST_NAME][0] == "7"
    # Nothing sticks out to the right.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_bad_file_is_answered_in_the_page(page, tmp_path):
    (tmp_path / "bad.png").write_text("hello, I am no image")
    page.set_input_files("input[type=file]", tmp_path / "bad.png")
    page.get_by_role("alert").get_by_text("no image of a known format").wait_for()
    assert page.locator(".al-card").count() == 0
    page.locator("#examples button").nth(3).click()
    page.get_by_text("This example is labelled 3.").wait_for()
    _finished(page, 0.1)
    assert page.locator(".al-error").count() == 0
