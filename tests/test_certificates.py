"""Certificates, cards and published numbers: each is decided by tables, and what is not measured says why."""

import json

import jsonschema
import pandas as pd
import pytest

from book.ledger import cards, certificates, claims, ledger, published
from book.ledger.claims import Book, ClaimError
from nb_utils import statistics
from nb_utils.record import tables

SCHEMA = json.loads((tables.ROOT / cards.SCHEMA).read_text(encoding="utf-8"))


BOOK = Book()  # reads a table once, for all tests


@pytest.fixture(scope="module")
def ticks():
    return certificates.given(BOOK)


class Made(Book):
    """The book with hand-made tables in the place of some."""

    def __init__(self, **made):
        super().__init__()
        self._read = BOOK._read | made


def test_every_vector_is_asked_for_every_tick_on_every_task_that_counts(ticks):
    counted = BOOK.done.sum()
    sizes = ticks.groupby(["vector", "certificate"]).size()
    assert len(sizes) == len(certificates.VECTORS) * len(certificates.CERTIFICATES) and sizes.eq(counted).all()
    assert ticks["number"].isna().eq(ticks["verdict"].eq(ledger.NOT_MEASURED)).all()
    assert ticks.loc[ticks["number"].isna(), "why"].ne("").all()


def test_a_tick_follows_its_number_and_bound(ticks):
    pruned = statistics.rows(ticks, vector="prune_contrast", certificate="sufficient").set_index("task")
    closed = statistics.recovered(BOOK.pruned, BOOK.test)
    assert pruned["verdict"].eq(certificates.YES).equals((closed >= 0.75).reindex(pruned.index))
    gentle = statistics.rows(ticks, vector="prune_contrast", certificate="gentle")
    measured = gentle["task"].isin(BOOK.table("08_side_effects")["task"])
    assert measured.any() and gentle["number"].notna().equals(measured)
    assert set(gentle.loc[gentle["number"] >= 0.5, "verdict"]) <= {certificates.NO}


def test_a_dense_vector_has_no_features_and_says_so(ticks):
    dense = statistics.rows(ticks, vector="learned_vector", certificate="stable")
    assert set(dense["verdict"]) == {ledger.NOT_MEASURED} and "is dense" in dense["why"].iloc[0]


def test_features_are_necessary_above_the_strictest_control_of_each_task():
    tasks = list(BOOK.done.index[BOOK.done][:3])
    needed = {"own": [0.9, 0.4, 0.5], "same_activation": [0.5, 0.6, 0.1], "most_active": [0.7, 0.1, 0.6],
              "any_other_task": [0.8, 0.8, 0.8], "kept_by_few": [0.8, 0.8, 0.8]}  # no controls
    made = pd.DataFrame([
        dict(task=task, kind="executor", method=method, mode="zero", back=0, on="test", together=2, necessity=share)
        for method, shares in needed.items() for task, share in zip(tasks, shares, strict=True)
    ])  # fmt: skip
    found = certificates.necessary(Made(**{"10_necessity": made}), "clean")
    assert found.loc[tasks].tolist() == pytest.approx([0.2, -0.2, -0.1])


def test_features_recur_in_another_sae_if_one_was_trained():
    alone = certificates.stable(BOOK, "prune_contrast")
    own = certificates._features(BOOK, "prune_contrast")[["layer", "latent"]].drop_duplicates()
    twins = own.assign(first="shipped", second="second_seed", cosine=0.1)
    assert certificates.stable(Made(stability=twins), "prune_contrast").eq(0).all() and (alone > 0).all()
    found = certificates.stable(Made(stability=twins.assign(cosine=0.9)), "prune_contrast")
    pd.testing.assert_series_equal(found, alone, check_names=False)


@pytest.mark.parametrize("method", ["prune_contrast", "clean"])
def test_features_recur_over_the_seeds_of_the_block_that_has_several(method):
    every = statistics.rows(BOOK.table("02_cleanup_features"), method=method)
    (layer,) = every.loc[every["seed"].gt(0), "layer"].unique()
    again = certificates._features(BOOK, method, int(layer))
    assert set(again["layer"]) == {layer} and again.groupby("task")["seed"].nunique().max() > 1
    found = certificates.stable(BOOK, method)
    task = found.index[0]
    assert found[task] == pytest.approx(statistics.overlap(statistics.rows(again, task=task)).loc[method, method])
    assert found.between(0, 1).all() and found.nunique() > 1


