"""Measurements: rows that the tables expect, with numbers that a plain forward pass gives."""

import dataclasses
import itertools
import json
import re

import pandas as pd
import pytest
import torch
from test_saes import random_saelens

from nb_utils import engine, prompts, saes, scores, tasks
from nb_utils.record import tables
from nb_utils.scores import Candidate
from nb_utils.text import verbatim

# What `tables` knows of, less what only a cleaning, its latents or the task's name add.
COLUMNS = set(tables.DTYPES) - {
    "task", "train_loss", "validation_loss", "step", "latent", "before", "after", "density", "largest"
} | {"losses"}  # fmt: skip
MEASURES = ["loss", "token_loss", "accuracy", "exact"]


WORDS = ["hot", "cold", "big", "small", "up", "down", "old", "new"]
PAIRS = [tasks.Pair(x, y, (y,)) for x, y in itertools.pairwise(WORDS)]


@pytest.fixture(scope="module")
def site(tiny):
    return engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, PAIRS))


def noise(model, n, seed=0):
    return torch.randn(n, model.d_model, generator=torch.Generator().manual_seed(seed))


def mean_of(values):
    return sum(values) / len(values)


def plain(model, prompt, vector, layer):
    """Log-probabilities at every answer position from one forward pass through TransformerLens with a hook."""

    def steer(stream, hook):
        steered = stream.clone()
        steered[:, prompt.separators[-1]] += vector
        return steered

    hooks = [(f"blocks.{layer}.hook_resid_post", steer)]
    logits = model.bridge.run_with_hooks(torch.tensor([prompt.ids]), fwd_hooks=hooks)[0]
    return logits[len(prompt.ids) - len(prompt.answer) - 1 : -1].log_softmax(-1)


def test_rows_and_baselines_have_the_columns_that_the_tables_expect(tiny, site, tmp_path):
    candidates = [Candidate("task_vector", noise(tiny, 1)[0]), Candidate("pursuit", noise(tiny, 1, 1)[0], k=5, l0=4)]
    base = scores.baseline(site, "zero_shot")
    rows = scores.rows(site, 2, candidates, base.loss[0])
    assert set(base) == set(rows) == COLUMNS
    whole = pd.concat([base, rows], ignore_index=True).assign(task="toy")
    tables.save(whole, "01", "toy", {}, folder=tmp_path)
    stored = tables.load("01", folder=tmp_path)
    for column in (COLUMNS - {"losses"}) | {"task"}:
        assert stored[column].dtype == tables.DTYPES[column], column
    assert stored.layer.tolist() == [-1, 2, 2] and stored["mode"].tolist() == ["none", "add", "add"]
    assert stored.k.isna().tolist() == [True, True, False] and stored.l0.tolist()[2] == 4
    torch.testing.assert_close(torch.tensor(stored.loss), torch.tensor(whole.loss))


def test_what_a_candidate_brings_along_stands_in_its_row(tiny, site):
    vector = noise(tiny, 1)[0]
    candidate = Candidate("clean", vector, 7, 5, scale=2.0, penalty=0.3, seed=4, extra={"step": 90, "train_loss": 1.5})
    row = scores.rows(site, 1, [candidate], 1.0, "replace", on="sentence").iloc[0]
    expected = dict(
        layer=1, method="clean", mode="replace", k=7, l0=5, scale=2.0, penalty=0.3, seed=4, on="sentence", step=90,
        train_loss=1.5, n=len(PAIRS),
    )  # fmt: skip
    assert {name: row[name] for name in expected} == expected


def test_losses_are_those_of_plain_forward_passes(tiny, site):
    vectors, layer, zero_shot = noise(tiny, 2), 3, 7.0
    rows = scores.rows(site, layer, [Candidate(str(i), v) for i, v in enumerate(vectors)], zero_shot)
    for i, vector in enumerate(vectors):
        two, mean, first, whole = [], [], [], []
        for prompt in site.prompts:
            log_probs, answer = plain(tiny, prompt, vector, layer), torch.tensor(prompt.answer)
            nll = -log_probs.gather(-1, answer[:, None])[:, 0]
            hits = log_probs.argmax(-1) == answer
            two.append(nll[:2].sum().item())
            mean.append(nll.mean().item())
            first.append(hits[0].item())
            whole.append(hits.all().item())
        row = rows.iloc[i]
        means = [pd.Series(column, dtype=float).mean() for column in (two, mean, first, whole)]
        expected = pd.Series(dict(zip(MEASURES, means, strict=True)))
        pd.testing.assert_series_equal(row[MEASURES].astype(float), expected, check_names=False, rtol=1e-4)
        assert row.losses == pytest.approx(two, rel=1e-4) and row.n == len(PAIRS)
        assert row.rel_loss == pytest.approx((row.loss - zero_shot) / zero_shot)


