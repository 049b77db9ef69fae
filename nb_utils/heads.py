"""Attention heads as first-class things: what each adds to the stream, and what happens where some are set.

A head's output ``z`` is its slice of what the output projection of attention reads. What reaches the stream is its
*contribution*: W_O z, multiplied by the gain of the norm after attention and divided by the length of what that norm
reads, in models that have one (Gemma 2 and 3, OLMo 2); elsewhere W_O z itself (Todd et al. 2024).

Heads are patched at the steered position of a `Site`, in all blocks at once, many patches at a time. Which of them, or
of any other items, is learned from a reward (`by_reward`, and `by_gradient` where it has a gradient).
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nb_utils import engine
from nb_utils.layouts import LayoutError
from nb_utils.models import Model


@dataclass(frozen=True)
class Heads:
    """What the heads of all blocks say at some tokens.

    ``z`` [n, layers, heads, d_head]: their outputs. ``scale`` [n, layers]: what the norm after attention multiplies
    them by, its gain left out (1 / length); ones where a model has none.
    """

    z: Float[Tensor, "n layers heads d_head"]
    scale: Float[Tensor, "n layers"]

    @property
    def scaled(self) -> Float[Tensor, "n layers heads d_head"]:
        """The outputs as the norm scales them: `contributions` are linear in these, so a mean of these is enough."""
        return self.z * self.scale[..., None, None]


@torch.no_grad()
def of(model: Model, prompts, positions, batch: int = 16) -> Heads:
    """Read every head at ``positions`` (a tuple of indices per prompt), stacked.

    Raises ValueError for a prompt that is too long for the model, LayoutError for a model whose heads cannot be told
    apart.
    """
    engine._fit(model, prompts)
    layout, blocks = model.layout, range(model.n_layers)
    bare = [_bare(layout, layer) for layer in blocks]
    z, scale = {layer: [] for layer in blocks}, {layer: [] for layer in blocks}
    for start in range(0, len(prompts), batch):
        part, spots = prompts[start : start + batch], positions[start : start + batch]
        # Padding stands on the right, where a causal model cannot see it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids) for p in part], batch_first=True).to(model.device)
        row = torch.tensor([i for i, spot in enumerate(spots) for _ in spot])
        column = torch.tensor([c for spot in spots for c in spot])

        def speak(mixer, args, layer, row=row, column=column):
            z[layer].append(_single(args[0][row, column]).unflatten(-1, (layout.n_heads, -1)).cpu())

        def stretch(norm, args, out, layer, row=row, column=column):
            even = bare[layer] * _single(args[0][row, column])  # what comes out is this, times one number
            scale[layer].append((even * _single(out[row, column])).sum(-1).div(even.pow(2).sum(-1)).cpu())

        with ExitStack() as hooks:
            for layer in blocks:
                hooks.callback(layout.mixer(layer).register_forward_pre_hook(partial(speak, layer=layer)).remove)
                if (norm := layout.after_attention(layer)) is not None:
                    hooks.callback(norm.register_forward_hook(partial(stretch, layer=layer)).remove)
            layout.core(ids, use_cache=False)
    outputs = torch.stack([torch.cat(z[layer]) for layer in blocks], 1)
    ones = torch.ones(len(outputs))
    return Heads(outputs, torch.stack([torch.cat(scale[layer]) if scale[layer] else ones for layer in blocks], 1))


@torch.no_grad()
def attended(model: Model, prompts, batch: int = 16) -> list[Float[Tensor, "layers heads tokens"]]:
    """Return the share of its attention that each head gives to every token, at the last separator of each prompt.

    The tokens end with that separator. Raises ValueError for a prompt that is too long for the model, LayoutError for a
    model that does not tell.
    """
    engine._fit(model, prompts)
    layout, found, usual = model.layout, [], model.hf.config._attn_implementation
    shares = {}

    def keep(attention, args, out, layer):
        shares[layer] = out[1] if isinstance(out, tuple) and len(out) > 1 else None

    with ExitStack() as hooks:
        for layer, block in enumerate(layout.blocks):
            whole = next(part for part in block.modules() if layout.mixer(layer) in part.children())
            hooks.callback(whole.register_forward_hook(partial(keep, layer=layer)).remove)
        hooks.callback(model.hf.set_attn_implementation, usual)
        model.hf.set_attn_implementation("eager")  # the others never have the shares
        for start in range(0, len(prompts), batch):
            ends = [p.separators[-1] + 1 for p in prompts[start : start + batch]]
            ids = [torch.tensor(p.ids[:end]) for p, end in zip(prompts[start : start + batch], ends, strict=True)]
            layout.core(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device), use_cache=False)
            if any(shares.get(layer) is None or shares[layer].ndim != 4 for layer in range(model.n_layers)):
                raise LayoutError("does not tell what its heads attend to")
            found += [torch.stack([shares[layer][i, :, end - 1, :end] for layer in range(model.n_layers)]).float().cpu()
                      for i, end in enumerate(ends)]  # fmt: skip
    return found


@torch.no_grad()
def contributions(
    model: Model, scaled: Float[Tensor, "*n layers heads d_head"]
) -> Float[Tensor, "*n layers heads d_model"]:
    """Return what each head adds to the stream, from its scaled output (`Heads.scaled`) or a mean of these.

    It is exact: over the heads of a block they sum to what its attention adds, but for a bias of the output projection.
    """
    layout, found = model.layout, []
    for layer in range(model.n_layers):
        z = scaled[..., layer, :, :].to(model.device)
        found.append(torch.einsum("...hk,hdk->...hd", z, _single(layout.mixing(layer))) * _bare(layout, layer))
    return torch.stack(found, -3).cpu()


def literal(model: Model, z: Float[Tensor, "*n layers heads d_head"]) -> Float[Tensor, "*n layers heads d_model"]:
    """Return W_O z of each head, which is its contribution only where no norm follows attention."""
    layout = model.layout
    found = [torch.einsum("...hk,hdk->...hd", z[..., layer, :, :].to(model.device), _single(layout.mixing(layer)))
             for layer in range(model.n_layers)]  # fmt: skip
    return torch.stack(found, -3).cpu()


def _bare(layout, layer: int) -> Float[Tensor, " d_model"]:
    """Return what the norm after attention makes of ones: its gain, up to a factor that `of` takes out again."""
    weight, norm = layout.mixer(layer).weight, layout.after_attention(layer)
    ones = torch.ones(layout.d_model, device=weight.device, dtype=weight.dtype)
    return _single(ones if norm is None else norm(ones))


def _single(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values


def mask(model: Model, chosen: Iterable[tuple[int, int]]) -> Float[Tensor, "layers heads"]:
    """Return ones at some heads, named by (block, head), and zeros elsewhere."""
    found = torch.zeros(model.n_layers, model.layout.n_heads)
    for layer, head in chosen:
        found[layer, head] = 1
    return found


@dataclass(frozen=True)
class Patch:
    """Heads that are set at the steered position: ``n`` patches, tried side by side.

    ``values`` [layers, heads, d_head], [n, layers, heads, d_head] or, for every prompt its own, [n, batch, layers,
    heads, d_head]. ``where`` [n, layers, heads] or [n, batch, layers, heads]: 1 where a head is patched, 0 where not,
    or a share between. ``mode``: "replace" goes from the own output to the value by that share, "add" adds the value
    times it. Differentiable in both.
    """

    values: Tensor
    where: Tensor
    mode: str = "replace"

    def __post_init__(self) -> None:
        if self.mode not in ("add", "replace"):
            raise ValueError(f"mode is 'add' or 'replace', not {self.mode!r}.")
        if self.where.ndim not in (3, 4) or self.values.ndim not in (3, 4, 5):
            raise ValueError("A patch needs values [(n, (batch,)) layers, heads, d_head] and where [n, (batch,) …].")

    def __len__(self) -> int:
        return len(self.where)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return values [n, batch, layers, heads, d_head] and where [n, batch, layers, heads], 1 long where alike."""
        values, where = self.values, self.where
        values = values[None, None] if values.ndim == 3 else values[:, None] if values.ndim == 4 else values
        return values, where[:, None] if where.ndim == 3 else where

    def of(self, part: Int[Tensor, " part"], owners: Int[Tensor, " batch"]) -> "Patch":
        """Return some of the patches, on some of the prompts."""
        values, where = self.whole()
        values = values if len(values) == 1 else values[part]
        values = values if values.shape[1] == 1 else values[:, owners]
        where = where[part]
        return Patch(values, where if where.shape[1] == 1 else where[:, owners], self.mode)


