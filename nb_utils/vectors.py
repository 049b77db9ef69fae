"""Task vectors, what the separators or the outputs of few-shot prompts carry; and ways to write one in atoms of an SAE.

Decompositions are sibling functions with one signature: the separators, a layer, an SAE and the number of atoms ``k``
(ignored where the method has no such knob). They return codes together with the vector that these decode to.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import engine, prompts, tasks
from nb_utils.models import Model
from nb_utils.saes import Sae

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


def thetas(
    model: Model, cases: list[prompts.Case], layers, template: prompts.Template = prompts.ARROW
) -> dict[int, Float[Tensor, "n d_model"]]:
    """Collect what Hendel et al. (2023) call theta, one a case: the last separator, averaged over its dummies."""
    shown = [case.shown(model.tokenizer, dummy, template) for case in cases for dummy in case.dummies]
    read = engine.residuals(model, shown, [p.separators[-1:] for p in shown], layers)
    return {layer: stream.unflatten(0, (len(cases), -1)).mean(1) for layer, stream in read.items()}


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


# Decompositions


@dataclass(frozen=True)
class Codes:
    """Sparse codes [d_sae], the vector [d_model] they stand for, and the target [d_model] they were made for.

    ``target == vector + error`` is an identity.
    """

    codes: Float[Tensor, " d_sae"]
    vector: Float[Tensor, " d_model"]
    target: Float[Tensor, " d_model"]

    @property
    def error(self) -> Float[Tensor, " d_model"]:
        return self.target - self.vector

    @property
    def l0(self) -> int:
        return int((self.codes != 0).sum())


def reconstruct(at: Streams, layer: int, sae: Sae, k: int | None = None) -> Codes:
    """Pass the mean vector through the SAE: decode(encode(TV)), the naive way (the post)."""
    target = task_vector(at, layer)
    codes = sae.encode(target)
    return Codes(codes, sae.decode(codes), target)


def vector_on_reconstruction(at: Streams, layer: int, sae: Sae, k: int | None = None) -> Codes:
    """Pass every separator through the SAE, then average ("TV on recon" of the post)."""
    codes = sae.encode(at.few[layer]).mean(0)
    return Codes(codes, sae.decode(codes), task_vector(at, layer))


def gradient_pursuit(at: Streams, layer: int, sae: Sae, k: int | None = 40) -> Codes:
    """Pursue the TV with ``k`` non-negative unit atoms, one gradient step each ("ITO"; Blumensath & Davies 2008)."""
    return _pursuit(at, layer, sae, k, "gradient_pursuit")


def nonnegative_omp(at: Streams, layer: int, sae: Sae, k: int | None = 40) -> Codes:
    """Pursue the TV with ``k`` atoms, re-solving non-negative least squares after each: stronger than the paper's."""
    return _pursuit(at, layer, sae, k, "nonnegative_orthogonal_matching_pursuit")


def _pursuit(at, layer, sae, k, algorithm) -> Codes:
    from transformer_lens.tools.analysis.jacobian_lens_decomposition import get_sparse_decomposition

    target = task_vector(at, layer)
    norms = sae.W_dec.norm(dim=1)
    atoms = norms.nonzero()[:, 0]  # a dead latent may have none
    directions = sae.W_dec[atoms] / norms[atoms, None]
    found = get_sparse_decomposition(target - sae.b_dec, directions, min(k, len(atoms)), algorithm=algorithm)
    codes, support = torch.zeros_like(sae.threshold), atoms[found.support]
    codes[support] = found.coordinates / norms[support]
    return Codes(codes, sae.decode(codes), target)


def top_k_projection(at: Streams, layer: int, sae: Sae, k: int | None = 40) -> Codes:
    """Take the ``k`` atoms that the TV projects on most, with least-squares weights: a control for their choice."""
    target = task_vector(at, layer)
    support = (sae.decoder_directions @ (target - sae.b_dec)).topk(k).indices
    return _least_squares(target, support, sae)


def random_support(at: Streams, layer: int, sae: Sae, k: int | None = 40, seed: int = 0) -> Codes:
    """Take ``k`` random atoms, with least-squares weights: a control for the number of atoms."""
    order = torch.randperm(len(sae.threshold), generator=torch.Generator().manual_seed(seed))
    return _least_squares(task_vector(at, layer), order[:k].to(sae.W_dec.device), sae)


def _least_squares(target, support, sae) -> Codes:
    codes = torch.zeros_like(sae.threshold)
    # In float32 the last bits of the solution depend on where its buffers lie, so they vary from run to run.
    atoms, rest = sae.W_dec[support].T.double(), (target - sae.b_dec).double()
    codes[support] = torch.linalg.lstsq(atoms, rest[:, None]).solution[:, 0].to(codes.dtype)
    return Codes(codes, sae.decode(codes), target)


def density_matched(
    density: Float[Tensor, " d_sae"], like: Sequence[int], rng: random.Random, nearest: int = 20
) -> list[int]:
    """Draw one latent for each of ``like``, of the ``nearest`` in density (on a log scale): a control for a choice.

    None is drawn twice, and none that is in ``like``.
    """
    log, drawn = (density.double() + 1e-4).log(), []
    for latent in like:
        far = (log - log[latent]).abs()
        far[[*like, *drawn]] = torch.inf
        drawn.append(rng.choice(far.argsort(stable=True)[:nearest].tolist()))
    return drawn


