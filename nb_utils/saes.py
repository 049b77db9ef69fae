"""Sparse autoencoders by name, all seen as the same plain linear algebra on raw activations.

SAELens builds every SAE, from a configuration that we have read ourselves: it drops or defaults keys that it does not
know. Weights come from safetensors, or from the npz files of Gemma Scope; the few releases of SAELens's registry that
are pickles go through torch's restricted unpickler, which runs no code.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from nb_utils import files
from nb_utils.models import EMBEDDED, TINY, Model

SHIPPED, OTHER_MODEL = "NB_SAES", "NB_OTHER_MODEL"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
HUB_CACHE = re.compile(r"models--(?:[^/]+--)?([^/]+)/snapshots/[^/]+/?$")

LINEAR = {"W_enc", "b_enc", "W_dec", "b_dec"}
TENSORS = {
    "standard": LINEAR, "jumprelu": LINEAR | {"threshold"}, "gated": LINEAR - {"b_enc"} | {"b_gate", "b_mag", "r_mag"},
    "topk": LINEAR, "batchtopk": LINEAR | {"topk_threshold"}, "matryoshka_batchtopk": LINEAR | {"topk_threshold"},
}  # fmt: skip
ARCHITECTURES = tuple(TENSORS)
# Normalisations of the input that the weights don't hold, and what can be done.
FOLD = "needs what the SAE doesn't store: load it with SAELens, call {} with what its trainer kept in {}, save_model it"
PER_TOKEN = "depends on each token, which no fixed weights do: use an SAE without it"
NORMALISATIONS = {
    "expected_average_only_in": FOLD.format("fold_activation_norm_scaling_factor", "activation_scaler.json"),
    "covariance_whitening": FOLD.format("fold_activation_whitening", "activation_whitening.safetensors"),
    "layer_norm": PER_TOKEN, "constant_norm_rescale": PER_TOKEN, "constant_scalar_rescale": PER_TOKEN,
}  # fmt: skip
# Weights of other formats by file name: what they are, and what of SAELens to make of them.
SCOPE = "name its release (gemma-scope-…:layer_…), or put its arrays into JumpReLUSAE (apply_b_dec_to_input=False)"
FOREIGN = {
    "params.npz": f"params.npz, which is Gemma Scope's format: {SCOPE}",
    "params.safetensors": f"params.safetensors, which is Gemma Scope 2's format: {SCOPE}",
    "sae.safetensors": "sae.safetensors, which is EleutherAI's format (sparsify): put its tensors into TopKSAE (its k, "
    "apply_b_dec_to_input=True, W_enc=encoder.weight.T, b_enc=encoder.bias, W_dec and b_dec)",
    "ae.pt": "only ae.pt, and pickled weights are not loaded: if it is an AutoEncoder of dictionary_learning, read it "
    "with torch.load(…, weights_only=True) and put its tensors into StandardSAE (apply_b_dec_to_input=True, "
    "W_enc=encoder.weight.T, b_enc=encoder.bias, W_dec=decoder.weight.T, b_dec=bias)",
}


class SaeError(ValueError):
    """A sparse autoencoder that cannot be had or does not fit; the message is one line and says what to do."""

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


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
        return x.to(self.W_enc) @ self.W_enc + self.b_enc

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
        codes = codes.to(self.W_dec)
        return codes @ self.W_dec + self.b_dec if bias else codes @ self.W_dec

    def to(self, device: torch.device | str) -> "Sae":
        """Return the SAE on another device; itself where it is there already."""
        if self.W_dec.device == torch.device(device):
            return self
        own = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        own.pop("decoder_directions", None)  # computed again where it is asked for
        return replace(self, **own)


def load(model: Model, sae_set: str | Path, layer: int, allow_other_model: bool | None = None) -> Sae:
    """Load the SAE of a set that reads the output of block ``layer`` of ``model``.

    ``sae_set`` is one of
    - ``shipped``: the folder of the model's name in `shipped` (for ``tiny``: the same as ``random``);
    - ``random``: an untrained SAE built in memory, for tests;
    - a folder in SAELens format (``cfg.json``, ``sae_weights.safetensors``), or a folder of such folders;
    - a release of SAELens's registry, such as ``gemma-scope-2b-pt-res-canonical``, or ``release:sae_id``.

    The layer comes from each SAE's own hook name. Where a release has several SAEs for a layer, the narrowest is
    taken, of those the one whose published L0 is closest to 50, then the first by name; ``Sae.name`` says which. Where
    a folder has several (checkpoints, widths), one of them has to be named.

    ``allow_other_model`` takes an SAE that was trained on another model (None: if ``NB_OTHER_MODEL`` is 1). A model is
    known by its name, wherever its folder lies, and by the hash of its weights where the SAE states that.

    Raises SaeError, in one sentence, for an unknown set, a layer without SAE, a damaged file, an SAE whose function is
    not ours (see `from_saelens`), and one of another width or another model.
    """
    if _is_random(model, sae_set):
        return random(model, layer)
    catalogue = _catalogue(model, str(sae_set))
    named = not os.path.isdir(sae_set) and ":" in str(sae_set)  # one SAE of a release: it says itself what it reads
    if layer not in catalogue and not named:
        listed = ", ".join(map(str, sorted(catalogue))) or "no layer"
        raise SaeError(f"{str(sae_set)!r} has no residual-stream SAE for layer {layer}, only for {listed}.")
    source = str(sae_set) if named else catalogue[layer]
    if isinstance(source, str):
        sae, name, sha256 = _read_release(source), source, f"hub:{source}"
    elif len(source) > 1:
        listed = ", ".join(path.name for path in source[:5]) + ", ..." * (len(source) > 5)
        raise SaeError(
            f"{sae_set} has {len(source)} SAEs for layer {layer} ({listed}): name one of them, as {source[-1]}, or a "
            "folder with one for each layer."
        )
    else:
        sae, name, sha256 = _read_folder(source[0]), source[0].resolve().name, files.sha256(source[0] / WEIGHTS)
    ours = from_saelens(sae, name, str(sae_set), sha256)
    if ours.layer != layer:
        raise SaeError(
            f"{name} reads {ours.hook_name}, the output of block {ours.layer}, not of block {layer}: "
            f"name it so, and ask for layer {ours.layer}."
        )
    if allow_other_model is None:
        allow_other_model = os.environ.get(OTHER_MODEL) == "1"
    _check_fit(ours, sae.cfg.metadata, model, allow_other_model)
    return _centred(ours) if _reads_centred(sae.cfg.metadata, model) else ours


def shipped() -> Path:
    """Return the folder with the book's own SAEs: that of ``NB_SAES``, else the clone's.

    Raises SaeError where neither is here: an installed package has none.
    """
    named = os.environ.get(SHIPPED)
    if named and not os.path.isdir(named):
        raise SaeError(f"{SHIPPED} names {named!r}, and no such folder is here: set it to the folder saes of a clone.")
    if not named and files.CLONE is None:
        raise SaeError(
            f"The shipped SAEs do not come with the package: set {SHIPPED} to the folder saes of a clone of the book, "
            "or name a folder of SAEs or a release of SAELens's registry."
        )
    return Path(named or files.CLONE / "saes")


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
        raise SaeError(f"{name} {_normalised(cfg.normalize_activations)}.")
    switches = (cfg.apply_b_dec_to_input, getattr(cfg, "rescale_acts_by_decoder_norm", False))
    if not all(isinstance(switch, bool) for switch in switches):
        raise SaeError(
            f"{name} has {switches!r} for apply_b_dec_to_input and rescale_acts_by_decoder_norm: set them to true or "
            "false."
        )
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
            raise SaeError(f"{name} is a TopK SAE with a k of {k!r}, and it has {len(b_enc)} latents.")
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


def _catalogue(model: Model, sae_set: str) -> dict[int, list[Path] | str]:
    """Return {layer: SAELens folders, or "release:sae_id"} of a set."""
    if sae_set == "shipped":
        root = shipped()
        folder = root / _last(_place(model.name))
        if not folder.is_dir():
            found = {path.parents[1].name for path in root.glob(f"[!.]*/*/{CONFIG}")}
            known = f"those of {', '.join(sorted(found))}" if found else "none"
            raise SaeError(
                f"No SAEs are shipped for {model.name!r} ({root} has {known}): train some in a clone with "
                "`python -m workflow.train_saes`, or name a folder or a release of SAELens's registry."
            )
        return _folder_layers(folder)
    if os.path.isdir(sae_set):  # of a Path, a name too long for one is an OSError
        return _folder_layers(Path(sae_set))
    if os.path.isfile(sae_set):
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
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS, get_conversion_loader_name

    release, _, sae_id = source.partition(":")
    loader = NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(release)]

    def vetted(**where):
        config, tensors, sparsity = loader(**where)
        return *_vetted(source, config, tensors), sparsity

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on loading the model, which SAELens does not do here
            return SAE.from_pretrained(release, sae_id, converter=vetted)
    except SaeError:
        raise
    except Exception as error:  # hub, network, cache and file formats each have their own family of errors
        raise SaeError(
            f"{source} could not be loaded ({_reason(error)}): check your connection to the hub and that "
            "you accepted the SAE's terms there."
        ) from error


def _folder_layers(root: Path) -> dict[int, list[Path]]:
    """Return {layer: SAELens folders} of a folder with one SAE or with many (other hooks are left out)."""
    if (root / CONFIG).exists():
        config = _config(root)
        if not (root / WEIGHTS).is_file():
            raise SaeError(_weightless(root))
        return {_layer_of_hook(_hook_name(config), root): [root]}
    found: dict[int, list[Path]] = {}
    for folder in sorted(path.parent for path in root.glob(f"[!.]*/{CONFIG}")):
        if (layer := _block(_hook_name(_config(folder)))) is not None:
            found.setdefault(layer, []).append(folder)
    if not found:
        inside = [root, *sorted(path for path in root.glob("[!.]*") if path.is_dir())]
        foreign = [folder for folder in inside if any((folder / name).is_file() for name in FOREIGN)]
        if foreign:
            raise SaeError(_weightless(foreign[0]))
        raise SaeError(
            f"{root} holds no SAE on the residual stream: it should hold {CONFIG} and {WEIGHTS}, or "
            "folders with these."
        )
    return found


def _weightless(folder: Path) -> str:
    """Say what a folder holds in place of `WEIGHTS`."""
    inside = sorted(path.name for path in folder.iterdir())
    if known := [FOREIGN[name] for name in FOREIGN if name in inside]:
        return f"{folder} holds {known[0]}, of SAELens, with model_name and hook_name as metadata, and save_model it."
    pickles = [name for name in inside if name.endswith(PICKLES)]
    said = f"only {pickles[0]}, and pickled weights are not loaded" if pickles else "no weights"
    return f"{folder} holds {said}: save the SAE as {WEIGHTS}."


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaeError(f"{folder / CONFIG} is not JSON ({_reason(error)}): fetch the SAE again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata", {}), dict):
        raise SaeError(f"{folder / CONFIG} is not a configuration of SAELens: fetch the SAE again.")
    return config


def _hook_name(config: dict) -> object:
    # Before version 6 SAELens had no metadata section, and for a while another name for the hook.
    places = (config.get("metadata", {}).get("hook_name"), config.get("hook_name"), config.get("hook_point"))
    return next((place for place in places if place), None)


def _block(hook: object) -> int | None:
    """Return the block whose output a hook on the residual stream reads; None for any other hook."""
    match = HOOK.fullmatch(hook) if isinstance(hook, str) else None
    layer = int(match[1]) - (match[2] == "pre") if match else -1
    return layer if layer >= 0 else None


def _layer_of_hook(hook: object, where: object) -> int:
    if (layer := _block(hook)) is None:
        raise SaeError(
            f"{where} reads {hook!r}: only SAEs on blocks.L.hook_resid_post work here, or on "
            "hook_resid_pre of block 1 and up."
        )
    return layer


def _read_folder(folder: Path):
    """Read one SAELens folder; whatever is wrong with its files is a SaeError."""
    from sae_lens import SAE, TrainingSAE

    try:
        files.check(folder)
    except files.FileError as error:
        advice = f"fetch or train the SAE again, or delete its {files.MANIFEST} if you changed it yourself"
        raise SaeError(f"{error}: {advice}.") from error
    config = _config(folder)
    if not (folder / WEIGHTS).is_file():
        raise SaeError(_weightless(folder))
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    except Exception as error:  # a damaged file can fail anywhere inside the reader, with any type
        raise SaeError(f"{folder / WEIGHTS} is damaged ({_reason(error)}): fetch it again.") from error
    config, tensors = _vetted(folder, config, tensors)
    reader = TrainingSAE if config["architecture"].endswith("batchtopk") else SAE  # BatchTopK exists in training only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader.load_from_disk(folder, converter=lambda *_, **__: (config, tensors))
    except Exception as error:  # as many types as there are keys
        raise SaeError(
            f"{folder}: SAELens can't make the SAE that {CONFIG} describes of these weights ({_reason(error)}): take "
            "both files from one SAE."
        ) from error


def _vetted(where: object, config: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Return a configuration and weights that SAELens takes for what they are, on the CPU in float32.

    It drops or defaults every key that its class for an architecture lacks. Those that change the function are honoured
    here, or a SaeError names them.
    """
    config, tensors = {**config, "device": "cpu", "dtype": "float32"}, dict(tensors)
    if "metadata" in config:  # since version 6; without a version, SAELens takes a file for an older one
        config["metadata"] = {"sae_lens_version": "6.0.0", **config["metadata"]}
    elif config.get("architecture") in (None, "standard"):
        config["architecture"] = "topk" if "topk" in _activations(config) else "standard"
    if config.get("architecture") not in ARCHITECTURES:
        raise SaeError(_unknown_architecture(where, config.get("architecture")))
    if config.get("normalize_activations") in (None, False, True):
        config["normalize_activations"] = "expected_average_only_in" if config.get("normalize_activations") else "none"
    if config["architecture"] == "topk" and isinstance(given := config.get("activation_fn_kwargs") or {}, dict):
        config["k"] = config.get("k", given.get("k"))
        config["activation_fn_kwargs"] = {"k": config["k"], **given}
    if config["architecture"] == "jumprelu" and "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors and (tensors["scaling_factor"] == 1).all():  # was saved for a while, without use
        del tensors["scaling_factor"]
        config["finetuning_scaling_factor"] = False
    if objection := _objection(config, config["architecture"], set(tensors)):
        raise SaeError(f"{where} {objection}.")
    return config, tensors


