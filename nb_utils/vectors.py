"""Task vectors: what the separators of few-shot prompts carry, before and beside any SAE."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import engine, prompts, tasks
from nb_utils.models import Model


@dataclass(frozen=True)
class Separators:
    """Residual streams at separators, per layer [n, d_model]: of few-shot prompts and of zero-shot ones."""

    few: dict[int, Float[Tensor, "n d_model"]]
    zero: dict[int, Float[Tensor, "m d_model"]]


def separators(
    model: Model, pool: tuple[tasks.Pair, ...], layers, n_prompts: int = 16, n_shots: int = 16, skip: int = 1,
    seed: int = 0, template: prompts.Template = prompts.ARROW,
) -> Separators:
    """Collect the separators of ``n_prompts`` few-shot prompts over ``pool`` and of every zero-shot prompt of it.

    The first ``skip`` separators of a prompt are left out: they have seen no example. (Post: 16 prompts x 16 shots.)
    """
    again = len(pool) % 7 == 0  # then every seventh pair only comes round to itself: a new round starts one further
    queries = [pool[(seed + 7 * i + again * (7 * i // len(pool))) % len(pool)] for i in range(n_prompts)]
    few = prompts.few_shot(model.tokenizer, pool, queries, n_shots, seed, template)
    zero = prompts.zero_shot(model.tokenizer, pool, template)
    return Separators(
        few=engine.residuals(model, few, [p.separators[skip:] for p in few], layers),
        zero=engine.residuals(model, zero, [p.separators for p in zero], layers, batch=64),
    )


def task_vector(at: Separators, layer: int) -> Float[Tensor, " d_model"]:
    """Average the residual stream over all few-shot separators (Hendel et al. 2023; the post)."""
    return at.few[layer].mean(0)


def centred_task_vector(at: Separators, layer: int) -> Float[Tensor, " d_model"]:
    """Subtract the zero-shot separators' mean, which any separator carries whatever its task."""
    return at.few[layer].mean(0) - at.zero[layer].mean(0)


def matched_random(vector: Float[Tensor, " d_model"], seed: int) -> Float[Tensor, " d_model"]:
    """Return a random direction with the norm of ``vector``."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)).to(vector)
    return noise * vector.norm() / noise.norm()
