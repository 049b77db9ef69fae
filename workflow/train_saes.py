"""Train the book's SAEs: BatchTopK on several layers from one pass of the model, saved by SAELens as JumpReLU.

Run as ``python -m workflow.train_saes``, on a GPU if torch finds one (``NB_DEVICE``). A run may be killed at any
moment: started again, there or on another device, it continues from its last checkpoint, with the same text in the
same order.
workflow/dictionaries.yaml has the sets: the shipped one, and those that the book holds it against.

Why not SAELens's trainer: on two cores its step takes .9 s per SAE and 4,096 tokens (bf16 autocast; 1.2 s without),
mostly an exact top-k over 17 million numbers and dense autograd. The step below takes .22 s: the cut is estimated on
a sixteenth of the batch, gradients are written out, products run in bf16 over fp32 master weights (in fp32 where a
processor has no matrix units). Configuration, folding and file format stay SAELens's.
"""

import argparse
import hashlib
import json
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml

from nb_utils import files, models
from nb_utils.models import cache_dir
from nb_utils.prompts import begin, opening
from nb_utils.saes import CONFIG, WEIGHTS
from workflow import build_corpus

SETS = Path(__file__).with_name("dictionaries.yaml")
SHIPPED = "shipped"  # the set that lies in saes/<model> itself; others have a folder there
CONTEXT = 128  # tokens of a training sequence, BOS included
CHUNK = 512  # sequences harvested, shuffled and learned at a time: 65,024 tokens
BATCH = 2048  # tokens of a gradient step
# Dead-latent loss of Gao et al. 2024, four times as strong: with theirs a quarter of block 6's latents falls silent.
AUX_K, AUX_COEFFICIENT, DEAD_AFTER = 128, 1 / 8, 100_000  # the last: tokens without firing
PARTS = ("encoder", "decoder", "b_enc", "b_dec")


@dataclass(frozen=True)
class Spec:
    """What is to be trained: one SAE of a set. ``freeze``: "encoder" or "decoder" stays as it is drawn, "" neither."""

    set: str
    layer: int
    d_sae: int
    k: int  # mean number of active latents
    tokens: float
    lr: float
    seed: int = 0
    freeze: str = ""

    def __post_init__(self):
        if self.freeze not in ("", "encoder", "decoder"):
            raise ValueError(f"The set {self.set!r} freezes {self.freeze!r}: it can be the encoder or the decoder.")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"The set {self.set!r} has {self.d_sae} latents: {self.k} of them cannot be active.")

    @property
    def key(self) -> str:
        return f"{self.set}.{self.layer}"

    @property
    def chunks(self) -> int:
        """Into how many chunks its tokens fall."""
        return math.ceil(self.tokens / CHUNK / (CONTEXT - 1))


