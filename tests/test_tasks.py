import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nb_utils import tasks
from nb_utils.tasks import MIN_BUCKET, MIN_PAIRS, Pair, Task, TaskError

EVERY_SHIPPED = [(kind, name) for kind in tasks.FOLDERS for name in tasks.names(kind)]
# Files of fewer than 100 pairs: {name: (pairs, reason)}. None at present.
SHORTER = {}


def made(pairs, name="made"):
    return Task(name, name, tuple(Pair(x, y, (y,)) for x, y in pairs), "none", "made up", "word", "own")


def numbered(count):
    return made([(f"word {i}", f"answer {i}") for i in range(count)])


def buckets(splits):
    return [splits.vector, splits.train, splits.validation, splits.test]


def written(folder, content, name="mine.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def complaint(path):
    """Return the one line that `load` refuses a file with, which must name the file."""
    with pytest.raises(TaskError) as caught:
        tasks.load(path)
    message = str(caught.value)
    assert "mine.json" in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def plain(count=MIN_PAIRS):
    return {f"x{i}": f"y{i}" for i in range(count)}


# ------------------------------------------------------------------------------------------ shipped tasks


def test_at_least_twenty_word_tasks_are_shipped_and_the_sentences_for_the_generalisation_test():
    assert len(tasks.names()) >= 20
    assert "en_es" in tasks.names("sentence")


@pytest.mark.parametrize(("kind", "name"), EVERY_SHIPPED)
def test_every_shipped_task_loads_and_says_where_it_comes_from(kind, name):
    task = tasks.load(name, kind)
    assert task.name == name
    assert task.kind == kind
    word = {"lexical", "translation", "knowledge", "inflection", "list", "classification", "composition"}
    assert task.category in word | {"register", "sentiment"}
    assert task.licence != "not stated"
    assert re.search(r"\d+\.\d+", task.origin), "the origin names a package and its version"
    assert len(task.pairs) >= (SHORTER[name][0] if name in SHORTER else 100)
    assert len(task.pairs) <= 400


@pytest.mark.parametrize(("kind", "name"), EVERY_SHIPPED)
def test_no_shipped_pair_answers_with_its_own_input(kind, name):
    for pair in tasks.load(name, kind).pairs:
        assert pair.x.casefold() not in {answer.casefold() for answer in pair.answers}, pair


@pytest.mark.parametrize(("kind", "name"), EVERY_SHIPPED)
def test_every_shipped_task_splits_into_usable_buckets(kind, name):
    task = tasks.load(name, kind)
    splits = tasks.split(task)
    assert sorted(pair.x for bucket in buckets(splits) for pair in bucket) == sorted(p.x for p in task.pairs)
    assert len(splits.vector) >= 17  # one prompt of 16 shots and a query
    for bucket, share in zip(buckets(splits), tasks.SIZES.values(), strict=True):
        assert len(bucket) / len(task.pairs) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("name", ["antonyms", "country_capital", "singular_plural", "en_es"])
def test_a_known_pair_is_in_its_task(name):
    known = {
        "antonyms": ("hot", "cold"),
        "country_capital": ("France", "Paris"),
        "singular_plural": ("child", "children"),
        "en_es": ("house", "casa"),
    }
    x, y = known[name]
    assert {pair.x: pair.y for pair in tasks.load(name).pairs}[x] == y


@pytest.mark.parametrize(("name", "index"), [("algo_first", 0), ("algo_second", 1), ("algo_last", 3)])
def test_a_list_task_answers_with_the_word_at_its_place(name, index):
    for pair in tasks.load(name).pairs:
        words = pair.x.split(", ")
        assert len(set(words)) == 4
        assert pair.y == words[index]


def test_a_composed_task_is_one_task_after_another():
    first = {name: {pair.x: pair for pair in tasks.load(name).pairs} for name in
             ("singular_plural", "location_country", "location_language")}  # fmt: skip
    for pair in tasks.load("last_plural").pairs:
        assert pair.answers == first["singular_plural"][pair.x.split(", ")[-1]].answers
    for pair in tasks.load("city_language").pairs:
        country = first["location_country"][pair.x].y
        assert pair.answers == first["location_language"][country].answers


@pytest.mark.parametrize(("name", "labels"), [("noun_category", 7), ("word_sentiment", 2)])
def test_a_classification_has_few_labels_and_none_for_most(name, labels):
    found = Counter(pair.y for pair in tasks.load(name).pairs)
    assert len(found) == labels and max(found.values()) <= len(tasks.load(name).pairs) / 2


@pytest.mark.parametrize("name", [name for name in tasks.names() if name.startswith("present_simple")])
def test_inflections_are_single_lower_case_words(name):
    for pair in tasks.load(name).pairs:
        assert all(word.isalpha() and word.islower() for word in (pair.x, *pair.answers)), pair


# ---------------------------------------------------------------------------------------------- behaviours


def test_no_behaviour_is_called_like_a_word_task():
    assert tasks.names("behaviour") == ["language", "register", "sentiment"]
    assert not set(tasks.names("behaviour")) & set(tasks.names())


def said(text):
    return set(re.findall(r"[^\W\d_]+", text.casefold()))


def test_an_older_verse_has_two_words_that_show_it_and_the_modern_one_none():
    task = tasks.load("register", "behaviour")
    for pair in task.pairs:
        assert not set(task.markers) & said(pair.x), pair
        assert sum(word in task.markers for word in re.findall(r"[^\W\d_]+", pair.y.casefold())) >= 2, pair
    assert len(task.elsewhere) >= 20 and not {pair.x for pair in task.elsewhere} & {pair.x for pair in task.pairs}


def test_no_adjective_and_no_noun_of_the_sentiments_stands_in_two_pairs_and_no_marker_in_any():
    task = tasks.load("sentiment", "behaviour")
    shape = set.intersection(*(said(pair.x) for pair in task.pairs)) | set("a an the it is was that we thought".split())
    shape |= set("everyone says what their new looks seemed rather to me".split())
    words = [word for pair in task.pairs for word in (said(pair.x) | said(pair.y)) - shape]
    assert len(words) == len(set(words)) == 3 * len(task.pairs)
    assert not set(words) & {*task.markers, *task.opposed}


def behaviour(**changes):
    pairs = [{"input": x, "output": y} for x, y in plain().items()]
    return {"kind": "behaviour", "markers": ["thou"], "pairs": pairs} | changes


def test_a_users_file_of_a_behaviour_has_words_that_show_it_and_may_have_pairs_elsewhere(tmp_path):
    rows = [{"input": "a", "output": "b"}]
    task = tasks.load(written(tmp_path, behaviour(elsewhere=rows, opposed=["you", "you"])))
    assert task.kind == "behaviour" and task.markers == ("thou",) and task.opposed == ("you",)
    assert task.elsewhere == (Pair("a", "b", ("b",)),)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"markers": []}, "names no words that show it: list some as 'markers'."),
        ({"markers": "thou"}, "'markers' must be a list of single words, not \"thou\"."),
        ({"markers": ["thou art"]}, "'markers' must be a list of single words, not a list of 1."),
        ({"opposed": ["thou"]}, "\"thou\" cannot be in 'markers' and in 'opposed': keep it in one."),
        ({"elsewhere": "none"}, "'elsewhere' must be a list of pairs, not \"none\"."),
        ({"elsewhere": [{"input": "a"}]}, "'elsewhere', entry 1: expected"),
    ],
)
def test_a_behaviour_that_cannot_be_used_says_what_to_mend(tmp_path, changes, reason):
    assert reason in complaint(written(tmp_path, behaviour(**changes)))


