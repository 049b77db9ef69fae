"""Sparse autoencoders by name, all seen as the same plain linear algebra on raw activations.

SAELens reads every file. Weights come from safetensors, or from the npz files of Gemma Scope; the few
releases of SAELens's registry that are pickles go through torch's restricted unpickler, which runs no code.
"""

import difflib
import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import files
from nb_utils.models import EMBEDDED, TINY, Model

SHIPPED = Path(__file__).resolve().parents[1] / "saes"
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "batchtopk", "matryoshka_batchtopk")
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


class SaeError(ValueError):
    """A sparse autoencoder that cannot be had or does not fit; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Sae:
    """One SAE on the residual stream, in raw activation units, float32.

    ``layer`` is the block whose output the SAE reads (``hook_resid_pre`` of block L is the output of L-1).
    ``threshold`` is 0 for a plain ReLU; ``k`` is set only for TopK. Whatever the file stores apart (a bias
    taken off the input, decoder norms on the codes, a gate) is folded in: the five tensors are the whole SAE.
    ``sha256`` identifies the weights in the provenance of a table.
    """

    name: str
    sae_set: str
    hook_name: str
    layer: int
    architecture: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]
    k: int | None
    sha256: str

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @cached_property
    def decoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder rows at unit norm; a row of zeros stays zero."""
        return torch.nn.functional.normalize(self.W_dec, dim=1)

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return what the activation function is applied to, for raw activations ``x``."""
        return x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc

    def act(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Apply the SAE's own activation; the gradient is 1 where a latent fires and 0 elsewhere."""
        if self.k is None:
            return torch.where(pre > self.threshold, pre.relu(), 0)
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the codes of raw activations ``x``."""
        return self.act(self.pre_activations(x))

    def decode(self, codes: Float[Tensor, "*batch d_sae"], bias: bool = True) -> Float[Tensor, "*batch d_in"]:
        """Return the raw activations that ``codes`` stand for, with or without the decoder bias."""
        return codes @ self.W_dec + self.b_dec if bias else codes @ self.W_dec


def load(model: Model, sae_set: str | Path, layer: int, allow_other_model: bool = False) -> Sae:
    """Load the SAE of a set that reads the output of block ``layer`` of ``model``.

    ``sae_set`` is one of
    - ``shipped``: the folder ``saes/<model name>/`` of this project (for ``tiny``: the same as ``random``);
    - ``random``: an untrained SAE built in memory, for tests;
    - a folder in SAELens format (``cfg.json``, ``sae_weights.safetensors``), or a folder of such folders;
    - a release of SAELens's registry, such as ``gemma-scope-2b-pt-res-canonical``, or ``release:sae_id``.

    The layer comes from each SAE's own hook name. Where a set has several SAEs for a layer, the narrowest is
    taken, of those the one whose published L0 is closest to 50, then the first by name. Raises SaeError, in
    one sentence, for an unknown set, a layer without SAE, a damaged file, an architecture or hook that we do
    not handle, and an SAE of another width or another model (``allow_other_model`` waives the last).
    """
    if _is_random(model, sae_set):
        return random(model, layer)
    catalogue = _catalogue(model, str(sae_set))
    if layer not in catalogue:
        listed = ", ".join(map(str, sorted(catalogue))) or "no layer"
        raise SaeError(f"{str(sae_set)!r} has no residual-stream SAE for layer {layer}, only for {listed}.")
    source = catalogue[layer]
    if isinstance(source, Path):
        sae, name, sha256 = _read_folder(source), source.name, files.sha256(source / WEIGHTS)
    else:
        sae, name, sha256 = _read_release(source), source, f"hub:{source}"
    ours = from_saelens(sae, name, str(sae_set), sha256)
    if ours.layer != layer:
        raise SaeError(
            f"{name} reads {ours.hook_name}, the output of block {ours.layer}, not of block {layer}: "
            "name the SAE that you want as release:sae_id."
        )
    _check_fit(ours, sae.cfg.metadata.model_name, model, allow_other_model)
    return ours


def layers(model: Model, sae_set: str | Path = "shipped") -> tuple[int, ...]:
    """List the layers of ``model`` for which a set has an SAE; raises SaeError as ``load`` does."""
    if _is_random(model, sae_set):
        return tuple(range(model.n_layers))
    return tuple(sorted(_catalogue(model, str(sae_set))))


def random(model: Model, layer: int, d_sae: int = 64, seed: int = 0) -> Sae:
    """Build an untrained SAE: random unit directions, tied encoder, each latent on for 1/8 of the tokens.

    At the default width about 8 latents fire on a residual. Raises SaeError when there is no such layer.
    """
    if layer not in range(model.n_layers):
        raise SaeError(f"{model.name!r} has no layer {layer}: it has layers 0 to {model.n_layers - 1}.")
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (24, 8), generator=generator)
    words = [bytes(row).decode() for row in letters.tolist()]
    text = "\n".join(f"{word[:4]} -> {word[4:]}" for word in words)
    x = _residual(model, text, layer)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, model.d_model, generator=generator), dim=1)
    mean = x.mean(0)
    pre = (x - mean) @ W_dec.T
    tensors = {
        "W_enc": W_dec.T.contiguous(), "b_enc": -(W_dec @ mean), "W_dec": W_dec, "b_dec": mean,
        "threshold": pre.quantile(7 / 8, dim=0).clamp_min(0),
    }
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    hook = f"blocks.{layer}.hook_resid_post"
    return Sae(
        name=f"random.{hook}", sae_set="random", hook_name=hook, layer=layer, architecture="jumprelu", k=None,
        sha256=digest.hexdigest(), **tensors,
    )


@torch.no_grad()
def from_saelens(sae, name: str, sae_set: str, sha256: str) -> Sae:
    """View an SAE of SAELens that is in memory as ours; its encode and decode are the same functions.

    A gated SAE becomes a JumpReLU one: as both paths share their weights, the gate ``x W + b_gate > 0`` is a
    threshold on the magnitude ``exp(r) x W + b_mag`` (Rajamanoharan et al. 2024, arXiv 2404.16014). BatchTopK
    counts as SAELens saves it for use, with the threshold that it learned in training. Raises SaeError for
    other architectures, other hooks, unfolded normalisation and weights that are not finite.
    """
    cfg, architecture = sae.cfg, sae.cfg.architecture()
    if architecture not in ARCHITECTURES:
        raise SaeError(_unknown_architecture(name, architecture))
    layer = _layer_of_hook(cfg.metadata.hook_name, name)
    if cfg.normalize_activations != "none":
        raise SaeError(
            f"{name} normalises its input ({cfg.normalize_activations!r}) by numbers that it doesn't store: "
            "fold them in with SAELens (fold_activation_norm_scaling_factor) and save the SAE again."
        )
    switches = (cfg.apply_b_dec_to_input, getattr(cfg, "rescale_acts_by_decoder_norm", False))
    if not all(isinstance(switch, bool) for switch in switches):
        raise SaeError(f"{name} is damaged: a true/false setting in its configuration is {switches!r}.")
    W_enc, W_dec, b_dec = sae.W_enc.detach().float(), sae.W_dec.detach().float(), sae.b_dec.detach().float()
    b_enc = (sae.b_mag if architecture == "gated" else sae.b_enc).detach().float()
    threshold, k = torch.zeros_like(b_enc), None
    if architecture == "gated":
        gain = sae.r_mag.detach().float().exp()
        W_enc, threshold = W_enc * gain, b_enc - gain * sae.b_gate.detach().float()
    elif architecture == "jumprelu":
        threshold = sae.threshold.detach().float()
    elif architecture == "topk":
        k = cfg.k
        if not isinstance(k, int) or not 0 < k <= len(b_enc):
            raise SaeError(f"{name} is damaged: its k is {k!r}, and it has {len(b_enc)} latents.")
    elif architecture != "standard":
        threshold = sae.topk_threshold.float().expand_as(b_enc)
    if switches[1]:  # codes are in units of the decoder norm: fold it in, so that rows have norm 1
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if switches[0]:  # the bias taken off the input; a threshold is on the result, so it stays
        b_enc = b_enc - b_dec @ W_enc
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SaeError(f"{name} is damaged: it holds weights that are not finite numbers; fetch it again.")
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    return Sae(
        name=name, sae_set=sae_set, hook_name=cfg.metadata.hook_name, layer=layer, architecture=architecture,
        k=k, sha256=sha256, **tensors,
    )


def _is_random(model: Model, sae_set: str | Path) -> bool:
    return str(sae_set) == "random" or (str(sae_set) == "shipped" and model.name == TINY)


def _catalogue(model: Model, sae_set: str) -> dict[int, Path | str]:
    """Return {layer: SAELens folder, or "release:sae_id"} of a set."""
    if sae_set == "shipped":
        folder = SHIPPED / model.name.rstrip("/").rsplit("/", 1)[-1]
        if not folder.is_dir():
            shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("[!.]*/"))) or "no model yet"
            raise SaeError(
                f"No SAEs are shipped for {model.name!r} (but for {shipped}): train some with "
                "`python -m workflow.train_saes`, or name a folder or a release of SAELens's registry."
            )
        return _folder_layers(folder)
    if Path(sae_set).is_dir():
        return _folder_layers(Path(sae_set))
    if Path(sae_set).is_file():
        raise SaeError(f"{sae_set} is a file: name the folder that holds {CONFIG} and {WEIGHTS}.")
    release, _, sae_id = sae_set.partition(":")
    registry = _registry()
    if release not in registry:
        near = ", ".join(difflib.get_close_matches(release, registry, 3, 0))
        raise SaeError(
            f"Unknown SAE set {sae_set!r}: use 'shipped', 'random', a folder in SAELens format, or one of "
            f"the {len(registry)} releases of SAELens's registry (the nearest are {near})."
        )
    if sae_id and sae_id not in registry[release].saes_map:
        near = ", ".join(difflib.get_close_matches(sae_id, registry[release].saes_map, 3, 0))
        raise SaeError(f"Release {release!r} has no SAE {sae_id!r}: the nearest are {near}.")
    return _release_layers(registry[release], sae_id)


def _registry():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def _release_layers(entry, sae_id: str = "") -> dict[int, str]:
    """Choose one SAE for each layer by what the registry says of it: its id, its path, its L0."""
    ranked = {}
    for candidate, path in entry.saes_map.items():
        if sae_id in ("", candidate) and (layer := _layer_of_id(candidate)) is not None:
            width = re.search(r"width_(\d+)(k|m)", candidate)
            width = int(width[1]) * {"k": 1, "m": 1000}[width[2]] if width else 0
            in_path = re.search(r"average_l0_(\d+)", path)
            l0 = entry.expected_l0.get(candidate) or (int(in_path[1]) if in_path else 0)
            rank = (width, abs(l0 - 50), candidate)
            ranked[layer] = min(rank, ranked.get(layer, rank))
    return {layer: f"{entry.release}:{rank[-1]}" for layer, rank in ranked.items()}


def _layer_of_id(sae_id: str) -> int | None:
    """Guess the block whose output an SAE of a release reads; the metadata of the SAE has the last word."""
    if hook := re.match(r"blocks\.(\d+)\.hook_", sae_id):
        residual = HOOK.match(sae_id)
        layer = int(hook[1]) - (residual[2] == "pre") if residual else -1
        return layer if layer >= 0 else None
    number = re.search(r"layer_?(\d+)", sae_id) or re.match(r"l(\d+)r_", sae_id)
    return int(number[1]) if number else None


def _read_release(source: str):
    from sae_lens import SAE

    release, _, sae_id = source.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on loading the model, which SAELens does not do here
            return SAE.from_pretrained(release, sae_id)
    except Exception as error:  # hub, network, cache and file formats each have their own family of errors
        raise SaeError(
            f"{source} could not be loaded ({_reason(error)}): check your connection to the hub and that "
            "you accepted the SAE's terms there, or use the set 'shipped'."
        ) from error


def _folder_layers(root: Path) -> dict[int, Path]:
    """Return {layer: SAELens folder} of a folder with one SAE or with many (other hooks are left out)."""
    if (root / CONFIG).exists():
        return {_layer_of_hook(_hook_name(_config(root)), root): root}
    ranked = {}
    for folder in sorted(path.parent for path in root.glob(f"[!.]*/{CONFIG}")):
        config = _config(folder)
        try:
            layer = _layer_of_hook(_hook_name(config), folder)
        except SaeError:
            continue
        width = config.get("d_sae")
        rank = (width if isinstance(width, int) else 0, folder.name, folder)
        ranked[layer] = min(rank, ranked.get(layer, rank))
    if not ranked:
        raise SaeError(
            f"{root} holds no SAE on the residual stream: it should hold {CONFIG} and {WEIGHTS}, or "
            "folders with these."
        )
    return {layer: rank[-1] for layer, rank in ranked.items()}


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaeError(f"{folder / CONFIG} is not JSON ({_reason(error)}): fetch the SAE again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata", {}), dict):
        raise SaeError(f"{folder / CONFIG} is not a configuration of SAELens: fetch the SAE again.")
    return config


def _hook_name(config: dict) -> object:
    # Before version 6 SAELens had no metadata section, and for a while another name for the hook.
    places = (config.get("metadata", {}).get("hook_name"), config.get("hook_name"), config.get("hook_point"))
    return next((place for place in places if place), None)


def _layer_of_hook(hook: object, where: object) -> int:
    match = HOOK.fullmatch(hook) if isinstance(hook, str) else None
    layer = int(match[1]) - (match[2] == "pre") if match else -1
    if layer < 0:
        raise SaeError(
            f"{where} reads {hook!r}: only SAEs on blocks.L.hook_resid_post work here, or on "
            "hook_resid_pre of block 1 and up."
        )
    return layer


def _read_folder(folder: Path):
    """Read one SAELens folder; whatever is wrong with its files is a SaeError."""
    config, weights = _config(folder), folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        said = f"only {pickles[0]}, and pickled weights are not loaded" if pickles else "no weights"
        raise SaeError(f"{folder} holds {said}: save the SAE as {WEIGHTS}.")
    architecture = config.get("architecture") or "standard"
    if architecture not in ARCHITECTURES:
        raise SaeError(_unknown_architecture(folder, architecture))
    try:
        files.check(folder)
    except files.FileError as error:
        advice = f"fetch or train the SAE again, or delete its {files.MANIFEST} if you changed it yourself"
        raise SaeError(f"{error}: {advice}.") from error
    from sae_lens import SAE, TrainingSAE

    reader = TrainingSAE if architecture.endswith("batchtopk") else SAE  # BatchTopK exists in training only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader.load_from_disk(folder, dtype="float32")
    except Exception as error:  # a damaged file can fail anywhere inside the readers, with any type
        raise SaeError(f"{folder} is damaged ({_reason(error)}): fetch it again.") from error


def _check_fit(sae: Sae, trained_on: object, model: Model, allow_other_model: bool) -> None:
    if sae.d_in != model.d_model:
        raise SaeError(
            f"{sae.name} reads vectors of width {sae.d_in}, but {model.name!r} has width {model.d_model}: "
            "use an SAE that was trained on this model."
        )
    if sae.layer >= getattr(model, "n_layers", sae.layer + 1):
        raise SaeError(f"{sae.name} reads block {sae.layer}, but {model.name!r} has {model.n_layers} blocks.")
    ours = EMBEDDED[model.name].hub_name if model.name in EMBEDDED else model.name
    if trained_on is not None and not allow_other_model and _plain(str(trained_on)) != _plain(ours):
        raise SaeError(
            f"{sae.name} was trained on {trained_on}, not on {model.name!r}: use an SAE of this model, "
            "or pass allow_other_model=True if you mean it."
        )


def _plain(model_name: str) -> str:
    """Reduce the names a model goes by (TransformerLens alias, hub name, folder) to one."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        model_name = get_official_model_name(model_name)
    except ValueError:
        pass  # unknown to TransformerLens: the last part of the name has to do
    return model_name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-pt")


@torch.no_grad()
def _residual(model: Model, text: str, layer: int) -> Float[Tensor, "tokens d_model"]:
    """Return the output of a block on a text, BOS left out."""
    kept = []
    with model.layout.hooked(layer, kept.append):
        model.hf(model.tokenizer(text, return_tensors="pt").input_ids.to(model.device))
    return kept[0][0, 1:].float().cpu()


def _unknown_architecture(where: object, architecture: object) -> str:
    return f"{where} is a {architecture!r} SAE: the architectures that work are {', '.join(ARCHITECTURES)}."


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:160]}" if said else type(error).__name__
