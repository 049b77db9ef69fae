"""Experiment 11, dictionaries: does it take a trained one?"""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, named, number, numbers, relative
from nb_utils.statistics import Comparison, choose, compare, over_tasks, rows

RECURS = 0.7  # cosine from which on a feature counts as found again in another dictionary

named(
    late_dictionaries=lambda book: late(book), fair=lambda book: fair(book),
    features_kept=lambda book: int(book.setting("11_dictionaries", "most_features")),  # steered with alone
)

numbers(
    training_beats_orthonormal=lambda book: compare(by_dictionary(book, "trained"), by_dictionary(book, "orthonormal")),
    training_beats_components=lambda book: compare(by_dictionary(book, "trained"), by_dictionary(book, "components")),
    training_beats_unembedding=lambda book: compare(by_dictionary(book, "trained"), by_dictionary(book, "unembedding")),
    training_beats_frozen_decoder=lambda book: (
        compare(by_dictionary(book, fair(book)), by_dictionary(book, "frozen_decoder"))
    ),
    training_beats_frozen_encoder=lambda book: (
        compare(by_dictionary(book, fair(book)), by_dictionary(book, "frozen_encoder"))
    ),
    training_cleans_better=lambda book: (
        compare(by_dictionary(book, "trained", "clean"), by_dictionary(book, "orthonormal", "clean"))
    ),
)


@number
def training_steers_more(book: Book) -> Comparison:
    there = set(rows(tried(book), method="single", layer=late(book))["dictionary"])
    rivals = there & {"orthonormal", "components", "unembedding"}
    if not rivals:
        raise ClaimError("No untrained dictionary kept a feature to steer with.")
    best = min(sorted(rivals), key=lambda name: by_dictionary(book, name, "single")["rel_loss"].mean())
    trained, rival = (relative(by_dictionary(book, name, "single")) for name in ("trained", best))
    return over_tasks(trained - rival)


@number
def training_is_needed_more(book: Book) -> Comparison:
    def beyond(name: str) -> pd.Series:
        own, other = (by_dictionary(book, name, method) for method in ("own", "same_activation"))
        return own.groupby("task")["necessity"].mean() - other.groupby("task")["necessity"].mean()

    return over_tasks(beyond("trained") - beyond("orthonormal"))


@number
def features_recur(book: Book) -> Comparison:
    found = recurring(book)
    return over_tasks(found.groupby("task")["cosine"].apply(lambda cosines: (cosines >= RECURS).mean()))


@number
def recurrence_predicts_effect(book: Book) -> Comparison:
    """Rank correlations, so that no one feature decides."""
    found = recurring(book)
    return over_tasks(pd.Series({
        task: part["cosine"].corr(-part["rel_loss"], method="spearman")
        for (task, layer), part in found.groupby(["task", "layer"]) if layer == late(book)
    }))  # fmt: skip


def tried(book: Book) -> pd.DataFrame:
    return book.table("11_dictionaries")


def late(book: Book) -> int:
    """Return the last block where dictionaries are compared."""
    return int(tried(book)["layer"].max())


def early(book: Book) -> int:
    """Return the first one."""
    return int(tried(book).loc[tried(book)["layer"] >= 0, "layer"].min())


def by_dictionary(book: Book, name: str, method: str = "prune_contrast", layer: int | None = None) -> pd.DataFrame:
    """Return the test rows of one dictionary, at the late block if no other is named.

    Pruned vectors keep `Book.k` features; cleaned ones have the penalty that validates best; of single features the one
    that does.
    """
    at = {"dictionary": name, "method": method, "layer": late(book) if layer is None else layer}
    at |= {"k": book.k} if method == "prune_contrast" else {}
    found = rows(tried(book), **at)
    if found.empty:
        raise ClaimError(f"Experiment 11 has no {method} rows of the dictionary {name} at block {at['layer']}.")
    if method == "single":
        found = found.loc[found.groupby(["task", "seed"])["validation_loss"].idxmin()]
    return choose(found) if method == "clean" else found


def fair(book: Book) -> str:
    """Name the trained dictionary that learned from as much text as the frozen ones, if it is there."""
    return "first_seed" if "first_seed" in set(tried(book)["dictionary"]) else "trained"


def recurring(book: Book) -> pd.DataFrame:
    """Return the features of the dictionary `fair` that steered alone, with their best matches in a second seed."""
    alone = rows(tried(book), dictionary=fair(book), method="single")
    found = rows(book.read("stability"), first=fair(book), second="second_seed")
    if found.empty or alone.empty:
        raise ClaimError("No second seed was trained to find the features again in.")
    return alone.merge(found[["layer", "latent", "cosine", "correlation"]], on=["layer", "latent"])
