"""Cleaned vectors as files: a folder with vector.safetensors and a card that says what they are and what they do.

The card stands there twice, as card.json for programs and as README.md for people and for Hugging Face; the README has
the lines that bring the vector into other tools. llama.cpp and repeng read a file of their own, control-vector.gguf.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nb_utils import files
from nb_utils.text import verbatim

VECTOR, CARD, README, CONTROL = "vector.safetensors", "card.json", "README.md", "control-vector.gguf"
FORMAT = "sparse-task-vector/1"
# Where a vector can be added, as tools differ in it: what it is called here, in words, and who does it.
PLACES = {
    "last": ("the last token of the prompt, and no other",
             "`nb_utils.steer`; steering-vectors with `token_indices`"),
    "every": ("every token, BOS too",
              "lm-evaluation-harness, llama.cpp and repeng always; steering-vectors unless told otherwise"),
    "onward": ("the last token of the prompt, and every one after it",
               "AISteer360 with `from_position`; steering-vectors with `min_token_index`"),
    "after": ("every token after the prompt", "AISteer360's CAA unless told otherwise"),
}  # fmt: skip


class ExportError(ValueError):
    """A vector that cannot be written or read; the message is one line and says what to do."""

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


@dataclass(frozen=True)
class Card:
    """What a vector is: where it is added and how, what it was made from, and the loss that it must reproduce.

    ``scale``: norm of the vector, relative to the mean residual norm at the held-out separators. ``loss``: mean over
    ``heldout`` (prompt, answer) of the NLL (nats) of the first two answer tokens, with the vector added to the output
    of block ``layer`` at the prompt's last token. ``losses``: the same with the vector added elsewhere, by the names
    of `PLACES`. ``module``: what transformers' ``model.base_model`` calls the block. ``bos``: how every prompt begins.
    """

    task: str
    model: str
    model_sha256: str
    hook_name: str
    layer: int
    sae: str
    sae_set: str
    sae_sha256: str
    bias: bool
    features: dict[str, float]
    scale: float
    loss: float
    zero_shot_loss: float
    heldout: tuple[tuple[str, str], ...]
    licence: str
    mode: str = "add"
    place: str = "last token of the prompt"  # and nowhere else
    counted: str = "layer counts blocks from 0 and means a block's output; among hidden_states it is layer + 1"
    module: str = ""
    model_type: str = ""
    hub_name: str = ""
    bos: str = ""
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Say in words where the vector goes, as the folder's card does beside the fields."""
        how = "added to" if self.mode == "add" else "put in place of"
        block = f"after block {self.layer} ({self.hook_name})"
        return f"{how} the residual stream {block}, at the {self.place} and no other"


@dataclass(frozen=True)
class Vector:
    """A vector [d_model] with the latents and weights that it decodes from, and its card."""

    vector: Float[Tensor, " d_model"]
    latents: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]
    card: Card


def save(exported: Vector, folder: str | Path) -> Path:
    """Write the folder, whole or not at all, and return its path; an existing one is never overwritten.

    Raises ExportError if the folder exists, its name is empty, or it cannot be written.
    """
    if not str(folder).strip():
        raise ExportError("The folder has no name: type one.")
    folder = Path(folder).expanduser()
    tensors = {name: getattr(exported, name).detach().cpu().contiguous() for name in ("vector", "latents", "weights")}
    data = save_tensors(tensors)
    said, sha256 = exported.card, hashlib.sha256(data).hexdigest()
    card = {"format": FORMAT, **dataclasses.asdict(said), "where": said.where, "sha256": sha256}
    try:
        _check_new(folder)
        with files.whole(folder) as made:
            _check_new(folder)  # who held the lock may have made it
            made.mkdir()
            (made / VECTOR).write_bytes(data)
            (made / CARD).write_text(json.dumps(card, ensure_ascii=False, indent=1), encoding="utf-8")
            (made / README).write_text(readme(exported), encoding="utf-8")
            if _has_control(exported.card):
                _write_control(exported, made / CONTROL)
    except ExportError:
        raise
    except files.FileError as error:
        raise ExportError(str(error)) from error
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ExportError(files.unwritten(folder, error)) from error
    return folder


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise ExportError(f"{folder} exists already: choose another name, or delete it first.")


