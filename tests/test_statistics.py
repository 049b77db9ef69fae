import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nb_utils import statistics


def row(task, method, losses, **columns):
    losses = np.asarray(losses, float)
    row = {
        "task": task, "method": method, "mode": "none" if method.endswith("_shot") else "add", "layer": 8,
        "k": pd.NA, "l0": pd.NA, "seed": 0, "on": "test", "loss": losses.mean(), "accuracy": 0.5, "losses": losses,
    }  # fmt: skip
    return row | columns


def frame_of(*rows):
    return pd.DataFrame(rows).astype({"k": "Int64", "l0": "Int64"})


def normal(n, seed=0, mean=5.0, sd=1.0):
    return np.random.default_rng(seed).normal(mean, sd, n)


# --- which tasks count ---


@pytest.mark.parametrize(
    "accuracy, few_shot, counts",
    [(0.30, 7.5, True), (0.29, 7.5, False), (0.30, 7.51, False), (0.9, 1.0, True), (0.9, 12.0, False)],
)
def test_a_task_counts_if_few_shot_is_accurate_and_cuts_the_loss_by_a_quarter(accuracy, few_shot, counts):
    frame = frame_of(row("t", "zero_shot", [10, 10]), row("t", "few_shot", [few_shot] * 2, accuracy=accuracy))
    assert statistics.solved(frame).to_dict() == {"t": counts}


def test_what_counts_is_decided_on_test_prompts_alone():
    frame = frame_of(
        row("t", "zero_shot", [10, 10]), row("t", "few_shot", [1, 1]),
        row("t", "zero_shot", [1, 1], on="sentence"), row("t", "few_shot", [10, 10], accuracy=0.0, on="sentence"),
    )  # fmt: skip
    assert statistics.solved(frame)["t"]


def test_rows_keeps_equal_values_and_treats_missing_ones_as_different():
    frame = frame_of(row("a", "clean", [1], k=5), row("a", "clean", [2]), row("a", "few_shot", [3], k=5))
    assert statistics.rows(frame, method="clean", k=5)["loss"].tolist() == [1]
    assert statistics.rows(frame, method="clean")["loss"].tolist() == [1, 2]
    assert statistics.rows(frame, method="none").empty


# --- means and intervals ---


def test_every_task_weighs_the_same_whatever_its_number_of_prompts():
    frame = frame_of(row("many", "m", [1.0] * 10), row("few", "m", [4.0, 6.0]))
    found = statistics.averages(frame, ["method"])
    assert found["mean"].tolist() == [3.0]
    assert found["tasks"].tolist() == [2]


def test_seeds_of_a_task_are_averaged_first():
    frame = frame_of(
        row("a", "m", [1, 1], seed=0, l0=10), row("a", "m", [2, 2], seed=1, l0=20), row("b", "m", [5, 5], l0=5)
    )
    found = statistics.averages(frame, ["method"])
    assert found["mean"].tolist() == [3.25]
    assert found["l0"].tolist() == [10.0]


def test_relative_losses_are_means_of_ratios():
    frame = frame_of(
        row("a", "zero_shot", [2, 2]), row("b", "zero_shot", [10, 10]),
        row("a", "m", [1, 1]), row("b", "m", [10, 10]),
    )  # fmt: skip
    found = statistics.averages(statistics.rows(frame, method="m"), ["method"], "rel_loss", zero=frame)
    assert found["mean"].tolist() == [-0.25]


def test_a_method_without_some_tasks_is_averaged_over_those_it_has():
    frame = frame_of(row("a", "m", [1, 1]), row("b", "m", [3, 3]), row("b", "other", [7, 7]))
    found = statistics.averages(frame, ["method"]).set_index("method")
    assert found["mean"].to_dict() == {"m": 2.0, "other": 7.0}
    assert found["tasks"].to_dict() == {"m": 2, "other": 1}
    assert found.loc["other", ["low", "high"]].tolist() == [7.0, 7.0]


