"""The numbers of experiment 14, on hand-made tables whose answers are known."""

import pandas as pd
import pytest

from book.ledger import ledger
from book.ledger.claims import NUMBERS, Book, ClaimError
from book.ledger.numbers import shots

TASKS = {"antonyms": 1.0, "en_es": 0.5, "algo_first": 0.2, "algo_last": 0.1}  # right with one token; in the prompt .8


def row(task, method, shots, loss, place="arrow", layer=8, **more):
    return dict(task=task, method=method, mode="replace", on="test", shots=shots, place=place, layer=layer, seed=0,
                loss=loss, losses=[loss] * 3, validation_loss=loss, accuracy=0.8) | more


def held(task, share):
    found = [row(task, "few_shot", n, 1.0, place="none", layer=-1) for n in (1, 8, 16)]
    for layer, worse in ((8, 0.0), (11, 0.5)):  # the first validates best
        found += [row(task, "task_vector", n, 3 - n / 16 + worse, layer=layer, accuracy=0.8 * share)
                  for n in (1, 8, 16)]
        found += [row(task, "task_vector", 16, other + worse, place, layer)
                  for place, other in (("input", 4.0), ("output", 2.5), ("newline", 5.0))]
        found.append(row(task, "one_example_stretched", 16, 2.2 + worse, layer=layer))
    return found


def watched(task):
    rises = {"own": [0, 1, 3, 4, 4], "same_activation": [3, 3, 3, 4, 4]}
    return [dict(task=task, kind="executor", method=method, place="arrow", layer=layer, seen=seen, activation=float(a))
            for method, course in rises.items() for layer in (8, 11) for seen, a in enumerate(course)]


def labelled(task):
    """What is added at the answers of examples: the first block validates best."""
    tried = [("few_shot", -1, None, 2.0), ("label_words", 8, 1.0, 1.5), ("label_words", 11, 2.0, 0.1),
             ("matched_random", 8, 1.0, 1.9)]  # fmt: skip
    return [dict(task=task, on="test", method=method, layer=layer, seed=0, shots=8, validation_loss=best, loss=loss,
                 losses=[loss] * 3) for method, layer, best, loss in tried]


@pytest.fixture(scope="module")
def book():
    growth = [dict(task=task, kind="executor", method="own", layer=8, one=1.0, last=4.0, switch=2.0, addition=1.0)
              for task in TASKS]
    growth.append(growth[0] | dict(task="en_fr", last=1.05, switch=0.05, addition=0.0))  # no rise to speak of
    shares = {"stream": (0.8, 0.6, 0.5), "own": (0.4, 0.4, 0.7)}
    sums = [dict(task=task, layer=8, method=method, guess=guess, explained=share) for task in TASKS
            for method, found in shares.items()
            for guess, share in zip(("shown", "others", "constant"), found, strict=True)]
    made, found = Book(), {
        "14_shots": [one for task, share in TASKS.items() for one in held(task, share)],
        "14_shots_course": [one for task in TASKS for one in watched(task)],
        "14_shots_growth": growth, "14_shots_sums": sums,
        "14_shots_labels": [one for task in TASKS for one in labelled(task)],
    }  # fmt: skip
    made._read |= {stem: pd.DataFrame(rows) for stem, rows in found.items()}
    return made


def test_every_number_is_what_the_tables_say(book):
    expected = {
        "one_token_recovers_language": 0.75, "one_token_recovers_lists": 0.15, "more_examples_say_more": -15 / 16,
        "examples_only_stretch": 0.2, "arrow_holds_most": -0.5, "two_examples_wake_executors": 0.75,
        "executors_rise_beyond_controls": 0.75 - 0.25, "executors_switch": 2 / 3, "whole_is_sum": 0.8,
        "shown_examples_count": 0.2, "features_add_up": -0.3,
        "label_words_help": -0.5, "label_words_beat_chance": -0.4,
    }  # fmt: skip
    assert {name: NUMBERS[name](book).mean for name in expected} == pytest.approx(expected)
    claimed = {claim.number for claim in ledger.entries() if claim.page == "14_shots"}
    assert claimed == set(expected)


def test_streams_stand_where_those_of_the_most_examples_validate_best(book):
    assert shots.shots_layer(book) == 8 and shots.most_shots(book) == 16
    assert list(shots.switched(book, "executor").index) == sorted(TASKS)


def test_what_was_not_tried_is_named(book):
    with pytest.raises(ClaimError, match="no task_vector rows of 4 examples"):
        shots.recovery(book, 4)
