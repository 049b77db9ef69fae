"""How a model is built: its blocks, and what lies between their residual stream and the logits.

Transformers' classes call the same parts by different names, and put a bias, a scale or a soft cap between the last
hidden state and the logits. `Layout` is the one place that knows. Whether it is right for a model is not taken on
trust: `engine.check` runs when the model is loaded.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NORMS = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "norm_f", "final_norm", "embedding_norm",
)  # fmt: skip
ATTENTION = ("self_attn", "self_attention", "attention", "attn")  # what a block calls its attention
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # and that its output projection, which mixes the heads
# What a block calls a norm between attention and the stream, and that after the MLP, which only such blocks have:
# elsewhere the first name is that of the norm before the MLP.
AFTER_ATTENTION = {
    "post_attention_layernorm": "post_feedforward_layernorm", "post_self_attn_layernorm": "post_mlp_layernorm",
}  # fmt: skip
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}  # 1: logits are multiplied, -1: divided
STRETCHED = ("dynamic", "longrope")  # rotary frequencies that depend on the length of the text


class LayoutError(ValueError):
    """A model whose parts cannot be told apart; the message says which is missing."""


@dataclass(frozen=True)
class Layout:
    """The parts of a causal language model.

    ``core`` maps tokens to final hidden states: it embeds, runs ``blocks`` in order, then ``norm``. ``head`` is the
    unembedding; its logits are multiplied by ``scale``, then soft-capped at ``cap``. ``config`` is that of the text
    model, also where a vision tower stands beside it.
    """

    config: object
    core: torch.nn.Module
    blocks: torch.nn.ModuleList
    norm: torch.nn.Module
    head: torch.nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def d_mlp(self) -> int:
        """The width of a block's MLP; four times the stream's where the configuration doesn't have one number."""
        return number(self.config, "intermediate_size") or 4 * self.d_model

    @property
    def n_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def d_head(self) -> int:
        return number(self.config, "head_dim") or self.d_model // self.n_heads

    @property
    def n_vocab(self) -> int:
        return len(self.head.weight)

    @property
    def longest(self) -> int | None:
        """How many tokens a text may have; None if there is no bound.

        Frequencies that depend on the length change beyond the original context, where a text that runs in two parts
        is another one.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        bounds = [number(self.config, "max_position_embeddings")]
        for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one, or one a layer type
            if part.get("rope_type") in STRETCHED:
                bounds.append(part.get("original_max_position_embeddings"))
                bounds.append(number(self.config, "original_max_position_embeddings"))
        return min(filter(None, bounds), default=None)

    def mixer(self, layer: int) -> torch.nn.Module:
        """Return the output projection of a block's attention, which reads the heads' outputs side by side.

        Raises LayoutError if it has none where we look for one, or one that heads don't share equally.
        """
        block = self.blocks[layer]
        inside = [part for name in ATTENTION if (part := getattr(block, name, None)) is not None]
        inside += [getattr(part, "attention", None) for part in inside]  # GPT-Neo wraps its attention once more
        found = [getattr(part, name) for part in inside for name in OUTPUT if hasattr(part, name)]
        if not found:
            raise LayoutError("has no output projection of attention where we look for one")
        if isinstance(heads := self.n_heads, int) and found[0].weight.numel() % (heads * self.d_model) == 0:
            return found[0]
        raise LayoutError("has an output projection of attention that its heads do not share equally")

    def mixing(self, layer: int) -> Float[Tensor, "heads d_model d_head"]:
        """Return what each head's output is multiplied by: W_O, cut into heads, and the block's residual multiplier."""
        mixer = self.mixer(layer)
        weight = mixer.weight.T if type(mixer).__name__ == "Conv1D" else mixer.weight  # GPT-2 stores it transposed
        weight = weight * float(getattr(self.config, "residual_multiplier", None) or 1)
        return weight.unflatten(1, (self.n_heads, -1)).transpose(0, 1)

    def after_attention(self, layer: int) -> torch.nn.Module | None:
        """Return the norm that a block's attention passes through before it is added; None where there is none."""
        block = self.blocks[layer]
        found = [getattr(block, name, None) for name, mate in AFTER_ATTENTION.items() if hasattr(block, mate)]
        return next(iter(found), None)

    def positions(self, numbers: Tensor) -> dict:
        """Return the argument that tells ``core`` the position of each token, if it takes one."""
        return {"position_ids": numbers} if "position_ids" in inspect.signature(self.core.forward).parameters else {}

    def unembedding(self, tokens=slice(None)) -> tuple[Tensor, Tensor | None]:
        """Return the rows of the unembedding for some tokens, and their biases if it has any."""
        bias = getattr(self.head, "bias", None)
        return self.head.weight[tokens], None if bias is None else bias[tokens]

    def logits(self, hidden: Float[Tensor, "... d_model"], weight=None, bias=None) -> Float[Tensor, "... tokens"]:
        """Return the logits, in fp32, after final hidden states; of some tokens if their `unembedding` is given.

        The product is taken in the precision of ``hidden``.
        """
        if weight is None:
            weight, bias = self.unembedding()
        bias = None if bias is None else bias.to(hidden.dtype)
        return self.finished(torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float())

    def finished(self, logits: Tensor) -> Tensor:
        """Return what the unembedding gives, scaled and soft-capped."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if not self.cap else torch.tanh(logits / self.cap) * self.cap

    @contextmanager
    def hooked(self, layer: int, see):
        """Call ``see`` with the residual stream after a block in every pass; what it returns takes its place.

        Nothing changes where it returns None.
        """

        def hook(block, args, out):
            changed = see(stream(out))
            if changed is not None:
                return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handle = self.blocks[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def number(config, name: str) -> int | None:
    """Return a positive integer of a configuration; None where it has none, or one for each block."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # what transformers raises where blocks differ
        return None
    return value if isinstance(value, int) and value > 0 else None


def stream(out) -> Float[Tensor, "... d_model"]:
    """Return the residual stream from what a block returns."""
    return out[0] if isinstance(out, tuple) else out


def of(hf: torch.nn.Module) -> Layout:
    """Find the parts of a causal language model of transformers.

    Raises LayoutError if it has no stack of blocks, no final norm or no unembedding where such models have them, or
    a bias in attention that the engine would mix up.
    """
    config, core, head = hf.config.get_text_config(decoder=True), hf.get_decoder(), hf.get_output_embeddings()
    core = hf.model if core is hf and hasattr(hf, "model") else core
    n = getattr(config, "num_hidden_layers", None)
    stacks = [part for part in core.children() if isinstance(part, torch.nn.ModuleList) and len(part) == n]
    norms = [getattr(core, name) for name in NORMS if isinstance(getattr(core, name, None), torch.nn.Module)]
    found = {"stack of blocks": stacks[:1], "final norm": norms[:1], "unembedding": [head] if head is not None else []}
    for part, candidates in found.items():
        if not candidates:
            raise LayoutError(f"has no {part} where we look for one")
    if getattr(getattr(config, "attn_config", None), "alibi", False):
        raise LayoutError("adds a bias to attention by head, which we cannot tell from one by prompt")
    scale = 1.0
    for name, power in SCALES.items():
        scale *= float(getattr(config, name, None) or 1) ** power
    return Layout(config, core, stacks[0], norms[0], head, scale, getattr(config, "final_logit_softcapping", None))
