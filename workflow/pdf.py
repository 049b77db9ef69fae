"""PDFs of the findings, as the browser prints the pages of the book.

    python -m workflow.pdf 02_cleanup 07_illusion

Without names, of all. They come to _build/pdf. It takes Chromium or Chrome on this machine.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from nb_utils.text import print_anything, visible

BUILT = Path("_build/html/book/findings")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FOOT = '<p style="font-size: 8px; margin: auto"><span class="pageNumber"></span> / <span class="totalPages"></span></p>'


def pages(names: list[str], built: Path = BUILT) -> list[Path]:
    """Return the built pages of findings, of all where none is named; exit in one sentence where there is none."""
    there = {page.stem: page for page in sorted(built.glob("[0-9]*.html"))}
    if not there:
        sys.exit("There is no book yet: run make book first.")
    if unknown := [name for name in names if name not in there]:
        sys.exit(f"There is no finding {visible(unknown[0])}: the book has {', '.join(there)}.")
    return [there[name] for name in names or there]


def write(wanted: list[Path], folder: Path) -> None:
    """Print pages to PDFs of the same names, each whole or not at all; exit where there is no browser."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        sys.exit(f"No browser prints here: install {PROGRAMS[0]} ({', '.join(PROGRAMS[1:])} will do too).")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # to whom Chromium's sandbox is refused
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if root else [])
        tab = browser.new_page()
        for page in tqdm(wanted, unit="page"):
            tab.goto(page.resolve().as_uri(), timeout=120_000)
            tab.wait_for_function(
                "document.querySelectorAll('.math').length <= document.querySelectorAll('mjx-container').length")
            part = folder / f".{page.stem}.part"
            tab.pdf(path=part, format="A4", display_header_footer=True, header_template="<span></span>",
                    footer_template=FOOT, margin=dict.fromkeys(("top", "bottom", "left", "right"), "16mm"))
            part.replace(folder / f"{page.stem}.pdf")
        browser.close()


def main() -> None:
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="findings, such as 02_cleanup; none: all")
    wanted = pages(parser.parse_args().names)
    folder = BUILT.parents[2] / "pdf"
    write(wanted, folder)
    print(f"{len(wanted)} files are in {folder}.")


if __name__ == "__main__":
    main()
