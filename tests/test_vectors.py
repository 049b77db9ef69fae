"""Task vectors: means over the right separators, recomputed by hand through TransformerLens.

And their decompositions: an identity for every method, and hand-made dictionaries whose answer is known.
"""

import dataclasses
import random

import pytest
import scipy.optimize
import torch

from nb_utils import engine, prompts, saes, tasks, vectors
from nb_utils.saes import Sae
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


def test_a_theta_is_the_mean_last_separator_over_the_dummies_of_its_case(tiny):
    drawn = prompts.cases(POOL, POOL[:3], n_shots=2, n_dummies=2, seed=0)
    found = vectors.thetas(tiny, drawn, [1, 4])
    for layer, read in found.items():
        assert read.shape == (3, tiny.d_model)
        for case, theta in zip(drawn, read, strict=True):
            shown = [prompts.encode(tiny.tokenizer, case.demonstrations, dummy) for dummy in case.dummies]
            expected = by_hand(tiny, shown, layer, skip=2)
            torch.testing.assert_close(theta, expected, atol=1e-4, rtol=1e-4)


def test_a_theta_of_a_zero_shot_prompt_is_its_own_stream(tiny):
    """Without demonstrations and with its query for a dummy, replacing changes nothing: place and block are right."""
    alone = [prompts.Case((), (pair,), pair) for pair in POOL]
    site = engine.Site.prepare(tiny, prompts.zero_shot(tiny.tokenizer, POOL))
    own = vectors.thetas(tiny, alone, [2])[2]
    same = site.evaluate(own[None], 2, "replace").nll
    torch.testing.assert_close(same, site.unsteered().nll, atol=1e-4, rtol=0, equal_nan=True)


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


# --- decompositions ---


METHODS = [
    vectors.reconstruct, vectors.vector_on_reconstruction,
    vectors.gradient_pursuit, vectors.nonnegative_omp,
    vectors.top_k_projection, vectors.random_support, vectors.contrast_codes,
]  # fmt: skip
PURSUITS = [vectors.gradient_pursuit, vectors.nonnegative_omp]


@pytest.fixture(scope="module")
def at(tiny):
    pool = tuple(tasks.Pair(f"in{i}", f"out{i}", (f"out{i}",)) for i in range(8))
    return vectors.separators(tiny, pool, [2], n_prompts=4, n_shots=4)


@pytest.fixture(scope="module")
def sae(tiny):
    """A random SAE whose decoder rows have norms from 0.2 to 5."""
    plain = saes.random(tiny, 2)
    order = torch.randperm(plain.d_sae, generator=torch.Generator().manual_seed(0))
    norms = torch.logspace(-0.7, 0.7, plain.d_sae)[order]
    return dataclasses.replace(plain, W_dec=plain.W_dec * norms[:, None])


def build(W_dec, b_dec=None, W_enc=None, threshold=0.0):
    """An SAE from its decoder; the encoder is tied and centred on the decoder bias unless given."""
    d_sae, d_in = W_dec.shape
    b_dec = torch.zeros(d_in) if b_dec is None else b_dec
    W_enc = W_dec.T if W_enc is None else W_enc
    return Sae(
        "hand-made", "test", "blocks.0.hook_resid_post", 0, "jumprelu", W_enc, -b_dec @ W_enc, W_dec, b_dec,
        torch.full((d_sae,), threshold), None, "0" * 64,
    )  # fmt: skip


def only(target):
    """Streams whose task vector is ``target``."""
    return Streams({0: target[None]}, {0: torch.zeros_like(target)[None]})


