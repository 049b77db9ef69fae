"""Find every feature again in dictionaries that were trained otherwise: its best match by direction, by activation.

Run as ``python -m workflow.stability``, after `workflow.train_saes` has made the sets to compare with (``--sets``).
Held against each are the shipped set and, of as much text as theirs, ``first_seed``. Directions are compared by
cosine, activations by their correlation over held-out text, BOS left out.
"""

import argparse
import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from nb_utils import models, saes, scores
from nb_utils.models import cache_dir
from nb_utils.record import tables
from nb_utils.saes import CONFIG, Sae
from workflow import build_corpus
from workflow.measure_saes import ROWS, windows
from workflow.train_saes import CONTEXT, SHIPPED, harvest, token_stream

STEM, FIRSTS = "stability", (SHIPPED, "first_seed")
SETS = "first_seed,second_seed,frozen_decoder,frozen_encoder"


class StabilityError(ValueError):
    """Sets that cannot be compared; the message says what to do."""


@dataclass
class Moments:
    """Running sums of the codes of two dictionaries over the same tokens."""

    n: int
    first: Float[Tensor, "2 d_first"]  # of codes, of their squares
    second: Float[Tensor, "2 d_second"]
    both: Float[Tensor, "d_first d_second"]

    @classmethod
    def empty(cls, first: Sae, second: Sae) -> "Moments":
        sides = (torch.zeros(2, sae.d_sae, dtype=torch.float64) for sae in (first, second))
        return cls(0, *sides, torch.zeros(first.d_sae, second.d_sae))

    def add(self, first: Float[Tensor, "tokens d_first"], second: Float[Tensor, "tokens d_second"]) -> None:
        """Take in the codes of some tokens."""
        self.n += len(first)
        for side, codes in ((self.first, first), (self.second, second)):
            side += torch.stack([codes.double().sum(0), codes.double().square().sum(0)]).cpu()
        self.both += (first.T @ second).cpu()

    def correlations(self) -> Float[Tensor, "d_first d_second"]:
        """Return Pearson's correlation of every pair of latents; 0 where one of them never fires."""
        means, squares = zip(*((side / self.n) for side in (self.first, self.second)), strict=True)
        spread = [(square - mean.square()).clamp_min(0).sqrt() for mean, square in zip(means, squares, strict=True)]
        covariance = self.both.double() / self.n - means[0][:, None] * means[1]
        return (covariance / (spread[0][:, None] * spread[1])).nan_to_num(0, 0, 0)


@torch.no_grad()
def measure(model: models.Model, pairs: list[tuple[Sae, Sae]], rows: Tensor) -> list[Moments]:
    """Return the moments of pairs of dictionaries of one block over all tokens of ``rows`` [n, CONTEXT]."""
    found, layer = [Moments.empty(*pair) for pair in pairs], pairs[0][0].layer
    for batch in tqdm(rows.split(2 * ROWS), desc=f"block {layer}", unit="batch"):
        x = harvest(model.layout, batch.to(model.device), [layer])[layer].float()
        codes = {sae.sha256: sae.encode(x) for sae in {sae.sha256: sae for pair in pairs for sae in pair}.values()}
        for moments, (first, second) in zip(found, pairs, strict=True):
            moments.add(codes[first.sha256], codes[second.sha256])
    return found


def matches(first: Sae, second: Sae, moments: Moments) -> pd.DataFrame:
    """Return a row per latent of the first: its best match in the second by cosine, and by correlation."""
    cosine = (first.decoder_directions @ second.decoder_directions.T).max(1)
    correlation = moments.correlations().max(1)
    return pd.DataFrame({
        "latent": range(first.d_sae), "match": cosine.indices.tolist(), "cosine": cosine.values.tolist(),
        "match_active": correlation.indices.tolist(), "correlation": correlation.values.float().tolist(),
    })  # fmt: skip


def told(folder: Path) -> dict:
    """Return what the SAE of a folder says of its training: tokens, seed, the frozen part."""
    how = json.loads((folder / CONFIG).read_text())["metadata"]
    return {name: how.get(name) for name in ("training_tokens", "seed", "frozen")}


def write(args: argparse.Namespace) -> list[Path]:
    """Compare the sets that are here, and write a table for each block."""
    corpus = build_corpus.read(cache_dir() / "corpus")
    device = torch.device(models.placement())
    model = models.load(args.model, str(device), models.fast_dtype(device))
    rows = windows(token_stream(model, "heldout", corpus), math.ceil(args.tokens / (CONTEXT - 1)), model.tokenizer)
    home, names, written = saes.shipped(), args.sets.split(","), []
    place = args.model.rstrip("/").rsplit("/", 1)[-1]
    folders = {SHIPPED: home / place} | {name: home / "controls" / place / name for name in names}
    for layer in saes.layers(model, folders[SHIPPED]):
        here = {SHIPPED: saes.load(model, folders[SHIPPED], layer), **scores.controls(model, names, layer)}
        here = {name: sae.to(device) for name, sae in here.items()}
        compared = [(a, b) for a, b in product(FIRSTS, here) if a in here and b not in FIRSTS]
        if not compared:
            continue
        found = measure(model, [(here[a], here[b]) for a, b in compared], rows)
        table = pd.concat([
            matches(here[a], here[b], moments).assign(layer=layer, first=a, second=b)
            for (a, b), moments in zip(compared, found, strict=True)
        ])  # fmt: skip
        sets = {name: {**told(folders[name] / here[name].name), "sha256": here[name].sha256} for name in here}
        parameters = {"tokens": rows[:, 1:].numel(), "dtype": str(model.dtype), "corpus_sha256": corpus.sha256}
        origin = tables.provenance(parameters | {"sets": sets}, model.sha256, {layer: here[SHIPPED].sha256})
        written.append(tables.save(table, STEM, f"blocks.{layer}", origin, args.out, args.model))
    if not written:
        raise StabilityError(
            f"None of {', '.join(names)} is in {home / 'controls' / place}: train them first with "
            f"`python -m workflow.train_saes --sets {args.sets} --out {home / 'controls'}`."
        )
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=tables.MODEL)
    parser.add_argument("--sets", default=SETS, help="of workflow/dictionaries.yaml, with commas between them")
    parser.add_argument("--tokens", type=int, default=50_000, help="of held-out text")
    parser.add_argument("--out", type=Path, help="folder of tables (default: results/tables)")
    try:
        print(*write(parser.parse_args(argv)), sep="\n")
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
