"""Cleaning: what is pruned stays away, what is kept was chosen on validation, and rows mind their own business."""

import dataclasses

import pytest
import torch

from nb_utils import cleaning, engine, prompts, saes, tasks, vectors

LAYER = 2


@pytest.fixture(scope="module")
def sae(tiny):
    return saes.random(tiny, LAYER, d_sae=256)


def pairs(first, n):
    """Inputs of different lengths whose outputs share their letters, so that there is something to learn."""
    answers = ("yes0", "yes1")
    numbers = range(first, first + n)
    return tuple(tasks.Pair("x" * (1 + i % 3) + str(i), answers[i % 2], (answers[i % 2],)) for i in numbers)


def site(model, first, n):
    return engine.Site.prepare(model, prompts.zero_shot(model.tokenizer, pairs(first, n)), answer_tokens=2)


@pytest.fixture(scope="module")
def at(tiny):
    return vectors.separators(tiny, pairs(0, 8), [LAYER], n_prompts=4, n_shots=4)


@pytest.fixture(scope="module")
def problem(tiny):
    return cleaning.Problem(site(tiny, 10, 6), site(tiny, 20, 4), LAYER)


@pytest.fixture(scope="module")
def fit(problem):
    """A problem whose validation prompts are its training prompts: the kept step is the best on training."""
    return dataclasses.replace(problem, validation=problem.train)


@pytest.fixture(scope="module")
def start(at, sae):
    """Pre-activations of the task vector."""
    return sae.pre_activations(vectors.task_vector(at, LAYER))[None]


@pytest.fixture(scope="module")
def signed(at, sae):
    """Contrast codes, and the codes of the vector."""
    made = (vectors.contrast_codes(at, LAYER, sae), vectors.reconstruct(at, LAYER, sae))
    return torch.stack([one.codes for one in made])


@pytest.fixture
def checks(monkeypatch):
    """Every state that the optimiser went through (the real one runs)."""
    seen, real = [], cleaning._descend

    def spy(*args, **kwargs):
        for check in real(*args, **kwargs):
            seen.append(check)
            yield check

    monkeypatch.setattr(cleaning, "_descend", spy)
    return seen


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def as_topk(sae, k=8):
    return dataclasses.replace(sae, k=k, threshold=torch.zeros_like(sae.threshold), architecture="topk")


# --- the post's cleaning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_a_latent_that_went_out_never_comes_back(problem, sae, start, checks, kind):
    sae = as_topk(sae) if kind == "topk" else sae
    cleaning.clean(problem, sae, start.repeat(2, 1), [0.0, 2.0], lr=0.1, steps=50)
    on = torch.stack([check.codes != 0 for check in checks])
    assert not (on[1:] & ~on[:-1]).any()
    assert (on[0] & ~on[-1]).any(), "nothing went out: the test says nothing"
    assert torch.equal(on[0], (sae.act(start) > 0).expand_as(on[0]))


def test_in_a_topk_sae_latents_outside_the_support_compete_for_no_place(problem, sae):
    """Three latents for two places: what falls from 4 to below the frozen 3 is smaller, not gone."""
    three = dataclasses.replace(
        as_topk(sae, 2), W_enc=sae.W_enc[:, :3], b_enc=sae.b_enc[:3], W_dec=sae.W_dec[:3], threshold=torch.zeros(3))
    start = torch.tensor([[5.0, 4.0, 3.0]])
    (found,) = cleaning.clean(problem, three, start, [1e3], lr=0.05, steps=6, check_every=1)
    assert found.step == 6 and found.codes[2] == 0
    assert 0 < found.codes[1] < 3 < found.codes[0] < 5, "both have fallen by the same steps"
    (found,) = cleaning.clean(problem, three, start, [1e3], lr=0.2, steps=40, check_every=1)
    assert found.l0 == 0


def test_codes_that_are_means_are_cleaned_under_a_relu_though_they_lie_below_their_thresholds(problem, sae):
    means = torch.zeros(1, sae.d_sae)
    means[0, :4] = sae.threshold[:4] / 2 + 0.01
    assert not (sae.act(means) > 0).any()
    (dead,) = cleaning.clean(problem, sae, means, [1.0], steps=4)
    (found,) = cleaning.clean(problem, sae, means, [0.0], steps=8, act=torch.relu)
    assert dead.l0 == 0 and 0 < found.l0 <= 4 and not found.codes[4:].any() and (found.codes >= 0).all()
    close(found.vector, sae.decode(found.codes))