@dataclass
class Sae:
    """One SAE in training; weights live in normalised units, ``x_norm = (x - mean) * scale``."""

    encoder: torch.Tensor  # [d_sae, d_in]
    decoder: torch.Tensor  # [d_sae, d_in], unit rows
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    threshold: torch.Tensor
    silent: torch.Tensor  # tokens since each latent last fired
    optimizer: torch.optim.Adam
    trained: tuple[str, ...]
    dead: torch.Tensor | None = None  # latents that the dead-latent loss revives, listed anew for each chunk

    @classmethod
    def fresh(cls, activations, spec):
        """Start from tied random unit directions, with mean and scale taken from one chunk of activations."""
        generator = torch.Generator().manual_seed(spec.layer + 1000 * spec.seed)
        sample, device = activations.float(), activations.device
        mean = sample.mean(0)
        scale = math.sqrt(sample.shape[1]) / (sample - mean).norm(dim=1).median()
        drawn = torch.randn(spec.d_sae, sample.shape[1], generator=generator)
        decoder = torch.nn.functional.normalize(drawn).to(device)
        zeros = lambda n: torch.zeros(n, device=device)  # noqa: E731
        return cls.of(
            {"encoder": decoder.clone(), "decoder": decoder, "b_enc": zeros(spec.d_sae), "b_dec": zeros(len(mean)),
             "mean": mean, "scale": scale, "threshold": torch.tensor(0.0, device=device), "silent": zeros(spec.d_sae)},
            spec,
        )

    @classmethod
    def of(cls, state, spec):
        own = {name: state[name] for name in (*PARTS, "mean", "scale", "threshold", "silent")}
        trained = tuple(name for name in PARTS if name != spec.freeze)
        optimizer = torch.optim.Adam([own[name].requires_grad_() for name in trained], betas=(0.9, 0.999), fused=True)
        for name in trained if f"adam.{trained[0]}.step" in state else ():
            optimizer.state[own[name]] = {
                key: state[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return cls(**own, optimizer=optimizer, trained=trained)

    def state(self):
        own = {name: getattr(self, name).detach() for name in (*PARTS, "mean", "scale", "threshold", "silent")}
        for name in self.trained:
            own |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[getattr(self, name)].items()}
        return own

    def find_dead(self):
        """List the latents that have been silent for too long; every chunk, as a GPU has to wait for the answer."""
        self.dead = (self.silent > DEAD_AFTER).nonzero().squeeze(1)

    @torch.no_grad()
    def step(self, x, k, lr, rng):
        """Learn one batch ``x`` [batch, d_in] of raw activations; return the share of variance unexplained."""
        dtype = models.fast_dtype(x.device)  # of matrix products
        x = (x.float() - self.mean) * self.scale
        x16, encoder, decoder, b_enc = (t.to(dtype) for t in (x, self.encoder, self.decoder, self.b_enc))
        pre = torch.addmm(b_enc, x16, encoder.T)
        flat = pre.flatten()[int(rng.integers(16)) :: 16]
        cut = flat.float().topk(k * len(x) // 16, sorted=False).values.min().clamp_min(1e-6)
        acts = torch.where(pre > cut, pre, 0)
        fired = (acts > 0).any(0)
        self.silent.add_(len(x)).masked_fill_(fired, 0)
        self.threshold += torch.where(self.threshold > 0, 0.01, 1.0) * (cut - self.threshold)

        error = (acts @ decoder).float() + self.b_dec - x
        # A few tokens are ten times as long as the rest; weighting by 1/length keeps them from owning the loss.
        weight = (math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True).clamp_min(1e-6)).clamp_max(1)
        g = (error * weight * (2 / len(x))).to(dtype)
        d_acts = torch.where(acts > 0, g @ decoder.T, 0)
        grads = {"encoder": d_acts.T @ x16, "decoder": acts.T @ g, "b_enc": d_acts.sum(0), "b_dec": g.float().sum(0)}
        if len(self.dead):
            rows = decoder[self.dead]
            top = pre[:, self.dead].topk(min(AUX_K, len(self.dead)), sorted=False)
            aux = torch.zeros_like(pre[:, : len(self.dead)]).scatter_(1, top.indices, top.values.relu())
            g_aux = (((aux @ rows).float() + error) * weight * (2 * AUX_COEFFICIENT / len(x))).to(dtype)
            d_aux = (g_aux @ rows.T) * (aux > 0)
            grads["encoder"].index_add_(0, self.dead, d_aux.T @ x16)
            grads["decoder"].index_add_(0, self.dead, aux.T @ g_aux)
            grads["b_enc"].index_add_(0, self.dead, d_aux.sum(0))
        if "decoder" in self.trained:  # unit rows: no gradient along them
            grad = grads["decoder"] = grads["decoder"].float()
            grad -= (grad * self.decoder).sum(1, keepdim=True) * self.decoder
        for name in self.trained:
            getattr(self, name).grad = grads[name].float().contiguous()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if "decoder" in self.trained:
            self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))
        return error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()

    @torch.no_grad()
    def folded(self):
        """Return SAELens weights that take and give raw activations, decoder rows of unit norm, on the CPU."""
        found = {
            "W_enc": self.encoder.T,
            "b_enc": self.b_enc / self.scale - self.encoder @ self.mean,
            "W_dec": self.decoder,
            "b_dec": self.b_dec / self.scale + self.mean,
            "threshold": (self.threshold / self.scale).expand(len(self.b_enc)),
        }
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def token_stream(model, split, corpus):
    """Return the token ids of a split of the corpus [n], tokenised once into a cached file."""
    key = hashlib.sha256(f"{corpus.sha256} {model.sha256}".encode()).hexdigest()[:12]
    target = cache_dir() / "corpus" / f"{split}.{key}.tokens"
    stored = files.unsealed(target)
    if stored is None:
        documents = corpus.documents
        texts = documents.loc[documents["split"] == split, "text"].tolist()
        pieces = []
        for start in range(0, len(texts), 1000):
            batch = model.tokenizer([text + "\n\n" for text in texts[start : start + 1000]], add_special_tokens=False)
            pieces += [np.asarray(ids, dtype=np.int32) for ids in batch.input_ids]
        stored = np.concatenate(pieces).tobytes()
        files.seal(target, stored)
    return np.frombuffer(stored, dtype=np.int32)


