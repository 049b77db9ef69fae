"""The numbers that decide the claims of the post's experiments, 01 to 05."""

from __future__ import annotations

from book.ledger.claims import Book, ClaimError, number, relative
from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.statistics import Comparison, compare, over_tasks, rows

# 01 Reconstruction


@number
def reconstruction_costs(book: Book) -> Comparison:
    return compare(book.vector, book.at(book["vector"], "reconstruct", mode=book.choices.mode))


@number
def pursuit_costs(book: Book) -> Comparison:
    return compare(book.vector, book.at(book["vector"], "gradient_pursuit", mode=book.choices.mode, k=40))


# 02 Cleanup


@number
def cleaning_surpasses(book: Book) -> Comparison:
    return compare(book.cleaned, book.vector)


@number
def cleaning_surpasses_sparsely(book: Book) -> Comparison:
    return compare(book.cleaned_to_15, book.vector)


@number
def cleaning_beats_replaced(book: Book) -> Comparison:
    return compare(book.cleaned, book.replaced)


@number
def cleaning_works_earlier(book: Book) -> Comparison:
    return compare(book.at(book.early, "clean"), book.at(book.early, "task_vector", mode=book.choices.mode))


@number
def cleaning_works_early(book: Book) -> Comparison:
    return compare(book.at(book.early, "clean"), book.plain("zero_shot"))


@number
def random_start_fails(book: Book) -> Comparison:
    random = rows(book.test, method="clean_random_start", layer=book["cleaned"])
    same = rows(book.test, method="clean", layer=book["cleaned"], penalty=random["penalty"].min())
    return compare(same, random)


@number
def vector_wins_late(book: Book) -> Comparison:
    if book.late < 14:
        raise ClaimError(f"No vector is cleaned after block {book.late} yet.")
    return compare(book.at(book.late, "task_vector", mode=book.choices.mode), book.at(book.late, "clean"))


@number
def cleaning_carries_to_sentences(book: Book) -> Comparison:
    return compare(book.sentences("clean"), book.sentences("task_vector"))


@number
def cleaning_carries_better_than_centring(book: Book) -> Comparison:
    return compare(book.sentences("clean"), book.sentences("centred"))


@number
def pruning_beats_centred(book: Book) -> Comparison:
    return compare(book.pruned, book.centred)


@number
def pruning_beats_replaced(book: Book) -> Comparison:
    return compare(book.pruned, book.replaced)


@number
def five_features_beat_vector(book: Book) -> Comparison:
    return compare(book.pruned_to_5, book.vector)


@number
def pruning_beats_cleaning(book: Book) -> Comparison:
    """At equal data: experiment 06 gives both the same prompts."""
    return compare(book.trained("24"), book.trained("24", method="clean"))


@number
def pruning_beats_cleaning_at_equal_size(book: Book) -> Comparison:
    return compare(book.pruned_to_10, book.cleaned_to_10)


@number
def pruning_beats_cleaning_alike(book: Book) -> Comparison:
    """At equal data and size: both at the blocks where pruning was also given what cleaning has."""
    return compare(book.best("prune_contrast_few", k=10), book.cleaned_to_10)


@number
def pruning_beats_cleaning_at_its_best(book: Book) -> Comparison:
    """Cleaning with what pruning has: all training pairs, and a start from many latents."""
    return compare(book.pruned_to_10, book.best("clean_mean_codes_all", most=10))


@number
def pruning_reaches_learned(book: Book) -> Comparison:
    return compare(book.pruned, book.learned)


@number
def learned_beats_few_shot(book: Book) -> Comparison:
    return compare(book.learned, book.plain("few_shot"))


@number
def cleaning_beats_centred(book: Book) -> Comparison:
    return compare(book.cleaned, book.centred)


@number
def centring_helps(book: Book) -> Comparison:
    return compare(book.centred, book.vector)


@number
def pruning_works_early(book: Book) -> Comparison:
    return compare(book.at(book.early, "prune_contrast", k=book.k), book.plain("zero_shot"))


@number
def earliest_block(book: Book) -> float:
    return book.early


@number
def cleaned_features(book: Book) -> float:
    """The most features that cleaning leaves, of the means over tasks for every block and penalty."""
    return float(statistics.averages(rows(book.test, method="clean"), ["layer", "penalty"])["l0"].max())


@number
def vector_closes(book: Book) -> float:
    """The share of the gap from zero-shot to few-shot loss that the added vector closes, at most at any block."""
    return max(book.closed(book.at(layer, "task_vector")) for layer in book.layers)


