"""Figures and tables: one colour per method and one line style per mode, everywhere in the book.

Every function that draws takes a tidy frame (of `tables.load` or `statistics.averages`) and ``ax=None``, and returns
the Axes. None shows or saves anything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from pandas.io.formats.style import Styler

from nb_utils import statistics, tasks
from nb_utils.text import verbatim

# Okabe and Ito's palette for the methods that carry the story, Paul Tol's muted one for their siblings, greys
# for references and controls. Two methods whose colours are near for anyone's eyes have different markers.
COLORS = {
    "zero_shot": "#6E6E6E",
    "few_shot": "#000000",
    "dummy_shot": "#484848",
    "task_vector": "#0072B2",
    "centred": "#9CCBE8",
    "centred_best_scale": "#56B4E9",
    "learned_vector": "#332288",
    "reconstruct": "#E69F00",
    "vector_on_reconstruction": "#8C6510",
    "gradient_pursuit": "#CC79A7",
    "nonnegative_omp": "#882255",
    "contrast_codes": "#44AA99",
    "clean": "#009E73",
    "clean_random_start": "#8FB996",
    "prune_contrast": "#D55E00",
    "prune_codes": "#E59A6B",
    "top_k_projection": "#8A7F96",
    "random_support": "#A9A9A9",
    "matched_random": "#C2BCB0",
    "rule": "#C9A400",
    "random_matched": "#A05A2C",
    "random_active": "#CC9F7B",
    "shuffled_labels": "#7A6F5D",
    "theta": "#117733",
    "theta_mean": "#0B4F6C",
    "theta_shuffled": "#B0A17A",
    "theta_own": "#9AA5B1",
    "zero_mean": "#5C6B73",
    "decoder_bias": "#C9B8A8",
    "swap": "#AA4499",
    "swap_codes": "#DDAADD",
    "prune_swap": "#B33A1E",
    "icv": "#1B7F4F",
    "icv_one_shot": "#7FB069",
    "mean_difference": "#999933",
    "prune_difference": "#8E3B86",
    "contrast_difference": "#C9A0DC",
    "fv_centred": "#4477AA",
    "instruction": "#5B3A8C",
    "heads_added": "#3D8F8F",
    "heads_reward": "#7B8B1D",
    "heads_gradient": "#A8552B",
    "single": "#F0A202",
    "own": "#D95F0E",
    "other_task": "#1F78B4",
    "same_activation": "#7A5195",
    "same_density": "#9A6A3A",
    "most_active": "#2F6B4F",
    "one_example_stretched": "#B5651D",
    "correlated": "#4B0055",
    "discriminative": "#00588B",
    "varied": "#C2185B",
    "attributed": "#A3B200",
    "label_words": "#6B4C9A",
}
# Dictionaries of experiment 11; those that nobody trained have dashed lines.
DICTIONARIES = {
    "trained": "#000000",
    "first_seed": "#0072B2",
    "second_seed": "#56B4E9",
    "frozen_decoder": "#D55E00",
    "frozen_encoder": "#E69F00",
    "orthonormal": "#CC79A7",
    "components": "#009E73",
    "unembedding": "#8A7F96",
}
UNTRAINED = ("orthonormal", "components", "unembedding")
MARKERS = {
    "centred_best_scale": "s",
    "learned_vector": "s",
    "reconstruct": "s",
    "vector_on_reconstruction": "v",
    "gradient_pursuit": "^",
    "nonnegative_omp": "^",
    "contrast_codes": "P",
    "clean_random_start": "v",
    "prune_contrast": "D",
    "prune_codes": "D",
    "top_k_projection": "v",
    "random_support": "X",
    "matched_random": "<",
    "rule": "D",
    "random_matched": "X",
    "random_active": "<",
    "shuffled_labels": ">",
    "theta": "p",
    "theta_mean": "H",
    "theta_shuffled": "p",
    "theta_own": "*",
    "zero_mean": "d",
    "decoder_bias": "8",
    "swap": "H",
    "swap_codes": "h",
    "prune_swap": "*",
    "icv": "D",
    "icv_one_shot": "d",
    "mean_difference": "^",
    "prune_difference": "v",
    "contrast_difference": "<",
    "fv_centred": "P",
    "instruction": "P",
    "heads_added": "p",
    "heads_reward": "8",
    "heads_gradient": "h",
    "single": "*",
    "own": "*",
    "other_task": "h",
    "same_activation": "p",
    "same_density": "d",
    "most_active": "8",
    "one_example_stretched": "H",
    "correlated": "s",
    "discriminative": "^",
    "varied": "v",
    "attributed": "P",
    "label_words": "X",
}
LABELS = {
    "zero_shot": "zero-shot",
    "few_shot": "few-shot",
    "dummy_shot": "dummy prompt",
    "task_vector": "task vector",
    "centred": "centred",
    "centred_best_scale": "centred, best scale",
    "learned_vector": "learned vector",
    "reconstruct": "reconstruction",
    "vector_on_reconstruction": "TV on reconstruction",
    "gradient_pursuit": "gradient pursuit",
    "nonnegative_omp": "non-negative OMP",
    "contrast_codes": "contrast codes",
    "clean": "cleaned",
    "clean_random_start": "cleaned from random",
    "prune_contrast": "pruned, contrast codes",
    "prune_codes": "pruned, TV codes",
    "top_k_projection": "top-k projection",
    "random_support": "random atoms",
    "matched_random": "random vector",
    "rule": "rule on evidence",
    "random_matched": "random, same density",
    "random_active": "random, active on arrows",
    "shuffled_labels": "shuffled answers",
    "theta": "theta",
    "theta_mean": "mean theta",
    "theta_shuffled": "theta, shuffled answers",
    "theta_own": "mean theta of the examples' task",
    "zero_mean": "mean zero-shot separator",
    "decoder_bias": "decoder bias",
    "swap": "swap, added",
    "swap_codes": "swap in features",
    "prune_swap": "swap, pruned",
    "icv": "in-context vector",
    "icv_one_shot": "one shot less junk",
    "mean_difference": "mean difference",
    "prune_difference": "pruned difference",
    "contrast_difference": "largest codes of it",
    "fv_centred": "function vector",
    "instruction": "instruction",
    "heads_added": "heads, own place",
    "heads_reward": "heads by reward",
    "heads_gradient": "heads by gradient",
    "single": "one feature",
    "own": "the task's features",
    "other_task": "another task's",
    "same_activation": "of equal activation",
    "same_density": "random, equal density",
    "most_active": "most active",
    "one_example_stretched": "one example stretched",
    "trained": "trained, the book's",
    "first_seed": "trained, first seed",
    "second_seed": "trained, second seed",
    "frozen_decoder": "decoder frozen, random",
    "frozen_encoder": "encoder frozen, random",
    "orthonormal": "random orthonormal",
    "components": "principal components",
    "unembedding": "unembedding rows",
    "correlated": "correlated with right answers",
    "discriminative": "telling arrows apart",
    "varied": "changed by right answers",
    "attributed": "gradient × activation",
    "label_words": "added at the examples' answers",
}
# Where a vector of every token stands.
STEERED = {
    "ff": "behind the MLP's norm", "mlp": "MLP's output", "resid": "stream", "block": "one block", "arrow": "arrow",
    "none": "no vector",
}  # fmt: skip
# How a prompt of each template reads, in one line.
TEMPLATES = {
    "arrow": "x -> y", "colon": "x: y", "equals": "x = y", "question": "Q: x ⏎ A: y",
    "spanish": "Pregunta: x ⏎ Respuesta: y", "instruction": "line ⏎ x -> y", "choice": "x (y, z, w) -> y",
}  # fmt: skip
STYLES = {"add": "-", "replace": (0, (5, 2)), "none": (0, (1, 1.5))}
UNITS = {
    "loss": "loss (nats, first 2 answer tokens)", "rel_loss": "loss, change from zero-shot",
    "necessity": "necessity (0: few-shot, 1: zero-shot)",
}  # fmt: skip
CYCLE = [COLORS[m] for m in ("task_vector", "prune_contrast", "clean", "reconstruct", "learned_vector")]  # no methods
GREW, SHRANK = COLORS["clean"], "#C8102E"
INK, PALE = "#333333", "#E4E4E4"


def use_style() -> None:
    """Set matplotlib's defaults for the book: quiet axes, vector graphics, text at the size of the page."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 4.2), "figure.dpi": 100, "figure.constrained_layout.use": True,
            "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
            "axes.labelsize": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
            "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 9, "ytick.labelsize": 9,
            "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
            "axes.grid": True, "axes.grid.axis": "y", "grid.color": PALE, "grid.linewidth": 0.7,
            "axes.axisbelow": True, "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.frameon": False,
            "axes.prop_cycle": plt.cycler(color=CYCLE), "text.parse_math": False,  # a dollar in a title is a dollar
        }
    )  # fmt: skip