@cache
def pools():
    """Return the vector- and training-split pairs of every shipped task."""
    from nb_utils import tasks  # read when first needed: the first part of a training run needs none

    return [(*splits.vector, *splits.train) for splits in map(tasks.split, map(tasks.load, tasks.names()))]


def icl_prompts(tokenizer, rng, count):
    """Return ``count`` token lists of x -> y prompts made of vector- and training-split pairs only."""
    prompts = []
    for _ in range(count):
        pool = pools()[rng.integers(len(pools()))]
        order = rng.permutation(len(pool))[:40]
        text = "\n".join(f"{pool[i].x} -> {pool[i].answers[rng.integers(len(pool[i].answers))]}" for i in order)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    return prompts


def sequences(tokenizer, stream, index, icl_share):
    """Return chunk ``index`` of the training text as ids [CHUNK, CONTEXT], the same at every call."""
    width = CONTEXT - 1
    starts = (index * CHUNK + np.arange(CHUNK)[:, None]) * width - 1  # of the token before, whose place BOS takes
    rows = np.take(stream, starts + np.arange(CONTEXT), mode="wrap").astype(np.int64)
    rng = np.random.default_rng([7, index])
    n_icl = int(icl_share * CHUNK)
    if n_icl:
        prompts = [ids for ids in icl_prompts(tokenizer, rng, 2 * n_icl) if len(ids) >= width][:n_icl]
        for row, ids in zip(rng.permutation(CHUNK), prompts, strict=False):
            rows[row, 1:] = ids[:width]
    return torch.from_numpy(begin(tokenizer, rows))


