"""Experiment 23, visual task vectors: errors are squares of pixels; a share is of what an example takes off them."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, by_task, number, numbers
from nb_utils.statistics import Comparison, over_tasks, rows

VISUAL = "23_visual_task_vectors"
VISUAL_FEW = 20  # latents, of which a pair of vectors is said to consist

numbers(
    wrong_example_is_followed=lambda book: over_tasks(by_task(seen(book, "example_wrong", "follows"), "nearest")),
    visual_heads_replace_the_example=lambda book: over_tasks(regained(book, "reward", values="own")),
    visual_heads_beat_the_example=lambda book: over_tasks(regained(book, "reward", values="own") - 1),
    visual_reward_beats_causes=lambda book: (
        regains_more(book, {"method": "reward", "values": "own"}, {"method": "causal"})
    ),
    visual_reward_beats_greed=lambda book: (
        regains_more(book, {"method": "reward", "values": "own"}, {"method": "greedy"})
    ),
    visual_reward_beats_chance=lambda book: (
        regains_more(book, {"method": "reward", "values": "own"}, {"method": "random"})
    ),
    visual_mask_alone_does_it=lambda book: over_tasks(regained(book, "mask_alone", values="none")),
    visual_found_mask_needs_the_vector=lambda book: (
        regains_more(book, {"method": "reward", "values": "own"}, {"method": "reward", "values": "none"})
    ),
    visual_shared_mask_does_it=lambda book: over_tasks(regained(book, "shared", values="own")),
    visual_foreign_mask_does_it=lambda book: over_tasks(regained(book, "foreign", values="own")),
    visual_vector_decides=lambda book: (
        regains_more(book, {"method": "shared", "values": "own"}, {"method": "shared", "values": "wrong"})
    ),
    visual_wrong_vector_is_followed=lambda book: over_tasks(by_task(seen(book, "shared", "follows"), "nearest")),
    visual_heads_beat_the_residual=lambda book: (
        regains_more(book, {"method": "reward", "values": "own"}, {"method": "residual"})
    ),
    visual_heads_beat_the_mean_answer=lambda book: (
        regains_more(book, {"method": "reward", "values": "own"}, {"method": "mean_answer"})
    ),
    visual_few_latents_do_it=lambda book: over_tasks(regained(book, "prune_contrast", k=VISUAL_FEW)),
    visual_choice_transfers=lambda book: over_tasks(regained(book, "reward", "elsewhere", values="own")),
)


def seen(book: Book, method: str, on: str = "test", **equal: object) -> pd.DataFrame:
    """Return rows of experiment 23; a residual vector stands at the block where it validates best."""
    found = rows(book.read(VISUAL), method=method, on=on, **equal)
    if found.empty:
        raise ClaimError(f"Experiment 23 has no such {method}.")
    if method.startswith("residual"):
        found = found.loc[found.groupby("task")["validation_loss"].idxmin()]
    return found


def regained(book: Book, method: str, on: str = "test", **equal: object) -> pd.Series:
    """Return the share of what an example takes off the error that a method takes off without one, by task."""
    none, best = (by_task(seen(book, name, on), "mse") for name in ("none", "example"))
    return (none - by_task(seen(book, method, on, **equal), "mse")) / (none - best)


def regains_more(book: Book, first: dict, second: dict) -> Comparison:
    """Compare what two methods regain, each as `regained` is asked for it."""
    return over_tasks(regained(book, **first) - regained(book, **second))


@number
def example_is_used(book: Book) -> Comparison:
    right, wrong = (by_task(seen(book, name), "nearest") for name in ("example", "example_wrong"))
    return over_tasks(right - wrong)


@number
def visual_strangers_do_less(book: Book) -> Comparison:
    few = {"k": VISUAL_FEW}
    return regains_more(book, {"method": "prune_contrast", **few}, {"method": "prune_random", **few})
