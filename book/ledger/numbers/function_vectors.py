"""Experiment 21, function vectors: heads are chosen on the other tasks; number, block and scale on validation."""

from __future__ import annotations

import numpy as np
import pandas as pd

from book.ledger.claims import Book, ClaimError, accuracy, named, number, numbers
from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.statistics import Comparison, compare, over_tasks, rows

SECOND = "smollm2-135m-instruct"  # the model that says whether what heads do is the book's model's own
# What the tokens up to a query's separator belong to, as a picture names it.
PARTS = {
    "output": "examples' outputs", "input": "inputs", "arrow": "arrows", "newline": "line breaks", "query": "the query",
    "itself": "the separator itself", "first": "the first token",
}  # fmt: skip

named(many_heads=lambda book: many_heads(book), few_heads=lambda book: few_heads(book))

numbers(
    one_head_carries=lambda book: over_tasks(closed_by_one(book.table("21_heads"))),
    one_head_elsewhere=lambda book: over_tasks(closed_by_one(tables.load("21_heads", SECOND, book.folder))),
    literal_vector_fails=lambda book: (
        compare(headed(book, "fv_literal", k=many_heads(book)), headed(book, "zero_shot"))
    ),
    fv_below_centred=lambda book: compare(headed(book, "centred_best_scale"), headed(book, "fv_centred")),
    fv_leaves_the_template=lambda book: (
        over_tasks(in_sentences(book, "centred_best_scale") - in_sentences(book, "fv_centred"))
    ),
    fv_composes=lambda book: over_tasks(composes(book, "fv_centred")),
    composing_beats_parts=lambda book: beyond_parts(book, "fv_centred"),
    collapsing_costs=lambda book: compare(headed(book, "fv_centred"), headed(book, "heads_added")),
    chosen_heads_beat_random=lambda book: compare(headed(book, "fv_centred"), headed(book, "fv_random_heads")),
    heads_wake_executors=lambda book: over_tasks(moved(book, "woken") - moved(book, "woken", random=True)),
    executors_are_singled_out=lambda book: over_tasks(moved(book, "woken") - moved(book, "woken", kind="rising")),
    heads_silence_executors=lambda book: over_tasks(moved(book, "silenced") - moved(book, "silenced", random=True)),
)


@number
def heads_are_shared(book: Book) -> Comparison:
    first = first_heads(book.table("21_heads"))
    return over_tasks(first.eq(first.mode().iloc[0]).astype(float))


@number
def first_head_reads_outputs(book: Book) -> Comparison:
    mean, looks = _effects(book.table("21_heads")), book.table("21_heads_attention")
    if mean.shape[1] < 2:
        raise ClaimError("Experiment 21 has no two tasks, so no head that others put first.")
    at = looks.set_index(["task", "layer", "head"])["output"]
    return over_tasks(pd.Series({task: at[task, *_first_elsewhere(mean, task)] for task in mean}).rename_axis("task"))


@number
def fv_does_the_task(book: Book) -> Comparison:
    plain = rows(book.table("21_function_vectors"), on="test", which="none")
    return over_tasks(statistics.recovered(headed(book, "fv_centred"), plain))


@number
def two_heads_are_needed(book: Book) -> Comparison:
    without = headed(book, "heads_removed", on="few_shot", k=few_heads(book))
    return over_tasks(accuracy(without) / accuracy(headed(book, "few_shot")))


@number
def fv_prunes_to_the_same(book: Book) -> Comparison:
    k = pruned_size(book)
    return over_tasks(in_common(book, f"prune_fv_{k}", f"prune_contrast_{k}"))


@number
def fv_prunes_as_well(book: Book) -> Comparison:
    k = pruned_size(book)
    return compare(*(headed(book, name, which="block", k=k) for name in ("prune_fv", "prune_contrast")))


def first_heads(effects: pd.DataFrame) -> pd.Series:
    """Return the strongest head of every task, as text."""
    mean = rows(effects, method="head").groupby(["task", "layer", "head"])["effect"].mean()
    return mean.groupby("task").idxmax().map(lambda found: f"block {int(found[1])} head {int(found[2])}")


def closed_by_one(effects: pd.DataFrame, least: float = 0.1) -> pd.Series:
    """Return the share of the gap between swapped and right answers that one head closes, of tasks with a gap.

    The head is the one with the largest mean effect on all other tasks.
    """
    mean = _effects(effects)
    level = effects.pivot_table(index="task", columns="method", values="p")
    gap = level["few_shot"] - level["shuffled"]
    if len(gap) < 2 or not (gap > least).any():
        raise ClaimError("Experiment 21 has no two tasks of that model, or none that swapped answers cost anything.")
    shares = {task: mean.loc[_first_elsewhere(mean, task), task] / gap[task] for task in mean if gap[task] > least}
    return pd.Series(shares).rename_axis("task")