def test_missing_keys_form_a_group_of_their_own():
    frame = frame_of(row("a", "m", [1, 1], k=5), row("a", "m", [2, 2]))
    assert statistics.averages(frame, ["method", "k"])["mean"].tolist() == [1.0, 2.0]


def test_nothing_to_average_gives_an_empty_frame_with_its_columns():
    frame = frame_of(row("a", "m", [1, 1]))
    found = statistics.averages(frame[frame["layer"] == 99], ["method", "layer"])
    assert found.empty
    assert {"method", "layer", "mean", "low", "high", "tasks"} <= set(found)


def test_prompts_alone_give_the_standard_error_of_one_task():
    losses = normal(100)
    found = statistics.averages(frame_of(row("a", "m", losses)), ["method"]).iloc[0]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * losses.std() / 10, rel=0.08)


def test_tasks_alone_give_the_standard_error_over_tasks():
    means = normal(60, sd=2.0)
    frame = frame_of(*(row(f"t{i:02}", "m", [mean] * 3) for i, mean in enumerate(means)))
    found = statistics.averages(frame, ["method"]).iloc[0]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * means.std() / 60**0.5, rel=0.08)


def test_the_interval_equals_that_of_the_plain_two_level_loop():
    rng = np.random.default_rng(1)
    losses = [rng.normal(rng.normal(5, 1), 2, n) for n in (4, 9, 16, 25, 6)]
    frame = frame_of(*(row(f"t{i}", "m", part) for i, part in enumerate(losses)))
    found = statistics.averages(frame, ["method"]).iloc[0]
    draws = [
        np.mean([rng.choice(losses[t], len(losses[t])).mean() for t in rng.integers(0, 5, 5)]) for _ in range(6000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=0.08)
    assert found["high"] == pytest.approx(high, abs=0.08)


def test_the_same_frame_gives_the_same_interval_and_another_seed_another():
    frame = frame_of(row("a", "m", normal(20)), row("b", "m", normal(20, seed=1)))
    first = statistics.averages(frame, ["method"])
    pd.testing.assert_frame_equal(first, statistics.averages(frame, ["method"]))
    assert first["low"][0] != statistics.averages(frame, ["method"], seed=1)["low"][0]


def test_a_page_of_intervals_takes_seconds():
    rng = np.random.default_rng(0)
    frame = frame_of(
        *(
            row(f"t{t}", f"m{m}", rng.normal(size=60), layer=layer)
            for t in range(26) for m in range(10) for layer in range(8)
        )
    )  # fmt: skip
    started = time.process_time()
    statistics.averages(frame, ["method", "layer"])
    assert time.process_time() - started < 4


def test_mixed_prompts_are_refused():
    frame = frame_of(row("a", "m", [1, 1]), row("a", "m", [1, 1], on="sentence"))
    with pytest.raises(ValueError, match=r"mixes \['sentence', 'test'\]"):
        statistics.averages(frame, ["method"])
    with pytest.raises(ValueError, match="a are of different numbers of prompts"):
        statistics.averages(frame_of(row("a", "m", [1, 1]), row("a", "n", [1, 1, 1])), ["method"])


def test_relative_losses_need_the_zero_shot_rows():
    frame = frame_of(row("a", "m", [1, 1]))
    with pytest.raises(ValueError, match="zero_shot rows"):
        statistics.averages(frame, ["method"], "rel_loss")
    with pytest.raises(ValueError, match="not 'accuracy'"):
        statistics.averages(frame, ["method"], "accuracy")
    with pytest.raises(ValueError, match="a: the zero-shot losses are of other prompts"):
        statistics.averages(frame, ["method"], "rel_loss", zero=frame_of(row("a", "zero_shot", [1, 2, 3])))


# --- paired differences ---


def pair(shift, noise=0.0, tasks=12, prompts=30):
    first, second = [], []
    for t in range(tasks):
        base = normal(prompts, seed=t, mean=5 + t)
        first.append(row(f"t{t:02}", "a", base + shift + noise * normal(prompts, seed=100 + t, mean=0)))
        second.append(row(f"t{t:02}", "b", base))
    return frame_of(*first), frame_of(*second)


def test_a_constant_difference_has_no_width_however_tasks_differ():
    found = statistics.compare(*pair(-0.5))
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert (found.better, found.tasks, found.verdict, found.word) == (12, 12, "holds", "lower than")
    assert str(found) == "-0.50 [-0.50, -0.50]"


def test_a_method_does_not_differ_from_itself():
    first, _ = pair(0)
    found = statistics.compare(first, first)
    assert (found.mean, found.low, found.high, found.better) == (0, 0, 0, 0)
    assert found.verdict == "undecided"
    assert found.word == "about the same as"


def test_only_shared_tasks_are_compared_the_best_first():
    first = frame_of(row("a", "m", [1, 1]), row("b", "m", [5, 5]), row("c", "m", [0, 0]))
    second = frame_of(row("b", "n", [2, 2]), row("a", "n", [3, 3]), row("d", "n", [0, 0]))
    found = statistics.compare(first, second)
    assert found.by_task.to_dict() == {"a": -2.0, "b": 3.0}
    assert found.mean == 0.5
    with pytest.raises(ValueError, match="share no task"):
        statistics.compare(first[first["task"] == "c"], second)


def test_two_layers_of_one_method_can_be_compared():
    frame = frame_of(row("a", "m", [1, 1], layer=4), row("a", "m", [3, 4], layer=8))
    found = statistics.compare(statistics.rows(frame, layer=4), statistics.rows(frame, layer=8))
    assert found.mean == -2.5


def test_relative_differences_use_the_zero_shot_loss_of_each_task():
    first, second = frame_of(row("a", "m", [1, 1])), frame_of(row("a", "n", [3, 3]))
    found = statistics.compare(first, second, "rel_loss", zero=frame_of(row("a", "zero_shot", [4, 4])))
    assert found.mean == -0.5


@pytest.mark.parametrize(
    "mean, low, high, differences, verdict, word",
    [
        (-1, -2, -0.1, [-1] * 4, "holds", "lower than"),
        (-1, -2, -0.1, [-1] * 3 + [1], "holds", "lower than"),
        (-1, -2, -0.1, [-4, -4, 1, 1], "mostly", "lower than"),
        (-1, -2, 0.1, [-1] * 4, "undecided", "about the same as"),
        (-1, -2, 0, [-1] * 4, "undecided", "about the same as"),
        (0.5, -1, 2, [1] * 4, "undecided", "about the same as"),
        (1, 0, 2, [1] * 4, "undecided", "about the same as"),
        (1, 0.1, 2, [1] * 4, "fails", "higher than"),
        (-1, -2, -0.1, [-1] * 2, "undecided", "lower than"),
    ],
)
def test_a_verdict_needs_the_interval_and_most_tasks(mean, low, high, differences, verdict, word):
    found = statistics.Comparison(mean, low, high, pd.Series(differences, dtype=float))
    assert (found.verdict, found.word) == (verdict, word)


def test_no_effect_is_undecided_nineteen_times_of_twenty_whatever_the_sign_of_its_mean():
    found = [statistics.over_tasks(pd.Series(normal(25, seed=seed, mean=0.0))) for seed in range(200)]
    verdicts = pd.Series([number.verdict for number in found]).value_counts(normalize=True)
    assert 0.88 < verdicts["undecided"] < 0.99
    assert any(number.mean < 0 and number.verdict == "undecided" for number in found)


def test_a_family_is_drawn_whole():
    """Tasks that are copies of one another say no more than one of them."""
    one = pd.Series(normal(6, mean=0.0), index=[f"t{i}" for i in range(6)])
    many = pd.concat([one.rename(lambda name, i=i: f"{name}{i}") for i in range(5)])
    family = {name: name[:2] for name in many.index}
    alone, copies = statistics.over_tasks(one), statistics.over_families(many, family)
    assert copies.mean == pytest.approx(alone.mean) and copies.by_task.size == 30
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert statistics.over_tasks(many).high - statistics.over_tasks(many).low < 0.7 * (copies.high - copies.low)


def test_families_of_unequal_size_weigh_by_their_tasks():
    values = pd.Series({"a": 1.0, "b": 1.0, "c": 1.0, "d": 5.0, "e": 5.0})
    found = statistics.over_families(values, dict(zip("abcde", "xxxyz", strict=True)))
    assert found.mean == 2.6 and (found.low, found.high) == (1.0, 5.0)


def test_too_few_families_give_no_interval():
    values = pd.Series({"a": 1.0, "b": 2.0, "c": np.nan})
    assert statistics.over_families(values, {"a": "x", "b": "y", "c": "z"}) is None


def test_the_median_task_is_asked_for_by_name():
    values = pd.Series({"a": 1.0, "b": 2.0, "c": 90.0})
    found = statistics.over_tasks(values, average=np.median)
    assert found.mean == 2 and {found.low, found.high} <= {1.0, 2.0, 90.0}


# --- choices ---


def test_the_penalty_is_chosen_on_validation_not_on_test():
    frame = frame_of(
        row("a", "clean", [1], l0=30, validation_loss=3.0), row("a", "clean", [9], l0=8, validation_loss=2.0)
    )
    assert statistics.choose(frame)["l0"].tolist() == [8]


def test_a_budget_leaves_out_what_has_more_latents_and_what_is_dense():
    frame = frame_of(
        row("a", "clean", [1], l0=30, validation_loss=1.0), row("a", "clean", [2], l0=10, validation_loss=2.0),
        row("a", "clean", [3], l0=4, validation_loss=3.0), row("a", "learned_vector", [0], validation_loss=0.0),
        row("b", "clean", [1], l0=11, validation_loss=1.0),
    )  # fmt: skip
    assert statistics.choose(frame, most=10)["loss"].tolist() == [2]
    assert statistics.choose(frame)["loss"].tolist() == [1, 0, 1]


def test_a_pursuit_has_no_validation_and_uses_all_it_may():
    frame = frame_of(*(row("a", "gradient_pursuit", [loss], l0=l0) for l0, loss in ((5, 1), (20, 3), (40, 2))))
    assert statistics.choose(frame, most=30)["l0"].tolist() == [20]


def test_every_layer_mode_and_seed_is_chosen_for_itself():
    frame = frame_of(
        *(
            row("a", "clean", [1], l0=l0, validation_loss=l0, layer=layer, mode=mode, seed=seed, on=on)
            for l0 in (3, 9) for layer in (4, 8) for mode in ("add", "replace")
            for seed in (0, 1) for on in ("test", "sentence")
        )
    )  # fmt: skip
    found = statistics.choose(frame)
    assert len(found) == 16
    assert set(found["l0"]) == {3}


def test_the_best_layer_is_one_that_the_most_tasks_have():
    frame = frame_of(
        row("a", "m", [1], layer=4, validation_loss=0.1),
        row("a", "m", [1], layer=8, validation_loss=3.0), row("b", "m", [1], layer=8, validation_loss=3.0),
        row("a", "m", [1], layer=9, validation_loss=4.0), row("b", "m", [1], layer=9, validation_loss=1.0),
        row("a", "zero_shot", [1], layer=-1, validation_loss=0.0),
        row("b", "zero_shot", [1], layer=-1, validation_loss=0.0),
    )  # fmt: skip
    assert statistics.best_layer(frame) == 9
    assert statistics.best_layer(statistics.rows(frame, task="a"), "loss") == 4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0, 20), min_size=1, max_size=6), min_size=1, max_size=5))