def label(method: str, k: object = None) -> str:
    """Return the name of a method as readers see it, with its number of latents if it has one."""
    name = LABELS.get(method, str(method).replace("_", " "))
    return name if k is None or pd.isna(k) else f"{name} ({int(k)})"


def title(task: str) -> str:
    """Return the title of a shipped task, or its name in words."""
    return tasks.load(task).title if task in tasks.names() else task.replace("_", " ")


def loss_by_layer(
    frame: pd.DataFrame, value: str = "loss", ax: Axes | None = None, labels: bool = True
) -> Axes:
    """Draw one line per method, mode (and k) over the layers, intervals as bands; layer -1 as level lines.

    ``frame``: columns method, mode, layer, mean, and where known k, low, high (of `statistics.averages`).
    """
    ax = ax or plt.subplots()[1]
    frame = frame.assign(k=frame["k"] if "k" in frame else pd.NA)
    ends = _levels(ax, frame[frame["layer"] < 0])
    swept = frame[frame["layer"] >= 0]
    modes = swept["mode"].nunique()
    for (method, mode, k), line in _lines(swept):
        line = line.sort_values("layer")
        name = label(method, k) + (f", {mode}" if modes > 1 else "")
        _draw(ax, line["layer"], line, method, mode, name)
        ends.append((line["layer"].iloc[-1], line["mean"].iloc[-1], name, _color(method)))
    if not swept.empty:
        ax.set_xticks(sorted(swept["layer"].unique()))
    ax.set(xlabel="layer (output of block)", ylabel=UNITS.get(value, value))
    if labels:
        _label_ends(ax, ends)
    return ax


