"""Ground truth: on a planted world, what is found is what is there, and the scores say so."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from nb_utils import engine, prompts
from workflow import ground_truth, planted

SETTINGS = replace(
    ground_truth.Settings(), seeds=1, penalties=(1.0,), rates=(0.2,), encoder=(20_480, 2048, 300),
)  # fmt: skip
TASK = 0


@pytest.fixture(scope="module")
def world():
    return planted.world(0)


@pytest.fixture(scope="module")
def measured(world):
    """The rows of two tasks with the true dictionary."""
    sae = ground_truth.dictionary_of(world, "true", SETTINGS)
    return [ground_truth.measure(world, task, sae, SETTINGS) for task in (TASK, TASK + 1)]


def losses(world, vectors):
    site = engine.Site.prepare(world.model, prompts.zero_shot(world.model.tokenizer, world.tasks[TASK].part(3)))
    return site.evaluate(vectors, planted.LAYER).loss().mean(1)


def test_the_engine_is_exact_on_the_planted_model(world):
    assert max(engine.differences(world.model)) < 1e-4


def test_zero_shot_separators_hold_what_is_planted_there_and_their_query(world):
    zero = world.separators(TASK).zero[planted.LAYER]
    there = torch.zeros(planted.FEATURES)
    for kind in ("separator", "default"):
        there[list(world.kinds[kind])] = planted.SIZE[kind]
    queries = zero - there @ world.directions
    classes = world.directions[list(world.kinds["query"])]
    asked = torch.arange(len(zero)) % planted.CLASSES
    torch.testing.assert_close(queries.norm(dim=1), queries.norm(dim=1).mean().expand(len(zero)))
    assert ((queries @ classes.T).argmax(1) == asked).float().mean() > 0.9


def test_a_task_needs_every_one_of_its_features(world):
    truth = world.truth(TASK)
    signs = world.tasks[TASK].signs
    less = truth.repeat(len(signs), 1)
    less[range(len(signs)), list(signs)] = 0
    zero, whole, *without = losses(world, torch.cat([torch.zeros(1, planted.FEATURES), truth[None], less])
                                   @ world.directions)
    assert whole < 0.2 * zero
    assert all(one > whole + 0.1 for one in without)


def test_features_that_come_with_any_examples_do_nothing_for_a_task(world):
    codes = torch.zeros(planted.FEATURES)
    codes[list(world.kinds["format"])] = planted.SIZE["format"]
    zero, given = losses(world, torch.stack([0 * codes, codes]) @ world.directions)
    assert given > 0.95 * zero


def test_recovery_counts_latents_features_and_signs():
    feature = torch.tensor([0, 0, 1, 2, -1])  # two latents for feature 0, one that stands for nothing
    signs = {0: 1, 1: -1, 3: 1}
    found = planted.recovery(torch.tensor([0.5, 0.1, 0.2, 0.0, 0.3]), feature, signs)
    assert found == {"l0": 4, "precision": 0.75, "recall": pytest.approx(2 / 3), "f1": pytest.approx(12 / 17),
                     "sign": pytest.approx(2 / 3)}  # fmt: skip
    nothing = planted.recovery(torch.zeros(5), feature, signs)
    assert (nothing["l0"], nothing["precision"], nothing["recall"], nothing["f1"]) == (0, 0, 0, 0)


def test_a_latent_stands_for_the_feature_that_its_direction_is_near_to(world):
    rows = torch.stack([3 * world.directions[7], -world.directions[7], world.directions[:2].sum(0)])
    assert planted.stands_for(rows, world.directions)[:2].tolist() == [7, -1]


def test_a_spoiled_dictionary_lacks_features_and_has_others_twice(world):
    sae = ground_truth.dictionary_of(world, "spoiled", replace(SETTINGS, encoder=(20_480, 2048, 1)))
    found = planted.stands_for(sae.W_dec, world.directions)
    assert (found >= 0).all() and 0.6 < len(found.unique()) / planted.FEATURES < 0.9
    assert set(found.bincount()[world.kinds["task"][::2]].tolist()) == {0, 2}
    assert set(found.bincount()[world.kinds["task"][1::2]].tolist()) == {0, 1}


def test_pruning_finds_planted_features_as_projection_and_chance_do_not(measured):
    found = pd.concat(measured)
    assert found["features"].eq(8).all()
    f1 = found[found["k"].eq(8)].groupby(["method", "of"])["f1"].mean()
    assert f1["planted_tuned", "centred"] == 1
    assert f1["prune_contrast", "centred"] >= 0.5
    assert max(f1["top_k_projection"].max(), f1["gradient_pursuit", "raw"]) < 0.4
    assert f1["random_support", "centred"] < 0.1


def test_what_cleaning_keeps_is_planted_and_no_feature_that_is_taken_away(measured):
    for found in measured:
        cleaned = found[found["method"].eq("clean")].iloc[0]
        assert cleaned["precision"] > 0.8 and cleaned["recall"] <= planted.CLASSES / 8