def test_an_interval_lies_within_the_losses_and_holds_no_nan(losses):
    frame = frame_of(*(row(f"t{i}", "m", part) for i, part in enumerate(losses)))
    found = statistics.averages(frame, ["method"]).iloc[0]
    every = np.concatenate([np.asarray(part) for part in losses])
    assert every.min() - 1e-9 <= found["low"] <= found["high"] <= every.max() + 1e-9
    assert found["mean"] == pytest.approx(np.mean([np.mean(part) for part in losses]))


def test_means_over_fewer_tasks_are_left_out_as_incomparable():
    averaged = pd.DataFrame({"k": [5, 10, 20], "tasks": [26, 24, 3], "mean": [4.0, 3.0, 9.0]})
    assert statistics.complete(averaged)["k"].tolist() == [5, 10]
    assert statistics.complete(averaged, share=1.0)["k"].tolist() == [5]


# --- features ---


def latents(*rows):
    columns = ["task", "layer", "method", "seed", "penalty", "k", "latent", "after"]
    return pd.DataFrame(rows, columns=columns).astype({"k": "Int64"})


def test_survivors_are_the_largest_positive_weights_of_the_pruned_and_of_the_most_penalised_vector():
    frame = latents(
        ("a", 8, "prune_contrast", 0, np.nan, 10, 1, 5.0), ("a", 8, "prune_contrast", 0, np.nan, 10, 2, 3.0),
        ("a", 8, "prune_contrast", 0, np.nan, 10, 3, -9.0), ("a", 8, "prune_contrast", 0, np.nan, 10, 4, 1.0),
        ("a", 8, "prune_contrast", 0, np.nan, 50, 5, 9.0), ("a", 8, "prune_contrast", 1, np.nan, 10, 6, 9.0),
        ("a", 8, "clean", 0, 3.0, None, 2, 7.0), ("a", 8, "clean", 0, 0.3, None, 7, 9.0),
        ("a", 11, "clean", 0, 3.0, None, 8, 1.0), ("b", 8, "clean", 0, 3.0, None, 9, 2.0),
        ("b", 8, "clean_random_start", 0, 3.0, None, 10, 9.0),
    )  # fmt: skip
    found = statistics.survivors(frame, most=2)
    assert found.to_dict("split")["data"] == [
        ["a", 8, 1, 5.0], ["a", 8, 2, 7.0], ["a", 11, 8, 1.0], ["b", 8, 9, 2.0]
    ]  # fmt: skip


