"""The workbench: twenty pairs go all the way, a stop keeps what there is, and held-out pairs stay held out."""

import json

import pytest
import torch

from nb_utils import decompositions, models, saes, tasks, vectors, workbench
from nb_utils.workbench import WorkbenchError

LAYER = 2
PAIRS = "\n".join(f"{'x' * (i % 3)}{i} -> yes{i % 2}" for i in range(20))


@pytest.fixture(scope="module")
def bench():
    tiny = models.load("tiny")
    return workbench.prepare(tasks.parse(PAIRS), LAYER, tiny, saes.random(tiny, LAYER, d_sae=256), others=(1,))


def test_twenty_pairs_are_enough_and_the_held_out_ones_are_trained_on_by_nobody(bench):
    seen = {prompt.ids for site in (bench.problem.train, bench.problem.validation) for prompt in site.prompts}
    assert len(bench.trial.pairs) == 6
    assert not seen & {prompt.ids for prompt in bench.trial.site.prompts}


def test_the_curve_has_the_losses_of_both_vectors_at_every_layer(bench):
    found = workbench.curve(bench)
    assert [point["layer"] for point in found] == [1, LAYER]
    for point in found:
        vector = vectors.task_vector(bench.at, point["layer"])
        expected = bench.trial.site.evaluate(vector[None], point["layer"]).loss().mean().item()
        assert point["task_vector"] == pytest.approx(expected, abs=1e-5)
        assert point["centred"] != pytest.approx(expected, abs=1e-3)


def test_pruning_lowers_the_validation_loss_and_gives_every_size(bench):
    start = decompositions.contrast_codes(bench.at, LAYER, bench.trial.sae, 5).vector
    before = bench.problem.validation_loss(start[None]).item()
    path = workbench.prune(bench)
    assert [len(step.latents) for step in path] == list(workbench.SIZES)
    assert path[-1].validation_loss < before


@pytest.mark.parametrize("method", workbench.METHODS)
def test_losses_follow_the_weights(bench, method):
    found = workbench.METHODS[method](bench)[-1]
    nothing = workbench.Weighted((), (), False, 0.0)
    assert workbench.loss(bench.trial, nothing) == pytest.approx(bench.trial.zero_shot, abs=1e-5)
    vector = workbench.vector(bench.trial.sae, found)
    rows = torch.tensor(found.weights) @ bench.trial.sae.W_dec[list(found.latents)]
    torch.testing.assert_close(vector, rows + bench.trial.sae.b_dec * found.bias)
    expected = bench.trial.site.evaluate(vector[None], LAYER).loss().mean().item()
    assert workbench.loss(bench.trial, found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", workbench.METHODS)
def test_a_stop_is_heeded_at_the_next_step_and_keeps_the_best_so_far(bench, method):
    told = []

    def stop(done, of):
        told.append((done, of))
        return done >= 3

    path = workbench.METHODS[method](bench, stop)
    assert [done for done, _ in told] == [0, 1, 2, 3] and told[0][1] > 10
    assert len(path) == 1 and path[0].latents
    assert workbench.loss(bench.trial, path[0]) > 0


def test_watching_the_progress_changes_nothing(bench):
    assert workbench.prune(bench, progress=lambda done, of: None) == workbench.prune(bench)


@pytest.mark.parametrize(
    "text, error, says",
    [
        ("hot -> cold", tasks.TaskError, "1 pairs and a task needs 20"),
        ("", tasks.TaskError, "0 pairs"),
        (PAIRS + "\nhot ->", tasks.TaskError, 'entry 21 .input "hot".: the answer must be a non-empty string'),
        (PAIRS + "\n-> cold", tasks.TaskError, "entry 21"),
        (PAIRS + "\nhot", tasks.TaskError, "line 21 has no separator"),
        ('{"a": ', tasks.TaskError, "not JSON"),
        ("\n".join(f"a{i} -> b" for i in range(10_000)), WorkbenchError, "10,000 pairs are more than the 1,000"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused_in_one_sentence(text, error, says):
    with pytest.raises(error, match=says) as caught:
        workbench.check(tasks.parse(text))
    assert "\n" not in str(caught.value)


def test_pasted_json_is_read_like_a_file():
    text = json.dumps({f"a{i}": ["b", "c"] for i in range(20)})
    assert tasks.parse(text).pairs[19].answers == ("b", "c")