# ------------------------------------------------------------------------------------------- a user's file


def test_a_dict_a_list_and_our_own_format_read_alike(tmp_path):
    rows = [{"input": x, "output": y} for x, y in plain().items()]
    as_dict = tasks.load(written(tmp_path, plain(), "a.json"))
    as_list = tasks.load(written(tmp_path, rows, "b.json"))
    ours = tasks.load(written(tmp_path, {"title": "Mine", "licence": "CC0", "pairs": rows}, "c.json"))
    assert as_dict.pairs == as_list.pairs == ours.pairs
    assert as_dict.pairs[0] == Pair("x0", "y0", ("y0",))
    assert as_dict.name.startswith("a.") and (as_dict.title, ours.title, ours.licence) == ("A", "Mine", "CC0")


def test_a_list_of_answers_keeps_its_order_and_drops_repeats(tmp_path):
    task = tasks.load(written(tmp_path, {**plain(), "big": ["small", "little", "small"]}))
    assert task.pairs[-1] == Pair("big", "small", ("small", "little"))


def test_entries_of_one_input_are_merged_with_a_word(tmp_path):
    rows = [[x, y] for x, y in plain().items()]
    rows[3:3] = [["x0", "y0"], [" x0", "z0 "], ["x1", ["y1", "w1"]], ["x0", ["z0", "y0"]]]
    task = tasks.load(written(tmp_path, rows))
    assert [pair.x for pair in task.pairs] == list(plain())
    assert task.pairs[:3] == (Pair("x0", "y0", ("y0", "z0")), Pair("x1", "y1", ("y1", "w1")), Pair("x2", "y2", ("y2",)))
    said = "Entries that repeat an earlier input: 2 copies, dropped; 2 with other answers, accepted too."
    assert (task.copies, task.joined, task.merged) == (2, 2, said)
    assert tasks.load(written(tmp_path, plain())).merged == ""
    in_a_dict = json.dumps(plain())[:-1] + ', "x0": "z0"}'
    assert tasks.load(written(tmp_path, in_a_dict.encode())).pairs[0].answers == ("y0", "z0")


