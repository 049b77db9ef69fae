"""Page 13, ground truth: planted worlds, where a task's features are known."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, numbers
from nb_utils.statistics import over_tasks, rows

numbers(
    cleaning_keeps_planted=lambda book: over_tasks(planted(book, "clean", "precision")),
    pruning_finds_planted=lambda book: over_tasks(planted(book, "prune_contrast")),
    pruning_keeps_planted=lambda book: (
        over_tasks(planted(book, "prune_contrast", "precision") - planted(book, "clean", "precision"))
    ),
    loss_tells_planted=lambda book: (
        over_tasks(planted(book, "prune_contrast", "loss") - planted(book, "planted_tuned", "loss"))
    ),
    pruning_finds_more_than_projection=lambda book: (
        over_tasks(planted(book, "prune_contrast") - planted(book, "top_k_projection"))
    ),
    pruning_finds_more_than_pursuit=lambda book: (
        over_tasks(planted(book, "prune_contrast") - planted(book, "nonnegative_omp"))
    ),
    pruning_finds_more_than_contrast=lambda book: (
        over_tasks(planted(book, "prune_contrast") - planted(book, "contrast_codes"))
    ),
    cleaning_finds_fewer=lambda book: (
        over_tasks(planted(book, "clean", "recall") - planted(book, "prune_contrast", "recall"))
    ),
    spoiled_dictionaries_hide=lambda book: (
        over_tasks(planted(book, "prune_contrast", dictionary="spoiled") - planted(book, "prune_contrast"))
    ),
)


def planted(book: Book, method: str, column: str = "f1", dictionary: str = "true") -> pd.Series:
    """Return a measure of every planted task, of vectors of as many latents as the task has features.

    They stand for the centred vector where a method was tried on it. Cleaned ones are of the penalty whose mean F1
    is highest, which favours them.
    """
    found = rows(book.read("13_ground_truth"), method=method, dictionary=dictionary)
    if method == "clean":
        return rows(found, penalty=found.groupby("penalty")["f1"].mean().idxmax()).set_index("task")[column]
    centred = found["of"].eq("centred")
    return found[found["k"].eq(found["features"]) & (centred | ~centred.any())].set_index("task")[column]
