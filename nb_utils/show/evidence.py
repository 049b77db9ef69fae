"""What is known of a feature, as HTML: where it fires, what it promotes, which tasks it helps and harms.

All text of tokens and documents is escaped: it shows as itself, whatever it looks like.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import groupby

import pandas as pd

from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.show import labels, plots
from nb_utils.text import visible

SOURCES = {"executor": "02_cleanup_features", "detector": "04_detectors_features"}
STEERING = ("05_cross_task_steering", "15_labels")  # the first counts where both have tried the same
MASS, FEATURES, LABELS, STABILITY = "04_detectors_mass", "features", "labels", "stability"
PLACES = {"executor": "at the separator", "detector": "at the dummy output of a one-shot prompt"}
TOKEN_TYPES = ("input", "arrow", "output", "newline")
# Scores of a label: their names, what they ask, and what a label that says nothing gets.
SCORES = {
    "detection": ("detection", "do its words tell where the feature fires from where it does not?", "0.50"),
    "intruder": ("intruder", "is one context of another feature told from four of its own?", "0.20"),
    "output": ("output", "do the words that it promotes rise when the feature is added?", "0.50"),
    "prediction": ("prediction", "do these words tell the tasks that it helps from those that it harms?", "0.50"),
}
STEERED = ["kind", "task", "which", "scale", "loss", "rel_loss", "accuracy", "in_raw", "in_clean", "random"]
FOUND = {"raw": "in_raw", "cleaned": "in_clean"}  # the vector of a task that holds a feature, and its column
FIRED = ["kind", "task", "token_type", "mass", "density"]
# What a dashboard of SAEDashboard can have and ours has not.
NOT_MEASURED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip


class EvidenceError(ValueError):
    """Evidence that is asked for and not there; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Feature:
    """One latent of the SAE of one block, with all that was measured of it; a frame is empty where nothing was.

    ``kept``: kind, task and weight, a row per cleaned or pruned vector that keeps it. ``seen``: its row of the table
    of `workflow.collect_evidence`, or None. ``mass``: by token type in few-shot prompts of those tasks. ``steering``:
    a row per task to whose prompts it was added alone, at its best scale (chosen on validation prompts); ``random`` is
    the change of loss by the random direction that does best there. ``label``: its row of the table of
    `workflow.label_features`; ``again``: that of `workflow.stability`, with its best match in a second seed.
    """

    layer: int
    latent: int
    kept: pd.DataFrame
    seen: dict | None
    mass: pd.DataFrame
    steering: pd.DataFrame
    label: dict | None = None
    again: dict | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}_{self.latent}"

    @property
    def title(self) -> str:
        return f"Feature {self.latent} of block {self.layer}"


def surviving(model: str = tables.MODEL, folder: str | None = None) -> pd.DataFrame:
    """List the features that have a page: those that `statistics.survivors` finds, and all that were steered with.

    Columns layer, latent, kind, task, weight (NaN where steering alone names it); a row per task that keeps it. A
    feature that no task keeps has one row with an empty task. Empty where nothing was measured.
    """
    columns = ["layer", "latent", "kind", "task", "weight"]
    found = [pd.DataFrame(columns=columns)]
    for kind, stem in SOURCES.items():
        if (latents := _measured(stem, model, folder)) is not None:
            found.append(statistics.survivors(latents).assign(kind=kind)[columns])
    if (steered := _steered(model, folder)) is not None:
        own = steered[steered["in_clean"].astype(bool)].assign(weight=float("nan"))
        other = steered.assign(task="", weight=float("nan"))
        found += [own[columns], other[columns]]
    whole = pd.concat([part for part in found if len(part)] or found, ignore_index=True)
    whole = whole.drop_duplicates(["layer", "latent", "kind", "task"])
    named = whole.groupby(["layer", "latent", "kind"])["task"].transform(lambda tasks: (tasks != "").any())
    whole = whole[(whole["task"] != "") | ~named.astype(bool)]
    whole = whole.sort_values(["layer", "latent", "kind", "task"]).reset_index(drop=True)
    return whole.astype({"layer": int, "latent": int})


