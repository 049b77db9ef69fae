"""Evaluate "this vector at this place, for these prompts", fast and exactly.

A vector added at one position of layer L changes only that position and later ones, and only in the blocks after L.
So the blocks up to L, and the keys and values of every earlier position, are computed once per set of prompts
(`Site.prepare`); each evaluation replays just the blocks after L on the few positions that can change, for many
vectors at once. Losses and gradients equal those of a full forward pass with a hook.

What comes in may lie anywhere. Losses come out where their vectors lie; all else that goes out is on the CPU.
"""

import os
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nb_utils import layouts
from nb_utils.models import Model, ModelError
from nb_utils.prompts import Prompt, positions

BYTE_BUDGET = int(os.environ.get("NB_BYTE_BUDGET") or 1 << 28)  # what one chunk of vectors may take on a CPU
TOKENS = 64  # how many have all their logits at a time, in plain passes
VOCABULARY_BLOCK = 2048  # logits computed at a time there: they stay in its cache until they are summed
TOGETHER = 8  # changes that are asked together how their answers go on


# What `Site.scored` is given: (site, which of the changes, whose prompts) -> what the unembedding reads.
Change = Callable[["Site", Int[Tensor, " part"], Int[Tensor, " batch"]], Float[Tensor, "part n_labels d_model"]]

_CACHE = object()  # stands for the cache among what the model passes to a block, whatever the block calls it


class _Frozen:
    """Keys and values of the unsteered prefix; hands them to attention and never grows."""

    def __init__(self, layers):
        self.layers = layers  # [(keys, values)] per block, each [batch, heads, prefix, d_head]

    def get_seq_length(self, layer_idx=0) -> int:
        return self.layers[layer_idx][0].shape[-2]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        kept = self.layers[layer_idx]
        copies = keys.shape[0] // kept[0].shape[0]
        return tuple(
            torch.cat([old.expand(copies, *old.shape), new.unflatten(0, (copies, -1))], dim=-2).flatten(0, 1)
            for old, new in zip(kept, (keys, values), strict=True)
        )


@dataclass(frozen=True)
class Scores:
    """Per-prompt results of ``n`` vectors on ``batch`` prompts; answers are padded with NaN / False.

    ``nll`` [n, batch, answer]: negative log-likelihood of each answer token (nats, teacher-forced).
    ``hit`` [n, batch, answer]: that token is the model's first choice.
    ``accepted`` [n, batch]: the first choice starts an accepted answer. ``exact`` [n, batch]: 1 where greedy decoding
    gives the whole answer (or an accepted one-token answer) and then ends the line, else 0; NaN where the site has cut
    the answer short, or where it was not asked for. ``kl`` [n, batch]: KL divergence (nats) from the reference
    next-token distribution to the steered one, NaN without a reference.
    """

    nll: Tensor
    hit: Tensor
    accepted: Tensor
    exact: Tensor
    kl: Tensor

    def loss(self, tokens: int = 2) -> Float[Tensor, "n batch"]:
        """Sum the NLL over the first ``tokens`` answer tokens, as the post does."""
        return self.nll[..., :tokens].nansum(-1)

    def token_loss(self) -> Float[Tensor, "n batch"]:
        """Average the NLL over all tokens of the answer; NaN where the site has cut it short."""
        return self.nll.nanmean(-1).masked_fill(self.exact.isnan(), torch.nan)


