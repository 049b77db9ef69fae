"""Certificates: what the vectors of every task are shown to be, in six ticks that tables decide.

No vector needs all six: which it fails is the point. The bounds stand here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from pandas.io.formats.style import Styler

from book.ledger import ledger
from book.ledger.claims import Book, ClaimError
from book.ledger.numbers import necessity
from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.show import plots
from nb_utils.statistics import RELATIONS, rows

YES, NO = "yes", "no"
MARKS = {YES: "✓", NO: "✗", ledger.NOT_MEASURED: "–"}
# The vectors that are asked, and where the book has each: a part of `Book`, at the vector's own block.
VECTORS = {
    "prune_contrast": "pruned", "clean": "cleaned", "centred_best_scale": "centred", "task_vector": "replaced",
    "learned_vector": "learned",
}  # fmt: skip
SPARSE = ("prune_contrast", "clean")
AGAIN = 0.7  # cosine of a feature with its best match in an SAE of another seed, from which it counts as found again


@dataclass(frozen=True)
class Certificate:
    """One tick: what it ``asks`` of a vector, and the number a task that decides it.

    A tick is given where the number is on the side of the bound, as ``holds`` says it (">= 0.75"). ``unit``: a key of
    `ledger.UNITS`. ``measure`` gets a book and a method of `VECTORS`; it raises ClaimError or TableError where the
    number has no table, or the vector no such thing.
    """

    name: str
    asks: str
    holds: str
    unit: str
    measure: Callable[[Book, str], pd.Series]

    def met(self, number: float) -> bool:
        relation, bound = self.holds.split()
        return bool(RELATIONS[relation](number, float(bound)))

    def written(self, number: float) -> str:
        return ledger.UNITS[self.unit].format(number).removeprefix("+")


def sufficient(book: Book, method: str) -> pd.Series:
    """Return the share of the gap from zero-shot to few-shot loss that the vector closes."""
    return statistics.recovered(getattr(book, VECTORS[method]), book.test)


def necessary(book: Book, method: str) -> pd.Series:
    """Return what few-shot prompts lose without the task's features, less the most that they lose without others.

    The features are those that pruning and cleaning keep, of all blocks measured; the strictest control is each task's.
    """
    _sparse(method, "no features to take away")
    there = set(rows(book.table("10_necessity"), kind="executor", mode="zero", on="test")["method"])
    names = [name for name in necessity.CONTROLS if name in there]
    controls = pd.concat([necessity.needed(book, "executor", name) for name in names], axis=1)
    return necessity.needed(book, "executor") - controls.max(axis=1)


def stable(book: Book, method: str) -> pd.Series:
    """Return the share of the vector's features that recur: over its seeds, and in an SAE of another seed if there is.

    The smaller of the two shares; the first at the block where seeds were run, which need not be the vector's own.
    """
    _sparse(method, "no features that could recur")
    found = _features(book, method)
    seeds = rows(book.table("02_cleanup_features"), method=method).groupby("layer")["seed"].nunique()
    again = _features(book, method, int(seeds.idxmax()))
    many = again.groupby("task")["seed"].transform("nunique") > 1
    if not many.any():
        raise ClaimError(f"The {plots.label(method)} vector was made with one seed alone.")
    over_seeds = {task: statistics.overlap(one).loc[method, method] for task, one in again[many].groupby("task")}
    shares = [pd.Series(over_seeds)]
    try:
        twins = rows(book.read("stability"), first="shipped", second="second_seed")
    except tables.TableError:  # no second SAE was trained
        twins = pd.DataFrame()
    if len(twins):
        first = rows(found, seed=0).merge(twins[["layer", "latent", "cosine"]], on=["layer", "latent"])
        shares.append(first["cosine"].ge(AGAIN).groupby(first["task"]).mean())
    return pd.concat(shares, axis=1).loc[shares[0].index].min(axis=1)


def template_proof(book: Book, method: str) -> pd.Series:
    """Return the share of the vector's effect at home that is left on templates it was not made on."""
    if method not in set(book.last("09_templates")["method"]):
        raise ClaimError(f"Experiment 09 does not try the {plots.label(method)} vector.")
    home, away = (book.templates(method, home) for home in (True, False))
    return (away / home).where(home < 0, 0)  # without an effect, none is kept


def gentle(book: Book, method: str) -> pd.Series:
    """Return the KL divergence (nats) of the next token that the vector causes at a separator in ordinary text."""
    found = rows(book.side_pruned if method == "prune_contrast" else rows(book.side, method=method), on="separator")
    if found.empty:
        raise ClaimError(f"Experiment 08 does not try the {plots.label(method)} vector.")
    return found.groupby("task")["d_ntp"].mean()


def legible(book: Book, method: str) -> pd.Series:
    """Return how well the labels of the task's features tell the tasks that these help from others (mean AUROC)."""
    _sparse(method, "no features to label")
    labels = book.read("labels")[["layer", "latent", "prediction"]]
    kept = rows(statistics.survivors(book.table("02_cleanup_features")), layer=book[VECTORS[method]])
    return kept.merge(labels, on=["layer", "latent"]).groupby("task")["prediction"].mean().dropna()


def _sparse(method: str, lacks: str) -> None:
    if method not in SPARSE:
        raise ClaimError(f"The {plots.label(method)} vector is dense: it has {lacks}.")


