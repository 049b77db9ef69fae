"""Give every surviving feature a label made of evidence alone, and scores that say how far it can be trusted.

Run as ``python -m workflow.label_features``, after `workflow.collect_evidence` and the experiments. Documents of the
held-out text that may be shown are divided: one half makes the label, the other scores it. See `nb_utils.show.labels`
for what a label is made of and what its scores mean; every score is taken of shuffled labels as well.
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from nb_utils import engine, models, prompts, saes, tasks
from nb_utils.models import Model, cache_dir
from nb_utils.record import tables
from nb_utils.saes import Sae
from nb_utils.show import evidence, labels
from nb_utils.show.labels import Label
from workflow import build_corpus
from workflow.collect_evidence import SEQUENCES, WIDTH, Text, example, rounded, showable
from workflow.train_saes import harvest

STEM = "labels"
A_BIN = 8  # places of each quantile: of the half that makes the label, and of that which scores it
SHOWN = 2  # of each quantile on a feature's page
NEGATIVES = 80  # places where the feature is silent
WINDOW = 5  # tokens before a place that a context holds
STEER, TEXTS, OTHERS = 0.5, 8, 500  # mean norms added; passages; tokens of the vocabulary that words are held against
SCORES = ("detection", "intruder", "output", "prediction")


class Embedding:
    """Unit embeddings of tokens and of words, less the mean of the vocabulary."""

    def __init__(self, model: Model) -> None:
        self.rows = model.hf.get_input_embeddings().weight.detach().float().cpu().numpy()
        self.mean, self.tokenizer = self.rows.mean(0), model.tokenizer

    def of(self, ids) -> Float[np.ndarray, "n d"]:
        """Return the embeddings of tokens."""
        found = self.rows[np.asarray(ids, dtype=int)] - self.mean
        return found / np.linalg.norm(found, axis=-1, keepdims=True).clip(1e-9)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a word within a sentence."""
        return self.tokenizer(f" {text}", add_special_tokens=False).input_ids

    def words(self, words: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Return the mean embeddings of the tokens of words."""
        parts = [self.of(self.ids(one)).mean(0) for one in words if self.ids(one)]
        found = np.stack(parts) if parts else np.zeros((0, len(self.mean)))
        return found / np.linalg.norm(found, axis=-1, keepdims=True).clip(1e-9)


@dataclass(frozen=True)
class Seen:
    """Where one feature was looked at: flat token numbers, the makers of the label, its judges, and silent places."""

    makes: np.ndarray
    judges: np.ndarray
    silent: np.ndarray
    bins: dict[int, int]  # of every place where it fires, its quantile
    values: dict[int, float]


@torch.no_grad()
def codes(model: Model, loaded: dict[int, Sae], latents: dict[int, list[int]], text: Text) -> dict[int, np.ndarray]:
    """Return {layer: the codes of some latents at every token of the text, [tokens, latents]}."""
    found = {layer: [] for layer in loaded}
    for rows in tqdm(text.rows.split(4 * SEQUENCES), desc="activations", unit="batch"):
        streams = harvest(model.layout, rows.to(model.device), list(loaded))
        for layer, sae in loaded.items():
            found[layer].append(sae.encode(streams[layer].float())[:, latents[layer]].half().cpu().numpy())
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def looked_at(own: np.ndarray, half: np.ndarray, rng: np.random.Generator) -> Seen:
    """Draw places of a feature: as many of each quantile of its activations, in either half of the documents.

    ``own``: its codes at every token. ``half``: 0 where the document makes labels, 1 where it scores them.
    """
    fires = np.flatnonzero(own > 0)
    bins = dict(zip(fires.tolist(), labels.quantiles(own[fires]).tolist(), strict=True))

    def drawn(which: int) -> np.ndarray:
        parts = [fires[(half[fires] == which) & (labels.quantiles(own[fires]) == b)] for b in range(1, labels.BINS + 1)]
        return np.sort(np.concatenate([rng.permutation(part)[:A_BIN] for part in parts]))

    silent = np.flatnonzero((own <= 0) & (half == 1))
    silent = np.sort(rng.permutation(silent)[:NEGATIVES])
    makes, judges = drawn(0), drawn(1)
    return Seen(makes, judges, silent, bins, {at: float(own[at]) for at in makes})


def output_scores(
    model: Model, sae: Sae, latents: list[int], words: list[list[int]], seed: int = 0
) -> tuple[list[float], list[float]]:
    """Return how far a label's promoted words rise above other tokens when the feature is added to ordinary text.

    AUROC over the change of log probability, averaged over passages, of the words' tokens (``words``, a list a
    feature) against `OTHERS` tokens; second, with the words of another feature.
    """
    rng = random.Random(seed)
    shown = prompts.at_random(model.tokenizer, rng.sample(prompts.passages(), TEXTS), following=1)
    site = engine.Site.prepare(model, shown)
    unit = STEER * site.at(sae.layer).norm(dim=-1).mean().cpu() * sae.decoder_directions[latents]
    before = site.log_probs()[0]
    others = rng.sample(range(before.shape[-1]), min(OTHERS, before.shape[-1]))
    strangers = words[1:] + words[:1]
    own, shuffled = [], []
    for vector, mine, theirs in tqdm(list(zip(unit, words, strangers, strict=True)), desc=f"steered, {sae.layer}"):
        rise = (site.log_probs(vector[None].to(model.device), sae.layer)[0] - before).mean(0).cpu().numpy()
        own.append(labels.auroc(rise[mine], rise[others]))
        shuffled.append(labels.auroc(rise[theirs], rise[others]))
    return own, shuffled


def answers(embedding: Embedding) -> dict[str, np.ndarray]:
    """Return the mean embedding of the answers of every shipped task."""
    found = {}
    for name in tasks.names():
        mean = embedding.words([pair.y for pair in tasks.split(tasks.load(name)).vector]).mean(0)
        found[name] = mean / np.linalg.norm(mean)
    mean = np.mean(list(found.values()), axis=0)
    return {name: (one - mean) / np.linalg.norm(one - mean) for name, one in found.items()}


@dataclass(frozen=True)
class Reader:
    """The text, and what a place in it is: its token, the one that follows, its context."""

    text: Text
    ids: Int[np.ndarray, "tokens"]
    embedding: Embedding

    def tokens(self, places) -> list[str]:
        return [example(self.text, int(at), 0.0)["token"] for at in places]

    def before(self, place: int) -> range:
        """The places before one, as many as a context holds, of the same sequence."""
        return range(max(place - place % WIDTH, place - WINDOW), place)

    def documents(self, places) -> list[int]:
        return self.text.document[np.asarray(places, dtype=int) // WIDTH].tolist()

    def languages(self, places) -> list[str]:
        return self.text.documents["language"].iloc[self.documents(places)].tolist()

    def around(self, places) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The embeddings of each place's token, of those before it (zeros where there are none), and of the next."""
        places = np.asarray(places, dtype=int)
        before = np.zeros((len(places), WINDOW, len(self.embedding.mean)))
        for row, at in zip(before, places.tolist(), strict=True):
            if spots := self.before(at):
                row[: len(spots)] = self.embedding.of(self.ids[spots.start : spots.stop])
        following = self.ids[np.minimum(places + 1, len(self.ids) - 1)]
        return self.embedding.of(self.ids[places])[:, None], before, self.embedding.of(following)[:, None]

    def contexts(self, places) -> np.ndarray:
        """The mean embedding of a place and the tokens before it."""
        rows = [self.embedding.of(self.ids[self.before(at).start : at + 1]).mean(0) for at in map(int, places)]
        return np.stack(rows) if rows else np.zeros((0, len(self.embedding.mean)))


