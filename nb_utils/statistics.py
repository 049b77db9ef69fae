"""Metrics: means over tasks with their uncertainty, and choices that never look at test losses.

All functions take the tidy frames of `tables.load`. A row is one vector on the test prompts of one task;
``losses`` holds its loss on each prompt, in an order shared by all rows of a task, so differences are paired.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

# A task counts in headline means when the model does it few-shot: first-token accuracy, and cut of the loss.
MIN_ACCURACY = 0.30
MIN_GAIN = 0.25

# A claim holds when the interval is on its side of the bound and so are this many of the tasks.
MOST = 0.75
# An interval that resamples fewer tasks, or families of tasks, than this says nothing.
LEAST = 3
RELATIONS = {"<": operator.lt, "<=": operator.le, "=": operator.eq, ">": operator.gt, ">=": operator.ge}
VERDICTS = ("holds", "mostly", "undecided", "fails")

DRAWS = 2000
LEVEL = 0.95
# Averaged beside the loss where a frame has them: over seeds, then over tasks.
MEASURES = ("l0", "accuracy", "exact", "token_loss", "d_ntp", "train_loss", "validation_loss")


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two methods, averaged over tasks: below 0, the first has the lower loss.

    ``low`` and ``high`` bound the 95 % interval; ``by_task`` has every task's difference, the best first.
    """

    mean: float
    low: float
    high: float
    by_task: pd.Series

    @property
    def tasks(self) -> int:
        return len(self.by_task)

    @property
    def better(self) -> int:
        """Count the tasks on which the first method has the lower loss."""
        return int((self.by_task < 0).sum())

    @property
    def verdict(self) -> str:
        """Judge the claim that the first method has the lower loss."""
        return self.judge()

    def judge(self, relation: str = "<", bound: float = 0) -> str:
        """Judge the claim that the mean is on one side of a bound: return one of `VERDICTS`.

        It "holds" if the whole interval and `MOST` of the tasks are on that side, "mostly" if the interval is, and
        "fails" if the whole interval is on the other side. Else the interval contains the bound, or there are fewer
        tasks than `LEAST`, and the claim is "undecided". ``relation``: a key of `RELATIONS`.
        """
        below = relation in ("<", "<=")
        asked, other = (self.high, self.low) if below else (self.low, self.high)
        if self.tasks < LEAST:
            return "undecided"
        if RELATIONS[relation](asked, bound):
            return "holds" if self.met(relation, bound) >= MOST * self.tasks else "mostly"
        return "fails" if (other > bound if below else other < bound) else "undecided"

    def met(self, relation: str, bound: float) -> int:
        """Count the tasks on that side of the bound."""
        return int(RELATIONS[relation](self.by_task, bound).sum())

    @property
    def word(self) -> str:
        """Say in a word how the first method's loss compares, as far as the interval allows."""
        return "lower than" if self.high < 0 else "higher than" if self.low > 0 else "about the same as"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def rows(frame: pd.DataFrame, **equal: object) -> pd.DataFrame:
    """Keep the rows whose columns have the given values: ``rows(frame, method="clean", layer=10)``."""
    kept = pd.Series(True, index=frame.index)
    for column, value in equal.items():
        kept &= frame[column].eq(value).fillna(False).astype(bool)
    return frame[kept]


def solved(frame: pd.DataFrame) -> pd.Series:
    """Say of every task whether the model does it few-shot, the rule for counting in headline means.

    It does when its first token is right on `MIN_ACCURACY` of the prompts and its loss is at least `MIN_GAIN`
    below the zero-shot one. Needs the zero_shot and few_shot rows on "test".
    """
    plain = rows(frame, on="test", mode="none")
    loss = plain.pivot_table(index="task", columns="method", values="loss")
    accuracy = rows(plain, method="few_shot").groupby("task")["accuracy"].mean()
    right = accuracy >= MIN_ACCURACY
    return (right & (loss["few_shot"] <= (1 - MIN_GAIN) * loss["zero_shot"])).rename("solved")