def test_a_huge_penalty_leaves_nothing_but_the_bias(problem, sae, start):
    (with_bias,) = cleaning.clean(problem, sae, start, [1e4])
    (without,) = cleaning.clean(problem, sae, start, [1e4], bias=False)
    assert with_bias.l0 == without.l0 == 0
    assert torch.equal(with_bias.vector, sae.b_dec) and not without.vector.any()


def test_cleaning_without_penalty_lowers_the_loss(fit, sae, start):
    before = fit.train.loss(sae.decode(sae.act(start)), LAYER).item()
    (found,) = cleaning.clean(fit, sae, start, [0.0], steps=60)
    assert found.train_loss < before - 0.1


def test_the_higher_the_penalty_the_fewer_latents(problem, sae, start):
    penalties = [0.0, 0.3, 1.0, 3.0, 10.0, 1e3]
    found = cleaning.clean(problem, sae, start.repeat(6, 1), penalties, steps=100)
    sizes = [result.l0 for result in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-2] and sizes[-1] == 0
    assert [result.penalty for result in found] == penalties


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_codes_decode_to_the_vector_and_losses_are_those_of_the_vector(problem, sae, start, bias, mode):
    problem = dataclasses.replace(problem, mode=mode)
    for found in cleaning.clean(problem, sae, start.repeat(2, 1), [0.0, 1.0], steps=20, bias=bias):
        close(found.vector, sae.decode(found.codes, bias=bias))
        close(torch.tensor([found.train_loss]), problem.train.loss(found.vector[None], LAYER, mode))
        close(torch.tensor([found.validation_loss]), problem.validation.loss(found.vector[None], LAYER, mode))


def test_the_kept_step_has_the_best_validation_loss_plus_penalty(problem, sae, start, checks):
    found = cleaning.clean(problem, sae, start.repeat(3, 1), [0.0, 1.0, 3.0], lr=0.3, steps=52, check_every=5)
    due = [check for check in checks if check.validation is not None]
    assert [check.step for check in due] == [*range(0, 52, 5), 52]
    for row, result in enumerate(found):
        costs = {check.step: (check.validation[row] + check.penalty[row]).item() for check in due}
        assert result.step == min(costs, key=costs.get)
        kept = next(check for check in due if check.step == result.step)
        assert result.choice_loss == costs[result.step]
        assert torch.equal(result.codes, kept.codes[row]) and torch.equal(result.vector, kept.vectors[row])
        assert result.validation_loss == kept.validation[row].item()
    losses = {check.step: check.validation[2].item() for check in due}
    assert found[2].step != min(losses, key=losses.get), "the penalty decided nothing: the test says little"


def test_a_penalty_of_one_costs_one_nat_at_the_start(problem, sae, start, checks):
    cleaning.clean(problem, sae, start.repeat(3, 1), [0.0, 1.0, 2.5], steps=1)
    close(checks[0].penalty, torch.tensor([0.0, 1.0, 2.5]))


