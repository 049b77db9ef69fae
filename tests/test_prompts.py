"""Prompts: the tokens that matter are found by character offsets, for every tokenizer and any text."""

import json
import random
import re

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nb_utils import models, prompts, tasks
from nb_utils.prompts import Template


@pytest.fixture(scope="module", params=["tiny", "gemma-3-270m", "smollm2-135m-instruct"])
def tokenizer(request):
    if request.param == "tiny":
        return models.load("tiny").tokenizer
    # The tokenizer alone: converting the model is another test's business, loading it nobody's.
    return AutoTokenizer.from_pretrained(models._converted(request.param))


def pair(x, *answers):
    return tasks.Pair(x, answers[0], answers)


def text_of(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=True)


PAIRS = [
    pair("hot", "cold"),
    pair("größe", "tamaño"),
    pair("日本", "東京"),
    pair("🜁", "👩‍🚀 in space"),
    pair("a -> b", "c -> d"),
    pair("->", "->->"),
    pair("two words", "three more words"),
    pair("x.y!", "(z)"),
    pair("ﷺ", "\u0301"),
]


OWN = Template(" means that", opening="List:\n", before="- ")
WRITTEN = [*prompts.TEMPLATES.values(), Template(" =>", "\n\n"), OWN]


@pytest.mark.parametrize("template", WRITTEN)
def test_cutting_after_a_separator_or_an_output_gives_exactly_the_text_up_to_there(tokenizer, template):
    shots, query = PAIRS[:-1], PAIRS[-1]
    prompt = prompts.encode(tokenizer, shots, query, template)
    text, separators, outputs = "", [], []
    for p in (*shots, query):
        text += (template.between if text else template.opening) + template.before + p.x + template.separator
        separators.append(text)
        text += f" {p.y}"
        outputs.append(text)
    assert [text_of(tokenizer, prompt.ids[: i + 1]) for i in prompt.separators] == separators
    assert [text_of(tokenizer, prompt.ids[: i + 1]) for i in prompt.outputs] == outputs[:-1]
    assert text_of(tokenizer, prompt.ids) == text


def test_the_templates_of_the_book_read_as_they_are_meant(tokenizer):
    shown = {
        name: text_of(tokenizer, prompts.encode(tokenizer, [pair("hot", "cold")], pair("up", "down"), template).ids)
        for name, template in prompts.TEMPLATES.items()
    }
    assert shown == {
        "arrow": "hot -> cold\nup -> down", "colon": "hot: cold\nup: down", "equals": "hot = cold\nup = down",
        "question": "Q: hot\nA: cold\nQ: up\nA: down",
        "spanish": "Pregunta: hot\nRespuesta: cold\nPregunta: up\nRespuesta: down",
        "instruction": "Complete the list.\nhot -> cold\nup -> down", "choice": "hot -> cold\nup -> down",
    }  # fmt: skip


def test_an_offer_has_the_answer_among_wrong_ones_and_is_the_same_each_time():
    pairs = [pair("hot", "cold"), pair("up", "down"), tasks.Pair("big", "small", ("small", "down")), pair("in", "out")]
    found = prompts.offered(pairs)
    assert found == prompts.offered(pairs) and [p.y for p in found] == [p.y for p in pairs]
    for before, after in zip(pairs, found, strict=True):
        options = re.fullmatch(rf"{before.x} \((.*)\)", after.x)[1].split(", ")
        assert len(set(options)) == 3 and set(options) & set(before.answers) == {before.y}
    assert prompts.offered(pairs[:2])[0].x in ("hot (cold, down)", "hot (down, cold)")


@pytest.mark.parametrize("query", PAIRS, ids=lambda p: p.x)
def test_the_answer_is_the_last_tokens_and_starts_right_after_the_last_separator(tokenizer, query):
    prompt = prompts.encode(tokenizer, PAIRS[:2], query)
    assert prompt.ids == tuple(tokenizer(text_of(tokenizer, prompt.ids))["input_ids"])
    assert prompt.ids[-len(prompt.answer) :] == prompt.answer
    assert len(prompt.ids) - len(prompt.answer) == prompt.separators[-1] + 1
    assert text_of(tokenizer, prompt.answer).strip() == query.y


def test_an_arrow_inside_an_input_is_not_taken_for_the_separator(tokenizer):
    prompt = prompts.encode(tokenizer, [pair("a -> b", "c")], pair("d -> e -> f", "g"))
    assert len(prompt.separators) == 2 and len(prompt.outputs) == 1
    assert text_of(tokenizer, prompt.ids[: prompt.separators[-1] + 1]) == "a -> b -> c\nd -> e -> f ->"


