"""The pages: a strict build of the book, and what a browser makes of it."""

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT, RUN

from book.ledger import contents
from nb_utils.show import plots
from workflow import pdf, runs

WCAG_AA = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"],
    "preload": False,  # a page opened from disk may not fetch its own style sheets
}  # fmt: skip
# Docutils marks a bibliography with roles that readers know and axe finds dated.
CONTEXT = {"exclude": [[".citation-list"]]}
PICTURES = """() => [...document.querySelectorAll("main :is(img, svg, canvas, [role=img])")].filter((picture) =>
  !picture.closest("[aria-hidden=true], button, mjx-container")
  && !(picture.getAttribute("alt") ?? picture.getAttribute("aria-label") ?? "").trim()
).map((picture) => picture.outerHTML.slice(0, 200))"""
CUT_OFF = """() => [...document.querySelectorAll("main :is(table, figure, pre, .cell_output > *)")].filter((wide) => {
  const box = wide.getBoundingClientRect();
  if (!box.width || (box.left >= 0 && box.right <= window.innerWidth)) return false;
  for (let node = wide; node !== document.body; node = node.parentElement) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
    if (scrolls && node.getBoundingClientRect().right <= window.innerWidth) return false;
  }
  return true;
}).map((wide) => wide.outerHTML.slice(0, 200))"""


class Assets(HTMLParser):
    """Collect what a page loads by itself (a link that one clicks is not loaded)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.found.append(attributes.get("src") or "")
        elif tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev", "search", "index"):
            self.found.append(attributes.get("href") or "")


def assets(page):
    parser = Assets()
    parser.feed(page.read_text())
    return parser.found


def test_the_strict_build_has_every_page_of_the_contents(built):
    for page in re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text()):
        assert (built / f"{page}.html").exists() == (Path(page).name not in contents.left_out()), page


def test_a_finding_without_tables_is_left_out_and_one_with_tables_is_not(tmp_path, monkeypatch):
    assert "02_cleanup" not in contents.left_out() and contents.is_there("00_overview")
    monkeypatch.setenv("NB_TABLES", str(tmp_path))
    left = contents.left_out()
    assert "02_cleanup" in left and "13_ground_truth" in left and "00_overview" not in left
    kept = [Path(one["file"]).name for part in contents.listed()["parts"] for one in part["chapters"]]
    assert "00_overview" in kept and not set(kept) & set(left)


def test_every_feature_that_the_list_names_has_its_page(built):
    folder = built / "book/features"
    links = re.findall(r'<a href="(\d+_\d+\.html)">', (folder / "index.html").read_text())
    assert links and all((folder / link).exists() for link in links)


def test_only_finished_runs_become_pages(built):
    assert [path.name for path in (built / RUN).glob("*.html")] == ["antonyms.html"]


def test_pages_load_nothing_from_outside(pages):
    for page in pages:
        assert not [asset for asset in assets(page) if re.match(r"(https?:)?//", asset)], page


def test_everything_that_a_page_loads_is_in_the_book(pages):
    for page in pages:
        for asset in assets(page):
            if asset and not asset.startswith("data:"):
                assert (page.parent / asset.split("?")[0].split("#")[0]).exists(), f"{page}: {asset}"


def test_style_sheets_load_nothing_from_outside(built):
    for sheet in built.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_a_browser_opens_every_page_from_disk_without_complaint(browser, built, pages, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, complaints = context.new_page(), []
    inside = (built.resolve().as_uri(), "data:", "blob:")
    tab.on("request", lambda seen: seen.url.startswith(inside) or complaints.append(f"asked for {seen.url}"))
    # A request that we cut off by going on to the next page is nobody's fault.
    cut = "net::ERR_ABORTED"
    tab.on("requestfailed", lambda seen: seen.failure == cut or complaints.append(f"did not get {seen.url}"))
    tab.on("console", lambda seen: seen.type == "error" and complaints.append(seen.text))
    tab.on("pageerror", lambda seen: complaints.append(str(seen)))
    for page in pages:
        tab.goto(page.resolve().as_uri(), timeout=120_000)
        if 'http-equiv="Refresh"' in page.read_text():
            tab.wait_for_url("**/book/index.html", timeout=120_000)
        tab.wait_for_function(
            "document.querySelectorAll('.math').length <= document.querySelectorAll('mjx-container').length",
            timeout=120_000,
        )
        sideways = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert sideways <= 0, f"{page} scrolls sideways at {width} pixels"
        complaints += [f"{page} shows {picture} without words" for picture in tab.evaluate(PICTURES)]
        complaints += [f"{page} cuts off {wide} at {width} pixels" for wide in tab.evaluate(CUT_OFF)]
        for broken in Axe().run(tab, context=CONTEXT, options=WCAG_AA).response["violations"]:
            complaints += [f"{page}, {scheme}: {broken['help']}: {node['html'][:200]}" for node in broken["nodes"]]
    context.close()
    assert not complaints


def test_a_figure_says_its_values_to_mouse_and_keyboard(browser, built):
    tab = browser.new_page(reduced_motion="reduce")  # else the page may still be scrolling when the mouse comes
    tab.goto((built / "book/findings/02_cleanup.html").resolve().as_uri(), timeout=120_000)
    figure = tab.locator("figure.nb-values").first
    said, picture = figure.locator("output"), figure.locator("svg")
    figure.locator("details").evaluate("details => (details.open = true)")
    rows = [row.split("\t") for row in figure.locator("tbody tr").all_inner_texts()]
    picture.focus()
    tab.keyboard.press("ArrowRight")
    first = said.inner_text()
    tab.keyboard.press("ArrowRight")
    second = said.inner_text()
    assert first and second and first != second
    assert any(all(cell in first for cell in row) for row in rows)
    figure.locator(".nb-spot").nth(4).hover(force=True)
    assert said.inner_text() not in (first, second, "")
    tab.close()


PRINTED = """() => [...document.querySelectorAll("article :is(button, select, input, pre)")].filter((one) =>
  one.checkVisibility() && (one.tagName !== "PRE" || one.scrollWidth > one.clientWidth + 1)
).map((one) => one.outerHTML)"""


def test_a_finding_prints_without_buttons_and_cut_code(browser, built, tmp_path):
    page = pdf.pages(["02_cleanup"], built / "book/findings")
    tab = browser.new_page(viewport={"width": 700, "height": 1000})
    tab.goto(page[0].resolve().as_uri(), timeout=120_000)
    tab.emulate_media(media="print")
    assert not tab.evaluate(PRINTED)
    tab.close()


def test_pdfs_are_named_as_the_pages_and_a_wrong_name_is_one_sentence(built):
    assert {page.stem for page in pdf.pages([], built / "book/findings")} >= {"00_overview", "02_cleanup"}
    with pytest.raises(SystemExit, match="There is no finding 99_none: the book has 00_overview, "):
        pdf.pages(["99_none"], built / "book/findings")
    with pytest.raises(SystemExit, match="There is no book yet"):
        pdf.pages([], built / "book/nothing")


def test_a_reader_sorts_a_table_by_a_click_or_a_key_and_what_is_missing_stays_last(browser):
    frame = pd.DataFrame({"way": ["b", "c", "a"], "loss": [10.0, 9.0, None], "share": [-0.2, 0.1, 0.05]})
    shown = plots.table(frame, {"share": "{:.0%}"}, sortable=True).to_html()
    page = browser.new_page()
    page.set_content(f"<script>{(ROOT / 'book/_assets/sorting.js').read_text()}</script>{shown}")
    order = "() => [...document.querySelectorAll('tbody td:first-child')].map((cell) => cell.textContent).join('')"
    page.get_by_role("button", name="loss").click()
    assert page.evaluate(order) == "cba"
    page.get_by_role("button", name="loss").press("Enter")
    assert page.evaluate(order) == "bca"
    assert page.get_by_role("columnheader", name="loss").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="share").press(" ")
    assert page.evaluate(order) == "bac"
    page.get_by_role("button", name="way").click()
    assert page.evaluate(order) == "abc"
    page.close()


def test_the_first_ten_minutes_were_run_and_say_their_numbers(built):
    page = (built / "book/start.html").read_text()
    words = re.sub(r"\s+", " ", re.sub("<[^>]+>", "", unescape(page.partition("<article")[2])))
    assert len(re.findall(r'<img alt="[^"]{40,}"', page)) == 5, "a picture at each step"
    assert "Over all 24 held-out words, the answer costs the model" in words
    assert re.search(r"sum of these features costs \d+\.\d\d nats", words)
    assert "['README.md', 'card.json', 'control-vector.gguf', 'vector.safetensors']" in words


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Build the page of the first ten minutes, without running it, as it is where _config.yml names a repository."""
    home = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT / "book", home / "book", ignore=shutil.ignore_patterns("*.ipynb", "*.md", "features"))
    shutil.copy(ROOT / "book/start.ipynb", home / "book")
    (home / "book/index.md").write_text("# Index\n\nHere.\n")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["execute"]["execute_notebooks"] = "off"
    config["sphinx"]["config"]["html_context"]["repository"] = "https://github.com/someone/a-book"
    (home / "_config.yml").write_text(yaml.safe_dump(config))
    contents = {"format": "jb-book", "root": "book/index", "chapters": [{"file": "book/start"}]}
    (home / "_toc.yml").write_text(yaml.safe_dump(contents))
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "--all", "-n", "--keep-going"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert (home / "_build/html/book/start.html").exists(), (done.stdout + done.stderr)[-3000:]
    return home / "_build/html/book/start.html"


