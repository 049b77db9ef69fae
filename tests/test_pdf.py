"""PDFs of findings: the command prints pages, each whole, and says in a sentence what is missing."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def book(tmp_path):
    folder = tmp_path / "_build/html/book/findings"
    folder.mkdir(parents=True)
    for name in ("01_first", "02_second"):
        (folder / f"{name}.html").write_text(f"<title>{name}</title><h1>{name}</h1>")
    return tmp_path


def printed(book, *names, **more):
    command = [sys.executable, "-m", "workflow.pdf", *names]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(command, cwd=book, env=env, capture_output=True, text=True)


def test_every_finding_is_printed_or_those_that_are_named(book, browser):
    assert printed(book, "02_second").returncode == 0
    assert [path.name for path in (book / "_build/pdf").iterdir()] == ["02_second.pdf"]
    done = printed(book)
    assert done.returncode == 0 and "2 files are in _build/pdf." in done.stdout
    made = sorted((book / "_build/pdf").iterdir())
    assert [path.name for path in made] == ["01_first.pdf", "02_second.pdf"]
    assert all(path.read_bytes().startswith(b"%PDF-") for path in made)


def test_without_a_browser_the_command_says_what_to_install(book):
    done = printed(book, PATH=str(book))
    assert done.returncode == 1 and "No browser prints here: install chromium" in done.stderr
    assert "Traceback" not in done.stderr and not (book / "_build/pdf").exists()
