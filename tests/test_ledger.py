"""The ledger: every claim has its number and verdict, and no page states a number that the tables don't support."""

import dataclasses
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from book.ledger import claims, ledger
from book.ledger.claims import Book, Choices, ClaimError
from nb_utils import statistics
from nb_utils.record import sources, tables
from nb_utils.record.tables import ROOT
from nb_utils.statistics import Comparison
from workflow import choices

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
            here = statistics.rows(frame, **equal).index
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
        assert f'ledger.judged("{claim.page}"' in (ROOT / f"book/findings/{claim.page}.ipynb").read_text().replace(
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
    assert {row.verdict for row in judged.values()} <= {*statistics.VERDICTS, ledger.NOT_MEASURED}
    for row in judged.values():
        if row.number is not None:
            if row.families is not None:
                assert row.families.mean == pytest.approx(row.number.mean)
                assert row.families.low <= row.families.mean <= row.families.high
            assert row.number.low <= row.number.mean <= row.number.high
            assert row.number.tasks >= 3, row.claim.id


def test_one_number_against_two_bounds_can_give_two_verdicts():
    number = Comparison(0.7, 0.6, 0.8, pd.Series([0.65, 0.7, 0.9, 0.55]))
    assert [number.judge(">", bound) for bound in (0.5, 0.58, 0.7, 0.9)] == ["holds", "holds", "undecided", "fails"]
    assert [number.judge("<", bound) for bound in (1, 0.85, 0.7, 0.5)] == ["holds", "holds", "undecided", "fails"]
    assert number.judge(">=", 0.7) == "undecided" and number.met(">=", 0.7) == 2
    uneven = Comparison(0.7, 0.6, 0.8, pd.Series([0.5, 0.5, 0.9, 0.9]))
    assert uneven.judge(">", 0.55) == "mostly" and uneven.judge("<", 0.85) == "mostly"


def test_a_bound_that_may_be_reached_is_kept_by_an_interval_that_touches_it():
    number = Comparison(0.0, 0.0, 0.0, pd.Series([0.0] * 4))
    assert [number.judge(relation) for relation in ("<", "<=", ">", ">=")] == ["undecided", "holds"] * 2


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
    shown = ledger.table(judged, links=True).to_html().replace("\N{NO-BREAK SPACE}", " ")
    assert '<a href="02_cleanup.html">02</a>' in shown and "&lt; " in shown
    assert str(judged["cleaning_surpasses"]) in shown and judged["cleaning_surpasses"].over_families in shown
    assert len(re.findall("<tr>", shown)) == len(judged) + 1


def test_a_changed_table_changes_the_verdict(book, judged):
    assert judged["cleaning_surpasses"].verdict == "holds"
    worse = book("02_cleanup", "losses", lambda losses: losses + 9, method="clean")
    assert ledger.judged(book=worse)["cleaning_surpasses"].verdict == "fails"


# --- where methods stand, and other choices ---


def test_every_method_stands_at_the_block_where_it_validates_best_itself():
    found = Book()
    for method, equal in {"clean": {}, "learned_vector": {}, "prune_contrast": {"k": 20}}.items():
        everywhere = found.everywhere(method, **equal)
        grid = everywhere.pivot_table(index="layer", columns="task", values="validation_loss")
        assert grid.notna().all(axis=None)
        assert set(found.best(method, **equal)["layer"]) == {grid.mean(axis=1).idxmin()}
    plain = found.everywhere("task_vector").pivot_table(index="layer", columns="task", values="loss")
    assert found["vector"] == plain.mean(axis=1).idxmin()
    assert found["learned"] != found["pruned"], "these tables tell the two apart"


def test_a_better_validation_loss_moves_a_method_and_no_other(book):
    names = ("learned", "pruned", "cleaned", "vector")
    before = [Book()[name] for name in names]
    moved = book("02_cleanup", "validation_loss", lambda loss: loss - 9, method="learned_vector", layer=10)
    assert before[0] != 10 and [moved[name] for name in names] == [10, *before[1:]]


def test_every_choice_that_could_be_otherwise_is_one_of_the_book_and_changes_it():
    defaults = dataclasses.asdict(Choices())
    for name, changed in claims.OTHERWISE.items():
        (choice, value), = changed.items()
        assert defaults[choice] != value, name
    assert {choice for changed in claims.OTHERWISE.values() for choice in changed} == set(defaults)


def test_another_book_of_the_same_tables_chooses_otherwise_and_leaves_the_first_as_it_is():
    first = Book()
    other = first.otherwise(k=5, mode="replace", block="test", seeds="first")
    assert (first.k, other.k) == (20, 5)
    assert set(other.pruned["k"]) == {5} and set(other.vector["mode"]) == {"replace"}
    assert set(other.cleaned["seed"]) == {0} < set(first.cleaned["seed"])
    assert set(first.vector["mode"]) == {"add"}
    shared = first.otherwise(block="shared")
    assert {shared[name] for name in ("pruned", "learned", "cleaned", "centred")} == {first["pruned"]}


def test_what_the_tables_lack_is_not_measured_and_says_so():
    found = ledger.judged("07_illusion", Book().otherwise(k=30))
    assert {row.verdict for row in found.values()} == {"not measured"}
    assert "Experiment 07 has no vectors of 30 features." in found["rule_beats_random"].decides


def test_every_task_is_of_one_family():
    found = Book().family
    assert set(found.values()) == {*claims.FAMILIES.values(), "others"}
    assert found["en_es"] == "translations" and found["antonyms"] == "others"


def test_the_feature_that_translations_share_is_not_picked_on_the_test_losses_it_is_judged_by(book):
    """A feature that is best on test only is not taken; one that is best on validation is."""
    def number():
        return claims.NUMBERS["english_shares_a_feature"](Book())

    before = number()
    book("05_cross_task_steering", "rel_loss", lambda _: -0.9, kind="executor", which="fixed", latent=53)
    assert number().mean < before.mean


@pytest.fixture
def more(tmp_path, monkeypatch):
    """Return a function that adds rows to a copy of some tables, and returns a book that reads the copy."""

    def add(stem, frame, *copied):
        monkeypatch.setenv("NB_TABLES", str(tmp_path / "tables"))
        for other in ("01_reconstruction_loss", "02_cleanup", *copied):
            shutil.copytree(ROOT / tables.FOLDER / other, tmp_path / "tables" / other)
        for task, part in frame.groupby("task"):
            path = tmp_path / "tables" / stem / tables.MODEL / f"{task}.parquet"
            old = [pd.read_parquet(path)] if path.exists() else []
            tables.save(pd.concat([*old, part], ignore_index=True), stem, task, {})
        return Book()

    return add


def test_a_feature_is_held_against_the_hardest_control_and_all_are_chosen_on_validation(more):
    kinds = {"feature": (-0.5, -0.9), "matched": (-0.2, -0.3), "active": (-0.3, -0.8), "direction": (0.0, 0.1)}
    frame = pd.DataFrame([
        {"task": task, "kind": "executor", "control": control, "latent": i, "rel_loss": rel, "validation_loss": loss}
        for task in ("antonyms", "en_es", "algo_first", "en_fr") for control, effects in kinds.items()
        for i, (rel, loss) in enumerate(zip(effects, (1.0, 2.0), strict=True))
    ])  # fmt: skip
    found = more("05_cross_task_steering_controls", frame)
    row = ledger.judged("05_cross_task_steering", found)["one_feature_beats_latents"]
    assert found.hardest() == "active" and '"active"' in row.decides
    assert row.number.mean == pytest.approx(-0.5 + 0.3) and row.verdict == "holds"


def test_pruning_is_held_against_cleaning_on_the_same_prompts_and_with_as_many_features(more):
    on_all_pairs = claims.NUMBERS["pruning_beats_cleaning_at_equal_size"](Book()).mean
    pruned = Book().pruned_to_10.assign(method="prune_contrast_few", losses=lambda rows: rows["losses"] + 2)
    found = more("02_cleanup", pruned)
    assert claims.NUMBERS["pruning_beats_cleaning_alike"](found).mean == pytest.approx(on_all_pairs + 2, abs=1e-3)


def test_executors_that_were_made_for_the_comparison_are_preferred(more):
    before = claims.NUMBERS["detectors_beat_pruned_executors"](Book()).mean
    zero = Book().detector("clean", 6).assign(method="executor_prune_contrast", k=20, rel_loss=0.0)
    found = more("04_detectors", zero.astype({"k": "Int64"}), "04_detectors")
    own = found.detector("clean", 6).groupby("task")["rel_loss"].mean().mean()
    assert claims.NUMBERS["detectors_beat_pruned_executors"](found).mean == pytest.approx(own) != before


def test_a_rule_is_held_against_chance_on_the_largest_budget(more):
    made = statistics.rows(Book().supports, seed=0, weights="tuned", k=20)
    made = pd.concat([made.assign(budget=12), made.assign(budget=96, losses=made["losses"] / 2)])
    short = claims.NUMBERS["rule_beats_random"](Book().otherwise(seeds="first")).mean
    row = ledger.judged("07_illusion", more("07_illusion_budgets", made))["rule_beats_random_longer"]
    assert "after 96 steps" in row.decides and row.number.mean == pytest.approx(short / 2, abs=1e-3)


def necessity(task, kind="executor", **changed):
    """A hand-made table of experiment 10: two blocks, alone and at once, and features that come back at the second."""
    few, zero = 2.0, 6.0

    def row(method, layer=-1, together=0, back=0, features=4, mode="zero", on="test", needed=0.0, **more):
        loss = few + needed * (zero - few) if on == "test" else 3 + needed
        return dict(task=task, kind=kind if layer >= 0 else "none", method=method, layer=layer, together=together,
                    back=back, features=features, mode=mode, on=on, seed=0, loss=loss, necessity=needed, d_ntp=0.05,
                    losses=[loss] * 3) | more

    needs = {"own": 0.9, "other_task": 0.2, "same_activation": 0.5, "same_density": 0.1, "most_active": 0.4} | changed
    found = [row("few_shot", mode="none"), row("few_shot", mode="none", on="other")]
    for method, share in needs.items():
        found += [row(method, 6, 1, needed=share / 3), row(method, 8, 1, needed=share / 2)]
        found += [row(method, 8, 2, needed=share)]
        found += [row(method, 8, 2, on="other", needed=0.3), row(method, 8, 2, on="text")]
    found.append(row("own", 8, 1, mode="mean", needed=0.25))
    back = zip((1, 2, 3, 4), (0.3, 0.2, 0.1, 0.0), strict=True)
    return pd.DataFrame(found + [row("own", 8, 1, back=n, features=4 - n, needed=left) for n, left in back])


def test_features_are_held_against_the_strictest_control_where_all_blocks_go_at_once(more):
    names = ("antonyms", "en_es", "algo_first", "en_fr")
    found = more("10_necessity", pd.concat([necessity(name) for name in names]))
    rows = ledger.judged("10_necessity", found)
    means = {name: row.number.mean for name, row in rows.items() if row.number}
    expected = {"executors_are_needed": 0.9, "executors_beat_controls": 0.4, "one_block_is_bypassed": 0.45,
                "executors_say_the_task": 0.25, "few_rescue": 0.5,
                "removal_spares_other_tasks": 0.3 - 3.6, "removal_spares_text": 0.05}  # fmt: skip
    assert means == pytest.approx(expected) and '"same_activation"' in rows["executors_beat_controls"].decides
    assert "no detectors" in rows["detectors_are_needed"].decides or rows["detectors_are_needed"].number is None
    assert found.bottleneck("executor") == 8


def test_where_nothing_is_lost_nothing_can_be_rescued(more):
    found = more("10_necessity", pd.concat([necessity("antonyms"), necessity("en_es", own=0.1)]))
    assert list(found.rescuers("executor").index) == ["antonyms"]


def test_the_stored_choices_are_those_of_every_claim_and_agree_with_the_tables():
    """A sample is judged anew; run ``python -m workflow.choices`` after a change of tables or claims."""
    stored = tables.load(ledger.CHOICES)
    names = [ledger.PRINTED, *claims.OTHERWISE]
    pairs = {(claim.id, choice) for claim in ledger.entries() for choice in names}
    assert set(zip(stored["claim"], stored["choice"], strict=True)) == pairs and len(stored) == len(pairs)
    sample = [ledger.PRINTED, "10 features"]
    again = ledger.otherwise(only=sample)
    kept = stored[stored["choice"].isin(sample)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, kept, check_dtype=False)


def test_verdicts_that_rest_on_a_choice_are_listed_with_both_numbers():
    columns = ["claim", "choice", "verdict", "mean", "low", "high"]
    found = pd.DataFrame([
        ("cleaning_surpasses", ledger.PRINTED, "holds", -2, -3, -1), ("cleaning_surpasses", "a", "fails", 1, 0.5, 2),
        ("cleaning_surpasses", "b", "holds", -2, -3, -1), ("cleaning_surpasses", "c", "not measured", None, None, None),
        ("pursuit_costs", ledger.PRINTED, "undecided", 0, -1, 1), ("pursuit_costs", "a", "undecided", 0, -1, 1),
    ], columns=columns)  # fmt: skip
    (row,) = ledger.depending(found).to_dict("records")
    assert row["claim"].startswith("Cleaning surpasses") and row["choice"] == "a"
    assert (row["printed"], row["verdict"]) == (
        "holds, -2.00 nats [-3.00, -1.00]", "fails, +1.00 nats [+0.50, +2.00]"
    )  # fmt: skip
    shown = ledger.depending_table(ledger.depending(found)).to_html().replace("\N{NO-BREAK SPACE}", " ")
    assert all(text in shown for text in row.values())


def test_the_table_of_choices_is_made_anew_only_if_something_it_reads_has_changed(book):
    assert choices.is_new(Book())
    changed = book("09_templates", "rel_loss", lambda loss: loss / 2, method="prune_contrast")
    assert not choices.is_new(changed)


@pytest.mark.parametrize("page", PAGES)
def test_every_number_that_is_typed_in_prose_is_answered_for(page):
    loose = ledger.typed(page)
    assert not loose, "take it from a table (glue), or list it in book/ledger under sentences or plain"


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
