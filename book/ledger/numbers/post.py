"""The numbers that decide the claims of the post's experiments, 01 to 05."""

from __future__ import annotations

from book.ledger.claims import Book, ClaimError, number, numbers, relative
from nb_utils import statistics
from nb_utils.record import tables
from nb_utils.statistics import Comparison, compare, over_tasks, rows

# 01 Reconstruction

numbers(
    reconstruction_costs=lambda book: (
        compare(book.vector, book.at(book["vector"], "reconstruct", mode=book.choices.mode))
    ),
    pursuit_costs=lambda book: (
        compare(book.vector, book.at(book["vector"], "gradient_pursuit", mode=book.choices.mode, k=40))
    ),
)


# 02 Cleanup

numbers(
    cleaning_surpasses=lambda book: compare(book.cleaned, book.vector),
    cleaning_surpasses_sparsely=lambda book: compare(book.cleaned_to_15, book.vector),
    cleaning_beats_replaced=lambda book: compare(book.cleaned, book.replaced),
    cleaning_works_earlier=lambda book: (
        compare(book.at(book.early, "clean"), book.at(book.early, "task_vector", mode=book.choices.mode))
    ),
    cleaning_works_early=lambda book: compare(book.at(book.early, "clean"), book.plain("zero_shot")),
    cleaning_carries_to_sentences=lambda book: compare(book.sentences("clean"), book.sentences("task_vector")),
    cleaning_carries_better_than_centring=lambda book: compare(book.sentences("clean"), book.sentences("centred")),
    pruning_beats_centred=lambda book: compare(book.pruned, book.centred),
    pruning_beats_replaced=lambda book: compare(book.pruned, book.replaced),
    five_features_beat_vector=lambda book: compare(book.pruned_to_5, book.vector),
    # At equal data: experiment 06 gives both the same prompts.
    pruning_beats_cleaning=lambda book: compare(book.trained("24"), book.trained("24", method="clean")),
    pruning_beats_cleaning_at_equal_size=lambda book: compare(book.pruned_to_10, book.cleaned_to_10),
    # At equal data and size: both at the blocks where pruning was also given what cleaning has.
    pruning_beats_cleaning_alike=lambda book: compare(book.best("prune_contrast_few", k=10), book.cleaned_to_10),
    # Cleaning with what pruning has: all training pairs, and a start from many latents.
    pruning_beats_cleaning_at_its_best=lambda book: (
        compare(book.pruned_to_10, book.best("clean_mean_codes_all", most=10))
    ),
    pruning_reaches_learned=lambda book: compare(book.pruned, book.learned),
    learned_beats_few_shot=lambda book: compare(book.learned, book.plain("few_shot")),
    cleaning_beats_centred=lambda book: compare(book.cleaned, book.centred),
    centring_helps=lambda book: compare(book.centred, book.vector),
    pruning_works_early=lambda book: compare(book.at(book.early, "prune_contrast", k=book.k), book.plain("zero_shot")),
    earliest_block=lambda book: book.early,
    # The most features that cleaning leaves, of the means over tasks for every block and penalty.
    cleaned_features=lambda book: (
        float(statistics.averages(rows(book.test, method="clean"), ["layer", "penalty"])["l0"].max())
    ),
    # The share of the gap from zero-shot to few-shot loss that the added vector closes, at most at any block.
    vector_closes=lambda book: max(book.closed(book.at(layer, "task_vector")) for layer in book.layers),
    reconstruction_closes=lambda book: max(book.closed(book.at(layer, "reconstruct")) for layer in book.layers),
    # The share of the gap that cleaning closes, at least, at blocks 9 to 11.
    cleaning_closes=lambda book: min(book.closed(book.at(layer, "clean")) for layer in between(book, 9, 11)),
    # The share of the gap that pruning closes, at least, at blocks 6 to 11.
    pruning_closes=lambda book: (
        min(book.closed(book.at(layer, "prune_contrast", k=book.k)) for layer in between(book, 6, 11))
    ),
    number_of_saes=lambda book: len(book.read("saes")),
    # The tokens of text that the evidence for features was read from, at least at any block.
    tokens_of_evidence=lambda book: (
        float(tables.load("features", book.model, book.folder, ["n_tokens"])["n_tokens"].min())
    ),
    # The pairs of the workbench's stored example.
    pairs_of_example=lambda book: len(book.read("explore_cleaning")["pairs"].iloc[0]),
)


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