@dataclass(frozen=True)
class Site:
    """A set of prompts with one place to steer, prepared for every layer."""

    model: Model
    prompts: tuple[Prompt, ...]
    frozen: _Frozen
    given: tuple[tuple[tuple, dict], ...]  # what the model passes to each block for the suffix, beside the stream
    entering: Float[Tensor, "batch suffix d_model"]  # what enters the first block
    residual: tuple[Float[Tensor, "batch suffix d_model"], ...]  # output of each block, unsteered
    rows: Int[Tensor, "2 n_labels"]  # (prompt, position) of every answer token to predict
    labels: Int[Tensor, " n_labels"]
    place: Int[Tensor, " n_labels"]  # index of that token within its answer
    steers: str  # which tokens, a name of `prompts.TOKENS`

    @classmethod
    @torch.no_grad()
    def prepare(cls, model: Model, prompts, at="separator", answer_tokens: int | None = None) -> "Site":
        """Run ``prompts`` once without steering and keep what no vector can change.

        ``at``: the tokens that are steered, by a name of `prompts.TOKENS`. A vector is for one token, "separator" (the
        query's) or "output" (the last token of the last shot's y), or the same for "every" token but the first. The
        others are for `interventions`.
        ``answer_tokens``: how many tokens of each answer to predict (None: all).
        Raises ValueError for an empty set, a steered position with nothing before it or behind what predicts the
        answer, or a prompt that is too long.
        """
        if not prompts:
            raise ValueError("A site needs at least one prompt.")
        _fit(model, prompts)
        firsts = [min(positions(p, at), default=-1) for p in prompts]  # of the steered tokens
        if min(firsts) < 1:
            raise ValueError(f"A prompt has no {at} to steer." if -1 in firsts else
                             "A steered position needs at least one token before it.")  # fmt: skip
        if any(len(p.ids) - len(p.answer) - 1 < first for p, first in zip(prompts, firsts, strict=True)):
            raise ValueError("An answer begins after the first steered position: what predicts it cannot lie before.")
        lengths = [len(p.ids) - len(p.answer) + min(len(p.answer), answer_tokens or 99) - 1 for p in prompts]
        before, after = max(firsts), max(n - first for n, first in zip(lengths, firsts, strict=True))
        device = model.device
        ids = torch.full((len(prompts), before + after), model.tokenizer.pad_token_id or 0, device=device)
        mask = torch.zeros_like(ids)
        rows, labels, place = [], [], []
        for i, (prompt, position, length) in enumerate(zip(prompts, firsts, lengths, strict=True)):
            start = before - position
            ids[i, start : start + length] = torch.tensor(prompt.ids[:length], device=device)
            mask[i, start : start + length] = 1
            first = len(prompt.ids) - len(prompt.answer) - 1  # the position that predicts the first answer token
            for j in range(length - first):
                rows.append((i, first + j - position))
                labels.append(prompt.answer[j])
                place.append(j)
        order = (mask.cumsum(1) - 1).clamp_min(0)

        from transformers import DynamicCache

        layout = model.layout
        # A cache that keeps all: one that forgets what lies outside a window is not what a plain pass sees everywhere.
        cache = layout.core(
            ids[:, :before], attention_mask=mask[:, :before], past_key_values=DynamicCache(), use_cache=True,
            **layout.positions(order[:, :before]),
        ).past_key_values
        frozen = _Frozen([(layer.keys, layer.values) for layer in cache.layers])
        given, residual, entering = [], [], []

        def listen(block, args, kwargs):
            if not entering:
                entering.append(args[0] if args else kwargs["hidden_states"])
            kwargs = {name: held(value) for name, value in kwargs.items() if name != "hidden_states"}
            given.append((tuple(held(value) for value in args[1:]), kwargs))

        def held(value):
            return _CACHE if value is cache else value

        with ExitStack() as hooks:
            for layer, block in enumerate(layout.blocks):
                hooks.callback(block.register_forward_pre_hook(listen, with_kwargs=True).remove)
                hooks.enter_context(layout.hooked(layer, residual.append))
            layout.core(
                ids[:, before:], attention_mask=mask, past_key_values=cache, use_cache=True,
                **layout.positions(order[:, before:]),
            )
        as_tensor = lambda values: torch.tensor(values, device=device)  # noqa: E731
        targets = as_tensor(rows).T, as_tensor(labels), as_tensor(place)
        return cls(model, tuple(prompts), frozen, tuple(given), entering[0], tuple(residual), *targets, at)

    @property
    def budget(self) -> int:
        """The bytes that one chunk of vectors may take: `BYTE_BUDGET`, on a GPU a quarter of what was free there."""
        return self._free // 4 if self.model.device.type == "cuda" else BYTE_BUDGET

    @cached_property
    def _free(self) -> int:
        held = torch.cuda.memory_reserved(self.model.device) - torch.cuda.memory_allocated(self.model.device)
        return torch.cuda.mem_get_info(self.model.device)[0] + held  # the second: torch's, for no tensor yet

    def hidden(
        self, vectors: Float[Tensor, "n *batch d_model"], layer: int, mode: str = "add"
    ) -> Float[Tensor, "n n_labels d_model"]:
        """Return what the unembedding reads at every answer position, with each vector applied after block ``layer``.

        ``vectors``: [n, d_model], each for all prompts, or [n, batch, d_model], one a prompt; here and wherever else
        vectors are taken, but for `captured`. ``mode``: "add" to the residual stream at the steered position, or
        "replace" it. Differentiable in ``vectors``. Raises ValueError where there is not one vector a prompt.
        """
        return self.read_by(self._run(vectors, layer, mode))

    def read_by(self, streams: Float[Tensor, "n batch suffix d_model"]) -> Float[Tensor, "n n_labels d_model"]:
        """Return what the unembedding reads at every answer position of streams that left the last block."""
        return self.model.layout.norm(streams)[:, self.rows[0], self.rows[1]]

    @torch.no_grad()
    def read(
        self, vectors: Float[Tensor, "n *batch d_model"], layer: int, at: int, mode: str = "add"
    ) -> Float[Tensor, "n batch d_model"]:
        """Return the residual stream at the steered position after block ``at``; vectors apply after ``layer``."""
        if at < layer:
            raise ValueError(f"A vector applied after block {layer} does not reach block {at}: it is earlier.")
        return self._run(vectors, layer, mode, at + 1)[:, :, 0].cpu()

    def _run(self, vectors, layer, mode, end: int | None = None) -> Float[Tensor, "n batch suffix d_model"]:
        """Run the blocks after ``layer`` (up to ``end``) on the suffix, for every vector."""
        if mode not in ("add", "replace"):
            raise ValueError(f"mode is 'add' or 'replace', not {mode!r}.")
        if self.steers not in ("separator", "output", "every"):
            raise ValueError(f"A vector is for one token or every one, not for {self.steers}: use interventions.")
        base = self.residual[layer]
        n, batch = len(vectors), len(base)
        if vectors.ndim == 3 and vectors.shape[1] != batch:
            raise ValueError(f"{vectors.shape[1]} vectors, one a prompt, do not fit {batch} prompts.")
        v = vectors.to(base)
        v = v if v.ndim == 3 else v[:, None].expand(n, batch, -1)
        if self.steers == "every":
            stream = base + v[:, :, None] if mode == "add" else v[:, :, None].expand(-1, -1, base.shape[1], -1)
            return self.replay(stream, layer + 1, end)
        first = base[:, 0] + v if mode == "add" else v
        return self.replay(torch.cat([first[:, :, None], base[:, 1:].expand(n, -1, -1, -1)], dim=2), layer + 1, end)

    def replay(
        self, streams: Float[Tensor, "n batch suffix d_model"], first: int, end: int | None = None
    ) -> Float[Tensor, "n batch suffix d_model"]:
        """Run blocks ``first`` to ``end`` (not included; None: the last one too) on the suffix, for many streams."""
        n, batch = streams.shape[:2]
        stream, seen = streams.flatten(0, 1), {}

        def copied(value):
            return self.frozen if value is _CACHE else _copies(value, batch, n)

        for block, given in zip(self.model.layout.blocks[first:end], self.given[first:end], strict=True):
            args, kwargs = _changed(given, copied, seen)
            stream = layouts.stream(block(stream, *args, **kwargs))
        return stream.view(streams.shape)

    def loss(self, vectors, layer: int, mode: str = "add", vocabulary=None) -> Float[Tensor, " n"]:
        """Return the mean over prompts of the summed NLL of the answer tokens kept; differentiable in ``vectors``.

        ``vocabulary`` (from `vocabulary`) restricts the softmax to some tokens: for optimisation only.
        """
        # Every block keeps what its backward pass needs, and the logits come as themselves and as two copies.
        blocks = len(self.residual) - 1 - layer if vectors.requires_grad and torch.is_grad_enabled() else 1
        width = self.model.layout.n_vocab if vocabulary is None else len(vocabulary.weight)
        parts = vectors.split(self._chunk(blocks, 3 * width))
        if len(parts) == 1:
            return self._loss(vectors, layer, mode, vocabulary)
        # Too many to keep: the backward pass runs each part forward once more.
        return torch.cat([checkpoint(self._loss, part, layer, mode, vocabulary, use_reentrant=False) for part in parts])

    def _loss(self, vectors, layer, mode, vocabulary):
        return (self._nll(vectors, layer, mode, vocabulary).sum(-1) / len(self.prompts)).to(vectors.device)

    def _nll(self, vectors, layer, mode, vocabulary) -> Float[Tensor, "n n_labels"]:
        return self.nll(self.hidden(vectors, layer, mode), vocabulary)

    def nll(self, hidden: Float[Tensor, "n n_labels d_model"], vocabulary=None) -> Float[Tensor, "n n_labels"]:
        """Return the NLL (nats) of every answer token from what the unembedding reads; differentiable."""
        layout = self.model.layout
        rows, labels = (layout.unembedding(), self.labels) if vocabulary is None else (
            (vocabulary.weight, vocabulary.bias), vocabulary.index[self.labels])
        logits = layout.logits(hidden, *rows)
        return logits.logsumexp(-1) - logits.gather(-1, labels.expand(len(hidden), -1)[..., None])[..., 0]

    def captured(self, n: int, layer: int, mode: str = "add", vocabulary=None, batch: int | None = None):
        """Return the loss of ``n`` vectors as a CUDA graph: a function of them and of the ``batch`` prompts to take.

        A step of optimisation is hundreds of small kernels, and on a GPU starting them costs many times what they
        compute; the graph starts all at once. It is kept for the next call. None where there is no graph: on other
        devices, or where ``n`` vectors exceed the budget.
        """
        device, batch = self.model.device, min(batch or len(self.prompts), len(self.prompts))
        width = self.model.layout.n_vocab if vocabulary is None else len(vocabulary.weight)
        if device.type != "cuda" or n > self._chunk(len(self.residual) - 1 - layer, 3 * width):
            return None
        key = n, layer, mode, id(vocabulary), batch
        if key not in self._graphs:
            given = torch.zeros(n, self.model.d_model, device=device, requires_grad=True)
            loss = self._fixed(layer, mode, vocabulary, batch)
            graph = torch.cuda.make_graphed_callables(loss, (given, torch.arange(batch, device=device)))
            # The next call writes where this one's result lies: hand out a copy. The vocabulary must live as long.
            self._graphs[key] = vocabulary, lambda vectors, order: (
                graph(vectors.to(device), order.to(device)).clone().to(vectors.device))
        return self._graphs[key][1]

    @cached_property
    def _graphs(self) -> dict:
        return {}

    def _fixed(self, layer, mode, vocabulary, batch):
        """Return ``take(order).loss(vectors)`` as a function whose shapes don't depend on which prompts are taken.

        Every prompt gets as many labels as the longest answer has; those that it lacks count nothing.
        """
        places, n = int(self.place.max()) + 1, len(self.prompts)
        spots, labels = torch.zeros(2, n, places, dtype=torch.long, device=self.rows.device)
        counts = torch.zeros(n, places, device=self.rows.device)
        labels += self.labels[0]  # any that the vocabulary has
        at = self.rows[0], self.place
        spots[at], labels[at], counts[at] = self.rows[1], self.labels, 1
        column = torch.arange(batch, device=self.rows.device).repeat_interleave(places)

        def loss(vectors, order):
            part = self._picked(
                layer, order, rows=torch.stack([column, spots[order].flatten()]), labels=labels[order].flatten())
            return (part._nll(vectors, layer, mode, vocabulary) * counts[order].flatten()).sum(-1) / batch

        return loss

    def _picked(self, layer: int, order, **more) -> "Site":
        """Take some prompts, as far as the blocks after ``layer`` need them."""
        seen = {}

        def picked(each, change):
            return tuple(one if i < layer else change(one) for i, one in enumerate(each))

        return replace(
            self, **more, residual=picked(self.residual, lambda stream: stream[order]),
            frozen=_Frozen(picked(self.frozen.layers, lambda kept: tuple(part[order] for part in kept))),
            given=picked(self.given, lambda one: _changed(
                one, lambda value: _rows(value, len(self.prompts), order), seen)),
        )  # fmt: skip

    def _chunk(self, blocks: int, width: int) -> int:
        """Return how many vectors fit into the budget if ``blocks`` blocks and ``width`` logits a label are held."""
        layout, tokens = self.model.layout, self.residual[0][..., 0].numel()
        block = tokens * (16 * layout.d_model + 5 * layout.d_mlp)
        block += 2 * sum(kept.numel() for kept in self.frozen.layers[0])  # copied per vector, and per head by attention
        return max(1, self.budget // (4 * (blocks * block + len(self.labels) * width)))

    @torch.no_grad()
    def evaluate(
        self, vectors: Float[Tensor, "n *batch d_model"], layer: int, mode: str = "add",
        reference: Float[Tensor, "batch vocab"] | None = None, whole: bool = True,
    ) -> Scores:
        """Score every vector on every prompt over the whole vocabulary, in chunks that respect `budget`.

        ``reference``: log-probabilities of the first answer token to which ``Scores.kl`` refers. ``whole``: whether
        `Scores.exact` is asked for, which runs the model twice.
        """

        def change(site, part, owners):
            some = vectors[part] if vectors.ndim == 2 or site is self else vectors[part][:, owners]
            return site.hidden(some, layer, mode)

        return self.scored(change, len(vectors), reference, whole)

    @torch.no_grad()
    def scored(
        self, change: Change, n: int, reference: Float[Tensor, "batch vocab"] | None = None, whole: bool = True
    ) -> Scores:
        """Score ``n`` changes of whatever kind as `evaluate` scores vectors.

        ``change(site, part, owners)`` returns what the unembedding reads [len(part), n_labels, d_model] with some of
        the changes on a site of the same prompts, longer ones perhaps, some of them left out; ``owners``: which prompt
        of this site each of that one's is. ``whole`` as in `evaluate`.
        """
        found = zip(*(self._score(change, part, reference) for part in self.parts(n)), strict=True)
        nll, hit, accepted, kl, first = map(torch.cat, found)
        said = (hit | nll.isnan()).all(-1)
        exact = self._exact(change, first, said) if whole else torch.full(said.shape, torch.nan)
        return Scores(nll, hit, accepted, exact, kl)

    def parts(self, n: int, blocks: int = 1, width: int = 3 * VOCABULARY_BLOCK) -> tuple[Int[Tensor, " part"], ...]:
        """Cut ``n`` changes into parts that fit into the budget, each holding ``blocks`` and ``width`` logits a label.
        """
        return torch.arange(n).split(self._chunk(blocks, width))

    def _score(self, change, part, reference) -> tuple[Tensor, ...]:
        """Return what `Scores` holds of a part, and the token said first [n, batch] in place of ``exact``."""
        hidden = change(self, part, torch.arange(len(self.prompts)))
        reference = None if reference is None else reference.to(hidden.device)
        nll, best, kl = (found.cpu() for found in self._read_out(hidden, reference))
        shape = (len(part), len(self.prompts), int(self.place.max()) + 1)
        spots = (slice(None), self.rows[0].cpu(), self.place.cpu())
        padded, hit = torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.bool)
        padded[spots], hit[spots] = nll, best == self.labels.cpu()
        first = torch.zeros(shape[:2], dtype=torch.long)
        starts = (self.place == 0).cpu()
        first[:, self.rows[0].cpu()[starts]] = best[:, starts]
        accepted = torch.stack(
            [torch.isin(first[:, i], torch.tensor([a[0] for a in p.accepted])) for i, p in enumerate(self.prompts)], 1
        )
        return padded, hit, accepted, kl, first

    def _exact(self, change, first, whole) -> Float[Tensor, "n batch"]:
        """Say where an answer that counts is given and the line ended, as `Scores` has it.

        ``first``: the token that is said first. ``whole``: whether all that is kept of the answer is said. The model
        runs once more, one token further, for the answers that were given. Few changes give most of them, so those that
        give about as many run together, each on the answers that one of them gave.
        """
        owners = torch.tensor([i for i, _ in self._answers])
        kept = torch.bincount(self.rows[0].cpu(), minlength=len(self.prompts))
        cut = kept < torch.tensor([len(prompt.answer) for prompt in self.prompts])
        given = torch.stack(
            [whole[:, i] if longer.answer[:-1] == self.prompts[i].answer else first[:, i] == longer.answer[0]
             for i, longer in self._answers], 1
        )
        asked = given & ~cut[owners]
        order = asked.sum(1).argsort(descending=True, stable=True)
        for some in order[asked[order].any(1)].split(TOGETHER) if asked.any() else ():
            due = asked[some].any(0).nonzero()[:, 0]
            site = self._ended.take(due)
            said = torch.cat([site._read_out(change(site, some[part], owners[due]), None)[1].cpu()
                              for part in site.parts(len(some))])  # fmt: skip
            tokens, which = said.unique(return_inverse=True)
            ends = torch.tensor([_ends_line(self.model, token) for token in tokens.tolist()])[which]
            given[some[:, None], due] &= ends
        exact = torch.zeros(whole.shape).index_add(1, owners, given.float()).clamp(max=1)
        return exact.masked_fill(cut, torch.nan)

    @cached_property
    def _answers(self) -> list[tuple[int, Prompt]]:
        """List every answer that counts as exact: whose it is, and the prompt that holds it and a token behind it."""
        found = []
        for i, prompt in enumerate(self.prompts):
            for answer in dict.fromkeys([prompt.answer, *(a for a in prompt.accepted if len(a) == 1)]):
                longer = (*answer, answer[-1])  # which token stands last does not matter: it is predicted, not read
                ids = prompt.ids[: len(prompt.ids) - len(prompt.answer)] + longer
                found.append((i, replace(prompt, ids=ids, answer=longer)))
        return found

    @cached_property
    def _ended(self) -> "Site":
        """The site of `_answers`, of which only what follows the answer is predicted."""
        longer = [prompt for _, prompt in self._answers]
        site = Site.prepare(self.model, longer, self.steers)
        ends = torch.tensor([len(prompt.answer) - 1 for prompt in longer], device=site.place.device)
        last = site.place == ends[site.rows[0]]
        place = torch.zeros_like(site.place[last])
        return replace(site, rows=site.rows[:, last], labels=site.labels[last], place=place)

    def _read_out(self, hidden: Float[Tensor, "n n_labels d_model"], reference):
        """Return every label's NLL and the likeliest token beside it [n, n_labels], and the KL [n, batch].

        One pass over the vocabulary in blocks, with running maxima and sums: logits are never held as a whole.
        """
        layout, starts, hidden = self.model.layout, self.place == 0, _single(hidden)
        order, device = self.rows[0, starts], hidden.device
        peak = torch.full(hidden.shape[:2], -torch.inf, device=device)  # the largest logit so far
        mass, own = torch.zeros_like(peak), torch.zeros_like(peak)  # sum of exp(logit - peak); the label's logit
        best = torch.zeros_like(peak, dtype=torch.long)
        kl = torch.full((len(hidden), len(self.prompts)), torch.nan if reference is None else 0.0, device=device)
        whole = torch.zeros(len(self.prompts), device=device)  # sum of p: over so many tokens not quite 1 in fp32
        # On a GPU a block is as large as fits: there each costs launches, and no cache holds one anyway.
        size = VOCABULARY_BLOCK if device.type != "cuda" else self.budget // (12 * hidden[..., 0].numel()) + 1
        for begin in range(0, layout.n_vocab, size):
            part = slice(begin, begin + size)
            logits = layout.logits(hidden, *layout.unembedding(part))
            here = (self.labels >= part.start) & (self.labels < part.stop)
            own[:, here] = logits[:, here, self.labels[here] - begin]
            if reference is not None:  # sum p (log p - log q), with log q = logit - log of the sum of exp
                log_p = reference[order, part]
                p, first = log_p.exp(), logits if starts.all() else logits[:, starts]
                kl[:, order] += (p * log_p).sum(-1) - torch.einsum("nrv,rv->nr", first, p)
                whole[order] += p.sum(-1)
            high = logits.amax(-1)
            better = high > peak
            best[better] = logits[better].argmax(-1) + begin
            higher = torch.maximum(peak, high)
            mass = mass * (peak - higher).exp() + (logits - higher[..., None]).exp_().sum(-1)
            peak = higher
        norm = peak + mass.log()
        if reference is not None:
            kl[:, order] = kl[:, order] / whole[order] - whole[order].log() + norm[:, starts]
        return norm - own, best, kl

    @torch.no_grad()
    def log_probs(
        self, vectors=None, layer: int = -1, mode: str = "add", place: int = 0
    ) -> Float[Tensor, "n batch vocab"]:
        """Return the next-token log-probabilities at the position that predicts answer token ``place`` (0: the first).

        ``batch`` counts the prompts whose answer has that many tokens. Without ``vectors``, of the prompts as they are.
        """
        hidden = self.read_by(self.residual[-1][None]) if vectors is None else self.hidden(vectors, layer, mode)
        hidden = hidden[:, self.place == place]
        return self.model.layout.logits(_single(hidden)).log_softmax(-1).cpu()

    def take(self, order: Int[Tensor, " kept"]) -> "Site":
        """Return the site of some of the prompts, one perhaps several times, without running the model."""
        order = order.to(self.rows.device)
        here, new = (self.rows[0, :, None] == order).nonzero(as_tuple=True)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in order.tolist()),
            frozen=_Frozen([(keys[order], values[order]) for keys, values in self.frozen.layers]),
            given=_changed(self.given, lambda value: _rows(value, len(self.prompts), order), {}),
            entering=self.entering[order], residual=tuple(stream[order] for stream in self.residual),
            rows=torch.stack([new, self.rows[1, here]]),
            labels=self.labels[here], place=self.place[here],
        )

    def unsteered(self, whole: bool = True) -> Scores:
        """Score the prompts as they are; ``whole`` as for `scored`."""
        return self.scored(lambda site, part, owners: site.read_by(site.residual[-1][None]), 1, whole=whole)

    def at(self, layer: int) -> Float[Tensor, "batch d_model"]:
        """Return the unsteered residual stream after block ``layer`` at the steered position."""
        return self.residual[layer][:, 0].cpu()