def test_a_mean_over_tasks_has_an_interval_that_holds_it_and_narrows_with_tasks():
    drawn = (pd.Series(normal(n, mean=1.0), index=[f"t{i}" for i in range(n)]) for n in (6, 60))
    few, many = map(statistics.over_tasks, drawn)
    assert few.low < few.mean < few.high and many.high - many.low < few.high - few.low
    assert statistics.over_tasks(pd.Series({"a": 1.0, "b": None, "c": 3.0})).mean == 2
    with pytest.raises(ValueError, match="No task"):
        statistics.over_tasks(pd.Series({"a": np.nan}))


def test_a_gain_is_the_share_of_the_tasks_largest_fall_and_small_ones_are_none():
    frame = pd.DataFrame({"task": ["a"] * 4 + ["b"] * 2, "rel_loss": [-0.5, -0.25, -0.09, 0.7, 0.1, 0.0]})
    frame["latent"] = [3, 4, 5, 6, 3, 4]
    gain = statistics.steering_gain(frame)
    assert gain.iloc[:4].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert gain.iloc[4:].tolist() == [0.0, 0.0], "a task that nothing helps has no gain"
    random = pd.DataFrame({"task": ["a", "a", "b"], "rel_loss": [-0.75, 0.2, -0.1], "latent": [-1, -2, -1]})
    gain = statistics.steering_gain(pd.concat([frame, random], ignore_index=True))
    assert gain[:4].tolist() == [1.0, 0.5, 0.0, 0.0], "a random direction sets no measure"
    assert gain[6:].tolist() == [1.5, 0.0, 0.0]


