"""Experiment 29, which vector: every way after its own block, as who has few pairs makes it, or a hundred."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number, numbers
from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.statistics import Comparison, compare, over_tasks, rows

WHICH = "29_which_vector"
LEGIBLE = 20  # features that somebody may read one by one
GENTLE = 0.5  # nats of KL in ordinary text
SIZED = ("few_shot", "contrast_codes", "prune_contrast")  # their k is what they are, not a setting
CONTROLS = ("zero_shot", "matched_random")

numbers(
    advice_does_the_task=lambda book: over_tasks(statistics.recovered(followed(book, "hundred"), without_vector(book))),
    few_pairs_do_the_task=lambda book: over_tasks(statistics.recovered(followed(book, "few"), without_vector(book))),
    order_does_less=lambda book: compare(rows(ways(book), method="instruction"), followed(book, "few")),
    legible_costs_little=lambda book: compare(followed(book, "legible"), followed(book, "hundred")),
    advice_leaves_the_template=lambda book: over_tasks(carried(book, "template")),
    advice_reaches_sentences=lambda book: over_tasks(carried(book, "sentence")),
    chance_is_no_help=lambda book: (
        over_tasks(statistics.recovered(rows(ways(book), method="matched_random"), without_vector(book)))
    ),
)


def ways(book: Book, on: str = "test") -> pd.DataFrame:
    """Return the rows of all ways at the places whose names begin so, each after its own block; ``way`` names it."""
    found = book.table(WHICH)
    found = found[found["on"].str.startswith(on)]
    size = ("_" + found["k"].astype(str)).where(found["method"].isin(SIZED), "")
    replaced = found["mode"].eq("replace").map({True: "_replaced", False: ""})
    found = found.assign(way=found["method"] + replaced + size + "_of_" + found["budget"].astype(str))
    if book.choices.block == "test" and on == "test":
        return found[found["loss"].eq(found.groupby(["task", "way", "seed"])["loss"].transform("min"))]
    return found[found["own"]]


def without_vector(book: Book, on: str = "test") -> pd.DataFrame:
    """Return the rows of prompts without examples, and behind as many as the book takes."""
    found = ways(book, on)
    shown = found["method"].eq("few_shot") & found["budget"].eq(found["budget"].max())
    return found[found["method"].eq("zero_shot") | shown]


def allowed(book: Book, user: str, prompts: bool = False) -> list[str]:
    """Name the ways that a user may take, of those that were made on every task.

    ``user``: has "few" pairs and no gradient, has a "hundred" pairs, or of these asks for "legible" features alone, or
    for what is "gentle" to other text. ``prompts``: also ways that make a prompt longer.
    """
    found = ways(book)
    found = found[~found["method"].isin(CONTROLS)]
    mean = found.groupby("way")[["budget", "gradients", "stored", "l0", "tokens"]].mean()
    may = found.groupby("way")["task"].nunique().eq(found["task"].nunique())  # made on every task
    may &= prompts | mean["tokens"].le(mean["tokens"].min())
    if user == "few":
        may &= mean["budget"].lt(mean["budget"].max()) & mean["gradients"].eq(0)
    if user == "legible":
        may &= mean["l0"].le(LEGIBLE)
    if user == "gentle":
        may &= ways(book, "text").groupby("way")["d_ntp"].mean().reindex(mean.index).le(GENTLE)
    return mean.index[may].tolist()


def advised(book: Book, user: str, prompts: bool = False) -> tuple[str, list[str]]:
    """Return the way with the lowest mean loss that a user may take, and those that the table cannot tell from it."""
    found = ways(book)
    mean = found.groupby(["way", "task"])["loss"].mean().groupby("way").mean()[allowed(book, user, prompts)]
    best = mean.idxmin()
    rest = mean.drop(best).sort_values().index
    return best, [way for way in rest if compare(rows(found, way=way), rows(found, way=best)).low <= 0]


def followed(book: Book, user: str, prompts: bool = False) -> pd.DataFrame:
    """Return what the advice is worth: of every task the rows of the way that is best on all others."""
    found = ways(book)
    grid = found.pivot_table(index="task", columns="way", values="loss")[allowed(book, user, prompts)]
    if len(grid) < 2:
        raise ClaimError("Experiment 29 has no two tasks, of which one could advise the other.")
    best = {task: grid.drop(index=task).mean().idxmin() for task in grid.index}
    return found[found["way"].eq(found["task"].map(best))]


def carried(book: Book, on: str, user: str = "hundred") -> pd.Series:
    """Return the share of the way from zero-shot to few-shot loss that the advised way goes elsewhere, over places.

    Of tasks that examples help there by a nat and more.
    """
    found, plain = ways(book, on), without_vector(book, on)
    taken = followed(book, user).groupby("task")["way"].first()
    zero, few = (rows(plain, method=name).groupby("task")["loss"].mean() for name in ("zero_shot", "few_shot"))
    share = statistics.recovered(found[found["way"].eq(found["task"].map(taken))], plain)
    share = share[(zero - few).reindex(share.index) >= 1]
    if share.empty:
        raise ClaimError("Examples help no task there by a nat.")
    return share


def seconds(book: Book, found: pd.DataFrame) -> pd.Series:
    """Return the processor seconds that making ways takes, by what is done and the rates of the page of benchmarks."""
    speed = tables.load("benchmarks", book.model, book.folder)
    each = (speed["seconds"] / speed["units"]).groupby([speed["benchmark"], speed["tool"]]).median()
    prompts, lines = 24, 16 * 17  # of its cases
    return (found["lines"] * each["extraction", "ours"] / lines + found["tries"] * each["heatmap", "ours"] / prompts
            + found["gradients"] * each["cleaning", "ours"] / prompts)  # fmt: skip


@number
def few_pairs_belong_in_the_prompt(book: Book) -> Comparison:
    found = ways(book)
    shown = found[found["method"].eq("few_shot") & found["budget"].lt(found["budget"].max())]
    return compare(followed(book, "few"), shown)


@number
def gradient_pays(book: Book) -> Comparison:
    found = ways(book)
    kept = rows(found[found["way"].isin(allowed(book, "hundred"))], budget=found["budget"].max())
    trained = kept["gradients"].gt(0)
    best = [part.groupby(["way", "task"])["loss"].mean().groupby("way").mean().idxmin()
            for part in (kept[trained], kept[~trained])]  # fmt: skip
    return compare(*(rows(kept, way=way) for way in best))


@number
def advice_travels(book: Book) -> Comparison:
    grid = ways(book).pivot_table(index="task", columns="way", values="loss")[allowed(book, "hundred")]
    return over_tasks(followed(book, "hundred").groupby("task")["loss"].mean() - grid.min(axis=1))


@number
def advice_is_gentler_than_examples(book: Book) -> Comparison:
    found = ways(book, "text").groupby(["task", "way"])["d_ntp"].mean()
    taken = followed(book, "hundred").groupby("task")["way"].first()
    shown = without_vector(book).query("method == 'few_shot'").groupby("task")["way"].first()
    return over_tasks(pd.Series({task: found[task, way] - found[task, shown[task]] for task, way in taken.items()}))
