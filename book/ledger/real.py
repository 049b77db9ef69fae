"""The numbers that decide whether what is found is real: experiments 06 to 15, and planted worlds."""

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


# 12 Places: after the first of its blocks, where all is tried, unless a number says otherwise


@number
def last_token_does_nothing(book: Book) -> Comparison:
    return over_tasks(regained(book, placed(book)))


@number
def every_token_over_steers(book: Book) -> Comparison:
    return compare(placed(book, tokens="every"), placed(book))


@number
def every_token_over_steers_at_one_scale(book: Book) -> Comparison:
    there = rows(tried(book), method="prune_contrast", tokens="every", mode="add", prompt="zero-shot", on="test")
    scale = there["task"].map(placed(book).set_index("task")["scale"])
    return compare(there[there["scale"].eq(scale)], placed(book))


@number
def every_token_costs_more(book: Book) -> Comparison:
    return over_tasks(by_task(placed(book, tokens="every"), "kl") - by_task(placed(book), "kl"))


@number
def clamping_beats_adding(book: Book) -> Comparison:
    return compare(placed(book, mode="clamp"), placed(book))


@number
def clamping_one_beats_adding_it(book: Book) -> Comparison:
    return compare(placed(book, "single", mode="clamp"), placed(book, "single"))


@number
def turning_is_enough(book: Book) -> Comparison:
    return compare(placed(book, mode="turn"), placed(book))


@number
def lengthening_does_nothing(book: Book) -> Comparison:
    return over_tasks(regained(book, placed(book, mode="lengthen")))


@number
def prompting_beats_steering(book: Book) -> Comparison:
    return compare(asked(book, "instruction"), placed(book))


@number
def prompt_and_vector_beat_the_vector(book: Book) -> Comparison:
    return compare(placed(book, prompt="instruction"), placed(book))


@number
def prompt_and_vector_beat_the_prompt(book: Book) -> Comparison:
    return compare(placed(book, prompt="instruction"), asked(book, "instruction"))


@number
def examples_leave_something_to_add(book: Book) -> Comparison:
    few = rows(asked(book, "few_shot"), shots=book.setting("12_places", "n_examples"))
    return compare(placed(book, prompt="few-shot"), few)


@number
def wrong_sign_hurts(book: Book) -> Comparison:
    return compare(placed(book, role="wrong_sign"), asked(book, "zero_shot"))


@number
def several_blocks_beat_one(book: Book) -> Comparison:
    found = rows(tried(book, best=True), method="prune_contrast", tokens="separator", mode="add", prompt="zero-shot",
                 on="test")  # fmt: skip
    together, alone = found[found["together"].gt(1)], rows(found, together=1)
    if together.empty:
        raise ClaimError("Experiment 12 was run at one block.")
    return compare(together, rows(alone, layer=statistics.best_layer(alone)))


@number
def pruned_does_more_at_equal_cost(book: Book) -> Comparison:
    return over_tasks(affordable(book, "prune_contrast") - affordable(book, "centred_best_scale"))


@number
def vector_overrides_other_examples(book: Book) -> Comparison:
    return over_tasks(by_task(placed(book), "others"))


@number
def written_tokens_help_sentences(book: Book) -> Comparison:
    return over_tasks(of_sentences(book, "generated") - of_sentences(book, "separator"))


@number
def fading_helps_sentences(book: Book) -> Comparison:
    return over_tasks(of_sentences(book, "generated", decay=fading(book)) - of_sentences(book, "generated"))


@number
def written_tokens_help_what_is_written(book: Book) -> Comparison:
    return over_tasks(written(book, "generated") - written(book, "separator"))


def tried(book: Book, **equal: object) -> pd.DataFrame:
    """Return the vectors of experiment 12, each at all scales; the pruned one has the book's number of features."""
    found = rows(book.table("12_places"), role=equal.pop("role", "vector"), **equal)
    if book.k not in set(found["k"].dropna()):
        raise ClaimError(f"Experiment 12 has no vectors of {book.k} features.")
    return found


def placed(
    book: Book, method: str = "prune_contrast", tokens: str = "separator", mode: str = "add", prompt: str = "zero-shot",
    **equal: object,
) -> pd.DataFrame:  # fmt: skip
    """Return the rows of a vector of words on words, at the scale that validates best, after the first block."""
    found = rows(tried(book, best=True, **equal), method=method, tokens=tokens, mode=mode, prompt=prompt, on="test",
                 blocks=str(first_block(book)))  # fmt: skip
    if found.empty:
        raise ClaimError(f"Experiment 12 has not tried {method} vectors so ({mode}, {tokens}, {prompt}).")
    return found


