"""Labels: planted features score high, shuffled labels at chance; features are found again where they were put."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from nb_utils import saes
from nb_utils.show import labels
from workflow import label_features, stability

VOCABULARY = [f"w{i}" for i in range(60)]


@pytest.fixture
def planted():
    """Twenty features, each of which fires on three words of its own, strongly or weakly; places, and embeddings."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(60, 32))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    text = rng.integers(60, size=6000)
    codes = np.zeros((6000, 20), np.float32)
    for feature in range(20):
        at = np.isin(text, range(3 * feature, 3 * feature + 3))
        codes[at, feature] = rng.exponential(size=at.sum()) + 0.01
    return text, codes, embedding


def judged(planted, shift=0):
    """The detection of every feature with the label of the one that is so many further."""
    text, codes, embedding = planted
    rng, half = np.random.default_rng(1), np.arange(len(text)) // 3000
    everywhere = Counter(VOCABULARY[i] for i in text)
    seen = [label_features.looked_at(codes[:, i], half, rng) for i in range(codes.shape[1])]
    named = [labels.made([VOCABULARY[i] for i in text[one.makes]], ["en"] * len(one.makes), everywhere, [])
             for one in seen]  # fmt: skip
    found = []
    for i, one in enumerate(seen):
        words = embedding[[VOCABULARY.index(word) for word in named[(i + shift) % len(named)].fires]]
        sides = (labels.alike([words, words[:0], words[:0]], [embedding[text[at]][:, None]] * 3)
                 for at in (one.judges, one.silent))  # fmt: skip
        found.append(labels.auroc(*sides))
    return named, np.array(found)


def test_planted_features_are_called_by_their_words_and_score_high(planted):
    named, found = judged(planted)
    assert all(set(one.fires) == set(VOCABULARY[3 * i : 3 * i + 3]) for i, one in enumerate(named))
    assert found.min() > 0.99


def test_what_stands_before_a_place_and_the_language_tell_it_as_well(planted):
    embedding, none, rng = planted[2], planted[2][:0], np.random.default_rng(0)
    before = embedding[rng.integers(10, 60, size=(50, 4))]
    behind = before.copy()
    behind[np.arange(50), rng.integers(4, size=50)] = embedding[3]
    words, other = [none, embedding[3:4], none], embedding[rng.integers(10, 60, size=(50, 1))]
    assert labels.auroc(*(labels.alike(words, [other, each, other]) for each in (behind, before))) > 0.99
    spoken = np.arange(50) % 2
    by_language = labels.alike([none] * 3, [other] * 3, spoken)
    assert labels.auroc(by_language[spoken == 1], by_language[spoken == 0]) == 1


def test_labels_of_other_features_score_at_chance(planted):
    _, found = judged(planted, shift=7)
    assert abs(found.mean() - 0.5) < 0.1 and found.max() < 0.9


def test_places_are_drawn_alike_from_all_quantiles_and_from_the_half_they_are_for(planted):
    _, codes, _ = planted
    half = np.arange(len(codes)) % 2
    seen = label_features.looked_at(codes[:, 0], half, np.random.default_rng(0))
    drawn = Counter(seen.bins[at] for at in seen.makes)
    assert drawn == dict.fromkeys(range(1, labels.BINS + 1), label_features.A_BIN)
    assert set(half[seen.makes]) == {0} and set(half[seen.judges]) == {1} == set(half[seen.silent])
    assert (codes[seen.silent, 0] == 0).all()
    weakest, strongest = (max(codes[at, 0] for at in seen.bins if seen.bins[at] == b) for b in (1, labels.BINS))
    assert weakest < strongest


def test_an_intruder_is_found_among_contexts_that_are_alike_and_by_chance_among_others():
    rng = np.random.default_rng(0)
    axis = np.eye(16)
    own, other = axis[0] + 0.1 * rng.normal(size=(30, 16)), axis[1] + 0.1 * rng.normal(size=(30, 16))
    assert labels.intruder(own, other, rng) == 1
    noise = rng.normal(size=(2, 200, 16))
    assert abs(labels.intruder(*noise, rng, draws=400) - 0.2) < 0.08
    assert np.isnan(labels.intruder(own[:3], other, rng))