def test_an_accepted_answer_counts_as_right_and_a_longer_one_by_its_first_token(tiny, site):
    ids = [torch.tensor([prompt.ids[: -len(prompt.answer)]]) for prompt in site.prompts]
    said = [tiny.hf(i).logits[0, -1].argmax().item() for i in ids]
    assert all(token != prompt.answer[0] for token, prompt in zip(said, site.prompts, strict=True))
    extra = [((token,),) for token in said[:3]] + [((token, 9, 9),) for token in said[3:5]] + [()] * 2
    batch = [
        dataclasses.replace(prompt, accepted=prompt.accepted + more)
        for prompt, more in zip(site.prompts, extra, strict=True)
    ]
    row = scores.baseline(engine.Site.prepare(tiny, batch), "zero_shot").iloc[0]
    assert row.accuracy == pytest.approx(5 / 7)


def test_where_an_answer_was_cut_short_nothing_is_said_of_the_whole_one(tiny, site):
    """All of these answers have more than one token."""
    cut = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, PAIRS), answer_tokens=1)
    row, whole = (scores.baseline(where, "zero_shot").iloc[0] for where in (cut, site))
    assert pd.isna(row.exact) and pd.isna(row.token_loss) and row.accuracy == whole.accuracy
    assert not pd.isna(whole.exact) and not pd.isna(whole.token_loss)


def test_a_zero_vector_measures_what_the_baseline_measures(tiny, site):
    base = scores.baseline(site, "zero_shot")
    row = scores.rows(site, 2, [Candidate("nothing", torch.zeros(tiny.d_model))], base.loss[0])
    for measure in MEASURES:
        assert row[measure][0] == pytest.approx(base[measure][0], abs=1e-4)
    assert row.losses[0] == pytest.approx(base.losses[0], abs=1e-4)
    assert base.rel_loss[0] == 0 and row.rel_loss[0] == pytest.approx(0, abs=1e-5)


def test_a_relative_loss_refers_to_the_zero_shot_loss_that_is_given(tiny, site):
    few = engine.Site.prepare(tiny, prompts.few_shot(tiny.tokenizer, PAIRS, PAIRS, 3, seed=0))
    row = scores.baseline(few, "few_shot", zero_shot=10.0)
    assert row.rel_loss[0] == pytest.approx(row.loss[0] / 10 - 1)


def test_the_distance_to_a_reference_is_its_mean_divergence_from_the_steered_distribution(tiny, site):
    few = engine.Site.prepare(tiny, prompts.few_shot(tiny.tokenizer, PAIRS, PAIRS, 3, seed=0))
    reference = few.log_probs(torch.zeros(1, tiny.d_model), tiny.n_layers - 1)[0]
    vector = noise(tiny, 1)[0]
    row = scores.rows(site, 2, [Candidate("v", vector)], 1.0, reference=reference)
    steered = torch.stack([plain(tiny, prompt, vector, 2)[0] for prompt in site.prompts])
    expected = (reference.exp() * (reference - steered)).sum(-1).mean().item()
    assert row.d_ntp[0] == pytest.approx(expected, rel=1e-3)
    assert scores.rows(site, 2, [Candidate("v", vector)], 1.0).d_ntp.isna().all()


