"""Experiment 15, labels: can they be wrong?"""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, numbers
from nb_utils.show import evidence
from nb_utils.statistics import over_tasks, rows

numbers(
    labels_tell_where=lambda book: over_tasks(told(book, "detection")),
    contexts_are_alike=lambda book: over_tasks(labelled(book).groupby("task")["intruder"].mean()),
    labels_tell_what_rises=lambda book: over_tasks(told(book, "output")),
    labels_tell_tasks=lambda book: over_tasks(told(book, "prediction")),
    own_features_help_alone=lambda book: over_tasks(alone(book, own=True) - alone(book, own=False)),
)


def labelled(book: Book) -> pd.DataFrame:
    """Return the labels of features with their scores, a row for every task that keeps one, of the tasks that count."""
    kept = evidence.surviving(book.model, book.folder)[["layer", "latent", "task"]].drop_duplicates()
    found = book.read("labels").merge(kept, on=["layer", "latent"])
    return found[found["task"].isin(book.done.index[book.done])]


def told(book: Book, score: str) -> pd.Series:
    """Return how much better a task's features score with their labels than with those of other features."""
    found = labelled(book).dropna(subset=[score, f"{score}_shuffled"]).groupby("task")
    return found[score].mean() - found[f"{score}_shuffled"].mean()


def alone(book: Book, own: bool) -> pd.Series:
    """Return the share of a task's features, or of other tasks', that lower its loss alone."""
    found = rows(book.table("15_labels"), which="best", in_clean=own)
    return found[found["latent"] >= 0].groupby("task")["rel_loss"].apply(lambda changes: (changes < 0).mean())