def test_numbers_are_read_as_they_are_written(tmp_path):
    content = json.dumps(plain())[:-1] + ', "1": 2, "a half": 0.50, "many": [1e3, 12345678901234567890]}'
    assert [pair.answers for pair in tasks.load(written(tmp_path, content.encode())).pairs[-3:]] == [
        ("2",), ("0.50",), ("1e3", "12345678901234567890"),
    ]  # fmt: skip


ROWS = [{"input": x, "output": y} for x, y in plain().items()]
LISTS = [[x, y] for x, y in plain().items()]
XS, YS = list(plain()), list(plain().values())


def renamed(x, y, **more):
    return [{**more, x: row["input"], y: row["output"]} for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        LISTS, {"pairs": LISTS}, {"pairs": plain()}, {"data": ROWS, "version": "1"}, {"train": LISTS},
        renamed("Input", "Output"), renamed("question", "answer", id=1), renamed("source", "target"), renamed("x", "y"),
        renamed("prompt", "completion"), renamed("text", "label"), renamed("input", "target"),
        {"input": XS, "output": YS, "id": list(range(20))}, {"train": {"question": XS, "answer": YS}},
        {"rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)], "features": [{}]},
        {"input": dict(enumerate(XS)), "output": dict(enumerate(YS))},
        {"columns": ["output", "input"], "index": list(range(20)), "data": [[y, x] for x, y in LISTS]},
        {"examples": renamed("input", "target"), "name": "mine"},
    ],
)  # fmt: skip
def test_the_formats_of_others_are_read_where_they_are_unambiguous(tmp_path, content):
    own = tasks.load(written(tmp_path, ROWS))
    assert replace(tasks.load(written(tmp_path, content)), name=own.name) == own  # its name has the file's hash


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("mine.jsonl", list(map(json.dumps, ROWS))), ("mine.json", list(map(json.dumps, LISTS))),
        ("mine.JSONL", list(map(json.dumps, LISTS))), ("mine.csv", ["input,output", *map(",".join, LISTS)]),
        ("mine.csv", ["x;y", *map(";".join, LISTS)]),
        ("mine.tsv", ["id\tQuestion\tAnswer", *("1\t" + "\t".join(row) for row in LISTS)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_lines_are_read(tmp_path, monkeypatch, name, lines, end):
    written(tmp_path, ("\ufeff" + end.join([*lines, ""])).encode(), name)
    monkeypatch.chdir(tmp_path)
    assert tasks.load(name).pairs == tasks.load(written(tmp_path, ROWS)).pairs
    assert tasks.files(name)["word"].name == name


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("mine.csv", "hot,cold\nbig,small\n", 'with a comma between them, and there is "hot", "cold"'),
        ("mine.csv", "", "there is nothing"),
        ("mine.csv", "input,output\na,b,c\n", "entry 1 has other columns than the 2"),
        ("mine.csv", 'input,output\na,"b\n', "cannot be read as a table: unexpected end of data"),
        ("mine.tsv", "input,output\na,b\n", 'with a tab between them, and there is "input,output"'),
        ("mine.json", "input,output\na,b\n", "line 1, column 1 (files of other kinds end in .csv"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_says_what_it_found(tmp_path, name, content, says):
    path = written(tmp_path, content.encode(), name)
    with pytest.raises(TaskError) as caught:
        tasks.load(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_dict_of_twenty_words_is_never_taken_for_columns_or_a_holder(tmp_path):
    words = {**plain(), "input": ["entrée", "saisie"], "output": ["sortie", "résultat"], "data": ["données", "info"]}
    assert [pair.x for pair in tasks.load(written(tmp_path, words)).pairs[-3:]] == ["input", "output", "data"]
    path = written(tmp_path, {**words, "rows": [["a", "b"]]})
    assert 'entry 24 (input "rows"): the answer must be' in complaint(path)


def test_spaces_around_words_and_a_byte_order_mark_do_not_matter(tmp_path):
    content = b"\xef\xbb\xbf" + json.dumps({**plain(), " new ": " old\t"}).encode()
    assert tasks.load(written(tmp_path, content)).pairs[-1] == Pair("new", "old", ("old",))


def test_the_word_pairs_may_be_an_input(tmp_path):
    task = tasks.load(written(tmp_path, {**plain(), "pairs": ["paires", "couples"]}))
    assert task.pairs[-1] == Pair("pairs", "paires", ("paires", "couples"))


def test_a_path_as_text_works_from_the_current_folder(tmp_path, monkeypatch):
    written(tmp_path, plain())
    monkeypatch.chdir(tmp_path)
    assert tasks.load("mine.json") == tasks.load(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{'x': 'y'}", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"x": "\xe9"}', "is not UTF-8 (byte 7)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", 'entry 1: expected {"input": x, "output": y} or [x, y], found 999'),
        (json.dumps("hello").encode(), 'not "hello"'),
        (json.dumps(plain(19)).encode(), "holds 19 pairs and a task needs 20"),
        (json.dumps({"pairs": [{"input": "x", "output": "y"}]}).encode(), "holds 1 pairs"),
        (json.dumps([["x", "y", "z"]]).encode(), "entry 1: expected"),
        (json.dumps([["a", "b"]]).encode(), "holds 1 pairs"),
        (json.dumps([["input", "output"], ["a", "b"]]).encode(), "entry 1 looks like the names of the columns"),
        (json.dumps([{"input": "x"}]).encode(), "entry 1: expected"),
        (json.dumps({"a": "b", "x": ""}).encode(), 'entry 2 (input "x"): the answer must be'),
        (json.dumps({"x": True}).encode(), 'string or a number, not true: put it in quotes'),
        (b'{"x": NaN}', "not NaN"),
        (json.dumps({"x": {"y": "z"}}).encode(), 'as "x": call two that are columns "input" and "output"'),
        (json.dumps({"x": "y\0"}).encode(), "the answer holds a control character"),
        (json.dumps({"x": []}).encode(), "the list of accepted answers is empty"),
        (json.dumps({"x": ["y", None]}).encode(), "not null"),
        (json.dumps({" ": "y"}).encode(), "the input must be a non-empty string"),
        (json.dumps({"x": "y\nz"}).encode(), "must be one line"),
        (json.dumps({"x": "\ud800"}).encode(), "surrogate"),
        (b'{"x": "y", "z": "y", "x": "w"}', "holds 2 pairs of different inputs and a task needs 20"),
        (b'{"a": "b"}}', "Extra data at line 1, column 11"),
        (b'{"a": "b"}\n{"a": "b"\n', "Expecting ',' delimiter at line 3"),
        (b'{"a": "b"}\n{"a": "b"}\n', 'entry 1: expected {"input": x, "output": y} or [x, y], found an object with'),
        (json.dumps([{"Country": "x", "Capital": "y"}]).encode(), 'the keys "Country", "Capital"'),
        (json.dumps([{"input": "x", "answer": "y", "target": "z"}]).encode(), 'the keys "input", "answer", "target"'),
        (b'[{"input": "x", "input": "y", "output": "z"}]', 'the keys "input", "input", "output"'),
        (json.dumps({"train": [["a", "b"]], "test": [["a", "b"]]}).encode(), 'as "train", "test": keep those'),
        (json.dumps({"input": ["a", "b"], "output": ["c"]}).encode(), "has 2 of 'input' and 1 of 'output'"),
        (json.dumps({"en": ["a"] * 30, "fr": ["b"] * 30}).encode(), 'as "en", "fr": call two that are columns'),
        (json.dumps({"columns": ["x", "y"], "data": [["a", "b"], ["c"]]}).encode(), "entry 2 has other columns"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line_that_names_the_entry(tmp_path, content, says):
    assert says in complaint(written(tmp_path, content))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"title": 3}, "'title' must be"),
        ({"kind": "poem"}, "'kind' must be one of"),
        ({"name": "a\nb"}, "'name' must be one line"),
        ({"title": "a\0b"}, "'title' holds a control character"),
        ({"title": "x" * 121}, "121 characters and 120 are the most"),
    ],
)
def test_a_wrong_field_of_our_own_format_is_named(tmp_path, fields, says):
    rows = [{"input": x, "output": y} for x, y in plain().items()]
    assert says in complaint(written(tmp_path, {**fields, "pairs": rows}))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "There is no file" in complaint(tmp_path / "mine.json")
    (tmp_path / "mine.json").mkdir()
    assert "cannot be read" in complaint(tmp_path / "mine.json")


def test_an_unknown_task_lists_the_others_and_suggests_the_closest():
    with pytest.raises(TaskError, match=r"no task 'antonym'\. Did you mean 'antonyms'\?.*country_capital"):
        tasks.load("antonym")
    with pytest.raises(TaskError, match=r"no task 'zzzz'\. Shipped are"):
        tasks.load("zzzz")
    with pytest.raises(TaskError, match="no kind"):
        tasks.load("antonyms", kind="poem")


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["input", "output", "pairs"]), inner)
    ),
    max_leaves=30,
)
near_misses = st.dictionaries(
    st.text(), st.text() | st.lists(st.text(min_size=1), max_size=3), min_size=18, max_size=30
)


