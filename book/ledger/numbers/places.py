"""Experiment 12, places: after the first of its blocks, where all is tried, unless a number says otherwise."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, by_task, number, numbers
from nb_utils import statistics
from nb_utils.statistics import Comparison, compare, over_tasks, rows

numbers(
    last_token_does_nothing=lambda book: over_tasks(regained(book, placed(book))),
    every_token_over_steers=lambda book: compare(placed(book, tokens="every"), placed(book)),
    every_token_costs_more=lambda book: (
        over_tasks(by_task(placed(book, tokens="every"), "kl") - by_task(placed(book), "kl"))
    ),
    clamping_beats_adding=lambda book: compare(placed(book, mode="clamp"), placed(book)),
    clamping_one_beats_adding_it=lambda book: compare(placed(book, "single", mode="clamp"), placed(book, "single")),
    turning_is_enough=lambda book: compare(placed(book, mode="turn"), placed(book)),
    lengthening_does_nothing=lambda book: over_tasks(regained(book, placed(book, mode="lengthen"))),
    prompting_beats_steering=lambda book: compare(asked(book, "instruction"), placed(book)),
    prompt_and_vector_beat_the_vector=lambda book: compare(placed(book, prompt="instruction"), placed(book)),
    prompt_and_vector_beat_the_prompt=lambda book: (
        compare(placed(book, prompt="instruction"), asked(book, "instruction"))
    ),
    wrong_sign_hurts=lambda book: compare(placed(book, role="wrong_sign"), asked(book, "zero_shot")),
    pruned_does_more_at_equal_cost=lambda book: (
        over_tasks(affordable(book, "prune_contrast") - affordable(book, "centred_best_scale"))
    ),
    vector_overrides_other_examples=lambda book: over_tasks(by_task(placed(book), "others")),
    written_tokens_help_sentences=lambda book: (
        over_tasks(of_sentences(book, "generated") - of_sentences(book, "separator"))
    ),
    fading_helps_sentences=lambda book: (
        over_tasks(of_sentences(book, "generated", decay=fading(book)) - of_sentences(book, "generated"))
    ),
    written_tokens_help_what_is_written=lambda book: (
        over_tasks(written(book, "generated") - written(book, "separator"))
    ),
)


@number
def every_token_over_steers_at_one_scale(book: Book) -> Comparison:
    there = rows(tried(book), method="prune_contrast", tokens="every", mode="add", prompt="zero-shot", on="test")
    scale = there["task"].map(placed(book).set_index("task")["scale"])
    return compare(there[there["scale"].eq(scale)], placed(book))


@number
def examples_leave_something_to_add(book: Book) -> Comparison:
    few = rows(asked(book, "few_shot"), shots=book.setting("12_places", "n_examples"))
    return compare(placed(book, prompt="few-shot"), few)


@number
def several_blocks_beat_one(book: Book) -> Comparison:
    found = rows(tried(book, best=True), method="prune_contrast", tokens="separator", mode="add", prompt="zero-shot",
                 on="test")  # fmt: skip
    together, alone = found[found["together"].gt(1)], rows(found, together=1)
    if together.empty:
        raise ClaimError("Experiment 12 was run at one block.")
    return compare(together, rows(alone, layer=statistics.best_layer(alone)))


def tried(book: Book, **equal: object) -> pd.DataFrame:
    """Return the vectors of experiment 12, each at all scales; the pruned one has the book's number of features."""
    found = rows(book.table("12_places"), role=equal.pop("role", "vector"), **equal)
    if book.k not in set(found["k"].dropna()):
        raise ClaimError(f"Experiment 12 has no vectors of {book.k} features.")
    return found


def placed(
    book: Book, method: str = "prune_contrast", tokens: str = "separator", mode: str = "add", prompt: str = "zero-shot",
    **equal: object,
) -> pd.DataFrame:  # fmt: skip
    """Return the rows of a vector of words on words, at the scale that validates best, after the first block."""
    found = rows(tried(book, best=True, **equal), method=method, tokens=tokens, mode=mode, prompt=prompt, on="test",
                 blocks=str(first_block(book)))  # fmt: skip
    if found.empty:
        raise ClaimError(f"Experiment 12 has not tried {method} vectors so ({mode}, {tokens}, {prompt}).")
    return found


def first_block(book: Book) -> int:
    """Return the block at which experiment 12 tries everything."""
    return int(book.setting("12_places", "layers")[0])


def asked(book: Book, method: str, on: str = "test") -> pd.DataFrame:
    """Return the rows of prompts alone: zero_shot, few_shot, or the instruction that validates best."""
    return rows(book.table("12_places"), role="prompt", method=method, on=on, best=True)


def regained(book: Book, found: pd.DataFrame) -> pd.Series:
    """Return the share of every task's gain from no example to all of them that vectors bring."""
    few = asked(book, "few_shot")
    few = few[few["shots"].eq(few["shots"].max())]
    return statistics.recovered(found, pd.concat([asked(book, "zero_shot"), few]))


def affordable(book: Book, method: str, most: float = 0.5, tokens: str = "separator") -> pd.Series:
    """Return the share of the gain of every task at the scale that validates best of those that cost so little.

    ``most``: KL in ordinary text, nats a token. A vector that is too dear at every scale brings nothing.
    """
    swept = rows(tried(book), method=method, tokens=tokens, mode="add", prompt="zero-shot", on="test",
                 blocks=str(first_block(book)))  # fmt: skip
    cheap = swept[swept["kl"] <= most]
    best = cheap.loc[cheap.groupby("task")["validation_loss"].idxmin()]
    return regained(book, best).reindex(sorted(set(swept["task"]))).fillna(0.0)


def fading(book: Book) -> float:
    """Return the strongest fading of generated tokens that was tried."""
    return min(map(float, book.setting("12_places", "decays")))


def of_sentences(
    book: Book, tokens: str, method: str = "prune_contrast", decay: float = 1.0, made: str = "word",
    prompt: str = "zero-shot",
) -> pd.Series:  # fmt: skip
    """Return every task's loss a token of translated sentences, at the scale that validates best."""
    found = rows(tried(book, best=True), on="sentence", tokens=tokens, method=method, decay=decay, made=made,
                 prompt=prompt)  # fmt: skip
    if found.empty:
        raise ClaimError(f"Experiment 12 has not tried {method} vectors in sentences ({tokens}).")
    return by_task(found, "token_loss")


def written(
    book: Book, tokens: str, method: str = "prune_contrast", decay: float = 1.0, made: str = "word",
    prompt: str = "zero-shot", column: str = "chrf",
) -> pd.Series:  # fmt: skip
    """Return the mean chrF (or share of repeated words) of what is written to every task's sentences."""
    found = rows(book.table("12_places_texts"), tokens=tokens, method=method, decay=decay, made=made, prompt=prompt)
    return by_task(found, column)