def load(model: str = tables.MODEL, folder: str | None = None) -> list[Feature]:
    """Return every surviving feature with its evidence, by block and latent; a missing table leaves its part empty."""
    kept = surviving(model, folder)
    wanted = set(zip(kept["layer"], kept["latent"], strict=True))
    seen = _measured(FEATURES, model, folder)
    mass, steering = _measured(MASS, model, folder), _steered(model, folder)
    if seen is not None:
        seen = seen[[key in wanted for key in zip(seen["layer"], seen["latent"], strict=True)]]
    again = _measured(STABILITY, model, folder)
    again = None if again is None else statistics.rows(again, first="shipped", second="second_seed")
    rows, named, found = map(_by_key, (seen, _measured(LABELS, model, folder), again))
    fired, moved = _by_feature(mass, FIRED), _by_feature(steering, STEERED)
    return [
        Feature(*key, part.drop(columns=["layer", "latent"]), rows.get(key), fired(key), moved(key), named.get(key),
                found.get(key))
        for key, part in kept.groupby(["layer", "latent"])
    ]


def feature(layer: int, latent: int, model: str = tables.MODEL, folder: str | None = None) -> Feature:
    """Return one surviving feature; raises EvidenceError if it is not one."""
    for found in load(model, folder):
        if (found.layer, found.latent) == (layer, latent):
            return found
    raise EvidenceError(f"No task keeps feature {latent} of block {layer}: take one of `evidence.surviving()`.")


def page(layer: int, latent: int) -> str | None:
    """Return the address of a feature's page as seen from book/findings, or None if it has none."""
    return f"../features/{int(layer)}_{int(latent)}.html" if (int(layer), int(latent)) in _pages() else None


def link(layer: int, latent: int, text: str | None = None) -> str:
    """Return the feature's number (or ``text``, shown as it is) as a link to its page, or plain if it has none.

    HTML, for a cell of `plots.table`. Its label, if it has one, stands behind the number.
    """
    shown = escape(str(int(latent)) if text is None else text)
    address = page(layer, latent)
    shown = f'<a href="{address}">{shown}</a>' if address else shown
    label = _labels(os.environ.get("NB_TABLES", "")).get((int(layer), int(latent)))
    return shown if label is None or text is not None else f'{shown} <small class="nb-label">{show(label)}</small>'


def links(layer: int, latents: Iterable[int]) -> str:
    """Return a line of links, for the features that a figure above it names: links inside of an image do not work."""
    named = (link(layer, latent, str(int(latent))) for latent in latents)
    return block(f"<p>Block {int(layer)}: {' · '.join(named)}</p>")


def _pages() -> frozenset[tuple[int, int]]:
    return _known(os.environ.get("NB_TABLES", ""))


@cache
def _known(_: str) -> frozenset[tuple[int, int]]:
    kept = surviving()
    return frozenset(zip(kept["layer"].tolist(), kept["latent"].tolist(), strict=True))


@cache
def _labels(_: str) -> dict[tuple[int, int], str]:
    found = _measured(LABELS, tables.MODEL, None)
    return {} if found is None else {key: row["label"] for key, row in _by_key(found).items()}


def show(text: str) -> str:
    """Return text as HTML that shows each character: escaped, line ends as ↵, the invisible by its number."""
    return escape(visible(text))


def summary(feature: Feature) -> str:
    """Say in one computed sentence what the feature does alone, or that this was not tested."""
    tried = feature.steering.sort_values("rel_loss", kind="stable")
    if tried.empty:
        return "No causal test: this feature alone was not added to the prompts of any task."
    best, n = tried.iloc[0], tried["task"].nunique()
    place = f"{PLACES.get(best['kind'], '')}, {best['scale']:.2f} of the mean residual norm long"
    effect = f"{percent(best['rel_loss'])} ({_unsteered(best):.2f} to {best['loss']:.2f} nats)"
    name = f"<em>{show(plots.title(best['task']))}</em>"
    if best["rel_loss"] < 0:
        among = f"Of {n} tasks it helps {name} most" if n > 1 else f"It helps {name}"
        return f"{among}: added {place}, it changes the loss by {effect}."
    among = f"none of {n} tasks; {name} is harmed least" if n > 1 else f"not even {name}"
    return f"Alone, it helps {among}: added {place}, it changes the loss by {effect}."


