"""Interventions: where, when and how the residual stream of a prompt is changed, as data.

An `Intervention` names tokens, blocks and, for each block, an `Edit`. Two paths carry it out. The plain one (`hooked`,
`plain`, `continuations`) is a pass of the whole transformers model with a hook on each block: the reference. The fast
one (`streams`, `losses`, `evaluate`) replays what can change at an `engine.Site`. Both give the same numbers, up to
rounding: a code that lies within rounding of the threshold of its latent may be on in one and off in the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nb_utils.engine import Scores, Site, Vocabulary
from nb_utils.models import Model
from nb_utils.prompts import Prompt, positions
from nb_utils.saes import Sae

# (stream [n, batch, tokens, d_model], values [n, 1, 1, width], strength [batch, tokens, 1]) -> stream
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """What becomes of the stream after one block, in ``n`` ways that are tried side by side.

    ``values`` [n, width]: what the ways differ in. ``change`` makes the new stream of the old one; it leaves a token
    of strength 0 as it is, to the last bit. Differentiable in both. ``mode``: the name of the change.
    """

    mode: str
    values: Float[Tensor, "n width"]
    change: Change

    def __call__(
        self, stream: Float[Tensor, "n batch tokens d_model"], strength: Float[Tensor, "batch tokens"]
    ) -> Float[Tensor, "n batch tokens d_model"]:
        return self.change(stream, self.values.to(stream.device)[:, None, None], strength.to(stream)[..., None])


def add(vectors: Float[Tensor, "n d_model"]) -> Edit:
    """Add a vector to the stream."""
    return Edit("add", vectors, lambda stream, values, strength: stream + strength * values.to(stream))


def substitute(vectors: Float[Tensor, "n d_model"]) -> Edit:
    """Replace the stream by a vector ("replace"); at a strength between 0 and 1, go that part of the way."""
    return Edit("replace", vectors, lambda stream, values, strength: torch.lerp(
        stream, values.to(stream).expand_as(stream), strength.expand_as(stream)))  # fmt: skip


def turn(vectors: Float[Tensor, "n d_model"]) -> Edit:
    """Add a vector, then give the stream its length back: of what adding does, the turn alone."""

    def change(stream, values, strength):
        moved = stream + strength * values.to(stream)
        return moved * (_length(stream) / _length(moved))

    return Edit("turn", vectors, change)


def lengthen(vectors: Float[Tensor, "n d_model"]) -> Edit:
    """Give the stream the length that it had after adding a vector, and leave its direction: the other half."""

    def change(stream, values, strength):
        return stream * (_length(stream + strength * values.to(stream)) / _length(stream))

    return Edit("lengthen", vectors, change)


def _length(stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
    return stream.norm(dim=-1, keepdim=True)


def clamp(sae: Sae, latents: Sequence[int], codes: Float[Tensor, "n k"]) -> Edit:
    """Set the codes of latents; NaN leaves one as it is.

    The stream moves by the difference of two decodings, h - (c - c') W_dec: what the SAE does not explain stays, and
    an empty set changes nothing. A code of 0 takes a latent away (zero ablation), its mean elsewhere takes away what
    it says here (mean ablation), any other steers by it.
    """
    latents = torch.as_tensor(latents, dtype=torch.long)
    rows, few = sae.W_dec[latents], sae
    if sae.k is None:  # each latent decides for itself whether it is on: no other is computed
        few = replace(
            sae, W_enc=sae.W_enc[:, latents], b_enc=sae.b_enc[latents], threshold=sae.threshold[latents], W_dec=rows)

    def change(stream, values, strength):
        own = few.to(stream.device).encode(stream)
        own = own if sae.k is None else own[..., latents.to(stream.device)]
        moved = torch.where(values.isnan(), 0, values.to(own) - own) @ rows.to(own)
        return stream + strength * moved.to(stream)

    return Edit("clamp", codes, change)


@dataclass(frozen=True)
class Intervention:
    """Edits after some blocks, at some tokens of a prompt, in ``n`` ways side by side.

    ``tokens``: a name of `prompts.TOKENS`. ``decay``: of "generated" tokens, each is changed by this share of what the
    one before it is; 1 changes all alike, 0 the first alone. Raises ValueError for an unknown name, a decay elsewhere,
    no edit, or edits of unequal n.
    """

    edits: Mapping[int, Edit]
    tokens: str = "separator"
    decay: float = 1.0

    def __post_init__(self) -> None:
        if len({len(edit.values) for edit in self.edits.values()}) != 1:
            raise ValueError("An intervention needs an edit after at least one block, in equally many ways after each.")
        if self.decay != 1 and self.tokens != "generated":
            raise ValueError(f"Only what is done to generated tokens can decay, not to {self.tokens}.")
        positions(Prompt((0, 0), (0,), (), (0,), ()), self.tokens)  # raises for an unknown name

    def __len__(self) -> int:
        return len(next(iter(self.edits.values())).values)

    @property
    def layers(self) -> list[int]:
        """The blocks whose output is changed, in order."""
        return sorted(self.edits)

    def of(self, part: Int[Tensor, " part"]) -> "Intervention":
        """Return some of the ways."""
        return replace(self, edits={
            layer: replace(edit, values=edit.values[part.to(edit.values.device)]) for layer, edit in self.edits.items()
        })  # fmt: skip


def strength(prompt: Prompt, tokens: str, decay: float = 1.0) -> Float[Tensor, " tokens"]:
    """Return by how much every token of a prompt is changed: 1 in full, 0 not at all (see `Intervention`)."""
    found, at = torch.zeros(len(prompt.ids)), list(positions(prompt, tokens))
    found[at] = decay ** torch.arange(len(at), dtype=torch.float)
    return found


# The plain path


@contextmanager
def hooked(model: Model, what: Intervention, share: Float[Tensor, " tokens"]) -> Iterator[None]:
    """Change every pass of the model as long as this lasts: of one prompt, a row for each way.

    ``share``: the `strength` of every token of the pass.
    """
    with ExitStack() as hooks:
        for layer, edit in what.edits.items():

            def change(stream, edit=edit):
                return edit(stream[:, None], share[None])[:, 0]

            hooks.enter_context(model.layout.hooked(layer, change))
        yield


def plain(model: Model, prompt: Prompt, what: Intervention) -> Float[Tensor, "n answer"]:
    """Return the NLL (nats) of every answer token of a prompt from one unpadded pass; differentiable in the values."""
    ids = torch.tensor([prompt.ids[:-1]], device=model.device).expand(len(what), -1)
    with hooked(model, what, strength(prompt, what.tokens, what.decay)[:-1]):
        logits = model.hf(ids, use_cache=False).logits
    answer = torch.tensor(prompt.answer, device=model.device)
    return -logits[:, -len(answer) :].float().log_softmax(-1)[:, torch.arange(len(answer)), answer]


@torch.no_grad()
def continuations(
    model: Model, prompt: Prompt, what: Intervention, n_tokens: int = 4, cache: bool = True
) -> list[str]:
    """Decode greedily from a prompt's last separator, in every way; a line's end stops.

    Without ``cache`` every step runs the whole text again: slower, and the same.
    """
    head, n = prompt.ids[: prompt.separators[-1] + 1], len(what)
    ids = torch.tensor([head], device=model.device).expand(n, -1)
    text, going, state = [""] * n, set(range(n)), None
    while True:
        grown = tuple(ids[0, len(head) :].tolist())  # which tokens they are does not matter, only where they stand
        share = strength(replace(prompt, ids=head + grown, answer=grown), what.tokens, what.decay)
        new = ids if state is None or not cache else ids[:, -1:]
        with hooked(model, what, share[-new.shape[1] :]):
            state = model.hf(new, past_key_values=state and state.past_key_values, use_cache=cache, logits_to_keep=1)
        ids = torch.cat([ids, state.logits[:, -1:].argmax(-1)], 1)
        for i in sorted(going):
            piece = model.tokenizer.decode(ids[i, len(head) :], skip_special_tokens=True)
            text[i] = piece.split("\n")[0]
            if ids[i, -1] == model.tokenizer.eos_token_id or "\n" in piece:
                going.discard(i)
        if not going or ids.shape[1] == len(head) + n_tokens:
            return text


# The fast path


def strengths(site: Site, tokens: str, decay: float = 1.0) -> Float[Tensor, "batch suffix"]:
    """Return the `strength` of every token that a site runs again.

    Raises ValueError where an earlier token would have to be changed: then the site has to be prepared for ``tokens``.
    """
    found = torch.zeros(site.residual[0].shape[:2])
    for row, prompt in zip(found, site.prompts, strict=True):
        whole, first = strength(prompt, tokens, decay), positions(prompt, site.steers)[0]
        if whole[:first].any():
            raise ValueError(f"A site prepared for {site.steers} does not run all {tokens} again: prepare it for them.")
        own = whole[first:][: len(row)]
        row[: len(own)] = own
    return found


def streams(site: Site, what: Intervention, end: int | None = None) -> Float[Tensor, "n batch suffix d_model"]:
    """Run the suffix of a site's prompts with an intervention, up to block ``end`` (not included).

    Raises ValueError where a token is changed that the site does not run again.
    """
    layers = [layer for layer in what.layers if end is None or layer < end]
    base = site.residual[layers[0]]
    share, found = strengths(site, what.tokens, what.decay).to(base.device), base.expand(len(what), *base.shape)
    for layer, later in zip(layers, [*layers[1:], None], strict=True):
        found = what.edits[layer](found, share)
        found = site.replay(found, layer + 1, end if later is None else later + 1)
    return found


def losses(site: Site, what: Intervention, vocabulary: Vocabulary | None = None) -> Float[Tensor, "n batch"]:
    """Return the summed NLL (nats) of every prompt's answer tokens kept; differentiable in the values of the edits.

    ``vocabulary`` restricts the softmax to some tokens: for optimisation only.
    """
    learns = torch.is_grad_enabled() and any(edit.values.requires_grad for edit in what.edits.values())
    width = site.model.layout.n_vocab if vocabulary is None else len(vocabulary.weight)
    parts = site.parts(len(what), site.model.n_layers - what.layers[0] if learns else 1, 3 * width)

    def some(part):
        nll = site.nll(site.read_by(streams(site, what.of(part))), vocabulary)
        return nll.new_zeros(len(part), len(site.prompts)).index_add(1, site.rows[0], nll)

    if len(parts) == 1 or not learns:
        return torch.cat([some(part) for part in parts])
    # Too many to keep: the backward pass runs each part forward once more.
    return torch.cat([checkpoint(some, part, use_reentrant=False) for part in parts])


def evaluate(
    site: Site, what: Intervention, reference: Float[Tensor, "batch vocab"] | None = None, whole: bool = True
) -> Scores:
    """Score every way on every prompt over the whole vocabulary, as `Site.evaluate` does vectors.

    ``whole``: whether `Scores.exact` is asked for, which runs the model twice.
    """
    return site.scored(
        lambda longer, part, owners: longer.read_by(streams(longer, what.of(part))), len(what), reference, whole)


# What an intervention does, beside the loss


@torch.no_grad()
def moves(site: Site, what: Intervention) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return by what angle (degrees) every way turns the stream where it changes it, and how many times longer it is.

    Means over the tokens that a site runs again and the blocks, each of which meets the stream as it comes there.
    """
    angles, longer = [], []

    def watched(edit):
        def change(stream, values, strength):
            found, here = edit.change(stream, values, strength), strength[..., 0] > 0
            before, after = stream[:, here].double(), found[:, here].double()
            cosine = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
            angles.append(cosine.acos().rad2deg().mean(1))
            longer.append((after.norm(dim=-1) / before.norm(dim=-1)).mean(1))
            return found

        return replace(edit, change=change)

    seen = replace(what, edits={layer: watched(edit) for layer, edit in what.edits.items()})
    for part in site.parts(len(what)):
        streams(site, seen.of(part), what.layers[-1] + 1)
    blocks = len(what.layers)
    return tuple(torch.cat([torch.stack(found[i : i + blocks]).mean(0) for i in range(0, len(found), blocks)]).cpu()
                 for found in (angles, longer))  # fmt: skip


@torch.no_grad()
def divergence(
    site: Site, what: Intervention, before: Float[Tensor, "n_labels vocab"] | None = None
) -> Float[Tensor, "n batch"]:
    """Return the KL divergence (nats) from what was predicted before, a token: the mean over every prompt's answer.

    `Scores.kl` is that of the first token alone. ``before``: `log_probs` of the site, so that they are found once.
    """
    before = log_probs(site) if before is None else before
    p, owners = before.exp(), site.rows[0]
    own, whole = (p * before).sum(-1), p.sum(-1)  # over so many tokens not quite 1 in fp32
    counts = torch.bincount(owners, minlength=len(site.prompts))
    found = torch.zeros(len(what), len(site.prompts), device=before.device)
    for i in range(len(what)):  # one way's logits at a time
        hidden = site.read_by(streams(site, what.of(torch.tensor([i]))))[0]
        logits = site.model.layout.logits(hidden)
        # A dot product of so many terms is off by up to .007 nats where it adds them one after the other; sums are not.
        kl = (own - (p * logits).sum(-1)) / whole - whole.log() + logits.logsumexp(-1)
        found[i].index_add_(0, owners, kl)
    return (found / counts).cpu()


@torch.no_grad()
def log_probs(site: Site) -> Float[Tensor, "n_labels vocab"]:
    """Return the log-probabilities of all tokens where each answer token of a site's prompts is predicted."""
    return site.model.layout.logits(site.read_by(site.residual[-1][None])[0]).log_softmax(-1)
