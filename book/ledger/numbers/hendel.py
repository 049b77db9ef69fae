"""Experiment 20, Hendel's task vectors: every task stands at the block that its own development cases choose."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, accuracy, number, numbers
from nb_utils import statistics, tasks
from nb_utils.statistics import Comparison, choose, compare, over_tasks, rows

numbers(
    theta_keeps_icl=lambda book: over_tasks(accuracy(hendel(book, "theta")) / accuracy(hendel(book, "few_shot"))),
    theta_needs_its_task=lambda book: over_tasks(accuracy(hendel(book, "zero_mean"))),
    theta_needs_the_relation=lambda book: compare(rows(hendel(book, "theta"), seed=0), hendel(book, "theta_shuffled")),
    mean_theta_is_better=lambda book: compare(hendel(book, "theta_mean"), hendel(book, "theta")),
    replacing_is_centring=lambda book: (
        compare(hendel(book, "centred_best_scale", mode="add"), hendel(book, "theta_mean"))
    ),
    theta_overrides_examples=lambda book: over_tasks(overruled(book, "theta")),
    features_override_examples=lambda book: (
        over_tasks(overruled(book, "prune_swap", lambda frame: rows(frame, k=book.k)))
    ),
    theta_cleaned_with_ten=lambda book: compare(in_place(book, "clean", most=10), hendel(book, "theta_mean")),
    five_features_replace=lambda book: compare(in_place(book, "prune_codes", k=5), hendel(book, "theta_mean")),
    cleaned_in_place_reaches_dense=lambda book: compare(in_place(book, "clean"), in_place(book, "learned_vector")),
)


@number
def theta_window(book: Book) -> Comparison:
    found = rows(book.table("20_hendel"), method="theta", mode="replace", seed=0)
    grid = found.pivot(index="task", columns="layer", values="accuracy")
    inside = grid.columns.isin(window(book))
    if inside.all():
        raise ClaimError("Experiment 20 has no block outside the window.")
    return over_tasks(grid.loc[:, ~inside].max(axis=1) / grid.loc[:, inside].max(axis=1))


@number
def languages_resist(book: Book) -> Comparison:
    english = [name for name in tasks.names() if name.startswith("en_")]
    found = overruled(book, "theta", lambda frame: frame[frame["task"].isin(english) & frame["rival"].isin(english)])
    return over_tasks(found)


@number
def reconstruction_replaces(book: Book) -> Comparison:
    found = coded(book)
    best = blocks(rows(found, method="theta", seed=0), book)
    return compare(*(_at(rows(found, method=method, seed=0), best) for method in ("reconstruct_each", "theta")))


@number
def thetas_tell_tasks_apart(book: Book) -> Comparison:
    found = book.table("20_hendel_spread")
    nearest = statistics.nearest_centroid(rows(found, layer=usual(book)), "codes")
    return over_tasks(nearest.eq(nearest.index.get_level_values("task")).groupby(level="task").mean())


@number
def theta_is_the_books_vector(book: Book) -> Comparison:
    found = rows(coded(book), method="reconstruct", layer=usual(book))
    return over_tasks(found.groupby("task")["shared"].mean())


def hendel(book: Book, method: str, mode: str = "replace") -> pd.DataFrame:
    """Return the test rows of a vector of experiment 20 at each task's own block; of prompts without one as they are.
    """
    found = rows(book.table("20_hendel"), method=method, on="test")
    if method in ("zero_shot", "few_shot"):
        return found
    thetas = rows(book.table("20_hendel"), method="theta", mode="replace", seed=0)
    return _at(rows(found, mode=mode), blocks(thetas, book))


def blocks(thetas: pd.DataFrame, book: Book) -> pd.Series:
    """Return the block of every task: the most accurate on development cases, of equals the earliest."""
    value = -thetas["validation_accuracy"] if book.choices.block != "test" else thetas["loss"]
    grid = thetas.assign(value=value).pivot(index="task", columns="layer", values="value").sort_index(axis=1)
    if book.choices.block == "shared":
        grid = grid * 0 + grid.mean()
    return grid.idxmin(axis=1)


def usual(book: Book) -> int:
    """Return the block with features that most tasks choose."""
    chosen = blocks(rows(coded(book), method="theta", seed=0), book)
    return int(chosen.mode().iloc[0])


def window(book: Book, least: float = 0.5) -> list[int]:
    """Return the blocks where thetas are, over all tasks, at least half as accurate as at the best, on development."""
    found = rows(book.table("20_hendel"), method="theta", mode="replace", seed=0)
    mean = found.groupby("layer")["validation_accuracy"].mean()
    return mean.index[mean >= least * mean.max()].tolist()


def coded(book: Book) -> pd.DataFrame:
    """Return the rows in place of the stream at the blocks where theta is written in features."""
    found = rows(book.table("20_hendel"), mode="replace", on="test")
    return found[found["layer"].isin(found.loc[found["method"].eq("reconstruct"), "layer"].unique())]


def in_place(book: Book, method: str, most: int | None = None, **equal: object) -> pd.DataFrame:
    """Return what was trained in place of the stream, of each task where it validates best, under ``most`` features."""
    found = choose(rows(coded(book), method=method, **equal), most)
    if found.empty:
        raise ClaimError(f"Experiment 20 has no such {method} vectors in place of the stream.")
    value = "loss" if book.choices.block == "test" else "validation_loss"
    return found.loc[found.groupby("task")[value].idxmin()]


def overruled(book: Book, method: str, only=lambda frame: frame) -> pd.Series:
    """Return, a task, the accuracy on the rival's answers less that on those of the examples; rivals averaged."""
    found = only(rows(book.table("20_hendel_conflict"), method=method))
    if found.empty:
        raise ClaimError(f"Experiment 20 has no such {method} vectors against examples.")
    grid = found.pivot_table(index=["task", "rival"], columns="on", values="accuracy")
    return (grid["rival"] - grid["demonstrations"]).groupby("task").mean()


def _at(frame: pd.DataFrame, chosen: pd.Series) -> pd.DataFrame:
    return frame[frame["layer"].eq(frame["task"].map(chosen))]
