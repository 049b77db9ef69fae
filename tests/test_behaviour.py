"""How behaviours are derived: rules on texts made up here; what ships is looked at in the tests of tasks."""

import json

import pytest

from nb_utils import tasks
from workflow import build_behaviour as build

VERSE = "And the man said to them all, You shall not go there.", "And he said unto them all, Thou shalt not go thither."


@pytest.mark.parametrize(
    ("modern", "early", "taken"),
    [
        (*VERSE, True),
        (VERSE[0], VERSE[1].replace("unto", "to").replace("Thou", "They"), False),  # one such word is left
        (VERSE[0].replace("You", "Thou"), VERSE[1], False),  # the modern one has such a word, too
        (f"{VERSE[0]} GIMEL", VERSE[1], False),  # a heading
        ("He said to them, Go.", VERSE[1], False),  # too short
        (VERSE[0], f"{VERSE[1]} {VERSE[1]}", False),  # too long
    ],
)
def test_a_verse_is_taken_where_only_the_older_one_shows_its_age(modern, early, taken):
    assert build._aligned(modern, early) is taken


def test_a_verse_loses_the_marks_of_its_edition():
    assert build.verse('"Don`t go [there]",  he said (twice).') == "Don't go there, he said twice."


def test_pairs_are_drawn_by_hash_and_no_text_comes_twice(monkeypatch):
    pairs = [(f"x{i}", f"y{i % 7}") for i in range(20)]
    drawn = build.by_hash(pairs)
    assert len(drawn) == len({x for x, _ in drawn}) == len({y for _, y in drawn}) == 7 and drawn == sorted(drawn)
    assert build.by_hash(reversed(pairs)) == drawn
    monkeypatch.setattr(build, "MAX_PAIRS", 3)
    assert len(build.by_hash(pairs)) == 3 and set(build.by_hash(pairs)) < set(drawn)


def test_sentences_have_clear_adjectives_with_their_article_and_markers_stand_in_none(monkeypatch):
    rated = {"bad": -2.5, "awful": -2.0, "lame": -0.5, "good": 1.9, "honest": 2.3, "nice": 0.4, "joy": 2.8, "fair": 1.3}
    monkeypatch.setattr(build, "valence", lambda: rated)
    for name, words in {"NEGATIVE": "bad lame awful", "POSITIVE": "nice good honest", "NOUNS": "film apple",
                        "SHAPES": ("It is a {adjective} {noun}.",)}.items():  # fmt: skip
        monkeypatch.setattr(build, name, words)
    pairs = build.sentiment()
    film, apple = ("It is a bad film.", "It is a good film."), ("It is an awful apple.", "It is an honest apple.")
    assert sorted(pairs) == [film, apple]
    assert build.rated_words("joy good fair nice", 1, pairs) == ["joy"]


def test_a_file_is_a_task_and_gives_back_what_it_was_written_from(tmp_path):
    pairs = [(f"x{i}", f"y{i}") for i in range(20)]
    record = {"name": "mine", "title": "Mine", "category": "own", "kind": "behaviour", "licence": "CC0",
              "origin": "1.0", "markers": ["thou"], "pairs": pairs, "elsewhere": [("a", "b")]}  # fmt: skip
    build.write(tmp_path / "mine.json", record)
    task = tasks.load(tmp_path / "mine.json")
    assert [(pair.x, pair.y) for pair in task.pairs] == pairs
    assert task.elsewhere[0].y == "b" and task.markers == ("thou",)
    assert set(json.loads((tmp_path / "mine.json").read_text())) == set(record)
