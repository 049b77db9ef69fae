"""Task vectors: means over the right separators, recomputed by hand through TransformerLens."""

import pytest
import torch

from nb_utils import engine, tasks, vectors
from nb_utils.vectors import Streams

POOL = tuple(tasks.Pair(f"in{i}", f"out{i}", (f"out{i}",)) for i in range(8))
SMALL = dict(n_prompts=5, n_shots=3)


@pytest.fixture
def asked(monkeypatch):
    """Every call of `engine.residuals`: its prompts and positions (the real one runs)."""
    calls, real = [], engine.residuals

    def spy(model, prompts, positions, layers, **kwargs):
        calls.append((prompts, positions))
        return real(model, prompts, positions, layers, **kwargs)

    monkeypatch.setattr(engine, "residuals", spy)
    return calls


def by_hand(model, prompts, layer, skip):
    """Mean residual over all separators but the first ``skip`` of each prompt, one plain pass a prompt."""
    rows = []
    for prompt in prompts:
        _, cache = model.bridge.run_with_cache(torch.tensor([prompt.ids]))
        rows.append(cache[f"blocks.{layer}.hook_resid_post"][0, list(prompt.separators[skip:])])
    return torch.cat(rows).mean(0)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_the_task_vector_is_the_mean_over_all_separators_but_the_first_of_each_prompt(tiny, asked, skip):
    at = vectors.separators(tiny, POOL, [1, 4], **SMALL, skip=skip)
    (few, _), (zero, _) = asked
    assert len(few) == 5 and all(len(prompt.separators) == 4 for prompt in few) and len(zero) == len(POOL)
    for layer in (1, 4):
        expected = by_hand(tiny, few, layer, skip)
        assert at.few[layer].shape == (5 * (4 - skip), tiny.d_model)
        torch.testing.assert_close(vectors.task_vector(at, layer), expected, atol=1e-4, rtol=1e-4)
        expected = expected - by_hand(tiny, zero, layer, 0)
        torch.testing.assert_close(vectors.centred_task_vector(at, layer), expected, atol=1e-4, rtol=1e-4)


def test_one_separator_is_left_out_unless_said_otherwise(tiny):
    assert len(vectors.separators(tiny, POOL, [2], **SMALL).few[2]) == 5 * 3


def test_every_pair_of_the_pool_gives_one_zero_shot_separator_and_no_prompt_leaves_the_pool(tiny, asked):
    at = vectors.separators(tiny, POOL, [2], **SMALL)
    (few, _), (zero, _) = asked
    text = lambda prompt: tiny.tokenizer.decode(list(prompt.ids), skip_special_tokens=True)  # noqa: E731
    lines = {f"{pair.x} -> {pair.y}" for pair in POOL}
    assert len(at.zero[2]) == len(POOL) and {text(prompt) for prompt in zero} == lines
    assert all(set(text(prompt).split("\n")) <= lines for prompt in few)


@pytest.mark.parametrize("size", [20, 35, 49, 61])
def test_no_query_comes_twice_while_the_pool_has_others(tiny, asked, size):
    pool = tuple(tasks.Pair(f"in{i}", f"out{i}", (f"out{i}",)) for i in range(size))
    vectors.separators(tiny, pool, [0], n_prompts=min(size, 30), n_shots=1)
    few = [tiny.tokenizer.decode(list(prompt.ids)) for prompt in asked[0][0]]
    assert len({text.rpartition("\n")[2] for text in few}) == min(size, 30)


def test_the_means_are_exact():
    at = Streams(
        few={3: torch.tensor([[1.0, 2.0], [3.0, 6.0]])}, zero={3: torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 4.0]])}
    )
    assert torch.equal(vectors.task_vector(at, 3), torch.tensor([2.0, 4.0]))
    assert torch.equal(vectors.centred_task_vector(at, 3), torch.tensor([1.0, 2.0]))


def test_what_every_separator_carries_is_not_in_the_centred_vector():
    few, zero, generic = torch.randn(7, 4), torch.randn(5, 4), torch.randn(4) * 100
    plain = vectors.centred_task_vector(Streams({0: few}, {0: zero}), 0)
    shifted = vectors.centred_task_vector(Streams({0: few + generic}, {0: zero + generic}), 0)
    torch.testing.assert_close(plain, shifted, atol=1e-4, rtol=0)


