"""The page of `icl report` in a real browser: headless Chromium, offline, at several widths, in light mode and in dark mode.

Run these tests with `pytest -m slow tests/report/test_report_browser.py`. They need Chromium (Debian: `apt-get install chromium`) and the
Python package playwright from the extra `dev`. They do not use the browser that playwright can download.
"""

import shutil
from pathlib import Path

import pytest
from tiny_runs import TINY, as_arguments, change

from icl.cli import main
from icl.runs.folder import RunFolder

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome")
MAX_NARROW = 360


@pytest.fixture(scope="module")
def browser():
    """Return a browser. Playwright is imported here, because its import would slow the start of all tests."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(NAMES)} on PATH (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that containers do not give; the page is our own file.
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Return three pages: of a run that was trained, evaluated and analysed, of a run that has hardly begun, and of both."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("AWS_BUCKET_NAME", raising=False)
        for key, value in {"LOCAL_ROOT": str(root), "WANDB_MODE": "disabled", "DEVICE": "cpu"}.items():
            environment.setenv(key, value)
        run = root / "tiny"
        assert main(["train", *as_arguments(change(TINY, evaluation={"num_prompts": 8}))]) == 0
        assert main(["evaluate", str(run)]) == 0
        assert main(["analyse", str(run), "--what", "embeddings"]) == 0
        other = RunFolder(root / ("a-name-that-is-longer-than-a-narrow-screen-is-wide," * 3))
        other.write_config(change(TINY, task={"num_tasks": 1}))
        other.status_file.write_text('{"state": "running", "step": 3, "max_steps": 60, "updated": 1}')
        other.metrics_file.write_text("step,train/loss\n10,2\n20,1.5\n")
        for path in (run, other.path, root):
            assert main(["report", str(path)]) == 0
    return {name: path / "report.html" for name, path in (("run", run), ("young", other.path), ("sweep", root))}


def open_page(browser, file: Path, *, width: int, scheme: str = "light"):
    """Open a page in a browser. Any message on its console, and any request other than that for the file itself, is an error."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []

    def answer(route) -> None:
        url = route.request.url
        if url != file.as_uri() and not url.startswith("data:image/png"):
            complaints.append(f"asked for {url}")
        route.continue_()

    page.route("**/*", answer)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
    page.goto(file.as_uri(), wait_until="load")
    page.wait_for_timeout(100)  # for what is said after loading
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert complaints == []
    return page


@pytest.mark.parametrize("width", [1280, 768, MAX_NARROW, 320])
def test_pages_show_their_figures_and_never_scroll_sideways(browser, pages, width):
    for file in pages.values():
        page = open_page(browser, file, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.scrollWidth") <= width
        images = page.locator("img").all()
        assert images
        for image in images:
            assert image.is_visible()
            box = image.bounding_box()
            assert box["width"] > 100
            assert box["height"] > 40
            natural = image.evaluate("one => [one.naturalWidth, one.naturalHeight, one.complete]")
            assert natural == [int(image.get_attribute("width")), int(image.get_attribute("height")), True]
            assert box["width"] / box["height"] == pytest.approx(natural[0] / natural[1], rel=0.02)
        page.close()


def test_what_is_wide_scrolls_in_its_own_box_and_by_keyboard(browser, pages):
    page = open_page(browser, pages["run"], width=MAX_NARROW)
    boxes = "[...document.querySelectorAll('.scroll')]"
    wide = page.evaluate(f"{boxes}.filter(box => box.scrollWidth > box.clientWidth).length")
    assert wide > 0
    assert page.evaluate(f"{boxes}.every(box => box.tabIndex === 0 && box.getAttribute('aria-label'))")
    page.evaluate(f"{boxes}.find(box => box.scrollWidth > box.clientWidth).focus()")
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # wait_for_function evaluates text within the page, which its policy forbids
        if page.evaluate(f"{boxes}.some(box => box.scrollLeft > 0)"):
            break
        page.wait_for_timeout(50)
    assert page.evaluate(f"{boxes}.some(box => box.scrollLeft > 0)")
    page.close()


def test_the_contents_lead_to_every_section(browser, pages):
    page = open_page(browser, pages["sweep"], width=1280)
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(f"[id='{link.get_attribute('href')[1:]}']")
        assert target.bounding_box()["y"] < 800
    page.close()


def test_the_page_is_dark_where_the_reader_likes_it_dark(browser, pages):
    colours = {}
    for scheme in ("light", "dark"):
        page = open_page(browser, pages["run"], width=1280, scheme=scheme)
        colours[scheme] = page.evaluate(
            "['color', 'backgroundColor'].map(key => getComputedStyle(document.body)[key].match(/\\d+/g).map(Number)[0])"
        )
        page.close()
    assert colours["light"][0] < 64 < 192 < colours["light"][1]
    assert colours["dark"][1] < 64 < 192 < colours["dark"][0]


@pytest.mark.parametrize(
    "fault",
    [
        "<img src='https://example.org/outside.png'>",
        "<img src='beside.png'>",
        "<script>console.log('said')</script>",
        "<script>throw new Error('thrown')</script>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><script>1</script>",
    ],
)
def test_a_page_with_a_fault_is_found_out(browser, tmp_path, fault):
    file = tmp_path / "page.html"
    file.write_text(f"<!DOCTYPE html><html><head><title>t</title>{fault}</head><body><p>text</p></body></html>")
    with pytest.raises(AssertionError):
        open_page(browser, file, width=800)
