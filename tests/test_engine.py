"""The engine against the plain way: a full forward pass through TransformerBridge with a hook."""

import copy
import dataclasses

import pytest
import torch

from nb_utils import engine, models, prompts, tasks


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def other(request, tmp_path_factory):
    """Save a random model of another architecture as a user's folder, soft-capped twice in the case of Gemma 2."""
    import transformers

    sizes = dict(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )
    if request.param == "gemma2":
        sizes |= dict(query_pre_attn_scalar=16, sliding_window=16)
        sizes |= dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
    name = request.param.title()
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in hf.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.05)
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder)
    models.load("tiny").tokenizer.save_pretrained(folder)
    return models.load(str(folder))


def pairs(n=6):
    words = ["hot", "cold", "big", "small", "up", "down", "old", "new", "wet", "dry", "far", "near"]
    return [tasks.Pair(words[i], words[i + 1], (words[i + 1],)) for i in range(n)]


def plain(model, prompt, vector, layer, mode, at="separator"):
    """NLL of every answer token from one unpadded forward pass through TransformerLens."""
    ids = torch.tensor([prompt.ids])
    position = prompt.separators[-1] if at == "separator" else prompt.outputs[-1]

    def steer(stream, hook):
        before, here, after = stream[:, :position], stream[:, position : position + 1], stream[:, position + 1 :]
        here = here + vector if mode == "add" else vector.expand_as(here)
        return torch.cat([before, here, after], dim=1)

    logits = model.bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", steer)])
    first = len(prompt.ids) - len(prompt.answer)
    log_probs = logits[0].log_softmax(-1)
    return -log_probs[torch.arange(first - 1, len(prompt.ids) - 1), torch.tensor(prompt.answer)]


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("at", ["separator", "output"])
def test_losses_and_gradients_equal_a_hooked_forward_pass(tiny, mode, layer, at):
    equals_a_hooked_pass(tiny, mode, layer, at)


@pytest.mark.parametrize("mode, layer, at", [("add", 1, "separator"), ("add", 3, "output"), ("replace", 2, "output")])
def test_they_do_for_gemma_2_and_llama_as_well(other, mode, layer, at):
    equals_a_hooked_pass(other, mode, layer, at)


def equals_a_hooked_pass(model, mode, layer, at):
    pool = pairs()
    batch = prompts.few_shot(model.tokenizer, pool, pool[:3], n_shots=2, seed=0)
    site = engine.Site.prepare(model, batch, at=at)
    vectors = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(1))
    scores = site.evaluate(vectors, layer, mode)
    for i, vector in enumerate(vectors):
        for j, prompt in enumerate(batch):
            expected = plain(model, prompt, vector, layer, mode, at)
            torch.testing.assert_close(scores.nll[i, j, : len(expected)], expected, atol=1e-4, rtol=0)
            assert scores.nll[i, j, len(expected) :].isnan().all()
    ours = vectors.clone().requires_grad_()
    site.loss(ours, layer, mode).sum().backward()
    theirs = vectors.clone().requires_grad_()
    sum(plain(model, p, v, layer, mode, at).sum() for v in theirs for p in batch).div(len(batch)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_adding_zero_is_the_identity(tiny):
    batch = prompts.zero_shot(tiny.tokenizer, pairs())
    site = engine.Site.prepare(tiny, batch)
    zero = torch.zeros(1, tiny.d_model)
    base = site.unsteered().nll
    for layer in range(tiny.n_layers):
        torch.testing.assert_close(site.evaluate(zero, layer).nll, base, atol=1e-4, rtol=0, equal_nan=True)


def test_prompts_as_they_are_need_no_vector_and_are_asked_for_whole_answers_only_if_wanted(tiny):
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pairs()))
    zero, last = torch.zeros(1, tiny.d_model), tiny.n_layers - 1
    assert torch.equal(site.log_probs(), site.log_probs(zero, last))
    whole, part = site.unsteered(), site.unsteered(whole=False)
    assert torch.equal(whole.nll.nan_to_num(), site.evaluate(zero, last).nll.nan_to_num())
    assert torch.equal(whole.nll.nan_to_num(), part.nll.nan_to_num()) and torch.equal(whole.accepted, part.accepted)
    assert part.exact.isnan().all() and not whole.exact.isnan().any()


