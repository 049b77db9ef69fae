"""Cards: what a page finds, as data that others can compute on, one JSON file a finding (`workflow.versions`).

Their form is SCHEMA, which stands beside them. A card has every claim of its page with the number of every task; that
of the overview has the certificates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from book.ledger import certificates, contents, ledger
from book.ledger.claims import Book
from nb_utils import statistics
from nb_utils.record import tables

SCHEMA = Path("book/_extra/card.schema.json")
FORM = 1  # of a card: another number, and what reads the one need not read the other
OVERVIEW = "00_overview"


def cards(book: Book, judged: Mapping[str, ledger.Row]) -> Iterator[dict]:
    """Yield the card of every finding that is there, as JSON can hold it; ``judged``: the claims of this book."""
    for page, title, asks in contents.findings():
        card = {
            "form": FORM, "page": page, "title": title, "asks": asks, "model": book.model, "level": statistics.LEVEL,
            "claims": [_claim(row) for row in judged.values() if row.claim.page == page],
        }  # fmt: skip
        yield card | ({"certificates": _certificates(book)} if page == OVERVIEW else {})


def _claim(row: ledger.Row) -> dict:
    claim, number = row.claim, row.number
    told = {"id": claim.id, "source": claim.source, "claim": claim.claim, "decides": row.decides, "unit": claim.unit}
    told |= {"relation": claim.relation, "bound": claim.bound, "verdict": row.verdict}
    if number is None:
        return told
    told |= {"mean": number.mean, "low": number.low, "high": number.high}
    return told | {"by_task": {str(task): float(value) for task, value in number.by_task.sort_index().items()}}


def _certificates(book: Book) -> list[dict]:
    ticks, found = certificates.given(book), []
    for one in certificates.CERTIFICATES:
        for method in certificates.VECTORS:
            part = statistics.rows(ticks, certificate=one.name, vector=method)
            tasks = [
                {"task": row.task, "verdict": row.verdict, **({"number": float(row.number)} if pd.notna(row.number)
                                                              else {"why": row.why})}
                for row in part.itertuples()
            ]  # fmt: skip
            found.append({
                "certificate": one.name, "asks": one.asks, "holds": one.holds, "unit": one.unit, "vector": method,
                "tasks": tasks,
            })  # fmt: skip
    return found


def folder() -> Path:
    """Return where cards go, beside the built pages."""
    return tables.ROOT / SCHEMA.parent / "cards"