def averages(
    frame: pd.DataFrame, by: Sequence[str], value: str = "loss", zero: pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Average over tasks for every combination of ``by``, with hierarchical bootstrap intervals.

    Tasks are drawn with replacement, then prompts within each; every task weighs the same, and the seeds of
    one are averaged first. ``value``: "loss" (nats), or "rel_loss", its relative change from the zero-shot
    loss, which is taken from the zero_shot rows of ``zero`` (default: of ``frame``).

    Returns columns ``by``, mean, low, high (95 % interval), tasks (their number), l0 (NaN: dense) and the
    means of the other `MEASURES` that the frame has.
    Raises ValueError if rows of one task differ in their prompts.
    """
    by = list(by)
    cells = _cells(frame, by)
    measures = [name for name in MEASURES if name in cells]
    if cells.empty:
        return pd.DataFrame(columns=[*by, "mean", "low", "high", "tasks", *measures])
    order = cells[by].drop_duplicates().reset_index(drop=True)
    index = cells.merge(order.reset_index(names="cell"), on=by, how="left")["cell"].to_numpy()
    points, draws = _resample(cells, index, len(order), _zero(frame if zero is None else zero, value), seed)
    low, high = _quantiles(draws)
    tasks = (~np.isnan(points)).sum(axis=1)
    found = order.assign(mean=np.nanmean(points, axis=1), low=low, high=high, tasks=tasks)
    return found.join(cells[measures].groupby(index).mean())


def complete(averaged: pd.DataFrame, share: float = 0.9) -> pd.DataFrame:
    """Keep the means over nearly as many tasks as the fullest: means over other tasks are not comparable."""
    return averaged[averaged["tasks"] >= share * averaged["tasks"].max()]


def compare(
    first: pd.DataFrame, second: pd.DataFrame, value: str = "loss", zero: pd.DataFrame | None = None,
    seed: int = 0,
) -> Comparison:  # fmt: skip
    """Bootstrap the paired difference ``first - second`` over the tasks that both frames have.

    Each frame holds one selection: the rows of one task are seeds, and are averaged. ``value`` and ``zero``
    as in `averages`.

    Raises ValueError if the frames share no task, or differ in the prompts of one.
    """
    shared = set(first["task"]) & set(second["task"])
    if not shared:
        raise ValueError("The two selections share no task: nothing can be compared.")
    both = pd.concat(
        [part[part["task"].isin(shared)].assign(cell=i) for i, part in enumerate((first, second))],
        ignore_index=True,
    )
    cells = _cells(both, ["cell"])
    points, draws = _resample(cells, cells["cell"].to_numpy(), 2, _zero(zero, value), seed)
    low, high = _quantiles((draws[0] - draws[1])[None])
    by_task = pd.Series(points[0] - points[1], index=sorted(shared), name="difference")
    return Comparison(float(by_task.mean()), float(low[0]), float(high[0]), by_task.sort_values())


def over_tasks(values: pd.Series, seed: int = 0, average: Callable = np.mean) -> Comparison:
    """Bootstrap the mean of one number a task (a difference, or any measure that has no prompts), over tasks.

    ``values``: indexed by task; missing ones are left out. ``average``: `numpy.median` for the median task instead.
    Raises ValueError if no task is left.
    """
    found = values.dropna().astype(float).sort_values().rename("difference")
    if found.empty:
        raise ValueError("No task has this number: nothing can be averaged.")
    draws = average(np.random.default_rng(seed).choice(found.to_numpy(), (1, DRAWS, len(found))), axis=2)
    low, high = _quantiles(draws)
    return Comparison(float(average(found.to_numpy())), float(low[0]), float(high[0]), found)


def over_families(values: pd.Series, family: Mapping[str, str], seed: int = 0) -> Comparison | None:
    """Bootstrap the mean of one number a task over families of tasks, which are drawn whole; tasks weigh the same.

    Tasks of a family are alike, so an interval over tasks, as if each were drawn for itself, may be too narrow.
    ``values``: indexed by task. ``family``: {task: its family}. Returns None for fewer families than `LEAST`.
    """
    found = values.dropna().astype(float).sort_values().rename("difference")
    parts = found.groupby(found.index.map(family)).agg(["sum", "size"])
    if len(parts) < LEAST:
        return None
    drawn = np.random.default_rng(seed).integers(len(parts), size=(DRAWS, len(parts)))
    total, tasks = (parts[column].to_numpy()[drawn].sum(axis=1) for column in ("sum", "size"))
    low, high = _quantiles((total / tasks)[None])
    return Comparison(float(found.mean()), float(low[0]), float(high[0]), found)


def choose(frame: pd.DataFrame, most: int | None = None) -> pd.DataFrame:
    """Keep the best row of each method, task, layer, mode, seed and prompt set, of at most ``most`` latents.

    Best by ``validation_loss``, never by a test loss; methods without one (pursuits) use all they may.
    """
    allowed = frame if most is None else frame[frame["l0"].notna() & (frame["l0"].fillna(most + 1) <= most)]
    ranked = pd.DataFrame(
        {
            "validation": allowed["validation_loss"] if "validation_loss" in allowed else np.nan,
            "size": -allowed["l0"].astype("Float64"),
        },
        index=allowed.index,
    )
    ranked = ranked.sort_values(["validation", "size"], kind="stable", na_position="last")
    kept = allowed.loc[ranked.index].drop_duplicates(["method", "task", "layer", "mode", "seed", "on"])
    return kept.sort_index()


def survivors(features: pd.DataFrame, most: int = 5, k: int = 10) -> pd.DataFrame:
    """Return the features that a task keeps: the book's one answer to "which are its features?".

    ``features``: the table of latents before and after of experiment 02 (executors) or 04 (detectors). Taken are,
    for every task and layer of its first seed, the ``most`` largest positive weights of the vector pruned to ``k``,
    and of the vector cleaned under the largest penalty. Columns: task, layer, latent, weight (the larger of both).
    No loss is looked at.
    """
    first = features[features["seed"].eq(features["seed"].min()) & (features["after"] > 0)]
    pruned = first[first["method"].eq("prune_contrast") & first["k"].eq(k).fillna(False)]
    cleaned = rows(first, method="clean", penalty=first["penalty"].max())
    kept = [part.sort_values("after").groupby(["task", "layer"]).tail(most) for part in (pruned, cleaned)]
    found = pd.concat(kept).groupby(["task", "layer", "latent"], as_index=False)["after"].max()
    return found.rename(columns={"after": "weight"})


def recovered(frame: pd.DataFrame, plain: pd.DataFrame) -> pd.Series:
    """Return the share of every task's gain from zero-shot to few-shot loss that vectors recover (seeds averaged).

    ``plain``: the zero_shot and few_shot rows on the same prompts. 0 is zero-shot, 1 few-shot; both can be passed.
    """
    zero, few, loss = (
        part.groupby("task")["loss"].mean()
        for part in (rows(plain, method="zero_shot"), rows(plain, method="few_shot"), frame)
    )
    return ((zero - loss) / (zero - few)).dropna().rename("recovered")


def heads_in_order(effects: pd.DataFrame, task: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Return all heads (block, head), the largest mean effect first, and the tasks that this is the mean of.

    ``effects``: the table of experiment 21_heads. These are all tasks but ``task``; that alone where there is no other.
    """
    found = rows(effects, method="head")
    others = found[found["task"].ne(task)]
    judged = others if len(others) else found
    by_task = judged.groupby(["task", "layer", "head"])["effect"].mean()
    order = by_task.groupby(["layer", "head"]).mean().sort_values(ascending=False, kind="stable").index
    return [(int(layer), int(head)) for layer, head in order], sorted(judged["task"].unique())


def overlap(features: pd.DataFrame) -> pd.DataFrame:
    """Return, for every pair of methods, the mean share of the first's latents that the second has too.

    ``features``: the latents of supports, one row each, with task, layer, k, seed and method. Two methods are compared
    within a seed; on the diagonal, a method with itself under other seeds (NaN where it has but one).
    """
    grids = []
    for _, part in features.groupby(["task", "layer", "k"]):
        held = pd.crosstab([part["method"], part["seed"]], part["latent"])
        method, seed = (held.index.get_level_values(level).to_numpy() for level in (0, 1))
        share = held.dot(held.T).div(held.sum(axis=1), axis=0).to_numpy(copy=True)
        share[(method[:, None] == method) == (seed[:, None] == seed)] = np.nan
        grids.append(pd.DataFrame(share, method, method).groupby(level=0).mean().T.groupby(level=0).mean().T)
    return pd.concat(grids).groupby(level=0).mean()


def steering_gain(frame: pd.DataFrame) -> pd.Series:
    """Normalise single-feature effects as the post does: 1 for the feature that helps a task most, 0 for no help.

    ``frame``: task, latent and rel_loss, one row per feature and task. A loss above the unsteered one counts as no
    effect; the fall is divided by the task's largest, and less than a fifth of that is set to 0. Random directions
    (negative latents) are held against the largest fall of a feature too, and may exceed 1. All 0 where none helps.
    """
    fall = (-frame["rel_loss"]).clip(lower=0)
    largest = fall.where(frame["latent"] >= 0).groupby(frame["task"]).transform("max")
    gain = fall / largest.replace(0, np.nan)
    return gain.where(gain >= 0.2, 0).rename("gain")


def best_single(table: pd.DataFrame, sweep: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the test row of every task (the index) with the feature that steers it best at its best scale.

    ``table`` and ``sweep`` are those of experiment 05: both were chosen on validation prompts, which ``sweep`` holds.
    """
    tried = rows(sweep, kind=kind)
    tried = tried[tried["latent"] >= 0]  # the others are random directions
    chosen = tried.loc[tried.groupby("task")["loss"].idxmin(), ["task", "latent"]]
    return chosen.merge(rows(table, kind=kind, which="best"), on=["task", "latent"]).set_index("task")


def block_order(gain: pd.DataFrame) -> tuple[list, list]:
    """Order a grid of gains (features x tasks) so that what belongs together stands together.

    Tasks by hierarchical clustering of their columns, features by the task that each helps most.
    """
    columns = list(gain.columns)
    if len(columns) > 2:
        from scipy.cluster.hierarchy import leaves_list, linkage

        columns = [columns[i] for i in leaves_list(linkage(gain.to_numpy().T, "average", optimal_ordering=True))]
    ordered = gain[columns]
    best = ordered.to_numpy().argmax(axis=1)
    rank = sorted(range(len(ordered)), key=lambda i: (best[i], -ordered.iloc[i].max()))
    return [ordered.index[i] for i in rank], columns


def crossed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the relative loss change of every task's vector (rows) on every task's prompts (columns).

    ``frame``: rows of experiment 08, of one vector a task, and the zero_shot rows. On the diagonal a vector is at
    home, on as many prompts as it is tested on elsewhere.
    """
    steered = frame[frame["layer"] >= 0]
    away, home = rows(steered, on="other"), rows(steered, on="test")
    zero = rows(frame, on="test", method="zero_shot").set_index("task")["losses"]
    grid, n = away.pivot(index="task", columns="tested", values="rel_loss"), away["n"].max()
    for task, losses in zip(home["task"], home["losses"], strict=True):
        grid.loc[task, task] = np.mean(losses[:n]) / np.mean(zero[task][:n]) - 1
    return grid


def best_layer(frame: pd.DataFrame, column: str = "validation_loss") -> int:
    """Return the layer with the lowest mean of ``column`` over tasks, of those that have the most tasks."""
    steered = frame[frame["layer"] >= 0]
    grid = steered.pivot_table(index="layer", columns="task", values=column, aggfunc="mean")
    measured = grid.notna().sum(axis=1)
    return int(grid[measured == measured.max()].mean(axis=1).idxmin())


def spread_points(spread: pd.DataFrame, space: str) -> pd.DataFrame:
    """Return the thetas of experiment 20 as points, one a draw, centred on the mean of all tasks and of length 1.

    ``spread``: rows of its table, of one layer. ``space``: "coordinates" (the stream, on random directions) or "codes".
    Index: task and draw.
    """
    index = pd.MultiIndex.from_frame(spread[["task", "draw"]])
    if space == "codes":
        parts = spread[["latents", "codes"]].explode(["latents", "codes"])
        parts = parts.assign(row=parts.index, codes=parts["codes"].astype(float))
        found = parts.pivot(index="row", columns="latents", values="codes").reindex(spread.index).fillna(0)
        points = found.to_numpy()
    else:
        points = np.stack(spread[space].to_list())
    points = points - pd.DataFrame(points).groupby(spread["task"].to_numpy()).mean().mean().to_numpy()
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return pd.DataFrame(points / np.where(length > 0, length, 1), index=index)


def nearest_centroid(spread: pd.DataFrame, space: str) -> pd.Series:
    """Say of thetas (the index: task and draw) which task's mean is nearest by its cosine.

    The even draws of a task make its mean, the odd ones are asked. ``spread`` and ``space`` as in `spread_points`.
    """
    points = spread_points(spread, space)
    even = points.index.get_level_values("draw") % 2 == 0
    centroids = points[even].groupby(level="task").mean()
    centroids = centroids.div(np.linalg.norm(centroids, axis=1), axis=0)
    nearest = (points[~even].to_numpy() @ centroids.to_numpy().T).argmax(axis=1)
    return pd.Series(centroids.index[nearest], points.index[~even], name="nearest")


def _cells(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Average the seeds of each task prompt by prompt: one row per task and combination of ``by``."""
    if frame["on"].nunique() > 1:
        raise ValueError(f"Choose the prompts to average over: this frame mixes {sorted(set(frame['on']))}.")
    lengths = frame["losses"].str.len()
    if (mixed := lengths.groupby(frame["task"]).nunique().loc[lambda n: n > 1]).size:
        raise ValueError(f"Rows of {mixed.index[0]} are of different numbers of prompts: run it again.")
    keys = [*by, "task"]
    codes = frame.groupby(keys, dropna=False, sort=True).ngroup().to_numpy()
    measures = [name for name in MEASURES if name in frame]
    cells = frame[keys].assign(_code=codes).drop_duplicates("_code").set_index("_code").sort_index()
    cells[measures] = frame[measures].astype("Float64").groupby(codes).mean().astype(float)
    losses, order = frame["losses"].to_list(), np.argsort(codes, kind="stable")
    seeds = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
    cells["losses"] = [np.mean([losses[i] for i in part], axis=0, dtype=float) for part in seeds]
    return cells.reset_index(drop=True)


def _zero(frame: pd.DataFrame | None, value: str) -> dict[str, np.ndarray] | None:
    """Return the zero-shot losses of every task where ``value`` is relative to them."""
    if value == "loss":
        return None
    if value != "rel_loss":
        raise ValueError(f"value is 'loss' or 'rel_loss', not {value!r}.")
    found = None if frame is None else rows(frame, method="zero_shot")
    if found is None or found.empty:
        raise ValueError("Relative losses need the zero_shot rows: pass the whole table as `zero`.")
    return dict(_cells(found, [])[["task", "losses"]].itertuples(index=False))


def _resample(cells, index, n_cells: int, zero, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the task means [cell, task] (NaN: not measured), and bootstrap means over tasks [cell, draw]."""
    tasks = sorted(cells["task"].unique())
    of = {task: part for task, part in cells.assign(_cell=index).groupby("task")}
    sizes = tuple(len(of[task]["losses"].iloc[0]) for task in tasks)
    counts, prompts = _weights(sizes, DRAWS, seed)
    points = np.full((n_cells, len(tasks)), np.nan)
    total, weight = np.zeros((n_cells, DRAWS)), np.zeros((n_cells, DRAWS))
    for t, task in enumerate(tasks):
        at, losses = of[task]["_cell"].to_numpy(), np.stack(of[task]["losses"].to_list())
        means, drawn = losses.mean(1), losses @ prompts[t]
        if zero is not None:
            if len(zero[task]) != losses.shape[1]:
                raise ValueError(f"{task}: the zero-shot losses are of other prompts; run it again.")
            means, drawn = means / zero[task].mean() - 1, drawn / (zero[task] @ prompts[t]) - 1
        points[at, t] = means
        total[at] += counts[t] * drawn
        weight[at] += counts[t]
    with np.errstate(invalid="ignore"):
        return points, total / weight  # NaN where a draw holds no task that the cell has


@lru_cache(maxsize=4)
def _weights(sizes: tuple[int, ...], draws: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw how often each task enters [task, draw] and, per task, the share of each prompt [prompt, draw].

    The same for every method, so that differences are paired. ``c`` resamples of the same ``n`` prompts are
    one multinomial draw of ``c * n``.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws).T
    prompts = []
    for n, drawn in zip(sizes, counts, strict=True):
        trials = np.maximum(drawn, 1) * n
        prompts.append(rng.multinomial(trials, np.full(n, 1 / n)).T / trials)
    return counts, prompts


def _quantiles(draws: np.ndarray) -> np.ndarray:
    return np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