@settings(max_examples=300, deadline=None)
@given(content=anything | near_misses)
def test_any_json_gives_a_task_or_a_task_error(content, tmp_path_factory):
    path = written(tmp_path_factory.getbasetemp(), content)
    try:
        task = tasks.load(path)
    except TaskError:
        return
    assert len({pair.x for pair in task.pairs}) == len(task.pairs) >= MIN_PAIRS
    assert all(pair.y == pair.answers[0] and pair.x.strip() for pair in task.pairs)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_give_a_task_error(content, tmp_path_factory):
    with pytest.raises(TaskError):
        tasks.load(written(tmp_path_factory.getbasetemp(), content))


# ------------------------------------------------------------------------------------------------- splits


@settings(max_examples=60, deadline=None)
@given(words=st.sets(st.text(min_size=1, max_size=4), min_size=MIN_PAIRS, max_size=120), seed=st.integers())
def test_buckets_are_disjoint_complete_and_do_not_hang_on_the_order_of_the_file(words, seed):
    pairs = [(word, f"answer to {word}") for word in sorted(words)]
    splits = tasks.split(made(pairs))
    inputs = [pair.x for bucket in buckets(splits) for pair in bucket]
    assert len(inputs) == len(set(inputs)) == len(pairs)
    random.Random(seed).shuffle(pairs)
    assert tasks.split(made(pairs)) == splits