def _activations(config: dict) -> set[str]:
    stated = (config.get("activation_fn"), config.get("activation_fn_str"))
    return {str(value).lower() for value in stated if value is not None}


def _objection(config: dict, architecture: str, tensors: set[str]) -> str | None:
    """Say what an SAE computes or holds that we don't; None where all is ours."""
    metadata, k = config.get("metadata", config), config.get("k")
    known = {"topk": {"topk"}, "jumprelu": {"relu", "jumprelu"}}.get(architecture, {"relu"})
    if others := _activations(config) - known:
        return (
            f"has the activation {min(others)!r} in a {architecture!r} SAE: those that work are ReLU (standard, gated, "
            "jumprelu) and TopK with its k (topk)"
        )
    if architecture == "topk":
        given = config.get("activation_fn_kwargs")
        if type(k) is not int or k < 1:
            return f"is a TopK SAE whose k is {k!r}: add the k that it was trained with to {CONFIG}"
        if not isinstance(given, dict) or given["k"] != k or any(given[key] for key in given if key != "k"):
            return f"is a TopK SAE with settings beside its k of {k} that we don't know, {given!r}: use another SAE"
    if architecture == "standard" and k is not None:
        return f"has a k of {k!r} and is no TopK SAE: if it is one, add \"architecture\": \"topk\" to {CONFIG}"
    rescaled = config.get("rescale_acts_by_decoder_norm")
    if rescaled and not architecture.endswith("topk"):
        return f"has codes in units of the decoder norm, which SAELens reads in no {architecture!r} SAE: take another"
    if rescaled is None and architecture.endswith("batchtopk"):
        return (
            "doesn't say whether its codes are in units of the decoder norm: add "
            f"\"rescale_acts_by_decoder_norm\": true or false to {CONFIG}, as it was trained"
        )
    if (how := config["normalize_activations"]) not in ("none", "expected_average_only_in"):  # a release has its factor
        return _normalised(how)
    if config.get("reshape_activations") not in (None, "none") or metadata.get("hook_head_index") is not None:
        return "reads single attention heads: only SAEs on the whole residual stream work here"
    if metadata.get("hook_name_out") not in (None, _hook_name(config)):
        return f"is a transcoder to {metadata['hook_name_out']!r}: only SAEs on the residual stream work here"
    if config.get("finetuning_scaling_factor") or tensors & {"scaling_factor", "finetuning_scaling_factor"}:
        return (
            "multiplies its codes by finetuning factors to decode them: multiply the rows of W_dec by these, leave out "
            f"their tensor, and set finetuning_scaling_factor to false in {CONFIG}"
        )
    if missing := TENSORS[architecture] - tensors:
        return f"is a {architecture!r} SAE without {', '.join(sorted(missing))}: take {CONFIG} and weights from one SAE"
    if more := tensors - TENSORS[architecture]:
        return f"has weights that a {architecture!r} SAE doesn't use ({', '.join(sorted(more)[:5])}): use another SAE"
    return None