def test_the_best_single_feature_is_chosen_on_validation_prompts_and_its_test_row_returned():
    sweep = [("a", 3, 2.0), ("a", 3, 1.0), ("a", 5, 1.5), ("a", -1, 0.1), ("b", 3, 2.0), ("b", 5, 1.0)]
    sweep = pd.DataFrame(sweep, columns=["task", "latent", "loss"]).assign(kind="executor")
    table = pd.DataFrame({"task": ["a", "a", "b", "b"], "latent": [3, 5, 3, 5], "loss": [1.9, 0.5, 2.1, 1.2]})
    table = table.assign(kind="executor", which="best")
    table = pd.concat([table, table.assign(which="fixed", loss=9.0), table.assign(kind="detector", loss=0.0)])
    found = statistics.best_single(table, sweep, "executor")
    assert found[["latent", "loss"]].T.to_dict("list") == {"a": [3, 1.9], "b": [5, 1.2]}


def test_features_stand_in_the_order_of_the_tasks_that_they_help_and_alike_tasks_stand_together():
    gain = pd.DataFrame(
        [[0, 1, 0, 0.9], [1, 0, 0.8, 0], [0, 0.4, 0, 1], [0.3, 0, 1, 0]],
        index=[10, 20, 30, 40], columns=["a", "b", "c", "d"],
    )  # fmt: skip
    index, columns = statistics.block_order(gain)
    assert {frozenset(columns[:2]), frozenset(columns[2:])} == {frozenset("ac"), frozenset("bd")}
    assert [columns.index(gain.loc[i].idxmax()) for i in index] == [0, 1, 2, 3]