def test_a_split_is_the_same_on_every_machine():
    splits = tasks.split(numbered(20))
    assert [pair.x for pair in splits.validation] == ["word 5", "word 7", "word 2"]
    assert [len(bucket) for bucket in buckets(splits)] == [7, 4, 3, 6]


SPLITS = """
word:algo_first:e3c20cb0 word:algo_last:df92b4f0 word:algo_second:cee87200 word:antonyms:4a511248
word:country_capital:a4ac2ec7 word:de_en:82f72f09 word:element_symbol:3f43a95c word:en_de:b6b4e588
word:en_es:00b16f11 word:en_fr:588cefc8 word:en_it:18da83f5 word:es_en:3c276014 word:fr_en:233c7ac9
word:it_en:f8272ee6 word:location_continent:19202d26 word:location_country:b46f0dfa
word:location_language:65808204 word:location_religion:cb1e2121 word:person_language:541027f0
word:person_nationality:dc3c250a word:person_profession:4c27e13b word:plural_singular:20be17ba
word:present_simple_gerund:ab9e7214 word:present_simple_past_perfect:3c7eae97
word:present_simple_past_simple:8a94bc5f word:singular_plural:51f7e5fa sentence:de_en:af115820
sentence:en_de:56c49d9d sentence:en_es:f8a2e72d sentence:en_fr:57e3a60b sentence:en_it:1615d807
word:noun_category:e79e0429 word:word_sentiment:5b88f6f4 word:last_plural:baed83ad word:city_language:a16e77a0
sentence:es_en:2674886b sentence:fr_en:88c5458d sentence:it_en:ba37176b
"""