def _features(book: Book, method: str, layer: int | None = None) -> pd.DataFrame:
    """Return the latents of a sparse vector of every seed, as `statistics.overlap` takes them.

    At its own block, or after another under the penalty that was chosen for the first seed at its own.
    """
    vector = getattr(book, VECTORS[method])
    own = book[VECTORS[method]]
    found = rows(book.table("02_cleanup_features"), method=method, layer=own if layer is None else layer)
    found = found[found["after"] != 0]
    if method == "prune_contrast":
        return rows(found, k=book.k)
    chosen = vector[["task", "seed", "penalty"]]
    if layer not in (None, own):
        chosen = rows(chosen, seed=0).drop(columns="seed")
    return found.merge(chosen, on=list(chosen)).assign(k=0)


CERTIFICATES = (
    Certificate(
        "sufficient", "closes three quarters of the gap from zero-shot to few-shot loss", ">= 0.75", "share",
        sufficient),
    Certificate(
        "necessary", "has features that few-shot prompts miss more than the strictest of others in equal number",
        "> 0", "change of share", necessary),
    Certificate("stable", "has features half of which recur under another seed", ">= 0.5", "share", stable),
    Certificate(
        "template-proof", "keeps half of its effect on templates that it has not seen", ">= 0.5", "share",
        template_proof),
    Certificate(
        "gentle", "moves the next token of ordinary text by less than half a nat (KL)", "< 0.5", "nats", gentle),
    Certificate(
        "legible", "has features whose labels predict which tasks they help (AUROC; chance is .5)", ">= 0.6", "share",
        legible),
)  # fmt: skip


def given(book: Book | None = None) -> pd.DataFrame:
    """Return every tick: vector, certificate, task, number (NaN: none), verdict and, without a number, why.

    Of all tasks that count. Verdicts are `YES`, `NO` and `ledger.NOT_MEASURED`.
    """
    book = book or Book()
    counted, parts = book.done.index[book.done], []
    for method in VECTORS:
        for one in CERTIFICATES:
            why = "Its table does not have the task."
            try:
                numbers = one.measure(book, method)
            except (ClaimError, tables.TableError) as error:
                numbers, why = pd.Series(dtype=float), str(error).replace(f"{tables.ROOT}/", "")
            for task, number in numbers.reindex(counted).items():
                measured = pd.notna(number)
                verdict = (YES if one.met(number) else NO) if measured else ledger.NOT_MEASURED
                line = {"vector": method, "certificate": one.name, "task": task, "number": number, "verdict": verdict}
                parts.append(line | {"why": "" if measured else why})
    return pd.DataFrame(parts)


def by_task(ticks: pd.DataFrame, method: str = "prune_contrast") -> Styler:
    """Show the ticks of one vector, a row a task: a mark, and the number that decides it."""
    named = {one.name: one for one in CERTIFICATES}
    found = rows(ticks, vector=method)
    cells = [MARKS[row.verdict] + (f" {named[row.certificate].written(row.number)}" if row.verdict in (YES, NO) else "")
             for row in found.itertuples()]  # fmt: skip
    grid = found.assign(cell=cells).pivot(index="task", columns="certificate", values="cell")[list(named)]
    ticked = found["verdict"].eq(YES).groupby(found["task"]).sum().sort_values(ascending=False, kind="stable")
    shown = grid.loc[ticked.index].assign(ticks=ticked).rename(index=plots.title)
    return plots.table(shown.rename_axis(index=None, columns=None), index=True)


def in_words(book: Book | None = None, method: str = "prune_contrast") -> dict[str, str]:
    """Say of every task's vector which ticks it gets; of no task where the model has no tables."""
    try:
        found = rows(given(book), vector=method)
    except tables.TableError:
        return {}
    said = found["verdict"].map(MARKS) + "\N{NO-BREAK SPACE}" + found["certificate"]
    words = said.groupby(found["task"], sort=False).agg(" · ".join)
    return {task: f"The task's vector ({plots.label(method)}): {ticks}." for task, ticks in words.items()}


def summary(ticks: pd.DataFrame) -> Styler:
    """Show every tick, what it asks, and of every vector how many tasks get it, of those where it is measured."""
    lines = []
    for one in CERTIFICATES:
        line = {"tick": one.name, "asks that a vector": one.asks}
        for method in VECTORS:
            verdicts = rows(ticks, vector=method, certificate=one.name)["verdict"]
            measured = verdicts.isin([YES, NO]).sum()
            told = f"{verdicts.eq(YES).sum()} of {measured}" if measured else MARKS[ledger.NOT_MEASURED]
            line[plots.label(method)] = told
        lines.append(line)
    style = {"selector": "td", "props": "white-space: normal; vertical-align: top"}
    return plots.table(pd.DataFrame(lines)).set_table_styles([style], overwrite=False)


def unmeasured(ticks: pd.DataFrame) -> dict[str, list[str]]:
    """Return, for every reason why ticks are not measured, what they are: vector and certificate, in words."""
    missing = ticks[ticks["verdict"].eq(ledger.NOT_MEASURED)].drop_duplicates(["vector", "certificate", "why"])
    found: dict[str, list[str]] = {}
    for row in missing.itertuples():
        found.setdefault(row.why, []).append(f"{plots.label(row.vector)}: {row.certificate}")
    return found