def correlated(codes: Float[Tensor, "n d_sae"], right: Float[Tensor, " n"], k: int) -> list[int]:
    """Take the ``k`` latents whose activation correlates most with a right answer, over ``n`` prompts.

    Pearson's correlation, the largest, of the token that says the answer: how CorrSteer selects (Cho, Wu and Koshiyama
    2025, arXiv:2508.12535). Latents that never vary, or answers that are all alike, correlate with nothing.
    """
    latent, answer = codes - codes.mean(0), (right - right.mean()).to(codes)
    found = (latent * answer[:, None]).sum(0) / (latent.norm(dim=0) * answer.norm()).clamp_min(1e-9)
    return found.argsort(descending=True, stable=True)[:k].tolist()


def discriminative(own: Float[Tensor, "n d_sae"], other: Float[Tensor, "m d_sae"], k: int) -> list[int]:
    """Take the ``k`` latents that best tell some tokens from others, where they are active more.

    That SDCV keeps the latents that best differentiate positive from negative samples is from its paper (Zhao et al.
    2025, arXiv:2505.15038); the measure is ours: the difference of the means over the mean spread of the two.
    """
    spread = ((own.var(0, correction=0) + other.var(0, correction=0)) / 2).sqrt()
    apart = (own.mean(0) - other.mean(0)) / spread.clamp_min(1e-9)
    return apart.argsort(descending=True, stable=True)[:k].tolist()


def attributed(gradient: Float[Tensor, " d_model"], codes: Float[Tensor, " d_sae"], sae: Sae, k: int) -> list[int]:
    """Take the ``k`` latents whose codes lower the loss most, to first order: gradient times activation.

    ``gradient``: of the loss by what is added to the stream. ``codes``: signed, what a latent would add (attribution
    patching: Nanda 2023; of SAE latents: Marks et al. 2024, arXiv:2403.19647).
    """
    lowers = -codes * (sae.W_dec @ gradient)
    return lowers.argsort(descending=True, stable=True)[:k].tolist()


def contrast_codes(at: Streams, layer: int, sae: Sae, k: int | None = None) -> Codes:
    """Subtract mean zero-shot codes from mean few-shot codes; keep the ``k`` largest (None: all).

    Codes are signed and decoded without bias: they stand for the centred task vector.
    """
    codes = sae.encode(at.few[layer]).mean(0) - sae.encode(at.zero[layer]).mean(0)
    if k is not None:
        codes = keep_largest(codes, k, sae)
    return Codes(codes, codes @ sae.W_dec, centred_task_vector(at, layer))


def keep_largest(codes: Float[Tensor, "... d_sae"], k: int, sae: Sae) -> Float[Tensor, "... d_sae"]:
    """Zero all but the ``k`` codes whose atoms contribute most (|code| x decoder norm)."""
    size = codes.abs() * sae.W_dec.norm(dim=1)
    kept = size.topk(min(k, size.shape[-1])).indices
    return torch.zeros_like(codes).scatter(-1, kept, codes.gather(-1, kept))


# Dictionaries that nobody trained: what the SAE is held against


@torch.no_grad()
def untrained(
    name: str, layer: int, directions: Float[Tensor, "d_sae d_in"], x: Float[Tensor, "tokens d_in"], k: int
) -> Sae:
    """Build a dictionary of given directions that nobody trained: a tied encoder, the ``k`` largest codes, one gain.

    ``x``: the residual stream after block ``layer``, recorded on some text. On are the ``k`` latents along whose unit
    direction ``x`` less its mean goes farthest; a threshold would go by the few tokens that are many times as long as
    the rest. Codes are these lengths times the one gain at which they reconstruct ``x`` best, every token weighing the
    same (about 1 where directions are orthogonal).
    """
    W_dec, mean = torch.nn.functional.normalize(directions.float(), dim=1), x.mean(0)
    centred = x - mean
    top = (centred @ W_dec.T).topk(k)
    found = torch.zeros(len(x), len(W_dec)).scatter(1, top.indices, top.values.relu()) @ W_dec
    weight = centred.square().sum(1, keepdim=True).clamp_min(1e-9).reciprocal()
    gain = (weight * found * centred).sum() / (weight * found.square()).sum()
    tensors = {
        "W_enc": (gain * W_dec.T).contiguous(), "b_enc": -gain * (W_dec @ mean), "W_dec": W_dec, "b_dec": mean,
        "threshold": torch.zeros(len(W_dec)),
    }
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    return Sae(
        name=name, sae_set=name, hook_name=f"blocks.{layer}.hook_resid_post", layer=layer, architecture="topk", k=k,
        sha256=digest.hexdigest(), **tensors,
    )


def orthonormal(d_in: int, seed: int = 0) -> Float[Tensor, "2*d_in d_in"]:
    """Draw orthonormal directions, each with its opposite."""
    drawn = torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(drawn).Q
    return torch.cat([basis, -basis])


def components(x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "2*d_in d_in"]:
    """Return the principal components of a recorded residual stream, each with its opposite.

    Of the directions of tokens from their mean, so that the few that are many times as long as the rest weigh as much.
    """
    unit = torch.nn.functional.normalize((x - x.mean(0)).double(), dim=1)
    basis = torch.linalg.eigh(unit.T @ unit).eigenvectors.T.flip(0).to(x.dtype)
    return torch.cat([basis, -basis])