def test_the_splits_of_the_shipped_tasks_are_those_that_the_tables_were_made_with():
    found = []
    for kind, name in EVERY_SHIPPED:
        splits = tasks.split(tasks.load(name, kind))
        texts = [[[pair.x, *pair.answers] for pair in bucket] for bucket in buckets(splits)]
        found.append(f"{kind}:{name}:{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]}")
    assert set(SPLITS.split()) <= set(found)


def test_the_answer_of_a_pair_does_not_move_it():
    other = made([(pair.x, "another answer") for pair in numbered(60).pairs])
    for ours, theirs in zip(buckets(tasks.split(numbered(60))), buckets(tasks.split(other)), strict=True):
        assert [pair.x for pair in ours] == [pair.x for pair in theirs]


def test_one_more_pair_moves_at_most_the_pairs_next_to_the_three_cuts():
    before, after = tasks.split(numbered(200)), tasks.split(numbered(201))
    moved = sum(len(set(old) - set(new)) for old, new in zip(buckets(before), buckets(after), strict=True))
    assert moved <= 3


@settings(max_examples=60, deadline=None)
@given(count=st.integers(20, 80), seed=st.integers())
def test_a_pair_and_its_reversal_share_a_bucket(count, seed):
    pairs = [(f"left {i}", f"right {i}") for i in range(count)]
    pairs += [(y.upper(), x) for x, y in pairs]  # a capital does not hide a reversal
    random.Random(seed).shuffle(pairs)
    splits = tasks.split(made(pairs))
    for bucket in buckets(splits):
        inputs = {pair.x.casefold() for pair in bucket}
        assert all(pair.y.casefold() in inputs for pair in bucket)


def test_no_shipped_antonym_is_trained_in_one_direction_and_tested_in_the_other():
    splits = tasks.split(tasks.load("antonyms"))
    where = {pair.x: number for number, bucket in enumerate(buckets(splits)) for pair in bucket}
    reversals = 0
    for pair in tasks.load("antonyms").pairs:
        for answer in pair.answers:
            back = [
                other
                for other in tasks.load("antonyms").pairs
                if other.x == answer and pair.x in other.answers
            ]
            assert all(where[other.x] == where[pair.x] for other in back)
            reversals += len(back)
    assert reversals > 50


def test_a_bucket_too_small_to_use_is_named_with_what_it_needs():
    sizes = {"vector": 0.80, "train": 0.10, "validation": 0.05, "test": 0.05}
    with pytest.raises(
        TaskError, match=rf"train bucket .* hold 2 of its 20 pairs and needs {MIN_BUCKET}: a task of 60 pairs"
    ):
        tasks.split(numbered(20), sizes)
    answers = [(f"w{(i + 1) % 20}", f"w{(i - 1) % 20}") for i in range(20)]
    ring = tuple(Pair(f"w{i}", both[0], both) for i, both in enumerate(answers))
    with pytest.raises(TaskError, match=r"vector bucket of task 'ring' would hold 0"):
        tasks.split(Task("ring", "Ring", ring, "none", "made up", "word", "own"))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(MIN_PAIRS, 60), largest=st.integers(1, 6))
def test_the_number_of_pairs_an_error_asks_for_is_enough(count, largest):
    def grouped(size):
        words = [f"{i // largest} {i % largest}" for i in range(size)]
        mates = [
            tuple(w for w in words if w.split()[0] == x.split()[0] and w != x) or ("none",) for x in words
        ]
        pairs = tuple(Pair(x, y[0], y) for x, y in zip(words, mates, strict=True))
        return Task("grouped", "Grouped", pairs, "none", "made up", "word", "own")

    try:
        tasks.split(grouped(count))
    except TaskError as error:
        tasks.split(grouped(int(re.search(r"a task of (\d+) pairs fills", str(error))[1])))


@pytest.mark.parametrize(
    "sizes", [{"vector": 1.0}, {"vector": 0.5, "train": 0.5, "validation": 0.5, "test": -0.5}, {}]
)
def test_sizes_that_are_not_four_fractions_of_one_are_refused(sizes):
    with pytest.raises(TaskError, match="Split sizes must be"):
        tasks.split(numbered(40), sizes)


def test_the_module_needs_no_torch():
    code = "import sys, nb_utils.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