def test_the_scale_of_an_sae_changes_nothing(problem, sae, start):
    """Codes ten times as large over atoms a tenth as long are the same dictionary."""
    scaled = dataclasses.replace(
        sae, W_enc=10 * sae.W_enc, b_enc=10 * sae.b_enc, threshold=10 * sae.threshold, W_dec=sae.W_dec / 10
    )
    (ours,) = cleaning.clean(problem, sae, start, [1.0], steps=30)
    (theirs,) = cleaning.clean(problem, scaled, 10 * start, [1.0], steps=30)
    assert ours.step == theirs.step
    torch.testing.assert_close(10 * ours.codes, theirs.codes, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(ours.vector, theirs.vector, atol=1e-2, rtol=1e-2)


def test_with_patience_it_stops_when_no_latent_goes_out_any_more_and_keeps_the_last_step(problem, sae, start, checks):
    """With a tiny step no latent ever goes out, so the patience runs from the start."""
    (found,) = cleaning.clean(problem, sae, start, [0.0], lr=1e-6, steps=500, check_every=10, patience=20)
    assert found.step == checks[-1].step == 20
    checks.clear()
    (found,) = cleaning.clean(problem, sae, start, [3.0], lr=0.3, steps=500, check_every=1, patience=40)
    sizes = [int((check.codes != 0).sum()) for check in checks]
    new_minimum = max(i for i in range(1, len(sizes)) if sizes[i] < min(sizes[:i]))
    assert found.step == checks[-1].step == new_minimum + 40
    assert found.l0 == sizes[-1] and torch.equal(found.codes, checks[-1].codes[0])
    costs = [(check.validation + check.penalty).item() for check in checks]
    assert costs[-1] > min(costs) + 0.01, "the last step is the best: the test says little"


# --- rows and batches ------------------------------------------------------------------------------------------


def test_three_rows_together_are_three_rows_alone(problem, sae, start):
    starts, penalties = torch.cat([start, 2 * start, start.roll(1, 1)]), [0.0, 1.0, 4.0]
    together = cleaning.clean(problem, sae, starts, penalties, steps=30)
    for row, penalty, ours in zip(starts, penalties, together, strict=True):
        (alone,) = cleaning.clean(problem, sae, row[None], [penalty], steps=30)
        assert ours.step == alone.step and ours.l0 == alone.l0
        torch.testing.assert_close(ours.codes, alone.codes, atol=1e-3, rtol=1e-3)
        assert ours.validation_loss == pytest.approx(alone.validation_loss, abs=1e-3)


def test_two_pruned_paths_together_are_two_paths_alone(problem, sae, signed):
    together = cleaning.prune_with_refit(problem, sae, signed, (8, 4), steps=8)
    for row, path in zip(signed, together, strict=True):
        (alone,) = cleaning.prune_with_refit(problem, sae, row[None], (8, 4), steps=8)
        for ours, theirs in zip(path, alone, strict=True):
            torch.testing.assert_close(ours.codes, theirs.codes, atol=1e-3, rtol=1e-3)


def test_a_batch_is_drawn_anew_at_every_step_and_by_step_and_seed_alone(problem, sae, signed):
    batched = dataclasses.replace(problem, batch=2)
    vector = vectors.matched_random(torch.ones(1, sae.d_in), 0)
    losses = torch.cat([batched.train_loss(vector, step) for step in range(200)])
    close(losses[7:8], batched.train_loss(vector, 7))
    assert len(losses.unique()) > 5
    # The mean over all batches is the loss over all prompts; the tolerance is five standard errors.
    assert abs(losses.mean() - problem.train_loss(vector, 0)) < 5 * losses.std() / 200**0.5
    first, again = (cleaning.prune_with_refit(batched, sae, signed, (6,), steps=6) for _ in range(2))
    whole = cleaning.prune_with_refit(problem, sae, signed, (6,), steps=6)
    torch.testing.assert_close(first[0][0].codes, again[0][0].codes, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(first[0][0].codes, whole[0][0].codes, atol=1e-2, rtol=1e-2)


def test_two_seeds_see_different_batches_and_one_seed_sees_the_same_ones(problem, sae, signed):
    vector = vectors.matched_random(torch.ones(1, sae.d_in), 0)

    def seen(seed):
        drawn = dataclasses.replace(problem, batch=2, seed=seed)
        return torch.cat([drawn.train_loss(vector, step) for step in range(40)])

    first, second = seen(0), seen(1)
    assert torch.equal(seen(1), second)
    same = torch.isclose(first, second, atol=1e-4)
    assert same.sum() < 12, "15 pairs of prompts and their orders: a few batches coincide, most do not"
    assert not torch.isclose(first[1:], second[:-1], atol=1e-4).all(), "a seed is no shift of the steps"
    tuned = [cleaning.learned_vector(dataclasses.replace(problem, batch=2, seed=seed), vector, steps=8)[0]
             for seed in (0, 1)]
    assert not torch.allclose(tuned[0].vector, tuned[1].vector, atol=1e-2)


def test_a_later_stage_of_pruning_goes_on_with_new_batches(problem, sae, signed):
    batched = dataclasses.replace(problem, batch=2)
    ((first, second),) = cleaning.prune_with_refit(batched, sae, signed[:1], (6, 6), steps=6)
    ((same_batches,),) = cleaning.prune_with_refit(batched, sae, first.codes[None], (6,), steps=6)
    assert not torch.allclose(second.codes, same_batches.codes, atol=1e-2, rtol=1e-2)
    ((first, second),) = cleaning.prune_with_refit(problem, sae, signed[:1], (6, 6), steps=6)
    ((without_batches,),) = cleaning.prune_with_refit(problem, sae, first.codes[None], (6,), steps=6)
    torch.testing.assert_close(second.codes, without_batches.codes, atol=1e-3, rtol=1e-3)


def test_a_batch_as_large_as_the_training_set_is_the_training_set(problem):
    vector = torch.ones(1, problem.train.model.d_model)
    everything = dataclasses.replace(problem, batch=len(problem.train.prompts))
    close(everything.train_loss(vector, 3), problem.train_loss(vector, 0))


def test_rows_with_rates_of_their_own_are_rows_alone_and_the_best_on_validation_is_kept(problem, sae, at, signed):
    """One pass with three rates, for each way to tune, against three passes with one."""
    rates, dense = [0.01, 0.1, 0.4], vectors.centred_task_vector(at, LAYER)[None]
    begin = sae.pre_activations(vectors.task_vector(at, LAYER))[None]
    ways = {
        "clean": lambda n, lr: cleaning.clean(problem, sae, begin.repeat(n, 1), [1.0] * n, lr, steps=12),
        "prune": lambda n, lr: [path[-1] for path in cleaning.prune_with_refit(
            problem, sae, signed[:1].repeat(n, 1), (8, 4), lr, steps=8)],
        "learn": lambda n, lr: cleaning.learned_vector(problem, dense.repeat(n, 1), lr, steps=12),
    }
    for how, tune in ways.items():
        together = tune(3, rates)
        for rate, ours in zip(rates, together, strict=True):
            (alone,) = tune(1, rate)
            assert ours.rate == alone.rate == rate and ours.step == alone.step, how
            torch.testing.assert_close(ours.vector, alone.vector, atol=1e-3, rtol=1e-3)
        kept = cleaning.best(together)
        assert kept.choice_loss == min(one.choice_loss for one in together)
        assert len({one.choice_loss for one in together}) == 3, "rates do nothing: the test says nothing"


def test_stated_losses_are_those_of_every_prompt_over_the_whole_vocabulary(problem, sae, signed):
    few = dataclasses.replace(problem, batch=2, vocabulary=engine.vocabulary(problem.train, keep=20))
    (path,) = cleaning.prune_with_refit(few, sae, signed[:1], (8, 4), steps=6)
    for before, after in zip(path, cleaning.stated(few, path), strict=True):
        for site, loss in ((problem.train, after.train_loss), (problem.validation, after.validation_loss)):
            assert loss == pytest.approx(site.loss(after.vector[None], LAYER).item(), abs=1e-4)
        assert after.choice_loss == before.choice_loss == before.validation_loss < after.validation_loss - 0.01
        assert torch.equal(after.codes, before.codes) and after.step == before.step


# --- pruning with refit ----------------------------------------------------------------------------------------


def test_every_stage_of_pruning_has_at_most_its_number_of_latents_and_only_survivors_of_the_last(problem, sae, signed):
    sizes = (200, 9, 5, 2)
    for row, path in zip(signed, cleaning.prune_with_refit(problem, sae, signed, sizes, steps=6), strict=True):
        support = row != 0
        for size, result in zip(sizes, path, strict=True):
            assert result.l0 <= size and not ((result.codes != 0) & ~support).any()
            support = result.codes != 0
            close(result.vector, result.codes @ sae.W_dec)
            close(torch.tensor([result.train_loss]), problem.train.loss(result.vector[None], LAYER))
        assert path[-1].l0 == 2


def test_pruning_keeps_the_codes_that_move_the_vector_most(problem, sae, signed):
    """With no step to refit, the stages are the largest codes of the start."""
    norms = torch.logspace(-1, 1, sae.d_sae)
    sae = dataclasses.replace(sae, W_dec=sae.W_dec * norms[:, None])
    (path,) = cleaning.prune_with_refit(problem, sae, signed[:1], (7, 3), steps=0)
    for size, result in zip((7, 3), path, strict=True):
        close(result.codes, vectors.keep_largest(signed[0], size, sae))


def test_refitting_lowers_the_loss_and_keeps_the_support_and_may_turn_no_code_on(fit, sae, signed):
    few = vectors.keep_largest(signed, 5, sae)
    for before, (after,) in zip(few, cleaning.prune_with_refit(fit, sae, few, (5,), steps=40), strict=True):
        assert torch.equal(after.codes != 0, before != 0)
        assert after.train_loss < fit.train.loss((before @ sae.W_dec)[None], LAYER).item() - 0.05


def test_a_refitted_stage_is_the_best_on_validation(problem, sae, signed, checks):
    ((found,),) = cleaning.prune_with_refit(problem, sae, signed[:1], (6,), steps=30, check_every=3)
    losses = {check.step: check.validation[0].item() for check in checks if check.validation is not None}
    assert found.step == min(losses, key=losses.get) and found.validation_loss == min(losses.values())


# --- tuning on a frozen support ----------------------------------------------------------------------------------


def test_tuning_lowers_the_loss_and_keeps_the_support_whatever_it_is(fit, sae, signed):
    start = torch.stack([vectors.keep_largest(signed[0], 5, sae), torch.eye(sae.d_sae)[:5].sum(0)])
    before = fit.train.loss(start @ sae.W_dec, LAYER)
    found = cleaning.refit(fit, sae, start, start.abs().max(1, keepdim=True).values, steps=40)
    for row, loss, result in zip(start, before, found, strict=True):
        assert torch.equal(result.codes != 0, row != 0)
        close(result.vector, result.codes @ sae.W_dec)
        assert result.train_loss < loss.item() - 0.01


def test_with_one_unit_a_short_start_goes_as_far_as_a_long_one(problem, sae, signed, checks):
    """The first step of Adam is as long as its rate, whatever the gradient."""
    row = vectors.keep_largest(signed[0], 5, sae)
    cleaning.refit(problem, sae, torch.stack([row, row / 50]), torch.full((1, 1), 0.3), lr=0.1, steps=1)
    moved = (checks[1].codes - checks[0].codes).abs()
    close(moved[:, row != 0], torch.full((2, 5), 0.03))


def test_what_pruning_does_after_a_cut_is_tuning(problem, sae, signed):
    ((pruned,),) = cleaning.prune_with_refit(problem, sae, signed[:1], (6,), lr=0.1, steps=12)
    cut = vectors.keep_largest(signed[:1], 6, sae)
    (tuned,) = cleaning.refit(problem, sae, cut, cut.abs().sum(1, keepdim=True) / 6, lr=0.1, steps=12)
    assert tuned.step == pruned.step > 0
    close(tuned.codes, pruned.codes)


# --- the dense upper bound -------------------------------------------------------------------------------------


def test_a_learned_vector_lowers_the_loss_below_any_sparse_one(fit, sae, at, signed):
    begin = vectors.centred_task_vector(at, LAYER)[None]
    (dense,) = cleaning.learned_vector(fit, begin, steps=60)
    assert dense.codes is None and dense.l0 == fit.train.model.d_model
    assert dense.train_loss < fit.train.loss(begin, LAYER).item() - 0.5
    assert dense.train_loss == pytest.approx(fit.train.loss(dense.vector[None], LAYER).item(), abs=1e-4)
    ((sparse,),) = cleaning.prune_with_refit(fit, sae, signed[:1], (5,), steps=60)
    assert dense.train_loss < sparse.train_loss


def test_the_start_of_an_optimisation_is_left_as_it_was(problem, sae, start, signed):
    before = start.clone(), signed.clone()
    cleaning.clean(problem, sae, start, [1.0], steps=3)
    cleaning.prune_with_refit(problem, sae, signed, (5,), steps=3)
    cleaning.learned_vector(problem, start[:, : sae.d_in], steps=3)
    assert torch.equal(start, before[0]) and torch.equal(signed, before[1])


def test_a_random_start_has_as_many_active_latents_and_shares_few_with_the_vector(sae, start):
    strangers = cleaning.random_start(start[0], sae, seed=0)
    ours, theirs = sae.act(start[0]) > 0, sae.act(strangers) > 0
    assert theirs.sum() == ours.sum() and not torch.equal(ours, theirs)
    assert torch.equal(cleaning.random_start(start[0], sae, seed=0), strangers)
    assert not torch.equal(cleaning.random_start(start[0], sae, seed=1), strangers)
