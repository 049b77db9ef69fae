"""The numbers that decide what other people's vectors do: the neighbours, from experiment 20 on."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number
from nb_utils import statistics, tasks
from nb_utils.statistics import Comparison, choose, compare, over_tasks, rows

# 20 Hendel's task vectors: every task stands at the block that its own development cases choose


@number
def theta_keeps_icl(book: Book) -> Comparison:
    return over_tasks(accuracy(hendel(book, "theta")) / accuracy(hendel(book, "few_shot")))


@number
def theta_needs_its_task(book: Book) -> Comparison:
    return over_tasks(accuracy(hendel(book, "zero_mean")))


@number
def theta_needs_the_relation(book: Book) -> Comparison:
    return compare(rows(hendel(book, "theta"), seed=0), hendel(book, "theta_shuffled"))


@number
def theta_window(book: Book) -> Comparison:
    found = rows(book.table("20_hendel"), method="theta", mode="replace", seed=0)
    grid = found.pivot(index="task", columns="layer", values="accuracy")
    inside = grid.columns.isin(window(book))
    if inside.all():
        raise ClaimError("Experiment 20 has no block outside the window.")
    return over_tasks(grid.loc[:, ~inside].max(axis=1) / grid.loc[:, inside].max(axis=1))


@number
def mean_theta_is_better(book: Book) -> Comparison:
    return compare(hendel(book, "theta_mean"), hendel(book, "theta"))


@number
def replacing_is_centring(book: Book) -> Comparison:
    return compare(hendel(book, "centred_best_scale", mode="add"), hendel(book, "theta_mean"))


@number
def theta_overrides_examples(book: Book) -> Comparison:
    return over_tasks(overruled(book, "theta"))


@number
def languages_resist(book: Book) -> Comparison:
    english = [name for name in tasks.names() if name.startswith("en_")]
    found = overruled(book, "theta", lambda frame: frame[frame["task"].isin(english) & frame["rival"].isin(english)])
    return over_tasks(found)


@number
def features_override_examples(book: Book) -> Comparison:
    return over_tasks(overruled(book, "prune_swap", lambda frame: rows(frame, k=book.k)))


@number
def reconstruction_replaces(book: Book) -> Comparison:
    found = coded(book)
    best = blocks(rows(found, method="theta", seed=0), book)
    return compare(*(_at(rows(found, method=method, seed=0), best) for method in ("reconstruct_each", "theta")))


@number
def theta_cleaned_with_ten(book: Book) -> Comparison:
    return compare(in_place(book, "clean", most=10), hendel(book, "theta_mean"))


@number
def five_features_replace(book: Book) -> Comparison:
    return compare(in_place(book, "prune_codes", k=5), hendel(book, "theta_mean"))


@number
def cleaned_in_place_reaches_dense(book: Book) -> Comparison:
    return compare(in_place(book, "clean"), in_place(book, "learned_vector"))


@number
def thetas_tell_tasks_apart(book: Book) -> Comparison:
    found = book.table("20_hendel_spread")
    nearest = statistics.nearest_centroid(rows(found, layer=usual(book)), "codes")
    return over_tasks(nearest.eq(nearest.index.get_level_values("task")).groupby(level="task").mean())


@number
def theta_is_the_books_vector(book: Book) -> Comparison:
    found = rows(coded(book), method="reconstruct", layer=usual(book))
    return over_tasks(found.groupby("task")["shared"].mean())


def hendel(book: Book, method: str, mode: str = "replace") -> pd.DataFrame:
    """Return the test rows of a vector of experiment 20 at each task's own block; of prompts without one as they are.
    """
    found = rows(book.table("20_hendel"), method=method, on="test")
    if method in ("zero_shot", "few_shot"):
        return found
    thetas = rows(book.table("20_hendel"), method="theta", mode="replace", seed=0)
    return _at(rows(found, mode=mode), blocks(thetas, book))


def blocks(thetas: pd.DataFrame, book: Book) -> pd.Series:
    """Return the block of every task: the most accurate on development cases, of equals the earliest."""
    value = -thetas["validation_accuracy"] if book.choices.block != "test" else thetas["loss"]
    grid = thetas.assign(value=value).pivot(index="task", columns="layer", values="value").sort_index(axis=1)
    if book.choices.block == "shared":
        grid = grid * 0 + grid.mean()
    return grid.idxmin(axis=1)


def usual(book: Book) -> int:
    """Return the block with features that most tasks choose."""
    chosen = blocks(rows(coded(book), method="theta", seed=0), book)
    return int(chosen.mode().iloc[0])


def window(book: Book, least: float = 0.5) -> list[int]:
    """Return the blocks where thetas are, over all tasks, at least half as accurate as at the best, on development."""
    found = rows(book.table("20_hendel"), method="theta", mode="replace", seed=0)
    mean = found.groupby("layer")["validation_accuracy"].mean()
    return mean.index[mean >= least * mean.max()].tolist()


def coded(book: Book) -> pd.DataFrame:
    """Return the rows in place of the stream at the blocks where theta is written in features."""
    found = rows(book.table("20_hendel"), mode="replace", on="test")
    return found[found["layer"].isin(found.loc[found["method"].eq("reconstruct"), "layer"].unique())]


def in_place(book: Book, method: str, most: int | None = None, **equal: object) -> pd.DataFrame:
    """Return what was trained in place of the stream, of each task where it validates best, under ``most`` features."""
    found = choose(rows(coded(book), method=method, **equal), most)
    if found.empty:
        raise ClaimError(f"Experiment 20 has no such {method} vectors in place of the stream.")
    value = "loss" if book.choices.block == "test" else "validation_loss"
    return found.loc[found.groupby("task")[value].idxmin()]


def overruled(book: Book, method: str, only=lambda frame: frame) -> pd.Series:
    """Return, a task, the accuracy on the rival's answers less that on those of the examples; rivals averaged."""
    found = only(rows(book.table("20_hendel_conflict"), method=method))
    if found.empty:
        raise ClaimError(f"Experiment 20 has no such {method} vectors against examples.")
    grid = found.pivot_table(index=["task", "rival"], columns="on", values="accuracy")
    return (grid["rival"] - grid["demonstrations"]).groupby("task").mean()


