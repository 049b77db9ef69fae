"""Evaluate "this vector at this place, for these prompts", fast and exactly.

A vector added at one position of layer L changes only that position and later ones, and only in the blocks after L.
So the blocks up to L, and the keys and values of every earlier position, are computed once per set of prompts
(`Site.prepare`); each evaluation replays just the blocks after L on the few positions that can change, for many
vectors at once. Losses and gradients equal those of a full forward pass with a hook.

This is the only place that works on the model's device: what comes in may lie anywhere, what goes out is on the CPU.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nb_utils.models import Model
from nb_utils.prompts import Prompt

BYTE_BUDGET = int(os.environ.get("NB_BYTE_BUDGET", 1 << 28))  # what one chunk of vectors may take
VOCABULARY_BLOCK = 2048  # logits computed at a time: they stay in the processor's cache until they are summed


class _Frozen:
    """Keys and values of the unsteered prefix; hands them to attention and never grows."""

    def __init__(self, layers):
        self.layers = layers  # [(keys, values)] per block, each [batch, heads, prefix, d_head]

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
    the answer short. ``kl`` [n, batch]: KL divergence (nats) from the reference next-token distribution to the steered
    one, NaN without a reference.
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
    kwargs: tuple[dict, ...]  # what the model passes to each block for the suffix
    residual: tuple[Float[Tensor, "batch suffix d_model"], ...]  # output of each block, unsteered
    rows: Int[Tensor, "2 n_labels"]  # (prompt, position) of every answer token to predict
    labels: Int[Tensor, " n_labels"]
    place: Int[Tensor, " n_labels"]  # index of that token within its answer
    steers: str  # which token: "separator" or "output"

    @classmethod
    @torch.no_grad()
    def prepare(cls, model: Model, prompts, at="separator", answer_tokens: int | None = None) -> "Site":
        """Run ``prompts`` once without steering and keep what no vector can change.

        ``at``: "separator" steers the query's separator, "output" the last token of the last shot's y.
        ``answer_tokens``: how many tokens of each answer to predict (None: all).
        Raises ValueError for an empty set, or a steered position with nothing before it.
        """
        if not prompts:
            raise ValueError("A site needs at least one prompt.")
        positions = [p.separators[-1] if at == "separator" else p.outputs[-1] for p in prompts]
        if min(positions) < 1:
            raise ValueError("A steered position needs at least one token before it.")
        lengths = [len(p.ids) - len(p.answer) + min(len(p.answer), answer_tokens or 99) - 1 for p in prompts]
        before, after = max(positions), max(n - at for n, at in zip(lengths, positions, strict=True))
        device = model.device
        ids = torch.full((len(prompts), before + after), model.tokenizer.pad_token_id or 0, device=device)
        mask = torch.zeros_like(ids)
        rows, labels, place = [], [], []
        for i, (prompt, position, length) in enumerate(zip(prompts, positions, lengths, strict=True)):
            start = before - position
            ids[i, start : start + length] = torch.tensor(prompt.ids[:length], device=device)
            mask[i, start : start + length] = 1
            first = len(prompt.ids) - len(prompt.answer) - 1  # the position that predicts the first answer token
            for j in range(length - first):
                rows.append((i, first + j - position))
                labels.append(prompt.answer[j])
                place.append(j)
        order = (mask.cumsum(1) - 1).clamp_min(0)

        core = model.hf.model
        cache = core(
            ids[:, :before], attention_mask=mask[:, :before], position_ids=order[:, :before], use_cache=True
        ).past_key_values
        frozen = _Frozen([(layer.keys, layer.values) for layer in cache.layers])
        kwargs, residual, handles = [], [], []
        for block in core.layers:
            handles.append(block.register_forward_pre_hook(lambda _, args, kw: kwargs.append(kw), with_kwargs=True))
            handles.append(block.register_forward_hook(lambda _, args, out: residual.append(_stream(out))))
        try:
            core(ids[:, before:], attention_mask=mask, position_ids=order[:, before:], past_key_values=cache)
        finally:
            for handle in handles:
                handle.remove()
        as_tensor = lambda values: torch.tensor(values, device=device)  # noqa: E731
        targets = as_tensor(rows).T, as_tensor(labels), as_tensor(place)
        return cls(model, tuple(prompts), frozen, tuple(kwargs), tuple(residual), *targets, at)

    def hidden(
        self, vectors: Float[Tensor, "n d_model"], layer: int, mode: str = "add"
    ) -> Float[Tensor, "n n_labels d_model"]:
        """Return what the unembedding reads at every answer position, with each vector applied after block ``layer``.

        ``mode``: "add" to the residual stream at the steered position, or "replace" it. Differentiable in ``vectors``.
        """
        stream = self.model.hf.model.norm(self._run(vectors, layer, mode))
        return stream[:, self.rows[0], self.rows[1]]

    @torch.no_grad()
    def read(
        self, vectors: Float[Tensor, "n d_model"], layer: int, at: int, mode: str = "add"
    ) -> Float[Tensor, "n batch d_model"]:
        """Return the residual stream at the steered position after block ``at``; vectors apply after ``layer``."""
        if at < layer:
            raise ValueError(f"A vector applied after block {layer} does not reach block {at}: it is earlier.")
        return self._run(vectors, layer, mode, at + 1)[:, :, 0].cpu()

    def _run(self, vectors, layer, mode, end: int | None = None) -> Float[Tensor, "n batch suffix d_model"]:
        """Run the blocks after ``layer`` (up to ``end``) on the suffix, for every vector."""
        if mode not in ("add", "replace"):
            raise ValueError(f"mode is 'add' or 'replace', not {mode!r}.")
        base = self.residual[layer]
        n, (batch, suffix, d_model) = len(vectors), base.shape
        v = vectors.to(base)[:, None, :].expand(n, batch, d_model)
        first = base[:, 0] + v if mode == "add" else v
        stream = torch.cat([first[:, :, None], base[:, 1:].expand(n, -1, -1, -1)], dim=2)
        stream = stream.reshape(n * batch, suffix, d_model)
        blocks = self.model.hf.model.layers[layer + 1 : end]
        for block, kwargs in zip(blocks, self.kwargs[layer + 1 : end], strict=True):
            stream = _stream(block(stream, **{**_copies(kwargs, batch, n), "past_key_values": self.frozen}))
        return stream.view(n, batch, suffix, d_model)

    def loss(self, vectors, layer: int, mode: str = "add", vocabulary=None) -> Float[Tensor, " n"]:
        """Return the mean over prompts of the summed NLL of the answer tokens kept; differentiable in ``vectors``.

        ``vocabulary`` (from `vocabulary`) restricts the softmax to some tokens: for optimisation only.
        """
        # Every block keeps what its backward pass needs, and the logits come as themselves and as two copies.
        blocks = len(self.residual) - 1 - layer if vectors.requires_grad and torch.is_grad_enabled() else 1
        width = len(self.model.hf.lm_head.weight if vocabulary is None else vocabulary.weight)
        parts = vectors.split(self._chunk(blocks, 3 * width))
        if len(parts) == 1:
            return self._loss(vectors, layer, mode, vocabulary)
        # Too many to keep: the backward pass runs each part forward once more.
        return torch.cat([checkpoint(self._loss, part, layer, mode, vocabulary, use_reentrant=False) for part in parts])

    def _loss(self, vectors, layer, mode, vocabulary):
        hidden = self.hidden(vectors, layer, mode)
        weight, labels = (self.model.hf.lm_head.weight, self.labels) if vocabulary is None else (
            vocabulary.weight, vocabulary.index[self.labels])
        logits = _capped(hidden @ weight.T, self.model).float()
        nll = logits.logsumexp(-1) - logits.gather(-1, labels.expand(len(vectors), -1)[..., None])[..., 0]
        return (nll.sum(-1) / len(self.prompts)).cpu()

    def _chunk(self, blocks: int, width: int) -> int:
        """Return how many vectors fit into the budget if ``blocks`` blocks and ``width`` logits a label are held."""
        config, tokens = self.model.hf.config, self.residual[0][..., 0].numel()
        block = tokens * (16 * config.hidden_size + 5 * config.intermediate_size)
        block += 2 * sum(kept.numel() for kept in self.frozen.layers[0])  # copied per vector, and per head by attention
        return max(1, BYTE_BUDGET // (4 * (blocks * block + len(self.labels) * width)))

    @torch.no_grad()
    def evaluate(
        self, vectors: Float[Tensor, "n d_model"], layer: int, mode: str = "add",
        reference: Float[Tensor, "batch vocab"] | None = None,
    ) -> Scores:
        """Score every vector on every prompt over the whole vocabulary, in chunks that respect ``BYTE_BUDGET``.

        ``reference``: log-probabilities of the first answer token to which ``Scores.kl`` refers.
        """
        chunks = vectors.split(self._chunk(1, 3 * VOCABULARY_BLOCK))
        parts = [self._score(part, layer, mode, reference) for part in chunks]
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in Scores.__dataclass_fields__))

    def _score(self, vectors, layer, mode, reference) -> Scores:
        hidden = self.hidden(vectors, layer, mode)
        reference = None if reference is None else reference.to(hidden.device)
        nll, best, kl = (found.cpu() for found in self._read_out(hidden, reference))
        shape = (len(vectors), len(self.prompts), int(self.place.max()) + 1)
        spots = (slice(None), self.rows[0].cpu(), self.place.cpu())
        padded, hit = torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.bool)
        padded[spots], hit[spots] = nll, best == self.labels.cpu()
        first = torch.zeros(shape[:2], dtype=torch.long)
        starts = (self.place == 0).cpu()
        first[:, self.rows[0].cpu()[starts]] = best[:, starts]
        accepted = torch.stack(
            [torch.isin(first[:, i], torch.tensor([a[0] for a in p.accepted])) for i, p in enumerate(self.prompts)], 1
        )
        exact = self._exact(vectors, layer, mode, first, (hit | padded.isnan()).all(-1))
        return Scores(padded, hit, accepted, exact, kl)

    def _exact(self, vectors, layer, mode, first, whole) -> Float[Tensor, "n batch"]:
        """Say where an answer that counts is given and the line ended, as `Scores` has it.

        ``first``: the token that is said first. ``whole``: whether all that is kept of the answer is said. The model
        runs once more, one token further, for the answers that were given.
        """
        owners = torch.tensor([i for i, _ in self._answers])
        kept = torch.bincount(self.rows[0].cpu(), minlength=len(self.prompts))
        cut = kept < torch.tensor([len(prompt.answer) for prompt in self.prompts])
        given = torch.stack(
            [whole[:, i] if longer.answer[:-1] == self.prompts[i].answer else first[:, i] == longer.answer[0]
             for i, longer in self._answers], 1
        )
        if len(due := (given.any(0) & ~cut[owners]).nonzero()[:, 0]):
            site = self._ended.take(due)
            parts = vectors.split(site._chunk(1, 3 * VOCABULARY_BLOCK))
            said = torch.cat([site._read_out(site.hidden(part, layer, mode), None)[1].cpu() for part in parts])
            tokens, which = said.unique(return_inverse=True)
            given[:, due] &= torch.tensor([_ends_line(self.model, token) for token in tokens.tolist()])[which]
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
        weight, starts = self.model.hf.lm_head.weight, self.place == 0
        order, device = self.rows[0, starts], hidden.device
        peak = torch.full(hidden.shape[:2], -torch.inf, device=device)  # the largest logit so far
        mass, own = torch.zeros_like(peak), torch.zeros_like(peak)  # sum of exp(logit - peak); the label's logit
        best = torch.zeros_like(peak, dtype=torch.long)
        kl = torch.full((len(hidden), len(self.prompts)), torch.nan if reference is None else 0.0, device=device)
        for begin in range(0, len(weight), VOCABULARY_BLOCK):
            part = slice(begin, begin + VOCABULARY_BLOCK)
            logits = _capped(hidden @ weight[part].T, self.model).float()
            here = (self.labels >= part.start) & (self.labels < part.stop)
            own[:, here] = logits[:, here, self.labels[here] - begin]
            if reference is not None:  # sum p (log p - log q), with log q = logit - log of the sum of exp
                log_p = reference[order, part]
                p, first = log_p.exp(), logits if starts.all() else logits[:, starts]
                kl[:, order] += (p * log_p).sum(-1) - torch.einsum("nrv,rv->nr", first, p)
            high = logits.amax(-1)
            better = high > peak
            best[better] = logits[better].argmax(-1) + begin
            higher = torch.maximum(peak, high)
            mass = mass * (peak - higher).exp() + (logits - higher[..., None]).exp_().sum(-1)
            peak = higher
        norm = peak + mass.log()
        if reference is not None:
            kl[:, order] += norm[:, starts]
        return norm - own, best, kl

    @torch.no_grad()
    def log_probs(self, vectors, layer: int, mode: str = "add", place: int = 0) -> Float[Tensor, "n batch vocab"]:
        """Return the next-token log-probabilities at the position that predicts answer token ``place`` (0: the first).

        ``batch`` counts the prompts whose answer has that many tokens.
        """
        hidden = self.hidden(vectors, layer, mode)[:, self.place == place]
        return _capped(hidden @ self.model.hf.lm_head.weight.T, self.model).float().log_softmax(-1).cpu()

    def take(self, order: Int[Tensor, " kept"]) -> "Site":
        """Return the site of some of the prompts, without running the model."""
        order = order.to(self.rows.device)
        new = torch.full((len(self.prompts),), -1, device=order.device)
        new[order] = torch.arange(len(order), device=order.device)
        here = new[self.rows[0]] >= 0
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in order.tolist()),
            frozen=_Frozen([(keys[order], values[order]) for keys, values in self.frozen.layers]),
            kwargs=tuple(_rows(kwargs, len(self.prompts), order) for kwargs in self.kwargs),
            residual=tuple(stream[order] for stream in self.residual),
            rows=torch.stack([new[self.rows[0, here]], self.rows[1, here]]),
            labels=self.labels[here], place=self.place[here],
        )

    def unsteered(self) -> Scores:
        """Score the prompts as they are."""
        return self.evaluate(torch.zeros(1, self.model.d_model), len(self.residual) - 1)

    def at(self, layer: int) -> Float[Tensor, "batch d_model"]:
        """Return the unsteered residual stream after block ``layer`` at the steered position."""
        return self.residual[layer][:, 0].cpu()


@dataclass(frozen=True)
class Vocabulary:
    """Some rows of the unembedding, and where each token id went (-1: left out)."""

    weight: Float[Tensor, "kept d_model"]
    index: Int[Tensor, " vocab"]


@torch.no_grad()
def vocabulary(site: Site, *others: Site, keep: int = 16384) -> Vocabulary:
    """Keep the tokens that are likeliest on average at the sites' answer positions, and every answer token of them.

    One of the sites should be of few-shot prompts: without examples a model hardly thinks of the words that a vector
    makes it say, of another language's least of all. A softmax over these costs a sixteenth of the full one on Gemma 3;
    `reproduce` in the book states the difference.
    """
    weight = site.model.hf.lm_head.weight
    zero, mean = torch.zeros(1, site.model.d_model), torch.zeros(len(weight))
    for s in (site, *others):
        order = torch.arange(len(s.prompts))
        for part in order.split(max(1, BYTE_BUDGET // (12 * len(weight)))):
            mean += s.take(part).log_probs(zero, len(s.residual) - 1).exp().sum((0, 1)) / len(order)
    for s in (site, *others):
        mean[s.labels.cpu()] = torch.inf
    ids = mean.topk(min(keep, len(mean))).indices.sort().values.to(weight.device)
    index = torch.full((len(mean),), -1, device=weight.device)
    index[ids] = torch.arange(len(ids), device=weight.device)
    return Vocabulary(weight[ids].contiguous(), index)


@torch.no_grad()
def residuals(model: Model, prompts, positions, layers, batch: int = 16) -> dict[int, Float[Tensor, "n d_model"]]:
    """Return the residual stream after each of ``layers`` at ``positions`` (a tuple of indices per prompt), stacked.

    These are the values at ``blocks.{layer}.hook_resid_post``. Blocks after the last layer asked for are not run.
    """
    core, kept = model.hf.model, {layer: [] for layer in layers}
    for start in range(0, len(prompts), batch):
        part, spots = prompts[start : start + batch], positions[start : start + batch]
        # Padding stands on the right, where a causal model cannot see it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids) for p in part], batch_first=True).to(model.device)
        row = torch.tensor([i for i, spot in enumerate(spots) for _ in spot])
        column = torch.tensor([c for spot in spots for c in spot])
        handles = []
        for layer in layers:
            def keep(_, args, out, layer=layer, row=row, column=column):
                kept[layer].append(_stream(out)[row, column].cpu())
                if layer == max(layers):
                    raise _Enough

            handles.append(core.layers[layer].register_forward_hook(keep))
        try:
            core(ids, use_cache=False)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


class _Enough(Exception):
    """Leaves a forward pass whose later blocks nobody needs."""


def _ends_line(model, token: int) -> bool:
    """Say whether a token is a line break, whatever stands behind it, or ends the text."""
    ends = model.hf.generation_config.eos_token_id
    ends = {*model.tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}
    return token in ends or model.tokenizer.decode([token]).lstrip(" ").startswith("\n")


def _stream(out):
    return out[0] if isinstance(out, tuple) else out


def _capped(logits, model):
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap


def _copies(value, batch: int, n: int):
    """Repeat every tensor with a batch dimension ``n`` times, leaving the rest of a block's arguments alone."""
    return _tensors(value, batch, lambda tensor: tensor.repeat(n, *[1] * (tensor.ndim - 1)))


def _rows(value, batch: int, order):
    """Take some rows of every tensor with a batch dimension."""
    return _tensors(value, batch, lambda tensor: tensor[order])


def _tensors(value, batch, change):
    if isinstance(value, Tensor):
        return change(value) if value.ndim > 1 and value.shape[0] == batch > 1 else value
    if isinstance(value, dict):
        return {key: _tensors(item, batch, change) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_tensors(item, batch, change) for item in value)
    return value
