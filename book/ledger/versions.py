"""Versions: what the book's claims came to, then and now, as data that others can read.

A version is one JSON file in results/versions, written by `workflow.versions` before something changes that verdicts
rest on: the rules, the SAEs, the settings. `current` gives the same of today's tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

import pandas as pd
from pandas.io.formats.style import Styler

from book.ledger import contents, ledger
from nb_utils.record import tables
from nb_utils.show import plots

FOLDER = tables.ROOT / "results/versions"
NEW, GONE = "new", "no longer claimed"
VERDICTS = ("holds", "mostly", "holds in part", "undecided", "fails", ledger.NOT_MEASURED)


class VersionError(ValueError):
    """A kept version that cannot be read; the message says what to do."""


def current(judged: Mapping[str, ledger.Row] | None = None) -> list[dict]:
    """Return every claim of the pages there are: verdict, number and 95 % interval, numbers of tasks and bound.

    JSON can hold it. ``judged``: what `ledger.judged` returns (None: of today's tables).
    """
    found = []
    for claim, row in ((row.claim, row) for row in (judged or ledger.judged()).values()):
        if not contents.is_there(claim.page):
            continue
        one = {"id": claim.id, "page": claim.page, "source": claim.source, "claim": claim.claim, "unit": claim.unit}
        one |= {"asked": claim.holds, "verdict": row.verdict}
        if row.number is not None:
            met = row.number.met(claim.relation, claim.bound)
            one |= {"mean": row.number.mean, "low": row.number.low, "high": row.number.high}
            one |= {"met": int(met), "tasks": int(row.number.tasks)}
        found.append(one)
    return found


def kept() -> list[dict]:
    """Return the kept versions, the oldest first: ``name``, ``date``, ``what`` was different, ``claims``.

    Raises VersionError if a file is not one.
    """
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        try:
            version = json.loads(path.read_text(encoding="utf-8"))
            _ = version["name"], version["date"], version["what"], [claim["id"] for claim in version["claims"]]
        except (ValueError, KeyError, TypeError) as error:
            raise VersionError(f"{path.name} is no kept version of the claims: take it away.") from error
        found.append(version)
    return found


def changed(then: list[dict], now: list[dict]) -> pd.DataFrame:
    """Return the claims whose verdict, words or bound differ, and those that are new or gone.

    Columns: claim (in today's words), page, then, now (verdict and number as text).
    """
    before, after = ({claim["id"]: claim for claim in claims} for claims in (then, now))
    lines = []
    for name in dict.fromkeys([*after, *before]):
        old, new = before.get(name), after.get(name)
        if old and new and all(old[part] == new[part] for part in ("verdict", "claim", "asked")):
            continue
        shown = new or old
        was = said(old) if old else NEW
        if old and new and old["claim"] != new["claim"]:
            was += f" (in these words: {old['claim']})"
        line = {"claim": shown["claim"], "page": shown["page"]}
        lines.append(line | {"then": was, "now": said(new) if new else GONE})
    return pd.DataFrame(lines, columns=["claim", "page", "then", "now"])


def moved(then: list[dict], now: list[dict]) -> pd.DataFrame:
    """Return the claims that were measured both times, with the number then and now: claim, unit, then, now."""
    before = {claim["id"]: claim for claim in then if "mean" in claim}
    both = [(before[claim["id"]], claim) for claim in now if "mean" in claim and claim["id"] in before]
    both = [(old, new) for old, new in both if old["unit"] == new["unit"]]
    lines = [{"claim": new["claim"], "unit": new["unit"], "then": old["mean"], "now": new["mean"]} for old, new in both]
    return pd.DataFrame(lines, columns=["claim", "unit", "then", "now"])


def counts(steps: list[tuple[str, str, str]], states: list[list[dict]]) -> pd.DataFrame:
    """Count the verdicts of each state, the oldest first; ``steps``: name, date and difference of all but the last."""
    verdicts = [pd.Series([claim["verdict"] for claim in claims]).value_counts() for claims in states]
    found = pd.DataFrame(verdicts).fillna(0).astype(int)
    order = [name for name in VERDICTS if name in found] + [name for name in found if name not in VERDICTS]
    found = found[order]
    found.insert(0, "until", [*(date for _, date, _ in steps), "today"])
    found["what came then"] = [*(what for _, _, what in steps), "–"]
    return found.reset_index(drop=True)


def said(claim: Mapping) -> str:
    """Write a verdict with its number and interval in the claim's unit."""
    if "mean" not in claim:
        return claim["verdict"]
    mean, low, high = (ledger.UNITS[claim["unit"]].format(claim[part]) for part in ("mean", "low", "high"))
    return f"{claim['verdict']}, {mean} [{low.split()[0]}, {high.split()[0]}]"


def table(frame: pd.DataFrame) -> Styler:
    """Show what `changed` returns; a claim of today is linked to its page."""
    links = [
        f'<a href="findings/{escape(row.page)}.html">{escape(row.claim)}</a>'
        if row.now != GONE and contents.is_there(row.page) else escape(row.claim) for row in frame.itertuples()
    ]  # fmt: skip
    shown = {"claim": links, "then": frame["then"], "now": frame["now"]}
    style = {"selector": "td", "props": "white-space: normal; vertical-align: top"}
    return plots.table(pd.DataFrame(shown), html=["claim"]).set_table_styles([style], overwrite=False)
