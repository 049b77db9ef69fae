"""Heads: what each adds is exact, and patching one is a hook on the output projection."""

import dataclasses

import pytest
import torch
import transformers

from nb_utils import engine, heads, models, prompts, tasks
from nb_utils.layouts import LayoutError

SIZES = dict(
    vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
BEFORE_MLP = {"Gemma3": "pre_feedforward_layernorm", "Llama": "post_attention_layernorm"}


def pairs(n=6):
    words = ["hot", "cold", "big", "small", "up", "down", "old", "new", "wet", "dry", "far", "near"]
    return [tasks.Pair(words[i], words[i + 1], (words[i + 1],)) for i in range(n)]


def random_model(kind, tokenizer, **more):
    """Build a random model of a class of transformers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        hf = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**SIZES | more))
        for parameter in hf.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.05)
    return models.Model(kind, hf.eval().requires_grad_(False), tokenizer, "")


@pytest.fixture(scope="module", params=["Gemma3", "Llama", "gemma-3-270m"])
def model(request, tiny):
    return {"Gemma3": tiny}.get(request.param) or (
        models.load(request.param) if "-" in request.param else random_model(request.param, tiny.tokenizer))


def shown(model, n=3, shots=2):
    return prompts.few_shot(model.tokenizer, pairs(), pairs()[:n], n_shots=shots, seed=0)


def attention_adds(model, prompt, position):
    """Return what attention adds in every block at a token: the stream before the MLP's norm less that of the block."""
    before, between, handles = {}, {}, []
    norm = BEFORE_MLP["Gemma3" if hasattr(model.layout.blocks[0], "pre_feedforward_layernorm") else "Llama"]
    for layer, block in enumerate(model.layout.blocks):
        keep = lambda module, args, layer=layer, where=before: where.update({layer: args[0][0, position]})  # noqa: E731
        handles.append(block.register_forward_pre_hook(keep))
        keep = lambda module, args, layer=layer: between.update({layer: args[0][0, position]})  # noqa: E731
        handles.append(getattr(block, norm).register_forward_pre_hook(keep))
    model.hf(torch.tensor([prompt.ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([between[layer] - before[layer] for layer in before])


def test_the_shares_of_attention_make_what_a_head_says(model):
    found, values = shown(model), {}
    usual = model.hf.config._attn_implementation
    shares = heads.attended(model, found, batch=2)
    assert model.hf.config._attn_implementation == usual
    assert not any(part._forward_hooks for block in model.layout.blocks for part in block.modules()), "a hook was left"
    for prompt, share in zip(found, shares, strict=True):
        end = prompt.separators[-1] + 1
        assert share.shape == (model.n_layers, model.layout.n_heads, end)
        assert torch.allclose(share.sum(-1), torch.ones(()), atol=1e-5)
        for layer, block in enumerate(model.layout.blocks):
            keep = lambda module, args, out, layer=layer, end=end: values.update({layer: out[0, :end]})  # noqa: E731
            handle = block.self_attn.v_proj.register_forward_hook(keep)
            model.layout.core(torch.tensor([prompt.ids]), use_cache=False)
            handle.remove()
        z = heads.of(model, [prompt], [(end - 1,)]).z[0]
        for layer, value in values.items():
            value = value.unflatten(-1, (-1, z.shape[-1])).repeat_interleave(
                model.layout.n_heads * z.shape[-1] // value.shape[-1], dim=1)  # fmt: skip
            assert torch.allclose(torch.einsum("ht,thk->hk", share[layer], value), z[layer], atol=1e-3), layer


def test_contributions_sum_to_what_attention_adds(model):
    batch = shown(model)
    found = heads.of(model, batch, [p.separators[-1:] for p in batch])
    made = heads.contributions(model, found.scaled)
    assert made.shape == (len(batch), model.n_layers, model.layout.n_heads, model.d_model)
    for i, prompt in enumerate(batch):
        adds = attention_adds(model, prompt, prompt.separators[-1])
        error = (made[i].sum(1) - adds).norm(dim=-1) / adds.norm(dim=-1)
        assert error.max() < 1e-5


def test_a_mean_of_scaled_outputs_gives_the_mean_contribution(model):
    batch = shown(model)
    found = heads.of(model, batch, [p.separators for p in batch])
    mean = heads.contributions(model, found.scaled).mean(0)
    assert (heads.contributions(model, found.scaled.mean(0)) - mean).norm() < 1e-5 * mean.norm()


def test_the_literal_output_is_the_contribution_only_where_no_norm_follows_attention(model):
    batch = shown(model)
    found = heads.of(model, batch, [p.separators[-1:] for p in batch])
    same = torch.allclose(heads.literal(model, found.z), heads.contributions(model, found.scaled), rtol=1e-4, atol=1e-5)
    assert same == (model.layout.after_attention(0) is None) == bool((found.scale == 1).all())


@pytest.mark.parametrize("kind, more", [("Gemma2", {"query_pre_attn_scalar": 16}), ("Olmo2", {}), ("Qwen2", {}),
                                        ("Granite", {"residual_multiplier": 0.5}), ("GPT2", {})])  # fmt: skip
def test_heads_of_other_families_sum_to_what_attention_adds(kind, more, tiny):
    if kind == "GPT2":
        more = {"n_embd": 32, "n_layer": 4, "n_head": 4}
    other = random_model(kind, tiny.tokenizer, **more)
    (prompt,) = shown(other, 1)
    made = heads.contributions(other, heads.of(other, [prompt], [prompt.separators[-1:]]).scaled)[0].sum(1)
    norms = {"GPT2": "ln_2", "Gemma2": "pre_feedforward_layernorm", "Olmo2": "mlp"}
    before, between = [], []
    for block in other.layout.blocks:
        block.register_forward_pre_hook(lambda module, args: before.append(args[0][0, prompt.separators[-1]]))
        part = getattr(block, norms.get(kind, "post_attention_layernorm"))
        part.register_forward_pre_hook(lambda module, args: between.append(args[0][0, prompt.separators[-1]]))
    other.hf(torch.tensor([prompt.ids]))
    bias = torch.stack([getattr(other.layout.mixer(layer), "bias", None) if kind == "GPT2" else torch.zeros(32)
                        for layer in range(4)])  # fmt: skip
    torch.testing.assert_close(made + bias, torch.stack(between) - torch.stack(before), atol=1e-4, rtol=1e-4)


def test_a_model_whose_heads_cannot_be_told_apart_says_so(tiny):
    mamba = models.Model("Mamba", transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=2)).eval(), tiny.tokenizer, "")
    with pytest.raises(LayoutError, match="no output projection of attention"):
        mamba.layout.mixer(0)


def own(model, batch):
    return heads.of(model, batch, [p.separators[-1:] for p in batch]).z


def test_patching_its_own_outputs_changes_nothing(model):
    batch = shown(model)
    site = engine.Site.prepare(model, batch)
    everywhere = torch.ones(1, model.n_layers, model.layout.n_heads)
    patch = heads.Patch(own(model, batch)[None], everywhere)
    plain, patched = site.unsteered().nll, heads.evaluate(site, patch).nll
    few = 4 * torch.finfo(torch.float32).eps  # units in the last place of losses of some nats
    torch.testing.assert_close(patched, plain, atol=1e-4 if model.name == "gemma-3-270m" else 0, rtol=few,
                               equal_nan=True)  # fmt: skip
    for layer in (0, model.n_layers - 1):
        stream = heads.after(site, patch, layer)[0]
        assert (stream - site.at(layer)).norm() < 1e-6 * site.at(layer).norm() * model.n_layers


def test_no_head_patched_is_the_identity_to_the_last_bit(model):
    site = engine.Site.prepare(model, shown(model))
    nothing = heads.Patch(own(model, site.prompts)[0], torch.zeros(1, model.n_layers, model.layout.n_heads))
    assert heads.evaluate(site, nothing).nll.nan_to_num().equal(site.unsteered().nll.nan_to_num())
    torch.testing.assert_close(heads.losses(site, nothing)[0], site.unsteered().loss(99)[0], atol=1e-4, rtol=0)


def test_a_random_output_changes_the_logits(model):
    """Where a block returns no tuple, a port of the original that expects one changes nothing, without an error."""
    site = engine.Site.prepare(model, shown(model))
    z = own(model, site.prompts)
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0)) * z.std() * 3
    for layer in (0, model.n_layers - 1):
        patch = heads.Patch(noise, heads.mask(model, [(layer, 1)])[None])
        assert (heads.losses(site, patch)[0] - site.unsteered().loss(99)[0]).abs().min() > 1e-4


def plain(model, prompt, values, where, mode):
    """NLL of every answer token from one unpadded pass of the plain model, heads patched one by one in a loop."""
    at, handles = prompt.separators[-1], []
    for layer in range(model.n_layers):

        def change(mixer, args, layer=layer):
            said, new = args[0], []
            for head, before in enumerate(said[0, at].chunk(model.layout.n_heads)):
                share = where[layer, head]
                new.append((before if mode == "add" else (1 - share) * before) + share * values[layer, head])
            return (torch.cat([said[:, :at], torch.cat(new)[None, None], said[:, at + 1 :]], 1),)

        handles.append(model.layout.mixer(layer).register_forward_pre_hook(change))
    logits = model.hf(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    first = len(prompt.ids) - len(prompt.answer)
    return -logits[torch.arange(first - 1, len(prompt.ids) - 1), torch.tensor(prompt.answer)]


def cases(model, n=3):
    """Return random values and masks of three kinds: one head, some heads of late blocks, shares everywhere."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(n, model.n_layers, model.layout.n_heads, model.layout.d_head, generator=draw)
    late = (torch.rand(model.n_layers, model.layout.n_heads, generator=draw) < 0.5).float()
    late[:2] = 0
    share = torch.rand(model.n_layers, model.layout.n_heads, generator=draw)
    return values, torch.stack([heads.mask(model, [(2, 1)]), late, share])


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_patched_losses_equal_those_of_a_plain_pass_with_hooks(model, mode):
    batch = shown(model)
    site = engine.Site.prepare(model, batch)
    values, where = cases(model)
    found = heads.evaluate(site, heads.Patch(values, where, mode)).nll
    for i in range(len(where)):
        for j, prompt in enumerate(batch):
            expected = plain(model, prompt, values[i], where[i], mode)
            torch.testing.assert_close(found[i, j, : len(expected)], expected, atol=2e-4, rtol=1e-4)
        alone = heads.losses(site, heads.Patch(values[i], where[i : i + 1], mode))[0]
        torch.testing.assert_close(alone, found[i].nansum(-1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_gradients_in_masks_and_values_equal_those_of_a_plain_pass(tiny, mode):
    batch = shown(tiny)
    site = engine.Site.prepare(tiny, batch)
    values, where = (part[2].clone() for part in cases(tiny))
    ours = values.clone().requires_grad_(), where.clone().requires_grad_()
    heads.losses(site, heads.Patch(ours[0], ours[1][None], mode)).sum().backward()
    theirs = values.clone().requires_grad_(), where.clone().requires_grad_()
    sum(plain(tiny, prompt, *theirs, mode).sum() for prompt in batch).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-3)


def test_gradients_don_t_depend_on_how_many_fit_at_once(tiny, monkeypatch):
    site, (values, where) = engine.Site.prepare(tiny, shown(tiny)), cases(tiny)
    masks = [where.clone().requires_grad_() for _ in range(2)]
    heads.losses(site, heads.Patch(values, masks[0])).sum().backward()
    monkeypatch.setattr(engine, "BYTE_BUDGET", 1)
    heads.losses(site, heads.Patch(values, masks[1])).sum().backward()
    torch.testing.assert_close(masks[1].grad, masks[0].grad, atol=1e-5, rtol=1e-4)


def test_every_prompt_may_have_a_mask_and_values_of_its_own_and_come_more_than_once(tiny):
    site, (values, where) = engine.Site.prepare(tiny, shown(tiny)), cases(tiny)
    everything = heads.losses(site, heads.Patch(values, where))
    order = torch.tensor([2, 0, 2, 1])
    which = torch.tensor([0, 1, 2, 2])
    patch = heads.Patch(values[which][None], where[which][None])
    found = heads.losses(site.take(order), patch)
    torch.testing.assert_close(found[0], everything[which, order], atol=1e-4, rtol=0)
    whole = heads.evaluate(site.take(order), patch)
    torch.testing.assert_close(whole.loss(99)[0], everything[which, order], atol=1e-4, rtol=0)


def test_the_end_of_the_line_is_asked_for_with_the_patch_of_the_same_prompt(tiny):
    """An answer is exact only if the line then ends; whether it does is read with the heads still patched."""
    site, (values, where) = engine.Site.prepare(tiny, shown(tiny)), cases(tiny)
    said = heads.after(site, heads.Patch(values, where), tiny.n_layers - 1)
    first = tiny.layout.logits(tiny.layout.norm(said)).argmax(-1)
    own_answer = [dataclasses.replace(p, answer=(int(first[1, i]),), accepted=((int(first[1, i]),),),
                                      ids=(*p.ids[: -len(p.answer)], int(first[1, i])))
                  for i, p in enumerate(site.prompts)]  # fmt: skip
    answering = engine.Site.prepare(tiny, own_answer)
    scores = heads.evaluate(answering, heads.Patch(values, where))
    assert scores.accepted[1].all()
    for i, prompt in enumerate(own_answer):
        longer = dataclasses.replace(prompt, ids=(*prompt.ids, 5), answer=(*prompt.answer, 5))
        then = heads.streams(engine.Site.prepare(tiny, [longer]), heads.Patch(values[1], where[1][None]))[0, 0, 1]
        ends = engine._ends_line(tiny, int(tiny.layout.logits(tiny.layout.norm(then)).argmax()))
        assert scores.exact[1, i] == float(ends)


def test_streams_after_an_early_block_are_read_without_running_later_ones(tiny):
    site, (values, where) = engine.Site.prepare(tiny, shown(tiny)), cases(tiny)
    early = heads.after(site, heads.Patch(values, where), 1)
    assert early[:2].sub(site.at(1)).abs().max() == 0  # those two patch only later blocks
    assert early[2].sub(site.at(1)).abs().max() > 1e-3


def test_a_head_with_no_way_into_the_stream_has_no_effect(tiny):
    model = random_model("Llama", tiny.tokenizer)
    weight = model.layout.mixer(2).weight
    weight[:, 16:32] = 0
    site = engine.Site.prepare(model, shown(model))
    noise = torch.randn(4, 4, 16)
    silent, heard = (heads.losses(site, heads.Patch(noise, heads.mask(model, [(2, head)])[None])) for head in (1, 2))
    before = site.unsteered().loss(99)
    torch.testing.assert_close(silent, before, atol=1e-5, rtol=0)
    assert (heard - before).abs().max() > 1e-3


def test_hooks_are_gone_after_an_error(tiny):
    site, (values, where) = engine.Site.prepare(tiny, shown(tiny)), cases(tiny)
    with pytest.raises(RuntimeError):
        heads.losses(site, heads.Patch(values[..., :3], where))
    assert not any(tiny.layout.mixer(layer)._forward_pre_hooks for layer in range(tiny.n_layers))


def test_a_patch_of_another_mode_or_shape_is_refused():
    with pytest.raises(ValueError, match="'add' or 'replace'"):
        heads.Patch(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), "clamp")
    with pytest.raises(ValueError, match="A patch needs"):
        heads.Patch(torch.zeros(1, 1, 1), torch.zeros(1, 1))


def planted(masks):
    """Items 1 and 4 are worth 1 each, 2 and 3 only together, 0 costs .5, the rest nothing; prompts differ by far."""
    both = masks[:, 2] * masks[:, 3]
    worth = masks[:, 1] + masks[:, 4] + 2 * both - masks[:, 2] / 2 - masks[:, 3] / 2 - masks[:, 0] / 2
    return worth[:, None] + torch.tensor([-20.0, 0.0, 5.0, 90.0])


SEARCH = dict(steps=120, masks=24, rate=0.15, price=0.1)


def test_reward_finds_the_best_set_also_where_items_are_worth_something_only_together():
    for seed in range(5):
        found = heads.by_reward(planted, 8, **SEARCH, seed=seed)
        assert found.kept.nonzero()[:, 0].tolist() == [1, 2, 3, 4]
        assert found.history[-20:].mean() > found.history[:20].mean() + 1
        assert found.path.shape == (121, 8) and found.path[-1].equal(found.probabilities)


def test_reward_finds_it_with_each_mask_tried_on_one_prompt_alone():
    """A baseline over all prompts drowns in their differences (here 110 against 4); one a prompt does not."""

    def sparse(masks):
        turn = torch.arange(len(masks))[:, None] % 4 == torch.arange(4)
        return planted(masks).masked_fill(~turn, torch.nan)

    found = heads.by_reward(sparse, 8, **SEARCH)
    assert found.kept.nonzero()[:, 0].tolist() == [1, 2, 3, 4]


def test_a_constant_reward_moves_nothing_but_by_the_price():
    constant = lambda masks: torch.full((len(masks), 3), 0.1)  # noqa: E731
    still = heads.by_reward(constant, 5, **SEARCH | {"price": 0.0})
    assert still.path.eq(0.5).all() and not still.kept.any()
    assert heads.by_reward(constant, 5, **SEARCH, start=1.0).probabilities.max() < 0.05


def test_the_gradient_of_shares_finds_what_reward_finds():
    found = heads.by_gradient(planted, 8, steps=120, rate=0.15, price=0.1)
    assert found.kept.nonzero()[:, 0].tolist() == [1, 2, 3, 4]


def test_the_estimated_gradient_is_the_exact_one_on_average(monkeypatch):
    """Two masks a step, over many seeds, against all 256 masks weighed by their probability."""
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    odds = torch.full((8,), 0.4, requires_grad=True)
    chance = (every * odds.sigmoid() + (1 - every) * (1 - odds.sigmoid())).prod(1)
    exact = torch.autograd.grad((chance * (planted(every).mean(1) - 0.1 * every.sum(1))).sum(), odds)[0]
    taken = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: taken.append(-self.param_groups[0]["params"][0].grad))
    for seed in range(1500):
        heads.by_reward(planted, 8, steps=1, masks=2, rate=1.0, price=0.1, start=0.4, seed=seed)
    torch.testing.assert_close(torch.stack(taken).mean(0), exact, atol=0.06, rtol=0)


def test_one_mask_a_step_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        heads.by_reward(planted, 8, **SEARCH | {"masks": 1})