def examples(feature: Feature) -> str:
    """Show the max-activating examples with the firing token marked, each with its activation and source."""
    if feature.seen is None:
        return _none("No held-out text was read for this feature.")
    found = list(feature.seen["examples"])
    if not found:
        return _none("It fired nowhere in the held-out text.")
    rows = [
        f'<li><span class="nb-number">{e["activation"]:,.0f}</span><q class="nb-text">…{show(e["before"])}'
        f'<mark>{show(e["token"])}</mark>{show(e["after"])}…</q>'
        f'<cite>{show(e["source"])}, {show(e["language"])}</cite></li>'
        for e in found
    ]
    return f'<ol class="nb-examples">{"".join(rows)}</ol>'


def label(feature: Feature) -> str:
    """Say what the feature is called by, and how far that can be trusted."""
    if feature.label is None:
        return _none("It has no label: none was made for it.")
    return f'<p>Label: <strong>{show(feature.label["label"])}</strong>.</p>'


def scores(feature: Feature) -> str:
    """Show the scores of the label, each beside that of another feature's label, and what chance gives."""
    if feature.label is None:
        return _none("A label that is not there has no scores.")
    rows = [
        [name, what, share(feature.label[column]), share(feature.label.get(f"{column}_shuffled")), chance]
        for column, (name, what, chance) in SCORES.items()
    ]
    return table(["score", "asks", "this label", "another feature's label", "chance"], rows)


def quantiles(feature: Feature) -> str:
    """Show examples from all quantiles of the feature's activations, the strongest first, each with its quantile."""
    if feature.label is None or not len(feature.label["quantiles"]):
        return _none("No examples of weaker activations were taken.")
    rows = [
        f'<li><span class="nb-number">{e["quantile"]}/{labels.BINS}</span><q class="nb-text">…{show(e["before"])}'
        f'<mark>{show(e["token"])}</mark>{show(e["after"])}…</q><cite>{e["activation"]:,.0f}</cite></li>'
        for e in feature.label["quantiles"]
    ]
    return f'<ol class="nb-examples">{"".join(rows)}</ol>'


def stability(feature: Feature) -> str:
    """Say how near an SAE of another seed comes to the feature."""
    if feature.again is None:
        return _none("It was not looked for in an SAE of another seed.")
    cosine, correlation = feature.again["cosine"], feature.again["correlation"]
    return (
        f"<p>In an SAE trained from another seed, the nearest direction has a cosine of {cosine:.2f} with it, and the "
        f"most alike activation on held-out text a correlation of {correlation:.2f}.</p>"
    )


def density(feature: Feature) -> str:
    """Say on which share of the held-out tokens the feature fires, and how strongly at most."""
    if feature.seen is None:
        return _none("Its density was not measured.")
    share, tokens = feature.seen["density"], feature.seen["n_tokens"]
    if not share:
        return f"<p>It fires on none of {tokens:,} held-out tokens.</p>"
    often = f", one in {1 / share:,.0f}" if share < 0.5 else ""
    largest = f"its largest activation is {feature.seen['largest']:,.0f}"
    return f"<p>It fires on {100 * share:.3g} % of {tokens:,} held-out tokens{often}; {largest}.</p>"


def promoted(feature: Feature) -> str:
    """Show the tokens that the feature's direction promotes and suppresses most through the unembedding."""
    if feature.seen is None:
        return _none("Its direction was not read through the unembedding.")
    lists = [
        f'<dt>{name}</dt><dd>{" ".join(token(found["token"]) for found in feature.seen[column])}</dd>'
        for name, column in (("promoted", "promoted"), ("suppressed", "suppressed"))
    ]
    return f'<dl class="nb-tokens">{"".join(lists)}</dl>'


def token(text: str) -> str:
    """Show one token with its spaces visible."""
    return f'<bdi class="nb-token">{show(text)}</bdi>'