def streams(site: engine.Site, patch: Patch, end: int | None = None) -> Float[Tensor, "n batch suffix d_model"]:
    """Run the suffix with heads patched, up to block ``end`` (not included); blocks before the first are not run."""
    layout, n, batch = site.model.layout, len(patch), len(site.prompts)
    end = site.model.n_layers if end is None else end
    values, where = patch.whole()
    touched = where.detach().abs().sum((0, 1, 3)).nonzero()[:, 0].tolist()
    touched = list(range(len(layout.blocks))) if where.requires_grad else touched
    first = min([*touched, end])
    base = site.residual[first - 1] if first else site.entering

    def change(mixer, args, layer):
        said = args[0]
        if said.ndim != 3 or len(said) != n * batch:
            raise LayoutError("passes the outputs of its heads on in a shape that we don't know")
        own = said[:, 0].view(n, batch, layout.n_heads, -1)
        value, share = values[:, :, layer].to(own), where[:, :, layer, :, None].to(own)
        new = torch.lerp(own, value.expand_as(own), share) if patch.mode == "replace" else own + share * value
        return (torch.cat([new.reshape(n * batch, 1, -1), said[:, 1:]], 1), *args[1:])

    with ExitStack() as hooks:
        for layer in touched:
            hooks.callback(layout.mixer(layer).register_forward_pre_hook(partial(change, layer=layer)).remove)
        return site.replay(base.expand(n, *base.shape), first, end)