@dataclass(frozen=True)
class Vocabulary:
    """Some rows of the unembedding, and where each token id went (-1: left out)."""

    weight: Float[Tensor, "kept d_model"]
    index: Int[Tensor, " vocab"]
    bias: Float[Tensor, " kept"] | None = None


@torch.no_grad()
def vocabulary(site: Site, *others: Site, keep: int = 16384) -> Vocabulary:
    """Keep the tokens that are likeliest on average at the sites' answer positions, and every answer token of them.

    One of the sites should be of few-shot prompts: without examples a model hardly thinks of the words that a vector
    makes it say, of another language's least of all. A softmax over these costs a sixteenth of the full one on Gemma 3;
    `reproduce` in the book states the difference.
    """
    weight, bias = site.model.layout.unembedding()
    zero, mean = torch.zeros(1, site.model.d_model), torch.zeros(len(weight))
    for s in (site, *others):
        order = torch.arange(len(s.prompts))
        for part in order.split(max(1, s.budget // (12 * len(weight)))):
            mean += s.take(part).log_probs(zero, len(s.residual) - 1).exp().sum((0, 1)) / len(order)
    for s in (site, *others):
        mean[s.labels.cpu()] = torch.inf
    ids = mean.topk(min(keep, len(mean))).indices.sort().values.to(weight.device)
    index = torch.full((len(mean),), -1, device=weight.device)
    index[ids] = torch.arange(len(ids), device=weight.device)
    return Vocabulary(weight[ids].contiguous(), index, None if bias is None else bias[ids])


@torch.no_grad()
def residuals(model: Model, prompts, positions, layers, batch: int = 16) -> dict[int, Float[Tensor, "n d_model"]]:
    """Return the residual stream after each of ``layers`` at ``positions`` (a tuple of indices per prompt), stacked.

    These are the values at ``blocks.{layer}.hook_resid_post``. Blocks after the last layer asked for are not run.
    Raises ValueError for a prompt that is too long for the model.
    """
    _fit(model, prompts)
    layout, kept = model.layout, {layer: [] for layer in layers}
    for start in range(0, len(prompts), batch):
        part, spots = prompts[start : start + batch], positions[start : start + batch]
        # Padding stands on the right, where a causal model cannot see it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids) for p in part], batch_first=True).to(model.device)
        row = torch.tensor([i for i, spot in enumerate(spots) for _ in spot])
        column = torch.tensor([c for spot in spots for c in spot])

        def keep(stream, layer, row=row, column=column):
            kept[layer].append(stream[row, column].cpu())
            if layer == max(layers):
                raise _Enough

        with ExitStack() as hooks, suppress(_Enough):
            for layer in layers:
                hooks.enter_context(layout.hooked(layer, partial(keep, layer=layer)))
            layout.core(ids, use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


# Every block at every token: nothing can be computed once, so these are plain passes


@contextmanager
def steered(model: Model, vectors: Float[Tensor, "n_layers d_model"], place: str = "ff", scale: float = 0.1,
            how: str = "turn"):  # fmt: skip
    """Steer every block at every token, in all passes of the model while the context lasts: in-context vectors.

    ``vectors``: one a block; a block whose vector is zero is left alone. ``place``: what is steered of a block (see
    `Layout.part`): "mlp" in the code of Liu et al. (2023), which means "ff", and "resid" in their text.
    ``how``: "turn" as they do, at kept length, by ``scale`` (1 + max(0, -cos)) of the vector's direction; or "add"
    ``scale`` times the vector to all tokens but the first, a sink of attention whose length is unlike all others.
    A scale of 0 changes nothing. Raises ValueError for another ``how`` or ``place``, ModelError for a model without an
    MLP where we look for one, of which only the stream can be steered.
    """
    if how not in ("turn", "add"):
        raise ValueError(f"how is 'turn' or 'add', not {how!r}.")
    if place not in ("mlp", "ff", "resid"):
        raise ValueError(f"place is 'mlp', 'ff' or 'resid', not {place!r}.")
    try:
        model.layout.part(0, place)
    except layouts.LayoutError as error:
        kind, advice = type(model.hf).__name__, "steer its stream, or use another model"
        raise ModelError(f"{model.name!r} is a {kind}, which {error}: {advice}.") from error
    with ExitStack() as hooks:
        for layer, vector in enumerate(vectors.to(model.device)):
            if scale and vector.any():
                change = partial(_turned if how == "turn" else _added, vector=vector, scale=scale)
                hooks.enter_context(model.layout.hooked(layer, change, place))
        yield


def ends_apart(model: Model, first, second) -> Float[Tensor, "n_layers d_model"]:
    """Return the stream at the last tokens of some texts less that of others after every block, means of each.

    ``first``, ``second``: prompts of `prompts.plain`. Of pairs it is the in-context vector of Liu et al. (2023) but
    for the principal component that they add, which is next to nothing (experiment 22).
    """
    every = range(model.n_layers)
    read = [residuals(model, texts, [(len(p.ids) - 1,) for p in texts], every) for texts in (first, second)]
    return torch.stack([read[0][layer].mean(0) - read[1][layer].mean(0) for layer in every])


def _turned(out: Tensor, vector: Tensor, scale: float) -> Tensor:
    unit, direction = (torch.nn.functional.normalize(each.float(), dim=-1) for each in (out, vector))
    against = (-unit @ direction).clamp_min(0)[..., None]
    moved = torch.nn.functional.normalize(unit + scale * (1 + against) * direction, dim=-1)
    return (moved * out.float().norm(dim=-1, keepdim=True)).to(out.dtype)


def _added(out: Tensor, vector: Tensor, scale: float) -> Tensor:
    return torch.cat([out[:, :1], out[:, 1:] + (scale * vector).to(out.dtype)], dim=1)


@torch.no_grad()
def token_nll(model: Model, prompts, batch: int = 16) -> list[Float[Tensor, " answer"]]:
    """Return the negative log-likelihood (nats) of every answer token of every prompt, in plain passes.

    Raises ValueError for a prompt that is too long for the model.
    """
    hidden = _read_states(model, prompts, batch)
    labels = torch.tensor([token for prompt in prompts for token in prompt.answer], device=hidden.device)
    parts = []
    for states, wanted in zip(hidden.split(TOKENS), labels.split(TOKENS), strict=True):
        logits = model.layout.logits(states)
        parts.append((logits.logsumexp(-1) - logits.gather(-1, wanted[:, None])[:, 0]).cpu())
    return list(torch.cat(parts).split([len(prompt.answer) for prompt in prompts]))


@torch.no_grad()
def token_log_probs(model: Model, prompts, batch: int = 16) -> Float[Tensor, "n_labels vocab"]:
    """Return the log-probabilities of all tokens where each answer token of the prompts is predicted, in plain passes.

    Raises ValueError for a prompt that is too long for the model.
    """
    parts = _read_states(model, prompts, batch).split(TOKENS)
    return torch.cat([model.layout.logits(states).log_softmax(-1).cpu() for states in parts])


def _read_states(model: Model, prompts, batch: int) -> Float[Tensor, "n_labels d_model"]:
    """Return what the unembedding reads where each answer token of the prompts is predicted."""
    _fit(model, prompts)
    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        # Padding stands on the right, where a causal model cannot see it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids) for p in part], batch_first=True).to(model.device)
        states = model.layout.core(ids, use_cache=False).last_hidden_state
        found += [row[len(p.ids) - len(p.answer) - 1 : len(p.ids) - 1] for row, p in zip(states, part, strict=True)]
    return _single(torch.cat(found))


def answer_loss(model: Model, prompts, vocabulary: Vocabulary) -> Float[Tensor, " n"]:
    """Return each prompt's mean NLL (nats a token) over its answer, from one plain pass over all of them.

    Differentiable in what steers the model while it lasts. ``vocabulary`` restricts the softmax to tokens that hold
    every answer's: for optimisation only. Raises ValueError for a prompt that is too long for the model.
    """
    logits = model.layout.logits(_read_states(model, prompts, len(prompts)), vocabulary.weight, vocabulary.bias)
    labels = vocabulary.index[[token for prompt in prompts for token in prompt.answer]]
    nll = logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]
    return torch.stack([part.mean() for part in nll.split([len(prompt.answer) for prompt in prompts])])


@torch.no_grad()
def likeliest(model: Model, prompts, labels: Iterable[int], keep: int = 16384) -> Vocabulary:
    """Keep the tokens that are likeliest on average wherever an answer token of the prompts is predicted, and labels.

    The sibling of `vocabulary` for whole texts, in plain passes.
    """
    weight, bias = model.layout.unembedding()
    mean = sum(token_log_probs(model, [prompt]).exp().mean(0) for prompt in prompts)
    mean[list(labels)] = torch.inf
    ids = mean.topk(min(keep, len(mean))).indices.sort().values.to(weight.device)
    index = torch.full((len(mean),), -1, device=weight.device)
    index[ids] = torch.arange(len(ids), device=weight.device)
    return Vocabulary(weight[ids].contiguous(), index, None if bias is None else bias[ids])


@torch.no_grad()
def replies(
    model: Model, prompts, vectors: Float[Tensor, "n_layers d_model"], n_tokens: int
) -> list[tuple[int, ...]]:
    """Decode greedily from every prompt's last separator, all side by side, with one vector added after each block.

    Added to all tokens but the first of a text, read or written, as `steered` adds them; a block whose vector is zero
    is left alone. Returns at most ``n_tokens`` tokens a prompt; one that ends holds the end of text as its last.
    """
    heads = [prompt.ids[: prompt.separators[-1] + 1] for prompt in prompts]
    end, width = model.tokenizer.eos_token_id, max(map(len, heads))
    ids = torch.tensor([[end] * (width - len(head)) + list(head) for head in heads], device=model.device)
    mask = torch.tensor([[0] * (width - len(head)) + [1] * len(head) for head in heads], device=model.device)
    steered_at = (mask.cumsum(1) > 1)[..., None]  # neither padding, which stands on the left, nor the first token
    with ExitStack() as hooks:
        for layer, vector in enumerate(vectors.to(model.device)):

            def see(stream, vector=vector):
                return stream + vector.to(stream) * (steered_at if stream.shape[1] == width else 1)

            if vector.any():
                hooks.enter_context(model.layout.hooked(layer, see))
        said = model.hf.generate(
            ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    whole = [row[width:].tolist() for row in said]
    return [tuple(row[: row.index(end) + 1] if end in row else row) for row in whole]


@contextmanager
def steer(
    model: Model, vector: Float[Tensor, "*batch d_model"], layer: int, at: int | Sequence[int] | None = -1,
    mode: str = "add",
) -> Iterator[Model]:
    """Add a vector to the residual stream after block ``layer`` in every pass of ``model.hf`` inside the context.

    ``at``: which tokens of a text, by index; -1 is its last, padding left out. A pass that goes on from a cache, as
    each that generates a token does, begins no text and is left alone. None: every token of every pass.
    ``vector``: one for all texts of a pass, or one each. ``mode``: "add" to the stream, or "replace" it. Other vectors
    can be added in contexts around this one. It is the plain way, and what `Site` computes faster.
    Raises ValueError for a layer that the model doesn't have, a vector of another width, or a text that is too short.
    """
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"{model.name!r} has blocks 0 to {model.n_layers - 1}: there is none of number {layer}.")
    if vector.shape[-1] != model.d_model:
        raise ValueError(f"The stream of {model.name!r} is {model.d_model} wide, the vector {vector.shape[-1]}.")
    if mode not in ("add", "replace"):
        raise ValueError(f"mode is 'add' or 'replace', not {mode!r}.")
    given = {}

    def listen(core, args, kwargs):
        cache = kwargs.get("past_key_values")
        given.update(mask=kwargs.get("attention_mask"), goes_on=cache is not None and cache.get_seq_length() > 0)

    def see(stream):
        if at is not None and given["goes_on"]:
            return None
        v = vector.to(stream).expand(len(stream), -1)[:, None]
        changed = stream + v if mode == "add" else v.expand_as(stream)
        return changed if at is None else torch.where(_spots(stream, given["mask"], at)[..., None], changed, stream)

    with ExitStack() as hooks:
        hooks.callback(model.layout.core.register_forward_pre_hook(listen, with_kwargs=True).remove)
        hooks.enter_context(model.layout.hooked(layer, see))
        yield model


def _spots(stream: Tensor, mask: Tensor | None, at: int | Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """Mark tokens of each text by their index in it; where ``mask`` is 0 stands padding, which does not count."""
    known = isinstance(mask, Tensor) and mask.shape == stream.shape[:2]
    real = mask.bool() if known else torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
    spots = torch.zeros_like(real)
    for row, tokens in zip(spots, real, strict=True):
        places = tokens.nonzero()[:, 0]
        for index in [at] if isinstance(at, int) else at:
            if not -len(places) <= index < len(places):
                raise ValueError(f"A text has {len(places)} tokens: there is none at {index} to add a vector to.")
            row[places[index]] = True
    return spots


class _Enough(Exception):
    """Leaves a forward pass whose later blocks nobody needs."""


def _fit(model: Model, prompts) -> None:
    """Raise ValueError if a prompt is longer than the model is exact on (`Layout.longest`)."""
    bound, longest = model.layout.longest, max((len(prompt.ids) for prompt in prompts), default=0)
    if bound is not None and longest > bound:
        raise ValueError(
            f"A prompt of {longest:,} tokens is longer than the {bound:,} up to which {model.name!r} is exact: "
            "use fewer or shorter pairs."
        )


def _ends_line(model, token: int) -> bool:
    """Say whether a token is a line break, whatever stands behind it, or ends the text."""
    ends = model.hf.generation_config.eos_token_id
    ends = {*model.tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}
    return token in ends or model.tokenizer.decode([token]).lstrip(" ").startswith("\n")


def _single(hidden: Tensor) -> Tensor:
    """Return hidden states in at least single precision: what is reported is read out in it, also of half models."""
    return hidden.float() if hidden.dtype.itemsize < 4 else hidden


def _copies(value, batch: int, n: int):
    """Repeat a tensor with a batch dimension ``n`` times, leaving the rest of a block's arguments alone."""
    return value.repeat(n, *[1] * (value.ndim - 1)) if _batched(value, batch) else value


def _rows(value, batch: int, order):
    """Take some rows of a tensor with a batch dimension."""
    return value[order] if _batched(value, batch) else value


def _batched(value, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch


def _changed(value, change, seen: dict):
    """Apply ``change`` to everything inside nested tuples, lists and dictionaries.

    ``seen``: {id: what became of it}, so that what blocks share, such as a dictionary in which one leaves keys for
    another, is shared by them afterwards too.
    """
    if id(value) not in seen:
        if isinstance(value, (dict, UserDict)):
            made = type(value) if isinstance(value, UserDict) else dict
            new = made({key: _changed(item, change, seen) for key, item in value.items()})
        elif isinstance(value, (tuple, list)):
            new = type(value)(_changed(item, change, seen) for item in value)
        else:
            new = change(value)
        seen[id(value)] = new
    return seen[id(value)]


# Is the engine exact on this model? Two short prompts through it and through the plain model, compared. The plain side
# is an unpadded forward pass of the whole transformers model with a hook on one block; it shares no code with what
# stands above. The test runs when a model is loaded that is not one of ours, so that a class that the engine does not
# replay is refused in a sentence, whatever the reason, and none is silently wrong.

TEXT = "hot -> cold\nbig -> small"
LENGTHS = (12, 7)  # tokens of the two prompts: the shorter one is padded
ANSWER = 2
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats a prompt, and share of the gradient's length
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
HALF = 0.5  # in half the plain pass rounds its logits, which moved losses by .13; a bias left out moves them by .6


def check(model: Model) -> None:
    """Compare the engine with the plain model on two short prompts.

    Raises ModelError if they differ, or if the engine cannot run it.

    Steers after two blocks in both modes at a token in the middle of the prompts, and compares every loss and the
    gradient of their sum.
    """
    kind, advice, bound = type(model.hf).__name__, "use another model", TOLERANCE.get(model.dtype, HALF)
    try:
        loss, gradient = differences(model)
        # A ReLU within rounding of its kink passes a gradient in one pass alone; with other vectors it is elsewhere.
        if loss <= bound < gradient:
            gradient = min(differences(model, seed)[1] for seed in (1, 2))
    except layouts.LayoutError as error:
        raise ModelError(f"{model.name!r} is a {kind}, which {error}: {advice}.") from error
    except Exception as error:  # anything that a class of somebody else's can raise
        raise ModelError(
            f"{model.name!r} is a {kind}, which the engine cannot replay block by block ({_reason(model, error)}): "
            f"{advice}."
        ) from error
    if not (loss <= bound and gradient <= bound):  # also where one of them is not a number
        raise ModelError(
            f"{model.name!r} is a {kind}, on which the engine is not exact: losses differ from a plain forward pass by "
            f"{loss:.1e} nats, gradients by {gradient:.1e} of their length: {advice}."
        )


def _reason(model, error: Exception) -> str:
    """Say what is not handled: kinds of blocks that keep no keys and values, or what went wrong."""
    others = sorted(set(getattr(model.layout.config, "layer_types", None) or ()) - ATTENTION)
    if others:
        return f"it has blocks of the kind {', '.join(others)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def differences(model, seed: int = 0) -> tuple[float, float]:
    """Return the largest difference in loss (nats a prompt) and the relative one of the gradient.

    ``seed`` draws the vectors.
    """
    prompts = short_prompts(model.tokenizer)
    site = Site.prepare(model, prompts)
    layers = sorted({0, (model.n_layers - 1) // 2})
    cases = [(layer, mode) for layer in layers for mode in ("add", "replace")]
    # Two vectors a case, of the length of the stream that they meet and of no prompt's direction.
    lengths = torch.stack([site.at(layer).float().norm(dim=-1).mean() for layer, _ in cases])
    noise = torch.randn(len(cases), 2, model.d_model, generator=torch.Generator().manual_seed(seed))
    start = noise * (lengths[:, None] / noise.norm(dim=-1))[..., None]

    ours, theirs = (start.to(model.device).requires_grad_() for _ in range(2))
    losses = torch.stack([site.loss(vectors, *case) for vectors, case in zip(ours, cases, strict=True)])
    expected = torch.stack([plain_losses(model, prompt, theirs, cases) for prompt in prompts], -1)
    (gradient,) = torch.autograd.grad(losses.sum(), ours)
    (reference,) = torch.autograd.grad(expected.mean(-1).sum(), theirs)
    scored = torch.stack([site.evaluate(v, *case).nll.nansum(-1) for v, case in zip(start, cases, strict=True)])
    off = (scored - expected.cpu()).abs().max(), (losses - expected.mean(-1)).abs().max().cpu()
    return max(off).item(), ((gradient - reference).norm() / reference.norm().clamp_min(1e-9)).item()


def short_prompts(tokenizer) -> list[Prompt]:
    """Return two prompts of unequal length, made of tokens as the tokenizer gives them."""
    ids = probe(tokenizer)
    return [
        Prompt(tuple(ids[:n]), (n - ANSWER - 2,), (), tuple(ids[n - ANSWER : n]), (tuple(ids[n - ANSWER : n]),))
        for n in LENGTHS
    ]


def probe(tokenizer) -> list[int]:
    """Return some tokens as the tokenizer gives them, the first as it begins a text."""
    return (tokenizer(TEXT)["input_ids"] * LENGTHS[0])[: LENGTHS[0]]  # whatever it makes of the words, there are enough


def plain_losses(model, prompt: Prompt, vectors: Tensor, cases) -> Tensor:
    """Return the loss [cases, n] of ``vectors`` [cases, n, d_model] in one unpadded forward pass, one a row."""
    at, handles, n = prompt.separators[-1], [], vectors.shape[1]
    for layer in {layer for layer, _ in cases}:

        def steer(block, args, out, layer=layer):
            stream = out[0] if isinstance(out, tuple) else out
            rows = list(stream)
            for i, (steered, mode) in enumerate(cases):
                for j in range(n * i, n * (i + 1)) if steered == layer else ():
                    vector = vectors[i, j - n * i].to(stream)
                    here = rows[j][at] + vector if mode == "add" else vector
                    rows[j] = torch.cat([rows[j][:at], here[None], rows[j][at + 1 :]])
            return (torch.stack(rows), *out[1:]) if isinstance(out, tuple) else torch.stack(rows)

        handles.append(model.layout.blocks[layer].register_forward_hook(steer))
    try:
        ids = torch.tensor([prompt.ids[:-1]] * n * len(cases), device=model.device)
        logits = model.hf(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    answer = torch.tensor(prompt.answer, device=model.device)
    log_probs = logits[:, -len(answer) :].float().log_softmax(-1)
    losses = -log_probs[:, torch.arange(len(answer)), answer].sum(-1)
    return losses.view(len(cases), n)
