"""The engine against the plain way: a full forward pass through TransformerBridge with a hook."""

import copy
import dataclasses

import pytest
import torch

from nb_utils import engine, layouts, models, prompts, tasks


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


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("at", ["separator", "output"])
def test_one_vector_a_prompt_equals_each_prompt_alone_with_its_own(brief, mode, at, monkeypatch):
    """Also in chunks; an answer that is right is run one token further, with the vector of its prompt."""
    batch = prompts.few_shot(brief.tokenizer, pairs(), pairs(4), n_shots=2, seed=0)
    vectors = 9 * torch.randn(24, 4, brief.d_model, generator=torch.Generator().manual_seed(1))
    said = engine.Site.prepare(brief, batch, at=at).log_probs(vectors, 2, mode).argmax(-1)
    for i in (0, 2):  # what the first vectors make the model say is right, and so is something else
        answer, *more = ((int(token),) for token in said[:, i].unique_consecutive())
        ids = batch[i].ids[: len(batch[i].ids) - len(batch[i].answer)] + answer
        batch[i] = dataclasses.replace(batch[i], ids=ids, answer=answer, accepted=(answer, *more[:2]))
    site = engine.Site.prepare(brief, batch, at=at)
    scores, read = site.evaluate(vectors, 2, mode), site.read(vectors, 2, 4, mode)
    assert scores.accepted[0, [0, 2]].all() and 0 < scores.exact.mean() < 1
    alone = [engine.Site.prepare(brief, [prompt], at=at) for prompt in batch]
    for i, one in enumerate(alone):
        expected = one.evaluate(vectors[:, i], 2, mode)
        n = expected.nll.shape[-1]
        torch.testing.assert_close(scores.nll[:, i, :n], expected.nll[:, 0], atol=1e-4, rtol=1e-5)
        assert torch.equal(scores.hit[:, i, :n], expected.hit[:, 0]) and scores.nll[:, i, n:].isnan().all()
        assert torch.equal(scores.accepted[:, i], expected.accepted[:, 0])
        assert torch.equal(scores.exact[:, i], expected.exact[:, 0])
        torch.testing.assert_close(read[:, i], one.read(vectors[:, i], 2, 4, mode)[:, 0], atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(engine, "BYTE_BUDGET", 1)
    again = site.evaluate(vectors, 2, mode)
    torch.testing.assert_close(again.nll, scores.nll, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(again.exact, scores.exact)


def test_the_gradient_of_one_vector_a_prompt_is_that_of_each_prompt_alone(tiny):
    batch = prompts.zero_shot(tiny.tokenizer, pairs(3))
    ours = torch.randn(2, 3, tiny.d_model, generator=torch.Generator().manual_seed(1), requires_grad=True)
    engine.Site.prepare(tiny, batch).loss(ours, 1, "replace").sum().backward()
    theirs = ours.detach().clone().requires_grad_()
    alone = [engine.Site.prepare(tiny, [p]).loss(theirs[:, i], 1, "replace").sum() for i, p in enumerate(batch)]
    sum(alone).div(3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_the_same_vector_for_every_prompt_is_one_vector_for_all(tiny):
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, pairs()))
    vectors = torch.randn(2, tiny.d_model, generator=torch.Generator().manual_seed(1))
    each = vectors[:, None].expand(2, 6, tiny.d_model)
    assert torch.equal(site.evaluate(each, 2).nll.nan_to_num(), site.evaluate(vectors, 2).nll.nan_to_num())
    with pytest.raises(ValueError, match="5 vectors, one a prompt, do not fit 6 prompts"):
        site.evaluate(each[:, :5], 2)


def test_replacing_by_the_own_residuals_all_at_once_is_the_identity(tiny):
    site = engine.Site.prepare(tiny, prompts.few_shot(tiny.tokenizer, pairs(), pairs(), n_shots=2, seed=0))
    own = site.evaluate(site.at(2)[None], 2, "replace").nll
    torch.testing.assert_close(own, site.unsteered().nll, atol=1e-4, rtol=0, equal_nan=True)


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


@pytest.mark.parametrize("together", [1, 2, 8])
@pytest.mark.parametrize("at", ["separator", "output"])
def test_an_answer_is_exact_where_it_is_said_as_a_whole_and_then_the_line_ends(brief, at, together, monkeypatch):
    """Six prompts whose answers are what the model says, cut anywhere, or said wrongly at the end or in the middle."""
    monkeypatch.setattr(engine, "TOGETHER", together)
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
    monkeypatch.setattr(engine.Site, "_exact", lambda self, change, first, said: torch.zeros(said.shape))
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


# Every block at every token


def spread(model, seed=0):
    return torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed))