def mass(feature: Feature) -> str:
    """Show which share of the feature's activation in few-shot prompts falls on which type of token, task by task."""
    if feature.mass.empty:
        return _none("Its activation in few-shot prompts was not measured.")
    wide = feature.mass.pivot_table(index=["kind", "task"], columns="token_type", values="mass", aggfunc="mean")
    types = [t for t in TOKEN_TYPES if t in wide] + [t for t in wide if t not in TOKEN_TYPES]
    rows = [
        [show(plots.title(task)), show(kind), *(_bar(share, f"{share:.0%}") for share in row[types].fillna(0))]
        for (kind, task), row in wide.iterrows()
    ]
    return table(["task", "kept as", *map(show, types)], rows)


def steering(feature: Feature) -> str:
    """Show what the feature alone does to the loss of each task at its best scale, from most helped to most harmed."""
    if feature.steering.empty:
        return _none("No causal test: it was not added to the prompts of any task.")
    rows = [
        [
            show(plots.title(row["task"])), show(row["kind"]), f"{row['scale']:.2f}",
            _bar(min(abs(row["rel_loss"]), 1), percent(row["rel_loss"]), "less" if row["rel_loss"] < 0 else "more"),
            "–" if pd.isna(row["random"]) else percent(row["random"]),
            f"{_unsteered(row):.2f}", f"{row['loss']:.2f}", f"{row['accuracy']:.0%}",
            " and ".join(name for name, column in FOUND.items() if row[column]) or "–",
        ]
        for row in feature.steering.sort_values("rel_loss", kind="stable").to_dict("records")
    ]  # fmt: skip
    heads = ["task", "added as", "best scale", "change of loss", "best random direction", "loss before", "after",
             "accuracy", "in its vector"]  # fmt: skip
    return table(heads, rows)


def kept(feature: Feature, most: int | None = None) -> str:
    """List the tasks whose vector keeps the feature, each with what the feature alone does to that task's loss.

    The most helped come first, those of which the same is said together; ``most`` of them are named.
    """
    tried = feature.steering[["kind", "task", "rel_loss"]].astype({"rel_loss": float})
    rows = feature.kept[feature.kept["task"] != ""].merge(tried, how="left", on=["kind", "task"])
    rows = rows.sort_values(["rel_loss", "kind", "task"], kind="stable").to_dict("records")
    named = [
        f"{', '.join(show(plots.title(row['task'])) for row in alike)} ({show(said)})"
        for said, alike in groupby(rows[:most], key=_alone)
    ]
    more = [f"{len(rows) - most} more"] if most is not None and len(rows) > most else []
    return "; ".join(named + more) or "none"


def _alone(row: dict) -> str:
    return f"{row['kind']}, {'no causal test' if pd.isna(row['rel_loss']) else percent(row['rel_loss'])}"


def html(feature: Feature) -> str:
    """Return all evidence for a feature as one block of HTML without blank lines, for a notebook."""
    parts = [
        f"<h3>{show(feature.title)}</h3><p>{summary(feature)}</p>", label(feature), examples(feature), density(feature),
        promoted(feature), mass(feature), steering(feature),
    ]  # fmt: skip
    return block("".join(parts))


def block(html: str) -> str:
    """Return HTML as one block on one line: Markdown ends a block at a blank line, MathJax leaves this one alone."""
    return f'<div class="nb-feature tex2jax_ignore mathjax_ignore">{html}</div>'.replace("\n", " ")


def dashboard(
    layer: int, latents: Iterable[int], model: str = tables.MODEL, folder: str | None = None
) -> dict[str, object]:
    """Return latents of one block as SAEDashboard writes them for Neuronpedia: a batch, for `json.dumps`.

    In it is what `workflow.collect_evidence` found in its held-out text: how often a latent fires, where it fires most,
    what it promotes and suppresses. An example is three pieces, the text before, the token that fires and the text
    after it; the activations of the other tokens were not kept and stand as 0. What was not measured is an empty list.
    Raises EvidenceError for a block without evidence, or a latent that its SAE doesn't have.
    """
    rows = _measured(FEATURES, model, folder)
    rows = {} if rows is None else rows[rows["layer"] == layer].set_index("latent").to_dict("index")
    if not rows:
        raise EvidenceError(f"There is no evidence for block {layer} of {model}: run `make evidence` first.")
    if unknown := [latent for latent in latents if int(latent) not in rows]:
        raise EvidenceError(f"The SAE of block {layer} has no feature {unknown[0]}: take one of 0 to {max(rows)}.")
    origin = tables.read_provenance(tables.file(FEATURES, f"blocks.{layer}", model, folder))
    context = origin["parameters"]["context"]
    found = [_dashboard(int(latent), rows[int(latent)], context) for latent in latents]
    return {"model_id": model, "layer": layer, "sae_set": f"{model}-shipped", "sae_id_suffix": None, "features": found}


