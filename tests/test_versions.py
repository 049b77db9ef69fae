"""Versions: verdicts kept as data, and what changed between them."""

import json

import pytest

from book.ledger import contents, ledger, versions
from workflow import versions as command

CLAIM = dict(id="a", page="02_cleanup", source="ours", claim="It works.", unit="nats", asked="< 0", verdict="holds",
             mean=-1.0, low=-1.5, high=-0.5, met=20, tasks=25)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def today():
    """What the ledger judges, once."""
    return ledger.judged()


@pytest.fixture
def judged(today, monkeypatch):
    monkeypatch.setattr(ledger, "judged", lambda *_, **__: today)
    return today


def test_claims_of_today_are_what_the_ledger_judges(judged):
    judged = {name: row for name, row in judged.items() if contents.is_there(row.claim.page)}
    found = versions.current()
    assert [claim["id"] for claim in found] == list(judged)
    for claim in found:
        row = judged[claim["id"]]
        assert claim["verdict"] == row.verdict and claim["asked"] == row.claim.holds
        if row.number is not None:
            assert versions.said(claim) == f"{row.verdict}, {row}" and claim["low"] <= claim["mean"] <= claim["high"]
    assert json.loads(json.dumps(found)) == found


def test_every_kept_version_can_be_read_and_told():
    kept = versions.kept()
    assert kept and [version["name"] for version in kept] == sorted(version["name"] for version in kept)
    for version in kept:
        assert all(versions.said(claim) for claim in version["claims"])


def test_a_change_of_verdict_words_or_bound_is_told_and_of_a_number_alone_is_not():
    others = [CLAIM | change for change in (dict(verdict="fails"), dict(claim="It hardly works."), dict(asked="< -1"))]
    for other in others:
        (row,) = versions.changed([CLAIM], [other]).itertuples()
        assert row.claim == other["claim"] and row.then.startswith("holds, -1.00 nats [-1.50, -0.50]")
        assert ("It works." in row.then) == (row.claim != "It works.")
    assert versions.changed([CLAIM], [CLAIM | dict(mean=-0.9)]).empty
    new, gone = versions.changed([CLAIM], [CLAIM | dict(id="b")]).itertuples()
    assert new.then == versions.NEW and gone.now == versions.GONE


def test_words_of_a_claim_are_data_on_the_page():
    found = versions.changed([CLAIM], [CLAIM | dict(claim="<b>x</b>", verdict="fails")])
    assert "&lt;b&gt;x" in versions.table(found).to_html()


def test_counts_follow_the_versions():
    found = versions.counts([("1", "2026-01-01", "more")], [[CLAIM], [CLAIM, CLAIM | dict(verdict="fails")]])
    assert found["holds"].tolist() == [1, 1] and found["fails"].tolist() == [0, 1]
    assert found["until"].tolist() == ["2026-01-01", "today"]


def test_a_version_is_kept_once(folder, capsys, judged):
    assert command.main(["1_first", "Other SAEs."]) == 0
    first = (folder / "1_first.json").read_bytes()
    assert command.main(["1_first", "Other SAEs."]) == 1 and "kept already" in capsys.readouterr().err
    assert (folder / "1_first.json").read_bytes() == first
    (version,) = versions.kept()
    assert version["what"] == "Other SAEs." and version["claims"] == versions.current()


@pytest.mark.parametrize("given", [["../x", "more"], ["first", "more"], ["1_first"], ["1_first; ls", "more"]])
def test_a_name_that_is_none_is_refused(folder, capsys, given):
    assert command.main(given) == 1 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(folder.iterdir())


def test_a_file_that_is_no_version_is_named(folder):
    (folder / "1_x.json").write_text("[]")
    with pytest.raises(versions.VersionError, match=r"1_x\.json is no kept version"):
        versions.kept()


def test_the_claims_are_published_beside_the_pages(tmp_path, monkeypatch, judged):
    monkeypatch.setattr(command, "PUBLISHED", tmp_path / "claims.json")
    monkeypatch.setattr(command, "CARDS", tmp_path / "cards")
    assert command.main([]) == 0
    assert json.loads((tmp_path / "claims.json").read_text())["claims"] == versions.current()
