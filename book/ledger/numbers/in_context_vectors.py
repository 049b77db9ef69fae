"""Experiment 22, in-context vectors: behaviours and word tasks are judged apart."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number, numbers
from nb_utils.statistics import Comparison, over_tasks, rows

COST = 0.3  # nats a token of ordinary prose: what a vector that steers every token may cost where it is judged

numbers(
    icv_shifts_behaviour=lambda book: over_tasks(_of_tasks(steering(book, "icv", "behaviour"), "effect")),
    icv_shares_no_features=lambda book: over_tasks(shared_features(book, "mean_difference", "centred")),
)


@number
def icv_is_the_mean(book: Book) -> Comparison:
    found = book.read("22_in_context_vectors_component")
    return over_tasks(rows(found, pairs=found["pairs"].max()).set_index("task")["off_mean"])


@number
def icv_beats_fv_at_equal_cost(book: Book) -> Comparison:
    found = (steering(book, method, "behaviour", least=COST) for method in ("icv", "fv_centred"))
    return over_tasks(_difference(*found, "effect"))


@number
def icv_beats_fv_on_behaviour(book: Book) -> Comparison:
    top, bottom = steering(book, "icv", "behaviour"), steering(book, "fv_centred", "behaviour", arrow=True)
    return over_tasks(_difference(top, bottom, "preference"))


@number
def icv_beats_fv_on_behaviour_elsewhere(book: Book) -> Comparison:
    top, bottom = steering(book, "icv", "behaviour"), steering(book, "fv_centred", "behaviour")
    return over_tasks(_difference(top, bottom, "preference"))


@number
def icv_loses_on_tasks(book: Book) -> Comparison:
    top = steering(book, "icv", "word", most=float("inf"))
    return over_tasks(_difference(top, steering(book, "fv_centred", "word", arrow=True), "loss"))


@number
def icv_shares_as_many_as_chance(book: Book) -> Comparison:
    first, chance = (shared_features(book, "centred", other) for other in ("mean_difference", "matched_random"))
    return over_tasks(first - chance)


@number
def twenty_features_shift(book: Book) -> Comparison:
    found = (steering(book, method, "behaviour", least=COST) for method in ("prune_difference", "mean_difference"))
    return over_tasks(_difference(*found, "effect"))


@number
def icv_strength_does_not_travel(book: Book) -> Comparison:
    found = book.read("22_in_context_vectors")
    named = found[found["budget"].isna()]  # the others have the strength that costs so much
    return over_tasks(_of_tasks(rows(named, method="icv", place="mlp", strength=0.1), "kl"))


def steering(
    book: Book, method: str, kind: str, arrow: bool = False, most: float = COST, least: float = 0.0
) -> pd.DataFrame:
    """Return the rows of a method of experiment 22, each task at the place, block and cost where it validates best.

    ``kind``: "behaviour" or "word". ``arrow``: at the arrow alone; else at every token, at a cost between ``least`` and
    ``most``. The choice is made with the first seed. Gains a column ``preference``: by how many nats a token the
    rewritten y is likelier than x behind the arrow. Raises ClaimError if there is no such row.
    """
    found = rows(book.read("22_in_context_vectors"), method=method, kind=kind)
    found = found[found["place"].eq("arrow") if arrow else found["budget"].between(least, most)]
    found = most_pairs(found)
    if found.empty:
        raise ClaimError(f"Experiment 22 has no {method} vectors of kind {kind} that cost so much.")
    value = "loss_y" if kind == "behaviour" else "loss"
    value = value if book.choices.block == "test" else "validation_loss"
    first = rows(found, seed=0)
    key = ["task", "place", "layer", "budget"]
    found = found.merge(first.loc[first.groupby("task")[value].idxmin(), key], on=key)
    return found.assign(preference=found["loss_x"] - found["loss_y"]) if "loss_x" in found else found


def most_pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of vectors that are made of the most pairs that their task has, and of those made otherwise."""
    return frame[frame["pairs"].isna() | frame["pairs"].eq(frame.groupby(["task", "method"])["pairs"].transform("max"))]


def shared_features(book: Book, *pair: str) -> pd.Series:
    """Return, a task, how many of the largest features two vectors of the last block share."""
    found = book.read("22_in_context_vectors_features")
    found = found[found["layer"].eq(found["layer"].max())]
    of = found.groupby(["task", "vector"])["latent"].agg(set)
    return pd.Series({task: len(of[task, pair[0]] & of[task, pair[1]]) for task in of.index.get_level_values("task")})


def _of_tasks(frame: pd.DataFrame, column: str) -> pd.Series:
    if frame.empty:
        raise ClaimError(f"Experiment 22 has no such rows with {column}.")
    return frame.groupby("task")[column].mean()


def _difference(first: pd.DataFrame, second: pd.DataFrame, column: str) -> pd.Series:
    return _of_tasks(first, column) - _of_tasks(second, column)