def test_the_seed_alone_decides_which_shots_are_drawn(tiny):
    first, again, other = (
        vectors.task_vector(vectors.separators(tiny, POOL, [2], **SMALL, seed=seed), 2) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other, atol=1e-2, rtol=1e-2)


def test_a_matched_random_vector_has_the_norm_of_the_vector_and_a_direction_of_its_seed():
    vector = torch.randn(500) * 7
    state = torch.get_rng_state()
    first, again, other = (vectors.matched_random(vector, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    for noise in (first, other):
        torch.testing.assert_close(noise.norm(), vector.norm())
        assert torch.cosine_similarity(noise, vector, dim=0).abs() < 0.2
    assert vectors.matched_random(vector.bfloat16(), 0).dtype == torch.bfloat16


def test_the_detector_vector_is_the_mean_over_the_last_tokens_of_outputs_and_y_stands_beside_it(tiny, asked):
    at = vectors.outputs(tiny, POOL, [1], **SMALL)
    (few, spots), (dummy, _) = asked
    rows = []
    for prompt, positions in zip(few, spots, strict=True):
        _, cache = tiny.bridge.run_with_cache(torch.tensor([prompt.ids]))
        ends = cache["blocks.1.hook_resid_post"][0, list(positions)]
        assert [tiny.tokenizer.decode([prompt.ids[p + 1]]) for p in positions] == ["\n"] * len(positions)
        rows.append(ends)
    torch.testing.assert_close(vectors.task_vector(at, 1), torch.cat(rows).mean(0), atol=1e-4, rtol=1e-4)
    (prompt,) = dummy
    assert tiny.tokenizer.decode(list(prompt.ids), skip_special_tokens=True).startswith("X -> Y\nin0 ->")
    _, cache = tiny.bridge.run_with_cache(torch.tensor([prompt.ids]))
    torch.testing.assert_close(at.zero[1][0], cache["blocks.1.hook_resid_post"][0, prompt.outputs[0]])


def test_no_output_counts_more_often_than_outputs_do_on_average(tiny, asked):
    answers = ["aa"] * 9 + ["bb", "cc", "dd"]
    pool = tuple(tasks.Pair(f"in{i}", y, (y,)) for i, y in enumerate(answers))
    vectors.outputs(tiny, pool, [0], n_prompts=12, n_shots=8)
    few, spots = asked[0]
    shown = [tiny.tokenizer.decode(list(p.ids[s + 1 : e + 1])) for p in few
             for s, e in zip(p.separators[:-1], p.outputs, strict=True)]
    kept = [tiny.tokenizer.decode(list(p.ids[e - 1 : e + 1])) for p, ends in zip(few, spots, strict=True) for e in ends]
    mean = -(-len(shown) // len(set(shown)))
    assert kept.count("aa") == mean < shown.count(" aa")
    assert {word: kept.count(word) for word in ("bb", "cc", "dd")} == {
        word: shown.count(f" {word}") for word in ("bb", "cc", "dd")}


def test_the_logit_lens_ranks_as_the_model_would_read_the_direction(tiny):
    direction = torch.randn(1, tiny.d_model, generator=torch.Generator().manual_seed(0))
    up, down = vectors.logit_lens(tiny, direction)
    weight = 1 + tiny.hf.model.norm.weight  # Gemma stores its gains as a distance from one
    scores = (direction / direction.square().mean().sqrt() * weight @ tiny.hf.lm_head.weight.T)[0]
    scores[tiny.tokenizer.all_special_ids] = float("nan")
    scores -= scores.nanmean()
    order = scores.nan_to_num(-1e9).argsort(descending=True).tolist()
    assert [token for token, _ in up[0]] == [vectors.piece(tiny.tokenizer, i) for i in order[:10]]
    worst = [i for i in order if i not in tiny.tokenizer.all_special_ids][::-1][:10]
    assert [token for token, _ in down[0]] == [vectors.piece(tiny.tokenizer, i) for i in worst]
    assert up[0][0][1] == pytest.approx(scores[order[0]].item(), rel=1e-4)