def first_block(book: Book) -> int:
    """Return the block at which experiment 12 tries everything."""
    return int(book.setting("12_places", "layers")[0])


def asked(book: Book, method: str, on: str = "test") -> pd.DataFrame:
    """Return the rows of prompts alone: zero_shot, few_shot, or the instruction that validates best."""
    return rows(book.table("12_places"), role="prompt", method=method, on=on, best=True)


def regained(book: Book, found: pd.DataFrame) -> pd.Series:
    """Return the share of every task's gain from no example to all of them that vectors bring."""
    few = asked(book, "few_shot")
    few = few[few["shots"].eq(few["shots"].max())]
    return statistics.recovered(found, pd.concat([asked(book, "zero_shot"), few]))


def affordable(book: Book, method: str, most: float = 0.5, tokens: str = "separator") -> pd.Series:
    """Return the share of the gain of every task at the scale that validates best of those that cost so little.

    ``most``: KL in ordinary text, nats a token. A vector that is too dear at every scale brings nothing.
    """
    swept = rows(tried(book), method=method, tokens=tokens, mode="add", prompt="zero-shot", on="test",
                 blocks=str(first_block(book)))  # fmt: skip
    cheap = swept[swept["kl"] <= most]
    best = cheap.loc[cheap.groupby("task")["validation_loss"].idxmin()]
    return regained(book, best).reindex(sorted(set(swept["task"]))).fillna(0.0)


def by_task(found: pd.DataFrame, column: str) -> pd.Series:
    return found.groupby("task")[column].mean()


def fading(book: Book) -> float:
    """Return the strongest fading of generated tokens that was tried."""
    return min(map(float, book.setting("12_places", "decays")))


def of_sentences(
    book: Book, tokens: str, method: str = "prune_contrast", decay: float = 1.0, made: str = "word",
    prompt: str = "zero-shot",
) -> pd.Series:  # fmt: skip
    """Return every task's loss a token of translated sentences, at the scale that validates best."""
    found = rows(tried(book, best=True), on="sentence", tokens=tokens, method=method, decay=decay, made=made,
                 prompt=prompt)  # fmt: skip
    if found.empty:
        raise ClaimError(f"Experiment 12 has not tried {method} vectors in sentences ({tokens}).")
    return by_task(found, "token_loss")


def written(
    book: Book, tokens: str, method: str = "prune_contrast", decay: float = 1.0, made: str = "word",
    prompt: str = "zero-shot", column: str = "chrf",
) -> pd.Series:  # fmt: skip
    """Return the mean chrF (or share of repeated words) of what is written to every task's sentences."""
    found = rows(book.table("12_places_texts"), tokens=tokens, method=method, decay=decay, made=made, prompt=prompt)
    return by_task(found, column)
# 14 Shot by shot: streams in the separator's place stand at the block where those of the most examples validate best

PUBLISHED_SHOTS = 8  # examples for which recovery was published for this model
# Families of tasks that are told apart here; those of words and on lists are what was published.
KINDS = {
    "tasks of words": ("translations", "knowledge", "inflections", "others"), "tasks on lists": ("lists",),
    "labels": ("classifications",), "one task after another": ("compositions",),
}  # fmt: skip


@number
def one_token_recovers_language(book: Book) -> Comparison:
    return over_tasks(recovery(book, PUBLISHED_SHOTS, "tasks of words"))


@number
def one_token_recovers_lists(book: Book) -> Comparison:
    return over_tasks(recovery(book, PUBLISHED_SHOTS, "tasks on lists"))


@number
def more_examples_say_more(book: Book) -> Comparison:
    return compare(held(book, most_shots(book)), held(book, 1))


@number
def examples_only_stretch(book: Book) -> Comparison:
    most = most_shots(book)
    return compare(held(book, most, "one_example_stretched"), held(book, most))


@number
def arrow_holds_most(book: Book) -> Comparison:
    most = most_shots(book)
    others = [held(book, most, place=place).groupby("task")["loss"].mean() for place in ("input", "output", "newline")]
    return over_tasks(held(book, most).groupby("task")["loss"].mean() - pd.concat(others, axis=1).min(axis=1))