def _check_fit(sae: Sae, metadata, model: Model, allow_other_model: bool) -> None:
    if sae.d_in != model.d_model:
        raise SaeError(
            f"{sae.name} reads vectors of width {sae.d_in}, but {model.name!r} has width {model.d_model}: "
            "use an SAE that was trained on this model."
        )
    if sae.layer >= getattr(model, "n_layers", sae.layer + 1):
        raise SaeError(f"{sae.name} reads block {sae.layer}, but {model.name!r} has {model.n_layers} blocks.")
    trained_on = str(metadata.model_name or "").strip()
    ours = EMBEDDED[model.name].hub_name if model.name in EMBEDDED else _place(model.name)
    same = metadata.model_sha256 is not None and metadata.model_sha256 == getattr(model, "sha256", None)
    if trained_on and not (allow_other_model or same or _plain(trained_on) == _plain(ours)):
        raise SaeError(
            f"{sae.name} was trained on {trained_on}, not on {model.name!r}: use an SAE of this model, "
            f"or set {OTHER_MODEL}=1 if you mean it (in Python: allow_other_model=True)."
        )


def _reads_centred(metadata, model: Model) -> bool:
    """Tell whether an SAE was trained without the stream's mean, which TransformerLens takes off before LayerNorms."""
    settings = metadata.model_from_pretrained_kwargs
    asked = isinstance(settings, dict) and settings.get("center_writing_weights")
    return bool(asked) and any(isinstance(module, torch.nn.LayerNorm) for module in model.hf.modules())