def test_every_accepted_answer_is_tokenised_as_if_it_stood_in_the_prompt(tokenizer):
    query = pair("car", "Auto", "Wagen", "roter Wagen", "coche")
    prompt = prompts.encode(tokenizer, PAIRS[:2], query)
    head = text_of(tokenizer, prompt.ids[: prompt.separators[-1] + 1])
    assert prompt.accepted[0] == prompt.answer and len(prompt.accepted) == 4
    for answer, ids in zip(query.answers, prompt.accepted, strict=True):
        whole = prompts.encode(tokenizer, PAIRS[:2], pair("car", answer))
        assert ids == whole.answer and text_of(tokenizer, whole.ids) == f"{head} {answer}"


def test_a_zero_shot_prompt_has_one_separator_and_no_output(tokenizer):
    first, second = prompts.zero_shot(tokenizer, PAIRS[:2])
    assert text_of(tokenizer, first.ids) == "hot -> cold" and text_of(tokenizer, second.ids) == "größe -> tamaño"
    assert len(first.separators) == 1 and first.outputs == ()


@pytest.mark.parametrize("template", [Template(between=""), Template(between="", before="ball")])
def test_a_separator_that_merges_with_what_follows_is_refused(template):
    smollm2 = AutoTokenizer.from_pretrained(models._converted("smollm2-135m-instruct"))
    with pytest.raises(ValueError, match="choose another separator"):
        prompts.encode(smollm2, [pair("left", "foot")], pair("ball", "round"), template)


# --- few-shot prompts, on bytes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytewise():
    return models.load("tiny").tokenizer


POOL = [pair(f"in{i}", f"out{i}") for i in range(12)]


def shots_of(tokenizer, prompt):
    return text_of(tokenizer, prompt.ids).split("\n")[:-1]


def test_a_few_shot_prompt_never_shows_its_own_query(bytewise):
    batch = prompts.few_shot(bytewise, POOL, POOL * 5, n_shots=11, seed=0)
    for query, prompt in zip(POOL * 5, batch, strict=True):
        lines = text_of(bytewise, prompt.ids).split("\n")
        assert lines[-1] == f"{query.x} -> {query.y}" and lines.count(lines[-1]) == 1
        assert sorted(lines) == sorted(f"{p.x} -> {p.y}" for p in POOL)


def test_an_input_of_the_query_with_another_answer_is_no_shot_either(bytewise):
    pool = [*POOL, pair("in0", "something else")]
    for prompt in prompts.few_shot(bytewise, pool, [POOL[0]] * 20, n_shots=11, seed=0):
        assert not any(line.startswith("in0 ") for line in shots_of(bytewise, prompt))


def test_shots_are_drawn_without_repetition_by_the_seed_alone(bytewise):
    first = prompts.few_shot(bytewise, POOL, POOL, n_shots=5, seed=3)
    assert first == prompts.few_shot(bytewise, POOL, POOL, n_shots=5, seed=3)
    assert first != prompts.few_shot(bytewise, POOL, POOL, n_shots=5, seed=4)
    drawn = [shots_of(bytewise, prompt) for prompt in first]
    assert all(len(lines) == len(set(lines)) == 5 for lines in drawn)
    assert len({tuple(lines) for lines in drawn}) == len(POOL)


def test_a_small_pool_gives_all_the_shots_that_it_has(bytewise):
    (prompt,) = prompts.few_shot(bytewise, POOL[:4], POOL[:1], n_shots=16, seed=0)
    assert len(prompt.outputs) == 3 and len(prompt.separators) == 4


def test_shuffled_labels_leave_the_shots_and_their_order_and_give_none_its_own_answer(bytewise):
    plain = prompts.few_shot(bytewise, POOL, POOL, n_shots=5, seed=3)
    mixed = prompts.few_shot(bytewise, POOL, POOL, n_shots=5, seed=3, shuffle_labels=True)
    assert mixed == prompts.few_shot(bytewise, POOL, POOL, n_shots=5, seed=3, shuffle_labels=True)
    for one, other in zip(plain, mixed, strict=True):
        here, there = ([line.split(" -> ") for line in shots_of(bytewise, p)] for p in (one, other))
        assert [x for x, _ in here] == [x for x, _ in there] and one.answer == other.answer
        assert sorted(y for _, y in here) == sorted(y for _, y in there)
        assert all(y != wrong for (_, y), (_, wrong) in zip(here, there, strict=True))


