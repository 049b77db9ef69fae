"""Experiment 24, grown vectors: small models that are known to have one, or none; each counts as a task."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number, numbers
from nb_utils.statistics import Comparison, over_tasks, rows

GROWN = "24_grown_vectors"
FEW = 8  # latents, of which a vector is said to consist

numbers(
    vector_carries_it_all=lambda book: over_tasks(with_examples(book, "grown") - grown_vector(book, "grown")),
    growing_costs=lambda book: over_tasks(with_examples(book, "grown") - with_examples(book, "plain")),
    growing_helps_held_out=lambda book: (
        over_tasks(with_examples(book, "grown", "held_out") - with_examples(book, "plain", "held_out"))
    ),
    growing_helps_longer=lambda book: (
        over_tasks(with_examples(book, "grown", "longer") - with_examples(book, "plain", "longer"))
    ),
    few_latents_are_the_vector=lambda book: over_tasks(written(book, "largest_codes", k=FEW) / written(book, "mean")),
    the_vector_is_one_feature=lambda book: over_tasks(written(book, "prune_contrast", k=1) / written(book, "mean")),
    pruning_recovers_the_vector=lambda book: over_tasks(written(book, "prune_contrast", k=FEW) - written(book, "mean")),
    cleaning_recovers_the_vector=lambda book: over_tasks(written(book, "clean") - written(book, "mean")),
    strangers_do_less=lambda book: (
        over_tasks(written(book, "prune_random", k=FEW) - written(book, "prune_contrast", k=FEW))
    ),
    nothing_is_learned_where_nothing_is=lambda book: (
        over_tasks(_beyond_chance(_grown(book, "plain", method="learned_vector", on="test")))
    ),
)


def _grown(book: Book, variant: str, part: str = "", **equal: object) -> pd.DataFrame:
    """Return rows of grown models of a variant, each with the name of its model."""
    found = rows(book.read(f"{GROWN}{part}"), variant=variant, **equal)
    if found.empty:
        raise ClaimError(f"Experiment 24 has no such rows of {variant} models.")
    return found.assign(model=found["task"] + ", seed " + found["seed"].astype(str))


def _share(found: pd.DataFrame) -> pd.Series:
    return found.groupby("model")["accuracy"].mean()


def _beyond_chance(found: pd.DataFrame) -> pd.Series:
    """Return the best accuracy of every model, less that of a guess that does not know the task."""
    return found.groupby("model")["accuracy"].max() - found.groupby("model")["chance"].first()


def with_examples(book: Book, variant: str, on: str = "train") -> pd.Series:
    """Return the accuracy of every model after as many examples as its prompts have ("longer": more)."""
    found = _grown(book, variant, method="in_context", on=on)
    return _share(found[found["shots"].eq(found["shots"].max())])


def grown_vector(book: Book, variant: str) -> pd.Series:
    """Return the accuracy of the mean vector after the block where it was asked for, or would have been."""
    found = _grown(book, variant, method="mean", on="train")
    return _share(found[found["layer"].eq(found["grown_at"])])


def written(book: Book, method: str, **equal: object) -> pd.Series:
    """Return the accuracy of a vector of every grown model, on queries that none was cleaned on.

    Cleaned ones are of the penalty that validates best.
    """
    found = _grown(book, "grown", method=method, on="test", **equal)
    if method == "clean":
        found = found.loc[found.groupby("model")["validation_loss"].idxmin()]
    return _share(found)


def at_equal_skill(book: Book, on: str) -> pd.Series:
    """Return what growing changes: a grown model at its end, less the plain one when it knew as much in context.

    That is at the stage of training whose accuracy on the tasks of training is nearest.
    """
    change = {}
    grown, plain = (
        _grown(book, variant, "_timeline", method="in_context").sort_values("shots") for variant in ("grown", "plain"))
    for model, mine in grown.groupby("model"):
        end = mine[mine["step"].eq(mine["step"].max())].groupby("on")["accuracy"].last()
        stages = rows(plain, model=model).groupby(["step", "on"])["accuracy"].last().unstack()
        if on in end and len(stages):
            change[model] = end[on] - stages.loc[(stages["train"] - end["train"]).abs().idxmin(), on]
    return pd.Series(change, dtype=float)


def noise(book: Book) -> list[str]:
    """Return what the conditions are called in which answers shown are drawn at random."""
    return [on for on in _grown(book, "plain", method="in_context")["on"].unique() if on.startswith("noise")]


@number
def plain_has_none(book: Book) -> Comparison:
    alone = _grown(book, "plain", on="train")
    alone = alone[alone["method"].isin(["mean", "one", "centred"])]
    return over_tasks(_beyond_chance(pd.concat([alone, _grown(book, "plain", "_places")])))


@number
def grown_is_there(book: Book) -> Comparison:
    found = _grown(book, "grown", method="mean", on="train")
    return over_tasks(_beyond_chance(found[found["layer"].eq(found["grown_at"])]))


@number
def grown_only_there(book: Book) -> Comparison:
    found = _grown(book, "grown", "_places")
    return over_tasks(_beyond_chance(found[found["layer"].ne(found["grown_at"])]))


@number
def vector_decides(book: Book) -> Comparison:
    found = _grown(book, "grown", method="swapped", on="other")
    return over_tasks(_share(found[found["layer"].eq(found["grown_at"])]))


@number
def growing_helps_noise(book: Book) -> Comparison:
    parts = [with_examples(book, "grown", on) - with_examples(book, "plain", on) for on in noise(book)]
    return over_tasks(sum(parts) / len(parts))


@number
def skill_apart_growing_helps(book: Book) -> Comparison:
    parts = pd.DataFrame({on: at_equal_skill(book, on) for on in ("held_out", "longer", *noise(book))})
    return over_tasks(parts.mean(axis=1))


@number
def nothing_is_pruned_from_nothing(book: Book) -> Comparison:
    found = _grown(book, "plain", method="prune_contrast", on="test", k=FEW)
    return over_tasks(_beyond_chance(found))
