"""Fixtures that several files of tests share: the tiny model, the built book and a browser."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from workflow import pdf

ROOT = Path(__file__).resolve().parents[1]
# What `make test` says to its commands is not for the calls of make, the workflow and Python that are tested here.
OF_MAKE = re.compile(r"MAKE\w*|MFLAGS|BOOK_(TASKS|MODEL|SAE_SET|EXPERIMENTS|ONLY|SINCE)|PYTHONUTF8|PYTHONIOENCODING")
for name in filter(OF_MAKE.fullmatch, list(os.environ)):
    del os.environ[name]
PARTS = (
    "_config.yml", "_toc.yml", "book", "nb_utils", "results/tables", "results/versions", "data", "saes", "workflow",
)  # fmt: skip
LONG = ("test_book", "test_explore", "test_workflow", "test_notebooks", "test_models")
RUN = "results/runs/02_cleanup/gemma-3-270m"


def pytest_collection_modifyitems(items):
    """Begin with the files that take minutes: where several processes test, none is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_xdist_make_scheduler(config, log):
    """Test every file in one process, and in the same one all that reads the built book: it is built once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return super()._split_scope(nodeid).replace("test_explore", "test_book")

    return Scheduling(config, log)


def stub(path, title):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {title}")]), path)


def export_code():
    """Return the code that the page shows for using an exported vector without ours."""
    page = nbformat.read(ROOT / "book/explore.ipynb", as_version=4)
    source = next(cell.source for cell in page.cells if cell.id == "export-code")
    return source.removeprefix("```python\n").removesuffix("\n```")


def on_tiny(path):
    """Have the page of the first ten minutes run on the tiny model: on its own it takes a minute."""
    page = nbformat.read(path, as_version=4)
    parameters = next(cell for cell in page.cells if cell.id == "parameters")
    parameters.source += '\nmodel_name, layer, others = "tiny", 3, (2,)'
    nbformat.write(page, path)


@pytest.fixture(scope="session")
def tiny():
    """Load the tiny random model: nothing may change it."""
    from nb_utils import models

    return models.load("tiny")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Build a copy of the book, with one finished run, one failed and one killed; return the HTML folder."""
    home = tmp_path_factory.mktemp("book")
    for part in PARTS:
        if (ROOT / part).is_dir():
            (home / part).parent.mkdir(parents=True, exist_ok=True)
            (home / part).symlink_to(ROOT / part) if part == "saes" else shutil.copytree(ROOT / part, home / part)
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, home / part)
    on_tiny(home / "book/start.ipynb")
    stub(home / RUN / "antonyms.ipynb", "Cleanup: antonyms")
    stub(home / RUN / "en_es.failed.ipynb", "Cleanup, failed")
    stub(home / RUN / ".en_it.ipynb.part/en_it.ipynb", "Cleanup, killed")
    inside = {"cwd": home, "env": {**os.environ, "PYTHONPATH": str(home)}}
    subprocess.run([sys.executable, "-m", "workflow.feature_pages", "--limit", "2"], check=True, **inside)
    subprocess.run([sys.executable, "-m", "workflow.contents", "_build/_toc.yml"], check=True, **inside)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", home, "--toc", home / "_build/_toc.yml"]
    command += ["--all", "-W", "-n", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, **inside)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert done.returncode == 0, said[-4000:]
    return home / "_build/html"


@pytest.fixture(scope="session")
def pages(built):
    return [path for path in sorted(built.rglob("*.html")) if "_static" not in path.parts]


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, pdf.PROGRAMS)), None)
    if program is None:
        pytest.skip("no chromium on this machine: install one to check the pages in a browser")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()
