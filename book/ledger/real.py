"""The numbers that decide whether what is found is real: experiments 06 to 12, and planted worlds."""

from __future__ import annotations

import pandas as pd

from book.ledger.claims import Book, ClaimError, number, relative
from nb_utils import statistics
from nb_utils.statistics import Comparison, compare, over_tasks, rows

RECURS = 0.7  # cosine from which on a feature counts as found again in another dictionary

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
def rule_beats_random_longer(book: Book) -> Comparison:
    return compare(book.longer("rule"), book.longer("random_matched"))


@number
def cleaning_beats_rule(book: Book) -> Comparison:
    return compare(book.support("prune_contrast"), book.support("rule"))


@number
def tuning_flatters_chance(book: Book) -> Comparison:
    return over_tasks(book.recovered("random_matched") - book.recovered("random_matched", "fitted"))


@number
def supports_agree(book: Book) -> Comparison:
    found = book.last("07_illusion_features")
    found = book.sized(found[found["method"].isin(["rule", "prune_contrast"])], "07")
    shared = {task: statistics.overlap(one).loc["rule", "prune_contrast"] for task, one in found.groupby("task")}
    return over_tasks(pd.Series(shared))


# 08 Side effects


@number
def wrong_vectors_do_less(book: Book) -> Comparison:
    first = rows(book.side_pruned, seed=0)  # others are tried on their own task only
    grid = statistics.crossed(pd.concat([first, rows(book.side, method="zero_shot")]))
    square = grid[grid.index]
    own = pd.Series({task: square.loc[task, task] for task in square})
    return over_tasks(own - (square.sum() - own) / (len(square) - 1))


@number
def relation_matters(book: Book) -> Comparison:
    true, shuffled = (rows(book.side, method=m, on="test") for m in ("centred_best_scale", "shuffled_labels"))
    return over_tasks(relative(true) - relative(shuffled))


@number
def pruning_is_gentler_in_text(book: Book) -> Comparison:
    pruned, cleaned = (rows(part, on="separator") for part in (book.side_pruned, rows(book.side, method="clean")))
    return over_tasks(pruned.groupby("task")["d_ntp"].mean() - cleaned.groupby("task")["d_ntp"].mean())


# 09 Templates


@number
def pruned_leaves_its_template(book: Book) -> Comparison:
    return over_tasks(book.templates("prune_contrast", home=False) / book.templates("prune_contrast", home=True))


# 10 Necessity


@number
def executors_are_needed(book: Book) -> Comparison:
    return over_tasks(book.needed("executor"))


@number
def executors_beat_controls(book: Book) -> Comparison:
    return over_tasks(book.needed("executor") - book.needed("executor", book.strictest_executors))


@number
def executors_say_the_task(book: Book) -> Comparison:
    return over_tasks(book.needed_beyond_any("executor"))


@number
def detectors_are_needed(book: Book) -> Comparison:
    return over_tasks(book.needed("detector"))


@number
def detectors_beat_controls(book: Book) -> Comparison:
    return over_tasks(book.needed("detector") - book.needed("detector", book.strictest_detectors))


@number
def one_block_is_bypassed(book: Book) -> Comparison:
    return over_tasks(book.needed("executor") - book.needed("executor", together=False))


@number
def few_rescue(book: Book) -> Comparison:
    if (found := book.rescuers("executor")).empty:
        raise ClaimError("No task loses a tenth of the few-shot gain without the executors of one block.")
    return over_tasks(found)


@number
def removal_spares_other_tasks(book: Book) -> Comparison:
    own = book.taken("executor", on="test")
    own = own[own["together"].eq(own.groupby("task")["together"].transform("max"))].groupby("task")["loss"].mean()
    few = rows(book.table("10_necessity"), method="few_shot", on="test").groupby("task")["loss"].mean()
    return over_tasks(book.spared("executor", "other") - (own - few))


@number
def removal_spares_text(book: Book) -> Comparison:
    return over_tasks(book.spared("executor", "text"))


# 13 Ground truth: a task's features are known


@number
def cleaning_keeps_planted(book: Book) -> Comparison:
    return over_tasks(book.planted("clean", "precision"))


