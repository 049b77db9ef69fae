"""Experiment 14, shot by shot: streams stand at the block where those of the most examples validate best."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number, numbers
from nb_utils.statistics import Comparison, compare, over_tasks, rows

PUBLISHED_SHOTS = 8  # examples for which recovery was published for this model
# Families of tasks that are told apart here; those of words and on lists are what was published.
KINDS = {
    "tasks of words": ("translations", "knowledge", "inflections", "others"), "tasks on lists": ("lists",),
    "labels": ("classifications",), "one task after another": ("compositions",),
}  # fmt: skip

numbers(
    one_token_recovers_language=lambda book: over_tasks(recovery(book, PUBLISHED_SHOTS, "tasks of words")),
    more_examples_say_more=lambda book: compare(held(book, most_shots(book)), held(book, 1)),
    two_examples_wake_executors=lambda book: over_tasks(awake(book, "executor", 2)),
    executors_rise_beyond_controls=lambda book: (
        over_tasks(risen(book, "executor") - risen(book, "executor", "same_activation"))
    ),
    whole_is_sum=lambda book: over_tasks(explained(book, "stream", "shown")),
    shown_examples_count=lambda book: (
        over_tasks(explained(book, "stream", "shown") - explained(book, "stream", "others"))
    ),
    features_add_up=lambda book: over_tasks(explained(book, "own", "shown") - explained(book, "own", "constant")),
    label_words_help=lambda book: compare(at_answers(book), at_answers(book, "few_shot")),
    label_words_beat_chance=lambda book: compare(at_answers(book), at_answers(book, "matched_random")),
)


@number
def one_token_recovers_lists(book: Book) -> Comparison:
    found = recovery(book, PUBLISHED_SHOTS)
    found = found[[is_list(book, task) for task in found.index]]
    if found.empty:
        raise ClaimError("Experiment 14 has no task on lists.")
    return over_tasks(found)


@number
def examples_only_stretch(book: Book) -> Comparison:
    most = most_shots(book)
    return compare(held(book, most, "one_example_stretched"), held(book, most))


@number
def arrow_holds_most(book: Book) -> Comparison:
    most = most_shots(book)
    others = [held(book, most, place=place).groupby("task")["loss"].mean() for place in ("input", "output", "newline")]
    return over_tasks(held(book, most).groupby("task")["loss"].mean() - pd.concat(others, axis=1).min(axis=1))


@number
def executors_switch(book: Book) -> Comparison:
    if (found := switched(book, "executor")).empty:
        raise ClaimError("No task's executors rise by a tenth after the first example.")
    return over_tasks(found)


def most_shots(book: Book) -> int:
    """Return the largest number of examples that every task has."""
    return int(book.table("14_shots").groupby("task")["shots"].max().min())


def shots_layer(book: Book) -> int:
    """Return the block of experiment 14 where the stream after the most examples validates best."""
    found = rows(book.table("14_shots"), method="task_vector", place="arrow", shots=most_shots(book))
    return book.own_layer(found)


def held(book: Book, shots: int, method: str = "task_vector", place: str = "arrow") -> pd.DataFrame:
    """Return the test rows of what a token holds after so many examples; of prompts that show them: "few_shot"."""
    at = {"place": "none"} if method == "few_shot" else {"place": place, "layer": shots_layer(book)}
    found = rows(book.table("14_shots"), method=method, shots=shots, **at)
    if found.empty:
        raise ClaimError(f"Experiment 14 has no {method} rows of {shots} examples ({place}).")
    return found


def recovery(book: Book, shots: int, kind: str | None = None, method: str = "task_vector") -> pd.Series:
    """Return every task's right first tokens with what one token holds, as a share of those with the examples.

    ``kind``: of tasks of one of `KINDS` alone.
    """
    right, few = (held(book, shots, one).groupby("task")["accuracy"].mean() for one in (method, "few_shot"))
    found = (right / few.where(few > 0)).dropna()
    found = found if kind is None else found[found.index.map(book.family).isin(KINDS[kind])]
    if found.empty:
        raise ClaimError("Experiment 14 has no such task.")
    return found


def is_list(book: Book, task: str) -> bool:
    """Say whether a task's input is a list, also where the word that is picked is then inflected."""
    return book.family[task] == "lists" or task == "last_plural"


def awake(book: Book, kind: str, seen: int, method: str = "own") -> pd.Series:
    """Return how active every task's features are after some examples, as a share of what the last ones make them.

    At their own tokens, executors on arrows and detectors on outputs, over all blocks; the last are more than half of
    the most.
    """
    place = {"executor": "arrow", "detector": "output"}[kind]
    found = rows(book.table("14_shots_course"), kind=kind, method=method, place=place)
    if found.empty:
        raise ClaimError(f"Experiment 14 has followed no {kind}s.")
    by = found.groupby(["task", "seen"])["activation"].sum().unstack()
    last = by.loc[:, by.columns > by.columns.max() // 2].mean(axis=1)
    return (by[seen] / last.where(last > 0)).dropna()


def risen(book: Book, kind: str, method: str = "own") -> pd.Series:
    """Return the part of their last activation that every task's features gain after the first example."""
    return 1 - awake(book, kind, 1, method)


def switched(book: Book, kind: str, method: str = "own") -> pd.Series:
    """Return the part of the rise from one example to the last that is a latent coming on in more prompts.

    Of tasks whose features rise by a tenth of their last activation or more: of no rise there is no part.
    """
    found = rows(book.table("14_shots_growth"), kind=kind, method=method)
    by = found.groupby("task")[["one", "last", "switch"]].sum()
    rise = by["last"] - by["one"]
    return (by["switch"] / rise)[rise > 0.1 * by["last"]]


def explained(book: Book, method: str, guess: str) -> pd.Series:
    """Return the share of the change by several examples that a guess explains, at the block of `shots_layer`."""
    found = rows(book.table("14_shots_sums"), method=method, guess=guess, layer=shots_layer(book))
    return found.groupby("task")["explained"].mean()


def at_answers(book: Book, method: str = "label_words") -> pd.DataFrame:
    """Return the rows of what is added at the answers of examples, each task after the block that validates best.

    "few_shot": nothing is.
    """
    found = rows(book.table("14_shots_labels"), method=method)
    if found.empty:
        raise ClaimError(f"Experiment 14 has no {method} rows at the answers of examples.")
    value = "loss" if book.choices.block == "test" else "validation_loss"
    return found if method == "few_shot" else found.loc[found.groupby("task")[value].idxmin()]
