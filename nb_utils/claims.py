"""Claims: the number that decides each claim of book/claims.yml, from the committed tables.

A function decorated with `number` computes one; its name is the id of the claim, or what a sentence in that file
names. `nb_utils.ledger` compares it with what is claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import pandas as pd

from nb_utils import metrics, tables
from nb_utils.metrics import Comparison, best_layer, choose, compare, over_tasks, rows

NUMBERS: dict[str, Callable[[Book], Comparison | float]] = {}


class ClaimError(ValueError):
    """A claim that cannot be decided or is written wrongly; the message says what is missing."""


def number(function: Callable[[Book], Comparison | float]) -> Callable[[Book], Comparison | float]:
    """Register a function that computes, from a `Book`, a number with its interval, or a plain one."""
    NUMBERS[function.__name__] = function
    return function


class Book:
    """What the findings read: the tables of one model, and the choices that all of them share.

    Each part is read when it is first asked for, which raises TableError if its table is missing.
    """

    k = 20  # features of the pruned vector

    def __init__(self, model: str = tables.MODEL, folder: str | None = None) -> None:
        self.model, self.folder = model, folder

    def __getitem__(self, name: str) -> object:
        """Return a part by its name, for text with {placeholders}."""
        return getattr(self, name)

    def table(self, stem: str) -> pd.DataFrame:
        """Return the table of an experiment, of the tasks that count."""
        found = tables.load(stem, self.model, self.folder)
        return found[found["task"].map(self.done)]

    def last(self, stem: str) -> pd.DataFrame:
        """Return the table of an experiment that the book runs after one block; where there are several, the last."""
        found = self.table(stem)
        return found[found["layer"].isna() | found["layer"].lt(0) | found["layer"].eq(found["layer"].max())]

    @cached_property
    def everything(self) -> pd.DataFrame:
        """The rows of experiments 01 and 02, of the tasks that both have."""
        stems = ("01_reconstruction_loss", "02_cleanup")
        plain, cleanup = (tables.load(stem, self.model, self.folder) for stem in stems)
        frame = pd.concat([plain, cleanup], ignore_index=True)
        return frame[frame["task"].isin(plain["task"]) & frame["task"].isin(cleanup["task"])]

    @cached_property
    def done(self) -> pd.Series:
        """Say of every task whether the model does it few-shot."""
        return metrics.solved(tables.load("01_reconstruction_loss", self.model, self.folder))

    @cached_property
    def test(self) -> pd.DataFrame:
        return rows(self.everything[self.everything["task"].map(self.done)], on="test")

    def added(self, method: str, layer: int | None = None, **equal: object) -> pd.DataFrame:
        """Return the test rows of a method that is added, at a block (None: that of the pruned vector)."""
        return rows(self.test, method=method, mode="add", layer=self.layer if layer is None else layer, **equal)

    def cleaned(self, layer: int | None = None, most: int | None = None) -> pd.DataFrame:
        """Return the cleaned vectors, at the penalty that validates best, of at most ``most`` features."""
        return choose(self.added("clean", layer), most)

    def plain(self, method: str) -> pd.DataFrame:
        """Return the rows of prompts without a vector: zero_shot or few_shot."""
        return rows(self.test, method=method, mode="none")

    @cached_property
    def layer(self) -> int:
        """The block where the pruned vector validates best: that of all sparse methods."""
        return best_layer(rows(self.test, method="prune_contrast", k=self.k))

    @cached_property
    def vector_layer(self) -> int:
        """The block where the added task vector is best on test, which favours it."""
        return best_layer(rows(self.test, method="task_vector", mode="add"), "loss")

    @cached_property
    def early(self) -> int:
        """The earliest block with a cleaned vector."""
        return int(rows(self.test, method="clean")["layer"].min())

    @cached_property
    def late(self) -> int:
        """The last block with a cleaned vector."""
        return int(rows(self.test, method="clean")["layer"].max())

    @cached_property
    def layers(self) -> list[int]:
        """The blocks with cleaned vectors."""
        return sorted(rows(self.test, method="clean")["layer"].unique().tolist())

    def closed(self, vectors: pd.DataFrame) -> float:
        """Return the share of the gap between the mean zero-shot and few-shot losses that vectors close."""
        parts = (vectors, self.plain("zero_shot"), self.plain("few_shot"))
        loss, zero, few = (part.groupby("task")["loss"].mean().mean() for part in parts)
        return float((zero - loss) / (zero - few))

    @property
    def vector(self) -> pd.DataFrame:
        return self.added("task_vector", self.vector_layer)

    @property
    def centred(self) -> pd.DataFrame:
        """The centred vector at its best scale and, on test, its best block."""
        found = rows(self.test, method="centred_best_scale")
        return rows(found, layer=best_layer(found, "loss"))

    # Experiment 03

    @cached_property
    def transfer(self) -> pd.DataFrame:
        return self.table("03_early_layer_transfer_overlap")

    @cached_property
    def transfer_early(self) -> int:
        return int(rows(self.transfer, method="clean")["layer"].min())

    @cached_property
    def transfer_late(self) -> int:
        """The block where the pruned vector validates best; the last one, if transfer was not read there."""
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

    @property
    def cleaned_detectors(self) -> pd.DataFrame:
        return choose(rows(self.detectors, method="clean"))

    @cached_property
    def detector_layer(self) -> int:
        return best_layer(self.cleaned_detectors)

    @property
    def raw_detectors(self) -> pd.DataFrame:
        return rows(self.detectors, method="task_vector", mode="add", layer=self.detector_layer)

    def mass(self, kind: str, token_type: str) -> pd.Series:
        """Return the share of activation that a task's features of a kind spend on tokens of a type."""
        found = rows(self.table("04_detectors_mass"), kind=kind, token_type=token_type)
        layer = self.detector_layer if kind == "detector" else found["layer"].max()
        return rows(found, layer=layer).groupby("task")["mass"].mean()

    # Experiment 05

    def steered(self, which: str, kind: str = "executor") -> pd.DataFrame:
        """Return the test rows of single directions at the "fixed" scale, or each at its "best" one."""
        return rows(self.table("05_cross_task_steering"), kind=kind, which=which)

    def single(self, kind: str = "executor") -> pd.Series:
        """Return the relative loss of every task with its best feature, chosen with its scale on validation prompts."""
        steered, sweep = (self.table(f"05_cross_task_steering{part}") for part in ("", "_sweep"))
        return metrics.best_single(steered, sweep, kind)["rel_loss"]

    def chance(self, kind: str = "executor") -> pd.Series:
        """Return the relative loss of every task with the random direction that is best on test, which favours it."""
        found = self.steered("best", kind)
        return found[found["latent"] < 0].groupby("task")["rel_loss"].min()

    @property
    def gain(self) -> pd.DataFrame:
        """The normalised gain of every feature (rows) on every task (columns) at the common scale."""
        found = self.steered("fixed")
        found = found[found["latent"] >= 0]
        found = found.assign(gain=metrics.steering_gain(found)).fillna({"gain": 0})
        return found.pivot(index="latent", columns="task", values="gain")

    # Experiment 06

    def trained(self, prompts: str, choice: str = "validation", method: str = "prune_contrast") -> pd.DataFrame:
        """Return test rows of vectors trained on so many prompts ("all": every pair), by who chose the step."""
        found = rows(self.last("06_training_prompts"), on="test", method=method, prompts=prompts, choice=choice)
        if found.empty:
            raise ClaimError(f"No vector of experiment 06 was trained on {prompts} prompts.")
        return found

    # Experiment 07

    @cached_property
    def supports(self) -> pd.DataFrame:
        return rows(self.last("07_illusion"), on="test")

    def support(self, method: str, weights: str = "tuned") -> pd.DataFrame:
        """Return the vectors on supports of `k` features, after tuning ("tuned") or before ("fitted")."""
        return rows(self.supports, method=method, k=self.k, weights=weights)

    def recovered(self, method: str, weights: str = "tuned") -> pd.Series:
        """Return the share of every task's gain from zero-shot to few-shot that such vectors recover."""
        return metrics.recovered(self.support(method, weights), rows(self.supports, mode="none"))

    # Experiment 08

    def side_effect(self, method: str, on: str, column: str, **equal: object) -> pd.Series:
        """Return one number a task of what a vector does on some prompts or text, over its seeds."""
        return rows(self.last("08_side_effects"), method=method, on=on, **equal).groupby("task")[column].mean()

    # Experiment 09

    def templates(self, method: str, home: bool) -> pd.Series:
        """Return the relative loss of every task on the template that a vector was made on, or on all others."""
        found = rows(self.last("09_templates"), method=method)
        return found[found["made_on"].eq(found["tested_on"]) == home].groupby("task")["rel_loss"].mean()