def test_replacing_by_the_own_residual_is_the_identity(tiny):
    batch = prompts.zero_shot(tiny.tokenizer, pairs(1))
    site = engine.Site.prepare(tiny, batch)
    torch.testing.assert_close(
        site.evaluate(site.at(2), 2, "replace").nll, site.unsteered().nll, atol=1e-4, rtol=0, equal_nan=True
    )


def test_residuals_are_transformer_lens_hook_values(tiny):
    pool = pairs()
    batch = prompts.few_shot(tiny.tokenizer, pool, pool[:3], n_shots=3, seed=0)
    ours = engine.residuals(tiny, batch, [p.separators for p in batch], [1, 4])
    for layer in (1, 4):
        theirs = []
        for prompt in batch:
            _, cache = tiny.bridge.run_with_cache(torch.tensor([prompt.ids]))
            theirs.append(cache[f"blocks.{layer}.hook_resid_post"][0, list(prompt.separators)])
        torch.testing.assert_close(ours[layer], torch.cat(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at", ["separator", "output"])
def test_reading_at_a_later_block_gives_the_hook_values_of_a_steered_pass(tiny, at):
    pool = pairs()
    batch = prompts.few_shot(tiny.tokenizer, pool, pool[:3], n_shots=2, seed=0)
    site = engine.Site.prepare(tiny, batch, at=at)
    vectors = torch.randn(2, tiny.d_model, generator=torch.Generator().manual_seed(1))
    read = site.read(vectors, 1, 4)
    for i, vector in enumerate(vectors):
        for j, prompt in enumerate(batch):
            position = prompt.separators[-1] if at == "separator" else prompt.outputs[-1]
            seen = {}

            def steer(stream, hook, vector=vector, position=position):
                stream = stream.clone()
                stream[:, position] += vector
                return stream

            def keep(stream, hook, seen=seen, position=position):
                seen["there"] = stream[0, position]

            hooks = [("blocks.1.hook_resid_post", steer), ("blocks.4.hook_resid_post", keep)]
            tiny.bridge.run_with_hooks(torch.tensor([prompt.ids]), fwd_hooks=hooks)
            torch.testing.assert_close(read[i, j], seen["there"], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="earlier"):
        site.read(vectors, 3, 2)


def test_no_hook_stays_behind(tiny):
    batch = prompts.zero_shot(tiny.tokenizer, pairs())
    engine.Site.prepare(tiny, batch)
    engine.residuals(tiny, batch, [p.separators for p in batch], [1])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in tiny.hf.model.layers)


def test_a_vocabulary_of_every_token_changes_nothing_and_a_small_one_keeps_the_answers(tiny):
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pairs()))
    vectors = torch.randn(3, tiny.d_model)
    whole = engine.vocabulary(site, keep=10**6)
    torch.testing.assert_close(site.loss(vectors, 2, vocabulary=whole), site.loss(vectors, 2))
    small = engine.vocabulary(site, keep=20)
    assert (small.index[site.labels] >= 0).all() and len(small.weight) == 20


