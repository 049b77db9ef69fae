"""Collect evidence for every latent of a set of SAEs: what it fires on in held-out text, what its direction promotes.

Run as ``python -m workflow.collect_evidence``. Only text that may be shown is read, in sequences that each lie in one
document; BOS is left out. All layers share one pass of the model. A killed run goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from nb_utils import files, models, saes, vectors
from nb_utils.models import Model, cache_dir
from nb_utils.prompts import begin, opening
from nb_utils.record import tables
from nb_utils.saes import Sae
from workflow import build_corpus
from workflow.train_saes import CONTEXT, harvest

WIDTH = CONTEXT - 1  # tokens of a sequence without BOS
SEQUENCES = 8  # at least, to a pass of the model: what it works on then stays in the cache of a core
EXAMPLES, PROMOTED = 5, 10
BEFORE, AFTER = 16, 8  # tokens shown around a firing one
STEM = "features"


class EvidenceError(ValueError):
    """Evidence that cannot be collected; the message says what to do."""


@dataclass(frozen=True)
class Text:
    """Sequences of held-out text, with what is needed to show a token where it stood."""

    documents: pd.DataFrame  # source, language, text
    offsets: list[np.ndarray]  # per document: characters [tokens, 2] of each token
    rows: Int[Tensor, "n context"]  # BOS first
    document: np.ndarray  # [n] which document
    start: np.ndarray  # [n] first token in that document


def showable(corpus: pd.DataFrame, tokenizer, n_tokens: int) -> Text:
    """Cut ``n_tokens`` of held-out, showable text into sequences, taken at even distances from all of it.

    A sequence never crosses into another document, so that each example has one source; what is left at the end of a
    document is dropped. Raises EvidenceError if there is not that much text.
    """
    documents = corpus[(corpus["split"] == "heldout") & corpus["showable"]].reset_index(drop=True)
    ids, offsets = [], []
    for at in range(0, len(documents), 500):
        batch = documents["text"].iloc[at : at + 500].tolist()
        read = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True)
        ids += [np.asarray(found, dtype=np.int64) for found in read["input_ids"]]
        offsets += [np.asarray(found, dtype=np.int32).reshape(-1, 2) for found in read["offset_mapping"]]
    first = 0 if opening(tokenizer) else 1  # without BOS, a token of the document stands before each sequence
    places = [
        (which, start) for which, found in enumerate(ids) for start in range(first, len(found) - WIDTH + 1, WIDTH)
    ]
    n = math.ceil(n_tokens / WIDTH)
    if n > len(places):
        raise EvidenceError(
            f"Only {len(places) * WIDTH:,} tokens of held-out text may be shown: ask for no more with --tokens."
        )
    document, start = np.array(places)[np.linspace(0, len(places) - 1, n).astype(int)].T
    rows = np.stack([ids[which][np.arange(at - 1, at + WIDTH)] for which, at in zip(document, start, strict=True)])
    rows = torch.from_numpy(begin(tokenizer, rows))
    return Text(documents[["source", "language", "text"]], offsets, rows, document, start)


def chunks(document: np.ndarray) -> Iterator[tuple[int, int]]:
    """Group sequences into runs of whole documents, at least SEQUENCES to a run (the last has what is left)."""
    first = 0
    for end in [*(np.flatnonzero(np.diff(document)) + 1), len(document)]:
        if end - first >= SEQUENCES or end == len(document):
            yield first, int(end)
            first = int(end)


@dataclass
class Tally:
    """What is known of the latents of one SAE so far; tokens are counted over all sequences, BOS left out."""

    fired: Int[Tensor, " d_sae"]  # tokens
    value: Float[Tensor, "examples d_sae"]  # largest activations of different documents, in falling order
    at: Int[Tensor, "examples d_sae"]  # their tokens, -1 where there is none

    @classmethod
    def empty(cls, d_sae: int) -> "Tally":
        return cls(
            torch.zeros(d_sae, dtype=torch.int64),
            torch.zeros(EXAMPLES, d_sae),
            torch.full((EXAMPLES, d_sae), -1),
        )

    def add(self, codes: Float[Tensor, "tokens d_sae"], first: int) -> None:
        """Take in the codes of one document, whose first token is number ``first``; equals keep the earlier one."""
        self.fired += (codes > 0).sum(0)
        value, at = codes.max(0, keepdim=True)
        value = torch.cat([self.value, value])
        at = torch.cat([self.at, torch.where(value[-1:] > 0, at + first, -1)])
        order = value.argsort(dim=0, descending=True, stable=True)[:EXAMPLES]
        self.value, self.at = value.gather(0, order), at.gather(0, order)


@torch.no_grad()
def collect(model: Model, loaded: list[Sae], text: Text, checkpoint: Path, every: float = 60) -> dict[int, Tally]:
    """Return a Tally per layer over all of ``text``, going on from ``checkpoint`` if it is there.

    ``checkpoint`` is written about each ``every`` seconds, and at the end. Chunks are the same in every run, and so
    are the tallies, killed or not.
    """
    tallies, done = {sae.layer: Tally.empty(sae.d_sae) for sae in loaded}, 0
    if stored := files.unsealed(checkpoint):
        state = safetensors.torch.load(stored)
        done = int(state["done"])
        tallies = {layer: Tally(*(state[f"{layer}.{key}"] for key in Tally.__annotations__)) for layer in tallies}
    saved = time.monotonic()
    with tqdm(total=text.rows.shape[0] * WIDTH, initial=done * WIDTH, unit="token", unit_scale=True) as bar:
        for first, end in chunks(text.document):
            if end <= done:
                continue
            activations = harvest(model.layout, text.rows[first:end].to(model.device), list(tallies))
            cuts = [0, *(np.flatnonzero(np.diff(text.document[first:end])) + 1), end - first]
            for sae in loaded:
                for a, b in pairwise(cuts):
                    codes = sae.encode(activations[sae.layer][a * WIDTH : b * WIDTH].float())
                    tallies[sae.layer].add(codes.cpu(), int(first + a) * WIDTH)
            bar.update((end - first) * WIDTH)
            if time.monotonic() - saved >= every or end == len(text.rows):
                _store(checkpoint, tallies, end)
                saved = time.monotonic()
    return tallies


def _store(checkpoint: Path, tallies: dict[int, Tally], done: int) -> None:
    state = {f"{layer}.{key}": value for layer, tally in tallies.items() for key, value in vars(tally).items()}
    files.seal(checkpoint, safetensors.torch.save(state | {"done": torch.tensor(done)}))


def lens(model: Model, sae: Sae, cache: Path) -> tuple[list, list]:
    """Return what all latents of an SAE promote and suppress, lists of {token, logit}, kept in a file of ``cache``.

    See `vectors.logit_lens`; it takes half a minute.
    """
    key = json.dumps([model.sha256, sae.sha256, str(model.dtype), PROMOTED])
    path = cache / f"lens.{hashlib.sha256(key.encode()).hexdigest()[:12]}.cached"
    stored = files.unsealed(path)
    if stored is None:
        both = vectors.logit_lens(model, sae.decoder_directions, PROMOTED)
        named = [[[{"token": token, "logit": rounded(logit, 2)} for token, logit in row] for row in rows]
                 for rows in both]  # fmt: skip
        stored = json.dumps(named).encode()
        files.seal(path, stored)
    up, down = json.loads(stored)
    return up, down


def rounded(value: float, digits: int) -> float:
    """Keep some significant digits: the tables are committed, and noise does not compress."""
    return float(f"{value:.{digits}g}")


def example(text: Text, at: int, activation: float) -> dict:
    """Return token number ``at`` as shown: text before it, itself and after it, within what the model saw.

    A token that is a part of a character is shown as the whole character.
    """
    row, column = divmod(at, WIDTH)
    which, start = text.document[row], text.start[row]
    offsets = text.offsets[which][start : start + WIDTH]
    a, b = offsets[column]
    left, right = offsets[max(0, column - BEFORE), 0], offsets[min(WIDTH - 1, column + AFTER), 1]
    document = text.documents.iloc[which]
    return {
        "before": document["text"][left:a], "token": document["text"][a:b], "after": document["text"][b:right],
        "activation": rounded(activation, 3), "source": document["source"], "language": document["language"],
    }  # fmt: skip


def frame(model: Model, sae: Sae, text: Text, tally: Tally, cache: Path) -> pd.DataFrame:
    """Return the evidence for one SAE, a row per latent."""
    promoted, suppressed = lens(model, sae, cache)
    examples = [
        [example(text, at, value) for at, value in zip(ats, values, strict=True) if at >= 0]
        for ats, values in zip(tally.at.T.tolist(), tally.value.T.tolist(), strict=True)
    ]
    n_tokens = len(text.rows) * WIDTH
    return pd.DataFrame(
        {
            "layer": sae.layer, "latent": np.arange(sae.d_sae), "n_tokens": n_tokens,
            "density": tally.fired.numpy() / n_tokens, "largest": tally.value[0].numpy(),
            "examples": examples, "promoted": promoted, "suppressed": suppressed,
        }
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--sae-set", default="shipped")
    parser.add_argument("--layers", help="with commas between (default: all that the set has)")
    parser.add_argument("--tokens", type=float, default=1e6, help="of held-out text")
    parser.add_argument("--out", type=Path, help="folder of tables (default: results/tables)")
    parser.add_argument("--checkpoint-seconds", type=float, default=60)
    args = parser.parse_args(argv)
    try:
        write(args)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def write(args: argparse.Namespace) -> None:
    """Collect the evidence for all layers asked for and write their tables."""
    corpus = build_corpus.read(cache_dir() / "corpus")
    model = models.load(args.model)
    asked = [int(layer) for layer in args.layers.split(",")] if args.layers else saes.layers(model, args.sae_set)
    loaded = [saes.load(model, args.sae_set, layer).to(model.device) for layer in asked]
    model = model.fast()  # after the SAEs: the random one depends on the model's precision
    text = showable(corpus.documents, model.tokenizer, int(args.tokens))
    del model.layout.blocks[max(sae.layer for sae in loaded) + 1 :]
    parameters = {
        "n_tokens": len(text.rows) * WIDTH, "context": CONTEXT, "dtype": str(model.dtype),
        "corpus_sha256": corpus.sha256,
    }  # fmt: skip
    hashes = {sae.layer: sae.sha256 for sae in loaded}
    key = json.dumps([parameters, model.sha256, hashes, EXAMPLES, SEQUENCES])
    name = f"{args.model.replace('/', '--')}.{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    cache = cache_dir() / "evidence"
    with files.alone(cache / name):  # a second process waits, and finds it done or goes on
        tallies = collect(model, loaded, text, cache / f"{name}.checkpoint", args.checkpoint_seconds)
        for sae in loaded:
            origin = tables.provenance(parameters, model.sha256, {sae.layer: sae.sha256})
            made = frame(model, sae, text, tallies[sae.layer], cache)
            print(tables.save(made, STEM, f"blocks.{sae.layer}", origin, args.out, args.model), flush=True)


if __name__ == "__main__":
    main()
