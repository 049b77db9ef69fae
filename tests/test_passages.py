"""Passages: neutral text, steered at tokens like a separator and at others."""

import json
from collections import Counter

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from nb_utils import engine, models, prompts
from nb_utils.prompts import Passage
from workflow import build_passages

PLACES = [prompts.at_separators, prompts.at_random]


@pytest.fixture(scope="module", params=["tiny", "gemma-3-270m", "smollm2-135m-instruct"])
def tokenizer(request):
    if request.param == "tiny":
        return models.load("tiny").tokenizer
    return AutoTokenizer.from_pretrained(models._converted(request.param))


def read(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def test_the_shipped_passages_are_many_short_different_and_of_known_origin():
    found = prompts.passages()
    assert len(found) == len({p.text for p in found}) == 96
    assert Counter(p.source for p in found) == dict.fromkeys(build_passages.PACKAGES, 32)
    assert all(200 <= len(p.text) <= 500 for p in found)
    record = json.loads(prompts.NEUTRAL.read_text(encoding="utf-8"))
    assert record["licence"] == "public domain" and all(p in record["origin"] for p in build_passages.PACKAGES)


@pytest.mark.parametrize("place", PLACES)
def test_every_shipped_passage_gives_a_prompt_whose_answer_is_the_text_that_follows(tokenizer, place):
    found = prompts.passages()
    made = place(tokenizer, found, following=12)
    assert len(made) == len(found)
    for passage, prompt in zip(found, made, strict=True):
        at = prompt.separators[-1]
        assert at >= prompts.BEFORE and len(prompt.ids) == at + 1 + 12 and prompt.ids[at + 1 :] == prompt.answer
        assert prompt.accepted == (prompt.answer,)
        # A cut inside a character of several bytes leaves a replacement sign at the end.
        assert passage.text.startswith(read(tokenizer, prompt.ids).rstrip("\ufffd"))


def test_a_steered_token_ends_like_a_separator_or_on_purpose_does_not(tokenizer):
    found = prompts.passages()
    like, other = (
        [read(tokenizer, prompt.ids[: prompt.separators[-1] + 1]) for prompt in place(tokenizer, found)]
        for place in PLACES
    )
    assert all(head[-1] in ":-–—=|>" for head in like)
    assert Counter(head[-1] for head in like)[":"] > 20 and Counter(head[-1] for head in like)["-"] > 20
    assert sum(head.endswith((":", "--")) for head in other) == 0


@pytest.mark.parametrize("text", ["a well-known fact", "at 10:30 sharp", "un=x"])
def test_a_hyphen_or_colon_inside_a_word_is_no_separator(text):
    marks = [mark[0] for mark in prompts.SEPARATOR_LIKE.finditer(text)]
    assert marks == (["="] if "=" in text else [])


@pytest.mark.parametrize("place", PLACES)
def test_the_place_is_drawn_by_the_seed_alone(place):
    tok, found = models.load("tiny").tokenizer, prompts.passages()[:20]
    first = place(tok, found, seed=1)
    assert first == place(tok, found, seed=1) and first != place(tok, found, seed=2)


def test_a_passage_without_a_separator_is_left_out():
    tok = models.load("tiny").tokenizer
    plain, marked = Passage("word " * 20, "own"), Passage("word " * 8 + "so: " + "word " * 8, "own")
    assert len(prompts.at_separators(tok, [plain, marked])) == 1 and len(prompts.at_random(tok, [plain])) == 1
    assert prompts.at_separators(tok, [Passage("so: " + "word " * 20, "own")]) == [], "too near to the beginning"


def test_the_separators_of_a_passage_are_all_tokens_like_one_up_to_the_steered_one():
    tok = models.load("tiny").tokenizer
    text = "first: " + "word " * 6 + "then: " + "and so on, " * 3 + "at last: " + "word " * 9
    steered = set()
    for seed in range(9):
        (made,) = prompts.at_separators(tok, [Passage(text, "own")], following=5, seed=seed)
        read = [tok.decode(made.ids[: i + 1]) for i in made.separators]
        assert all(part.endswith(":") for part in read) and read[0].endswith("first:")
        assert len(made.separators) == tok.decode(made.ids[: made.separators[-1] + 1]).count(":")
        steered.add(made.separators[-1])
    assert len(steered) == 2, "the first is too near to the beginning, the others are drawn"


def test_the_loss_of_a_passage_is_that_of_a_plain_forward_pass():
    tiny = models.load("tiny")
    made = prompts.at_separators(tiny.tokenizer, prompts.passages()[:6], following=5)
    losses = engine.Site.prepare(tiny, made).unsteered().token_loss()[0]
    for prompt, loss in zip(made, losses, strict=True):
        log_p = tiny.hf(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
        expected = -log_p[torch.arange(-6, -1), list(prompt.answer)].mean()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_a_passage_is_a_run_of_whole_sentences_around_a_mark():
    words = "Nothing of note is to be found in this sentence of exactly so many words. "
    text = "Short. " + words * 2 + "He said one thing: no more than that. " + words * 3
    found = build_passages.passage(text)
    assert found in text and found.endswith(".") and ": " in found[100:]
    assert build_passages.SHORTEST <= len(found) <= build_passages.LONGEST
    assert build_passages.passage(words * 9) is None
    assert build_passages.passage("note: " + words * 9) is None, "a mark at the very beginning has no context"


def test_the_choice_depends_on_no_order_of_documents():
    words = "Nothing of note is to be found in this sentence of exactly so many words. "
    texts = [f"{number} {words}{words}And so: {words}{words}" for number in range(40)]
    frame = pd.DataFrame({"text": texts, "source": "sotu"})
    chosen = build_passages.choose(frame)
    assert len(chosen) == build_passages.COUNT and chosen == build_passages.choose(frame[::-1])