WHAT = """---
$head
---
# A sparse task vector: $title

Added to the residual stream of $model, this vector of $width numbers has it do a task with no example in the prompt: *$title*. It is the sum of $n_features of the sparse autoencoder $sae$bias; `card.json` has their weights, and the prompts that it was measured on.

| | |
| --- | --- |
| block | $layer, counted from 0: the vector is added to that block's output, `blocks.$layer.hook_resid_post` in TransformerLens, $module in `model.base_model` of transformers. In `hidden_states`, which begin with what enters block 0, that is entry $next |
| mode | $mode |
| place | $place, and nowhere else |
| BOS | a prompt $begins |
| length | $scale of what the stream has at that place on average |
| weights | of the model that was measured, by their SHA-256: $sha. Other weights of the same model, such as rounded ones, give other losses |
| licence | $licence |

## What it does, by where it is added

Loss in nats, over the first two tokens of the answers to $n held-out prompts. Without the vector it is $zero.

| added to | loss | by whom |
| --- | --- | --- |
$rows

It was made for the first of these places. Elsewhere it does something else: read the line of your tool before you compare.

## transformers

```python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained($own) for kind in (AutoModelForCausalLM, AutoTokenizer))
vector = load_file("vector.safetensors")["vector"]
```

The lines below go on from these; `n` is the number of tokens of a prompt.
"""  # noqa: E501
OTHERS = """
## steering-vectors

It has no file of its own. Without `token_indices` the vector is added to every token.

```python
from steering_vectors import SteeringVector

handle = SteeringVector({$layer: vector}).patch_activations(model, token_indices=[n - 1])
logits = model(**tokenizer("hot ->", return_tensors="pt")).logits
handle.remove()
```

## lm-evaluation-harness

It reads a pickle, which can run code: so none comes along, and this line writes one of your own.
Its other format, a table of features, keeps the last feature of a block alone.

```python
import torch

torch.save({$hook: {"steering_vector": vector, "steering_coefficient": 1.0, "action": "add"}}, "steer.pt")
```

Then name it: `lm_eval --model steered --model_args pretrained=…,steer_path=steer.pt --tasks …`.

## AISteer360

```python
from aisteer360.algorithms.state_control.caa.control import CAA, SteeringVector

steering = SteeringVector($type, {$layer: vector[None]})
control = CAA(steering_vector=steering, layer_id=$layer, token_scope="from_position", from_position=n - 1)
```

`steering.save("vector.svec")` writes the file that it reads. It has no place that is one token alone: what is generated
is steered as well, and without `token_scope` that only.
"""
CONTROLLED = """
## repeng

Version 0.4.0 wants a numpy below 2.

```python
from repeng import ControlModel, ControlVector

control = ControlModel(model, [$layer])
control.set_control(ControlVector.import_gguf("control-vector.gguf"))
```

## llama.cpp

`llama-cli -m model.gguf --control-vector control-vector.gguf`: the file names one block, the others stay as they are.
"""


def _has_control(card: Card) -> bool:
    """Say whether a control vector can say it: these are added, and the output of block 0 has no number there."""
    return card.mode == "add" and card.layer > 0