def batch_of(model):
    texts = prompts.plain(model.tokenizer, ["Open thy doors, O Lebanon", "The food was good."])
    return [*texts, *prompts.zero_shot(model.tokenizer, pairs(3))]


def one_by_one(model, batch):
    """NLL of every answer token from unpadded passes of the whole model, one a prompt."""
    found = []
    for p in batch:
        with torch.no_grad():
            log_probs = model.hf(torch.tensor([p.ids])).logits[0].float().log_softmax(-1)
        first = len(p.ids) - len(p.answer)
        found.append(-log_probs[torch.arange(first - 1, len(p.ids) - 1), torch.tensor(p.answer)])
    return found


def turned(u, v, scale):
    """The steering of in-context vectors, as the paper's code has it, written token by token."""
    rows = []
    for row in u.reshape(-1, u.shape[-1]):
        cosine = torch.cosine_similarity(row, -v, dim=0)
        moved = row / row.norm() + scale * (1 + max(0.0, cosine.item())) * v / v.norm()
        rows.append(moved / moved.norm() * row.norm())
    return torch.stack(rows).view_as(u)


def parts_of(block):
    """Where a block of Gemma 3, Gemma 2 or Llama has what is steered, written by hand."""
    after = block.post_feedforward_layernorm if hasattr(block, "post_feedforward_layernorm") else block.mlp
    return {"mlp": block.mlp, "ff": after, "resid": block}


def held(model, vectors, place, change):
    """Steer every block by hand; return the losses."""
    handles = []
    for block, vector in zip(model.hf.model.layers, vectors, strict=True):

        def hook(module, args, out, vector=vector):
            found = out[0] if isinstance(out, tuple) else out
            return (change(found, vector), *out[1:]) if isinstance(out, tuple) else change(found, vector)

        handles.append(parts_of(block)[place].register_forward_hook(hook))
    try:
        return one_by_one(model, batch_of(model))
    finally:
        for handle in handles:
            handle.remove()


def test_losses_of_texts_are_those_of_the_whole_model_one_by_one(tiny):
    batch = batch_of(tiny)
    for ours, theirs in zip(engine.token_nll(tiny, batch, batch=2), one_by_one(tiny, batch), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    log_probs = engine.token_log_probs(tiny, batch)
    labels = torch.tensor([token for p in batch for token in p.answer])
    torch.testing.assert_close(-log_probs[range(len(labels)), labels], torch.cat(one_by_one(tiny, batch)))


@pytest.mark.parametrize("place", ["mlp", "ff", "resid"])
@pytest.mark.parametrize("how", ["turn", "add"])
def test_steering_every_block_equals_hooks_written_by_hand(tiny, place, how):
    check_steering(tiny, place, how)


@pytest.mark.parametrize("place", ["mlp", "ff", "resid"])
def test_it_does_for_gemma_2_and_llama_as_well(other, place):
    check_steering(other, place, "turn")


def check_steering(model, place, how):
    def added(u, v):
        moved = u + v
        moved[:, 0] = u[:, 0]
        return moved

    vectors, batch = spread(model), batch_of(model)
    with engine.steered(model, vectors, place, 1.0, how):
        ours = torch.cat(engine.token_nll(model, batch))
    by_hand = added if how == "add" else lambda u, v: turned(u, v, 1.0)
    torch.testing.assert_close(ours, torch.cat(held(model, vectors, place, by_hand)), atol=2e-4, rtol=1e-4)
    assert (ours - torch.cat(one_by_one(model, batch))).abs().max() > 1e-2


def test_what_is_steered_behind_the_norm_enters_the_stream_as_it_is(tiny, other):
    for model in (tiny, other):
        ids, delta = torch.tensor([batch_of(model)[0].ids]), spread(model)[2]
        seen = []
        with model.layout.hooked(2, lambda stream, seen=seen: seen.append(stream)):
            model.hf(ids)
            with engine.steered(model, torch.eye(model.n_layers)[:, 2:3] * delta, "ff", 1.0, "add"):
                model.hf(ids)
        torch.testing.assert_close(seen[1][:, 1:] - seen[0][:, 1:], delta.expand_as(seen[0][:, 1:]), atol=1e-4, rtol=0)


def test_a_scale_of_zero_changes_nothing_to_the_last_bit_nor_does_a_vector_of_zeros(tiny):
    batch = batch_of(tiny)
    before = torch.cat(engine.token_nll(tiny, batch))
    for place in ("mlp", "ff", "resid"):
        for vectors, scale in ((spread(tiny), 0), (torch.zeros(6, 32), 0.5)):
            with engine.steered(tiny, vectors, place, scale):
                assert torch.equal(torch.cat(engine.token_nll(tiny, batch)), before)


def test_a_turn_keeps_every_length_and_goes_towards_the_vector():
    out, vector = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), torch.ones(8)
    moved = engine._turned(out, vector, 0.3)
    torch.testing.assert_close(moved.norm(dim=-1), out.norm(dim=-1))
    assert (torch.cosine_similarity(moved, vector, -1) > torch.cosine_similarity(out, vector, -1)).all()


