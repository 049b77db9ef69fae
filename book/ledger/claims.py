"""Claims: what the numbers that decide them rest on, the tables and the choices that all of them share.

A function decorated with `number`, or given to `numbers`, computes one, in a module of `book.ledger.numbers`; its name
is the id of a claim, or what a sentence names. `ledger` compares it with what is claimed. What the numbers rest on and
could have been chosen otherwise is data, `Choices`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from nb_utils import statistics, tasks
from nb_utils.record import tables
from nb_utils.statistics import Comparison, best_layer, choose, over_tasks, rows

NUMBERS: dict[str, Callable[[Book], Comparison | float]] = {}
NAMED: dict[str, Callable[[Book], object]] = {}
# Families of tasks, by the category that their files name; a task of any other is one of "others".
FAMILIES = {
    "translation": "translations", "knowledge": "knowledge", "inflection": "inflections", "list": "lists",
    "classification": "classifications", "composition": "compositions",
}  # fmt: skip


class ClaimError(ValueError):
    """A claim that cannot be decided or is written wrongly; the message says what is missing."""


def number(function: Callable[[Book], Comparison | float]) -> Callable[[Book], Comparison | float]:
    """Register a function that computes, from a `Book`, a number with its interval, or a plain one."""
    NUMBERS[function.__name__] = function
    return function


def numbers(**functions: Callable[[Book], Comparison | float]) -> None:
    """Register functions of one expression, as `number` does."""
    NUMBERS.update(functions)


def named(**functions: Callable[[Book], object]) -> None:
    """Register what claims call by a {placeholder}, beside the parts of a `Book`."""
    NAMED.update(functions)


@dataclass(frozen=True)
class Choices:
    """What numbers rest on and could reasonably be otherwise; the defaults are the book's.

    ``k``: features of the pruned vector. ``block``: where each method stands, at its "own" block (where it validates
    best; a dense vector without validation losses where its *test* loss is lowest, which favours it), at that of the
    lowest "test" loss, or at one "shared" by all, the pruned vector's. ``mode``: how dense vectors are used that the
    tables have both ways, "add" or "replace". ``seeds``: "all" or the "first". ``over``: intervals resample "tasks" or
    "families" of them, or are about the "median" task.
    """

    k: int = 20
    block: str = "own"
    mode: str = "add"
    seeds: str = "all"
    over: str = "tasks"


# Each of the reasonable other choices, alone.
OTHERWISE = {
    "each block by test loss": {"block": "test"},
    "all at one block": {"block": "shared"},
    "5 features": {"k": 5},
    "10 features": {"k": 10},
    "30 features": {"k": 30},
    "replacing task vectors": {"mode": "replace"},
    "first seed only": {"seeds": "first"},
    "families resampled": {"over": "families"},
    "median task": {"over": "median"},
}


class Book:
    """What the findings read: the tables of one model, and the choices that all of them share.

    Each part is read when it is first asked for, which raises TableError if its table is missing, and ClaimError if it
    has not what is asked for.
    """

    def __init__(self, model: str = tables.MODEL, folder: str | None = None, choices: Choices | None = None) -> None:
        self.model, self.folder, self.choices = model, folder, choices or Choices()
        self._read: dict[str, pd.DataFrame] = {}

    def otherwise(self, **chosen: object) -> Book:
        """Return a book of the same tables, once read, that chooses otherwise in some of `Choices`."""
        other = Book(self.model, self.folder, replace(self.choices, **chosen))
        other._read = self._read
        return other

    def __getitem__(self, name: str) -> object:
        """Return a part by its name, for text with {placeholders}; of vectors, the block that they stand at."""
        part = NAMED[name](self) if name in NAMED else getattr(self, name)
        return int(part["layer"].iloc[0]) if isinstance(part, pd.DataFrame) else part

    @property
    def k(self) -> int:
        """The features of the pruned vector."""
        return self.choices.k

    # Tables

    @property
    def stems(self) -> list[str]:
        """The experiments whose tables were read so far."""
        return sorted(self._read)

    def read(self, stem: str) -> pd.DataFrame:
        """Return the table of an experiment, of all tasks."""
        if stem not in self._read:
            self._read[stem] = tables.load(stem, self.model, self.folder)
        found = self._read[stem]
        return rows(found, seed=0) if self.choices.seeds == "first" and "seed" in found else found

    def table(self, stem: str) -> pd.DataFrame:
        """Return the table of an experiment, of the tasks that count: those that the model is known to do few-shot."""
        found = self.read(stem)
        return found[found["task"].isin(self.done.index[self.done])]

    def last(self, stem: str) -> pd.DataFrame:
        """Return the table of an experiment that the book runs after one block; where there are several, the last."""
        found = self.table(stem)
        return found[found["layer"].isna() | found["layer"].lt(0) | found["layer"].eq(found["layer"].max())]

    def setting(self, stem: str, name: str) -> object:
        """Return a parameter that an experiment was run with (that of its first table)."""
        if not (origins := tables.origins(stem, self.model, self.folder)):
            raise ClaimError(f"There are no tables of {stem}.")
        return origins[0]["parameters"][name]

    @cached_property
    def everything(self) -> pd.DataFrame:
        """The rows of experiments 01 and 02, of the tasks that both have."""
        plain, cleanup = self.read("01_reconstruction_loss"), self.read("02_cleanup")
        frame = pd.concat([plain, cleanup], ignore_index=True)
        return frame[frame["task"].isin(plain["task"]) & frame["task"].isin(cleanup["task"])]

    @cached_property
    def done(self) -> pd.Series:
        """Say of every task whether the model does it few-shot."""
        return statistics.solved(self.read("01_reconstruction_loss"))

    @cached_property
    def family(self) -> dict[str, str]:
        """The family of every task; those that are not shipped are others, too."""
        shipped = set(tasks.names())
        category = {task: tasks.load(task).category for task in self.done.index if task in shipped}
        return {task: FAMILIES.get(category.get(task, ""), "others") for task in self.done.index}

    @cached_property
    def test(self) -> pd.DataFrame:
        return rows(self.everything[self.everything["task"].map(self.done)], on="test")

    def plain(self, method: str) -> pd.DataFrame:
        """Return the rows of prompts without a vector: zero_shot or few_shot."""
        return rows(self.test, method=method, mode="none")

    # Vectors of experiments 01 and 02, and where they stand

    def everywhere(self, method: str, most: int | None = None, mode: str = "add", **equal: object) -> pd.DataFrame:
        """Return the test rows of a method at all blocks; of cleaned vectors, at the penalty that validates best.

        ``most``: of penalties that leave no more features than that.
        """
        found = rows(self.test, method=method, mode=mode, **equal)
        found = choose(found, most) if method.startswith("clean") else found
        if found.empty:
            asked = ", ".join(f"{name} {value}" for name, value in equal.items())
            raise ClaimError(f"No table has {method} vectors ({mode}{asked and f', {asked}'}).")
        return found

    def at(self, layer: int, method: str, **asked: object) -> pd.DataFrame:
        """Return the test rows of a method at one block; ``asked`` as for `everywhere`."""
        found = rows(self.everywhere(method, **asked), layer=layer)
        if found.empty:
            raise ClaimError(f"No table has {method} vectors of block {layer}.")
        return found

    def best(self, method: str, **asked: object) -> pd.DataFrame:
        """Return the test rows of a method at its own block (see `Choices`); ``asked`` as for `everywhere`."""
        if self.choices.block == "shared":
            return self.at(self.layer, method, **asked)
        found = self.everywhere(method, **asked)
        return rows(found, layer=self.own_layer(found))

    def own_layer(self, found: pd.DataFrame) -> int:
        """Return the block where vectors validate best, or have the lowest test loss if they have no other."""
        validated = "validation_loss" in found and found["validation_loss"].notna().any()
        return best_layer(found, "validation_loss" if validated and self.choices.block != "test" else "loss")

    @cached_property
    def layer(self) -> int:
        """The block of the pruned vector."""
        return self.own_layer(self.everywhere("prune_contrast", k=self.k))

    @cached_property
    def vector(self) -> pd.DataFrame:
        return self.best("task_vector", mode=self.choices.mode)

    @cached_property
    def replaced(self) -> pd.DataFrame:
        """The task vector that replaces the stream."""
        return self.best("task_vector", mode="replace")

    @cached_property
    def centred(self) -> pd.DataFrame:
        """The centred vector at its best scale."""
        return self.best("centred_best_scale")

    @cached_property
    def learned(self) -> pd.DataFrame:
        return self.best("learned_vector")

    @cached_property
    def cleaned(self) -> pd.DataFrame:
        return self.best("clean")

    @cached_property
    def cleaned_to_15(self) -> pd.DataFrame:
        return self.best("clean", most=15)

    @cached_property
    def cleaned_to_10(self) -> pd.DataFrame:
        return self.best("clean", most=10)

    @cached_property
    def pruned(self) -> pd.DataFrame:
        return self.best("prune_contrast", k=self.k)

    @cached_property
    def pruned_to_10(self) -> pd.DataFrame:
        return self.best("prune_contrast", k=10)

    @cached_property
    def pruned_to_5(self) -> pd.DataFrame:
        return self.best("prune_contrast", k=5)

    @cached_property
    def layers(self) -> list[int]:
        """The blocks with cleaned vectors."""
        return sorted(self.everywhere("clean")["layer"].unique().tolist())

    @property
    def early(self) -> int:
        """The earliest block with a cleaned vector."""
        return self.layers[0]

    @property
    def late(self) -> int:
        """The last block with a cleaned vector."""
        return self.layers[-1]

    def closed(self, vectors: pd.DataFrame) -> float:
        """Return the share of the gap between the mean zero-shot and few-shot losses that vectors close."""
        parts = (vectors, self.plain("zero_shot"), self.plain("few_shot"))
        loss, zero, few = (part.groupby("task")["loss"].mean().mean() for part in parts)
        return float((zero - loss) / (zero - few))

    def sentences(self, method: str) -> pd.DataFrame:
        """Return the rows of a word vector on sentences; all stand at the block where cleaning validates best."""
        found = rows(self.everything[self.everything["task"].map(self.done)], on="sentence", method=method)
        return choose(found)

    # Experiment 03

    @cached_property
    def transfer(self) -> pd.DataFrame:
        return self.table("03_early_layer_transfer_overlap")

    @cached_property
    def transfer_early(self) -> int:
        return int(rows(self.transfer, method="clean")["layer"].min())

    @cached_property
    def transfer_late(self) -> int:
        """The block of the pruned vector; the last one, if transfer was not read there."""
        read = rows(self.transfer, method="clean")["read"]
        return self.layer if read.eq(self.layer).any() else int(read.max())

    def woken(self, column: str, method: str, layer: int | None = None) -> pd.Series:
        """Return one number a task of what a vector wakes, from the earliest block to the late one."""
        at = {"layer": self.transfer_early if layer is None else layer, "read": self.transfer_late}
        return rows(self.transfer, method=method, **at).groupby("task")[column].mean()

    # Experiment 04

    @cached_property
    def detectors(self) -> pd.DataFrame:
        return rows(self.table("04_detectors"), on="test")

    @cached_property
    def detector_layer(self) -> int:
        """The block of the cleaned detector."""
        return self.own_layer(self.detector("clean"))

    def detector(self, method: str, layer: int | None = None, mode: str = "add", **equal: object) -> pd.DataFrame:
        """Return the test rows of a detector vector, at one block or at all; cleaned ones as validation chooses."""
        found = rows(self.detectors, method=method, mode=mode, **equal)
        found = choose(found) if method == "clean" else found
        found = found if layer is None else rows(found, layer=layer)
        if found.empty:
            raise ClaimError(f"Experiment 04 has no such {method} vectors.")
        return found

    @cached_property
    def raw_detectors(self) -> pd.DataFrame:
        """The uncleaned detector at its best block on test, which favours it."""
        found = self.detector("task_vector", mode=self.choices.mode)
        return rows(found, layer=self.detector_layer if self.choices.block == "shared" else self.own_layer(found))

    @cached_property
    def centred_detectors(self) -> pd.DataFrame:
        """The centred detector at its best scale, at the block of its lowest test loss, which favours it."""
        found = self.detector("centred_best_scale")
        return rows(found, layer=self.detector_layer if self.choices.block == "shared" else self.own_layer(found))

    @cached_property
    def first_executors(self) -> int:
        """The first block that has cleaned executors and detectors; executors come from experiment 02, or else 03."""
        executors = {*self.layers, *rows(self.table("03_early_layer_transfer"), method="clean")["layer"]}
        if not (both := executors & set(self.detector("clean")["layer"])):
            raise ClaimError("No block has both a cleaned executor and a cleaned detector.")
        return min(both)

    def executor(self, method: str, layer: int, k: int | None = None) -> pd.DataFrame:
        """Return the executor of a block, of ``k`` features if it is pruned, from experiment 04, 02 or else 03."""
        found = rows(self.detectors, method=f"executor_{method}", layer=layer, k=k)
        if not found.empty:
            return found
        if layer in self.layers:
            return self.at(layer, method, **({} if k is None else {"k": k}))
        found = rows(self.table("03_early_layer_transfer"), method=method, layer=layer)
        if found.empty or k not in (None, self.setting("03_early_layer_transfer", "sizes")[-1]):
            raise ClaimError(f"Experiment 03 has no such {method} vectors of block {layer}.")
        return found

    def mass(self, kind: str, token_type: str) -> pd.Series:
        """Return the share of activation that a task's features of a kind spend on tokens of a type."""
        layer = self.detector_layer if kind == "detector" else self.mass_layer
        found = rows(self.table("04_detectors_mass"), kind=kind, token_type=token_type, layer=layer)
        return found.groupby("task")["mass"].mean()

    @cached_property
    def mass_layer(self) -> int:
        """The last block whose executors were watched."""
        return int(rows(self.table("04_detectors_mass"), kind="executor")["layer"].max())

    @property
    def mass_elsewhere(self) -> str:
        """The mean share of activation that executors of the other blocks spend on arrows, as text."""
        found = rows(self.table("04_detectors_mass"), kind="executor", token_type="arrow")
        mean = found.groupby(["layer", "task"])["mass"].mean().groupby("layer").mean().drop(self.mass_layer)
        return ", ".join(f"{share:.0%} at block {layer}" for layer, share in mean.items()) or "not watched"

    # Experiment 05

    def steered(self, which: str, kind: str = "executor") -> pd.DataFrame:
        """Return the test rows of single directions at the "fixed" scale, or each at its "best" one."""
        return rows(self.table("05_cross_task_steering"), kind=kind, which=which)

    def single(self, kind: str = "executor") -> pd.Series:
        """Return the relative loss of every task with its best feature, chosen with its scale on validation prompts."""
        steered, sweep = (self.table(f"05_cross_task_steering{part}") for part in ("", "_sweep"))
        return statistics.best_single(steered, sweep, kind)["rel_loss"]

    def chance(self, kind: str = "executor") -> pd.Series:
        """Return the relative loss of every task with the random direction that is best on test, which favours it."""
        found = self.steered("best", kind)
        return found[found["latent"] < 0].groupby("task")["rel_loss"].min()

    def luckiest(self, control: str, kind: str = "executor") -> pd.Series:
        """Return the relative loss of every task with the best of a kind of control, chosen on validation prompts.

        All are in equal number: "feature", the features themselves; "matched", latents of their densities; "active",
        latents that fire on the task's own tokens; "direction", random directions.
        """
        found = rows(self.table("05_cross_task_steering_controls"), kind=kind, control=control)
        if found.empty:
            raise ClaimError(f"Experiment 05 has no {control} controls of {kind}s.")
        return found.loc[found.groupby("task")["validation_loss"].idxmin()].set_index("task")["rel_loss"]

    def hardest(self, kind: str = "executor") -> str:
        """Name the control that does most on average."""
        return min(("matched", "active", "direction"), key=lambda control: self.luckiest(control, kind).mean())

    @property
    def hardest_executors(self) -> str:
        return self.hardest()

    @property
    def hardest_detectors(self) -> str:
        return self.hardest("detector")

    @property
    def common_scale(self) -> float:
        """The scale at which all executors are compared, in mean residual norms."""
        return float(self.steered("fixed")["scale"].iloc[0])

    @cached_property
    def gain(self) -> pd.DataFrame:
        """The normalised gain of every feature (rows) on every task (columns) at the common scale."""
        return _gain(self.steered("fixed"))

    @cached_property
    def validated_gain(self) -> pd.DataFrame:
        """The same on validation prompts, at the scale of the sweep that is nearest; its smallest is next to none."""
        sweep = rows(self.table("05_cross_task_steering_sweep"), kind="executor")
        sweep = sweep[sweep["latent"] >= 0]
        tried = sweep.groupby("scale").size()
        tried = tried.index[tried == tried.max()].to_numpy()  # by all features
        near, none = (rows(sweep, scale=tried[np.abs(np.log(tried / at)).argmin()]) for at in (self.common_scale, 1e-9))
        return _gain(near.assign(rel_loss=near["loss"] / near["task"].map(none.groupby("task")["loss"].mean()) - 1))

    def decide(self, name: str) -> Comparison | float:
        """Compute a number of `NUMBERS`, averaged as these choices ask."""
        found = NUMBERS[name](self)
        if not isinstance(found, Comparison) or self.choices.over == "tasks":
            return found
        if self.choices.over == "median":
            return over_tasks(found.by_task, average=np.median)
        if (of_families := statistics.over_families(found.by_task, self.family)) is None:
            raise ClaimError("Its tasks are of too few families.")
        return of_families


    # Experiment 06

    def trained(self, prompts: str, choice: str = "validation", method: str = "prune_contrast") -> pd.DataFrame:
        """Return test rows of vectors trained on so many prompts ("all": every pair), by who chose the step."""
        found = rows(self.last("06_training_prompts"), on="test", method=method, prompts=prompts, choice=choice)
        if found.empty:
            raise ClaimError(f"No vector of experiment 06 was trained on {prompts} prompts.")
        return found

    @property
    def trained_layer(self) -> int:
        return int(self.trained("24")["layer"].max())

    @property
    def trained_size(self) -> float:
        """The features of vectors cleaned on 24 prompts, on average."""
        return float(self.trained("24", method="clean")["l0"].mean())

    # Experiment 07

    @cached_property
    def supports(self) -> pd.DataFrame:
        return rows(self.last("07_illusion"), on="test")

    @property
    def budget(self) -> str:
        """What the weights of a support are tuned with."""
        steps, prompts = (self.setting("07_illusion", name) for name in ("steps", "batch"))
        return f"{steps} steps of {prompts} prompts"

    def support(self, method: str, weights: str = "tuned") -> pd.DataFrame:
        """Return the vectors on supports of `k` features, after tuning ("tuned") or before ("fitted")."""
        return self.sized(self.supports, "07", method=method, weights=weights)

    def longer(self, method: str) -> pd.DataFrame:
        """Return the vectors on supports that were tuned with the largest budget, of the first seed."""
        found = self.table("07_illusion_budgets")
        return self.sized(rows(found, budget=found["budget"].max()), "07", method=method)

    @property
    def largest_budget(self) -> int:
        return int(self.table("07_illusion_budgets")["budget"].max())

    def recovered(self, method: str, weights: str = "tuned") -> pd.Series:
        """Return the share of every task's gain from zero-shot to few-shot that such vectors recover."""
        return statistics.recovered(self.support(method, weights), rows(self.supports, mode="none"))

    def sized(self, frame: pd.DataFrame, experiment: str, **equal: object) -> pd.DataFrame:
        """Return the rows of `k` features of an experiment that has but some sizes."""
        found = rows(frame, k=self.k, **equal)
        if found.empty:
            raise ClaimError(f"Experiment {experiment} has no vectors of {self.k} features.")
        return found

    # Experiment 08

    @cached_property
    def side(self) -> pd.DataFrame:
        return self.last("08_side_effects")

    @cached_property
    def side_pruned(self) -> pd.DataFrame:
        return self.sized(self.side, "08", method="prune_contrast")

    # Experiment 09

    def templates(self, method: str, home: bool) -> pd.Series:
        """Return the relative loss of every task on the template that a vector was made on, or on all others."""
        found = rows(self.last("09_templates"), method=method)
        return found[found["made_on"].eq(found["tested_on"]) == home].groupby("task")["rel_loss"].mean()


def _gain(frame: pd.DataFrame) -> pd.DataFrame:
    """Spread the normalised gains of features (not of random directions) over a grid: features x tasks."""
    found = frame[frame["latent"] >= 0]
    found = found.assign(gain=statistics.steering_gain(found)).fillna({"gain": 0})
    return found.pivot(index="latent", columns="task", values="gain")


def by_task(frame: pd.DataFrame, column: str) -> pd.Series:
    """Return the mean of a column for every task."""
    return frame.groupby("task", sort=False)[column].mean()


def relative(frame: pd.DataFrame) -> pd.Series:
    """Return the mean relative loss of every task."""
    return by_task(frame, "rel_loss")


def accuracy(frame: pd.DataFrame) -> pd.Series:
    """Return the mean share of right first tokens of every task."""
    return by_task(frame, "accuracy")