def test_methods_overlap_within_a_seed_and_a_method_with_itself_under_other_seeds():
    supports = {("a", 0): [1, 2], ("a", 1): [2, 3], ("b", 0): [1, 2, 5, 6], ("b", 1): [2, 7, 8, 9]}
    one = pd.DataFrame([
        {"task": "t", "layer": 8, "k": 2, "method": method, "seed": seed, "latent": latent}
        for (method, seed), latents in supports.items() for latent in latents
    ])  # fmt: skip
    found = statistics.overlap(one)
    assert found.loc["a", "a"] == 1 / 2 and found.loc["b", "b"] == 1 / 4
    assert found.loc["a", "b"] == (2 / 2 + 1 / 2) / 2 and found.loc["b", "a"] == (2 / 4 + 1 / 4) / 2
    other = one.assign(task="u", seed=0, latent=range(len(one)))  # one seed, nothing shared
    both = statistics.overlap(pd.concat([one, other]))
    assert both.loc["a", "b"] == found.loc["a", "b"] / 2 and both.loc["a", "a"] == found.loc["a", "a"]


def test_what_is_recovered_is_0_for_zero_shot_and_1_for_few_shot_on_every_task():
    plain = frame_of(
        row("a", "zero_shot", [8]), row("a", "few_shot", [2]), row("b", "zero_shot", [4]), row("b", "few_shot", [3]),
    )  # fmt: skip
    vectors = frame_of(row("a", "clean", [4]), row("a", "clean", [6], seed=1), row("b", "clean", [5]))
    assert statistics.recovered(vectors, plain).to_dict() == {"a": 0.5, "b": -1}
    assert statistics.recovered(statistics.rows(plain, method="few_shot"), plain).to_dict() == {"a": 1, "b": 1}