@torch.no_grad()
def harvest(layout, ids, layers):
    """Return {layer: residual stream after the block, [tokens, d_model]}, BOS excluded."""
    kept = {layer: [] for layer in layers}
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layout.hooked(layer, lambda x, to=kept[layer]: to.append(x[:, 1:].flatten(0, 1))))
        for rows in ids.split(32 if ids.device.type == "cpu" else CHUNK):
            layout.core(rows, use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def save(saes, specs, args, model, corpus_sha256):
    """Write one SAELens folder per SAE, with a manifest by which half of a new SAE and half of an old one is known."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, __version__

    for spec in specs:
        hook = f"blocks.{spec.layer}.hook_resid_post"
        folder = Path(args.out) / args.model.rstrip("/").rsplit("/", 1)[-1]
        target = (folder if spec.set == SHIPPED else folder / spec.set) / hook
        folded = saes[spec.key].folded()
        d_sae, d_in = folded["W_dec"].shape
        trained = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(
                d_in=d_in, d_sae=d_sae, k=spec.k, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False,
                normalize_activations="none",
            )
        )
        trained.load_state_dict(
            {name: folded[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
            | {"topk_threshold": folded["threshold"][0].double()}
        )
        meta = trained.cfg.metadata
        embedded = models.EMBEDDED.get(args.model)
        meta.model_name, meta.hook_name = embedded.hub_name if embedded else args.model, hook
        meta.sae_lens_version = meta.sae_lens_training_version = __version__
        meta.training_tokens, meta.context_size = spec.chunks * CHUNK * (CONTEXT - 1), CONTEXT
        meta.prepend_bos = bool(opening(model.tokenizer))
        meta.model_sha256, meta.corpus_sha256, meta.icl_share = model.sha256, corpus_sha256, args.icl_share
        meta.seed, meta.frozen, meta.lr = spec.seed, spec.freeze or None, spec.lr
        with tempfile.TemporaryDirectory() as scratch:
            trained.save_inference_model(scratch)
            weights = safetensors.torch.load_file(Path(scratch, WEIGHTS))
            # SAELens takes the names from a set, whose order changes from one process to the next
            config = json.dumps(json.loads(Path(scratch, CONFIG).read_text()), indent=1, sort_keys=True).encode()
        # Directions keep 11 bits, which moves FVU by less than 1e-4; biases and thresholds are large and stay fp32.
        weights = {name: w.half() if name.startswith("W_") else w.float() for name, w in weights.items()}
        files.write(target / WEIGHTS, safetensors.torch.save(weights))
        files.write(target / CONFIG, config)
        files.describe(target, [CONFIG, WEIGHTS])
        print(f"saved {target}", flush=True)


def specs(args):
    """Return what is to be trained: the SAEs of the sets asked for, as the file has them or the command line says."""
    known = yaml.safe_load(SETS.read_text())
    found = []
    for name in args.sets.split(","):
        if name not in known:
            raise ValueError(f"There is no set {name!r} in {SETS.name}: it has {', '.join(known)}.")
        given = {**known[SHIPPED], **known[name]}
        own = ("d_sae", "k", "tokens", "lr")
        given |= {key: value for key in own if (value := getattr(args, key)) is not None}
        layers = given.pop("layers") if args.layers is None else [int(layer) for layer in args.layers.split(",")]
        given.pop("layers", None)
        given |= {key: float(given[key]) for key in ("tokens", "lr")}  # YAML takes 34e6 for a word
        found += [Spec(set=name, layer=layer, **given) for layer in layers]
    return found


def train(args):
    """Train, going on from the checkpoint of these settings if there is one, and save the SAEs."""
    wanted = specs(args)
    corpus = build_corpus.read(cache_dir() / "corpus")
    device = torch.device(models.placement())
    model = models.load(args.model, str(device), models.fast_dtype(device))
    del model.layout.blocks[max(spec.layer for spec in wanted) + 1 :]
    settings = [[asdict(spec) for spec in wanted], args.icl_share, args.icl_from, model.sha256, corpus.sha256]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    checkpoint = cache_dir() / "training" / f"{args.model.replace('/', '--')}.{key}.checkpoint"
    with files.alone(checkpoint.with_suffix(".training")):  # a second process waits, and finds it done or goes on
        stream = token_stream(model, "train", corpus)
        rows = lambda index, share: sequences(model.tokenizer, stream, index, share)  # noqa: E731
        try:
            saes = learn(wanted, args, model.layout, rows, checkpoint)
        except RuntimeError as error:  # the device is gone, or its memory is full
            if device.type == "cpu":
                raise
            raise ValueError(
                f"{device} failed ({str(error).splitlines()[0][:160]}): call again to go on from the last checkpoint, "
                "with NB_DEVICE=cpu if it stays away."
            ) from error
        save(saes, wanted, args, model, corpus.sha256)


def learn(specs, args, layout, rows, checkpoint):
    """Return {key: Sae} after all chunks; the checkpoint is written every few minutes, and at the end.

    ``rows(index, share)`` gives the ids [CHUNK, CONTEXT] of a chunk, of which ``share`` are x -> y prompts. One pass of
    the model serves all SAEs; one of fewer tokens is done earlier.
    """
    n_chunks = max(spec.chunks for spec in specs)
    steps_a_chunk = CHUNK * (CONTEXT - 1) // BATCH
    chunk = CHUNK * (CONTEXT - 1)  # BOS is not trained on
    layers, device = sorted({spec.layer for spec in specs}), layout.head.weight.device
    print(f"{n_chunks} chunks of {chunk:,} tokens; {len(specs)} SAEs after blocks {layers}, on {device}", flush=True)
    saes, done = {}, 0
    if stored := files.unsealed(checkpoint):
        state = {name: tensor.to(device) for name, tensor in safetensors.torch.load(stored).items()}
        done = int(state["done"])
        for spec in specs:
            start = f"{spec.key}/"
            saes[spec.key] = Sae.of(
                {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}, spec
            )
        print(f"continuing after chunk {done}", flush=True)

    started = saved = said = time.time()
    with ThreadPoolExecutor(1) as ahead:  # the text of the next chunk is put together beside the training
        share = lambda index: args.icl_share if index >= args.icl_from * n_chunks else 0  # noqa: E731
        text = ahead.submit(rows, done, share(done))
        for index in range(done, n_chunks):
            ids = text.result().to(device)
            if index + 1 < n_chunks:
                text = ahead.submit(rows, index + 1, share(index + 1))
            activations = harvest(layout, ids, layers)
            report = []
            for spec in specs:
                if index < spec.chunks:
                    x = activations[spec.layer]
                    sae = saes.get(spec.key) or saes.setdefault(spec.key, Sae.fresh(x, spec))
                    report.append((spec.key, _learn_chunk(sae, spec, x, index, steps_a_chunk), len(sae.dead)))
            last = index + 1 == n_chunks
            if last or time.time() - said > args.report_seconds:
                pace = (index + 1 - done) * chunk / (time.time() - started)
                shown = " ".join(f"{key} {fvu.item():.3f}/{dead}" for key, fvu, dead in report)
                print(f"{index + 1}/{n_chunks} {pace:,.0f} tok/s FVU/dead {shown}", flush=True)
                said = time.time()
            if time.time() - saved > 60 * args.checkpoint_minutes or last:
                state = {"done": torch.tensor(index + 1)}
                for key, sae in saes.items():
                    state |= {f"{key}/{name}": value.cpu() for name, value in sae.state().items()}
                files.seal(checkpoint, safetensors.torch.save(state))
                saved = time.time()
    return saes


def _learn_chunk(sae, spec, x, index, steps):
    """Learn one chunk of activations in a random order; return the variance unexplained in its last batch."""
    rng = np.random.default_rng([spec.layer + 1000 * spec.seed, index])
    order = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    sae.find_dead()
    for step in range(steps):
        at = (index * steps + step) / (spec.chunks * steps)
        warm = min(1.0, (index * steps + step + 1) / 100)
        lr = spec.lr * warm * min(1.0, (1 - at) / 0.3)
        fvu = sae.step(x[order[step * BATCH : (step + 1) * BATCH]], spec.k, lr, rng)
    return fvu


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--sets", default=SHIPPED, help="of workflow/dictionaries.yaml, with commas between them")
    parser.add_argument("--layers", help="blocks, in place of those of the set")
    parser.add_argument("--d-sae", type=int, help="width, in place of that of the set")
    parser.add_argument("--k", type=int, help="mean number of active latents, likewise")
    parser.add_argument("--tokens", type=float, help="tokens to train on, likewise")
    parser.add_argument("--lr", type=float, help="peak of Adam's rate, likewise")
    parser.add_argument("--icl-share", type=float, default=0.05, help="share of x -> y prompts, from --icl-from on")
    parser.add_argument("--icl-from", type=float, default=0.2043, help="part of the training after which they come in")
    parser.add_argument("--checkpoint-minutes", type=float, default=3)
    parser.add_argument("--report-seconds", type=float, default=10, help="between lines of the log")
    parser.add_argument("--out", default="saes")
    try:
        train(parser.parse_args(argv))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