def test_a_label_is_legible_where_it_predicts():
    own = certificates._features(BOOK, "prune_contrast")[["layer", "latent"]].drop_duplicates()
    found = certificates.legible(Made(labels=own.assign(prediction=0.8)), "prune_contrast")
    assert len(found) and found.tolist() == pytest.approx([0.8] * len(found))


def test_the_tables_show_marks_numbers_and_counts(ticks):
    page = certificates.by_task(ticks).to_html()
    assert "✓" in page and "✗" in page and "–" in page
    measured = statistics.rows(ticks, vector="clean", certificate="sufficient")["verdict"]
    assert f"{measured.eq('yes').sum()} of {len(measured)}" in certificates.summary(ticks).to_html()


def test_every_card_is_of_its_schema_and_says_what_the_ledger_says():
    judged = ledger.judged(book=BOOK)
    found = {card["page"]: card for card in cards.cards(BOOK, judged)}
    told = {claim["id"]: claim for card in found.values() for claim in card["claims"]}
    for card in found.values():
        jsonschema.validate(json.loads(json.dumps(card, allow_nan=False)), SCHEMA)
    assert [page for page, card in found.items() if "certificates" in card] == [cards.OVERVIEW]
    for name, claim in told.items():
        assert claim["verdict"] == judged[name].verdict
        if "mean" in claim:
            assert sum(claim["by_task"].values()) / len(claim["by_task"]) == pytest.approx(claim["mean"])


@pytest.mark.parametrize("change", [dict(verdict="fine"), dict(mean=1.0), dict(extra=1), dict(relation="about")])
def test_another_form_is_no_card(change):
    claim = dict(id="a", source="ours", claim="It works.", decides="No table.", unit="nats", relation="<", bound=0,
                 verdict="not measured")  # fmt: skip
    card = dict(form=1, page="02_cleanup", title="Cleanup", asks="what", model="tiny", level=0.95, claims=[claim])
    jsonschema.validate(card, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(card | dict(claims=[claim | change]), SCHEMA)


def test_a_published_number_is_met_by_an_interval_that_reaches_it():
    one = published.Published("x", "hendel2023icl", "m", 0.74, 1.15, "share", "theta_keeps_icl")
    interval = lambda low, high: statistics.Comparison((low + high) / 2, low, high, pd.Series([low, high]))  # noqa: E731
    expected = {(0.5, 0.7): published.BELOW, (0.7, 0.8): published.MEETS, (1.2, 1.3): published.ABOVE}
    assert {bounds: one.status(interval(*bounds)) for bounds in expected} == expected
    assert one.status(None) == ledger.NOT_MEASURED and one.written == "74% to 115%"


def test_published_numbers_are_cited_and_ours_come_from_tables(tmp_path):
    assert {one.source for one in published.read()} <= set(published.cited())
    assert published.cited()["hendel2023icl"] == "Hendel et al. 2023"
    found = {one.ours: ours for one, ours in published.compared(BOOK)}
    assert found["cleaned_changes"].mean == pytest.approx(claims.relative(BOOK.cleaned).mean())
    wrong = tmp_path / "published.yml"
    wrong.write_text(published.DATA.read_text().replace("ours: cleaned_changes", "ours: no_such"))
    with pytest.raises(ClaimError, match="no counterpart 'no_such'"):
        published.read(wrong)


def test_the_microscope_says_the_ticks_of_a_task_and_none_where_there_are_no_tables():
    given = certificates.given(BOOK)
    asked = dict(vector="prune_contrast", task="antonyms", certificate="sufficient")
    one = statistics.rows(given, **asked)["verdict"].item()
    said = certificates.in_words(BOOK)["antonyms"]
    assert f"{certificates.MARKS[one]}\N{NO-BREAK SPACE}sufficient" in said
    assert said.count(" · ") == len(certificates.CERTIFICATES) - 1
    assert certificates.in_words(Book("tiny")) == {}