def accuracy(frame: pd.DataFrame) -> pd.Series:
    return frame.groupby("task")["accuracy"].mean()


def _at(frame: pd.DataFrame, chosen: pd.Series) -> pd.DataFrame:
    return frame[frame["layer"].eq(frame["task"].map(chosen))]


# 24 Grown vectors: small models of which it is known where a vector should be. Each model counts as a task.

GROWN = "24_grown_vectors"
FEW = 8  # latents, of which a vector is said to consist


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
def vector_carries_it_all(book: Book) -> Comparison:
    return over_tasks(with_examples(book, "grown") - grown_vector(book, "grown"))


@number
def vector_decides(book: Book) -> Comparison:
    found = _grown(book, "grown", method="swapped", on="other")
    return over_tasks(_share(found[found["layer"].eq(found["grown_at"])]))


@number
def growing_costs(book: Book) -> Comparison:
    return over_tasks(with_examples(book, "grown") - with_examples(book, "plain"))


@number
def growing_helps_held_out(book: Book) -> Comparison:
    return over_tasks(with_examples(book, "grown", "held_out") - with_examples(book, "plain", "held_out"))


@number
def growing_helps_noise(book: Book) -> Comparison:
    parts = [with_examples(book, "grown", on) - with_examples(book, "plain", on) for on in noise(book)]
    return over_tasks(sum(parts) / len(parts))


@number
def growing_helps_longer(book: Book) -> Comparison:
    return over_tasks(with_examples(book, "grown", "longer") - with_examples(book, "plain", "longer"))


@number
def skill_apart_growing_helps(book: Book) -> Comparison:
    parts = pd.DataFrame({on: at_equal_skill(book, on) for on in ("held_out", "longer", *noise(book))})
    return over_tasks(parts.mean(axis=1))


@number
def few_latents_are_the_vector(book: Book) -> Comparison:
    return over_tasks(written(book, "largest_codes", k=FEW) / written(book, "mean"))


@number
def the_vector_is_one_feature(book: Book) -> Comparison:
    return over_tasks(written(book, "prune_contrast", k=1) / written(book, "mean"))


@number
def pruning_recovers_the_vector(book: Book) -> Comparison:
    return over_tasks(written(book, "prune_contrast", k=FEW) - written(book, "mean"))


@number
def cleaning_recovers_the_vector(book: Book) -> Comparison:
    return over_tasks(written(book, "clean") - written(book, "mean"))


@number
def strangers_do_less(book: Book) -> Comparison:
    return over_tasks(written(book, "prune_random", k=FEW) - written(book, "prune_contrast", k=FEW))


@number
def nothing_is_pruned_from_nothing(book: Book) -> Comparison:
    found = _grown(book, "plain", method="prune_contrast", on="test", k=FEW)
    return over_tasks(_beyond_chance(found))


@number
def nothing_is_learned_where_nothing_is(book: Book) -> Comparison:
    return over_tasks(_beyond_chance(_grown(book, "plain", method="learned_vector", on="test")))