def test_the_page_opens_in_colab_and_binder_where_the_settings_name_a_repository_and_nowhere_else(
    browser, built, published
):
    tab = browser.new_page()
    tab.goto((built / "book/start.html").resolve().as_uri())
    assert tab.get_by_role("heading", level=1, name="First ten minutes").is_visible()
    assert tab.get_by_role("link", name="Open in").count() == 0
    tab.goto(published.as_uri())
    for name, address in {
        "Colab": "https://colab.research.google.com/github/someone/a-book/blob/main/book/start.ipynb",
        "Binder": "https://mybinder.org/v2/gh/someone/a-book/main?urlpath=lab/tree/book/start.ipynb",
    }.items():
        link = tab.get_by_role("link", name=f"Open in {name}")
        assert link.is_visible() and link.get_attribute("href") == address
        assert link.bounding_box()["y"] < 500, "at the top of the page"
    broken = Axe().run(tab, context=".launch", options=WCAG_AA).response["violations"]
    tab.close()
    assert not broken


def test_a_page_that_is_fetched_alone_knows_the_repository_that_the_settings_name():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    context = config["sphinx"]["config"]["html_context"]
    assert runs.known_parameters(ROOT / "book/start.ipynb")["repository"] == context["repository"]


def test_binder_installs_what_make_installs():
    lines = (ROOT / "binder/requirements.txt").read_text().splitlines()
    assert lines == ["-r ../requirements.txt", "-c ../constraints.txt"]
    python = (ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-")
    assert python in re.findall(r'"(3\.\d+)"', (ROOT / ".github/workflows/ci.yml").read_text()), "tested there"
    script = ROOT / "binder/postBuild"
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!")
    for module in re.findall(r"-m (workflow\.\w+)", script.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