@number
def two_examples_wake_executors(book: Book) -> Comparison:
    return over_tasks(awake(book, "executor", 2))


@number
def executors_rise_beyond_controls(book: Book) -> Comparison:
    return over_tasks(risen(book, "executor") - risen(book, "executor", "same_activation"))


@number
def executors_switch(book: Book) -> Comparison:
    if (found := switched(book, "executor")).empty:
        raise ClaimError("No task's executors rise by a tenth after the first example.")
    return over_tasks(found)


@number
def whole_is_sum(book: Book) -> Comparison:
    return over_tasks(explained(book, "stream", "shown"))


@number
def shown_examples_count(book: Book) -> Comparison:
    return over_tasks(explained(book, "stream", "shown") - explained(book, "stream", "others"))


@number
def features_add_up(book: Book) -> Comparison:
    return over_tasks(explained(book, "own", "shown") - explained(book, "own", "constant"))


def most_shots(book: Book) -> int:
    """Return the largest number of examples that every task has."""
    return int(book.table("14_shots").groupby("task")["shots"].max().min())


def shots_layer(book: Book) -> int:
    """Return the block of experiment 14 where the stream after the most examples validates best."""
    found = rows(book.table("14_shots"), method="task_vector", place="arrow", shots=most_shots(book))
    return book.own_layer(found)


def held(book: Book, shots: int, method: str = "task_vector", place: str = "arrow") -> pd.DataFrame:
    """Return the test rows of what a token holds after so many examples; of prompts that show them: "few_shot"."""
    at = {"place": "none"} if method == "few_shot" else {"place": place, "layer": shots_layer(book)}
    found = rows(book.table("14_shots"), method=method, shots=shots, **at)
    if found.empty:
        raise ClaimError(f"Experiment 14 has no {method} rows of {shots} examples ({place}).")
    return found


def recovery(book: Book, shots: int, kind: str | None = None, method: str = "task_vector") -> pd.Series:
    """Return every task's right first tokens with what one token holds, as a share of those with the examples.

    ``kind``: of tasks of one of `KINDS` alone.
    """
    right, few = (held(book, shots, one).groupby("task")["accuracy"].mean() for one in (method, "few_shot"))
    found = (right / few.where(few > 0)).dropna()
    found = found if kind is None else found[found.index.map(book.family).isin(KINDS[kind])]
    if found.empty:
        raise ClaimError("Experiment 14 has no such task.")
    return found


def awake(book: Book, kind: str, seen: int, method: str = "own") -> pd.Series:
    """Return how active every task's features are after some examples, as a share of what the last ones make them.

    At their own tokens, executors on arrows and detectors on outputs, over all blocks; the last are more than half of
    the most.
    """
    place = {"executor": "arrow", "detector": "output"}[kind]
    found = rows(book.table("14_shots_course"), kind=kind, method=method, place=place)
    if found.empty:
        raise ClaimError(f"Experiment 14 has followed no {kind}s.")
    by = found.groupby(["task", "seen"])["activation"].sum().unstack()
    last = by.loc[:, by.columns > by.columns.max() // 2].mean(axis=1)
    return (by[seen] / last.where(last > 0)).dropna()


def risen(book: Book, kind: str, method: str = "own") -> pd.Series:
    """Return the part of their last activation that every task's features gain after the first example."""
    return 1 - awake(book, kind, 1, method)


def switched(book: Book, kind: str, method: str = "own") -> pd.Series:
    """Return the part of the rise from one example to the last that is a latent coming on in more prompts.

    Of tasks whose features rise by a tenth of their last activation or more: of no rise there is no part.
    """
    found = rows(book.table("14_shots_growth"), kind=kind, method=method)
    by = found.groupby("task")[["one", "last", "switch"]].sum()
    rise = by["last"] - by["one"]
    return (by["switch"] / rise)[rise > 0.1 * by["last"]]


def explained(book: Book, method: str, guess: str) -> pd.Series:
    """Return the share of the change by several examples that a guess explains, at the block of `shots_layer`."""
    found = rows(book.table("14_shots_sums"), method=method, guess=guess, layer=shots_layer(book))
    return found.groupby("task")["explained"].mean()


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


# 15 Labels: can they be wrong?


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
