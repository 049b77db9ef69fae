"""Task vectors: what the separators, or the outputs, of few-shot prompts carry, before and beside any SAE."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import engine, prompts, tasks
from nb_utils.models import Model

UNUSED = re.compile(r"<unused\d+>")  # places that Gemma's vocabulary keeps free


@dataclass(frozen=True)
class Streams:
    """Residual streams at one kind of token, per layer [n, d_model]: in few-shot prompts, and where no example is."""

    few: dict[int, Float[Tensor, "n d_model"]]
    zero: dict[int, Float[Tensor, "m d_model"]]


def separators(
    model: Model, pool: tuple[tasks.Pair, ...], layers, n_prompts: int = 16, n_shots: int = 16, skip: int = 1,
    seed: int = 0, template: prompts.Template = prompts.ARROW,
) -> Streams:
    """Collect the separators of ``n_prompts`` few-shot prompts over ``pool`` and of every zero-shot prompt of it.

    The first ``skip`` separators of a prompt are left out: they have seen no example. (Post: 16 prompts x 16 shots.)
    """
    again = len(pool) % 7 == 0  # then every seventh pair only comes round to itself: a new round starts one further
    queries = [pool[(seed + 7 * i + again * (7 * i // len(pool))) % len(pool)] for i in range(n_prompts)]
    few = prompts.few_shot(model.tokenizer, pool, queries, n_shots, seed, template)
    zero = prompts.zero_shot(model.tokenizer, pool, template)
    return Streams(
        few=engine.residuals(model, few, [p.separators[skip:] for p in few], layers),
        zero=engine.residuals(model, zero, [p.separators for p in zero], layers, batch=64),
    )


def outputs(
    model: Model, pool: tuple[tasks.Pair, ...], layers, n_prompts: int = 16, n_shots: int = 16, seed: int = 0,
    template: prompts.Template = prompts.ARROW,
) -> Streams:
    """Collect the last token of every y of few-shot prompts, and the "Y" of the dummy prompt ``X -> Y`` beside them.

    What they carry beyond any output is that a task has been completed: the detectors of the post. No output counts
    more often than outputs do on average, so that a common one ("Spanish") does not become the vector.
    """
    queries = [pool[(seed + i) % len(pool)] for i in range(n_prompts)]
    few = prompts.few_shot(model.tokenizer, pool, queries, n_shots, seed, template)
    dummy = prompts.dummy_shot(model.tokenizer, pool[:1], template)
    return Streams(
        few=engine.residuals(model, few, _balanced(few), layers),
        zero=engine.residuals(model, dummy, [p.outputs for p in dummy], layers),
    )


def _balanced(few) -> list[tuple[int, ...]]:
    """Return the output positions of each prompt, without those of outputs that came up more often than the mean."""
    words = [
        [p.ids[start + 1 : end + 1] for start, end in zip(p.separators[:-1], p.outputs, strict=True)] for p in few
    ]
    times = Counter(word for row in words for word in row)
    most, seen, positions = -(-sum(times.values()) // len(times)), Counter(), []
    for p, row in zip(few, words, strict=True):
        spots = []
        for end, word in zip(p.outputs, row, strict=True):
            seen[word] += 1
            if seen[word] <= most:
                spots.append(end)
        positions.append(tuple(spots))
    return positions


def task_vector(at: Streams, layer: int) -> Float[Tensor, " d_model"]:
    """Average the residual stream over all few-shot tokens (Hendel et al. 2023; the post)."""
    return at.few[layer].mean(0)


def centred_task_vector(at: Streams, layer: int) -> Float[Tensor, " d_model"]:
    """Subtract the mean where no example is, which any such token carries whatever its task."""
    return at.few[layer].mean(0) - at.zero[layer].mean(0)


def matched_random(vector: Float[Tensor, " d_model"], seed: int) -> Float[Tensor, " d_model"]:
    """Return a random direction with the norm of ``vector``."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)).to(vector)
    return noise * vector.norm() / noise.norm()


@torch.no_grad()
def logit_lens(
    model: Model, directions: Float[Tensor, "n d_model"], k: int = 10, block: int = 64
) -> tuple[list[list[tuple[str, float]]], list[list[tuple[str, float]]]]:
    """Return the ``k`` most promoted and most suppressed tokens of each direction, with their logits.

    A direction goes through the final norm as if it were the whole residual stream (which scales it, and weighs its
    parts), then through the unembedding; the mean over the vocabulary is taken off. Places of the vocabulary that
    stand for no text are left out (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    tokenizer, layout = model.tokenizer, model.layout
    kept = torch.tensor(_texts(tokenizer, layout.n_vocab))
    W_U = layout.unembedding()[0]  # a bias is the same for every direction
    up, down = [], []
    for part in directions.split(block):
        logits = (layout.norm(part.to(W_U)) @ W_U.T)[:, kept].float()
        logits -= logits.mean(1, keepdim=True)
        for found, largest in ((up, True), (down, False)):
            top = logits.topk(min(k, len(kept)), largest=largest)
            for values, ids in zip(top.values.tolist(), kept[top.indices.cpu()].tolist(), strict=True):
                found.append([(piece(tokenizer, token), value) for token, value in zip(ids, values, strict=True)])
    return up, down


@cache
def _texts(tokenizer, n_vocab: int) -> list[int]:
    """List the tokens that stand for some text."""
    special = set(tokenizer.all_special_ids)
    return [i for i in range(min(len(tokenizer), n_vocab))
            if i not in special and not UNUSED.fullmatch(tokenizer.convert_ids_to_tokens(i))]  # fmt: skip


def piece(tokenizer, token: int) -> str:
    """Return the text of one token; one that is only a part of a character goes by its name in the vocabulary."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text or not text else text
