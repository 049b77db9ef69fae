"""Interventions: the fast path against hooks, ours on transformers and TransformerLens's, at every tokens and mode."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nb_utils import engine, prompts, saes, tasks
from nb_utils import interventions as changes

WORDS = ["hot", "cold", "big", "small", "up", "down", "old", "new", "wet", "dry", "far", "near"]
MODES = ("add", "replace", "turn", "lengthen", "clamp")


@pytest.fixture(scope="module")
def batch(tiny):
    pool = [tasks.Pair(x, y, (y,)) for x, y in pairwise(WORDS)]
    return prompts.few_shot(tiny.tokenizer, pool, pool[:3], n_shots=3, seed=0)


def edit(model, mode, layer, n=2, seed=0):
    draw = torch.Generator().manual_seed(seed + layer)
    if mode != "clamp":
        make = {"add": changes.add, "replace": changes.substitute, "turn": changes.turn, "lengthen": changes.lengthen}
        return make[mode](torch.randn(n, model.d_model, generator=draw))
    codes = torch.randn(n, 5, generator=draw).abs()
    codes[0, :2] = 0
    codes[1, 3] = torch.nan
    return changes.clamp(saes.random(model, layer), [3, 60, 11, 7, 25], codes)


def grown(what):
    """The same intervention with values to differentiate in, and these."""
    edits = {layer: replace(one, values=one.values.clone().requires_grad_()) for layer, one in what.edits.items()}
    return replace(what, edits=edits), [one.values for one in edits.values()]


def equals_hooks(model, batch, what):
    """Losses and gradients at a site, by hooks of ours and by hooks of TransformerLens."""
    site = engine.Site.prepare(model, batch, at=what.tokens)
    scores, (own, values) = changes.evaluate(site, what, whole=False), grown(what)
    found = changes.losses(site, own)
    gradients = torch.autograd.grad(found.sum(), values)
    other, theirs = grown(what)
    for i, prompt in enumerate(batch):
        expected = changes.plain(model, prompt, other)
        torch.testing.assert_close(scores.nll[:, i, : expected.shape[1]], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[:, i], expected.sum(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(lens(model, prompt, what), expected, atol=1e-4, rtol=0)
    expected = torch.autograd.grad(sum(changes.plain(model, p, other).sum() for p in batch), theirs)
    for ours, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
        assert plain.nan_to_num().abs().sum() > 0


def lens(model, prompt, what):
    """The NLL of the answer through TransformerLens, with hooks written here by hand."""
    at = {
        "separator": [prompt.separators[-1]], "output": prompt.outputs[-1:], "separators": prompt.separators,
        "outputs": prompt.outputs, "every": range(1, len(prompt.ids)),
        "generated": range(prompt.separators[-1], len(prompt.ids)),
    }[what.tokens]  # fmt: skip

    def hook(layer, edit):
        sae, latents = saes.random(model, layer), torch.tensor([3, 60, 11, 7, 25])

        def change(stream, hook):
            stream = stream.clone()
            for step, token in enumerate(at):
                for row, value in enumerate(edit.values):
                    stream[row, token] = moved(stream[row, token], value, what.decay**step)
            return stream

        def moved(h, value, share):
            if edit.mode == "add":
                return h + share * value
            if edit.mode == "replace":
                return h + share * (value - h)
            if edit.mode in ("turn", "lengthen"):
                added = h + share * value
                return added / added.norm() * h.norm() if edit.mode == "turn" else h / h.norm() * added.norm()
            codes = sae.encode(h)
            new = codes.clone()
            new[latents] = torch.where(value.isnan(), codes[latents], value)
            return h + share * (sae.decode(new) - sae.decode(codes))

        return f"blocks.{layer}.hook_resid_post", change

    hooks = [hook(layer, edit) for layer, edit in what.edits.items()]
    logits = model.bridge.run_with_hooks(torch.tensor([prompt.ids] * len(what)), fwd_hooks=hooks)
    first, answer = len(prompt.ids) - len(prompt.answer), torch.tensor(prompt.answer)
    return -logits[:, first - 1 : -1].log_softmax(-1)[:, torch.arange(len(answer)), answer]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", prompts.TOKENS)
def test_losses_and_gradients_equal_those_of_hooks(tiny, batch, tokens, mode):
    equals_hooks(tiny, batch, changes.Intervention({2: edit(tiny, mode, 2)}, tokens))


@pytest.mark.parametrize("tokens", ["separators", "outputs", "every"])
def test_they_do_after_several_blocks_at_once(tiny, batch, tokens):
    edits = {4: edit(tiny, "clamp", 4), 1: edit(tiny, "clamp", 1), 3: edit(tiny, "add", 3)}
    equals_hooks(tiny, batch, changes.Intervention(edits, tokens))


@pytest.mark.parametrize("mode", MODES)
def test_they_do_where_generated_tokens_are_changed_less_and_less(tiny, batch, mode):
    equals_hooks(tiny, batch, changes.Intervention({2: edit(tiny, mode, 2)}, "generated", decay=0.5))


@pytest.mark.parametrize("tokens, decay", [("separator", 1.0), ("generated", 0.5)])
def test_they_do_after_several_blocks_where_a_prompt_has_no_examples_or_an_instruction_alone(tiny, tokens, decay):
    pairs = [tasks.Pair(x, y, (y,)) for x, y in pairwise(WORDS)][:2]
    told = prompts.zero_shot(tiny.tokenizer, pairs[:1], prompts.Template(opening="Say the opposite.\n"))
    edits = {layer: edit(tiny, mode, layer) for layer, mode in ((1, "add"), (2, "turn"), (4, "clamp"))}
    what = changes.Intervention(edits, tokens, decay)
    equals_hooks(tiny, [*prompts.zero_shot(tiny.tokenizer, pairs[1:]), *told], what)


def test_they_do_for_a_topk_sae(tiny, batch):
    sae = replace(saes.random(tiny, 2), k=4, threshold=torch.zeros(64))
    codes = torch.zeros(1, 64)
    what = changes.Intervention({2: changes.clamp(sae, range(64), codes)}, "separators")
    site = engine.Site.prepare(tiny, batch, at="separators")
    found = changes.losses(site, what)
    assert (found - site.unsteered(whole=False).nll.nansum(-1)).abs().min() > 1e-3
    for i, prompt in enumerate(batch):
        torch.testing.assert_close(found[:, i], changes.plain(tiny, prompt, what).sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", ["separators", "generated"])
def test_vectors_at_one_token_are_what_a_site_does_with_them(tiny, batch, tokens):
    """Decayed at once, what is done to generated tokens is done to the separator."""
    one = changes.Intervention({2: edit(tiny, "add", 2)}, "generated", 0.0)
    site = engine.Site.prepare(tiny, batch)
    at = replace(one, tokens="separator", decay=1.0)
    expected = site.evaluate(one.edits[2].values, 2).nll
    assert torch.equal(changes.evaluate(site, at).nll.nan_to_num(), expected.nan_to_num())
    found = changes.evaluate(engine.Site.prepare(tiny, batch, at="generated"), one).nll
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", prompts.TOKENS)
def test_a_site_that_runs_every_token_again_serves_all_of_them(tiny, batch, tokens):
    what = changes.Intervention({2: edit(tiny, "clamp", 2)}, tokens)
    own, every = (engine.Site.prepare(tiny, batch, at=at) for at in (tokens, "every"))
    torch.testing.assert_close(changes.losses(every, what), changes.losses(own, what), atol=1e-4, rtol=0)


NOTHING = {
    "scale 0": lambda model, layer: changes.add(0 * torch.randn(2, model.d_model)),
    "turn by 0": lambda model, layer: changes.turn(torch.zeros(2, model.d_model)),
    "lengthen by 0": lambda model, layer: changes.lengthen(torch.zeros(2, model.d_model)),
    "no latent": lambda model, layer: changes.clamp(saes.random(model, layer), [], torch.zeros(2, 0)),
    "no code": lambda model, layer: changes.clamp(saes.random(model, layer), [1, 2], torch.full((2, 2), torch.nan)),
}


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("tokens", prompts.TOKENS)
@torch.no_grad()
def test_scale_0_and_the_empty_set_change_nothing_to_the_last_bit(tiny, batch, tokens, nothing):
    what = changes.Intervention({layer: nothing(tiny, layer) for layer in (1, 3)}, tokens)
    for prompt in batch:
        ids = torch.tensor([prompt.ids[:-1]]).expand(2, -1)
        logits = tiny.hf(ids, use_cache=False).logits
        with changes.hooked(tiny, what, changes.strength(prompt, tokens)[:-1]):
            assert torch.equal(tiny.hf(ids, use_cache=False).logits, logits)
    site = engine.Site.prepare(tiny, batch, at=tokens)
    base = site.residual[1].expand(2, *site.residual[1].shape)
    assert torch.equal(changes.streams(site, what), site.replay(site.replay(base, 2, 4), 4))


@torch.no_grad()
def test_turning_and_lengthening_are_the_two_halves_of_adding(tiny):
    stream, vectors = torch.randn(2, 3, 4, tiny.d_model), torch.randn(2, tiny.d_model)
    whole = torch.ones(3, 4)
    added, turned, longer = (make(vectors)(stream, whole) for make in (changes.add, changes.turn, changes.lengthen))
    torch.testing.assert_close(turned.norm(dim=-1), stream.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(turned, added, dim=-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(longer.norm(dim=-1), added.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(longer, stream, dim=-1), torch.ones(2, 3, 4))


def test_what_a_stream_turns_by_and_how_much_longer_it_gets_is_measured_where_it_is_changed(tiny, batch):
    site = engine.Site.prepare(tiny, batch, at="every")
    at = changes.strengths(site, "separators") > 0
    draw = torch.Generator().manual_seed(0)
    stream, vector = site.residual[2][at].double(), torch.randn(tiny.d_model, generator=draw)
    ways = torch.stack([vector, 0 * vector, 3 * vector])
    angle, longer = changes.moves(site, changes.Intervention({2: changes.add(ways)}, "separators"))
    moved = stream + 3 * vector
    cosine = (stream * moved).sum(-1) / stream.norm(dim=-1) / moved.norm(dim=-1)
    assert angle[2].item() == pytest.approx(cosine.acos().rad2deg().mean().item(), abs=1e-3)
    assert longer[2].item() == pytest.approx((moved.norm(dim=-1) / stream.norm(dim=-1)).mean().item(), abs=1e-5)
    assert angle[1].abs() < 1e-3 and longer[1] == 1 and angle[0] < angle[2]
    turned, same = changes.moves(site, changes.Intervention({2: changes.turn(ways)}, "separators"))
    torch.testing.assert_close(turned, angle, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(same, torch.ones_like(same))
    _, kept = changes.moves(site, changes.Intervention({2: changes.lengthen(ways), 3: changes.add(0 * ways)}, "every"))
    assert kept[2] > 1 and len(kept) == 3


@torch.no_grad()
def test_the_cost_of_a_change_is_the_divergence_of_plain_passes_a_token(tiny, batch):
    what = changes.Intervention({2: edit(tiny, "add", 2), 3: edit(tiny, "clamp", 3)}, "generated", 0.5)
    found = changes.divergence(engine.Site.prepare(tiny, batch, at="generated"), what)
    for i, prompt in enumerate(batch):
        ids = torch.tensor([prompt.ids[:-1]]).expand(2, -1)
        before = tiny.hf(ids).logits[:, -len(prompt.answer) :].log_softmax(-1)
        with changes.hooked(tiny, what, changes.strength(prompt, "generated", 0.5)[:-1]):
            now = tiny.hf(ids, use_cache=False).logits[:, -len(prompt.answer) :].log_softmax(-1)
        torch.testing.assert_close(found[:, i], (before.exp() * (before - now)).sum(-1).mean(-1), atol=1e-4, rtol=0)
    assert found.min() > 1e-3
    nothing = changes.Intervention({2: changes.add(torch.zeros(1, tiny.d_model))}, "generated")
    assert changes.divergence(engine.Site.prepare(tiny, batch, at="generated"), nothing).abs().max() < 1e-5


@torch.no_grad()
def test_no_bit_of_a_token_moves_where_nothing_is_done(tiny):
    stream = torch.randn(2, 3, 4, tiny.d_model)
    strength = torch.tensor([[0.0, 1, 0, 0.5]] * 3)
    for mode in MODES:
        found = edit(tiny, mode, 2)(stream, strength)
        same = (found == stream).all(-1).all(1).all(0)
        assert same.tolist() == [True, False, True, False], mode
    whole = edit(tiny, "replace", 2)
    assert torch.equal(whole(stream, strength)[:, 0, 1], whole.values)


def test_what_an_sae_does_not_explain_stays_when_its_features_go(tiny):
    sae = saes.random(tiny, 2)
    stream = torch.randn(1, 2, 3, tiny.d_model)
    ablated = changes.clamp(sae, range(sae.d_sae), torch.zeros(1, sae.d_sae))(stream, torch.ones(2, 3))
    codes = sae.encode(stream)
    error = stream - sae.decode(codes)
    torch.testing.assert_close(ablated, error + sae.b_dec, atol=1e-5, rtol=0)
    mean = codes.mean((0, 1, 2))
    moved = changes.clamp(sae, range(sae.d_sae), mean[None])(stream, torch.ones(2, 3))
    torch.testing.assert_close(moved, error + sae.decode(mean), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens, decay", [("separators", 1.0), ("every", 1.0), ("generated", 1.0), ("generated", 0.5)])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "lengthen"])  # which hardly changes what is said
def test_a_continuation_is_the_same_with_and_without_a_cache(tiny, batch, mode, tokens, decay):
    what = edit(tiny, mode, 2, n=4)
    bold = 300 * torch.eye(5)[:4] if mode == "clamp" else 30 * what.values  # so that the ways say different things
    bold = changes.Intervention({2: replace(what, values=bold)}, tokens, decay)
    cached, anew = (changes.continuations(tiny, batch[0], bold, 6, cache=cache) for cache in (True, False))
    assert cached == anew and len(set(cached)) > 1


@pytest.mark.parametrize("tokens, decay", [("separator", 1.0), ("generated", 0.5)])
@torch.no_grad()
def test_a_continuation_is_what_plain_passes_say_one_token_at_a_time_and_stops_at_a_line_s_end(
    tiny, batch, tokens, decay
):
    vectors = 30 * torch.randn(4, tiny.d_model, generator=torch.Generator().manual_seed(1))
    prompt = batch[1]
    head = prompt.ids[: prompt.separators[-1] + 1]
    what = changes.Intervention({2: changes.add(vectors)}, tokens, decay)
    found = changes.continuations(tiny, prompt, what, 6)
    for vector, text in zip(vectors, found, strict=True):
        said = ()
        for _ in range(6):
            ids = torch.tensor([head + said])
            hook = by_hand(vector, len(head) - 1, 0.0 if tokens == "separator" else decay)
            logits = tiny.bridge.run_with_hooks(ids, fwd_hooks=[("blocks.2.hook_resid_post", hook)])
            said += (int(logits[0, -1].argmax()),)
        assert text == tiny.tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]
    assert len(set(found)) > 1, "the vectors change nothing"


def by_hand(vector, first, decay):
    """A hook of TransformerLens that adds a vector to one token, and less and less to those after it."""

    def hook(stream, hook):
        stream = stream.clone()
        for step, token in enumerate(range(first, stream.shape[1])):
            stream[:, token] += decay**step * vector
        return stream

    return hook


def test_hooks_are_gone_after_an_exception(tiny, batch):
    def fail(*_):
        raise RuntimeError("stop")

    what = changes.Intervention({1: edit(tiny, "add", 1), 2: changes.Edit("fail", torch.zeros(2, 1), fail)})
    with pytest.raises(RuntimeError, match="stop"):
        changes.plain(tiny, batch[0], what)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in tiny.layout.blocks)


def test_what_makes_no_sense_is_refused(tiny, batch):
    one = edit(tiny, "add", 2)
    with pytest.raises(ValueError, match="one of separator, output"):
        changes.Intervention({2: one}, "arrows")
    with pytest.raises(ValueError, match="at least one block"):
        changes.Intervention({})
    with pytest.raises(ValueError, match="equally many ways"):
        changes.Intervention({2: one, 3: edit(tiny, "add", 3, n=3)})
    with pytest.raises(ValueError, match="can decay, not to separators"):
        changes.Intervention({2: one}, "separators", 0.5)
    with pytest.raises(ValueError, match="prepared for separator does not run all outputs"):
        changes.losses(engine.Site.prepare(tiny, batch), changes.Intervention({2: one}, "outputs"))
    with pytest.raises(ValueError, match="for one token or every one, not for separators"):
        engine.Site.prepare(tiny, batch, at="separators").evaluate(one.values, 2)