# 01 Reconstruction


@number
def reconstruction_costs(book: Book) -> Comparison:
    return compare(book.vector, book.added("reconstruct", book.vector_layer))


@number
def pursuit_costs(book: Book) -> Comparison:
    return compare(book.vector, book.added("gradient_pursuit", book.vector_layer, k=40))


# 02 Cleanup


@number
def cleaning_surpasses(book: Book) -> Comparison:
    return compare(book.cleaned(), book.vector)


@number
def cleaning_surpasses_sparsely(book: Book) -> Comparison:
    return compare(book.cleaned(most=15), book.vector)


@number
def cleaning_works_earlier(book: Book) -> Comparison:
    return compare(book.cleaned(book.early), book.added("task_vector", book.early))


@number
def cleaning_works_early(book: Book) -> Comparison:
    return compare(book.cleaned(book.early), book.plain("zero_shot"))


@number
def random_start_fails(book: Book) -> Comparison:
    random = book.added("clean_random_start")
    return compare(book.added("clean", penalty=random["penalty"].min()), random)


@number
def vector_wins_late(book: Book) -> Comparison:
    if book.late < 14:
        raise ClaimError(f"No vector is cleaned after block {book.late} yet.")
    return compare(book.added("task_vector", book.late), book.cleaned(book.late))