def losses(site: engine.Site, patch: Patch, vocabulary: engine.Vocabulary | None = None) -> Float[Tensor, "n batch"]:
    """Return the summed NLL (nats) of every prompt's answer tokens with heads patched; differentiable in the patch.

    ``vocabulary`` restricts the softmax to some tokens: for optimisation, and for maps whose difference is stated.
    """
    learns = torch.is_grad_enabled() and (patch.where.requires_grad or patch.values.requires_grad)
    width = site.model.layout.n_vocab if vocabulary is None else len(vocabulary.weight)
    parts = site.parts(len(patch), site.model.n_layers if learns else 1, 3 * width)
    everyone = torch.arange(len(site.prompts))

    def some(part):
        nll = site.nll(site.read_by(streams(site, patch.of(part, everyone))), vocabulary)
        return torch.zeros(len(part), len(everyone), device=nll.device).index_add(1, site.rows[0], nll)

    if len(parts) == 1 or not learns:
        found = torch.cat([some(part) for part in parts])
    else:  # too many to keep: the backward pass runs each part forward once more
        found = torch.cat([checkpoint(some, part, use_reentrant=False) for part in parts])
    return found.to(patch.where.device)


def evaluate(
    site: engine.Site, patch: Patch, reference: Float[Tensor, "batch vocab"] | None = None
) -> engine.Scores:
    """Score every patch on every prompt over the whole vocabulary, as `Site.evaluate` does vectors."""
    return site.scored(
        lambda longer, part, owners: longer.read_by(streams(longer, patch.of(part, owners))), len(patch), reference)


