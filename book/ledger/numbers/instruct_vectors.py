"""Experiment 25, instruct vectors: intervals are over held-out topics, or over questions about who answers."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number, numbers
from nb_utils.statistics import Comparison, over_tasks, rows

numbers(
    instruct_vectors_answer=lambda book: over_tasks(talked(book, "vectors", blocks="all") - talked(book, "base")),
    instruct_vectors_beat_examples=lambda book: (
        over_tasks(talked(book, "vectors", blocks="all") - talked(book, "few_shot"))
    ),
    instruct_vectors_beat_a_line=lambda book: (
        over_tasks(talked(book, "vectors", blocks="all") - talked(book, "prompt_only"))
    ),
    instruct_vectors_end_the_turn=lambda book: (
        over_tasks(talked(book, "vectors", "p_end", blocks="all") - talked(book, "few_shot", "p_end"))
    ),
    instruct_end_beats_the_lines=lambda book: (
        over_tasks(talked(book, "vectors", "p_end", blocks="all") - talked(book, "few_shot", "p_stop"))
    ),
    instruct_vectors_stay_relevant=lambda book: (
        over_tasks(talked(book, "vectors", "relevant", blocks="all") - talked(book, "base", "relevant"))
    ),
    instruct_one_block_answers=lambda book: over_tasks(gained(book, "vectors", **one_block(book))),
    instruct_random_vectors_fail=lambda book: over_tasks(talked(book, "random") - talked(book, "base")),
    instruct_style_is_most=lambda book: over_tasks(gained(book, "shuffled")),
    instruct_calls_itself_ai=lambda book: over_tasks(says_ai(book, "vectors", blocks="all")),
    instruct_ai_is_in_the_data=lambda book: (
        over_tasks(says_ai(book, "vectors", blocks="all") - says_ai(book, "without_itself"))
    ),
    instruct_a_line_says_ai=lambda book: (
        over_tasks(says_ai(book, "prompt_only") - says_ai(book, "vectors", blocks="all"))
    ),
    instruct_encoding_fails=lambda book: over_tasks(talked(book, "encoded") - talked(book, "base")),
    instruct_latents_answer=lambda book: (
        over_tasks(gained(book, "pruned", like={"blocks": "coded"}, blocks="coded", k=most_latents(book)))
    ),
)


@number
def instruct_one_block_ends(book: Book) -> Comparison:
    one, every = (talked(book, "vectors", "p_end", **way) for way in (one_block(book), {"blocks": "all"}))
    return over_tasks(one - every)


@number
def instruct_latents_end_the_turn(book: Book) -> Comparison:
    sparse = talked(book, "pruned", "p_end", blocks="coded", k=most_latents(book))
    return over_tasks(sparse / talked(book, "vectors", "p_end", blocks="coded").mean())


@number
def instruct_latents_of_one_block_answer(book: Book) -> Comparison:
    way = one_block(book)
    return over_tasks(gained(book, "pruned", like=way, k=most_latents(book), **way))


@number
def instruct_latents_beat_strangers(book: Book) -> Comparison:
    own, random = (talked(book, name, "loss", blocks="coded", k=most_latents(book)) for name in
                   ("pruned", "pruned_random"))
    return over_tasks(own - random)


def talked(book: Book, method: str, column: str = "answer_nll", on: str = "test", **way: object) -> pd.Series:
    """Return one number a held-out topic (of questions about who answers: a question), exchanges and seeds averaged."""
    found = rows(book.read("25_instruct_vectors_exchanges"), method=method, on=on, **way)
    if found.empty:
        raise ClaimError(f"Experiment 25 has no such {method}.")
    return found.groupby("topic")[column].mean()


def gained(book: Book, method: str, like: dict | None = None, **way: object) -> pd.Series:
    """Return which share of what dense vectors take off the loss of answers others take off; one number a topic.

    ``like``: which dense ones, those in all blocks if None. The loss they take off is the mean over topics, so that a
    topic on which they hardly help does not decide.
    """
    dense = talked(book, "vectors", **(like or {"blocks": "all"}))
    base = talked(book, "base")
    if not (whole := float((base - dense).mean())) > 0:
        raise ClaimError("The dense vectors of experiment 25 take nothing off the loss.")
    return (base - talked(book, method, **way)) / whole


def one_block(book: Book) -> dict:
    """Return the way of the vector of one block that validates best."""
    found = rows(book.read("25_instruct_vectors_exchanges"), method="vectors", blocks="one", on="test")
    value = "loss" if book.choices.block == "test" else "validation_loss"
    return {"blocks": "one", "layer": int(found.groupby("layer")[value].mean().idxmin())}


def most_latents(book: Book) -> int:
    """Return the largest number of latents that the vectors of experiment 25 are pruned to."""
    return max(book.setting("25_instruct_vectors", "sizes"))


def says_ai(book: Book, method: str, **way: object) -> pd.Series:
    """Return, for every question about who answers, how often the reply says that it is an AI; seeds averaged."""
    found = rows(book.read("25_instruct_vectors_replies"), method=method, on="itself", **way)
    if found.empty:
        raise ClaimError(f"Experiment 25 has no replies of {method} about itself.")
    return found.groupby("question")["says_ai"].mean()