def _dashboard(latent: int, row: dict, context: int) -> dict[str, object]:
    up, down = row["promoted"], row["suppressed"]
    most = float(row["largest"])
    shown = [
        {"bin_min": -1, "bin_max": most, "bin_contains": -1, "qualifying_token_index": 1,  # it calls this the top
         "tokens": [one["before"], one["token"], one["after"]], "values": [0.0, float(one["activation"]), 0.0]}
        for one in row["examples"]
    ]  # fmt: skip
    return {name: [] for name in NOT_MEASURED} | {
        "feature_index": latent, "frac_nonzero": float(row["density"]),
        "pos_str": [one["token"] for one in up], "pos_values": [float(one["logit"]) for one in up],
        "neg_str": [one["token"] for one in down], "neg_values": [float(one["logit"]) for one in down],
        "n_prompts_total": int(row["n_tokens"]) // (context - 1), "n_tokens_in_prompt": context,
        "dataset": "held-out text of the sparse task vectors book", "activations": shown,
    }  # fmt: skip


def _measured(stem: str, model: str, folder: str | None) -> pd.DataFrame | None:
    try:
        return tables.load(stem, model, folder)
    except tables.TableError:
        if tables.names(stem, model, folder):
            raise  # it is there, and damaged
        return None


def _steered(model: str, folder: str | None) -> pd.DataFrame | None:
    """Return features at their best scales, each beside the random direction that does best on its task and block.

    Those of experiment 05, and of 12 what 05 has not tried.
    """
    parts = [found for stem in STEERING if (found := _measured(stem, model, folder)) is not None]
    if not parts:
        return None
    place, tried = ["kind", "task", "layer"], []
    for found in parts:
        best = statistics.rows(found, which="best")
        random = best[best["latent"] < 0].groupby(place)["rel_loss"].min().rename("random")
        tried.append(best[best["latent"] >= 0].join(random, on=place))
    return pd.concat(tried, ignore_index=True).drop_duplicates([*place, "latent"])


def _by_key(frame: pd.DataFrame | None) -> dict[tuple[int, int], dict]:
    """Return the rows of a table by (layer, latent)."""
    return {} if frame is None else {(row["layer"], row["latent"]): row for row in frame.to_dict("records")}


def _by_feature(frame: pd.DataFrame | None, columns: list[str]):
    empty = pd.DataFrame(columns=columns)
    parts = {} if frame is None else dict(iter(frame.groupby(["layer", "latent"])))
    return lambda key: parts[key][columns] if key in parts else empty


def share(value: float | None) -> str:
    """Write a score between 0 and 1; a dash where there is none."""
    return "–" if value is None or pd.isna(value) else f"{value:.2f}"


def _unsteered(row) -> float:
    return row["loss"] / (1 + row["rel_loss"])


def percent(change: float) -> str:
    """Write a relative change with its sign."""
    return f"{change:+.0%}".replace("-", "−").replace("%", " %")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Return a table of cells that are HTML already; a wide one scrolls by itself. ``kind``: a further class."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    whole = f'<table class="nb-table {kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="nb-scroll" tabindex="0">{whole}</div>'


def _none(text: str) -> str:
    return f'<p class="nb-none">{text}</p>'


def _bar(share: float, text: str, sign: str = "") -> str:
    """Draw a share of 1 as a bar behind its number."""
    kind = f"nb-bar nb-{sign}" if sign else "nb-bar"
    return f'<span class="{kind}" style="--share: {100 * share:.0f}%">{text}</span>'