def _effects(effects: pd.DataFrame) -> pd.DataFrame:
    """Return mean effects of heads (layer, head), a column a task."""
    return rows(effects, method="head").groupby(["task", "layer", "head"])["effect"].mean().unstack("task")


def _first_elsewhere(mean: pd.DataFrame, task: str) -> tuple[int, int]:
    """Return the head with the largest mean effect on all other tasks."""
    return mean.drop(columns=task).mean(axis=1).idxmax()


def headed(book: Book, method: str, on: str = "test", which: str = "best", k: int | None = None) -> pd.DataFrame:
    """Return rows of experiment 21: of vectors and heads of a number of heads, of prompts as they are.

    ``k``: None takes, for every task, the number that validates best.
    """
    found = rows(book.table("21_function_vectors"), method=method, on=on)
    if method in ("zero_shot", "few_shot"):
        return rows(found, which="none")
    found = rows(found, which=which)
    found = _validated(found) if k is None else rows(found, k=k)
    if found.empty:
        raise ClaimError(f"Experiment 21 has no such {method}.")
    return found


def in_sentences(book: Book, method: str) -> pd.Series:
    """Return the mean loss of a task over sentences without an arrow, with the heads that validate best there."""
    found = book.table("21_function_vectors")
    found = rows(found[found["on"].str.startswith("text_")], method=method, which="best")
    return _validated(found).groupby("task")["loss"].mean()


def lists(book: Book, method: str, which: str) -> pd.DataFrame:
    """Return rows of lists whose last item is to be answered, of tasks that examples make the model do there.

    ``which``: how the vector was made, "none" for prompts as they are.
    """
    found = rows(book.table("21_function_vectors"), on="list")
    done = statistics.solved(found.assign(on="test")) if len(found) else pd.Series(dtype=bool)
    if not done.any():
        raise ClaimError("Experiment 21 has no task whose lists the model answers with examples.")
    return rows(found[found["task"].map(done)], method=method, which=which)


def composes(book: Book, method: str) -> pd.Series:
    """Return what share of the gain of a vector that was made for it one by algebra has, of tasks with such a gain."""
    zero, direct, made = (
        lists(book, name, which).set_index("task")["loss"]
        for name, which in (("zero_shot", "none"), (method, "direct"), (method, "composed"))
    )
    return ((zero - made) / (zero - direct))[zero - direct > 0.5]


def beyond_parts(book: Book, method: str) -> Comparison:
    """Return the loss of the composed vector less that of the part, or plain sum, that validates best."""
    parts = pd.concat([lists(book, method, which) for which in ("summed", "part_answer", "part_last")])
    return compare(lists(book, method, "composed"), _validated(parts))


def _validated(found: pd.DataFrame) -> pd.DataFrame:
    """Return, for every task, the rows of the lowest validation loss; those of all draws where there are several."""
    least = found.groupby(["task", "seed"])["validation_loss"].transform("min")
    return found[found["validation_loss"].eq(least)]


def moved(
    book: Book, what: str, kind: str = "executor", random: bool = False, k: int | None = None
) -> pd.Series:
    """Return the share of the rise of a task's features that heads wake in zero-shot prompts, or silence in few-shot.
    """
    found = rows(book.table("21_function_vectors_features"), kind=kind, k=many_heads(book) if k is None else k)
    found = rows(found, layer=found["layer"].max())
    found = found[found["heads"].str.startswith("random") if random else found["heads"].eq("chosen")]
    total = found.groupby("task")[["zero", "few", "woken", "silenced"]].sum()
    part = total["woken"] - total["zero"] if what == "woken" else total["few"] - total["silenced"]
    return (part / (total["few"] - total["zero"])).replace([np.inf, -np.inf], np.nan).dropna()


def in_common(book: Book, one: str, other: str) -> pd.Series:
    """Return how many features two vectors share, of the largest twenty of each; one number a task."""
    found = book.table("21_function_vectors_codes")
    found = rows(found, layer=found["layer"].max())
    sets = {name: rows(found, method=name).groupby("task")["latent"].agg(set) for name in (one, other)}
    return pd.Series({task: len(sets[one][task] & sets[other][task]) for task in sets[one].index}).rename_axis("task")


def pruned_size(book: Book) -> int:
    """Return the size at which pruned function vectors are compared: the largest of at most twenty features."""
    return max(size for size in book.setting("21_function_vectors", "sizes") if size <= 20)


def many_heads(book: Book) -> int:
    """Return how many heads the larger function vector has."""
    return int(book.setting("21_function_vectors", "many"))


def few_heads(book: Book) -> int:
    """Return how many the smaller one has."""
    return int(book.setting("21_function_vectors", "few"))
