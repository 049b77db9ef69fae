"""The ledger: what the post, the paper and we claim (the files beside this one), and what the tables say of it.

Claims and sentences stand there as data, the numbers that decide them in the modules of `book.ledger.numbers`. What the
verdicts would be had we chosen otherwise is a table of its own, CHOICES.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from pandas.io.formats.style import Styler

from book.ledger import claims, contents
from book.ledger.claims import Book, ClaimError
from book.ledger.numbers import (
    dictionaries,
    function_vectors,
    grown_vectors,
    heads_by_reward,
    hendel,
    in_context_vectors,
    instruct_vectors,
    labels,
    necessity,
    places,
    planted,
    post,
    real,
    shots,
    visual_task_vectors,
    which_vector,
)
from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.show import plots
from nb_utils.statistics import RELATIONS, Comparison

# Each registers its numbers; a new chapter is named here.
PARTS = (
    dictionaries, function_vectors, grown_vectors, heads_by_reward, hendel, in_context_vectors, instruct_vectors,
    labels, necessity, places, planted, post, real, shots, visual_task_vectors, which_vector,
)  # fmt: skip
FOLDER = tables.ROOT / "book/ledger"
# How a number in a unit is written.
UNITS = {
    "nats": "{:+.2f} nats", "features": "{:.1f} features", "share": "{:.0%}", "change of share": "{:+.1%}",
    "relative loss": "{:+.0%}", "log ratio": "{:+.2f}", "correlation": "{:+.2f}", "1 − cosine": "{:.1e}",
}  # fmt: skip
SIGNS = {"<": "<", "<=": "≤", ">": ">", ">=": "≥"}
SOURCES = ("post", "paper", "ours")
NOT_MEASURED = "not measured"
# The table of `otherwise`, and what it calls the choices that the pages are printed with.
CHOICES, PRINTED = "choices", "as the book chooses"

# Digits (not those inside a word such as L0), and the words for numbers that state a result.
NUMBER = re.compile(
    r"(?<![^\W_])\d+(?:[.,]\d+)*|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|sixteen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?|half|thirds?|quarters?"
    r"|fifths?|tenths?|twice|dozens?)\b",
    re.IGNORECASE,
)
# What is no prose: code, formulas, computed numbers, addresses of links, markup.
NO_PROSE = (
    (r"```\{\w+\}(.*?)```", r"\1"), (r"```.*?```|\$\$.*?\$\$", " "), (r"\{[\w:]+\}`[^`]*`", "□"),
    (r"`[^`]*`|\$[^$]*\$", " "), (r"\]\([^)]*\)", "]"), (r"<[^>]*>", " "), (r"\s+", " "),
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One entry of the ledger.

    ``holds``: the side of the bound that the number must be on, such as "< 0". ``number``: the function that computes
    it, if that is not called like the claim.
    """

    id: str
    page: str
    source: str
    claim: str
    decides: str
    unit: str
    holds: str
    number: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", self.number or self.id)

    @property
    def relation(self) -> str:
        return self.holds.split()[0]

    @property
    def bound(self) -> float:
        return float(self.holds.split()[1])

    def written(self, mean: float, low: float, high: float) -> str:
        """Write a number with its interval in the claim's unit."""
        mean, low, high = (UNITS[self.unit].format(part) for part in (mean, low, high))
        return f"{mean} [{low.split()[0]}, {high.split()[0]}]"


@dataclass(frozen=True)
class Row:
    """A claim with what the tables say: a number, or the sentence that says why there is none."""

    claim: Claim
    number: Comparison | None
    decides: str
    families: Comparison | None = None  # the same number, its interval over families of tasks

    @property
    def verdict(self) -> str:
        return self.number.judge(self.claim.relation, self.claim.bound) if self.number else NOT_MEASURED

    @property
    def on_side(self) -> str:
        if self.number is None:
            return "–"
        return f"{self.number.met(self.claim.relation, self.claim.bound)} of {self.number.tasks}"

    @property
    def asked(self) -> str:
        share = "%" in UNITS[self.claim.unit]
        return f"{SIGNS[self.claim.relation]} {self.claim.bound:{'.0%' if share else 'g'}}"

    def __str__(self) -> str:
        return "–" if self.number is None else self.claim.written(self.number.mean, self.number.low, self.number.high)

    @property
    def over_families(self) -> str:
        """The interval over families, as text; a dash where there are too few."""
        if self.families is None:
            return "–"
        written = self.claim.written(self.families.mean, self.families.low, self.families.high)
        return written[written.index("[") :]