@number
def cleaning_carries_to_sentences(book: Book) -> Comparison:
    found = rows(book.everything[book.everything["task"].map(book.done)], on="sentence")
    return compare(*(choose(rows(found, method=method)) for method in ("clean", "task_vector")))


@number
def pruning_beats_centred(book: Book) -> Comparison:
    return compare(book.added("prune_contrast", k=book.k), book.centred)


@number
def five_features_beat_vector(book: Book) -> Comparison:
    return compare(book.added("prune_contrast", k=5), book.vector)


@number
def pruning_beats_cleaning(book: Book) -> Comparison:
    return compare(book.added("prune_contrast", k=book.k), book.cleaned(most=book.k))


@number
def cleaning_beats_centred(book: Book) -> Comparison:
    return compare(book.cleaned(), book.centred)


@number
def centring_helps(book: Book) -> Comparison:
    return compare(book.centred, book.vector)


@number
def pruning_works_early(book: Book) -> Comparison:
    return compare(book.added("prune_contrast", book.early, k=book.k), book.plain("zero_shot"))


@number
def earliest_block(book: Book) -> float:
    return book.early


@number
def distance_to_learned(book: Book) -> float:
    """How far the pruned vector's loss can be from that of a free dense vector, at the farther end of the interval."""
    found = compare(book.added("prune_contrast", k=book.k), book.added("learned_vector"))
    return max(abs(found.low), abs(found.high))


@number
def cleaned_features(book: Book) -> float:
    """The most features that cleaning leaves, of the means over tasks for every block and penalty."""
    return float(metrics.averages(rows(book.test, method="clean"), ["layer", "penalty"])["l0"].max())


@number
def vector_closes(book: Book) -> float:
    """The share of the gap from zero-shot to few-shot loss that the added vector closes, at most at any block."""
    return max(book.closed(book.added("task_vector", layer)) for layer in book.layers)


@number
def reconstruction_closes(book: Book) -> float:
    return max(book.closed(book.added("reconstruct", layer)) for layer in book.layers)


@number
def cleaning_closes_late(book: Book) -> float:
    """The share of the gap that cleaning closes, at least, from block 10 on."""
    return min(book.closed(book.cleaned(layer)) for layer in book.layers if layer >= 10)


@number
def pruning_closes(book: Book) -> float:
    """The share of the gap that pruning closes, at least, at any block."""
    return min(book.closed(book.added("prune_contrast", layer, k=book.k)) for layer in book.layers)


@number
def number_of_saes(book: Book) -> float:
    return len(tables.load("saes", book.model, book.folder))


@number
def tokens_of_evidence(book: Book) -> float:
    """The tokens of text that the evidence for features was read from, at least at any block."""
    return float(tables.load("features", book.model, book.folder, ["n_tokens"])["n_tokens"].min())


@number
def pairs_of_example(book: Book) -> float:
    """The pairs of the workbench's stored example."""
    return len(tables.load("explore_cleaning", book.model, book.folder)["pairs"].iloc[0])


@number
def few_pairs_clean(book: Book) -> float:
    """The loss of that example's pruned vector, as validation chooses it, less the zero-shot loss."""
    found = tables.load("explore_cleaning", book.model, book.folder)
    pruned = rows(found, method="prune_contrast")
    zero = rows(found, method="zero_shot")["loss"].iloc[0]
    return float(pruned.loc[pruned["validation_loss"].idxmin(), "loss"] - zero)


@number
def width_of_saes(book: Book) -> float:
    """The width that all SAEs have; NaN if they differ."""
    widths = set(tables.load("saes", book.model, book.folder)["d_sae"])
    return widths.pop() if len(widths) == 1 else float("nan")


# 03 Early-layer transfer


@number
def early_vector_wakes_late_features(book: Book) -> Comparison:
    return over_tasks(book.woken("overlap", "clean"))


@number
def task_features_gain_weight(book: Book) -> Comparison:
    own = book.woken("task_share", "own", book.transfer_late)
    return over_tasks(book.woken("task_share", "clean") - own)


@number
def early_vector_beats_random(book: Book) -> Comparison:
    return over_tasks(book.woken("overlap_gain", "clean") - book.woken("overlap_gain", "matched_random"))