def scored(seen: list[Seen], named: list[Label], reader: Reader, rng: np.random.Generator) -> pd.DataFrame:
    """Return detection and intruder scores of the features of a block, and detection with shuffled labels.

    ``detection_strong``: of the strongest fifth of the activations alone, as most examples that are shown are.
    """
    vectors = [[reader.embedding.words(words) for words in (one.fires, one.behind, one.promotes)] for one in named]
    contexts = [reader.contexts(one.judges) for one in seen]
    found = []
    for i, one in enumerate(seen):
        at = {side: reader.around(getattr(one, side)) for side in ("judges", "silent")}
        spoken = {side: np.array(reader.languages(getattr(one, side))) for side in at}
        strong = np.array([one.bins[place] == labels.BINS for place in one.judges.tolist()], dtype=bool)
        row, other = {}, (i + 1 + int(rng.integers(max(1, len(seen) - 1)))) % len(seen)
        for name, which in (("detection", i), ("detection_shuffled", other)):
            language = named[which].language
            fires, silent = (
                labels.alike(vectors[which], at[side], (spoken[side] == language) & bool(language)) for side in at
            )
            known = bool(named[which] or language)
            row[name] = labels.auroc(fires, silent) if known else float("nan")
            if name == "detection":
                row["detection_strong"] = labels.auroc(fires[strong], silent) if known else float("nan")
        row["intruder"] = labels.intruder(contexts[i], contexts[other], rng)
        found.append(row | {"n_fires": len(one.bins), "n_judged": len(one.judges)})
    return pd.DataFrame(found)


