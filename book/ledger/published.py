"""Published: numbers of others (published.yml), ours beside them, and whether the two meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from pandas.io.formats.style import Styler

from book.ledger import ledger
from book.ledger.claims import NUMBERS, Book, ClaimError, relative
from nb_utils.record import tables
from nb_utils.show import plots
from nb_utils.statistics import Comparison, over_tasks

DATA = Path(__file__).with_name("published.yml")
REFERENCES = Path(__file__).parents[1] / "references.bib"
# What stands between a published number and our interval: it lies in it, or ours lies below or above.
MEETS, BELOW, ABOVE = "meets it", "ours is lower", "ours is higher"


@dataclass(frozen=True)
class Published:
    """One number of others: ``low`` to ``high``, which are alike where it is one; ``source``: a key of the references.
    """

    what: str
    source: str
    model: str
    low: float
    high: float
    unit: str
    ours: str

    @property
    def written(self) -> str:
        low, high = (ledger.UNITS[self.unit].format(bound) for bound in (self.low, self.high))
        return low if low == high else f"{low.split()[0]} to {high}"

    def status(self, found: Comparison | None) -> str:
        """Say whether our 95 % interval meets the published number or range."""
        if found is None:
            return ledger.NOT_MEASURED
        return BELOW if found.high < self.low else ABOVE if found.low > self.high else MEETS


def vector_changes(book: Book) -> Comparison:
    return over_tasks(relative(book.vector))


def cleaned_changes(book: Book) -> Comparison:
    return over_tasks(relative(book.cleaned))


def reconstruction_changes(book: Book) -> Comparison:
    return over_tasks(relative(book.best("reconstruct")))


def pursuit_changes(book: Book) -> Comparison:
    return over_tasks(relative(book.best("gradient_pursuit", k=20)))


def cleaning_wins(book: Book) -> Comparison:
    cleaned, added = (part.groupby("task")["loss"].mean() for part in (book.cleaned, book.vector))
    return over_tasks((cleaned < added).astype(float))


def cleaning_leaves(book: Book) -> Comparison:
    return over_tasks(book.cleaned.groupby("task")["l0"].mean())


FUNCTIONS = vector_changes, cleaned_changes, reconstruction_changes, pursuit_changes, cleaning_wins, cleaning_leaves
OWN: dict[str, Callable[[Book], Comparison]] = {one.__name__: one for one in FUNCTIONS}


def read(path: Path = DATA) -> list[Published]:
    """Return the published numbers in the order of the file.

    Raises ClaimError for one whose counterpart has no function, or whose unit is unknown.
    """
    found = [Published(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["published"]]
    for one in found:
        if one.ours not in OWN and one.ours not in NUMBERS:
            raise ClaimError(f"The published number {one.what!r} has no counterpart {one.ours!r}.")
        if one.unit not in ledger.UNITS:
            raise ClaimError(f"The published number {one.what!r} needs a unit of {', '.join(ledger.UNITS)}.")
    return found


def compared(book: Book | None = None) -> list[tuple[Published, Comparison | None]]:
    """Return every published number with ours; None where its table is missing."""
    book, found = book or Book(), []
    for one in read():
        try:
            found.append((one, (OWN.get(one.ours) or NUMBERS[one.ours])(book)))
        except (ClaimError, tables.TableError):
            found.append((one, None))
    return found


def cited(path: Path = REFERENCES) -> dict[str, str]:
    """Return how a table names every reference: {key: "Hendel et al. 2023"}."""
    found = {}
    text = path.read_text(encoding="utf-8")
    for key, entry in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        author, year = (re.search(rf"^ +{name} = \{{(.+)\}},$", entry, re.MULTILINE)[1] for name in ("author", "year"))
        first, *others = author.split(" and ")
        found[key] = f"{first.split(',')[0].strip('{}')}{' et al.' if others else ''} {year}"
    return found


def table(found: list[tuple[Published, Comparison | None]]) -> Styler:
    """Show published numbers, ours and the status."""
    lines, names = [], cited()
    for one, ours in found:
        told, tasks = "–", "–"
        if ours is not None:
            mean, low, high = (ledger.UNITS[one.unit].format(part) for part in (ours.mean, ours.low, ours.high))
            told, tasks = f"{mean} [{low.split()[0]}, {high.split()[0]}]", str(ours.tasks)
        lines.append({
            "what": one.what, "by": f"{names[one.source]}, {one.model}", "published": one.written,
            "ours [95 %]": told, "tasks": tasks, "status": one.status(ours),
        })  # fmt: skip
    style = {"selector": "td", "props": "white-space: normal; vertical-align: top"}
    return plots.table(pd.DataFrame(lines)).set_table_styles([style], overwrite=False)