def test_the_best_scale_follows_the_slope_of_the_loss(tiny, site):
    vector = torch.zeros(1, tiny.d_model, requires_grad=True)
    (slope,) = torch.autograd.grad(site.loss(vector, 2)[0], vector)
    down = -0.01 * slope[0] / slope.norm()
    assert scores.best_scale(site, 2, down, scales=(-1.0, 0.0, 1.0)) == 1.0
    assert scores.best_scale(site, 2, -down, scales=(-1.0, 0.0, 1.0)) == -1.0
    assert scores.best_scale(site, 2, -1000 * down, scales=(0.0, 1.0)) == 0.0


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_the_best_scale_has_the_lowest_loss_of_all_that_were_tried(tiny, site, mode):
    vector, scales = 3 * noise(tiny, 1)[0], (-2.0, -1.0, 0.25, 0.5, 1.0, 2.0)
    losses = {scale: site.loss(scale * vector[None], 1, mode).item() for scale in scales}
    assert scores.best_scale(site, 1, vector, mode, scales) == min(losses, key=losses.get)


def test_the_best_scale_can_be_chosen_over_a_part_of_the_vocabulary(tiny, site):
    vector, scales, few = 3 * noise(tiny, 1)[0], (-2.0, -1.0, 0.25, 0.5, 1.0, 2.0), engine.vocabulary(site, keep=40)
    losses = {scale: site.loss(scale * vector[None], 1, vocabulary=few).item() for scale in scales}
    assert losses != {scale: site.loss(scale * vector[None], 1).item() for scale in scales}
    assert scores.best_scale(site, 1, vector, "add", scales, few) == min(losses, key=losses.get)


def test_an_experiment_loads_what_its_parameters_ask_for():
    loaded = scores.prepare("antonyms", "tiny", "random", "3, 1", "1", seeds=2)
    assert loaded.word == tasks.load("antonyms") and loaded.splits == tasks.split(loaded.word)
    assert (loaded.wanted, loaded.repeated, list(loaded.saes)) == ([3, 1], [1], [3, 1])
    assert loaded.fast is loaded.lm and loaded.lm.name == "tiny"
    assert all(sae.layer == layer for layer, sae in loaded.saes.items())
    assert scores.prepare("antonyms", "tiny", "random", 3, half=True).fast.dtype == loaded.lm.fast().dtype
    shipped = scores.prepare("antonyms", "tiny", "shipped", "all", seeds=5)
    assert list(shipped.wanted) == shipped.repeated == list(saes.layers(loaded.lm, "shipped"))
    with pytest.raises(ValueError, match="No block has several seeds"):
        scores.prepare("antonyms", "tiny", "random", "3", "1", seeds=2)


def test_what_was_loaded_is_said_in_two_lines_that_show_a_users_text_as_text(tmp_path):
    pairs = [{"input": f"*{n}*", "output": "<b>"} for n in range(40)]
    (tmp_path / "own.json").write_text(json.dumps({"title": "$x$ <i>", "pairs": pairs}))
    loaded = scores.prepare(str(tmp_path / "own.json"), "tiny", "random", "3")
    said, n = loaded.about_task, {part: len(getattr(loaded.splits, part)) for part in tasks.SIZES}
    assert not {"<i>", "<b>", "$x$"} & set(re.findall(r"<.>|\$x\$", said))
    assert said.startswith("**") and verbatim("$x$ <i>") in said and verbatim(" -> <b>") in said
    assert f"{n['vector']} pairs make vectors, {n['train']} train them, {n['validation']} validate, {n['test']}" in said
    assert loaded.about_model == "tiny: 6 blocks of width 32; SAEs with 64 latents after block 3."


def test_several_seeds_need_a_block_to_be_repeated_at():
    assert scores.repeated([6, 8, 11], "all", 5) == [6, 8, 11]
    assert scores.repeated([6, 8, 11], "11, 6", 5) == [6, 11]
    assert scores.repeated([6, 8, 11], 8, 5) == [8]
    assert scores.repeated([6, 8], "11", 1) == []
    with pytest.raises(ValueError, match=r"repeat_layers is 11, layers are 6, 8; let it name one of these\."):
        scores.repeated([6, 8], "11", 2)


def test_controls_are_those_sets_that_are_here(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NB_SAES", str(tmp_path))
    assert scores.controls(tiny, ["second_seed"], 2) == {}
    random_saelens(seed=3).save_model(tmp_path / "controls/tiny/second_seed/blocks.2.hook_resid_post")
    found = scores.controls(tiny, ["second_seed", "frozen_decoder"], 2)
    assert list(found) == ["second_seed"] and torch.equal(found["second_seed"].W_dec, random_saelens(seed=3).W_dec)
    assert scores.controls(tiny, ["second_seed"], 3) == {}
