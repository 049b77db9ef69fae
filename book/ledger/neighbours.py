"""The numbers that decide what other people's vectors do: the neighbours, from experiment 20 on."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from book.ledger.claims import Book, ClaimError, number
from nb_utils import statistics, tasks
from nb_utils.record import tables
from nb_utils.statistics import Comparison, choose, compare, over_tasks, rows

SECOND = "smollm2-135m-instruct"  # the model that says whether what heads do is the book's model's own

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


# 21 Function vectors: heads are chosen on the other tasks, how many, where and how strong on validation prompts


@number
def one_head_carries(book: Book) -> Comparison:
    return over_tasks(closed_by_one(book.table("21_heads")))


@number
def heads_are_shared(book: Book) -> Comparison:
    first = first_heads(book.table("21_heads"))
    return over_tasks(first.eq(first.mode().iloc[0]).astype(float))


@number
def one_head_elsewhere(book: Book) -> Comparison:
    return over_tasks(closed_by_one(tables.load("21_heads", SECOND, book.folder)))


@number
def literal_vector_fails(book: Book) -> Comparison:
    return compare(headed(book, "fv_literal", k=book.many_heads), headed(book, "zero_shot"))


@number
def fv_does_the_task(book: Book) -> Comparison:
    plain = rows(book.table("21_function_vectors"), on="test", which="none")
    return over_tasks(statistics.recovered(headed(book, "fv_centred"), plain))


@number
def fv_below_centred(book: Book) -> Comparison:
    return compare(headed(book, "centred_best_scale"), headed(book, "fv_centred"))


@number
def fv_leaves_the_template(book: Book) -> Comparison:
    return over_tasks(in_sentences(book, "centred_best_scale") - in_sentences(book, "fv_centred"))


@number
def collapsing_costs(book: Book) -> Comparison:
    return compare(headed(book, "fv_centred"), headed(book, "heads_added"))


@number
def chosen_heads_beat_random(book: Book) -> Comparison:
    return compare(headed(book, "fv_centred"), headed(book, "fv_random_heads"))


@number
def two_heads_are_needed(book: Book) -> Comparison:
    without = headed(book, "heads_removed", on="few_shot", k=book.few_heads)
    return over_tasks(accuracy(without) / accuracy(headed(book, "few_shot")))


@number
def heads_wake_executors(book: Book) -> Comparison:
    return over_tasks(moved(book, "woken") - moved(book, "woken", random=True))


@number
def executors_are_singled_out(book: Book) -> Comparison:
    return over_tasks(moved(book, "woken") - moved(book, "woken", kind="rising"))


@number
def heads_silence_executors(book: Book) -> Comparison:
    return over_tasks(moved(book, "silenced") - moved(book, "silenced", random=True))


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
    mean = rows(effects, method="head").groupby(["task", "layer", "head"])["effect"].mean().unstack("task")
    level = effects.pivot_table(index="task", columns="method", values="p")
    gap = level["few_shot"] - level["shuffled"]
    if len(gap) < 2 or not (gap > least).any():
        raise ClaimError("Experiment 21 has no two tasks of that model, or none that swapped answers cost anything.")
    others = {task: mean.drop(columns=task).mean(axis=1).idxmax() for task in mean}
    shares = {task: mean.loc[others[task], task] / gap[task] for task in mean if gap[task] > least}
    return pd.Series(shares).rename_axis("task")


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


def _validated(found: pd.DataFrame) -> pd.DataFrame:
    """Return, for every task, the rows of the lowest validation loss; those of all draws where there are several."""
    least = found.groupby(["task", "seed"])["validation_loss"].transform("min")
    return found[found["validation_loss"].eq(least)]


def moved(
    book: Book, what: str, kind: str = "executor", random: bool = False, k: int | None = None
) -> pd.Series:
    """Return the share of the rise of a task's features that heads wake in zero-shot prompts, or silence in few-shot.
    """
    found = rows(book.table("21_function_vectors_features"), kind=kind, k=book.many_heads if k is None else k)
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


# 22 In-context vectors: behaviours and word tasks are judged apart

COST = 0.3  # nats a token of ordinary prose: what a vector that steers every token may cost where it is judged


@number
def icv_is_the_mean(book: Book) -> Comparison:
    found = book.read("22_in_context_vectors_component")
    return over_tasks(rows(found, pairs=found["pairs"].max()).set_index("task")["off_mean"])


@number
def icv_shifts_behaviour(book: Book) -> Comparison:
    return over_tasks(_of_tasks(steering(book, "icv", "behaviour"), "effect"))


@number
def icv_beats_fv_at_equal_cost(book: Book) -> Comparison:
    found = (steering(book, method, "behaviour", least=COST) for method in ("icv", "fv_centred"))
    return over_tasks(_difference(*found, "effect"))


@number
def icv_beats_fv_on_behaviour(book: Book) -> Comparison:
    top, bottom = steering(book, "icv", "behaviour"), steering(book, "fv_centred", "behaviour", arrow=True)
    return over_tasks(_difference(top, bottom, "preference"))


@number
def icv_beats_fv_on_behaviour_elsewhere(book: Book) -> Comparison:
    top, bottom = steering(book, "icv", "behaviour"), steering(book, "fv_centred", "behaviour")
    return over_tasks(_difference(top, bottom, "preference"))


@number
def icv_loses_on_tasks(book: Book) -> Comparison:
    top = steering(book, "icv", "word", most=float("inf"))
    return over_tasks(_difference(top, steering(book, "fv_centred", "word", arrow=True), "loss"))


@number
def icv_shares_no_features(book: Book) -> Comparison:
    return over_tasks(shared_features(book, "mean_difference", "centred"))


@number
def icv_shares_as_many_as_chance(book: Book) -> Comparison:
    first, chance = (shared_features(book, "centred", other) for other in ("mean_difference", "matched_random"))
    return over_tasks(first - chance)


@number
def twenty_features_shift(book: Book) -> Comparison:
    found = (steering(book, method, "behaviour", least=COST) for method in ("prune_difference", "mean_difference"))
    return over_tasks(_difference(*found, "effect"))


@number
def icv_strength_does_not_travel(book: Book) -> Comparison:
    found = book.read("22_in_context_vectors")
    named = found[found["budget"].isna()]  # the others have the strength that costs so much
    return over_tasks(_of_tasks(rows(named, method="icv", place="mlp", strength=0.1), "kl"))


def steering(
    book: Book, method: str, kind: str, arrow: bool = False, most: float = COST, least: float = 0.0
) -> pd.DataFrame:
    """Return the rows of a method of experiment 22, each task at the place, block and cost where it validates best.

    ``kind``: "behaviour" or "word". ``arrow``: at the arrow alone; else at every token, at a cost between ``least`` and
    ``most``. The choice is made with the first seed. Gains a column ``preference``: by how many nats a token the
    rewritten y is likelier than x behind the arrow. Raises ClaimError if there is no such row.
    """
    found = rows(book.read("22_in_context_vectors"), method=method, kind=kind)
    found = found[found["place"].eq("arrow") if arrow else found["budget"].between(least, most)]
    found = found[found["pairs"].isna() | found["pairs"].eq(found["pairs"].max())]
    if found.empty:
        raise ClaimError(f"Experiment 22 has no {method} vectors of kind {kind} that cost so much.")
    value = "loss_y" if kind == "behaviour" else "loss"
    value = value if book.choices.block == "test" else "validation_loss"
    first = rows(found, seed=0)
    key = ["task", "place", "layer", "budget"]
    found = found.merge(first.loc[first.groupby("task")[value].idxmin(), key], on=key)
    return found.assign(preference=found["loss_x"] - found["loss_y"]) if "loss_x" in found else found


def shared_features(book: Book, *pair: str) -> pd.Series:
    """Return, a task, how many of the largest features two vectors of the last block share."""
    found = book.read("22_in_context_vectors_features")
    found = found[found["layer"].eq(found["layer"].max())]
    of = found.groupby(["task", "vector"])["latent"].agg(set)
    return pd.Series({task: len(of[task, pair[0]] & of[task, pair[1]]) for task in of.index.get_level_values("task")})


def _of_tasks(frame: pd.DataFrame, column: str) -> pd.Series:
    if frame.empty:
        raise ClaimError(f"Experiment 22 has no such rows with {column}.")
    return frame.groupby("task")[column].mean()


def _difference(first: pd.DataFrame, second: pd.DataFrame, column: str) -> pd.Series:
    return _of_tasks(first, column) - _of_tasks(second, column)
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


# 26 Heads by reward: sets of heads (layer -1) and of latents of a block, and whose activations heads say


@number
def rewarded_heads_reach_few_shot(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_reward"), unset(book, "few_shot"))


@number
def reward_beats_effect(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_reward"), kept_by(book, "heads_effect", "equal"))


@number
def reward_beats_swapped(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_reward"), kept_by(book, "heads_swapped", "equal"))


@number
def reward_beats_effect_at_its_best(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_reward"), kept_by(book, "heads_effect"))


@number
def gradient_finds_heads_too(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_gradient"), kept_by(book, "heads_reward"))


@number
def rewarded_heads_recur(book: Book) -> Comparison:
    return over_tasks(recurring(book, "heads", "reward"))


@number
def places_do_something(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_mask_only", says="others"), unset(book, "zero_shot"))


@number
def heads_need_their_task(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_gradient"), kept_by(book, "heads_mask_only", says="others"))


@number
def wrong_heads_harm(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_reward", says="wrong"), unset(book, "zero_shot"))


@number
def unseen_set_does_it(book: Book) -> Comparison:
    plain = rows(book.table("26_heads_by_reward"), which="none")
    return over_tasks(statistics.recovered(kept_by(book, "heads_foreign"), plain))


@number
def activations_decide(book: Book) -> Comparison:
    return compare(kept_by(book, "heads_foreign"), kept_by(book, "heads_foreign", says="wrong"))


@number
def reward_beats_effect_on_latents(book: Book) -> Comparison:
    return compare(kept_by(book, "latents_reward"), kept_by(book, "latents_effect", "equal"))


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
# 23 Visual task vectors: errors are mean squares of pixels, and a share is of what an example takes off them

VISUAL = "23_visual_task_vectors"
VISUAL_FEW = 20  # latents, of which a pair of vectors is said to consist


def seen(book: Book, method: str, on: str = "test", **equal: object) -> pd.DataFrame:
    """Return rows of experiment 23; a residual vector stands at the block where it validates best."""
    found = rows(book.read(VISUAL), method=method, on=on, **equal)
    if found.empty:
        raise ClaimError(f"Experiment 23 has no such {method}.")
    if method.startswith("residual"):
        found = found.loc[found.groupby("task")["validation_loss"].idxmin()]
    return found


def by_visual_task(found: pd.DataFrame, column: str = "mse") -> pd.Series:
    return found.groupby("task", sort=False)[column].mean()


def regained(book: Book, method: str, on: str = "test", **equal: object) -> pd.Series:
    """Return the share of what an example takes off the error that a method takes off without one, by task."""
    none, best = (by_visual_task(seen(book, name, on)) for name in ("none", "example"))
    return (none - by_visual_task(seen(book, method, on, **equal))) / (none - best)


def regains_more(book: Book, first: dict, second: dict) -> Comparison:
    """Compare what two methods regain, each as `regained` is asked for it."""
    return over_tasks(regained(book, **first) - regained(book, **second))


@number
def example_is_used(book: Book) -> Comparison:
    right, wrong = (by_visual_task(seen(book, name), "nearest") for name in ("example", "example_wrong"))
    return over_tasks(right - wrong)


@number
def wrong_example_is_followed(book: Book) -> Comparison:
    return over_tasks(by_visual_task(seen(book, "example_wrong", "follows"), "nearest"))


@number
def visual_heads_replace_the_example(book: Book) -> Comparison:
    return over_tasks(regained(book, "reward", values="own"))


@number
def visual_heads_beat_the_example(book: Book) -> Comparison:
    return over_tasks(regained(book, "reward", values="own") - 1)


@number
def visual_reward_beats_causes(book: Book) -> Comparison:
    return regains_more(book, {"method": "reward", "values": "own"}, {"method": "causal"})


@number
def visual_reward_beats_greed(book: Book) -> Comparison:
    return regains_more(book, {"method": "reward", "values": "own"}, {"method": "greedy"})


@number
def visual_reward_beats_chance(book: Book) -> Comparison:
    return regains_more(book, {"method": "reward", "values": "own"}, {"method": "random"})


@number
def visual_mask_alone_does_it(book: Book) -> Comparison:
    return over_tasks(regained(book, "mask_alone", values="none"))


@number
def visual_found_mask_needs_the_vector(book: Book) -> Comparison:
    return regains_more(book, {"method": "reward", "values": "own"}, {"method": "reward", "values": "none"})


@number
def visual_shared_mask_does_it(book: Book) -> Comparison:
    return over_tasks(regained(book, "shared", values="own"))


@number
def visual_foreign_mask_does_it(book: Book) -> Comparison:
    return over_tasks(regained(book, "foreign", values="own"))


@number
def visual_vector_decides(book: Book) -> Comparison:
    return regains_more(book, {"method": "shared", "values": "own"}, {"method": "shared", "values": "wrong"})


@number
def visual_wrong_vector_is_followed(book: Book) -> Comparison:
    return over_tasks(by_visual_task(seen(book, "shared", "follows"), "nearest"))


@number
def visual_heads_beat_the_residual(book: Book) -> Comparison:
    return regains_more(book, {"method": "reward", "values": "own"}, {"method": "residual"})


@number
def visual_heads_beat_the_mean_answer(book: Book) -> Comparison:
    return regains_more(book, {"method": "reward", "values": "own"}, {"method": "mean_answer"})


@number
def visual_few_latents_do_it(book: Book) -> Comparison:
    return over_tasks(regained(book, "prune_contrast", k=VISUAL_FEW))


@number
def visual_strangers_do_less(book: Book) -> Comparison:
    few = {"k": VISUAL_FEW}
    return regains_more(book, {"method": "prune_contrast", **few}, {"method": "prune_random", **few})


@number
def visual_choice_transfers(book: Book) -> Comparison:
    return over_tasks(regained(book, "reward", "elsewhere", values="own"))
# 25 Instruct vectors: intervals are over held-out topics, or over questions about who answers


@number
def instruct_vectors_answer(book: Book) -> Comparison:
    return over_tasks(talked(book, "vectors", blocks="all") - talked(book, "base"))


@number
def instruct_vectors_beat_examples(book: Book) -> Comparison:
    return over_tasks(talked(book, "vectors", blocks="all") - talked(book, "few_shot"))


@number
def instruct_vectors_beat_a_line(book: Book) -> Comparison:
    return over_tasks(talked(book, "vectors", blocks="all") - talked(book, "prompt_only"))


@number
def instruct_vectors_end_the_turn(book: Book) -> Comparison:
    return over_tasks(talked(book, "vectors", "p_end", blocks="all") - talked(book, "few_shot", "p_end"))


@number
def instruct_end_beats_the_lines(book: Book) -> Comparison:
    return over_tasks(talked(book, "vectors", "p_end", blocks="all") - talked(book, "few_shot", "p_stop"))


@number
def instruct_vectors_stay_relevant(book: Book) -> Comparison:
    return over_tasks(talked(book, "vectors", "relevant", blocks="all") - talked(book, "base", "relevant"))


@number
def instruct_one_block_answers(book: Book) -> Comparison:
    return over_tasks(gained(book, "vectors", **one_block(book)))


@number
def instruct_one_block_ends(book: Book) -> Comparison:
    one, every = (talked(book, "vectors", "p_end", **way) for way in (one_block(book), {"blocks": "all"}))
    return over_tasks(one - every)


@number
def instruct_random_vectors_fail(book: Book) -> Comparison:
    return over_tasks(talked(book, "random") - talked(book, "base"))


@number
def instruct_style_is_most(book: Book) -> Comparison:
    return over_tasks(gained(book, "shuffled"))


@number
def instruct_calls_itself_ai(book: Book) -> Comparison:
    return over_tasks(says_ai(book, "vectors", blocks="all"))


@number
def instruct_ai_is_in_the_data(book: Book) -> Comparison:
    return over_tasks(says_ai(book, "vectors", blocks="all") - says_ai(book, "without_itself"))


@number
def instruct_a_line_says_ai(book: Book) -> Comparison:
    return over_tasks(says_ai(book, "prompt_only") - says_ai(book, "vectors", blocks="all"))


@number
def instruct_encoding_fails(book: Book) -> Comparison:
    return over_tasks(talked(book, "encoded") - talked(book, "base"))


@number
def instruct_latents_end_the_turn(book: Book) -> Comparison:
    sparse = talked(book, "pruned", "p_end", blocks="coded", k=most_latents(book))
    return over_tasks(sparse / talked(book, "vectors", "p_end", blocks="coded").mean())


@number
def instruct_latents_answer(book: Book) -> Comparison:
    return over_tasks(gained(book, "pruned", like={"blocks": "coded"}, blocks="coded", k=most_latents(book)))


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


# 29 Which vector: every way after its own block, as who has few pairs makes it and as who has a hundred does

WHICH = "29_which_vector"
LEGIBLE = 20  # features that somebody may read one by one
GENTLE = 0.5  # nats of KL in ordinary text
SIZED = ("few_shot", "contrast_codes", "prune_contrast")  # their k is what they are, not a setting
CONTROLS = ("zero_shot", "matched_random")


def ways(book: Book, on: str = "test") -> pd.DataFrame:
    """Return the rows of all ways at the places whose names begin so, each after its own block; ``way`` names it."""
    found = book.table(WHICH)
    found = found[found["on"].str.startswith(on)]
    size = ("_" + found["k"].astype(str)).where(found["method"].isin(SIZED), "")
    replaced = found["mode"].eq("replace").map({True: "_replaced", False: ""})
    found = found.assign(way=found["method"] + replaced + size + "_of_" + found["budget"].astype(str))
    if book.choices.block == "test" and on == "test":
        return found[found["loss"].eq(found.groupby(["task", "way", "seed"])["loss"].transform("min"))]
    return found[found["own"]]


def without_vector(book: Book, on: str = "test") -> pd.DataFrame:
    """Return the rows of prompts without examples, and behind as many as the book takes."""
    found = ways(book, on)
    shown = found["method"].eq("few_shot") & found["budget"].eq(found["budget"].max())
    return found[found["method"].eq("zero_shot") | shown]


def allowed(book: Book, user: str, prompts: bool = False) -> list[str]:
    """Name the ways that a user may take, of those that were made on every task.

    ``user``: has "few" pairs and no gradient, has a "hundred" pairs, or of these asks for "legible" features alone, or
    for what is "gentle" to other text. ``prompts``: also ways that make a prompt longer.
    """
    found = ways(book)
    found = found[~found["method"].isin(CONTROLS)]
    mean = found.groupby("way")[["budget", "gradients", "stored", "l0", "tokens"]].mean()
    may = found.groupby("way")["task"].nunique().eq(found["task"].nunique())  # made on every task
    may &= prompts | mean["tokens"].le(mean["tokens"].min())
    if user == "few":
        may &= mean["budget"].lt(mean["budget"].max()) & mean["gradients"].eq(0)
    if user == "legible":
        may &= mean["l0"].le(LEGIBLE)
    if user == "gentle":
        may &= ways(book, "text").groupby("way")["d_ntp"].mean().reindex(mean.index).le(GENTLE)
    return mean.index[may].tolist()


def advised(book: Book, user: str, prompts: bool = False) -> tuple[str, list[str]]:
    """Return the way with the lowest mean loss that a user may take, and those that the table cannot tell from it."""
    found = ways(book)
    mean = found.groupby(["way", "task"])["loss"].mean().groupby("way").mean()[allowed(book, user, prompts)]
    best = mean.idxmin()
    rest = mean.drop(best).sort_values().index
    return best, [way for way in rest if compare(rows(found, way=way), rows(found, way=best)).low <= 0]


def followed(book: Book, user: str, prompts: bool = False) -> pd.DataFrame:
    """Return what the advice is worth: of every task the rows of the way that is best on all others."""
    found = ways(book)
    grid = found.pivot_table(index="task", columns="way", values="loss")[allowed(book, user, prompts)]
    if len(grid) < 2:
        raise ClaimError("Experiment 29 has no two tasks, of which one could advise the other.")
    best = {task: grid.drop(index=task).mean().idxmin() for task in grid.index}
    return found[found["way"].eq(found["task"].map(best))]


def carried(book: Book, on: str, user: str = "hundred") -> pd.Series:
    """Return the share of the way from zero-shot to few-shot loss that the advised way goes elsewhere, over places.

    Of tasks that examples help there by a nat and more.
    """
    found, plain = ways(book, on), without_vector(book, on)
    taken = followed(book, user).groupby("task")["way"].first()
    zero, few = (rows(plain, method=name).groupby("task")["loss"].mean() for name in ("zero_shot", "few_shot"))
    share = statistics.recovered(found[found["way"].eq(found["task"].map(taken))], plain)
    share = share[(zero - few).reindex(share.index) >= 1]
    if share.empty:
        raise ClaimError("Examples help no task there by a nat.")
    return share


def seconds(book: Book, found: pd.DataFrame) -> pd.Series:
    """Return the processor seconds that making ways takes, by what is done and the rates of the page of benchmarks."""
    speed = tables.load("benchmarks", book.model, book.folder)
    each = (speed["seconds"] / speed["units"]).groupby([speed["benchmark"], speed["tool"]]).median()
    prompts, lines = 24, 16 * 17  # of its cases
    return (found["lines"] * each["extraction", "ours"] / lines + found["tries"] * each["heatmap", "ours"] / prompts
            + found["gradients"] * each["cleaning", "ours"] / prompts)  # fmt: skip


@number
def advice_does_the_task(book: Book) -> Comparison:
    return over_tasks(statistics.recovered(followed(book, "hundred"), without_vector(book)))


@number
def few_pairs_do_the_task(book: Book) -> Comparison:
    return over_tasks(statistics.recovered(followed(book, "few"), without_vector(book)))


@number
def few_pairs_belong_in_the_prompt(book: Book) -> Comparison:
    found = ways(book)
    shown = found[found["method"].eq("few_shot") & found["budget"].lt(found["budget"].max())]
    return compare(followed(book, "few"), shown)


@number
def order_does_less(book: Book) -> Comparison:
    return compare(rows(ways(book), method="instruction"), followed(book, "few"))


@number
def gradient_pays(book: Book) -> Comparison:
    found = ways(book)
    kept = rows(found[found["way"].isin(allowed(book, "hundred"))], budget=found["budget"].max())
    trained = kept["gradients"].gt(0)
    best = [part.groupby(["way", "task"])["loss"].mean().groupby("way").mean().idxmin()
            for part in (kept[trained], kept[~trained])]  # fmt: skip
    return compare(*(rows(kept, way=way) for way in best))


@number
def legible_costs_little(book: Book) -> Comparison:
    return compare(followed(book, "legible"), followed(book, "hundred"))


@number
def advice_travels(book: Book) -> Comparison:
    grid = ways(book).pivot_table(index="task", columns="way", values="loss")[allowed(book, "hundred")]
    return over_tasks(followed(book, "hundred").groupby("task")["loss"].mean() - grid.min(axis=1))


@number
def advice_is_gentler_than_examples(book: Book) -> Comparison:
    found = ways(book, "text").groupby(["task", "way"])["d_ntp"].mean()
    taken = followed(book, "hundred").groupby("task")["way"].first()
    shown = without_vector(book).query("method == 'few_shot'").groupby("task")["way"].first()
    return over_tasks(pd.Series({task: found[task, way] - found[task, shown[task]] for task, way in taken.items()}))


@number
def advice_leaves_the_template(book: Book) -> Comparison:
    return over_tasks(carried(book, "template"))


@number
def advice_reaches_sentences(book: Book) -> Comparison:
    return over_tasks(carried(book, "sentence"))


@number
def chance_is_no_help(book: Book) -> Comparison:
    return over_tasks(statistics.recovered(rows(ways(book), method="matched_random"), without_vector(book)))