@number
def reconstruction_closes(book: Book) -> float:
    return max(book.closed(book.at(layer, "reconstruct")) for layer in book.layers)


@number
def cleaning_closes_late(book: Book) -> float:
    """The share of the gap that cleaning closes, at least, from block 10 on."""
    return min(book.closed(book.at(layer, "clean")) for layer in book.layers if layer >= 10)


@number
def pruning_closes(book: Book) -> float:
    """The share of the gap that pruning closes, at least, at any block."""
    return min(book.closed(book.at(layer, "prune_contrast", k=book.k)) for layer in book.layers)


@number
def number_of_saes(book: Book) -> float:
    return len(book.read("saes"))


@number
def tokens_of_evidence(book: Book) -> float:
    """The tokens of text that the evidence for features was read from, at least at any block."""
    return float(tables.load("features", book.model, book.folder, ["n_tokens"])["n_tokens"].min())


@number
def pairs_of_example(book: Book) -> float:
    """The pairs of the workbench's stored example."""
    return len(book.read("explore_cleaning")["pairs"].iloc[0])


@number
def few_pairs_clean(book: Book) -> float:
    """The loss of that example's pruned vector, as validation chooses it, less the zero-shot loss."""
    found = book.read("explore_cleaning")
    pruned = rows(found, method="prune_contrast")
    zero = rows(found, method="zero_shot")["loss"].iloc[0]
    return float(pruned.loc[pruned["validation_loss"].idxmin(), "loss"] - zero)


@number
def width_of_saes(book: Book) -> float:
    """The width that all SAEs have; NaN if they differ."""
    widths = set(book.read("saes")["d_sae"])
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
def early_cleaning_wakes_more(book: Book) -> Comparison:
    return over_tasks(book.woken("overlap_gain", "clean") - book.woken("overlap_gain", "task_vector"))


@number
def early_vector_shares_more_than_none(book: Book) -> Comparison:
    return over_tasks(book.woken("overlap", "clean") - book.woken("overlap", "zero_shot"))


@number
def centred_wakes_more(book: Book) -> Comparison:
    return over_tasks(book.woken("overlap_gain", "centred") - book.woken("overlap_gain", "clean"))


# 04 Detectors


@number
def detectors_need_cleaning(book: Book) -> Comparison:
    return compare(book.detector("clean", book.detector_layer), book.raw_detectors)


@number
def raw_detectors_fail(book: Book) -> Comparison:
    return compare(book.raw_detectors, book.detector("dummy_shot", mode="none"))


@number
def cleaned_detectors_beat_centred(book: Book) -> Comparison:
    return compare(book.detector("clean", book.detector_layer), book.centred_detectors)


@number
def cleaned_detectors_beat_centred_early(book: Book) -> Comparison:
    first = book.first_executors
    return compare(book.detector("clean", first), book.detector("centred_best_scale", first))


@number
def detectors_act_earlier(book: Book) -> Comparison:
    """Relative change by the cleaned detector less that by the cleaned executor, at the first block that both have."""
    first = book.first_executors
    return over_tasks(relative(book.detector("clean", first)) - relative(book.executor("clean", first)))


@number
def detectors_beat_pruned_executors_early(book: Book) -> Comparison:
    first = book.first_executors
    return over_tasks(relative(book.detector("clean", first)) - relative(book.executor("prune_contrast", first, 10)))


@number
def pruned_detectors_beat_pruned_executors_early(book: Book) -> Comparison:
    first = book.first_executors
    detector, executor = book.detector("prune_contrast", first, k=10), book.executor("prune_contrast", first, 10)
    return over_tasks(relative(detector) - relative(executor))


@number
def detectors_beat_pruned_executors(book: Book) -> Comparison:
    at = book.detector_layer
    return over_tasks(relative(book.detector("clean", at)) - relative(book.executor("prune_contrast", at, book.k)))


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
def one_feature_beats_latents(book: Book) -> Comparison:
    return over_tasks(book.luckiest("feature") - book.luckiest(book.hardest()))


@number
def one_detector_beats_latents(book: Book) -> Comparison:
    hardest = book.luckiest(book.hardest("detector"), "detector")
    return over_tasks(book.luckiest("feature", "detector") - hardest)


@number
def chance_does_little(book: Book) -> Comparison:
    return over_tasks(book.chance())


@number
def one_feature_per_task(book: Book) -> Comparison:
    return over_tasks((book.gain >= 0.5).sum())


@number
def english_shares_a_feature(book: Book) -> Comparison:
    chosen = book.validated_gain.filter(regex="^en_").min(axis=1).idxmax()
    return over_tasks(book.gain.filter(regex="^en_").loc[chosen])