@number
def pruning_finds_planted(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast"))


@number
def pruning_keeps_planted(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast", "precision") - book.planted("clean", "precision"))


@number
def loss_tells_planted(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast", "loss") - book.planted("planted_tuned", "loss"))


@number
def pruning_finds_more_than_projection(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast") - book.planted("top_k_projection"))


@number
def pruning_finds_more_than_pursuit(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast") - book.planted("nonnegative_omp"))


@number
def pruning_finds_more_than_contrast(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast") - book.planted("contrast_codes"))


@number
def cleaning_finds_fewer(book: Book) -> Comparison:
    return over_tasks(book.planted("clean", "recall") - book.planted("prune_contrast", "recall"))


@number
def spoiled_dictionaries_hide(book: Book) -> Comparison:
    return over_tasks(book.planted("prune_contrast", dictionary="spoiled") - book.planted("prune_contrast"))


# 11 Dictionaries: does it take a trained one?


@number
def training_beats_orthonormal(book: Book) -> Comparison:
    return compare(book.by_dictionary("trained"), book.by_dictionary("orthonormal"))


@number
def training_beats_components(book: Book) -> Comparison:
    return compare(book.by_dictionary("trained"), book.by_dictionary("components"))


@number
def training_beats_unembedding(book: Book) -> Comparison:
    return compare(book.by_dictionary("trained"), book.by_dictionary("unembedding"))


@number
def training_beats_frozen_decoder(book: Book) -> Comparison:
    return compare(book.by_dictionary(book.fair), book.by_dictionary("frozen_decoder"))


@number
def training_beats_frozen_encoder(book: Book) -> Comparison:
    return compare(book.by_dictionary(book.fair), book.by_dictionary("frozen_encoder"))


@number
def training_cleans_better(book: Book) -> Comparison:
    return compare(book.by_dictionary("trained", "clean"), book.by_dictionary("orthonormal", "clean"))


@number
def training_steers_more(book: Book) -> Comparison:
    there = set(rows(book.dictionaries, method="single", layer=book.late_dictionaries)["dictionary"])
    rivals = there & {"orthonormal", "components", "unembedding"}
    if not rivals:
        raise ClaimError("No untrained dictionary kept a feature to steer with.")
    best = min(sorted(rivals), key=lambda name: book.by_dictionary(name, "single")["rel_loss"].mean())
    return over_tasks(relative(book.by_dictionary("trained", "single")) - relative(book.by_dictionary(best, "single")))


@number
def training_is_needed_more(book: Book) -> Comparison:
    def beyond(name: str) -> pd.Series:
        own, other = (book.by_dictionary(name, method) for method in ("own", "same_activation"))
        return own.groupby("task")["necessity"].mean() - other.groupby("task")["necessity"].mean()

    return over_tasks(beyond("trained") - beyond("orthonormal"))


@number
def features_recur(book: Book) -> Comparison:
    found = book.recurring()
    return over_tasks(found.groupby("task")["cosine"].apply(lambda cosines: (cosines >= RECURS).mean()))


@number
def recurrence_predicts_effect(book: Book) -> Comparison:
    """Rank correlations, so that no one feature decides."""
    found = book.recurring()
    return over_tasks(pd.Series({
        task: part["cosine"].corr(-part["rel_loss"], method="spearman")
        for (task, layer), part in found.groupby(["task", "layer"]) if layer == book.late_dictionaries
    }))  # fmt: skip


# 12 Labels: can they be wrong?


@number
def labels_tell_where(book: Book) -> Comparison:
    return over_tasks(book.told("detection"))


@number
def contexts_are_alike(book: Book) -> Comparison:
    return over_tasks(book.labelled.groupby("task")["intruder"].mean())


@number
def labels_tell_what_rises(book: Book) -> Comparison:
    return over_tasks(book.told("output"))


@number
def labels_tell_tasks(book: Book) -> Comparison:
    return over_tasks(book.told("prediction"))


@number
def own_features_help_alone(book: Book) -> Comparison:
    return over_tasks(book.alone(own=True) - book.alone(own=False))
