"""What the interactive page computes: a typed prompt, steered, and where single latents fire in it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import engine, prompts
from nb_utils.engine import Site
from nb_utils.models import Model
from nb_utils.prompts import ARROW, Prompt, Template
from nb_utils.saes import Sae
from nb_utils.tasks import Pair

MAX_CHARACTERS = 2000
NO_ANSWER = "?"  # stands where a prompt has no known answer; nothing that depends on it is shown


class MicroscopeError(ValueError):
    """Something typed that cannot be computed; the message says what to type instead."""


def prompt(tokenizer, text: str, answer: str = "", template: Template = ARROW) -> Prompt:
    """Read a typed prompt: lines ``x -> y`` for examples (none: zero-shot), the last one ``x ->``.

    Raises MicroscopeError for an empty prompt, a line without separator, text after the last separator, a text that
    is too long, and what `prompts.encode` refuses.
    """
    mark, lines = template.separator.strip(), text.strip().splitlines()
    if not lines:
        raise MicroscopeError(f"The prompt is empty: type one, such as hot {mark}")
    if len(text) > MAX_CHARACTERS:
        raise MicroscopeError(f"The prompt has {len(text):,} characters: {MAX_CHARACTERS:,} are the most we take here.")
    shots = []
    for number, line in enumerate(lines, start=1):
        x, found, y = (part.strip() for part in line.partition(mark))
        if not found:
            raise MicroscopeError(f"Line {number} has no separator: write it as x {mark} y, and the last as x {mark}")
        if not x:
            raise MicroscopeError(f"Line {number} has nothing before its separator {mark}: type an input there.")
        if number < len(lines) and not y:
            raise MicroscopeError(f"Line {number} is an example without an answer: complete it, or drop the line.")
        shots.append(Pair(x, y, (y,)))
    if shots[-1].y:
        raise MicroscopeError(f"The last line goes on after its separator: end it with {mark}")
    answer = " ".join(answer.split()) or NO_ANSWER
    try:
        return prompts.encode(tokenizer, shots[:-1], Pair(shots[-1].x, answer, (answer,)), template)
    except (UnicodeEncodeError, TypeError):  # half a surrogate pair
        raise MicroscopeError("The tokenizer cannot read a character of this prompt.") from None
    except ValueError as error:
        raise MicroscopeError(str(error)) from None


def direction(sae: Sae, latent: int) -> Float[Tensor, " d_in"]:
    """Return the unit decoder direction of a latent; raises MicroscopeError where there is none."""
    if not 0 <= latent < sae.d_sae:
        raise MicroscopeError(f"There is no latent {latent} after block {sae.layer}: type 0 to {sae.d_sae - 1}.")
    found = sae.decoder_directions[latent]
    if not found.any():
        raise MicroscopeError(f"Latent {latent} after block {sae.layer} is dead and has no direction: take another.")
    return found


@dataclass(frozen=True)
class View:
    """What one vector makes of one prompt.

    ``top``: the likeliest next tokens (id, probability). ``loss``: NLL (nats) of the first two answer tokens.
    ``rank``: of the first answer token among all tokens, 1 is the best.
    """

    top: tuple[tuple[int, float], ...]
    loss: float
    rank: int


@torch.no_grad()
def views(site: Site, vectors: Float[Tensor, "n d_model"], layer: int, n_top: int = 5) -> list[list[View]]:
    """Look at every prompt of a site (the inner lists) with each vector added, over the whole vocabulary."""
    first = site.log_probs(vectors, layer)
    second = site.log_probs(vectors, layer, place=1) if (site.place == 1).any() else None
    row = {index: at for at, index in enumerate(site.rows[0, site.place == 1].tolist())}
    looks = []
    for i in range(len(vectors)):
        looks.append([])
        for j, prompt_ in enumerate(site.prompts):
            at = first[i, j]
            loss = -at[prompt_.answer[0]]
            if j in row:
                loss = loss - second[i, row[j], prompt_.answer[1]]
            top = at.topk(n_top)
            looks[-1].append(View(
                tuple(zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)),
                loss.item(), int((at > at[prompt_.answer[0]]).sum()) + 1,
            ))
    return looks


@torch.no_grad()
def continuations(
    model: Model, read: Prompt, vectors: Float[Tensor, "n d_model"], layer: int, n_tokens: int = 4
) -> list[str]:
    """Decode greedily from the end of a prompt, each vector added at its last separator alone; a line's end stops."""
    n, ids = len(vectors), torch.tensor([read.ids[: read.separators[-1] + 1]], device=model.device)
    with engine.steer(model, vectors, layer):
        state = model.hf(ids.expand(n, -1), use_cache=True, logits_to_keep=1)
    tokens, text, going = [state.logits[:, -1].argmax(-1)], [""] * n, set(range(n))
    while True:
        for i in sorted(going):
            piece = model.tokenizer.decode([*(step[i].item() for step in tokens)], skip_special_tokens=True)
            text[i] = piece.split("\n")[0]
            if tokens[-1][i] == model.tokenizer.eos_token_id or "\n" in piece:
                going.discard(i)
        if not going or len(tokens) == n_tokens:
            return text
        state = model.hf(tokens[-1][:, None], past_key_values=state.past_key_values, use_cache=True)
        tokens.append(state.logits[:, -1].argmax(-1))


def activations(model: Model, sae: Sae, read: Prompt, latents: list[int]) -> Float[Tensor, "tokens latents"]:
    """Return raw activations of latents at every token up to the last separator; NaN at the first (BOS, or a sink)."""
    for latent in latents:
        direction(sae, latent)
    end = read.separators[-1] + 1
    stream = engine.residuals(model, [read], [tuple(range(end))], [sae.layer])[sae.layer]
    codes = sae.encode(stream)[:, latents]
    codes[0] = float("nan")
    return codes


def pieces(tokenizer, ids) -> list[str]:
    """Return the text of each token, special tokens by their names."""
    return [tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token) for token in ids]