@torch.no_grad()
def after(site: engine.Site, patch: Patch, layer: int) -> Float[Tensor, "n batch d_model"]:
    """Return the stream after block ``layer`` at the steered position, with heads patched."""
    everyone = torch.arange(len(site.prompts))
    parts = [streams(site, patch.of(part, everyone), layer + 1)[:, :, 0].cpu() for part in site.parts(len(patch))]
    return torch.cat(parts)


# What items are chosen by: masks -> the reward of each on each prompt, in one unit; NaN where it was not tried.
Reward = Callable[[Float[Tensor, "masks items"]], Float[Tensor, "masks prompts"]]


@dataclass(frozen=True)
class Choice:
    """Which items a search keeps, be they heads, latents or what else can be left out.

    ``path`` [steps + 1, items]: each item's probability before every step and after the last. ``history`` [steps]:
    mean reward in that step, the price of items not taken off.
    """

    path: Float[Tensor, "states items"]
    history: Float[Tensor, " steps"]

    @property
    def probabilities(self) -> Float[Tensor, " items"]:
        return self.path[-1]

    @property
    def kept(self) -> Bool[Tensor, " items"]:
        """The likeliest mask, which takes no draw; those of earlier steps are in ``path`` > 0.5 likewise."""
        return self.probabilities > 0.5


def by_reward(
    reward: Reward, n_items: int, *, steps: int, masks: int, rate: float, price: float = 0.0, start: float = 0.0,
    seed: int = 0,
) -> Choice:
    """Learn which items to keep from rewards alone: REINFORCE over one independent coin an item.

    Every step draws ``masks`` of zeros and ones and takes one step of Adam at ``rate`` up the mean reward less
    ``price`` for each item kept, in the reward's unit. ``start``: every coin's log-odds. A mask's reward on a prompt
    counts by how far it lies above what the step's other masks have there, so that a hard prompt is no blame: Hojel et
    al. 2024 take one baseline for all. Masks are on the CPU, rewards may lie anywhere; ``reward`` may leave a mask out
    on a prompt (NaN). Raises ValueError for fewer than two masks.
    """
    if masks < 2:
        raise ValueError("A mask is judged beside others: draw at least two in a step.")
    draw = torch.Generator().manual_seed(seed)

    def climb(logits):
        odds = logits.detach().sigmoid()
        drawn = (torch.rand(masks, n_items, generator=draw) < odds).float()
        with torch.no_grad():
            found = reward(drawn).cpu().double()
        tried = ~found.isnan()
        beside = tried.sum(0).sub(1).clamp_min(1)  # how many others were tried on the prompt
        above = (found - found.nanmean(0)) * (beside + 1) / beside  # the mean of the others, not of all
        score = above.nan_to_num().sum(1).float() @ (drawn - odds) / tried.sum()
        logits.grad = price * odds * (1 - odds) - score
        return found.nanmean().item()

    return _climbed(climb, n_items, steps, rate, start)


def by_gradient(
    reward: Reward, n_items: int, *, steps: int, rate: float, price: float = 0.0, start: float = 0.0
) -> Choice:
    """Learn which items to keep where a share of an item makes sense: `by_reward`'s sibling for a smooth reward.

    Each item is kept by a share, the sigmoid of its log-odds, and ``reward`` is asked for one mask of these, through
    which it is differentiable.
    """

    def climb(logits):
        share = logits.sigmoid()
        found = reward(share[None]).mean()
        logits.grad = torch.autograd.grad(price * share.sum() - found.cpu(), logits)[0]
        return found.item()

    return _climbed(climb, n_items, steps, rate, start)


def _climbed(climb: Callable[[Tensor], float], n_items: int, steps: int, rate: float, start: float) -> Choice:
    """Take steps of Adam on log-odds whose gradient ``climb`` sets; it returns the step's mean reward."""
    logits = torch.full((n_items,), float(start), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=rate)
    path, history = [logits.detach().sigmoid()], []
    for _ in range(steps):
        history.append(climb(logits))
        optimizer.step()
        path.append(logits.detach().sigmoid())
    return Choice(torch.stack(path), torch.tensor(history))
