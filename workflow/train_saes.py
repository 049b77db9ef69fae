"""Train the book's SAEs: BatchTopK on several layers from one pass of the model, saved by SAELens as JumpReLU.

Run as ``python -m workflow.train_saes``. A run may be killed at any moment: started again, it continues from its last
checkpoint, with the same text in the same order.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from nb_utils import files, models
from nb_utils.models import cache_dir
from nb_utils.saes import CONFIG, WEIGHTS
from workflow import build_corpus

CONTEXT = 128  # tokens of a training sequence, BOS included
CHUNK = 512  # sequences harvested, shuffled and learned at a time: 65,536 tokens
BATCH = 2048  # tokens of a gradient step
DTYPE = models.fast_dtype(torch.device("cpu"))  # of matrix products
AUX_K, AUX_COEFFICIENT, DEAD_AFTER = 64, 1 / 32, 100_000  # dead-latent loss of Gao et al. 2024; tokens without firing


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

    @classmethod
    def fresh(cls, activations, d_sae, seed):
        """Start from tied random unit directions, with mean and scale taken from one chunk of activations."""
        generator = torch.Generator().manual_seed(seed)
        sample = activations.float()
        mean = sample.mean(0)
        scale = math.sqrt(sample.shape[1]) / (sample - mean).norm(dim=1).median()
        decoder = torch.nn.functional.normalize(torch.randn(d_sae, sample.shape[1], generator=generator))
        zeros = torch.zeros
        return cls.of(
            {"encoder": decoder.clone(), "decoder": decoder, "b_enc": zeros(d_sae), "b_dec": zeros(sample.shape[1]),
             "mean": mean, "scale": scale, "threshold": torch.tensor(0.0), "silent": zeros(d_sae)}
        )

    @classmethod
    def of(cls, state):
        own = {name: state[name] for name in cls.__dataclass_fields__ if name != "optimizer"}
        trained = [own[name].requires_grad_() for name in ("encoder", "decoder", "b_enc", "b_dec")]
        optimizer = torch.optim.Adam(trained, betas=(0.9, 0.999), fused=True)
        if "adam.0.step" in state:
            for i, parameter in enumerate(trained):
                moments = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: state[f"adam.{i}.{key}"] for key in moments}
        return cls(**own, optimizer=optimizer)

    def state(self):
        own = {name: getattr(self, name).detach() for name in self.__dataclass_fields__ if name != "optimizer"}
        for i, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            own |= {f"adam.{i}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return own

    @torch.no_grad()
    def step(self, x, k, lr, rng):
        """Learn one batch ``x`` [batch, d_in] of raw activations; return (variance unexplained, dead share)."""
        x = (x.float() - self.mean) * self.scale
        x16, encoder, decoder, b_enc = (t.to(DTYPE) for t in (x, self.encoder, self.decoder, self.b_enc))
        pre = x16 @ encoder.T + b_enc
        flat = pre.flatten()[int(rng.integers(16)) :: 16]
        cut = flat.float().topk(k * len(x) // 16, sorted=False).values.min().clamp_min(1e-6)
        acts = torch.where(pre > cut, pre, 0)
        fired = (acts > 0).any(0)
        self.silent.add_(len(x)).masked_fill_(fired, 0)
        rate = 0.01 if self.threshold > 0 else 1.0
        self.threshold += rate * (cut - self.threshold)

        error = (acts @ decoder).float() + self.b_dec - x
        # A few tokens are ten times as long as the rest; weighting by 1/length keeps them from owning the loss.
        weight = (math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True).clamp_min(1e-6)).clamp_max(1)
        g = (error * weight * (2 / len(x))).to(DTYPE)
        d_acts = torch.where(acts > 0, g @ decoder.T, 0)
        grads = [d_acts.T @ x16, acts.T @ g, d_acts.sum(0), g.float().sum(0)]
        dead = (self.silent > DEAD_AFTER).nonzero().squeeze(1)
        if len(dead):
            top = pre[:, dead].float().topk(min(AUX_K, len(dead)), sorted=False)
            aux = torch.zeros(len(x), len(dead)).scatter_(1, top.indices, top.values.relu())
            g_aux = (aux @ self.decoder[dead] + error) * weight * (2 * AUX_COEFFICIENT / len(x))
            d_aux = (g_aux @ self.decoder[dead].T) * (aux > 0)
            grads[0].index_add_(0, dead, (d_aux.T @ x).to(DTYPE))
            grads[1].index_add_(0, dead, (aux.T @ g_aux).to(DTYPE))
            grads[2].index_add_(0, dead, d_aux.sum(0).to(DTYPE))
        grads[1] = grads[1].float()
        grads[1] -= (grads[1] * self.decoder).sum(1, keepdim=True) * self.decoder  # unit rows: no gradient along them
        for parameter, grad in zip(self.optimizer.param_groups[0]["params"], grads, strict=True):
            parameter.grad = grad.float().contiguous()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))
        return (error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(), len(dead) / len(self.silent)

    @torch.no_grad()
    def folded(self):
        """Return SAELens weights that take and give raw activations, decoder rows of unit norm."""
        return {
            "W_enc": self.encoder.T.contiguous(),
            "b_enc": self.b_enc / self.scale - self.encoder @ self.mean,
            "W_dec": self.decoder,
            "b_dec": self.b_dec / self.scale + self.mean,
            "threshold": (self.threshold / self.scale).expand(len(self.b_enc)).contiguous(),
        }


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


def icl_prompts(tokenizer, rng, count):
    """Return ``count`` token lists of x -> y prompts made of vector- and training-split pairs only."""
    from nb_utils import tasks  # read when first needed: the first part of a training run needs none

    pools = [(*splits.vector, *splits.train) for splits in map(tasks.split, map(tasks.load, tasks.names()))]
    prompts = []
    for _ in range(count):
        pool = pools[rng.integers(len(pools))]
        order = rng.permutation(len(pool))[:40]
        text = "\n".join(f"{pool[i].x} -> {pool[i].answers[rng.integers(len(pool[i].answers))]}" for i in order)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    return prompts


def sequences(tokenizer, stream, index, icl_share):
    """Return chunk ``index`` of the training text as ids [CHUNK, CONTEXT], the same at every call."""
    width = CONTEXT - 1
    start = index * CHUNK * width
    rows = np.take(stream, np.arange(start, start + CHUNK * width), mode="wrap").reshape(CHUNK, width).astype(np.int64)
    rng = np.random.default_rng([7, index])
    n_icl = int(icl_share * CHUNK)
    if n_icl:
        prompts = [ids for ids in icl_prompts(tokenizer, rng, 2 * n_icl) if len(ids) >= width][:n_icl]
        for row, ids in zip(rng.permutation(CHUNK), prompts, strict=False):
            rows[row] = ids[:width]
    bos = np.full((CHUNK, 1), tokenizer.bos_token_id)
    return torch.from_numpy(np.concatenate([bos, rows], axis=1))


@torch.no_grad()
def harvest(hf, ids, layers):
    """Return {layer: residual stream after the block, [tokens, d_model]}, BOS excluded."""
    kept = {layer: [] for layer in layers}
    def keep(layer):
        return lambda module, args, out: kept[layer].append(
            (out[0] if isinstance(out, tuple) else out)[:, 1:].reshape(-1, hf.config.hidden_size)
        )

    handles = [hf.model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        for rows in ids.split(32):
            hf.model(rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def save(saes, args, tokens, model, corpus_sha256):
    """Write one SAELens folder per layer, with a manifest by which half of a new SAE and half of an old one is known.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, __version__

    for layer, sae in saes.items():
        hook = f"blocks.{layer}.hook_resid_post"
        target = Path(args.out) / args.model.rstrip("/").rsplit("/", 1)[-1] / hook
        d_sae, d_in = sae.encoder.shape
        trained = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(
                d_in=d_in, d_sae=d_sae, k=args.k, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False,
                normalize_activations="none",
            )
        )
        folded = sae.folded()
        trained.load_state_dict(
            {name: folded[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
            | {"topk_threshold": folded["threshold"][0].double()}
        )
        meta = trained.cfg.metadata
        embedded = models.EMBEDDED.get(args.model)
        meta.model_name, meta.hook_name = embedded.hub_name if embedded else args.model, hook
        meta.sae_lens_version = meta.sae_lens_training_version = __version__
        meta.training_tokens, meta.context_size, meta.prepend_bos = tokens, CONTEXT, True
        meta.model_sha256, meta.corpus_sha256, meta.icl_share = model.sha256, corpus_sha256, args.icl_share
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


def train(args):
    """Train, going on from the checkpoint of these settings if there is one, and save the SAEs."""
    layers = [int(layer) for layer in args.layers.split(",")]
    corpus = build_corpus.read(cache_dir() / "corpus")
    model = models.load(args.model, "cpu", DTYPE)
    del model.hf.model.layers[max(layers) + 1 :]
    settings = [args.d_sae, args.k, args.tokens, args.lr, args.icl_share, args.icl_from]
    settings += [model.sha256, corpus.sha256, layers, str(DTYPE)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    checkpoint = cache_dir() / "training" / f"{args.model.replace('/', '--')}.{key}.checkpoint"
    with files.alone(checkpoint.with_suffix(".training")):  # a second process waits, and finds it done or goes on
        stream = token_stream(model, "train", corpus)
        saes = learn(args, layers, model, stream, checkpoint)
        save(saes, args, chunks(args) * CHUNK * (CONTEXT - 1), model, corpus.sha256)


def chunks(args):
    """Return into how many chunks the tokens fall."""
    return math.ceil(args.tokens / CHUNK / (CONTEXT - 1))


def learn(args, layers, model, stream, checkpoint):
    """Return {layer: Sae} after all chunks; the checkpoint is written every few minutes, and at the end."""
    n_chunks = chunks(args)
    steps_a_chunk = CHUNK * (CONTEXT - 1) // BATCH
    chunk = CHUNK * (CONTEXT - 1)  # BOS is not trained on
    print(f"{len(stream):,} tokens of text; {n_chunks} chunks of {chunk:,}; layers {layers}", flush=True)
    saes, done = {}, 0
    if stored := files.unsealed(checkpoint):
        state = safetensors.torch.load(stored)
        done = int(state["done"])
        saes = {
            layer: Sae.of({k.removeprefix(f"{layer}."): v for k, v in state.items() if k.startswith(f"{layer}.")})
            for layer in layers
        }
        print(f"continuing after chunk {done}", flush=True)

    saved = time.time()
    for index in range(done, n_chunks):
        started = time.time()
        share = args.icl_share if index >= args.icl_from * n_chunks else 0
        activations = harvest(model.hf, sequences(model.tokenizer, stream, index, share), layers)
        harvested = time.time()
        report = []
        for layer, x in activations.items():
            if layer not in saes:
                saes[layer] = Sae.fresh(x, args.d_sae, seed=layer)
            rng = np.random.default_rng([layer, index])
            order = torch.from_numpy(rng.permutation(len(x)))
            for step in range(steps_a_chunk):
                at = (index * steps_a_chunk + step) / (n_chunks * steps_a_chunk)
                warm = min(1.0, (index * steps_a_chunk + step + 1) / 100)
                lr = args.lr * warm * min(1.0, (1 - at) / 0.3)
                fvu, dead = saes[layer].step(x[order[step * BATCH : (step + 1) * BATCH]], args.k, lr, rng)
            report.append(f"L{layer} {fvu:.3f}/{dead:.2f}")
        speed = CHUNK * (CONTEXT - 1) / (time.time() - started)
        pace = f"{speed:.0f} tok/s (harvest {harvested - started:.0f} s)"
        print(f"{index + 1}/{n_chunks} {pace} FVU/dead {' '.join(report)}", flush=True)
        if time.time() - saved > 60 * args.checkpoint_minutes or index + 1 == n_chunks:
            state = {f"{layer}.{key}": value for layer, sae in saes.items() for key, value in sae.state().items()}
            files.seal(checkpoint, safetensors.torch.save(state | {"done": torch.tensor(index + 1)}))
            saved = time.time()
    return saes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--layers", default="4,6,8,9,10,11,12,14")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=46, help="mean number of active latents")
    parser.add_argument("--tokens", type=float, default=2.8e6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--icl-share", type=float, default=0.05, help="share of x -> y prompts, from --icl-from on")
    parser.add_argument("--icl-from", type=float, default=0.25, help="part of the training after which they come in")
    parser.add_argument("--checkpoint-minutes", type=float, default=3)
    parser.add_argument("--out", default="saes")
    try:
        train(parser.parse_args(argv))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
