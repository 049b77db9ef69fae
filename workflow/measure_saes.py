"""Measure the book's SAEs on held-out text; write a table, and from it a card beside each SAE.

Run as ``python -m workflow.measure_saes``. The model runs in its fastest dtype, which the card names, the SAEs in fp32.
BOS is left out everywhere.
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from nb_utils import files, models, saes
from nb_utils.layouts import Layout
from nb_utils.models import EMBEDDED, Model, cache_dir
from nb_utils.prompts import begin
from nb_utils.record import tables
from nb_utils.saes import Sae
from workflow import build_corpus
from workflow.train_saes import CONTEXT, harvest, token_stream

# What the project set out to reach: (column of the table, what it is, bound, whether it is an upper one).
TARGETS = (  # each at most that
    ("fvu", "Variance unexplained (FVU)", 0.12),
    ("l0_mean", "Active latents per token (L0), mean", 50),
    ("dead_share", "Latents that never fired", 0.02),
    ("ce_delta", "Loss added where the SAE is spliced in (nats)", 0.25),
)
EARLY, LOSS_ADDED_EARLY = 4, 0.35  # a block up to which more loss is allowed: all later blocks work on what it leaves
QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
ROWS = 32  # sequences to a pass of the model


def windows(stream: np.ndarray, n: int, tokenizer) -> Tensor:
    """Cut ``n`` sequences [n, CONTEXT] at even distances, so that each source has its share, and `begin` them."""
    width = CONTEXT - 1
    if len(stream) < n * width:
        raise ValueError(f"Only {len(stream):,} tokens are held out: ask for fewer than {n * width:,}.")
    starts = np.linspace(0, len(stream) - width, n).astype(int)
    rows = stream[starts[:, None] + np.arange(-1, width)].astype(np.int64)  # BOS takes the place of the token before
    return torch.from_numpy(begin(tokenizer, rows))


@dataclass
class Tally:
    """Running sums over the tokens that one SAE has seen."""

    sae: Sae
    mean: Tensor  # [d_in], an estimate, for the per-token measure only; the pooled one uses the exact mean
    n: int = 0
    total: Tensor | float = 0.0
    squares: float = 0.0
    error: float = 0.0
    fired: Tensor | float = 0.0
    l0: list = field(default_factory=list)
    token_fvu: list = field(default_factory=list)
    norms: list = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in raw activations [tokens, d_in]."""
        for part in x.float().split(2048):
            codes = self.sae.encode(part)
            error = (part - self.sae.decode(codes)).square().sum(1)
            on = codes > 0
            self.n += len(part)
            self.total += part.double().sum(0)
            self.squares += part.double().square().sum().item()
            self.error += error.double().sum().item()
            self.fired += on.sum(0)
            self.l0.append(on.sum(1))
            self.token_fvu.append(error / (part - self.mean).square().sum(1))
            self.norms.append(part.norm(dim=1))

    def result(self) -> dict:
        """Return the measures as columns of the table."""
        l0, density = torch.cat(self.l0).double(), self.fired.double() / self.n
        variance = self.squares - self.total.square().sum().item() / self.n
        return {
            "fvu": self.error / variance,
            "fvu_token_median": torch.cat(self.token_fvu).median().item(),
            "l0_mean": l0.mean().item(),
            "l0_median": l0.median().item(),
            "dead_share": (density == 0).double().mean().item(),
            **{f"density_p{100 * q:02.0f}": density.quantile(q).item() for q in QUANTILES},
            "density_max": density.max().item(),
            "residual_norm_median": torch.cat(self.norms).median().item(),
            "n_tokens": self.n,
        }


def spliced(layout: Layout, layer: int, replace):
    """Put ``replace(x)`` in place of the output ``x`` of a block at every position but BOS."""
    return layout.hooked(layer, lambda x: torch.cat([x[:, :1], replace(x[:, 1:]).to(x.dtype)], dim=1))


