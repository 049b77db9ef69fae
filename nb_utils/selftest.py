"""Is the engine exact on this model? Two short prompts through it and through the plain model, compared.

The plain side is an unpadded forward pass of the whole transformers model with a hook on one block; it shares no code
with the engine. The test runs when a model is loaded that is not one of ours, so that a class that the engine does not
replay is refused in a sentence, whatever the reason, and none is silently wrong.
"""

import torch
from torch import Tensor

from nb_utils import engine, layouts
from nb_utils.prompts import Prompt

TEXT = "hot -> cold\nbig -> small"
LENGTHS = (12, 7)  # tokens of the two prompts: the shorter one is padded
ANSWER = 2
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats a prompt, and share of the gradient's length
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
HALF = 0.5  # in half the plain pass rounds its logits, which moved losses by .13; a bias left out moves them by .6


def check(model) -> None:
    """Compare the engine with the plain model. Raises ModelError if they differ, or if the engine cannot run it.

    Steers after two blocks in both modes at a token in the middle of the prompts, and compares every loss and the
    gradient of their sum.
    """
    from nb_utils.models import ModelError

    kind, advice = type(model.hf).__name__, "use another model"
    try:
        loss, gradient = differences(model)
    except layouts.LayoutError as error:
        raise ModelError(f"{model.name!r} is a {kind}, which {error}: {advice}.") from error
    except Exception as error:  # anything that a class of somebody else's can raise
        raise ModelError(
            f"{model.name!r} is a {kind}, which the engine cannot replay block by block ({_reason(model, error)}): "
            f"{advice}."
        ) from error
    bound = TOLERANCE.get(model.dtype, HALF)
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


def differences(model) -> tuple[float, float]:
    """Return the largest difference in loss (nats a prompt) and the relative one of the gradient."""
    prompts = short_prompts(model.tokenizer)
    site = engine.Site.prepare(model, prompts)
    layers = sorted({0, (model.n_layers - 1) // 2})
    cases = [(layer, mode) for layer in layers for mode in ("add", "replace")]
    # Two vectors a case, of the length of the stream that they meet and of no prompt's direction.
    lengths = torch.stack([site.at(layer).float().norm(dim=-1).mean() for layer, _ in cases])
    noise = torch.randn(len(cases), 2, model.d_model, generator=torch.Generator().manual_seed(0))
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
    ids = tokens(tokenizer)
    return [
        Prompt(tuple(ids[:n]), (n - ANSWER - 2,), (), tuple(ids[n - ANSWER : n]), (tuple(ids[n - ANSWER : n]),))
        for n in LENGTHS
    ]


def tokens(tokenizer) -> list[int]:
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