def test_chunks_do_not_change_the_result(tiny, monkeypatch):
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pairs()))
    vectors = torch.randn(7, tiny.d_model, requires_grad=True)
    scores, loss, small = site.evaluate(vectors, 2), site.loss(vectors, 2), engine.vocabulary(site, keep=20)
    loss.square().sum().backward()
    gradient, vectors.grad = vectors.grad, None
    monkeypatch.setattr(engine, "BYTE_BUDGET", 50_000)
    monkeypatch.setattr(engine, "VOCABULARY_BLOCK", 7)
    assert site._chunk(1, 7) < len(vectors)
    again = site.evaluate(vectors, 2)
    torch.testing.assert_close(again.nll, scores.nll, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(again.hit, scores.hit) and torch.equal(again.accepted, scores.accepted)
    in_parts = site.loss(vectors, 2)
    torch.testing.assert_close(in_parts, loss)
    in_parts.square().sum().backward()
    torch.testing.assert_close(vectors.grad, gradient)
    assert torch.equal(engine.vocabulary(site, keep=20).index, small.index)


def test_an_empty_site_and_an_unknown_mode_are_refused(tiny):
    with pytest.raises(ValueError, match="at least one prompt"):
        engine.Site.prepare(tiny, [])
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pairs(1)))
    with pytest.raises(ValueError, match="add"):
        site.evaluate(torch.zeros(1, tiny.d_model), 1, "multiply")


def test_kl_is_zero_for_the_own_distribution_and_matches_torch_otherwise(tiny):
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pairs()))
    vectors = torch.randn(2, tiny.d_model)
    steered = site.log_probs(vectors, 2)
    kl = site.evaluate(vectors, 2, reference=steered[0]).kl
    assert kl[0].abs().max() < 1e-4
    expected = torch.nn.functional.kl_div(steered[1], steered[0], log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl[1], expected, atol=1e-4, rtol=1e-4)


def test_taking_prompts_equals_preparing_them_alone(tiny):
    batch = prompts.zero_shot(tiny.tokenizer, pairs())
    site = engine.Site.prepare(tiny, batch)
    vectors = torch.randn(2, tiny.d_model)
    order = torch.tensor([4, 1])
    alone = engine.Site.prepare(tiny, [batch[4], batch[1]])
    torch.testing.assert_close(site.take(order).loss(vectors, 1), alone.loss(vectors, 1), atol=1e-4, rtol=0)