def loss_vs_l0(frame: pd.DataFrame, value: str = "loss", ax: Axes | None = None, labels: bool = True) -> Axes:
    """Draw loss against the number of latents (log axis): one path per method; dense methods as level lines.

    ``frame``: columns method, mode, l0 (NaN: dense), mean, and where known low, high (of `statistics.averages`).
    """
    ax = ax or plt.subplots()[1]
    dense = frame["l0"].isna()
    ends = _levels(ax, frame[dense])
    sparse = frame[~dense].assign(k=pd.NA)
    for (method, mode, _), line in _lines(sparse):
        line = line.sort_values("l0")
        _draw(ax, line["l0"].astype(float), line, method, mode, label(method))
        ends.append((line["l0"].iloc[-1], line["mean"].iloc[-1], label(method), _color(method)))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    if not sparse.empty:
        low, high = float(sparse["l0"].min()), float(sparse["l0"].max())
        ticks = [
            t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low / 1.6 <= t <= high * 1.6
        ]
        ax.set_xticks(ticks, [f"{t}" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="active latents (L0, log scale)", ylabel=UNITS.get(value, value))
    if labels:
        _label_ends(ax, ends)
    return ax


def loss_by_dictionary(
    frame: pd.DataFrame, ax: Axes | None = None, zero_shot: float | None = None, few_shot: float | None = None
) -> Axes:
    """Plot the mean loss of pruned vectors against the features they keep, a line a dictionary, bands where given.

    ``frame``: dictionary, k and loss, or mean with low and high. Trained dictionaries are full lines, others dashed.
    """
    ax = plt.gca() if ax is None else ax
    value = "mean" if "mean" in frame else "loss"
    for name, line in frame.groupby("dictionary", sort=False):
        line, color = line.sort_values("k"), DICTIONARIES.get(name, "#6E6E6E")
        ax.plot(line["k"].astype(float), line[value], color=color, marker="o", markersize=4,
                linestyle="--" if name in UNTRAINED else "-", label=label(name))
        if "low" in line:
            ax.fill_between(line["k"].astype(float), line["low"], line["high"], color=color, alpha=0.12, linewidth=0)
    for method, level in (("zero_shot", zero_shot), ("few_shot", few_shot)):
        if level is not None:
            ax.axhline(level, color=COLORS[method], linestyle=":", label=label(method))
    ax.set(xscale="log", xlabel="features kept", ylabel=UNITS["loss"])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ticks = sorted(set(frame["k"].astype(float)))
    ax.set_xticks(ticks)
    ax.legend(fontsize="x-small")
    return ax


def lambda_path(frame: pd.DataFrame, value: str = "loss", ax: Axes | None = None) -> Axes:
    """Draw loss ("loss", "rel_loss") or "l0" against the penalty of cleaning (log axis, 0 at its left end).

    ``frame``: columns method, penalty, mean, l0, and where known low, high (of `statistics.averages`). Methods
    without a penalty are level lines.
    """
    ax = ax or plt.subplots()[1]
    y = "l0" if value == "l0" else "mean"
    swept = frame[frame["penalty"].notna()].sort_values("penalty")
    positive = swept.loc[swept["penalty"] > 0, "penalty"]
    swept = swept.assign(at=np.log10(swept["penalty"].where(swept["penalty"] > 0, positive.min() / 4)))
    plain = frame[frame["penalty"].isna() & frame[y].notna()]
    ends = _levels(ax, plain.assign(mean=plain[y]))
    for method, line in swept.groupby("method", sort=False):
        if value != "l0":
            _band(ax, line["at"], line, method)
        ax.plot(line["at"], line[y].astype(float), color=_color(method), label=label(method), **_marker(method))
        ends.append((line["at"].iloc[-1], line[y].iloc[-1], label(method), _color(method)))
    ticks = dict(zip(swept["penalty"], swept["at"], strict=True))
    ax.set_xticks(list(ticks.values()), [f"{penalty:g}" for penalty in ticks])
    ax.set_xlabel("penalty λ (nats at the starting L1)")
    ax.set_ylabel("active latents (L0)" if value == "l0" else UNITS.get(value, value))
    if value == "l0":
        ax.set_ylim(bottom=0)
    _label_ends(ax, ends)
    return ax


def task_heatmap(
    frame: pd.DataFrame, value: str = "rel_loss", ax: Axes | None = None, flagged: tuple[str, ...] = ()
) -> Axes:
    """Draw tasks x methods as a diverging heat map, numbers in the cells; blue is below zero-shot.

    ``frame``: one row per task and method (seeds are averaged), columns in the order of appearance.
    ``flagged`` tasks stand below a line, in grey.
    """
    order = list(dict.fromkeys(frame["method"]))
    grid = frame.pivot_table(index="task", columns="method", values=value, aggfunc="mean")[order]
    counted = grid.drop(index=[t for t in flagged if t in grid.index])
    counted = counted.loc[counted.mean(axis=1).sort_values().index]
    below = grid.loc[[t for t in flagged if t in grid.index]]
    grid = pd.concat([counted, below])
    if ax is None:
        ax = plt.subplots(figsize=(2.2 + 0.72 * len(order), 1.5 + 0.27 * len(grid)))[1]
    bound = max(np.nanmax(np.abs(np.clip(grid.to_numpy(), None, 1.0)), initial=0.0), 0.1)
    ax.imshow(grid, cmap="RdBu_r", norm=TwoSlopeNorm(0, -bound, bound), aspect="auto")
    for (i, j), number in np.ndenumerate(grid.to_numpy()):
        if np.isfinite(number):
            pale = abs(number) > 0.62 * bound
            ax.text(
                j, i, _signed(number), ha="center", va="center", fontsize=8, color="white" if pale else INK
            )
    ax.set_yticks(range(len(grid)), [title(task) for task in grid.index])
    for tick, task in zip(ax.get_yticklabels(), grid.index, strict=True):
        tick.set_color("#888888" if task in flagged else INK)
    if len(below) and len(counted):
        ax.axhline(len(counted) - 0.5, color=INK, lw=1.5)
    ax.set_xticks(
        range(len(order)), [label(m) for m in order], rotation=40, ha="left", rotation_mode="anchor"
    )
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def feature_weights(frame: pd.DataFrame, ax: Axes | None = None, most: int = 40) -> Axes:
    """Draw weights of latents before cleaning (blue) and after, each set divided by its largest size.

    Green bars weigh at least as much after as before, red ones less; the largest survivors are named. ``frame``:
    latent, before, after, of one vector. The ``most`` largest before are shown, and every survivor.
    """
    ax = ax or plt.subplots(figsize=(7.2, 2.6))[1]
    shown = pd.DataFrame(
        {
            "latent": frame["latent"],
            **{side: _share(frame[side].astype(float)) for side in ("before", "after")},
        }
    )
    order = shown["before"].abs().rank(ascending=False, method="first")
    shown = shown[(order <= most) | (shown["after"] != 0)]
    shown = shown.loc[shown["before"].abs().sort_values(ascending=False, kind="stable").index]
    x = np.arange(len(shown))
    ax.bar(x, shown["before"], width=0.95, color=COLORS["task_vector"], alpha=0.45, lw=0)
    grew = shown["after"].abs() >= shown["before"].abs()
    ax.bar(x, shown["after"], width=0.5, color=np.where(grew, GREW, SHRANK), lw=0)
    named, room = [], len(shown) / 28  # bars that the height of a number covers
    for i in np.argsort(-shown["after"].abs().to_numpy(), kind="stable"):
        after, before = shown["after"].iloc[i], shown["before"].iloc[i]
        if after == 0 or len(named) == 8 or any(abs(i - other) < room for other in named):
            continue  # no room for its number beside that of a larger one
        named.append(i)
        up = 1 if after > 0 else -1
        ax.annotate(
            str(shown["latent"].iloc[i]), (i, up * max(up * after, up * before, 0)), (0, 3 * up),
            textcoords="offset points", rotation=90, ha="center", va="bottom" if up > 0 else "top", fontsize=7,
        )  # fmt: skip
    ax.axhline(0, color=INK, lw=0.8)
    signs = np.sign(shown[["before", "after"]].to_numpy())
    ax.set_ylim(-1.45 if (signs < 0).any() else 0, 1.45)  # room for numbers at the tips
    ax.set_yticks([tick for tick in (-1, 0, 1) if tick >= ax.get_ylim()[0]])
    ax.margins(x=0.01)
    ax.set_xticks([])
    ax.set(xlabel="latents, by weight before", ylabel="weight / largest")
    return ax


def layer_grids(
    grids: Mapping[str, pd.DataFrame], largest: float, title: str = "", form: str = "{:.0f}"
) -> Figure:
    """Draw one small heat map per method: rows where a vector is added, columns where the stream is read.

    ``grids``: {method: frame of numbers, index and columns are layers}; all share the scale from 0 to ``largest``.
    """
    fig, axes = plt.subplots(1, len(grids), figsize=(0.6 + 1.85 * len(grids), 2.5), sharey=True, squeeze=False)
    for ax, (method, grid) in zip(axes[0], grids.items(), strict=True):
        for number, written in _heat_map(ax, grid, "cividis", Normalize(0, largest), form.format):
            written.set(color=INK if number > 0.6 * largest else "white", fontsize=7.5)
        ax.set_title(label(method), fontsize=8.5)
    axes[0, 0].set_ylabel("added after block")
    fig.supxlabel("read after block", fontsize=9)
    fig.suptitle(title, fontsize=10.5, weight="bold", x=0.01, ha="left")
    return fig


def template_grids(grids: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Draw one small heat map of relative loss changes per method: made on the row's template, tested on the column's.

    ``grids``: {method: frame, index and columns are names of templates}; blue is below zero-shot, the scale is shared.
    """
    bound = max(np.nanmax([np.abs(grid.clip(upper=1)).to_numpy() for grid in grids.values()]), 0.1)
    height = 1.9 + 0.28 * max(map(len, grids.values()))
    fig, axes = plt.subplots(1, len(grids), figsize=(1.2 + 2.2 * len(grids), height), sharey=True, squeeze=False)
    for ax, (method, grid) in zip(axes[0], grids.items(), strict=True):
        for number, written in _heat_map(ax, grid, "RdBu_r", TwoSlopeNorm(0, -bound, bound), _signed):
            written.set_color("white" if abs(number) > 0.62 * bound else INK)
        ax.set_title(label(method), fontsize=9)
        ax.set_xticks(range(len(grid.columns)), [TEMPLATES.get(name, name) for name in grid.columns], rotation=90)
    axes[0, 0].set_yticks(range(len(grid)), [TEMPLATES.get(name, name) for name in grid.index])
    axes[0, 0].set_ylabel("made on")
    fig.supxlabel("tested on", fontsize=9)
    fig.suptitle(title, fontsize=10.5, weight="bold", x=0.01, ha="left")
    return fig


def task_matrix(grid: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw relative loss changes of every task's vector (rows) on every task's prompts (columns), clipped at ±1.

    Blue is below zero-shot; the frame's order of rows and columns is kept.
    """
    ax = ax or plt.subplots(figsize=(7.6, 7.0))[1]
    _heat_map(ax, grid, "RdBu_r", TwoSlopeNorm(0, -1, 1))
    ax.figure.colorbar(ax.images[0], ax=ax, shrink=0.6, aspect=30, label=UNITS["rel_loss"])
    ax.set_xticks(range(grid.shape[1]), [title(task) for task in grid.columns], rotation=90, fontsize=7.5)
    ax.set_yticks(range(grid.shape[0]), [title(task) for task in grid.index], fontsize=7.5)
    ax.set(xlabel="prompts of", ylabel="vector of")
    return ax


def method_points(frame: pd.DataFrame, xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw one point per method (and k), in the order of the frame, with its interval; a line marks 0.

    ``frame``: columns method, mean, and where known k, low, high.
    """
    ax = ax or plt.subplots(figsize=(5.2, 0.9 + 0.28 * len(frame)))[1]
    frame = frame.assign(k=frame["k"] if "k" in frame else pd.NA)
    for y, row in enumerate(frame.itertuples()):
        if {"low", "high"} <= set(frame):
            ax.hlines(y, row.low, row.high, color=_color(row.method), lw=2.2)
        style = {"color": _color(row.method), "ls": "", "ms": 6.5, "label": label(row.method, row.k)}
        ax.plot(row.mean, y, **style, **_marker(row.method))
    ax.axvline(0, color=INK, lw=0.8, zorder=1)
    ax.set_yticks(range(len(frame)), [label(m, k) for m, k in zip(frame["method"], frame["k"], strict=True)])
    ax.set(xlabel=xlabel, ylim=(len(frame) - 0.4, -0.6))
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    return ax


def effect_by_cost(frame: pd.DataFrame, value: str, ax: Axes | None = None) -> Axes:
    """Draw what steering every token does against what it costs in prose (log axis), a line a method, place and layer.

    ``frame``: method, place, layer, kl (nats), effect, a row for each strength. Where a vector turns the MLP's output
    or the stream its line is dashed or dotted. ``value``: what the effect is.
    """
    ax = ax or plt.subplots(figsize=(7.6, 4.6))[1]
    styles, ends = {"mlp": STYLES["replace"], "resid": STYLES["none"]}, []
    for (method, place, layer), line in frame.groupby(["method", "place", "layer"], sort=False):
        line = line.sort_values("kl")
        name = f"{label(method)}, " + (f"block {layer}" if place == "block" else STEERED.get(place, place))
        style = {"color": _color(method), "ls": styles.get(place, "-"), "label": name, **_marker(method)}
        ax.plot(line["kl"], line["effect"], **style)
        ends.append((line["kl"].iloc[-1], line["effect"].iloc[-1], name, _color(method)))
    ax.axhline(0, color=INK, lw=0.8, zorder=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="cost: KL in ordinary prose (nats a token, log scale)", ylabel=value)
    _label_ends(ax, ends)
    return ax


def strength_grids(frame: pd.DataFrame, shown: Mapping[str, str]) -> Figure:
    """Draw one small heat map per column of ``shown`` ({column: its name}): places in rows, strengths in columns.

    ``frame``: place, strength and these columns, averaged where rows repeat. Numbers stand in the cells.
    """
    fig, axes = plt.subplots(1, len(shown), figsize=(1.8 + 2.9 * len(shown), 2.3), sharey=True, squeeze=False)
    for ax, (column, name) in zip(axes[0], shown.items(), strict=True):
        grid = frame.pivot_table(index="place", columns="strength", values=column, sort=False).sort_index(axis=1)
        bound = max(np.nanmax(np.abs(grid.to_numpy()), initial=0), 1e-3)
        norm = TwoSlopeNorm(0, -bound, bound)
        for number, written in _heat_map(ax, grid, "RdBu_r", norm, lambda n: f"{n:.2g}".replace("-", "−")):
            written.set_color("white" if abs(number) > 0.62 * bound else INK)
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(len(grid)), [STEERED.get(place, place) for place in grid.index])
    fig.supxlabel("strength λ", fontsize=9)
    return fig


def _heat_map(ax: Axes, grid: pd.DataFrame, cmap: str, norm: Normalize, form=None) -> list[tuple]:
    """Draw a frame as a heat map without frame and ticks; return (number, its text) of every cell if ``form`` is given.
    """
    ax.imshow(grid.to_numpy(float), cmap=cmap, norm=norm, aspect="auto")
    cells = [(i, j, number) for (i, j), number in np.ndenumerate(grid.to_numpy(float)) if form and np.isfinite(number)]
    ax.set_xticks(range(grid.shape[1]), grid.columns)
    ax.set_yticks(range(grid.shape[0]), grid.index)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return [(n, ax.text(j, i, form(n), ha="center", va="center", fontsize=8)) for i, j, n in cells]


def head_map(frame: pd.DataFrame, value: str = "effect", ax: Axes | None = None, bound: float | None = None) -> Axes:
    """Draw a number of every head, heads by blocks: red above zero, blue below.

    ``frame``: columns layer, head and ``value``, one row a head. ``bound``: the end of the scale, so that several maps
    share one (None: the largest number).
    """
    ax = ax or plt.subplots(figsize=(7.2, 2.2))[1]
    grid = frame.pivot(index="head", columns="layer", values=value)
    bound = bound or max(np.nanmax(np.abs(grid.to_numpy(float))), 1e-9)
    _heat_map(ax, grid, "RdBu_r", TwoSlopeNorm(0, -bound, bound))
    ax.set(xlabel="block", ylabel="head")
    return ax


def picture_grid(frame: pd.DataFrame, side: int, rows: str = "grid", title: str = "") -> Figure:
    """Show pictures in rows, with a column for each ``what``: ``pixels`` are red, green and blue bytes, row by row."""
    names, lines = list(dict.fromkeys(frame["what"])), list(dict.fromkeys(frame[rows]))
    figure, axes = plt.subplots(
        len(lines), len(names), figsize=(0.82 * len(names), 0.86 * len(lines) + 0.5), squeeze=False)
    for (line, name), pixels in frame.set_index([rows, "what"])["pixels"].items():
        ax = axes[lines.index(line), names.index(name)]
        ax.imshow(np.asarray(pixels, np.uint8).reshape(side, side, 3), interpolation="nearest")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name.replace(" ", "\n", 1), fontsize=7.5, fontweight="normal", loc="center")
    for ax, line in zip(axes[:, 0], lines, strict=True):
        if isinstance(line, str):
            ax.set_ylabel(line.replace("_", " "), rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
    return figure


def steering_heatmaps(raw: pd.DataFrame, gain: pd.DataFrame, in_raw: pd.DataFrame, in_clean: pd.DataFrame) -> Figure:
    """Draw features x tasks twice, one above the other: relative loss change, clipped at 1, and normalised gain.

    All four frames share index (latents, in the order to draw; the last may be negative: random directions, drawn
    under a line) and columns (tasks). A hollow dot marks a feature that is active in the task's raw vector, a full one
    a feature that survives its cleaning.
    """
    n, m = raw.shape
    random = raw.index < 0
    fig, axes = plt.subplots(2, 1, figsize=(1.6 + 0.26 * m, 2.6 + 2 * 0.17 * n), sharex=True)
    images = [
        axes[0].imshow(raw.clip(upper=1), cmap="RdBu_r", norm=TwoSlopeNorm(0, -1, 1), aspect="auto"),
        axes[1].imshow(gain, cmap="cividis", vmin=0, vmax=1, aspect="auto"),
    ]
    for ax, image, name in zip(axes, images, ("loss, change from unsteered", "gain / the task's largest"), strict=True):
        for marks, face in ((in_raw & ~in_clean, "none"), (in_clean, INK if ax is axes[0] else "white")):
            y, x = np.nonzero(marks.to_numpy())
            edge = INK if ax is axes[0] else "white"
            ax.scatter(x, y, s=7, marker="o", facecolors=face, edgecolors=edge, linewidths=0.6)
        ax.set_xticks(range(m), [title(task) for task in raw.columns], rotation=90, fontsize=8)
        ax.set_yticks(range(n), ["random" if i < 0 else i for i in raw.index], fontsize=7)
        if random.any():
            ax.axhline(random.argmax() - 0.5, color=INK if ax is axes[0] else "white", lw=1)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.set_ylabel("feature")
        fig.colorbar(image, ax=ax, location="top", shrink=0.7, aspect=30, label=name)
    return fig


def scale_sweep(frame: pd.DataFrame, value: str = "loss", ax: Axes | None = None) -> Axes:
    """Draw loss (or "accuracy") against the scale of one steered direction (log axis), a line per latent.

    ``frame``: latent, scale and ``value``. Negative latents are random directions, dashed, named where one ends.
    """
    ax = ax or plt.subplots()[1]
    ends, random = [], []
    colors = iter(plt.get_cmap("cividis")(np.linspace(0, 0.85, max(1, (frame["latent"].unique() >= 0).sum()))))
    for latent, line in frame.sort_values("scale").groupby("latent"):
        color = COLORS["random_support"] if latent < 0 else plt.matplotlib.colors.to_hex(next(colors))
        name = "random direction" if latent < 0 else f"feature {latent}"
        style = {"lw": 1.1, "ls": "--"} if latent < 0 else {"lw": 1.8}
        ax.plot(line["scale"], line[value], color=color, label=name, **style)
        x, y = line["scale"].iloc[-1], line[value].iloc[-1]
        random.append((x, y)) if latent < 0 else ends.append((x, y, name, color))
    if random:
        text = {"textcoords": "offset points", "fontsize": 8.5, "color": _dark(COLORS["random_support"])}
        ax.annotate("random directions", max(random), (4, -3), **text)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("scale (mean residual norms, log scale)")
    ax.set_ylabel("right first answer tokens" if value == "accuracy" else "loss (nats, first answer token)")
    _label_ends(ax, ends)
    return ax


def loss_by_scale(frame: pd.DataFrame, whole: int, ax: Axes | None = None) -> Axes:
    """Draw loss against the scale of each latent's direction, in grey; ``whole`` is the one to stand out.

    ``frame``: latent, scale, loss, of one task and layer; scale 0 gives the dotted level. Other negative latents are
    random directions, dashed.
    """
    ax = ax or plt.subplots()[1]
    for latent, line in frame.groupby("latent"):
        line, main = line.sort_values("scale"), latent == whole
        random = latent < 0 and not main
        color = COLORS["task_vector"] if main else COLORS["random_matched" if random else "random_support"]
        style, zorder = "--" if random else "-", 3 if main else 2
        ax.plot(line["scale"], line["loss"], color=color, ls=style, lw=2.2 if main else 1, zorder=zorder)
    zero = frame.loc[frame["scale"] == 0, "loss"].iloc[0]
    ax.axhline(zero, color=COLORS["zero_shot"], ls=STYLES["none"], lw=1.4, zorder=1)
    ax.set(xlabel="scale (of residual norm)", ylabel=UNITS["loss"], ylim=(0, 2.2 * zero))
    return ax


def loss_by_prompts(frame: pd.DataFrame) -> Figure:
    """Draw loss against the number of training prompts, a panel per method; bands are 95 % intervals over tasks.

    ``frame``: method, prompts (in order), on, choice and loss, one row per task. Drawn are test losses for both
    choices of the step, and the loss on training prompts where validation pairs chose it.
    """
    what = {
        ("test", "validation"): "test, step chosen on validation",
        ("test", "train"): "test, step chosen on training prompts",
        ("train", "validation"): "training prompts",
    }
    names = [what.get(pair) for pair in zip(frame["on"], frame["choice"], strict=True)]
    counts = pd.Categorical(frame["prompts"], list(dict.fromkeys(frame["prompts"])))
    drawn = frame.assign(what=names, prompts=counts).dropna(subset="what")
    methods = list(dict.fromkeys(drawn["method"]))
    figure, axes = plt.subplots(1, len(methods), figsize=(3.8 * len(methods), 3.6), sharey=True, squeeze=False)
    for ax, method in zip(axes[0], methods, strict=True):
        sns.lineplot(
            drawn[drawn["method"] == method], x="prompts", y="loss", style="what", style_order=what.values(),
            markers=True, color=COLORS[method], legend=method == methods[-1], ax=ax,
        )  # fmt: skip
        ax.set(title=label(method), xlabel="training prompts", ylabel=UNITS["loss"])
    axes[0, -1].legend(title=None, fontsize=8.5)
    there = [name for name in what.values() if name in set(drawn["what"])]
    for line, name in ((line, name) for ax in axes[0] for line, name in zip(ax.lines, there, strict=False)):
        line.set_label(name)
    return figure


def token_activations(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the activations of a detector (up) and an executor (down) at the tokens of a prompt.

    ``frame``: role, latent, position, token, activation, of one task and layer; each role is divided by its largest.
    """
    ax = ax or plt.subplots(figsize=(7.6, 2.9))[1]
    for role, sign, color in (("detector", 1, COLORS["task_vector"]), ("executor", -1, COLORS["prune_contrast"])):
        part = frame[frame["role"] == role].sort_values("position")
        name = f"{role} {part['latent'].iloc[0]}"
        ax.bar(part["position"], sign * _share(part["activation"].fillna(0)), color=color, label=name)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set_xticks(part["position"], [token.replace("\n", "⏎").strip() for token in part["token"]], rotation=90)
    ax.set(ylabel="activation / largest", ylim=(-1.15, 1.15))
    ax.set_yticks([-1, 0, 1], ["1", "0", "1"])
    ax.grid(visible=False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def loss_by_cost(frame: pd.DataFrame, value: str = "loss", ax: Axes | None = None) -> Axes:
    """Draw what a vector does to its task against what it costs in text (log axis), a line a method over its scales.

    ``frame``: method, scale, kl (nats a token), best and ``value``; a ring marks the scale that validates best.
    """
    ax = ax or plt.subplots(figsize=(6, 4))[1]
    for method, line in frame.groupby("method", sort=False):
        line = line.sort_values("scale")
        ax.plot(line["kl"], line[value], color=_color(method), **_marker(method))
        best = line[line["best"]]
        ax.plot(best["kl"], best[value], ls="", marker="o", ms=11, mfc="none", mec=_color(method), mew=1.4)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="KL in text (nats a token, log scale)", ylabel=UNITS.get(value, value))
    return ax


def token_strip(tokens: Sequence[str], touched: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Draw a prompt's tokens in a row, once for each way to touch them: dark where a token is changed in full.

    ``touched``: {name: by how much every token is changed, from 0, not at all, to 1}.
    """
    texts = [str(token).replace("\n", "⏎").strip() or "␣" for token in tokens]
    ends = np.cumsum([len(text) + 1.6 for text in texts])  # as wide as what stands there
    ax = ax or plt.subplots(figsize=(1.4 + 0.082 * ends[-1], 0.3 + 0.3 * len(touched)))[1]
    blues = plt.get_cmap("Blues")
    for y, shares in enumerate(touched.values()):
        for text, left, end, share in zip(texts, [0, *ends[:-1]], ends, shares, strict=True):
            ax.barh(y, end - left, 0.86, left, color=blues(0.06 + 0.74 * share), edgecolor="white")
            ax.text((left + end) / 2, y, text, ha="center", va="center", fontsize=7.5,
                    color="white" if share > 0.6 else INK)  # fmt: skip
    ax.set_yticks(range(len(touched)), list(touched))
    ax.set(xlim=(0, ends[-1]), ylim=(len(touched) - 0.5, -0.5), xticks=[])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def accuracy_dots(frame: pd.DataFrame, ax: Axes | None = None, value: str = "accuracy") -> Axes:
    """Draw one row of dots per task, one dot per method, tasks in the order of the last method's value.

    ``frame``: one row per task and method (seeds are averaged). ``value``: "accuracy", or another column.
    """
    order = list(dict.fromkeys(frame["method"]))
    grid = frame.pivot_table(index="task", columns="method", values=value, aggfunc="mean")[order]
    grid = grid.sort_values(order[-1])
    if ax is None:
        ax = plt.subplots(figsize=(7.2, 1.2 + 0.24 * len(grid)))[1]
    y = np.arange(len(grid))
    ax.hlines(y, grid.min(axis=1), grid.max(axis=1), color=PALE, lw=2.5)
    for method in order:
        style = {**_marker(method), "ls": "", "color": _color(method), "ms": 6.5, "clip_on": False}
        ax.plot(grid[method], y, label=label(method), **style)
    ax.set_yticks(y, [title(task) for task in grid.index])
    ax.set(ylim=(-0.7, len(grid) - 0.3), xlabel=UNITS.get(value, value))
    if value == "accuracy":
        ax.set(xlim=(0, 1), xlabel="right first answer tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(order) if len(order) < 4 else 2,
        handletextpad=0.1,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    return ax


def table(
    frame: pd.DataFrame, formats: Mapping[str, str] | None = None, precision: int = 2, index: bool = False,
    html: Sequence[str] = (), sortable: bool = False,
) -> Styler:  # fmt: skip
    """Return a frame as the book shows tables: formatted, missing values as dashes, long names and texts wrapped.

    ``formats``: {column: format string}; other numbers get ``precision`` digits. ``html``: the columns whose cells are
    HTML of ours, such as `evidence.link`; all other cells, and all labels, are text that shows as itself. The name of
    the columns' axis is written above the index. ``sortable``: a reader may sort it by any column.
    """
    digest = hashlib.sha256(frame.to_csv().encode()).hexdigest()[:8]  # the same page at every build
    lengths = frame.map(lambda cell: len(re.sub("<[^>]*>", "", str(cell))))
    prose = ", ".join(f"td.col{i}" for i in range(lengths.shape[1]) if lengths.iloc[:, i].max() > 40)
    frame = frame.apply(lambda column: column if column.name in html else column.map(_text))
    frame = frame.rename(index=_text, columns=_text).rename_axis(index=None).rename_axis(columns=_text)
    styled = Styler(frame, uuid=digest, cell_ids=False)
    formats = {_text(name): form for name, form in (formats or {}).items()}
    styled = styled.format(formats, precision=precision, na_rep="–")
    names = "th.row_heading, th.blank, th.index_name" if index else ".col0"
    kind = "dataframe nb-sortable" if sortable else "dataframe"
    styled = styled.set_table_attributes(f'class="{kind}"').set_table_styles(
        [
            {"selector": "td, th", "props": "text-align: right; vertical-align: bottom; padding: 0.25rem 0.5rem"},
            {"selector": "th", "props": "white-space: normal"},
            {"selector": names, "props": "text-align: left"},
            {"selector": prose or "td.none", "props": "text-align: left; white-space: normal; min-width: 10rem"},
        ]
    )
    return styled if index else styled.hide(axis="index")


def _text(value: object) -> object:
    """Write what is text so that it shows as itself; numbers and what is missing are to be formatted."""
    return verbatim(value) if isinstance(value, str) else value


def method_legend(figure: Figure, methods: Sequence[str]) -> Legend:
    """Name the methods once above a figure of many panels, where their lines have no room for it."""
    style = {"zero_shot": {"ls": STYLES["none"]}, "few_shot": {"ls": STYLES["none"]}}
    handles = [Line2D([], [], color=_color(method), **style.get(method, _marker(method))) for method in methods]
    return figure.legend(handles, [label(m) for m in methods], loc="outside upper left", ncols=5, fontsize=8)


def _color(method: str) -> str:
    return COLORS.get(method, "#B8860B")


def _marker(method: str) -> dict:
    return {"marker": MARKERS.get(method, "o"), "mec": "white", "mew": 0.6}


def _lines(frame: pd.DataFrame):
    """Split into lines, without the points that average clearly fewer tasks: they would bend a line for no reason."""
    for key, line in frame.groupby(["method", "mode", "k"], sort=False, dropna=False):
        yield key, statistics.complete(line) if "tasks" in line else line


def _levels(ax: Axes, frame: pd.DataFrame) -> list[tuple]:
    """Draw methods that have no place on the x axis as level lines; return what to write at their ends."""
    ends = []
    for row in frame.itertuples():
        ax.axhline(row.mean, color=_color(row.method), ls=STYLES["none"], lw=1.4, zorder=1, label=label(row.method))
        ends.append((None, row.mean, label(row.method), _color(row.method)))
    return ends


def _draw(ax: Axes, x, line: pd.DataFrame, method: str, mode: str, name: str) -> None:
    _band(ax, x, line, method)
    ax.plot(x, line["mean"], color=_color(method), ls=STYLES[mode], label=name, **_marker(method))


def _band(ax: Axes, x, line: pd.DataFrame, method: str) -> None:
    if {"low", "high"} <= set(line):
        low, high = line["low"].astype(float), line["high"].astype(float)
        ax.fill_between(x, low, high, color=_color(method), alpha=0.11, lw=0)


def _label_ends(ax: Axes, ends: list[tuple]) -> None:
    """Write names at the right of the axes, each as near to the height of its line's end as there is room."""
    if not ends:
        return
    ax.figure.canvas.draw()  # the layout decides how high a line of text is in units of the axes
    line_height = 11.5 / (ax.get_window_extent().height * 72 / ax.figure.dpi)
    ends = sorted(ends, key=lambda end: end[1])
    low, high = ax.get_ylim()
    heights = _spread([(y - low) / (high - low) for _, y, _, _ in ends], line_height)
    for height, (x, y, name, color) in zip(heights, ends, strict=True):
        ax.annotate(
            name,
            (1, y) if x is None else (x, y),
            (1.03, height),
            xycoords=ax.get_yaxis_transform() if x is None else "data",
            textcoords="axes fraction",
            color=_dark(color),
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.7, "shrinkA": 1, "shrinkB": 3},
        )


def _spread(wanted: list[float], need: float) -> list[float]:
    """Move sorted heights apart by at least ``need``, as little as possible on the whole."""
    groups = []  # (sum of wanted - offset, count): neighbours that touch move as one
    for height in wanted:
        groups.append([height, 1])
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2:]
            if b / n - a / m >= need * (m + n) / 2:
                break
            groups[-2:] = [[a + b, m + n]]
    return [total / n + need * (i - (n - 1) / 2) for total, n in groups for i in range(n)]


def _share(weights: pd.Series) -> pd.Series:
    largest = weights.abs().max()
    return weights / largest if largest else weights


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−").replace("0.", ".")


def _dark(color: str) -> str:
    """Darken a colour until text in it can be read on white."""
    rgb = np.array(plt.matplotlib.colors.to_rgb(color))
    while rgb @ (0.299, 0.587, 0.114) > 0.5:
        rgb = rgb * 0.9
    return plt.matplotlib.colors.to_hex(rgb)
