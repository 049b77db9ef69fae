"""Training of SAEs: sets from a file, one pass of the model for all, parts that stay frozen, a device that goes."""

import argparse

import numpy as np
import pytest
import torch
from test_faults import cache_with_corpus

from workflow import train_saes
from workflow.train_saes import Spec

ARGUMENTS = argparse.Namespace(icl_share=0, icl_from=1, checkpoint_minutes=99, report_seconds=99)


@pytest.fixture
def rows(tiny, monkeypatch):
    """Give chunks of random tokens, small ones: 8 sequences, four steps."""
    monkeypatch.setattr(train_saes, "CHUNK", 8)
    monkeypatch.setattr(train_saes, "BATCH", 254)

    def text(index, share):
        return torch.from_numpy(np.random.default_rng(index).integers(3, 259, (8, train_saes.CONTEXT)))

    return text


def spec(tokens=3 * 8 * 127, **more):
    return Spec(**{"set": "a", "layer": 1, "d_sae": 64, "k": 8, "tokens": tokens, "lr": 1e-2, **more})


def learn(tiny, rows, tmp_path, *specs):
    return train_saes.learn(specs, ARGUMENTS, tiny.layout, rows, tmp_path / f"{len(specs)}.checkpoint")


def test_saes_of_one_pass_equal_those_trained_alone(tiny, rows, tmp_path):
    specs = spec(), spec(set="b", seed=1), spec(set="c", layer=3, tokens=2 * 8 * 127)
    together = learn(tiny, rows, tmp_path / "together", *specs)
    for one in specs:
        alone = learn(tiny, rows, tmp_path / one.set, one)[one.key].folded()
        assert all(torch.equal(alone[name], value) for name, value in together[one.key].folded().items())
    first, second = (together[one.key].folded()["W_dec"] for one in specs[:2])
    assert (first @ second.T).abs().max() < 0.99, "two seeds gave the same directions"


@pytest.mark.parametrize("part, other", [("encoder", "decoder"), ("decoder", "encoder")])
def test_a_frozen_part_stays_as_it_was_drawn_and_the_rest_learns(tiny, rows, tmp_path, part, other):
    frozen = learn(tiny, rows, tmp_path, spec(freeze=part))["a.1"]
    drawn = torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(getattr(frozen, part), drawn) and not torch.equal(getattr(frozen, other), drawn)


@pytest.mark.parametrize("coefficient", [0, 1 / 8])
def test_only_the_dead_latent_loss_moves_a_silent_latent(monkeypatch, coefficient):
    monkeypatch.setattr(train_saes, "AUX_COEFFICIENT", coefficient)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    sae = train_saes.Sae.fresh(x, spec())
    with torch.no_grad():
        sae.b_enc[5] = 0.05 - ((x - sae.mean) * sae.scale @ sae.encoder[5]).max()  # above 0 once, never above the cut
        sae.silent[5] = 2 * train_saes.DEAD_AFTER
    sae.find_dead()
    before = sae.encoder[5].clone(), sae.encoder[6].clone()
    sae.step(x, 8, 1e-2, np.random.default_rng(0))
    assert sae.dead.tolist() == [5] and sae.silent[5] > train_saes.DEAD_AFTER
    assert torch.equal(sae.encoder[5], before[0]) == (coefficient == 0)
    assert not torch.equal(sae.encoder[6], before[1])


def test_a_device_that_fails_is_one_sentence_that_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("NB_CACHE", str(cache_with_corpus(tmp_path)))
    load = train_saes.models.load
    monkeypatch.setattr(train_saes.models, "placement", lambda: "meta")  # any device that is not the CPU
    monkeypatch.setattr(train_saes.models, "load", lambda name, device, dtype: load(name, "cpu", dtype))

    def fails(*args):
        raise RuntimeError("CUDA error: the device is gone\nmore")

    monkeypatch.setattr(train_saes, "learn", fails)
    with pytest.raises(SystemExit) as said:
        train_saes.main(["--model", "tiny", "--layers", "1", "--out", str(tmp_path)])
    assert str(said.value) == (
        "meta failed (CUDA error: the device is gone): call again to go on from the last checkpoint, with "
        "NB_DEVICE=cpu if it stays away."
    )


def test_a_set_takes_what_it_does_not_say_from_the_shipped_one():
    asked = argparse.Namespace(sets="frozen_decoder,second_seed", layers=None, d_sae=None, k=None, tokens=None, lr=None)
    shipped = argparse.Namespace(**{**vars(asked), "sets": "shipped"})
    wide = train_saes.specs(shipped)[0]
    for one in train_saes.specs(asked):
        assert (one.d_sae, one.k, one.tokens, one.lr) == (wide.d_sae, wide.k, wide.tokens, wide.lr)
        assert one.freeze == ("decoder" if one.set == "frozen_decoder" else "") and one.layer in (6, 11)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--sets", "nosuch"], "There is no set 'nosuch'"),
        (["--k", "99", "--d-sae", "64"], "99 of them cannot be active"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(options, says):
    with pytest.raises(SystemExit, match=says):
        train_saes.main(["--model", "tiny", *options])