def test_every_pair_gets_all_the_answers_of_another(bytewise):
    pairs = [pair("a", "1", "one"), pair("b", "2"), pair("c", "3", "three")]
    mixed = prompts.shuffled(pairs, random.Random(0))
    assert [p.x for p in mixed] == ["a", "b", "c"] and all(p.y == p.answers[0] for p in mixed)
    assert sorted(p.answers for p in mixed) == sorted(p.answers for p in pairs)
    assert all(p.y != q.y for p, q in zip(mixed, pairs, strict=True))
    assert prompts.shuffled(pairs[:1], random.Random(0)) == tuple(pairs[:1])


def test_the_dummies_of_a_case_are_no_demonstrations_and_neither_is_its_query(bytewise):
    drawn = prompts.cases(POOL, POOL, n_shots=5, n_dummies=2, seed=1)
    assert drawn == prompts.cases(POOL, POOL, 5, 2, seed=1) != prompts.cases(POOL, POOL, 5, 2, seed=2)
    assert [case.query for case in drawn] == POOL
    for case in drawn:
        inputs = [p.x for p in (*case.demonstrations, *case.dummies)]
        assert (len(case.demonstrations), len(case.dummies)) == (5, 2)
        assert len({case.query.x, *inputs}) == 8
        shown = text_of(bytewise, case.shown(bytewise).ids).split("\n")
        assert shown == [f"{p.x} -> {p.y}" for p in (*case.demonstrations, case.query)]
        dummy = text_of(bytewise, case.shown(bytewise, case.dummies[0]).ids).split("\n")
        assert dummy[:-1] == shown[:-1] and dummy[-1] == f"{case.dummies[0].x} -> {case.dummies[0].y}"
    with pytest.raises(ValueError, match="8 demonstrations and 4 dummies are more than 11 pairs"):
        prompts.cases(POOL, POOL, n_shots=8, n_dummies=4, seed=0)


def test_every_token_of_a_few_shot_prompt_is_an_input_an_arrow_an_output_or_a_line_break(tokenizer):
    prompt = prompts.encode(tokenizer, PAIRS[:3], PAIRS[6])
    kinds = prompts.token_types(prompt)
    assert len(kinds) == len(prompt.ids) and kinds[0] is None
    assert [i for i, kind in enumerate(kinds) if kind == "arrow"] == list(prompt.separators)
    assert [kinds[i] for i in prompt.outputs] == ["output"] * 3
    assert kinds.count("newline") == 3 and all(kinds[i + 1] == "newline" for i in prompt.outputs)
    answer = len(prompt.ids) - len(prompt.answer)
    assert set(kinds[answer:]) == {None} and None not in kinds[1:answer]
    outputs = "".join(text_of(tokenizer, [i]) for i, kind in zip(prompt.ids, kinds, strict=True) if kind == "output")
    assert outputs.replace(" ", "") in ("coldtamaño東京",) or "�" in outputs


def test_the_dummy_shot_says_nothing_of_the_task(tokenizer):
    (prompt,) = prompts.dummy_shot(tokenizer, [pair("hot", "cold")])
    assert text_of(tokenizer, prompt.ids) == "X -> Y\nhot -> cold"
    assert text_of(tokenizer, prompt.ids[: prompt.outputs[-1] + 1]) == "X -> Y"


