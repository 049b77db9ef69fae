"""The numbers that decide whether what is found is real: experiments 06 to 09."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, number, numbers, relative
from nb_utils import statistics
from nb_utils.statistics import Comparison, compare, over_tasks, rows

# 06 Training prompts

numbers(
    more_prompts_help=lambda book: compare(book.trained("all"), book.trained("24")),
    early_choice_helps=lambda book: compare(book.trained("24"), book.trained("24", choice="train")),
    early_choice_still_helps=lambda book: compare(book.trained("all"), book.trained("all", choice="train")),
)


# 07 Illusion test

numbers(
    rule_beats_random=lambda book: compare(book.support("rule"), book.support("random_matched")),
    rule_beats_random_on_arrows=lambda book: compare(book.support("rule"), book.support("random_active")),
    rule_beats_random_longer=lambda book: compare(book.longer("rule"), book.longer("random_matched")),
    cleaning_beats_rule=lambda book: compare(book.support("prune_contrast"), book.support("rule")),
    tuning_flatters_chance=lambda book: (
        over_tasks(book.recovered("random_matched") - book.recovered("random_matched", "fitted"))
    ),
)


@number
def supports_agree(book: Book) -> Comparison:
    found = book.last("07_illusion_features")
    found = book.sized(found[found["method"].isin(["rule", "prune_contrast"])], "07")
    shared = {task: statistics.overlap(one).loc["rule", "prune_contrast"] for task, one in found.groupby("task")}
    return over_tasks(pd.Series(shared))


# 08 Side effects


@number
def wrong_vectors_do_less(book: Book) -> Comparison:
    first = rows(book.side_pruned, seed=0)  # others are tried on their own task only
    grid = statistics.crossed(pd.concat([first, rows(book.side, method="zero_shot")]))
    square = grid[grid.index]
    own = pd.Series({task: square.loc[task, task] for task in square})
    return over_tasks(own - (square.sum() - own) / (len(square) - 1))


@number
def relation_matters(book: Book) -> Comparison:
    true, shuffled = (rows(book.side, method=m, on="test") for m in ("centred_best_scale", "shuffled_labels"))
    return over_tasks(relative(true) - relative(shuffled))


@number
def pruning_is_gentler_in_text(book: Book) -> Comparison:
    pruned, cleaned = (rows(part, on="separator") for part in (book.side_pruned, rows(book.side, method="clean")))
    return over_tasks(pruned.groupby("task")["d_ntp"].mean() - cleaned.groupby("task")["d_ntp"].mean())


# 09 Templates

numbers(
    pruned_leaves_its_template=lambda book: (
        over_tasks(book.templates("prune_contrast", home=False) / book.templates("prune_contrast", home=True))
    ),
)