def test_crossed_has_wrong_vectors_off_the_diagonal_and_the_own_one_on_as_many_prompts():
    def row(task, tested, on, method, losses, layer=10, rel=np.nan):
        return {"task": task, "tested": tested, "on": on, "method": method, "losses": losses, "layer": layer,
                "rel_loss": rel, "n": len(losses)}  # fmt: skip

    frame = pd.DataFrame([
        row("a", "a", "test", "zero_shot", [4.0, 2.0, 9.0], -1),
        row("b", "b", "test", "zero_shot", [5.0, 5.0, 9.0], -1),
        row("a", "b", "other", "zero_shot", [5.0, 5.0], -1), row("b", "a", "other", "zero_shot", [4.0, 2.0], -1),
        row("a", "a", "test", "clean", [1.0, 2.0, 7.0]), row("b", "b", "test", "clean", [0.0, 2.5, 7.0]),
        row("a", "b", "other", "clean", [6.0, 6.0], rel=0.2), row("b", "a", "other", "clean", [3.0, 3.0], rel=0.0),
    ])  # fmt: skip
    grid = statistics.crossed(frame)
    assert grid.loc["a"].tolist() == [-0.5, 0.2] and grid.loc["b"].tolist() == [0.0, -0.75]


# --- thetas of experiment 20 ---


def thetas(tasks=("a", "b", "c"), draws=6, noise=0.1, common=100.0):
    """Draws around one direction a task, all far out along a common one; codes have the same numbers as the stream."""
    rng, lines = np.random.default_rng(0), []
    for i, task in enumerate(tasks):
        for draw in range(draws):
            point = noise * rng.normal(size=5)
            point[i] += 1
            point[4] += common
            lines.append({"task": task, "draw": draw, "coordinates": point, "latents": [1, 3, 5, 7, 9], "codes": point})
    return pd.DataFrame(lines)


@pytest.mark.parametrize("space", ["coordinates", "codes"])
def test_thetas_that_share_nearly_everything_are_told_apart_once_centred(space):
    spread = thetas()
    points = statistics.spread_points(spread, space)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    alike = points.to_numpy() @ points.to_numpy().T
    own = np.equal.outer(spread["task"].to_numpy(), spread["task"].to_numpy())
    assert alike[own].min() > 0.5 > 0 > alike[~own].max()
    nearest = statistics.nearest_centroid(spread, space)
    assert set(nearest.index.get_level_values("draw")) == {1, 3, 5}, "those that make the means are not asked"
    assert (nearest == nearest.index.get_level_values("task")).all()


def test_codes_of_latents_that_are_not_active_are_zero_and_a_table_may_be_a_part_of_another():
    spread = thetas(noise=0.0)
    spread["latents"] = [[1, 3, 5, 7, 9][: i % 3 + 3] for i in range(len(spread))]
    spread["codes"] = [list(codes[: len(latents)]) for codes, latents in zip(spread.codes, spread.latents, strict=True)]
    part = spread[spread["task"] != "a"]
    points = statistics.spread_points(part, "codes")
    assert points.shape == (12, 5) and list(points.index) == list(zip(part["task"], part["draw"], strict=True))


def test_thetas_of_no_task_name_their_task_by_chance_only():
    rng = np.random.default_rng(1)
    spread = thetas(draws=200, noise=0.0).assign(coordinates=lambda frame: list(rng.normal(size=(len(frame), 5))))
    nearest = statistics.nearest_centroid(spread, "coordinates")
    assert 0.2 < (nearest == nearest.index.get_level_values("task")).mean() < 0.47


def test_heads_come_in_the_order_of_other_tasks_and_in_their_own_only_where_there_is_no_other():
    effects = {"one": {0: 0.9, 1: 0.1}, "two": {0: 0.0, 1: 0.3}, "three": {0: 0.2, 1: 0.1}}
    frame = pd.DataFrame([dict(task=task, layer=3, head=head, method="head", effect=effect)
                          for task, own in effects.items() for head, effect in own.items()])  # fmt: skip
    assert statistics.heads_in_order(frame, "one") == ([(3, 1), (3, 0)], ["three", "two"])
    assert statistics.heads_in_order(frame, "two") == ([(3, 0), (3, 1)], ["one", "three"])
    assert statistics.heads_in_order(statistics.rows(frame, task="two"), "two") == ([(3, 1), (3, 0)], ["two"])