def _write_control(exported: Vector, path: Path) -> None:
    """Write the vector as llama.cpp and repeng read it: ``direction.N`` is added to the output of block N, from 0."""
    from gguf import GGUFWriter

    card = exported.card
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", card.model_type)
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_description(f"Made for the {card.place}; tools add it to {PLACES['every'][0]}: see {README}")
    writer.add_tensor(f"direction.{card.layer}", exported.vector.detach().float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def readme(exported: Vector) -> str:
    """Return the card as a model card of Hugging Face, with the lines that bring the vector into other tools."""
    card = exported.card
    head = {"license": "other", "tags": ["steering-vector", "task-vector", "sparse-autoencoder"]}
    head |= {"base_model": card.hub_name} if card.hub_name else {}
    rows = [f"| {words} | {card.losses[name]:.4f} | {who} |" for name, (words, who) in PLACES.items()
            if name in card.losses]  # fmt: skip
    code = {"own": card.hub_name or card.model, "type": card.model_type, "hook": card.module}
    text = {
        "title": card.task, "model": code["own"], "sae": card.sae, "mode": card.mode, "place": card.place,
        "module": card.module, "sha": card.model_sha256, "licence": card.licence,
    }  # fmt: skip
    words = {name: json.dumps(value) for name, value in code.items()}
    words |= {name: verbatim(value) for name, value in text.items()} | {
        "head": "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        "rows": "\n".join(rows), "width": len(exported.vector), "layer": card.layer, "next": card.layer + 1,
        "n_features": f"{len(card.features)} feature{'s' * (len(card.features) != 1)}",
        "bias": " and its bias" * card.bias, "scale": f"{card.scale:.2f}", "n": len(card.heldout),
        "begins": f"begins with {verbatim(card.bos)}, once, as its tokenizer writes it" if card.bos else "has no BOS",
        "loss": f"{card.loss:.4f}", "zero": f"{card.zero_shot_loss:.4f}",
    }  # fmt: skip
    return Template(WHAT + OTHERS * bool(card.module) + CONTROLLED * _has_control(card)).substitute(words)


def load(folder: str | Path, model=None, sae=None) -> Vector:
    """Read an exported folder and check it: its hash, its card, and its fit to a model and an SAE where given.

    Raises ExportError, in one sentence, if anything is missing, damaged or of another model.
    """
    folder = Path(folder).expanduser()
    try:
        data = (folder / VECTOR).read_bytes()
        record = json.loads((folder / CARD).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ExportError(f"There is no {error.filename}: name a folder with {VECTOR} and {CARD}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{folder} cannot be read ({error}): export the vector again.") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ExportError(f"{folder / CARD} is not a card of the format {FORMAT}: export the vector with this version.")
    if record.get("sha256") != hashlib.sha256(data).hexdigest():
        raise ExportError(f"{folder / VECTOR} does not match the hash on its card: take both from the same export.")
    card = _card(record, folder / CARD)
    try:
        tensors = load_tensors(data)
        vector, latents, weights = tensors["vector"], tensors["latents"], tensors["weights"]
    except (SafetensorError, KeyError) as error:
        raise ExportError(f"{folder / VECTOR} is damaged ({error}): export the vector again.") from None
    kinds = (vector.dtype, latents.dtype, weights.dtype) == (torch.float32, torch.int64, torch.float32)
    shapes = (vector.ndim, latents.ndim) == (1, 1) and latents.shape == weights.shape
    if not (kinds and shapes and vector.isfinite().all() and weights.isfinite().all()):
        raise ExportError(f"{folder / VECTOR} does not hold one vector of finite numbers: export it again.")
    found = Vector(vector, latents, weights, card)
    if model is not None:
        _check_model(found, folder, model)
    if sae is not None:
        _check_sae(found, folder, sae)
    return found


def _card(record: dict, path: Path) -> Card:
    kinds = {"str": str, "int": int, "float": (int, float), "bool": bool}
    fields = {}
    for one in dataclasses.fields(Card):
        kind = getattr(one.type, "__name__", str(one.type))
        value = record.get(one.name, {} if one.name == "losses" else one.default)  # an older card lacks some
        good = isinstance(value, kinds[kind]) if kind in kinds else isinstance(value, dict | list)
        if not good or (kind in ("int", "float") and not _finite(value)):
            raise ExportError(f"{path} has no usable {one.name!r}: export the vector again.")
        fields[one.name] = value
    pairs, features, losses = fields["heldout"], fields["features"], fields["losses"]
    good = isinstance(features, dict) and isinstance(losses, dict) and isinstance(pairs, list)
    good = good and all(map(_finite, [*features.values(), *losses.values()]))
    if not good or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise ExportError(f"{path} has no usable list of held-out pairs, features or losses: export the vector again.")
    return Card(**{**fields, "heldout": tuple(map(tuple, pairs))})


def _finite(value: object) -> bool:
    return type(value) in (int, float) and -math.inf < value < math.inf  # of integers of any size


def _check_model(found: Vector, folder: Path, model) -> None:
    if found.card.model_sha256 != model.sha256:
        raise ExportError(
            f"{folder} was made for other weights of {found.card.model!r} than those of {model.name!r} loaded here: "
            "load that model first."
        )
    if len(found.vector) != model.d_model or not 0 <= found.card.layer < model.n_layers:
        raise ExportError(f"{folder} does not fit {model.name!r}: it holds {len(found.vector)} numbers for block "
                          f"{found.card.layer}.")  # fmt: skip


def _check_sae(found: Vector, folder: Path, sae) -> None:
    if found.card.sae_sha256 != sae.sha256 or found.card.layer != sae.layer:
        raise ExportError(f"{folder} was made with another SAE ({found.card.sae}): load that set first.")
    if len(found.latents) and not 0 <= int(found.latents.min()) <= int(found.latents.max()) < sae.d_sae:
        raise ExportError(f"{folder / VECTOR} names a latent that {sae.name} doesn't have: export it again.")
    decoded = found.weights @ sae.W_dec[found.latents] + (sae.b_dec if found.card.bias else 0)
    if not torch.allclose(decoded, found.vector, rtol=1e-4, atol=1e-4 * float(found.vector.norm() + 1)):
        raise ExportError(f"{folder / VECTOR} holds a vector that its features don't add up to: export it again.")
