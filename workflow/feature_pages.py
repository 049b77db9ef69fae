"""Write a page for every surviving feature, and a page that lists them, into book/features.

Run as ``python -m workflow.feature_pages``, before the book is built. The pages come from the tables alone.
"""

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from nb_utils import files
from nb_utils.record import tables
from nb_utils.show import evidence, plots
from nb_utils.show.evidence import Feature

FOLDER = tables.ROOT / "book/features"
CORPUS = tables.ROOT / "saes/corpus.json"
# Hundreds of pages have no place in the side bar: it names their list alone.
SHORT = "<style>.bd-sidebar-primary .toctree-l1.current > :is(ul, details) { display: none }</style>"


def page(feature: Feature) -> str:
    """Return the page of a feature as MyST: headings, and blocks of HTML that no parser looks into."""
    parts = [
        f"# {feature.title}",
        evidence.block(f"{SHORT}<p>{evidence.summary(feature)}</p>"),
        evidence.block(evidence.label(feature)),
        evidence.block(f"<p>Vectors that keep it: {evidence.kept(feature)}.</p>"),
        "## Where it fires",
        evidence.block(evidence.density(feature)),
        evidence.block(evidence.examples(feature)),
        "Weaker activations say more about a feature than its strongest do: examples of all fifths of its activations "
        "follow, 5/5 the strongest.",
        evidence.block(evidence.quantiles(feature)),
        "## What its direction promotes",
        evidence.block(evidence.promoted(feature)),
        "The decoder direction through the final norm and the unembedding, less its mean over the vocabulary. "
        "This is not a causal test.",
        "## Token types in few-shot prompts",
        evidence.block(evidence.mass(feature)),
        "## Tasks it helps and harms",
        evidence.block(evidence.steering(feature)),
        "Scale is in units of the mean residual norm at the steered token, chosen on validation prompts; losses and "
        "accuracy are on test prompts. The random direction is the best on these, which favours it.",
        "## How far to trust the label",
        evidence.block(evidence.scores(feature)),
        "The label is made of evidence alone, from half of the documents; the other half scores it. Detection, output "
        "and prediction are areas under the ROC curve.",
        evidence.block(evidence.stability(feature)),
        "[All features](index.md), with the sources of the text",
    ]
    return "\n\n".join(parts) + "\n"


def index(features: Sequence[Feature], sources: Sequence[dict]) -> str:
    """Return the page that lists all features, by block, and names the sources of the text with their licences."""
    parts = [
        "# Features",
        f"The {len(features)} features that cleaned and pruned vectors keep, and those that experiment 05 steers with. "
        "A feature's number is its place in the SAE of its block. *Alone* is what it does to the loss of the task that "
        "it helps most, added at its best scale. Labels are made of evidence alone; *detection* says how well a label "
        "tells where the feature fires (0.50 is chance), *again* how near to its direction an SAE of another seed "
        "comes (a cosine)."
        if features
        else "There are no features yet: experiments 02 and 04 find them.",
    ]
    if features:
        parts.append(
            evidence.block(f'{SHORT}<p><label>Show only rows with <input type="search" id="nb-filter"></label> '
                   "(click on a column's name to sort)</p>")
        )  # fmt: skip
        parts.append(evidence.block(_summary(features)))
    for layer in sorted({feature.layer for feature in features}):
        rows = [_row(feature) for feature in features if feature.layer == layer]
        heads = ["feature", "label", "kept in the vector of", "alone", "detection", "again"]
        parts += [f"## Block {layer}", evidence.block(evidence.table(heads, rows, "nb-sortable"))]
    parts += [
        "## Sources of the text",
        "Examples are quoted from text that no SAE was trained on. Its sources, as the packages name them:",
        evidence.block(evidence.table(["source", "version", "language", "licence"], _sources(sources))),
        "Text under a CC BY-SA licence is quoted under that licence, credited to the contributors of its source.",
    ]
    if features:
        parts.append(evidence.block('<script src="../../_static/features.js"></script>'))
    return "\n\n".join(parts) + "\n"


def _summary(features: Sequence[Feature]) -> str:
    """Return a table of one row a block: how many features there are, and what is known of them in the middle."""
    rows = []
    for layer in sorted({feature.layer for feature in features}):
        own = [feature for feature in features if feature.layer == layer]
        kinds = [sum(kind in set(feature.kept["kind"]) for feature in own) for kind in evidence.SOURCES]
        tried = [feature.steering["rel_loss"].min() for feature in own if len(feature.steering)]
        named = [feature.label["detection"] for feature in own if feature.label]
        again = [feature.again["cosine"] for feature in own if feature.again]
        middle = [f"{pd.Series(found).median():.2f}" if found else "–" for found in (named, again)]
        helps = f"{sum(change < 0 for change in tried)} of {len(tried)}" if tried else "no causal test"
        rows.append([f'<a href="#block-{layer}">{layer}</a>', *map(str, kinds), helps, *middle])
    heads = ["block", *(f"{kind}s" for kind in evidence.SOURCES), "help alone", "detection", "again"]
    return evidence.table(heads, rows, "nb-brief")


def _row(feature: Feature) -> list[str]:
    best = feature.steering.sort_values("rel_loss", kind="stable").head(1).to_dict("records")
    helps = [f"{evidence.percent(r['rel_loss'])} {evidence.show(plots.title(r['task']))}" for r in best]
    label, again = feature.label or {}, feature.again or {}
    return [
        f'<a href="{feature.name}.html">{feature.latent}</a>',
        evidence.show(label.get("label", "no label")),
        evidence.kept(feature, most=2),
        "".join(helps) or "no causal test",
        evidence.share(label.get("detection")),
        evidence.share(again.get("cosine")),
    ]


def _sources(sources: Sequence[dict]) -> list[list[str]]:
    """Return a row per package and licence of the text that may be shown."""
    languages = {}
    for source in sources:
        if source["showable"]:
            key = (source["package"], source["version"], source["licence"])
            languages.setdefault(key, []).append(source["language"])
    return [
        [escape(package), escape(version), escape(", ".join(sorted(found))), escape(licence)]
        for (package, version, licence), found in sorted(languages.items())
    ]


def write(features: Sequence[Feature], sources: Sequence[dict], folder: Path = FOLDER) -> int:
    """Write all pages, remove those of features that are no longer there, and return how many pages there are."""
    pages = {f"{feature.name}.md": page(feature) for feature in features} | {"index.md": index(features, sources)}
    for name, text in pages.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != text.encode():
            files.write(folder / name, text.encode())
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    return len(features)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=tables.MODEL)
    parser.add_argument("--limit", type=int, help="write only the first pages of each block, for a quick look")
    args = parser.parse_args(argv)
    try:
        features = evidence.load(args.model)
        if args.limit is not None:
            of_block = {layer: [f for f in features if f.layer == layer] for layer in {f.layer for f in features}}
            features = [f for f in features if f in of_block[f.layer][: args.limit]]
        sources = json.loads(CORPUS.read_text())["sources"] if CORPUS.exists() else []
        print(f"{write(features, sources)} feature pages in {FOLDER.relative_to(tables.ROOT)}.")
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