def frame(
    model: Model, sae: Sae, features: list[evidence.Feature], own: np.ndarray, reader: Reader, goals: dict
) -> pd.DataFrame:
    """Return labels and scores of the features of one block, a row each."""
    rng = np.random.default_rng([0, sae.layer])
    half = np.repeat(reader.text.document % 2, WIDTH)
    everywhere = Counter(labels.word(token) for token in reader.tokens(range(0, len(reader.ids), 7)))
    spoken = pd.Series(reader.languages(range(0, len(reader.ids), 7))).value_counts(normalize=True)
    seen, named = [looked_at(own[:, i].astype(np.float32), half, rng) for i in range(len(features))], []
    for feature, one in zip(features, seen, strict=True):
        mass = None if feature.mass.empty else feature.mass.groupby("token_type")["mass"].mean()
        promoted = [token["token"] for token in feature.seen["promoted"]] if feature.seen else []
        tokens, languages = reader.tokens(one.makes), reader.languages(one.makes)
        before = [reader.tokens(reader.before(int(at))) for at in one.makes]
        within = reader.documents(one.makes)
        named.append(labels.made(tokens, languages, everywhere, promoted, mass, spoken, before, within))
    table = scored(seen, named, reader, rng)
    first = [[ids[0] for text in one.promotes if (ids := reader.embedding.ids(text))] for one in named]
    table["output"], table["output_shuffled"] = output_scores(model, sae, [f.latent for f in features], first)
    vectors = [reader.embedding.words(one.promotes) for one in named]
    for name, shift in (("prediction", 0), ("prediction_shuffled", 1)):
        table[name] = [
            labels.predicted(vectors[(i + shift) % len(vectors)], goals, _untouched(feature))
            for i, feature in enumerate(features)
        ]
    told = {name: [getattr(one, name) for one in named] for name in ("fires", "behind", "promotes")}
    return table.assign(
        layer=sae.layer, latent=[f.latent for f in features], label=[str(one) for one in named],
        quantiles=[_shown(one, reader) for one in seen], **{name: [list(x) for x in v] for name, v in told.items()},
    )  # fmt: skip


def _untouched(feature: evidence.Feature) -> pd.Series:
    """Return what the feature alone does to tasks that do not keep it, of which its label knows nothing."""
    tried = feature.steering[~feature.steering["task"].isin(set(feature.kept["task"]))]
    return tried.groupby("task")["rel_loss"].mean() if len(tried) else pd.Series(dtype=float)


def _shown(seen: Seen, reader: Reader) -> list[dict]:
    """Return examples of all quantiles, the strongest first."""
    places = sorted(seen.makes.tolist(), key=lambda at: (-seen.bins[at], -seen.values[at]))
    counted = Counter()
    found = []
    for at in places:
        counted[seen.bins[at]] += 1
        if counted[seen.bins[at]] <= SHOWN:
            found.append(example(reader.text, at, rounded(seen.values[at], 3)) | {"quantile": seen.bins[at]})
    return found


def write(args: argparse.Namespace) -> None:
    """Label the surviving features of every block and write a table for each."""
    corpus = build_corpus.read(cache_dir() / "corpus")
    model = models.load(args.model)
    features = evidence.load(args.model, args.out)
    if not features:
        raise evidence.EvidenceError("No feature survives: run experiments 02 and 04 first.")
    latents = {layer: [f.latent for f in features if f.layer == layer] for layer in sorted({f.layer for f in features})}
    loaded = {layer: saes.load(model, args.sae_set, layer).to(model.device) for layer in latents}
    text = showable(corpus.documents, model.tokenizer, int(args.tokens))
    found = codes(model.fast(), loaded, latents, text)
    embedding = Embedding(model)
    reader, goals = Reader(text, text.rows[:, 1:].flatten().numpy(), embedding), answers(embedding)
    stems = ("features", "02_cleanup_features", "04_detectors_features", *evidence.STEERING)
    inputs = {stem: tables.fingerprint(stem, args.model, args.out) for stem in stems}
    for layer, sae in loaded.items():
        own = [f for f in features if f.layer == layer]
        made = frame(model, sae, own, found[layer], reader, goals)
        parameters = {"n_tokens": len(reader.ids), "corpus_sha256": corpus.sha256, "a_bin": A_BIN, "steer": STEER}
        origin = tables.provenance(parameters, model.sha256, {layer: sae.sha256}, inputs)
        print(tables.save(made, STEM, f"blocks.{layer}", origin, args.out, args.model), flush=True)
        print(made[[*SCORES, *(f"{s}_shuffled" for s in SCORES if s != "intruder")]].mean().round(2).to_string())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=tables.MODEL)
    parser.add_argument("--sae-set", default="shipped")
    parser.add_argument("--tokens", type=float, default=2e5, help="of held-out text that may be shown")
    parser.add_argument("--out", type=Path, help="folder of tables (default: results/tables)")
    try:
        write(parser.parse_args(argv))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
