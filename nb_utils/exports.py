"""Cleaned vectors as files: a folder with vector.safetensors and a card that says what they are and what they do."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from nb_utils import files

VECTOR, CARD = "vector.safetensors", "card.json"
FORMAT = "sparse-task-vector/1"


class ExportError(ValueError):
    """A vector that cannot be written or read; the message is one line and says what to do."""

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


@dataclass(frozen=True)
class Card:
    """What a vector is: where it is added and how, what it was made from, and the loss that it must reproduce.

    ``scale``: norm of the vector, relative to the mean residual norm at the held-out separators. ``loss``: mean over
    ``heldout`` (prompt, answer) of the NLL (nats) of the first two answer tokens, with the vector added to the output
    of block ``layer`` at the prompt's last token.
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
    for field in dataclasses.fields(Card):
        kind = getattr(field.type, "__name__", str(field.type))
        value = record.get(field.name, field.default)  # an older card may lack what has one
        good = isinstance(value, kinds[kind]) if kind in kinds else isinstance(value, dict | list)
        if not good or (kind in ("int", "float") and not _finite(value)):
            raise ExportError(f"{path} has no usable {field.name!r}: export the vector again.")
        fields[field.name] = value
    pairs, features = fields["heldout"], fields["features"]
    good = isinstance(features, dict) and all(map(_finite, features.values())) and isinstance(pairs, list)
    if not good or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise ExportError(f"{path} has no usable list of held-out pairs or features: export the vector again.")
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