def test_no_steering_stays_behind_after_an_error_and_another_way_to_steer_is_refused(tiny):
    with pytest.raises(KeyError), engine.steered(tiny, spread(tiny)):
        raise KeyError
    parts = [tiny.layout.part(layer, place) for layer in range(6) for place in ("mlp", "ff", "resid")]
    assert not any(part._forward_hooks for part in parts)
    refused = ({"how": "push"}, "how is 'turn' or 'add', not 'push'"), ({"place": "none"}, "place is 'mlp', 'ff' or")
    for wrong, said in refused:
        with pytest.raises(ValueError, match=said), engine.steered(tiny, spread(tiny), **wrong):
            pass


def test_one_block_at_every_token_is_a_site_like_any_other(tiny):
    batch, vectors, layer = batch_of(tiny)[2:], 0.5 * spread(tiny)[:2], 3
    scores = engine.Site.prepare(tiny, batch, at="every").evaluate(vectors, layer)
    for vector, nll in zip(vectors, scores.nll, strict=True):
        whole = torch.zeros(tiny.n_layers, tiny.d_model).index_fill(0, torch.tensor(layer), 1) * vector
        with engine.steered(tiny, whole, "resid", 1.0, "add"):
            expected = engine.token_nll(tiny, batch)
        for ours, theirs in zip(nll, expected, strict=True):
            torch.testing.assert_close(ours[: len(theirs)], theirs, atol=1e-4, rtol=1e-4)


def test_a_site_predicts_nothing_before_the_first_steered_token(tiny):
    with pytest.raises(ValueError, match="An answer begins after the first steered position"):
        engine.Site.prepare(tiny, batch_of(tiny), at="every")


def test_a_block_without_an_mlp_is_refused_in_a_sentence(tiny):
    class Bare(torch.nn.Module):
        pass

    layout = dataclasses.replace(tiny.layout, blocks=[Bare()])
    assert layout.part(0, "resid") is layout.blocks[0]
    with pytest.raises(layouts.LayoutError, match="has no MLP where we look for one"):
        layout.part(0, "ff")
    bare = dataclasses.replace(tiny)
    bare.__dict__["layout"] = layout  # where `cached_property` keeps it
    with pytest.raises(models.ModelError, match="'tiny' is a Gemma3ForCausalLM, which has no MLP where"):
        engine.steered(bare, spread(tiny)).__enter__()


def texts(tiny):
    return [tiny.tokenizer(text, return_tensors="pt").input_ids for text in ("hot -> cold\nbig ->", "up ->")]