def orthogonal(d=12, seed=0):
    """Orthogonal atoms of very different norms, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return build(basis * torch.logspace(-1, 1, d)[:, None], b_dec=torch.randn(d, generator=generator))


@pytest.mark.parametrize("method", METHODS, ids=lambda f: f.__name__)
def test_vector_plus_error_is_the_target_and_the_vector_is_what_the_codes_decode_to(at, sae, method):
    found = method(at, 2, sae, 6)
    contrast = method is vectors.contrast_codes
    target = vectors.centred_task_vector(at, 2) if contrast else vectors.task_vector(at, 2)
    torch.testing.assert_close(found.target, target)
    torch.testing.assert_close(found.vector + found.error, target)
    torch.testing.assert_close(found.vector, sae.decode(found.codes, bias=not contrast))
    assert found.l0 == len(found.codes.nonzero()) > 0
    if method not in (vectors.reconstruct, vectors.vector_on_reconstruction):
        assert found.l0 <= 6


def test_reconstruction_encodes_the_mean_and_the_other_averages_the_codes(at, sae):
    rows = at.few[2]
    torch.testing.assert_close(vectors.reconstruct(at, 2, sae).codes, sae.encode(rows.mean(0)))
    found = vectors.vector_on_reconstruction(at, 2, sae)
    torch.testing.assert_close(found.codes, sae.encode(rows).mean(0))
    torch.testing.assert_close(found.vector, sae.decode(sae.encode(rows)).mean(0))
    assert found.l0 > vectors.reconstruct(at, 2, sae).l0


# --- pursuits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PURSUITS, ids=lambda f: f.__name__)
def test_a_known_sparse_code_over_an_orthogonal_dictionary_is_recovered(method):
    sae, codes = orthogonal(), torch.zeros(12)
    codes[[1, 4, 7, 10]] = torch.tensor([30.0, 2.0, 5.0, 0.1])
    found = method(only(sae.decode(codes)), 0, sae, 4)
    torch.testing.assert_close(found.codes, codes, atol=1e-4, rtol=1e-4)
    assert found.error.norm() < 1e-4 * found.target.norm()
    assert method(only(sae.decode(codes)), 0, sae, 12).l0 == 4


@pytest.mark.parametrize("method", PURSUITS, ids=lambda f: f.__name__)
def test_the_atoms_that_contribute_most_come_first_whatever_their_norms(method):
    sae, codes = orthogonal(), torch.zeros(12)
    codes[:3] = torch.tensor([3.0, 2.0, 1.0]) / sae.W_dec[:3].norm(dim=1)
    codes[9:] = torch.tensor([30.0, 20.0, 10.0]) / sae.W_dec[9:].norm(dim=1)
    found = method(only(sae.decode(codes)), 0, sae, 3)
    torch.testing.assert_close(found.codes[9:], codes[9:], atol=1e-4, rtol=1e-4)
    assert found.l0 == 3


@pytest.mark.parametrize("method", PURSUITS, ids=lambda f: f.__name__)
def test_a_pursuit_takes_no_negative_atom(method):
    sae, codes = orthogonal(), torch.zeros(12)
    codes[[2, 5]] = torch.tensor([1.0, -50.0])
    found = method(only(sae.decode(codes)), 0, sae, 6)
    assert found.codes.min() >= 0 and found.codes.nonzero().flatten().tolist() == [2]


def test_orthogonal_pursuit_has_the_best_non_negative_weights_on_its_support(at, sae):
    for k in (2, 5, 15):
        found = vectors.nonnegative_omp(at, 2, sae, k)
        support = found.codes.nonzero().flatten()
        target = (found.target - sae.b_dec).double().numpy()
        best, residual = scipy.optimize.nnls(sae.W_dec[support].T.double().numpy(), target)
        torch.testing.assert_close(found.codes[support], torch.tensor(best).float(), atol=1e-3, rtol=1e-3)
        assert abs(found.error.norm().item() - residual) < 1e-3 * found.target.norm()


@pytest.mark.parametrize("method", PURSUITS, ids=lambda f: f.__name__)
def test_more_atoms_leave_less_error(at, sae, method):
    errors = [method(at, 2, sae, k).error.norm().item() for k in (1, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("method", PURSUITS, ids=lambda f: f.__name__)
def test_a_latent_without_an_atom_is_never_chosen(method):
    whole = orthogonal()
    codes = torch.zeros(12)
    codes[[4, 7]] = torch.tensor([2.0, 5.0])
    rows = whole.W_dec.clone()
    rows[[0, 11]] = 0
    sae = dataclasses.replace(whole, W_dec=rows)
    found = method(only(sae.decode(codes)), 0, sae, 12)
    torch.testing.assert_close(found.codes, codes, atol=1e-4, rtol=1e-4)


# --- controls --------------------------------------------------------------------------------------------------


def test_top_k_projection_takes_the_largest_projections_on_unit_atoms_and_fits_them_jointly():
    atoms = torch.tensor([[10.0, 0.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 7.0], [0.0, -1.0, 0.0]])
    bias = torch.tensor([1.0, 1.0, 1.0])
    found = vectors.top_k_projection(only(torch.tensor([4.0, 5.0, 1.5])), 0, build(atoms, bias), 2)
    # Projections of (3, 4, .5) on the unit atoms: 3, 5, .5, -4. The two best span the first two axes.
    torch.testing.assert_close(found.codes, torch.tensor([0.0, 10.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.error, torch.tensor([0.0, 0.0, 0.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method", [vectors.top_k_projection, vectors.random_support], ids=lambda f: f.__name__
)
def test_the_error_of_a_control_is_orthogonal_to_the_atoms_that_it_may_use(at, sae, method):
    found = method(at, 2, sae, 7)
    support = found.codes.nonzero().flatten()
    assert len(support) == 7
    assert (sae.decoder_directions[support] @ found.error).abs().max() < 1e-4 * found.target.norm()


@pytest.mark.parametrize(
    "method", [vectors.top_k_projection, vectors.random_support], ids=lambda f: f.__name__
)
def test_a_method_gives_the_same_bits_wherever_its_buffers_lie(method):
    generator, kept, seen = torch.Generator().manual_seed(0), [], set()
    atoms, target = torch.randn(100, 640, generator=generator), 1000 * torch.randn(640, generator=generator)
    for size in range(1, 2000, 40):
        kept.append(bytearray(size))  # moves what is allocated next
        codes = method(only(target.clone()), 0, build(atoms.clone(), W_enc=atoms.T.clone()), 40).codes
        seen.add(codes.numpy().tobytes())
    assert len(seen) == 1


def test_a_random_support_depends_on_its_seed_only(at, sae):
    state = torch.get_rng_state()
    first, again, other = (vectors.random_support(at, 2, sae, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first.codes, again.codes)
    assert set(first.codes.nonzero().flatten().tolist()) != set(other.codes.nonzero().flatten().tolist())


def test_latents_matched_in_density_are_among_the_nearest_and_neither_chosen_nor_drawn_twice():
    density = torch.logspace(-3, -0.1, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    like = [3, 17, 29, 41, 58]
    log = (density.double() + 1e-4).log()
    for seed in range(20):
        drawn = vectors.density_matched(density, like, random.Random(seed), nearest=4)
        assert drawn == vectors.density_matched(density, like, random.Random(seed), nearest=4)
        assert len({*drawn, *like}) == 10
        for i, (latent, found) in enumerate(zip(like, drawn, strict=True)):
            free = [other for other in range(60) if other not in (*like, *drawn[:i])]
            assert found in sorted(free, key=lambda other: abs(log[other] - log[latent]))[:4]
    drawn = (vectors.density_matched(density, like[:1], random.Random(seed), 4) for seed in range(40))
    assert len({latents[0] for latents in drawn}) == 4


def test_the_chosen_atoms_beat_random_ones(at, sae):
    chance = [vectors.random_support(at, 2, sae, 5, seed).error.norm() for seed in range(5)]
    for method in (vectors.top_k_projection, vectors.nonnegative_omp):
        assert method(at, 2, sae, 5).error.norm() < min(chance)


# --- contrast codes --------------------------------------------------------------------------------------------


def test_contrast_codes_are_signed_differences_decoded_without_bias():
    sae = build(torch.eye(3), b_dec=torch.tensor([10.0, 10.0, 10.0]), threshold=0.5)
    few = torch.tensor([[12.0, 10.0, 11.0], [14.0, 10.0, 11.0]])
    zero = torch.tensor([[10.4, 13.0, 11.0]])
    found = vectors.contrast_codes(Streams({0: few}, {0: zero}), 0, sae)
    assert torch.equal(found.codes, torch.tensor([3.0, -3.0, 0.0]))
    assert torch.equal(found.vector, torch.tensor([3.0, -3.0, 0.0])) and found.l0 == 2
    torch.testing.assert_close(found.error, torch.tensor([-0.4, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_contrast_codes_keep_as_many_latents_as_asked(at, sae):
    whole = vectors.contrast_codes(at, 2, sae)
    assert (whole.codes < 0).any() and (whole.codes > 0).any()
    for k in (1, 5, whole.l0):
        part = vectors.contrast_codes(at, 2, sae, k)
        support = part.codes != 0
        assert part.l0 == k and torch.allclose(part.codes[support], whole.codes[support])
    torch.testing.assert_close(part.codes, whole.codes)


def test_the_largest_codes_are_those_that_move_the_vector_most():
    sae = build(torch.diag(torch.tensor([100.0, 1.0, 1.0, 10.0])))
    codes = torch.tensor([[0.1, -5.0, 2.0, 0.3], [0.0, 0.0, 1.0, 0.0]])
    kept = vectors.keep_largest(codes, 2, sae)
    assert torch.equal(kept, torch.tensor([[0.1, -5.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(vectors.keep_largest(codes, 99, sae), codes)


def test_latents_are_selected_as_others_do():
    right = torch.tensor([0.0, 1, 0, 1, 1, 0])
    codes = torch.stack([right * 2, 1 - right, torch.ones(6), torch.tensor([0.0, 1, 0, 1, 0, 0])], 1)
    assert vectors.correlated(codes, right, 2) == [0, 3]
    assert vectors.correlated(codes, torch.ones(6), 2) == [0, 1], "answers that are all alike choose none before others"
    own, other = torch.zeros(4, 3), torch.zeros(4, 3)
    own[:, 0], other[:, 0] = torch.tensor([1.0, 3, 1, 3]), torch.tensor([0.0, 2, 0, 2])  # a spread of 1: apart by 1
    own[:, 1], other[:, 1] = torch.tensor([1.0, 3, 1, 3]) / 9, torch.tensor([0.0, 0, 0, 0])  # small, but never there
    assert vectors.discriminative(own, other, 3) == [1, 0, 2]


def test_attribution_is_the_first_order_change_of_the_loss():
    sae = orthogonal()
    codes = torch.linspace(-1, 2, len(sae.W_dec))
    target = sae.W_dec[0] - 3 * sae.W_dec[1] + 0.1 * sae.W_dec[2]
    point = torch.zeros(sae.W_dec.shape[1], requires_grad=True)
    (gradient,) = torch.autograd.grad((point - target).square().sum() / 2, point)
    lowers = (codes * (sae.W_dec @ target)).tolist()
    chosen = vectors.attributed(gradient, codes, sae, 3)
    assert chosen[0] == 1 and [lowers[i] for i in chosen] == pytest.approx(sorted(lowers, reverse=True)[:3], abs=1e-6)


def test_untrained_dictionaries_have_as_many_latents_on_as_asked_and_explain_what_their_directions_can():
    x = torch.randn(2000, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 24) + 5
    found = {
        "orthonormal": vectors.untrained("orthonormal", 1, vectors.orthonormal(24), x, 8),
        "components": vectors.untrained("components", 1, vectors.components(x), x, 8),
    }
    lost = {}
    for name, sae in found.items():
        square = sae.W_dec[:24] @ sae.W_dec[:24].T
        torch.testing.assert_close(square, torch.eye(24), atol=1e-4, rtol=0)
        assert torch.equal(sae.W_dec[24:], -sae.W_dec[:24])
        codes = sae.encode(x)
        assert ((codes > 0).sum(1) == 8).all()
        error = x - sae.decode(codes)
        lost[name] = (error.square().sum() / (x - x.mean(0)).square().sum()).item()
        whole = vectors.untrained(name, 1, sae.W_dec, x, 24)  # all is on
        torch.testing.assert_close(whole.decode(whole.encode(x)), x, atol=0.05, rtol=0)
    assert lost["components"] < lost["orthonormal"] < 1
