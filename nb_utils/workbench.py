"""Clean a vector from a few pairs: task vector, layer curve, cleaning that can be stopped, weights set by hand."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import cleaning, engine, exports, prompts, tasks, vectors
from nb_utils.models import EMBEDDED, Model
from nb_utils.saes import Sae

MAX_PAIRS = 1000
N_CLEAN, N_TEST = 24, 24  # prompts to clean on, and to measure on
SIZES, STEPS, RATE = (50, 20, 10, 5), 16, 0.1
PENALTY, CLEAN_STEPS, CLEAN_RATE = 1.0, 80, 0.2


class WorkbenchError(ValueError):
    """Pairs or settings that cannot be cleaned; the message says what to change."""


@dataclass(frozen=True)
class Trial:
    """Where vectors are tried: a layer, by its SAE, and held-out prompts, on which nothing is chosen."""

    model: Model
    sae: Sae
    site: engine.Site
    pairs: tuple[tasks.Pair, ...]
    zero_shot: float
    title: str
    licence: str


@dataclass(frozen=True)
class Bench:
    """A task at one layer, ready to be cleaned; losses in nats over the first two answer tokens."""

    trial: Trial
    at: vectors.Streams
    problem: cleaning.Problem
    few_shot: float


@dataclass(frozen=True)
class Weighted:
    """Latents [k] with weights [k] in raw units; ``bias`` adds the decoder bias; loss on validation prompts (nats)."""

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    bias: bool
    validation_loss: float


def check(task: tasks.Task) -> tasks.Splits:
    """Split a task; raises WorkbenchError for more than `MAX_PAIRS` pairs, TaskError where a split would be too small.
    """
    if len(task.pairs) > MAX_PAIRS:
        raise WorkbenchError(
            f"{len(task.pairs):,} pairs are more than the {MAX_PAIRS:,} we take here: give a sample of them, or run "
            "the experiment notebooks on the file."
        )
    return tasks.split(task)


def prepare(model: Model, sae: Sae, task: tasks.Task, layers: tuple[int, ...], seed: int = 0) -> Bench:
    """Split a task, collect its separators after ``layers``, and prepare what every evaluation shares.

    Raises as `check` does.
    """
    split = check(task)
    at = vectors.separators(model, split.vector, layers, seed=seed)
    trial = _trial(model, sae, split.test[:N_TEST], task.title, task.licence)
    shown = prompts.few_shot(model.tokenizer, split.vector, trial.pairs, n_shots=16, seed=seed)
    few = engine.Site.prepare(model, shown, answer_tokens=2).unsteered().loss().mean().item()
    train, validation = _site(model, split.train[:N_CLEAN]), _site(model, split.validation[:N_CLEAN])
    problem = cleaning.Problem(train, validation, sae.layer, vocabulary=engine.vocabulary(train, validation))
    return Bench(trial, at, problem, few)


def _site(model: Model, pairs) -> engine.Site:
    return engine.Site.prepare(model, prompts.zero_shot(model.tokenizer, pairs), answer_tokens=2)


def _trial(model: Model, sae: Sae, pairs, title: str, licence: str) -> Trial:
    site = _site(model, pairs)
    return Trial(model, sae, site, tuple(pairs), site.unsteered().loss().mean().item(), title, licence)


def curve(bench: Bench) -> list[dict]:
    """Return the held-out loss (nats) of the task vector and of the centred one, added after each layer."""
    found = []
    for layer in sorted(bench.at.few):
        both = torch.stack([vectors.task_vector(bench.at, layer), vectors.centred_task_vector(bench.at, layer)])
        losses = bench.trial.site.evaluate(both, layer).loss().mean(1).tolist()
        found.append({"layer": layer, "task_vector": losses[0], "centred": losses[1]})
    return found


def prune(bench: Bench, progress: cleaning.Progress | None = None) -> list[Weighted]:
    """Prune contrast codes with refit: one result for each of `SIZES` that was reached."""
    start = vectors.contrast_codes(bench.at, bench.problem.layer, bench.trial.sae).codes[None]
    path = cleaning.prune_with_refit(bench.problem, bench.trial.sae, start, SIZES, RATE, STEPS, progress=progress)[0]
    return [_weighted(result, bias=False) for result in path]


def clean(bench: Bench, progress: cleaning.Progress | None = None) -> list[Weighted]:
    """Clean the task vector's codes as the post does, at one penalty."""
    start = bench.trial.sae.pre_activations(vectors.task_vector(bench.at, bench.problem.layer))[None]
    found = cleaning.clean(
        bench.problem, bench.trial.sae, start, [PENALTY], CLEAN_RATE, CLEAN_STEPS, bias=True, progress=progress)
    return [_weighted(found[0], bias=True)]


METHODS = {"prune": prune, "clean": clean}


def _weighted(result: cleaning.Cleaned, bias: bool) -> Weighted:
    latents = result.codes.nonzero()[:, 0]
    latents = latents[result.codes[latents].abs().argsort(descending=True)]
    return Weighted(tuple(latents.tolist()), tuple(result.codes[latents].tolist()), bias, result.validation_loss)


def vector(sae: Sae, weighted: Weighted) -> Float[Tensor, " d_model"]:
    """Add up the weighted decoder rows (and the bias)."""
    found = torch.tensor(weighted.weights) @ sae.W_dec[torch.tensor(weighted.latents, dtype=torch.long)]
    return found + sae.b_dec if weighted.bias else found


def loss(trial: Trial, weighted: Weighted) -> float:
    """Return the mean held-out loss (nats, first two answer tokens) with the weighted features added."""
    return trial.site.evaluate(vector(trial.sae, weighted)[None], trial.sae.layer).loss().mean().item()


def export(trial: Trial, weighted: Weighted) -> exports.Vector:
    """Pack the weighted features with a card that lets others check them."""
    made, model, sae = vector(trial.sae, weighted), trial.model, trial.sae
    terms = EMBEDDED[model.name].licence if model.name in EMBEDDED else f"the licence of {model.name}"
    card = exports.Card(
        task=trial.title, model=model.name, model_sha256=model.sha256, layer=sae.layer, bias=weighted.bias,
        hook_name=f"blocks.{sae.layer}.hook_resid_post", sae=sae.name, sae_set=sae.sae_set, sae_sha256=sae.sha256,
        features={str(latent): weight for latent, weight in zip(weighted.latents, weighted.weights, strict=True)},
        scale=float(made.norm() / trial.site.at(sae.layer).norm(dim=1).mean()), loss=loss(trial, weighted),
        zero_shot_loss=trial.zero_shot, heldout=tuple((f"{pair.x} ->", pair.y) for pair in trial.pairs),
        licence=f"Model and SAE: {terms}. Pairs: {trial.licence}.",
    )
    return exports.Vector(made, torch.tensor(weighted.latents, dtype=torch.long), torch.tensor(weighted.weights), card)


def restore(exported: exports.Vector, model: Model, sae: Sae) -> tuple[Trial, Weighted]:
    """Return an exported vector's features, and the trial on the held-out pairs of its card."""
    pairs = [tasks.Pair(prompt.removesuffix(" ->"), answer, (answer,)) for prompt, answer in exported.card.heldout]
    trial = _trial(model, sae, pairs, exported.card.task, exported.card.licence.partition("Pairs: ")[2].rstrip("."))
    latents, weights = tuple(exported.latents.tolist()), tuple(exported.weights.tolist())
    return trial, Weighted(latents, weights, exported.card.bias, float("nan"))