def between(book: Book, first: int, last: int) -> list[int]:
    """Return the blocks with cleaned vectors from one to another."""
    return [layer for layer in book.layers if first <= layer <= last]


# 03 Early-layer transfer

numbers(
    early_vector_wakes_late_features=lambda book: over_tasks(book.woken("overlap", "clean")),
    early_cleaning_wakes_more=lambda book: (
        over_tasks(book.woken("overlap_gain", "clean") - book.woken("overlap_gain", "task_vector"))
    ),
    early_vector_shares_more_than_none=lambda book: (
        over_tasks(book.woken("overlap", "clean") - book.woken("overlap", "zero_shot"))
    ),
    centred_wakes_more=lambda book: (
        over_tasks(book.woken("overlap_gain", "centred") - book.woken("overlap_gain", "clean"))
    ),
)


@number
def task_features_gain_weight(book: Book) -> Comparison:
    own = book.woken("task_share", "own", book.transfer_late)
    return over_tasks(book.woken("task_share", "clean") - own)


# 04 Detectors

numbers(
    detectors_need_cleaning=lambda book: compare(book.detector("clean", book.detector_layer), book.raw_detectors),
    raw_detectors_fail=lambda book: compare(book.raw_detectors, book.detector("dummy_shot", mode="none")),
    cleaned_detectors_beat_centred=lambda book: (
        compare(book.detector("clean", book.detector_layer), book.centred_detectors)
    ),
    detectors_fire_on_words=lambda book: over_tasks(book.mass("detector", "output") + book.mass("detector", "input")),
    executors_fire_on_arrows=lambda book: over_tasks(book.mass("executor", "arrow")),
    detectors_fire_on_outputs=lambda book: over_tasks(book.mass("detector", "output")),
)


@number
def cleaned_detectors_beat_centred_early(book: Book) -> Comparison:
    first = book.first_executors
    return compare(book.detector("clean", first), book.detector("centred_best_scale", first))


@number
def pruned_leave_of_the_lead(book: Book) -> float:
    """The share of the lead over cleaned executors that cleaned detectors keep over pruned ones, where both are first.
    """
    cleaned, pruned = (book.decide(name) for name in ("detectors_act_earlier", "detectors_beat_pruned_executors_early"))
    return pruned.mean / cleaned.mean


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


# 05 Cross-task steering

numbers(
    one_feature_does_part=lambda book: over_tasks(book.single()),
    one_feature_beats_chance=lambda book: over_tasks(book.single() - book.chance()),
    one_detector_beats_chance=lambda book: over_tasks(book.single("detector") - book.chance("detector")),
    one_feature_beats_latents=lambda book: over_tasks(book.luckiest("feature") - book.luckiest(book.hardest())),
    chance_does_little=lambda book: over_tasks(book.chance()),
    one_feature_per_task=lambda book: over_tasks((book.gain >= 0.5).sum()),
)


@number
def one_detector_beats_latents(book: Book) -> Comparison:
    hardest = book.luckiest(book.hardest("detector"), "detector")
    return over_tasks(book.luckiest("feature", "detector") - hardest)


@number
def english_shares_a_feature(book: Book) -> Comparison:
    chosen = book.validated_gain.filter(regex="^en_").min(axis=1).idxmax()
    return over_tasks(book.gain.filter(regex="^en_").loc[chosen])
