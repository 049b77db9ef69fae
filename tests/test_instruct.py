"""Exchanges, transcripts in words, vectors in all blocks at once, and what the claims on instruct vectors go by."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from book.ledger import claims
from book.ledger.claims import Book, ClaimError
from book.ledger.numbers import instruct_vectors
from nb_utils import engine, models, prompts, scores, tasks
from nb_utils.record import tables
from nb_utils.tasks import TaskError

PARTS = ("vector", "train", "validation", "test")


@pytest.fixture(scope="module")
def talk():
    return tasks.exchanges("assistant")


def written(folder, rows, **fields):
    path = folder / "mine.json"
    path.write_text(json.dumps({"pairs": rows, **fields}))
    return path


def rows(topics=8, each=3):
    return [{"topic": f"t{t}", "question": f"What is {t}.{i}?", "answer": f"It is {i}."} for t in range(topics)
            for i in range(each)]  # fmt: skip


# Exchanges


def test_no_topic_and_no_question_of_the_shipped_exchanges_is_in_two_parts(talk):
    topics = [{talk.topics[pair] for pair in getattr(talk.splits, part)} for part in PARTS]
    assert sum(map(len, topics)) == len(set().union(*topics)) == len(set(talk.topics.values())) and all(topics)
    cut = [getattr(splits, part) for splits in (talk.splits, talk.itself) for part in PARTS]
    of = [pair.x.casefold() for pairs in cut for pair in pairs]
    assert len(of) == len(set(of)) == len(talk.task.pairs) == len({pair.y for pair in talk.task.pairs})


def test_every_answer_about_itself_says_that_it_is_an_ai_and_no_other_does(talk):
    own = {pair for part in PARTS for pair in getattr(talk.itself, part)}
    assert len(own) >= 36 and all("an AI assistant" in pair.y for pair in own)
    assert not any("AI" in pair.y.split() for pair in set(talk.task.pairs) - own)


def test_exchanges_of_a_users_file_are_cut_by_topic_whatever_their_order(tmp_path):
    pairs = rows(10, 4)
    found = [tasks.exchanges(written(tmp_path, one)) for one in (pairs, pairs[::-1])]
    assert [set(found[0].splits.test), set(found[0].splits.train)] == [
        set(found[1].splits.test), set(found[1].splits.train)]  # fmt: skip
    assert found[0].task.name.startswith("mine.") and not any(getattr(found[0].itself, part) for part in PARTS)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda one: one | {"answer": ""}, r'entry 5 \(input "What is 1.1\?"\): the answer must be a non-empty string'),
        (lambda one: one | {"answer": "Yes.\nNo."}, r"entry 5 .* must be one line"),
        (lambda one: {key: one[key] for key in ("question", "answer")}, r"entry 5 .*: the topic must be a non-empty"),
        (lambda one: one | {"topic": "another"}, r'has 1 of topic "another" and needs 3'),
    ],
)
def test_a_bad_entry_is_one_sentence_that_names_it(tmp_path, change, said):
    pairs = rows()
    pairs[4] = change(pairs[4])
    with pytest.raises(TaskError, match=said) as error:
        tasks.exchanges(written(tmp_path, pairs))
    assert "\n" not in str(error.value)


def test_exchanges_that_cannot_be_cut_or_are_not_there_are_refused(tmp_path):
    with pytest.raises(TaskError, match="has 7 topics and needs 8"):
        tasks.exchanges(written(tmp_path, rows(7)))
    with pytest.raises(TaskError, match=r"There are no exchanges 'asistant'. Shipped are: assistant;"):
        tasks.exchanges("asistant")
    with pytest.raises(TaskError, match="the topic must be a non-empty string"):
        tasks.exchanges(tasks.FOLDERS["word"] / "antonyms.json")


def test_a_table_remembers_which_exchanges_it_is_of():
    file = tasks.EXCHANGES / "assistant.json"
    assert list(tables.data_sha256({"task": "assistant"})) == [f"exchanges of {file.name}"]


# Transcripts, and vectors in all blocks


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


@pytest.fixture(scope="module")
def read(tiny):
    pairs = [tasks.Pair(x, y, (y,)) for x, y in (("Who?", "I am."), ("What is a dog?", "An animal."), ("Up", "Down"))]
    return prompts.ended(tiny.tokenizer, prompts.zero_shot(tiny.tokenizer, pairs, prompts.TRANSCRIPT))


@pytest.fixture(scope="module")
def added(tiny):
    noise = torch.randn(tiny.n_layers, tiny.d_model, generator=torch.Generator().manual_seed(0))
    noise[2] = 0
    return noise


def test_a_transcript_ends_with_the_end_of_text(tiny, read):
    assert tiny.tokenizer.decode(read[0].ids[1:-1]) == "User: Who?\nAssistant: I am."
    for prompt in read:
        assert prompt.ids[-1] == prompt.answer[-1] == tiny.tokenizer.eos_token_id == prompt.accepted[0][-1]
        assert prompt.ids[prompt.separators[-1] + 1 :] == prompt.answer


def test_the_loss_to_train_on_is_that_of_plain_passes_and_reaches_every_vector(tiny, read, added):
    vectors = (0.1 * added).requires_grad_()
    labels = [token for prompt in read for token in prompt.answer]
    words = engine.likeliest(tiny, read[:1], labels, keep=tiny.layout.n_vocab)
    with engine.steered(tiny, vectors, "resid", 1.0, "add"):
        loss, plain = engine.answer_loss(tiny, read, words), engine.token_nll(tiny, read)
    torch.testing.assert_close(loss, torch.stack([nll.mean() for nll in plain]))
    loss.sum().backward()
    assert vectors.grad[[0, 1, 3]].abs().sum(1).gt(0).all() and not vectors.grad[2].any()
    few = engine.likeliest(tiny, read[:1], labels, keep=len(set(labels)) + 2)
    assert few.index[labels].ge(0).all() and few.index.ge(0).sum() == len(set(labels)) + 2


def test_replies_side_by_side_are_those_of_each_prompt_alone_without_a_cache(tiny, read, added):
    """The reference pads nothing, caches nothing, and steers every token but the first of the whole text again."""
    end, found = tiny.tokenizer.eos_token_id, engine.replies(tiny, read, added, 5)
    for prompt, said in zip(read, found, strict=True):
        ids = list(prompt.ids[: prompt.separators[-1] + 1])
        start = len(ids)
        with engine.steered(tiny, added, "resid", 1.0, "add"), torch.no_grad():
            while len(ids) - start < 5 and (len(ids) == start or ids[-1] != end):
                ids.append(int(tiny.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert said == tuple(ids[start:])
    assert found != engine.replies(tiny, read, torch.zeros_like(added), 5)


def test_exchanges_load_as_tasks_do():
    loaded = scores.prepare_exchanges("assistant", "tiny", "shipped", "2,3", half=True)
    assert loaded.wanted == [2, 3] and set(loaded.saes) == {2, 3} and "38 topics" in loaded.about_task
    assert loaded.splits == tasks.exchanges("assistant").splits


# What decides the claims


@pytest.fixture
def book(monkeypatch):
    """Tables by hand: two topics, and what each way has on both."""
    none = np.nan
    ways = [  # method, blocks, layer, k, answers' loss, P(end), P(stop), relevant, validation
        ("base", "none", -1, none, 3.0, 0.0, 0.1, 0.5, none), ("few_shot", "none", -1, none, 2.5, 0.0, 0.4, 1, none),
        ("prompt_only", "none", -1, none, 2.9, 0.0, 0.1, 1, none), ("vectors", "all", -1, none, 2.0, 0.8, 0.8, 1, 1.5),
        ("random", "all", -1, none, 3.5, 0.0, 0.0, 0, none), ("shuffled", "all", -1, none, 2.4, 0.8, 0.8, 0, 1.8),
        ("vectors", "coded", -1, none, 2.2, 0.8, 0.8, 1, 1.6), ("vectors", "one", 8, none, 2.5, 0.6, 0.6, 1, 1.7),
        ("vectors", "one", 9, none, 2.3, 0.7, 0.7, 1, 1.9), ("encoded", "one", 8, none, 9.0, 0.0, 0.0, 0, none),
        ("pruned", "one", 8, 100, 2.9, 0.5, 0.5, 1, 1.9), ("pruned", "coded", -1, 100, 2.6, 0.6, 0.6, 1, 1.8),
        ("pruned", "coded", -1, 20, 2.9, 0.2, 0.2, 1, 2.0), ("pruned_random", "coded", -1, 100, 2.8, 0.1, 0.1, 1, 2.2),
    ]  # fmt: skip
    columns = ["method", "blocks", "layer", "k", "answer_nll", "p_end", "p_stop", "relevant", "validation_loss"]
    frame = pd.DataFrame([*ways, *ways], columns=columns).assign(on="test", seed=0, loss=lambda one: one["answer_nll"])
    frame["topic"] = ["tea"] * len(ways) + ["law"] * len(ways)
    frame.loc[frame["topic"].eq("law") & frame["method"].eq("base"), "answer_nll"] = 3.2
    said = {("vectors", "all"): 1.0, ("without_itself", "all"): 0.0, ("prompt_only", "none"): 0.5}
    replies = pd.DataFrame(
        [dict(method=method, blocks=blocks, on="itself", seed=seed, question=question, says_ai=share)
         for (method, blocks), share in said.items() for seed in (0, 1) for question in ("Who?", "What?")]
    )  # fmt: skip
    found = {"25_instruct_vectors_exchanges": frame, "25_instruct_vectors_replies": replies}
    monkeypatch.setattr(Book, "read", lambda self, stem: found[stem])
    monkeypatch.setattr(Book, "setting", lambda self, stem, name: [100, 20])
    return Book()


@pytest.mark.parametrize(
    "number, expected",
    [
        ("instruct_vectors_answer", -1.1),
        ("instruct_vectors_beat_examples", -0.5),
        ("instruct_vectors_beat_a_line", -0.9),
        ("instruct_vectors_end_the_turn", 0.8),
        ("instruct_end_beats_the_lines", 0.4),  # with examples, a line's end counts, too
        ("instruct_vectors_stay_relevant", 0.5),
        ("instruct_one_block_answers", 0.6 / 1.1),  # block 8, which validates best, not 9, which tests best
        ("instruct_one_block_ends", -0.2),
        ("instruct_random_vectors_fail", 0.4),
        ("instruct_style_is_most", 0.7 / 1.1),
        ("instruct_calls_itself_ai", 1.0),
        ("instruct_ai_is_in_the_data", 1.0),
        ("instruct_a_line_says_ai", -0.5),
        ("instruct_encoding_fails", 5.9),
        ("instruct_latents_end_the_turn", 0.75),
        ("instruct_latents_answer", 0.5 / 0.9),  # of what the vectors in the same blocks take off
        ("instruct_latents_of_one_block_answer", 0.2 / 0.6),
        ("instruct_latents_beat_strangers", -0.2),
    ],
)
def test_claims_on_instruct_vectors_are_decided_by_these_rows(book, number, expected):
    found = claims.NUMBERS[number](book)
    assert found.mean == pytest.approx(expected) and found.tasks == 2


def test_a_way_that_was_not_measured_decides_nothing(book):
    with pytest.raises(ClaimError, match="no such contrast"):
        instruct_vectors.talked(book, "contrast")
    with pytest.raises(ClaimError, match="no replies of random"):
        instruct_vectors.says_ai(book, "random")