def read(path: Path = FOLDER) -> dict:
    """Return what a file, or all files of a folder say: ``claims``, ``sentences`` and ``plain``, each one list."""
    files = sorted(path.glob("*.yml")) if path.is_dir() else [path]
    parts = [yaml.safe_load(file.read_text()) for file in files]
    kinds = ("claims", "sentences", "plain")
    return {kind: [entry for part in parts for entry in part.get(kind, [])] for kind in kinds}


def entries(path: Path = FOLDER) -> list[Claim]:
    """Return all claims in the order of the file.

    Raises ClaimError, naming the entry, if one is incomplete, twice there, or has no function in a module of `PARTS`.
    """
    found: dict[str, Claim] = {}
    for entry in read(path)["claims"]:
        try:
            claim = Claim(**entry)
        except TypeError as error:
            needs = ", ".join(Claim.__annotations__)
            raise ClaimError(f"The claim {entry.get('id')!r} needs {needs}: {error}.") from None
        if claim.id in found:
            raise ClaimError(f"The claim {claim.id!r} is there twice.")
        if claim.number not in claims.NUMBERS:
            raise ClaimError(f"The claim {claim.id!r} has no function {claim.number!r} in book/ledger/numbers.")
        if claim.source not in SOURCES or claim.unit not in UNITS or not _is_bound(claim.holds):
            raise ClaimError(
                f"The claim {claim.id!r} needs a source of {', '.join(SOURCES)}, a unit of {', '.join(UNITS)}, "
                "and a bound such as '< 0'."
            )
        found[claim.id] = claim
    return list(found.values())


def judged(page: str | None = None, book: Book | None = None, path: Path = FOLDER) -> dict[str, Row]:
    """Judge the claims of a page (None: of all pages), by id. A claim whose table is missing is not measured."""
    book = book or Book()
    return {claim.id: _judge(claim, book) for claim in entries(path) if page in (None, claim.page)}


def _judge(claim: Claim, book: Book) -> Row:
    try:
        number, decides = book.decide(claim.number), claim.decides.format_map(book)
        return Row(claim, number, decides, statistics.over_families(number.by_task, book.family))
    except (ClaimError, tables.TableError) as error:
        return Row(claim, None, str(error).replace(f"{tables.ROOT}/", ""))  # a page shows it


def table(judged: Mapping[str, Row], links: bool = False) -> Styler:
    """Show judged claims, each over what decides it; with ``links``, beside the page that says so instead."""
    lines = []
    for row in judged.values():
        claim = f"{escape(row.claim.claim)} ({row.claim.source})"
        if row.number is None or not links:
            claim = f"<b>{claim}</b><br>{escape(row.decides)}"
        line = {"claim": claim, "verdict": row.verdict, "our number [95 %]": _unbroken(row)}
        line |= {"asked": _unbroken(row.asked), "tasks": _unbroken(row.on_side)}
        if links:
            line["over families"] = _unbroken(row.over_families)
            line["page"] = f'<a href="{row.claim.page}.html">{row.claim.page[:2]}</a>'
        lines.append(line)
    styled = _wrapped(pd.DataFrame(lines), html=["claim", "page"])
    narrow = [{"selector": "td, th", "props": "font-size: 0.78rem; padding: 0.25rem 0.35rem"}]
    return styled.set_table_styles(narrow, overwrite=False) if links else styled  # two columns more


def _wrapped(frame: pd.DataFrame, html: Sequence[str] = ()) -> Styler:
    style = {"selector": "td", "props": "white-space: normal; vertical-align: top"}
    return plots.table(frame, html=html).set_table_styles([style], overwrite=False)