def test_a_prediction_is_right_where_helped_tasks_answer_with_what_is_promoted():
    answers = {"a": np.eye(3)[0], "b": np.eye(3)[1], "c": np.eye(3)[2]}
    helped_first = pd.Series({"a": -0.4, "b": 0.1, "c": 0.0})
    assert labels.predicted(np.eye(3)[:1], answers, helped_first) == 1
    assert labels.predicted(np.eye(3)[1:2], answers, helped_first) == 0.25
    assert np.isnan(labels.predicted(np.zeros((0, 3)), answers, helped_first))
    assert np.isnan(labels.predicted(np.eye(3)[:1], answers, helped_first.abs()))


def test_a_label_says_what_it_has_and_no_more():
    made = labels.made(["Paris ", " paris", "x"] * 9, ["fr"] * 27, Counter(x=100), [" a", "France", "france", "42"],
                       pd.Series({"arrow": 0.8, "output": 0.2}), pd.Series({"en": 0.9, "fr": 0.1}))  # fmt: skip
    assert str(made) == "fires on paris; promotes france · 42; at arrows; French text"
    made = labels.made([f"w{i}" for i in range(40)], ["en"] * 40, Counter(x=100, the=30), [],
                       None, pd.Series({"en": 1.0}), [["the", " Not", "x"], ["x", "x", "x"]] * 20)  # fmt: skip
    assert str(made) == "behind not", "what stands before half of all places by chance is in a label"
    names = ["Alma", "Bram"] * 20
    for documents, label in (([0] * 38 + [1, 2], "fires on alma"), ([0, 0, 1, 1] * 10, "no label")):
        made = labels.made(["x", *names[1:-1], "Alma"], [""] * 40, Counter(x=99), [], documents=documents)
        assert str(made) == label, "a word of too few documents is in a label, or one of enough is not"
    seen = [f"w{i}" for i in range(36)] + ["und"] * 4
    made = labels.made(seen, [""] * 40, Counter(und=2, x=98), [])
    assert str(made) == "no label", "of many words that were seen, one is in a label that is there by chance"
    assert str(labels.made(seen, [""] * 40, Counter(x=100), [])) == "fires on und"
    empty = labels.made([], [], Counter(), ["\n"])
    assert str(empty) == "no label" and not empty


def test_the_words_of_a_planted_direction_rise_when_it_is_added(tiny):
    sae = saes.random(tiny, 5)
    rows = tiny.layout.unembedding()[0].float().cpu()
    words = [[100, 101], [120, 121], [140, 141]]
    for latent, tokens in enumerate(words):
        sae.W_dec[latent] = torch.nn.functional.normalize(rows[tokens].mean(0) - rows.mean(0), dim=0)
    own, shuffled = label_features.output_scores(tiny, sae, [0, 1, 2], words)
    assert min(own) > 0.9 and np.mean(own) > np.mean(shuffled) + 0.2


def test_features_are_found_again_by_direction_and_by_activation(tiny):
    first = saes.random(tiny, 2)
    order = torch.randperm(first.d_sae, generator=torch.Generator().manual_seed(0))
    again = saes.random(tiny, 2)
    for name in ("b_enc", "threshold", "W_dec"):
        getattr(again, name).copy_(getattr(first, name)[order])
    again.W_enc.copy_(first.W_enc[:, order])
    x = torch.randn(400, tiny.d_model, generator=torch.Generator().manual_seed(1)) * first.b_dec.std() + first.b_dec
    moments = stability.Moments.empty(first, again)
    for part in x.split(150):
        moments.add(first.encode(part), again.encode(part))
    whole = torch.corrcoef(torch.cat([first.encode(x), again.encode(x)], 1).T.double())[: first.d_sae, first.d_sae :]
    torch.testing.assert_close(moments.correlations(), whole.nan_to_num(0), rtol=1e-3, atol=1e-3)
    found = stability.matches(first, again, moments)
    fires = (first.encode(x) > 0).any(0).numpy()
    assert (order[found["match"]] == torch.arange(first.d_sae)).all() and found["cosine"].min() > 0.999
    assert (order[found["match_active"]].numpy() == np.arange(first.d_sae))[fires].all()
    assert found["correlation"][fires].min() > 0.99
