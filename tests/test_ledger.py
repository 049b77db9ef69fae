"""The ledger: every claim has its number and verdict, and no page states a number that the tables don't support."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from nb_utils import claims, ledger, metrics, sources, tables
from nb_utils.claims import Book, ClaimError
from nb_utils.metrics import Comparison
from nb_utils.tables import ROOT

PAGES = [
    "README.md", "book/index.md", "book/background.md", "book/explore.ipynb",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "book/findings").glob("*.ipynb")),
]  # fmt: skip
FINDINGS = [Path(page).stem for page in PAGES if page.startswith("book/findings/")]


@pytest.fixture(scope="module")
def judged():
    return ledger.judged()


@pytest.fixture
def book(tmp_path, monkeypatch):
    """Copy the tables, change a column of some rows in the copy, and return a book that reads it."""

    def change(stem, column, how, **equal):
        shutil.copytree(ROOT / tables.FOLDER, tmp_path / "tables")
        monkeypatch.setenv("NB_TABLES", str(tmp_path / "tables"))
        monkeypatch.setattr(sources, "maker", lambda stem: None)  # the copy keeps its provenance
        for path in (tmp_path / "tables" / stem / tables.MODEL).glob("*.parquet"):
            frame, origin = pd.read_parquet(path), tables.read_provenance(path)
            here = metrics.rows(frame, **equal).index
            frame.loc[here, column] = frame.loc[here, column].map(how)
            tables.save(frame, stem, path.stem, origin)
        return Book()

    return change


def written(tmp_path, **changes):
    """Write a file with one claim, changed; return its path."""
    entry = ledger.read()["claims"][0] | changes
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump({"claims": [entry], "sentences": [], "plain": []}))
    return path


def test_every_claim_has_a_number_and_every_number_a_use():
    found = ledger.read()
    used = {claim.number for claim in ledger.entries()} | {s["number"] for s in found["sentences"] if "number" in s}
    assert used == set(claims.NUMBERS)


def test_every_claim_stands_on_a_finding_that_shows_it():
    for claim in ledger.entries():
        assert claim.page in FINDINGS, claim.id
        assert f'ledger.judged("{claim.page}")' in (ROOT / f"book/findings/{claim.page}.ipynb").read_text().replace(
            '\\"', '"'
        ), claim.page


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"id": "no_such"}, "has no function 'no_such'"),
        ({"source": "a friend"}, "needs a source of post"),
        ({"unit": "miles"}, "a unit of nats"),
        ({"holds": "below 0"}, "a bound such as"),
        ({"hodls": "< 0"}, "needs id, page"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, complaint):
    with pytest.raises(ClaimError, match=complaint):
        ledger.entries(written(tmp_path, **change))


def test_an_entry_that_is_there_twice_is_named(tmp_path):
    path = written(tmp_path)
    both = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(both | {"claims": both["claims"] * 2}))
    with pytest.raises(ClaimError, match="is there twice"):
        ledger.entries(path)


def test_verdicts_are_those_of_the_numbers(judged):
    assert set(Counter(row.verdict for row in judged.values())) <= {"holds", "holds in part", "fails", "not measured"}
    for row in judged.values():
        if row.number is not None:
            assert row.number.low <= row.number.mean <= row.number.high
            assert row.number.tasks >= 3, row.claim.id


def test_one_number_against_two_bounds_can_give_two_verdicts():
    number = Comparison(0.7, 0.6, 0.8, pd.Series([0.65, 0.7, 0.75, 0.55]))
    assert [number.judge(">", bound) for bound in (0.5, 0.62, 0.9)] == ["holds", "holds in part", "fails"]
    assert [number.judge("<", bound) for bound in (0.9, 0.75, 0.7)] == ["holds", "holds in part", "fails"]
    assert number.judge(">=", 0.7) == "holds in part" and number.met(">=", 0.7) == 2


def test_a_claim_whose_table_is_missing_says_so_and_the_others_stand(book, tmp_path, judged):
    broken = book("04_detectors", "loss", float)
    shutil.rmtree(tmp_path / "tables/05_cross_task_steering")
    found = ledger.judged(book=broken)
    gone = {name for name, row in found.items() if row.claim.page == "05_cross_task_steering"}
    assert gone and all(found[name].verdict == "not measured" for name in gone)
    assert all("There are no tables of 05_cross_task_steering" in found[name].decides for name in gone)
    assert any("There are no tables of 05_cross_task_steering" in one for one in ledger.unsupported(broken))
    assert {k: r.verdict for k, r in found.items() if k not in gone} == {
        k: r.verdict for k, r in judged.items() if k not in gone
    }
    assert "There are no tables of 05" in ledger.table(found).to_html()


def test_the_table_shows_numbers_bounds_and_links_and_no_markup_of_the_text(judged):
    shown = ledger.table(judged, links=True).to_html()
    assert '<a href="02_cleanup.html">02</a>' in shown and "&lt; " in shown
    assert str(judged["cleaning_surpasses"]) in shown
    assert len(re.findall("<tr>", shown)) == len(judged) + 1


def test_a_changed_table_changes_the_verdict(book, judged):
    assert judged["cleaning_surpasses"].verdict == "holds"
    worse = book("02_cleanup", "losses", lambda losses: losses + 9, method="clean")
    assert ledger.judged(book=worse)["cleaning_surpasses"].verdict == "fails"


@pytest.mark.parametrize("page", PAGES)
def test_every_number_that_is_typed_in_prose_is_answered_for(page):
    loose = ledger.typed(page)
    assert not loose, "take it from a table (glue), or list it in book/claims.yml under sentences or plain"


def test_every_listed_sentence_is_still_there():
    found = ledger.read()
    texts = {page: ledger.prose(page) for page in PAGES}
    for entry in found["sentences"]:
        for page in ledger.pages(entry):
            assert entry["says"] in texts[page], f"{page} no longer says {entry['says']!r}"
    for phrase in found["plain"]:
        assert any(phrase in text for text in texts.values()), f"no page says {phrase!r}"


def test_every_listed_sentence_is_supported_by_the_tables():
    assert ledger.unsupported() == []


def test_a_sentence_that_its_table_no_longer_supports_is_named(book):
    worse = book("02_cleanup", "losses", lambda losses: losses + 2, method="clean")
    failed = ledger.unsupported(worse)
    assert any("README.md says 'by more than two nats on average'" in one for one in failed), failed


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("It has twelve features, 3.5 nats, and 4,096 of them.", ["twelve", "3.5", "4,096"]),
        ("At L0 and `k = 5`, {glue:text}`n:d` of $3$ tasks: [02](02_cleanup.ipynb).", ["02"]),
        ("{cite:p}`someone2024` said <b class=\"x2\">nothing</b>\n```sh\nmake 3\n```", []),
    ],
)
def test_numbers_are_found_in_prose_only(tmp_path, text, numbers):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert ledger.NUMBER.findall(ledger.prose(page)) == numbers
