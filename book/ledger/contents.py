"""Contents: which pages of the book there are tables for.

A finding reads the tables of its experiment. Until these have been made here, or came with the book, it has nothing to
say, so it is left out: the table of contents, the first page and the overview go by this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from nb_utils.record import sources, tables

TOC = tables.ROOT / "_toc.yml"


def is_there(stem: str) -> bool:
    """Say whether a finding can be shown: if its experiment, where it has one, left tables."""
    return sources.maker(stem) is None or bool(tables.names(stem))


def listed() -> dict:
    """Return the table of contents without the findings that are not there."""
    toc = yaml.safe_load(TOC.read_text(encoding="utf-8"))
    for part in toc["parts"]:
        part["chapters"] = [chapter for chapter in part["chapters"] if _kept(chapter)]
    return toc | {"parts": [part for part in toc["parts"] if part["chapters"]]}


def findings() -> Iterator[tuple[str, str, str]]:
    """Yield every finding that is there, with its short title and what it asks (both from its file beside this)."""
    for path in sorted(Path(__file__).parent.glob("[0-9]*.yml")):
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        if is_there(path.stem):
            yield path.stem, said["title"], said["asks"]


def in_words() -> str:
    """Return the findings as a list in Markdown, each linked from the first page."""
    return "\n".join(f"- [{title}](findings/{stem}.html): {asks}." for stem, title, asks in findings())


def left_out() -> list[str]:
    """Name the findings that wait for the tables of their experiment."""
    toc = yaml.safe_load(TOC.read_text(encoding="utf-8"))
    return [Path(one["file"]).name for part in toc["parts"] for one in part["chapters"] if not _kept(one)]


def _kept(chapter: dict) -> bool:
    path = Path(chapter.get("file", ""))
    return path.parent.name != "findings" or is_there(path.name)