def losses(layout: Layout, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the loss [n, m], in fp32, of each next token ``targets`` [n, m] after final states [n, d_model].

    Softmax over 262,144 tokens is most of the time of a measurement: it runs in place, in one buffer.
    """
    buffer, out = None, []
    for part, wanted in zip(hidden.split(256), targets.split(256), strict=True):
        logits = layout.head(part)
        buffer = torch.empty_like(logits, dtype=torch.float32) if buffer is None else buffer
        logits = layout.finished(buffer[: len(part)].copy_(logits))
        top, right = logits.amax(1, keepdim=True), logits.gather(1, wanted)
        out.append(logits.sub_(top).exp_().sum(1, keepdim=True).log() + top - right)
    return torch.cat(out)


@torch.no_grad()
def cross_entropy(model: Model, rows: Tensor, advance=lambda: None) -> float:
    """Return the mean loss (nats) of all predictions of ``rows`` [n, CONTEXT] but that made at BOS."""
    total = 0.0
    for batch in rows.split(ROWS):
        hidden = model.layout.core(batch, use_cache=False).last_hidden_state[:, 1:-1].flatten(0, 1)
        total += losses(model.layout, hidden, batch[:, 2:].reshape(-1, 1)).double().sum().item()
        advance()
    return total / rows[:, 2:].numel()


@torch.no_grad()
def ablated_cross_entropy(model: Model, layer: int, vector: Tensor, rows: Tensor) -> float:
    """Return ``cross_entropy`` with the output of a block replaced by one vector at every position but BOS.

    Nothing of the text is left after that block: a prediction depends on its position alone, and one sequence
    has them all.
    """
    with spliced(model.layout, layer, lambda x: vector.expand_as(x)):
        hidden = model.layout.core(rows[:1], use_cache=False).last_hidden_state[0, 1:-1]
    return losses(model.layout, hidden, rows[:, 2:].T).double().mean().item()


def measure(model: Model, loaded: list[Sae], rows: Tensor, ce_rows: Tensor) -> pd.DataFrame:
    """Return a row per SAE: quality on ``rows``, loss with the SAE spliced in on ``ce_rows`` [n, CONTEXT]."""
    layers, device = sorted({sae.layer for sae in loaded}), model.device
    rows, ce_rows = rows.to(device), ce_rows.to(device)
    loaded = [sae.to(device) for sae in loaded]
    means = {layer: x.float().mean(0) for layer, x in harvest(model.layout, ce_rows, layers).items()}
    tallies = [Tally(sae, means[sae.layer]) for sae in loaded]
    with tqdm(total=len(rows) * (CONTEXT - 1), desc="activations", unit="token", unit_scale=True) as bar:
        for batch in rows.split(2 * ROWS):
            activations = harvest(model.layout, batch, layers)
            for tally in tallies:
                tally.add(activations[tally.sae.layer])
            bar.update(batch[:, 1:].numel())
    table = []
    with tqdm(total=(1 + len(loaded)) * math.ceil(len(ce_rows) / ROWS), desc="loss", unit="batch") as bar:
        clean = cross_entropy(model, ce_rows, bar.update)
        for tally in tallies:
            sae = tally.sae
            with spliced(model.layout, sae.layer, lambda x, sae=sae: sae.decode(sae.encode(x))):
                patched = cross_entropy(model, ce_rows, bar.update)
            mean = (tally.total / tally.n).to(model.dtype)
            zero = ablated_cross_entropy(model, sae.layer, torch.zeros_like(mean), ce_rows)
            to_mean = ablated_cross_entropy(model, sae.layer, mean, ce_rows)
            table.append(
                {
                    "model": model.name, "hook_name": sae.hook_name, "layer": sae.layer,
                    "architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, **tally.result(),
                    "ce_clean": clean, "ce_sae": patched, "ce_delta": patched - clean,
                    "ce_zero_ablation": zero, "ce_mean_ablation": to_mean,
                    "ce_recovered": (zero - patched) / (zero - clean),
                    "ce_recovered_mean_ablation": (to_mean - patched) / (to_mean - clean),
                    "n_tokens_ce": ce_rows[:, 2:].numel(), "context": CONTEXT,
                    "model_dtype": str(model.dtype).removeprefix("torch."),
                    "model_sha256": model.sha256, "sae_sha256": sae.sha256,
                }
            )
    return pd.DataFrame(table)


def card(row: dict, config: dict) -> str:
    """Write the card of an SAE from its row of the table and its SAELens configuration."""
    how, meta = config["metadata"], EMBEDDED.get(row["model"])
    details = how.get("training_architecture_details") or {}
    hub_name, licence = (meta.hub_name, meta.licence) if meta else (row["model"], "see its own page")
    trained = [
        f"{how.get('training_architecture') or row['architecture']} (SAELens {how.get('sae_lens_version')})",
        f"{how['training_tokens']:,} tokens of text" if how.get("training_tokens") else None,
        f"k = {details['k']}" if "k" in details else None,
        f"seed {how['seed']}" if how.get("seed") else None,
        f"the {how['frozen']} frozen as it was drawn" if how.get("frozen") else None,
        f"context {how['context_size']}" if how.get("context_size") else None,
        f"{how['icl_share']:.0%} of the later text made of x -> y prompts" if how.get("icl_share") else None,
    ]
    lines = [
        f"# SAE on `{row['hook_name']}` of {hub_name}",
        "",
        f"A {row['architecture']} sparse autoencoder on the output of block {row['layer']} "
        f"(width {row['d_in']}, {row['d_sae']:,} latents) in SAELens format, on raw activations.",
        f"Trained as {', '.join(part for part in trained if part)}.",
        "",
        "## Quality",
        "",
        f"On held-out text that no SAE was trained on: {row['n_tokens']:,} tokens, {row['n_tokens_ce']:,} "
        f"for the loss, in sequences of {row['context']}, BOS left out; the model in {row['model_dtype']}, "
        "the SAE in float32.",
        "",
        "| measure | value | target | |",
        "| --- | --- | --- | --- |",
    ]
    for column, what, bound in TARGETS:
        bound = LOSS_ADDED_EARLY if column == "ce_delta" and row["layer"] <= EARLY else bound
        met = "met" if row[column] <= bound else "**not met**"
        lines.append(f"| {what} | {row[column]:.3g} | at most {bound:g} | {met} |")
    others = {
        "Loss recovered against zero ablation": f"{row['ce_recovered']:.3g}",
        "Median FVU of a token": f"{row['fvu_token_median']:.3g}",
        "L0, median": f"{row['l0_median']:.0f}",
        "Loss: clean, with the SAE, zero ablation, mean ablation (nats)": ", ".join(
            f"{row[column]:.3f}" for column in ("ce_clean", "ce_sae", "ce_zero_ablation", "ce_mean_ablation")
        ),
        "Loss recovered against mean ablation": f"{row['ce_recovered_mean_ablation']:.3g}",
        "Density of the latents: 5th, 50th, 95th percentile, highest": ", ".join(
            f"{row[column]:.2g}" for column in ("density_p05", "density_p50", "density_p95", "density_max")
        ),
        "Median norm of the residual stream": f"{row['residual_norm_median']:,.0f}",
    }
    lines += [f"| {what} | {value} | | |" for what, value in others.items()]
    lines += [
        "",
        "FVU is the squared error over the squared deviation from the mean, both pooled over tokens. Loss "
        "recovered is (ablated - with the SAE) / (ablated - clean), the SAE at every position but BOS.",
        "",
        "## Terms",
        "",
        f"The weights were made from activations of {hub_name}; that model's terms apply: {licence}. "
        "The training text is listed with its licences in `saes/corpus.json`.",
        "",
        f"Weights: sha256 `{row['sae_sha256']}`. Model: sha256 `{row['model_sha256']}`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--folder", type=Path, help="folder of SAELens folders (default: saes/<model>)")
    parser.add_argument("--tokens", type=int, default=200_000, help="for FVU, L0 and dead latents")
    parser.add_argument("--ce-tokens", type=int, default=16_384, help="for the loss with the SAE spliced in")
    parser.add_argument("--out", type=Path, help="folder of tables (default: results/tables)")
    args = parser.parse_args()
    folder = args.folder or saes.shipped() / args.model
    try:
        corpus = build_corpus.read(cache_dir() / "corpus")
        device = torch.device(models.placement())
        model = models.load(args.model, str(device), models.fast_dtype(device))
        loaded = [saes.load(model, folder, layer) for layer in saes.layers(model, folder)]
        stream = token_stream(model, "heldout", corpus)
        rows = windows(stream, math.ceil(args.tokens / (CONTEXT - 1)), model.tokenizer)
        n_ce = min(len(rows), math.ceil(args.ce_tokens / (CONTEXT - 2)))
        ce_rows = rows[torch.linspace(0, len(rows) - 1, n_ce).long()]
        table = measure(model, loaded, rows, ce_rows)
        parameters = {"tokens": args.tokens, "ce_tokens": args.ce_tokens, "context": CONTEXT, "dtype": str(model.dtype)}
        parameters["corpus_sha256"] = corpus.sha256
        origin = tables.provenance(parameters, model.sha256, {sae.layer: sae.sha256 for sae in loaded})
        saved = tables.save(table, "saes", "quality", origin, args.out, args.model)
        for row, sae in zip(table.to_dict("records"), loaded, strict=True):
            place = folder if (folder / saes.CONFIG).exists() else folder / sae.name
            files.write(place / "README.md", card(row, json.loads((place / saes.CONFIG).read_text())).encode())
    except ValueError as error:
        raise SystemExit(str(error)) from error
    shown = ["layer", *(column for column, *_ in TARGETS), "fvu_token_median", "ce_recovered"]
    print(table[shown].to_string(index=False))
    print(f"Table: {saved}; a README.md beside each SAE in {folder}.")


if __name__ == "__main__":
    main()
