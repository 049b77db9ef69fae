"""The workbench: twenty pairs go all the way to one object, a stop keeps what there is, and tests stay held out."""

import json

import pytest
import torch

from nb_utils import engine, exports, models, saes, tasks, vectors, workbench
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
    start = vectors.contrast_codes(bench.at, LAYER, bench.trial.sae, 5).vector
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


@pytest.mark.parametrize("method", workbench.METHODS)
def test_one_object_says_all_of_a_vector_that_was_found(bench, method):
    found = workbench.METHODS[method](bench)[-1]
    trial = bench.trial
    decoded = trial.sae.decode(found.codes, bias=found.bias)
    torch.testing.assert_close(found.vector, decoded)
    assert int((found.codes != 0).sum()) == len(found.latents)
    sites = {"train": bench.problem.train, "validation": bench.problem.validation, "test": trial.site}
    for name, site in sites.items():
        expected = site.evaluate(found.vector[None], LAYER).nll.nansum(-1).mean().item()
        assert found.losses[name] == pytest.approx(expected, abs=1e-4), name
    assert (found.losses["zero_shot"], found.losses["few_shot"]) == (trial.zero_shot, bench.few_shot)
    assert workbench.evaluate(bench, found.vector) == pytest.approx(found.losses["test"], abs=1e-4)
    replaced = trial.site.evaluate(found.vector[None], LAYER, "replace").loss().mean().item()
    assert workbench.evaluate(bench, found.vector, "replace") == pytest.approx(replaced, abs=1e-5)
    said = repr(found)
    numbers = [f"test {found.losses['test']:.2f}", f"few-shot {bench.few_shot:.2f}", "block 2 of tiny"]
    assert all(str(number) in said for number in (*found.latents, *numbers))
    assert repr(bench) in said and ("its bias" in said) == found.bias


def test_features_are_listed_with_their_codes_and_the_words_that_they_promote(bench):
    found = workbench.prune(bench)[-1]
    frame = found.features(k=3)
    assert list(frame.columns) == ["latent", "code", "promoted"] and tuple(frame["latent"]) == found.latents
    assert frame["code"].tolist() == [found.codes[latent].item() for latent in found.latents]
    assert frame["code"].abs().is_monotonic_decreasing
    directions = bench.trial.sae.decoder_directions[list(found.latents)]
    promoted, _ = vectors.logit_lens(bench.trial.model, directions, 3)
    assert frame["promoted"].tolist() == [[token for token, _ in row] for row in promoted]
    assert {len(words) for words in frame["promoted"]} == {3}


def test_an_export_is_read_back_as_the_vector_that_was_found(bench, tmp_path):
    found = workbench.clean(bench, steps=5)
    read = exports.load(found.export(tmp_path / "mine"), bench.trial.model, bench.trial.sae)
    assert torch.equal(read.vector, found.vector) and read.card.loss == pytest.approx(found.losses["test"], abs=1e-5)


def test_a_task_is_given_as_it_is_known_and_what_is_found_is_the_same(bench, tmp_path):
    model, sae = bench.trial.model, bench.trial.sae
    path = tmp_path / "mine.json"
    pairs = dict(line.split(" -> ") for line in PAIRS.splitlines())
    path.write_text(json.dumps(pairs))
    expected = workbench.clean(bench, steps=3)
    for task in (tasks.parse(PAIRS), path, str(path), pairs):
        assert workbench.clean(task, LAYER, model=model, saes=sae, steps=3) == expected
    named = workbench.prune("antonyms", LAYER, model="tiny", saes="random", sizes=(3,), steps=2)
    assert [len(found.latents) for found in named] == [3] and "Antonyms" in repr(named[0])


def test_the_likeliest_tokens_are_those_of_few_shot_prompts_too(monkeypatch):
    """Without examples a model hardly thinks of the words of a translation, which the softmax would then lack."""
    seen, real = [], engine.vocabulary
    monkeypatch.setattr(engine, "vocabulary", lambda *sites, **more: seen.append(sites) or real(*sites, **more))
    tiny = models.load("tiny")
    bench = workbench.prepare(tasks.parse(PAIRS), LAYER, tiny, "random")
    (sites,) = seen
    assert sites[:2] == (bench.problem.train, bench.problem.validation) and len(sites) == 3
    for zero, shown in zip(sites[1].prompts, sites[2].prompts, strict=True):
        assert len(zero.separators) == 1 < len(shown.separators) and zero.answer == shown.answer


@pytest.mark.parametrize(
    "more, says",
    [({}, "give a layer, such as layer=10"), ({"layer": 2, "saes": 3}, "reads block 3, not 2"),
     ({"layer": 9, "saes": "random"}, "has no layer 9")],
)  # fmt: skip
def test_what_cannot_be_cleaned_is_refused_in_one_sentence(more, says):
    tiny = models.load("tiny")
    if type(more.get("saes")) is int:
        more = {**more, "saes": saes.random(tiny, more["saes"])}
    with pytest.raises(ValueError, match=says) as caught:
        workbench.clean(tasks.parse(PAIRS), model=tiny, **more)
    assert "\n" not in str(caught.value)