@number
def centred_wakes_more(book: Book) -> Comparison:
    return over_tasks(book.woken("overlap_gain", "centred") - book.woken("overlap_gain", "clean"))


# 04 Detectors


@number
def detectors_need_cleaning(book: Book) -> Comparison:
    return compare(rows(book.cleaned_detectors, layer=book.detector_layer), book.raw_detectors)


@number
def raw_detectors_fail(book: Book) -> Comparison:
    return compare(book.raw_detectors, rows(book.detectors, method="dummy_shot"))


@number
def detectors_act_earlier(book: Book) -> Comparison:
    """Relative change by the cleaned detector less that by the cleaned executor, at the first block that both have."""
    cleanup, transfer = rows(book.test, method="clean"), rows(book.table("03_early_layer_transfer"), method="clean")
    detectors, first, second = (
        part.groupby(["task", "layer"])["rel_loss"].mean()
        for part in (book.cleaned_detectors, choose(cleanup), transfer)
    )
    executors = first.combine_first(second)
    both = (detectors - executors).dropna()
    return over_tasks(both.xs(both.index.get_level_values("layer").min(), level="layer"))


@number
def detectors_fire_on_words(book: Book) -> Comparison:
    return over_tasks(book.mass("detector", "output") + book.mass("detector", "input"))


@number
def executors_fire_on_arrows(book: Book) -> Comparison:
    return over_tasks(book.mass("executor", "arrow"))


@number
def detectors_fire_on_outputs(book: Book) -> Comparison:
    return over_tasks(book.mass("detector", "output"))


# 05 Cross-task steering


@number
def one_feature_does_part(book: Book) -> Comparison:
    return over_tasks(book.single())


@number
def one_feature_beats_chance(book: Book) -> Comparison:
    return over_tasks(book.single() - book.chance())


@number
def one_detector_beats_chance(book: Book) -> Comparison:
    return over_tasks(book.single("detector") - book.chance("detector"))


@number
def chance_does_little(book: Book) -> Comparison:
    return over_tasks(book.chance())


@number
def one_feature_per_task(book: Book) -> Comparison:
    return over_tasks((book.gain >= 0.5).sum())


@number
def english_shares_a_feature(book: Book) -> Comparison:
    english = book.gain.filter(regex="^en_")
    return over_tasks(english.loc[english.min(axis=1).idxmax()])


# 06 Training prompts


@number
def more_prompts_help(book: Book) -> Comparison:
    return compare(book.trained("all"), book.trained("24"))


@number
def early_choice_helps(book: Book) -> Comparison:
    return compare(book.trained("24"), book.trained("24", choice="train"))


@number
def early_choice_still_helps(book: Book) -> Comparison:
    return compare(book.trained("all"), book.trained("all", choice="train"))


# 07 Illusion test


@number
def rule_beats_random(book: Book) -> Comparison:
    return compare(book.support("rule"), book.support("random_matched"))


@number
def rule_beats_random_on_arrows(book: Book) -> Comparison:
    return compare(book.support("rule"), book.support("random_active"))


@number
def cleaning_beats_rule(book: Book) -> Comparison:
    return compare(book.support("prune_contrast"), book.support("rule"))


@number
def tuning_flatters_chance(book: Book) -> Comparison:
    return over_tasks(book.recovered("random_matched") - book.recovered("random_matched", "fitted"))


@number
def supports_agree(book: Book) -> Comparison:
    found = rows(book.last("07_illusion_features"), k=book.k)
    shared = {task: metrics.overlap(one).loc["rule", "prune_contrast"] for task, one in found.groupby("task")}
    return over_tasks(pd.Series(shared))


# 08 Side effects


@number
def wrong_vectors_do_less(book: Book) -> Comparison:
    frame = book.last("08_side_effects")
    pruned = rows(frame, method="prune_contrast", k=book.k)
    grid = metrics.crossed(pd.concat([pruned, rows(frame, method="zero_shot")]))
    square = grid[grid.index]
    own = pd.Series({task: square.loc[task, task] for task in square})
    return over_tasks(own - (square.sum() - own) / (len(square) - 1))


@number
def relation_matters(book: Book) -> Comparison:
    true = book.side_effect("centred_best_scale", "test", "rel_loss")
    return over_tasks(true - book.side_effect("shuffled_labels", "test", "rel_loss"))


@number
def pruning_is_gentler_in_text(book: Book) -> Comparison:
    pruned = book.side_effect("prune_contrast", "separator", "d_ntp", k=book.k)
    return over_tasks(pruned - book.side_effect("clean", "separator", "d_ntp"))


# 09 Templates


@number
def pruned_leaves_its_template(book: Book) -> Comparison:
    return over_tasks(book.templates("prune_contrast", home=False) / book.templates("prune_contrast", home=True))
