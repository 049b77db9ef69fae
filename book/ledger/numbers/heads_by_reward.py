"""Experiment 26, heads by reward: sets of heads (layer -1), of latents of a block, and whose activations heads say."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from book.ledger.claims import Book, ClaimError, number, numbers
from nb_utils import statistics
from nb_utils.statistics import Comparison, compare, over_tasks, rows

numbers(
    rewarded_heads_reach_few_shot=lambda book: compare(kept_by(book, "heads_reward"), unset(book, "few_shot")),
    reward_beats_effect=lambda book: compare(kept_by(book, "heads_reward"), kept_by(book, "heads_effect", "equal")),
    reward_beats_swapped=lambda book: compare(kept_by(book, "heads_reward"), kept_by(book, "heads_swapped", "equal")),
    reward_beats_effect_at_its_best=lambda book: compare(kept_by(book, "heads_reward"), kept_by(book, "heads_effect")),
    gradient_finds_heads_too=lambda book: compare(kept_by(book, "heads_gradient"), kept_by(book, "heads_reward")),
    rewarded_heads_recur=lambda book: over_tasks(recurring(book, "heads", "reward")),
    places_do_something=lambda book: compare(kept_by(book, "heads_mask_only", says="others"), unset(book, "zero_shot")),
    heads_need_their_task=lambda book: (
        compare(kept_by(book, "heads_gradient"), kept_by(book, "heads_mask_only", says="others"))
    ),
    wrong_heads_harm=lambda book: compare(kept_by(book, "heads_reward", says="wrong"), unset(book, "zero_shot")),
    activations_decide=lambda book: (
        compare(kept_by(book, "heads_foreign"), kept_by(book, "heads_foreign", says="wrong"))
    ),
    reward_beats_effect_on_latents=lambda book: (
        compare(kept_by(book, "latents_reward"), kept_by(book, "latents_effect", "equal"))
    ),
)


@number
def unseen_set_does_it(book: Book) -> Comparison:
    plain = rows(book.table("26_heads_by_reward"), which="none")
    return over_tasks(statistics.recovered(kept_by(book, "heads_foreign"), plain))


@number
def rewarded_latents_are_no_worse(book: Book) -> Comparison:
    k = book.setting("26_heads_by_reward", "sizes")[0]
    return compare(*(rows(kept_by(book, name, "tuned"), k=k) for name in ("latents_reward", "prune_contrast")))


def kept_by(book: Book, method: str, which: str = "own", says: str = "own") -> pd.DataFrame:
    """Return rows of experiment 26, of latents those after the last block.

    ``which``: a way's "own" number of items, the "equal" one that reward keeps, a number as text, or "tuned" weights.
    ``says``: whose activations, the task's "own", those of "others" or of a "wrong" one.
    """
    found = rows(book.last("26_heads_by_reward"), method=method, which=which, says=says)
    if found.empty:
        raise ClaimError(f"Experiment 26 has no such {method}.")
    return found


def unset(book: Book, method: str) -> pd.DataFrame:
    """Return rows of prompts of experiment 26 in which nothing is set: "zero_shot" or "few_shot"."""
    return rows(book.table("26_heads_by_reward"), method=method, which="none")


def recurring(book: Book, kind: str, way: str) -> pd.Series:
    """Return the share of items that two searches both keep, of those that either keeps; pairs of seeds averaged."""
    found, shares = rows(book.table("26_heads_by_reward_items"), kind=kind, way=way), {}
    for task, part in found.groupby("task"):
        sets = [set(one.loc[one["kept"], ["layer", "item"]].itertuples(index=False, name=None))
                for _, one in part.groupby("seed")]
        if pairs := [pair for pair in combinations(sets, 2) if set.union(*pair)]:
            shares[task] = np.mean([len(a & b) / len(a | b) for a, b in pairs])
    if not shares:
        raise ClaimError(f"Experiment 26 has no two searches for {kind} by {way}.")
    return pd.Series(shares).rename_axis("task")
