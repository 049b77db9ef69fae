"""Experiment 10, necessity: what is left when a task's features are taken away."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, named, number, numbers
from nb_utils.show import plots
from nb_utils.statistics import Comparison, over_tasks, rows

CONTROLS = ("other_task", "same_activation", "same_density", "most_active")  # none of them a feature of the task
HALVES = ("kept_by_most", "kept_by_few")  # of the task's features

named(
    strictest_executors=lambda book: plots.label(strictest(book, "executor")),
    strictest_detectors=lambda book: plots.label(strictest(book, "detector")),
    executor_bottleneck=lambda book: bottleneck(book, "executor"),
)

numbers(
    executors_are_needed=lambda book: over_tasks(needed(book, "executor")),
    executors_beat_controls=lambda book: (
        over_tasks(needed(book, "executor") - needed(book, "executor", strictest(book, "executor")))
    ),
    own_beat_any_other_task=lambda book: (
        over_tasks(needed(book, "executor") - needed(book, "executor", "any_other_task"))
    ),
    features_of_few_are_needed=lambda book: over_tasks(needed(book, "executor", "kept_by_few")),
    features_of_few_spare_others=lambda book: over_tasks(spared(book, "executor", "other", "kept_by_few")),
    others_are_not_needed=lambda book: over_tasks(needed(book, "executor", strictest(book, "executor"))),
    executors_a_block=lambda book: (
        over_tasks(taken(book, "executor", on="test", together=1).groupby("task")["features"].mean())
    ),
    executors_say_the_task=lambda book: over_tasks(needed_beyond_any(book, "executor")),
    detectors_are_needed=lambda book: over_tasks(needed(book, "detector")),
    detectors_beat_controls=lambda book: (
        over_tasks(needed(book, "detector") - needed(book, "detector", strictest(book, "detector")))
    ),
    one_block_is_bypassed=lambda book: over_tasks(needed(book, "executor") - needed(book, "executor", together=False)),
    removal_spares_text=lambda book: over_tasks(spared(book, "executor", "text")),
)


@number
def few_rescue(book: Book) -> Comparison:
    if (found := rescuers(book, "executor")).empty:
        raise ClaimError("No task loses a tenth of the few-shot gain without the executors of one block.")
    return over_tasks(found)


@number
def removal_spares_other_tasks(book: Book) -> Comparison:
    return over_tasks(spared(book, "executor", "other") - rise(book, "executor"))


def taken(book: Book, kind: str, method: str = "own", **equal: object) -> pd.DataFrame:
    """Return what is left of prompts when features are taken away (their codes are 0) and none is put back.

    ``method``: whose they are: "own", the task's, one of its `HALVES`, or a control in equal number.
    """
    found = rows(book.table("10_necessity"), kind=kind, method=method, mode="zero", back=0, **equal)
    if found.empty:
        raise ClaimError(f"Experiment 10 has taken no {kind}s ({method}) away.")
    return found


def all_blocks(book: Book, kind: str, method: str = "own") -> pd.DataFrame:
    """Return what is left of every task's few-shot prompts when all blocks lose features at once."""
    found = taken(book, kind, method, on="test")
    return found[found["together"].eq(found.groupby("task")["together"].transform("max"))]


def needed(book: Book, kind: str, method: str = "own", together: bool = True) -> pd.Series:
    """Return the necessity of every task's features, or of a control.

    ``together``: after all blocks at once, or else after `bottleneck` alone.
    """
    if together:
        found = all_blocks(book, kind, method)
    else:
        found = rows(taken(book, kind, method, on="test"), together=1, layer=bottleneck(book, kind))
    return found.groupby("task")["necessity"].mean()


def rise(book: Book, kind: str, method: str = "own") -> pd.Series:
    """Return by how much the loss of every task's few-shot prompts rises (nats) when all blocks lose features."""
    left = all_blocks(book, kind, method).groupby("task")["loss"].mean()
    few = rows(book.table("10_necessity"), method="few_shot", on="test").groupby("task")["loss"].mean()
    return left - few.reindex(left.index)


def needed_beyond_any(book: Book, kind: str) -> pd.Series:
    """Return the necessity after `bottleneck` alone of what the features say beyond their mean at other tasks'."""
    found = rows(book.table("10_necessity"), kind=kind, method="own", mode="mean", layer=bottleneck(book, kind))
    return found.groupby("task")["necessity"].mean()


def bottleneck(book: Book, kind: str) -> int:
    """Return the block after which the task's features alone are needed most, on average: chosen on test."""
    return int(taken(book, kind, on="test", together=1).groupby("layer")["necessity"].mean().idxmax())


def strictest(book: Book, kind: str, together: bool = True) -> str:
    """Name the control that is needed most on average."""
    return max(CONTROLS, key=lambda control: needed(book, kind, control, together).mean())


def spared(book: Book, kind: str, on: str, method: str = "own") -> pd.Series:
    """Return what the same removal does elsewhere, to every task's: nats of loss ("other") or of KL ("text")."""
    left = taken(book, kind, method, on=on).groupby("task")
    if on == "text":
        return left["d_ntp"].mean()
    return left["loss"].mean() - rows(book.table("10_necessity"), on=on, mode="none").groupby("task")["loss"].mean()


def rescuers(book: Book, kind: str) -> pd.Series:
    """Return the share of every task's features that, put back by weight, restore half of what was lost.

    Of tasks that lose a tenth of the few-shot gain or more: where nothing is lost, nothing can be restored.
    """
    found = rows(book.table("10_necessity"), kind=kind, method="own", mode="zero", on="test", together=1, seed=0)
    found = found[found["layer"].isin(rows(found, features=0)["layer"])]  # where all come back in the end
    shares = {}
    for task, part in found[found["layer"].eq(found["layer"].max())].groupby("task"):
        left = part.set_index("back")["necessity"].sort_index()
        if left.loc[0] >= 0.1:
            shares[task] = left.index[left <= left.loc[0] / 2].min() / left.index.max()
    return pd.Series(shares, dtype=float)