def _centred(sae: Sae) -> Sae:
    """Return an SAE that takes the mean off its input itself."""
    return dataclasses.replace(sae, W_enc=sae.W_enc - sae.W_enc.mean(0))


def _plain(model_name: str) -> str:
    """Reduce the names a model goes by (TransformerLens alias, hub name, folder) to one."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        model_name = get_official_model_name(model_name)
    except ValueError:
        pass  # unknown to TransformerLens: the last part of the name has to do
    return _last(model_name).lower().removesuffix("-pt").removeprefix("meta-")


def _place(model_name: str) -> str:
    return str(Path(model_name).resolve()) if os.path.isdir(model_name) else model_name


def _last(model_name: str) -> str:
    """Return the last part of a hub name, or what a model's folder is called, in the hub's cache too."""
    cached = HUB_CACHE.search(model_name)
    return cached[1] if cached else model_name.rstrip("/").rsplit("/", 1)[-1]


@torch.no_grad()
def _residual(model: Model, text: str, layer: int) -> Float[Tensor, "tokens d_model"]:
    """Return the output of a block on a text, BOS left out."""
    kept = []
    with model.layout.hooked(layer, kept.append):
        model.hf(model.tokenizer(text, return_tensors="pt").input_ids.to(model.device))
    return kept[0][0, 1:].float().cpu()


def _normalised(how: object) -> str:
    return f"normalises its input ({how!r}), which {NORMALISATIONS.get(str(how), 'is unknown here: use another SAE')}"


def _unknown_architecture(where: object, architecture: object) -> str:
    if architecture is None:
        return f"{where} names no architecture: add it to {CONFIG}, one of {', '.join(ARCHITECTURES)}."
    return f"{where} is a {architecture!r} SAE: the architectures that work are {', '.join(ARCHITECTURES)}."


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:160]}" if said else type(error).__name__