# --- whole answers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brief(tiny):
    """The tiny model with an unembedding of its own that says one of six tokens; two of them end a line."""
    hf = copy.deepcopy(tiny.hf)
    said = tiny.tokenizer("abc\nde", add_special_tokens=False).input_ids
    said[1] = tiny.tokenizer.eos_token_id
    batch = prompts.dummy_shot(tiny.tokenizer, pairs())
    last = engine.residuals(tiny, batch, [tuple(range(len(p.ids))) for p in batch], [tiny.n_layers - 1])
    usual = torch.nn.functional.normalize(hf.model.norm(last[tiny.n_layers - 1]).mean(0), dim=0)
    rows = torch.randn(len(said), tiny.d_model, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros_like(hf.lm_head.weight)
    weight[said] = rows - (rows @ usual)[:, None] * usual  # what all tokens share says nothing
    hf.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return dataclasses.replace(tiny, hf=hf)


def greedy(model, ids, position, vector, layer, n):
    """Decode ``n`` tokens with a vector added at one position, one unpadded pass a token."""

    def steer(module, args, out):
        stream = (out[0] if isinstance(out, tuple) else out).clone()
        stream[:, position] += vector
        return (stream, *out[1:]) if isinstance(out, tuple) else stream

    handle, said = model.hf.model.layers[layer].register_forward_hook(steer), list(ids)
    try:
        for _ in range(n):
            said.append(model.hf(torch.tensor([said]), use_cache=False).logits[0, -1].argmax().item())
    finally:
        handle.remove()
    return tuple(said[len(ids) :])


@pytest.mark.parametrize("at", ["separator", "output"])
def test_an_answer_is_exact_where_it_is_said_as_a_whole_and_then_the_line_ends(brief, at):
    """Six prompts whose answers are what the model says, cut anywhere, or said wrongly at the end or in the middle."""
    layer, ends = 2, {*brief.tokenizer("\n", add_special_tokens=False).input_ids, *brief.tokenizer.all_special_ids}
    steer = 9 * torch.randn(3, brief.d_model, generator=torch.Generator().manual_seed(5))
    steer[0] = 0
    batch, expected = [], []
    for i, one in enumerate(prompts.dummy_shot(brief.tokenizer, pairs())):
        head = one.ids[: len(one.ids) - len(one.answer)]
        place = one.separators[-1] if at == "separator" else one.outputs[-1]
        said = [greedy(brief, head, place, vector, layer, 4) for vector in steer]
        answer = (said[0][:1], said[1][:1], said[1][:2], said[2][:3], (*said[0][:1], 77), (77, *said[0][1:2]))[i]
        other = said[2][:1]  # accepted as well, alone
        batch.append(dataclasses.replace(one, ids=head + answer, answer=answer, accepted=(answer, other)))
        expected.append([any(s[: len(a)] == a and s[len(a)] in ends for a in (answer, other)) for s in said])
    found = engine.Site.prepare(brief, batch, at=at).evaluate(steer, layer).exact
    assert torch.equal(found, torch.tensor(expected).T.float())
    assert 0 < found.mean() < 1, "all alike: the test says nothing"
    half = engine.Site.prepare(brief, batch, at=at, answer_tokens=1).evaluate(steer, layer)
    whole = torch.tensor([len(p.answer) == 1 for p in batch])
    assert torch.equal(half.exact[:, whole], found[:, whole]) and half.exact[:, ~whole].isnan().all()
    assert half.token_loss()[:, ~whole].isnan().all() and not half.token_loss()[:, whole].isnan().any()


def test_asking_for_the_end_of_the_line_leaves_losses_to_the_last_bit(brief, monkeypatch):
    """Prompts whose first answer is right are run one token further; what was measured before stays."""
    batch = prompts.zero_shot(brief.tokenizer, pairs())
    heads = [prompt.ids[: len(prompt.ids) - len(prompt.answer)] for prompt in batch]
    said = [greedy(brief, ids, 0, torch.zeros(brief.d_model), 0, 1) for ids in heads]
    batch = [dataclasses.replace(p, ids=h + s, answer=s, accepted=(s,))
             for p, h, s in zip(batch, heads, said, strict=True)]
    vectors = 0.1 * torch.randn(4, brief.d_model, generator=torch.Generator().manual_seed(0))
    scores = engine.Site.prepare(brief, batch).evaluate(vectors, 1)
    assert scores.hit.any()
    site = engine.Site.prepare(brief, batch)
    monkeypatch.setattr(engine.Site, "_exact", lambda self, change, part, *rest: torch.zeros(len(part), len(batch)))
    assert torch.equal(site.evaluate(vectors, 1).nll, scores.nll)


def test_a_line_ends_with_any_token_that_begins_with_a_line_break_and_with_the_end_of_the_text(tiny):
    ids = tiny.tokenizer("\n a", add_special_tokens=False).input_ids
    assert engine._ends_line(tiny, ids[0]) and not any(engine._ends_line(tiny, token) for token in ids[1:])
    assert engine._ends_line(tiny, tiny.tokenizer.eos_token_id)


def test_a_loss_of_fixed_shapes_equals_that_of_the_prompts_taken(tiny):
    pool = [*pairs(), tasks.Pair("hard", "so", ("so",))]  # answers of unequal length
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pool), answer_tokens=4)
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 3
    for vocabulary in (None, engine.vocabulary(site, keep=60)):
        for mode in ("add", "replace"):
            fixed = site._fixed(2, mode, vocabulary, 4)
            for order in ([0, 1, 2, 3], [6, 2, 5, 0]):
                ours, theirs = (vectors.clone().requires_grad_() for _ in range(2))
                loss = fixed(ours, torch.tensor(order))
                expected = site.take(torch.tensor(order)).loss(theirs, 2, mode, vocabulary)
                torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
                loss.sum().backward()
                expected.sum().backward()
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