def _unbroken(text: object) -> str:
    """Keep a number with its unit and an interval on one line each."""
    return str(text).replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}[", " [")


# Other choices


def otherwise(book: Book | None = None, path: Path = FOLDER, only: Collection[str] | None = None) -> pd.DataFrame:
    """Judge every claim as the book chooses, and again under each of `claims.OTHERWISE` (or ``only`` these).

    Columns: claim (its id), choice, verdict, mean, low, high, met (tasks on the asked side), tasks.
    """
    book, lines = book or Book(), []
    choices = {PRINTED: {}, **claims.OTHERWISE}
    for choice in choices if only is None else only:
        for name, row in judged(book=book.otherwise(**choices[choice]), path=path).items():
            line = {"claim": name, "choice": choice, "verdict": row.verdict}
            if (found := row.number) is not None:
                met = found.met(row.claim.relation, row.claim.bound)
                line |= {"mean": found.mean, "low": found.low, "high": found.high, "met": met, "tasks": found.tasks}
            lines.append(line)
    return pd.DataFrame(lines).astype({"met": "Int64", "tasks": "Int64"})


def depending(found: pd.DataFrame, path: Path = FOLDER) -> pd.DataFrame:
    """Return the rows of `otherwise` whose verdict is not the printed one, with that and both numbers as text.

    Rows that are not measured are left out. Columns: claim (in words), printed, choice, verdict.
    """
    by_id = {claim.id: claim for claim in entries(path)}
    found = found[found["verdict"].ne(NOT_MEASURED) & found["claim"].isin(by_id)]
    says = [
        f"{row.verdict}, {by_id[row.claim].written(row.mean, row.low, row.high)}" for row in found.itertuples()
    ]
    found = found.assign(says=says)
    printed = found[found["choice"].eq(PRINTED)].set_index("claim")
    other = found[found["claim"].isin(printed.index) & found["verdict"].ne(found["claim"].map(printed["verdict"]))]
    return pd.DataFrame(
        {
            "claim": [by_id[name].claim for name in other["claim"]],
            "printed": other["claim"].map(printed["says"]), "choice": other["choice"], "verdict": other["says"],
        }
    )  # fmt: skip


def depending_table(changed: pd.DataFrame) -> Styler:
    """Show what `depending` returns."""
    shown = {
        "claim": changed["claim"], PRINTED: changed["printed"].map(_unbroken),
        "with another choice": changed["choice"], "then": changed["verdict"].map(_unbroken),
    }  # fmt: skip
    return _wrapped(pd.DataFrame(shown))


# Numbers in prose


def prose(page: str | Path) -> str:
    """Return the text of a page (a notebook, or Markdown) without code, formulas, markup and computed numbers."""
    path = tables.ROOT / page
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for pattern, put in NO_PROSE:
        text = re.sub(pattern, put, text, flags=re.DOTALL)
    return text


def typed(page: str | Path, path: Path = FOLDER) -> list[str]:
    """List the numbers that are typed on a page and that no entry of the file answers for, each with its context."""
    found, text = read(path), prose(page)
    said = [entry["says"] for entry in found["sentences"] if str(page) in pages(entry)]
    for phrase in sorted([*said, *found["plain"]], key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", "□", text)
    return [text[max(0, m.start() - 40) : m.end() + 30] for m in NUMBER.finditer(text)]


def unsupported(book: Book | None = None, path: Path = FOLDER) -> list[str]:
    """Check every listed sentence against the tables and settings; say of each that fails what it says and why.

    Pages that wait for their tables are left out, as they are of the book.
    """
    book, failed = book or Book(), []
    for entry in read(path)["sentences"]:
        if not any(contents.is_there(Path(page).stem) for page in pages(entry)):
            continue
        try:
            why = _unsupported(entry, book)
        except (ClaimError, tables.TableError) as error:
            why = str(error)
        if why:
            failed.append(f"{', '.join(pages(entry))} says {entry['says']!r}, but {why}")
    return failed


def pages(entry: Mapping) -> list[str]:
    """Return the pages that an entry of ``sentences`` is on."""
    return [entry["page"]] if isinstance(entry["page"], str) else entry["page"]


def _unsupported(entry: Mapping, book: Book) -> str | None:
    """Say why a sentence is not supported, or None."""
    if "cited" in entry:  # the number is someone else's
        return None
    if "setting" in entry:
        stem, _, name = entry["setting"].rpartition(".")
        used = [origin["parameters"].get(name) for origin in tables.origins(stem, book.model, book.folder)]
        if not used:
            return f"there are no tables of {stem}"
        return next((f"{entry['setting']} was {one}" for one in used if one != entry["is"]), None)
    if "constant" in entry:
        value = pkgutil.resolve_name(entry["constant"])
        return None if value == entry["is"] else f"{entry['constant']} is {value}"
    value = book.decide(entry["number"])
    relation, bound = entry["holds"].split()[0], float(entry["holds"].split()[1])
    if isinstance(value, Comparison):
        verdict = value.judge(relation, bound)
        return None if verdict == entry.get("verdict", "holds") else f"that {verdict}: {entry['number']} is {value}"
    return None if RELATIONS[relation](value, bound) else f"{entry['number']} is {value:g}"


def _is_bound(text: str) -> bool:
    return bool(re.fullmatch(r"(<|<=|>|>=) -?\d+(\.\d+)?", text))