@pytest.mark.parametrize("place", ["shot's input", "shot's answer", "query's input", "answer", "other answer"])
def test_text_that_the_tokenizer_takes_for_a_special_token_is_refused(tokenizer, place):
    control = next(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    bad, good = f"a{control}b", "c"
    x, y = (bad if place == f"shot's {part}" else good for part in ("input", "answer"))
    answers = [bad if place == part else good for part in ("answer", "other answer")]
    with pytest.raises(tasks.TaskError, match="special token") as said:
        prompts.encode(tokenizer, [pair(x, y)], pair(bad if place == "query's input" else good, *answers))
    assert control in str(said.value) and "\n" not in str(said.value)


# --- tokenizers of other habits --------------------------------------------------------------------------------


def habit(single: str = "<bos> $A", merge: tuple[str, str] | None = None):
    """Return the byte tokenizer with another frame around a text, or with two bytes that it always merges."""
    plain = models.load("tiny").tokenizer
    data = json.loads(plain.backend_tokenizer.to_str())
    if merge:
        data["model"]["vocab"]["".join(merge)] = len(data["model"]["vocab"])
        data["model"]["merges"] = [list(merge)]
        data["pre_tokenizer"]["use_regex"] = False
    core = Tokenizer.from_str(json.dumps(data))
    core.post_processor = TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


@pytest.mark.parametrize("single, bos", [("$A", 0), ("<bos> $A <eos>", 1), ("$A <eos>", 0)])
def test_a_tokenizer_without_bos_or_with_eos_appended_gives_the_same_prompt_but_for_its_bos(single, bos):
    shots, query = PAIRS[:3], pair("big", "small", "little")
    usual = prompts.encode(models.load("tiny").tokenizer, shots, query)
    ours = prompts.encode(habit(single), shots, query)
    assert ours.ids == usual.ids[1 - bos :]
    assert ours.answer == usual.answer and ours.accepted == usual.accepted
    assert [i + 1 - bos for i in ours.separators] == list(usual.separators)
    assert [i + 1 - bos for i in ours.outputs] == list(usual.outputs)


@pytest.mark.parametrize("merge", [(">", "Ġ"), ("d", "Ċ")])
def test_a_tokenizer_that_merges_the_separator_or_an_answer_with_what_follows_is_refused_in_a_sentence(merge):
    with pytest.raises(ValueError, match=r"merges the separator ' ->' or an answer with what follows"):
        prompts.encode(habit(merge=merge), [pair("hot", "cold")], pair("big", "small"))


def test_a_tokenizer_that_merges_the_separator_with_its_own_parts_or_splits_it_is_taken():
    for merge in (None, ("-", ">"), ("Ġ", "-")):
        read = prompts.encode(habit(merge=merge), [pair("hot", "cold")], pair("big", "small"))
        assert len(read.separators) == 2 and read.answer == tuple(habit(merge=merge)(" small").input_ids[1:])


@pytest.mark.parametrize("single, start", [("<bos> $A", [2]), ("$A", []), ("$A <eos>", []), ("<eos> <bos> $A", [1, 2])])
def test_rows_of_text_begin_as_prompts_do(single, start):
    tokenizer, rows = habit(single), np.arange(10, 22).reshape(3, 4)
    assert prompts.opening(tokenizer) == start
    prompt = prompts.encode(tokenizer, [], pair("hot", "cold"))
    assert list(prompt.ids[: len(start)]) == start
    begun = prompts.begin(tokenizer, rows.copy())
    assert (begun[:, : len(start)] == start).all() and (begun[:, len(start) :] == rows[:, len(start) :]).all()


def test_all_of_a_plain_text_is_its_answer_but_the_token_that_nothing_precedes(tokenizer):
    (whole,) = prompts.plain(tokenizer, ["Open thy doors, O Lebanon"])
    assert whole.ids[1:] == whole.answer and not whole.separators and not whole.outputs
    assert text_of(tokenizer, whole.ids) == "Open thy doors, O Lebanon"


def test_tokens_that_are_changed_go_by_names(tokenizer):
    prompt = prompts.encode(tokenizer, PAIRS[:2], PAIRS[-1])
    last, end = prompt.separators[-1], len(prompt.ids)
    assert prompts.positions(prompt, "separator") == (last,)
    assert prompts.positions(prompt, "separators") == prompt.separators and len(prompt.separators) == 3
    assert prompts.positions(prompt, "outputs") == prompt.outputs and len(prompt.outputs) == 2
    assert prompts.positions(prompt, "output") == prompt.outputs[-1:]
    assert prompts.positions(prompt, "every") == tuple(range(1, end))
    assert prompts.positions(prompt, "generated") == tuple(range(last, end))
    assert prompts.positions(prompts.encode(tokenizer, (), PAIRS[0]), "outputs") == ()
    with pytest.raises(ValueError, match=r"one of separator, output, .* not 'arrows'"):
        prompts.positions(prompt, "arrows")


def test_a_prompt_that_is_led_is_read_as_one_text_with_what_leads_it(tokenizer):
    query = prompts.encode(tokenizer, [pair("hot", "cold")], pair("big", "small"))
    led = prompts.led(tokenizer, query, "Give the opposite.\n")
    head = led.ids[: led.separators[-1] + 1]
    assert text_of(tokenizer, head) == "Give the opposite.\nhot -> cold\nbig ->"
    moved = len(led.ids) - len(query.ids)
    assert [led.ids[i] for i in led.separators] == [query.ids[i] for i in query.separators]
    assert led.outputs == tuple(i + moved for i in query.outputs) and led.answer == query.answer
    assert prompts.led(tokenizer, query, "") == query


def test_every_shipped_task_is_asked_for_in_words_that_are_its_own_and_a_file_by_its_title():
    shipped = [tasks.load(name, kind) for kind in ("word", "sentence") for name in tasks.names(kind)]
    said = [prompts.instructions(task)[0] for task in shipped]
    assert len(set(said)) == len(said) and not any(text.endswith(":") for text in said)
    own = tasks.parse("\n".join(f"in{i} -> out{i}" for i in range(20)))
    assert prompts.instructions(own) == [f"{own.title}:"]