def noise(*shape, seed=3):
    return 5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_steering_the_plain_model_gives_what_the_engine_gives(tiny, mode):
    vector, batch = noise(tiny.d_model), prompts.few_shot(tiny.tokenizer, pairs(), pairs()[:3], 2, seed=0)
    expected = engine.Site.prepare(tiny, batch).evaluate(vector[None], 2, mode).nll[0]
    for prompt, row in zip(batch, expected, strict=True):
        with engine.steer(tiny, vector, 2, at=prompt.separators[-1], mode=mode) as steered:
            log_probs = steered.hf(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
        first = len(prompt.ids) - len(prompt.answer)
        found = -log_probs[torch.arange(first - 1, len(prompt.ids) - 1), torch.tensor(prompt.answer)]
        torch.testing.assert_close(found, row[: len(found)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_of_a_text_is_steered_wherever_padding_stands(tiny, side):
    long, short = texts(tiny)
    gap, both = long.shape[1] - short.shape[1], noise(2, tiny.d_model)
    pad = (gap, 0) if side == "left" else (0, gap)
    ids = torch.cat([long, torch.nn.functional.pad(short, pad)])
    mask = torch.cat([torch.ones_like(long), torch.nn.functional.pad(torch.ones_like(short), pad)])
    order = (mask.cumsum(1) - 1).clamp_min(0)
    with engine.steer(tiny, both, 1):
        found = tiny.hf(ids, attention_mask=mask, position_ids=order).logits
    for row, text, vector in zip(range(2), (long, short), both, strict=True):
        with engine.steer(tiny, vector, 1, at=text.shape[1] - 1):
            alone = tiny.hf(text).logits[0]
        torch.testing.assert_close(found[row][mask[row].bool()], alone, atol=1e-4, rtol=0)


def test_generation_goes_on_from_the_steered_token_and_is_not_steered_again(tiny):
    ids, vector, said = texts(tiny)[0], noise(tiny.d_model), []
    with engine.steer(tiny, vector, 2):
        found = tiny.hf.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    for _ in range(5):
        with engine.steer(tiny, vector, 2, at=ids.shape[1] - 1):  # a text that is longer each time, without a cache
            grown = torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)
            said.append(tiny.hf(grown, use_cache=False).logits[0, -1].argmax().item())
    assert found == said
    assert found != tiny.hf.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, -5:].tolist()


def test_every_token_can_be_steered_generated_ones_too(tiny):
    ids, vector = texts(tiny)[0], noise(tiny.d_model)
    with engine.steer(tiny, vector, 2, at=None):
        whole = tiny.hf(ids).logits
        begun = tiny.hf(ids[:, :4], use_cache=True)
        rest = tiny.hf(ids[:, 4:], past_key_values=begun.past_key_values).logits
    with engine.steer(tiny, vector, 2, at=range(ids.shape[1])):
        torch.testing.assert_close(tiny.hf(ids).logits, whole)
    torch.testing.assert_close(torch.cat([begun.logits, rest], 1), whole, atol=1e-4, rtol=0)


def test_vectors_add_up_and_nothing_stays_after_an_error(tiny):
    ids, vector = texts(tiny)[0], noise(tiny.d_model)
    before = tiny.hf(ids).logits
    with engine.steer(tiny, vector, 2), engine.steer(tiny, vector, 2):
        twice = tiny.hf(ids).logits
    with engine.steer(tiny, 2 * vector, 2):
        torch.testing.assert_close(tiny.hf(ids).logits, twice, atol=1e-4, rtol=0)
    with pytest.raises(KeyError), engine.steer(tiny, vector, 2):
        raise KeyError
    assert torch.equal(tiny.hf(ids).logits, before) and not torch.allclose(before, twice)


@pytest.mark.parametrize(
    "change, says",
    [({"layer": 6}, "blocks 0 to 5"), ({"vector": torch.zeros(7)}, "32 wide, the vector 7"),
     ({"mode": "sub"}, "not 'sub'"), ({"at": 99}, "none at 99"), ({"at": [0, -99]}, "none at -99")],
)  # fmt: skip
def test_what_cannot_be_steered_is_refused_in_one_sentence(tiny, change, says):
    asked = {"vector": torch.zeros(tiny.d_model), "layer": 2, **change}
    with pytest.raises(ValueError, match=says), engine.steer(tiny, **asked):
        tiny.hf(texts(tiny)[0])


def test_texts_are_apart_by_what_a_plain_pass_has_at_their_last_tokens(tiny):
    first, second = (prompts.plain(tiny.tokenizer, texts) for texts in (["cold", "small one"], ["hot"]))
    plain = copy.deepcopy(tiny.hf)  # asked for hidden states, a model keeps hooks for ever
    ends = [[plain(torch.tensor([p.ids]), output_hidden_states=True).hidden_states for p in texts]
            for texts in (first, second)]  # fmt: skip
    expected = ends[0][0][3][0, -1] / 2 + ends[0][1][3][0, -1] / 2 - ends[1][0][3][0, -1]
    torch.testing.assert_close(engine.ends_apart(tiny, first, second)[2], expected, atol=1e-4, rtol=0)
