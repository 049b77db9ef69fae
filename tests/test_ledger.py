"""The ledger: every claim has its number and verdict, and no page states a number that the tables don't support."""

import dataclasses
import re
import shutil
from html import unescape
from pathlib import Path
from string import Formatter

import numpy as np
import pandas as pd
import pytest
import yaml

from book.ledger import claims, ledger
from book.ledger.claims import Book, Choices, ClaimError
from book.ledger.numbers import function_vectors as fv
from book.ledger.numbers import hendel as thetas
from book.ledger.numbers import necessity as need
from book.ledger.numbers import places as placing
from book.ledger.numbers import which_vector as which
from book.ledger.numbers.in_context_vectors import most_pairs
from nb_utils import statistics, tasks
from nb_utils.record import sources, tables
from nb_utils.record.tables import ROOT
from nb_utils.show import evidence
from nb_utils.statistics import Comparison
from workflow import choices

PAGES = [
    "README.md", "book/index.ipynb", "book/start.ipynb", "book/background.md", "book/explore.ipynb",
    "book/changes.ipynb",
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
    for stem in (tmp_path / "tables").glob("05_cross_task_steering*"):
        shutil.rmtree(stem)
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
    page = ledger.table(judged, links=True).to_html()
    assert '<a href="02_cleanup.html">02</a>' in page and "&#60;" in page and "< 0" not in page
    shown = unescape(page).replace("\N{NO-BREAK SPACE}", " ")
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
    assert set(other.vector["seed"]) == {0} < set(first.vector["seed"])
    assert set(first.vector["mode"]) == {"add"}
    shared = first.otherwise(block="shared")
    assert {shared[name] for name in ("pruned", "learned", "cleaned", "centred")} == {first["pruned"]}


def test_what_the_tables_lack_is_not_measured_and_says_so():
    found = ledger.judged("07_illusion", Book().otherwise(k=30))
    assert {row.verdict for row in found.values()} == {"not measured"}
    assert "Experiment 07 has no vectors of 30 features." in found["rule_beats_random"].decides


def test_every_task_is_of_one_family():
    found = Book().family
    assert set(found.values()) <= {*claims.FAMILIES.values(), "others"}
    assert {tasks.load(name).category for name in tasks.names()} == {*claims.FAMILIES, "lexical"}
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
            old = [rows[~rows["method"].isin(part["method"])] for rows in old]
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
    at = Book().detector_layer
    zero = Book().detector("clean", at).assign(method="executor_prune_contrast", k=20, rel_loss=0.0)
    found = more("04_detectors", zero.astype({"k": "Int64"}), "04_detectors")
    own = found.detector("clean", at).groupby("task")["rel_loss"].mean().mean()
    assert claims.NUMBERS["detectors_beat_pruned_executors"](found).mean == pytest.approx(own) != before


def test_a_rule_is_held_against_chance_on_the_largest_budget(more):
    made = statistics.rows(Book().supports, seed=0, weights="tuned", k=20)
    made = pd.concat([made.assign(budget=12), made.assign(budget=96, losses=made["losses"] / 2)])
    short = claims.NUMBERS["rule_beats_random"](Book().otherwise(seeds="first")).mean
    row = ledger.judged("07_illusion", more("07_illusion_budgets", made))["rule_beats_random_longer"]
    assert "after 96 steps" in row.decides and row.number.mean == pytest.approx(short / 2, abs=1e-3)


TASKS = ("antonyms", "en_es", "en_fr", "algo_first")


def hendel(**columns):
    """Rows of experiment 20: thetas after three blocks, and few-shot prompts; of every task the same."""
    row = {"mode": "replace", "seed": 0, "on": "test", "k": pd.NA, "l0": pd.NA} | columns
    right = {8: (0.9, 0.1), 9: (0.2, 0.8), 10: (0.9, 0.8)}  # on test prompts, and on development cases
    lines = [
        {**row, "task": task, "layer": layer, "method": method, "accuracy": test, "validation_accuracy": chosen}
        for task in TASKS for layer, (test, chosen) in right.items() for method in ("theta", "reconstruct")
    ]
    few = {**row, "layer": -1, "mode": "none", "method": "few_shot", "accuracy": 0.5}
    lines += [{**few, "task": task} for task in TASKS]
    frame = pd.DataFrame(lines)
    return frame.assign(loss=frame["accuracy"], losses=[np.full(4, a) for a in frame["accuracy"]])


def test_a_theta_stands_at_the_block_of_its_development_cases_the_earliest_of_equals(more):
    found = more("20_hendel", hendel())
    assert claims.NUMBERS["theta_keeps_icl"](found).mean == pytest.approx(0.2 / 0.5)
    assert thetas.window(found) == [9, 10] and thetas.usual(found) == 9
    assert claims.NUMBERS["theta_window"](found).mean == pytest.approx(1)
    best_on_test = found.otherwise(block="test")
    assert set(thetas.hendel(best_on_test, "theta")["layer"]) == {9}, "the lowest loss"


def test_who_wins_against_examples_is_counted_for_the_vector_and_languages_stand_alone(more):
    lines = [
        {"task": task, "rival": rival, "layer": 9, "method": "theta", "on": on, "accuracy": right, "k": pd.NA}
        for task, rival, own, other in (("en_es", "en_fr", 0.8, 0.1), ("en_fr", "en_es", 0.7, 0.2),
                                        ("antonyms", "en_es", 0.0, 0.9), ("algo_first", "algo_last", 0.1, 1.0))
        for on, right in (("demonstrations", own), ("rival", other), ("alone", 1.0))
    ]  # fmt: skip
    more("20_hendel", hendel())
    frame = pd.DataFrame(lines)
    for task, part in frame.groupby("task"):
        tables.save(part, "20_hendel_conflict", task, {})
    found = Book()
    assert claims.NUMBERS["theta_overrides_examples"](found).mean == pytest.approx((-0.7 - 0.5 + 0.9 + 0.9) / 4)
    assert claims.NUMBERS["languages_resist"](found).mean == pytest.approx((-0.7 - 0.5) / 2)
    with pytest.raises(ClaimError, match="no such prune_swap"):
        claims.NUMBERS["features_override_examples"](found)


def necessity(task, kind="executor", **changed):
    """A hand-made table of experiment 10: two blocks, alone and at once, and features that come back at the second."""
    few, zero = 2.0, 6.0

    def row(method, layer=-1, together=0, back=0, features=4, mode="zero", on="test", needed=0.0, **more):
        loss = few + needed * (zero - few) if on == "test" else 3 + needed
        return dict(task=task, kind=kind if layer >= 0 else "none", method=method, layer=layer, together=together,
                    back=back, features=features, mode=mode, on=on, seed=0, loss=loss, necessity=needed, d_ntp=0.05,
                    losses=[loss] * 3) | more

    needs = {"own": 0.9, "other_task": 0.2, "same_activation": 0.5, "same_density": 0.1, "most_active": 0.4,
             "any_other_task": 0.6, "kept_by_most": 0.3, "kept_by_few": 0.7} | changed
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
    expected = {"executors_are_needed": 0.9, "executors_beat_controls": 0.4, "own_beat_any_other_task": 0.3,
                "features_of_few_are_needed": 0.7, "features_of_few_spare_others": 0.3, "one_block_is_bypassed": 0.45,
                "executors_say_the_task": 0.25, "few_rescue": 0.5,
                "removal_spares_other_tasks": 0.3 - 3.6, "removal_spares_text": 0.05}  # fmt: skip
    assert means == pytest.approx(expected) and '"of equal activation"' in rows["executors_beat_controls"].decides
    assert "no detectors" in rows["detectors_are_needed"].decides or rows["detectors_are_needed"].number is None
    assert need.bottleneck(found, "executor") == 8


def test_where_nothing_is_lost_nothing_can_be_rescued(more):
    found = more("10_necessity", pd.concat([necessity("antonyms"), necessity("en_es", own=0.1)]))
    assert list(need.rescuers(found, "executor").index) == ["antonyms"]


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
    shown = unescape(ledger.depending_table(ledger.depending(found)).to_html()).replace("\N{NO-BREAK SPACE}", " ")
    assert all(text in shown for text in row.values())


def test_the_table_of_choices_is_made_anew_only_if_something_it_reads_has_changed(book):
    assert choices.is_new(Book())
    changed = book("09_templates", "rel_loss", lambda loss: loss / 2, method="prune_contrast")
    assert not choices.is_new(changed)


def test_a_vector_counts_with_the_most_pairs_that_its_task_has():
    frame = pd.DataFrame({"task": list("aabbb"), "method": ["icv"] * 4 + ["centred"], "pairs": [100, 5, 70, 5, None]})
    assert most_pairs(frame).index.tolist() == [0, 2, 4], "a task of fewer pairs loses its vectors"


def test_the_table_of_choices_is_made_anew_once_tables_are_there_that_claims_waited_for(tmp_path):
    for path in (ROOT / "results/tables").iterdir():
        (tmp_path / path.name).symlink_to(path)
    now = choices.origin(Book(folder=tmp_path), [])
    assert now == choices.origin(Book(), [])
    (tmp_path / "14_shots").unlink()
    assert now != choices.origin(Book(folder=tmp_path), []), "claims of page 14 would stay unjudged"


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
    assert any("README.md says 'by more than a nat and a half on average'" in one for one in failed), failed


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


def effects_of_heads():
    """Return effects by hand: head 1 is best on two tasks, head 0 on the third, where it alone does anything."""
    effect = {"one": (0.1, 0.4), "two": (0.0, 0.3), "three": (0.5, 0.0)}
    heads = [dict(task=task, layer=3, head=head, method="head", effect=value)
             for task, both in effect.items() for head, value in enumerate(both)]  # fmt: skip
    level = {"one": (0.9, 0.1), "two": (0.5, 0.45), "three": (0.7, 0.2)}
    plain = [dict(task=task, method=method, p=p) for task, both in level.items()
             for method, p in zip(("few_shot", "shuffled"), both, strict=True)]  # fmt: skip
    return pd.DataFrame([*heads, *plain])


def test_a_head_is_judged_on_tasks_that_did_not_choose_it():
    closed = fv.closed_by_one(effects_of_heads())
    # Without "one" the means are .25 and .15: head 0; without "three" .05 and .35: head 1. "two" has no gap.
    assert closed.round(6).to_dict() == {"one": round(0.1 / 0.8, 6), "three": 0.0}
    assert fv.first_heads(effects_of_heads())["three"] == "block 3 head 0"
    alone = effects_of_heads()
    with pytest.raises(ClaimError, match="no two tasks"):
        fv.closed_by_one(alone[alone["task"].eq("one")])


def test_features_are_moved_by_shares_of_their_rise_and_shared_by_number(monkeypatch):
    lines = [dict(task="one", layer=9, kind="executor", heads=heads, k=10, zero=0.0, few=10.0, woken=w, silenced=s)
             for heads, w, s in (("chosen", 4.0, 1.0), ("random_0", 1.0, 10.0), ("random_1", 0.0, 9.0))]  # fmt: skip
    sets = {"a": (1, 2, 3), "b": (2, 3, 4)}
    codes = [dict(task="one", layer=9, method=method, latent=i) for method, some in sets.items() for i in some]
    found = {"21_function_vectors_features": pd.DataFrame(lines), "21_function_vectors_codes": pd.DataFrame(codes)}
    monkeypatch.setattr(Book, "table", lambda self, stem: found[stem])
    monkeypatch.setattr(fv, "many_heads", lambda book: 10)
    book = Book()
    assert fv.moved(book, "woken")["one"] == 0.4 and fv.moved(book, "silenced")["one"] == 0.9
    assert fv.moved(book, "woken", random=True)["one"] == 0.05
    assert fv.in_common(book, "a", "b")["one"] == 2


def steered_by_hand():
    """Return rows of experiment 22, the same for two behaviours and a task, some of which must not be taken."""
    rows = [
        dict(task=task, kind=kind, method=method, place=place, layer=layer, budget=budget, strength=0.1, seed=seed,
             pairs=pairs, kl=kl, effect=effect, loss=loss, loss_y=loss, loss_x=1.0, validation_loss=judged)
        for task, kind in (("one", "behaviour"), ("two", "behaviour"), ("three", "word"))
        for method, place, layer, budget, seed, pairs, kl, effect, loss, judged in (
            ("icv", "ff", -1, 0.1, 0, 100, 0.1, 0.2, 2.0, 3.0), ("icv", "ff", -1, 0.3, 0, 100, 0.3, 0.5, 1.5, 2.0),
            ("icv", "mlp", -1, 0.3, 0, 100, 0.3, 0.9, 1.2, 2.5), ("icv", "ff", -1, 0.3, 1, 100, 0.3, 0.7, 1.7, 9.0),
            ("icv", "ff", -1, 1.0, 0, 100, 1.0, 3.0, 0.5, 1.0), ("icv", "ff", -1, 0.3, 0, 5, 0.3, 9.0, 0.1, 0.1),
            ("icv", "mlp", -1, np.nan, 0, 100, 2.3, 0.1, np.nan, np.nan),
            ("fv_centred", "block", 6, 0.3, 0, np.nan, 0.3, -0.1, 1.9, 2.2),
            ("fv_centred", "block", 10, 0.3, 0, np.nan, 0.3, -0.3, 1.8, 2.3),
            ("fv_centred", "arrow", 6, np.nan, 0, np.nan, np.nan, np.nan, 1.4, 2.1),
        )
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_vector_of_every_token_stands_where_it_validates_best_of_what_it_may_cost(monkeypatch):
    largest = ((6, "mean_difference", (1, 2, 3)), (10, "centred", (1, 2, 3)), (10, "mean_difference", (3, 4)),
               (10, "matched_random", (1, 2)))  # fmt: skip
    codes = pd.DataFrame([dict(task="one", layer=layer, vector=vector, latent=latent)
                          for layer, vector, some in largest for latent in some])  # fmt: skip
    lengths = pd.DataFrame([dict(task="one", pairs=pairs, off_mean=off) for pairs, off in ((5, 0.1), (100, 1e-7))])
    stem = "22_in_context_vectors"
    found = {stem: steered_by_hand(), f"{stem}_features": codes, f"{stem}_component": lengths}
    monkeypatch.setattr(Book, "read", lambda self, stem: found[stem])
    number = {name: claims.NUMBERS[name](Book()) for name in (
        "icv_shifts_behaviour", "icv_beats_fv_at_equal_cost", "icv_beats_fv_on_behaviour", "icv_loses_on_tasks",
        "icv_strength_does_not_travel", "icv_is_the_mean", "icv_shares_no_features", "icv_shares_as_many_as_chance",
    )}  # fmt: skip
    mean = {name: round(found.mean, 9) for name, found in number.items()}
    assert mean == {
        "icv_shifts_behaviour": 0.6,  # both seeds of the place and cost that the first one chose
        "icv_beats_fv_at_equal_cost": 0.7, "icv_beats_fv_on_behaviour": -0.2,  # 1.4 at the arrow less 1.5 and 1.7
        "icv_loses_on_tasks": -0.9,  # the cost has no bound there: .5 less 1.4
        "icv_strength_does_not_travel": 2.3, "icv_is_the_mean": 1e-7, "icv_shares_no_features": 1.0,
        "icv_shares_as_many_as_chance": -1.0,
    }  # fmt: skip
    assert number["icv_shifts_behaviour"].tasks == 2 and number["icv_loses_on_tasks"].tasks == 1
    with pytest.raises(ClaimError, match="no prune_difference vectors of kind behaviour"):
        claims.NUMBERS["twenty_features_shift"](Book())


def test_sets_of_heads_and_latents_are_taken_at_their_numbers_and_with_the_activations_asked_for(monkeypatch):
    losses = {("heads_reward", -1, "own", "own"): 1.0, ("heads_reward", -1, "own", "wrong"): 9.0,
              ("heads_effect", -1, "own", "own"): 1.5, ("heads_effect", -1, "equal", "own"): 2.0,
              ("heads_foreign", -1, "own", "own"): 2.5, ("heads_foreign", -1, "own", "wrong"): 7.0,
              ("latents_reward", 9, "own", "own"): 8.0, ("latents_reward", 10, "own", "own"): 3.0,
              ("latents_effect", 10, "equal", "own"): 2.0, ("zero_shot", -1, "none", "none"): 6.0,
              ("few_shot", -1, "none", "none"): 1.2}  # fmt: skip
    lines = [dict(task=task, method=method, layer=layer, which=which, says=says, seed=0, on="test", k=3, loss=loss,
                  losses=[loss, loss]) for (method, layer, which, says), loss in losses.items()
             for task in ("one", "two")]  # fmt: skip
    sets = {("one", 0): (1, 2, 3), ("one", 1): (2, 3, 4), ("one", 2): (2, 3), ("two", 0): (5,), ("two", 1): (6,)}
    kept = [dict(task=task, kind="heads", way="reward", layer=layer, item=0, seed=seed, kept=layer in some)
            for (task, seed), some in sets.items() for layer in range(8)]  # fmt: skip
    found = {"26_heads_by_reward": pd.DataFrame(lines), "26_heads_by_reward_items": pd.DataFrame(kept)}
    monkeypatch.setattr(Book, "table", lambda self, stem: found[stem])
    number = {name: round(claims.NUMBERS[name](Book()).mean, 9) for name in (
        "rewarded_heads_reach_few_shot", "reward_beats_effect", "reward_beats_effect_at_its_best", "wrong_heads_harm",
        "unseen_set_does_it", "activations_decide", "reward_beats_effect_on_latents", "rewarded_heads_recur",
    )}  # fmt: skip
    assert number == {
        "rewarded_heads_reach_few_shot": -0.2, "reward_beats_effect": -1.0, "reward_beats_effect_at_its_best": -0.5,
        "wrong_heads_harm": 3.0, "unseen_set_does_it": round(3.5 / 4.8, 9), "activations_decide": -4.5,
        "reward_beats_effect_on_latents": 1.0,  # of the last block
        "rewarded_heads_recur": round((2 / 4 + 2 / 3 + 2 / 3) / 3 / 2, 9),  # of all pairs of seeds; none in "two"
    }  # fmt: skip
    with pytest.raises(ClaimError, match="no such heads_gradient"):
        claims.NUMBERS["gradient_finds_heads_too"](Book())


def side_by_side():
    """Return rows of experiment 29: on the third task pruning, which is best on the first two, fails."""
    made = {  # (method, k, budget, features, passes back, tokens): losses of the tasks
        ("zero_shot", None, 0, None, 0, 4): (10, 10, 10), ("few_shot", 16, 100, None, 0, 80): (2, 2, 2),
        ("few_shot", 5, 5, None, 0, 30): (3, 3, 3), ("centred_best_scale", None, 100, None, 0, 4): (4, 4, 4),
        ("prune_contrast", 20, 100, 20, 9, 4): (3, 3, 9), ("clean", None, 100, 40, 9, 4): (8, 8, 8),
        ("theta_mean", None, 5, None, 0, 4): (6, 5, 7), ("matched_random", None, 100, None, 0, 4): (1, 1, 1),
    }  # fmt: skip
    lines = [
        dict(task=task, method=method, k=k, budget=budget, l0=l0, gradients=back, tokens=tokens, loss=float(loss),
             mode="add", seed=0, on=on, own=own, stored=1, d_ntp=0.09 * here, layer=9 + own)
        for (method, k, budget, l0, back, tokens), losses in made.items()
        for task, here in zip(("one", "two", "three"), losses, strict=True)
        for on, own, loss in (("test", True, here), ("test", False, here - 0.5), ("text_anywhere", True, here))
    ]  # fmt: skip
    frame = pd.DataFrame(lines).astype({"k": "Int64", "l0": "Int64"})
    return frame.assign(losses=[np.full(4, loss) for loss in frame["loss"]])


def test_no_task_advises_itself_and_nobody_is_advised_what_they_cannot_make(monkeypatch):
    monkeypatch.setattr(Book, "table", lambda self, stem: side_by_side())
    book = Book()
    assert which.advised(book, "hundred")[0] == "centred_best_scale_of_100"
    assert which.followed(book, "hundred").set_index("task")["loss"].to_dict() == {"one": 4, "two": 4, "three": 9}
    assert which.advised(book, "few")[0] == "theta_mean_of_5"
    assert which.advised(book, "few", prompts=True)[0] == "few_shot_5_of_5"
    assert which.advised(book, "legible") == ("prune_contrast_20_of_100", [])
    assert which.allowed(book, "gentle") == ["centred_best_scale_of_100", "prune_contrast_20_of_100"]
    number = {name: round(claims.NUMBERS[name](book).mean, 9) for name in (
        "advice_does_the_task", "few_pairs_belong_in_the_prompt", "gradient_pays", "advice_travels",
        "advice_is_gentler_than_examples",
    )}  # fmt: skip
    assert number == {
        "advice_does_the_task": round((6 + 6 + 1) / 3 / 8, 9), "few_pairs_belong_in_the_prompt": 3, "gradient_pays": 1,
        "advice_travels": round((1 + 1 + 5) / 3, 9),
        "advice_is_gentler_than_examples": round(0.09 * (2 + 2 + 7) / 3, 9),
    }  # fmt: skip
    assert which.ways(book.otherwise(block="test"))["own"].sum() == 0, "the lower test losses are of other blocks"


def places(method="prune_contrast", loss=2.0, **changed):
    """Rows of experiment 12, the same for two tasks: one vector at one scale, or prompts."""
    row = dict(layer=10, method=method, tokens="separator", mode="add", prompt="zero-shot", on="test", role="vector",
               best=True, scale=1.0, blocks="10", together=1, decay=1.0, made="word", kl=0.4, others=0.5,
               token_loss=3.0, validation_loss=loss, shots=np.nan, k=20 if method == "prune_contrast" else pd.NA)
    return [row | dict(task=task, loss=loss, losses=[loss] * 3) | changed for task in ("one", "two")]


def test_a_place_is_judged_at_the_scale_that_validates_best_there_and_one_cost_at_the_best_it_affords(monkeypatch):
    prompt = dict(role="prompt", mode="none", layer=-1)
    frame = pd.DataFrame([
        *places("zero_shot", 6.0, **prompt, shots=0), *places("few_shot", 3.0, **prompt, shots=4),
        *places("few_shot", 1.0, **prompt, shots=16), *places("instruction", 4.0, **prompt),
        *places("instruction", 3.5, **prompt | dict(best=False)),
        *places(), *places(loss=2.5, best=False, scale=2.0, kl=0.9), *places(loss=5.0, best=False, scale=0.5, kl=0.2),
        *places(loss=3.0, tokens="every", scale=2.0, kl=0.7), *places(loss=8.0, tokens="every", best=False),
        *places("centred_best_scale", 1.5, kl=0.8), *places("centred_best_scale", 4.0, best=False, kl=0.5),
        *places("clean", 1.2, kl=0.8), *places(loss=2.2, mode="clamp"), *places(loss=1.5, prompt="instruction"),
        *places(loss=1.9, layer=8, blocks="8"), *places(loss=1.6, blocks="8,10", together=2),
        *places(loss=7.0, role="wrong_sign"), *places(on="sentence"),
        *places(on="sentence", tokens="generated", token_loss=2.0),
        *places(on="sentence", tokens="generated", token_loss=2.5, decay=0.5), *places(on="sentence", made="sentence"),
    ])  # fmt: skip
    texts = [dict(task=task, tokens=at, decay=1.0, method="prune_contrast", made="word", prompt="zero-shot", chrf=chrf)
             for task in ("one", "two") for at, chrf in (("separator", 0.2), ("generated", 0.3), ("generated", 0.5))]
    found = {"12_places": frame.assign(k=frame["k"].astype("Int64")), "12_places_texts": pd.DataFrame(texts)}
    monkeypatch.setattr(Book, "table", lambda self, stem: found[stem])
    settings = {"layers": [10, 8], "decays": [1.0, 0.5], "n_examples": 4}
    monkeypatch.setattr(Book, "setting", lambda self, stem, name: settings[name])
    expected = {
        "last_token_does_nothing": (6 - 2) / (6 - 1), "every_token_over_steers": 1.0,
        "every_token_over_steers_at_one_scale": 6.0, "every_token_costs_more": 0.3, "clamping_beats_adding": 0.2,
        "prompting_beats_steering": 2.0, "prompt_and_vector_beat_the_vector": -0.5, "wrong_sign_hurts": 1.0,
        "prompt_and_vector_beat_the_prompt": -2.5, "several_blocks_beat_one": 1.6 - 1.9,
        "pruned_does_more_at_equal_cost": 0.8 - 0.4, "vector_overrides_other_examples": 0.5,
        "written_tokens_help_sentences": -1.0, "fading_helps_sentences": 0.5,
        "written_tokens_help_what_is_written": 0.2,
    }  # fmt: skip
    assert {name: round(claims.NUMBERS[name](Book()).mean, 9) for name in expected} == pytest.approx(expected)
    assert placing.affordable(Book(), "clean").tolist() == [0, 0], "too dear at every scale"
    with pytest.raises(ClaimError, match=r"not tried single vectors so \(clamp, separator, zero-shot\)"):
        claims.NUMBERS["clamping_one_beats_adding_it"](Book())
    with pytest.raises(ClaimError, match="no vectors of 5 features"):
        claims.NUMBERS["clamping_beats_adding"](Book().otherwise(k=5))


def dictionaries_by_hand():
    """Return rows of experiment 11 on two tasks: the loss of each dictionary, and of two features of the first seed."""
    level = {"trained": 1.0, "orthonormal": 2.0, "components": 1.5, "unembedding": 3.0, "first_seed": 1.1,
             "frozen_decoder": 1.4}  # fmt: skip
    rows = []
    for task, more in (("one", 0.0), ("two", 0.2)):
        rows += [dict(task=task, layer=-1, dictionary="none", method="few_shot", seed=0, on="test")]
        for name, loss in level.items():
            same = dict(task=task, layer=11, dictionary=name, seed=0, on="test", mode="add")
            rows += [same | dict(method="prune_contrast", k=k, loss=loss + more + 9 * (k == 5),
                                 losses=[loss + more] * 2) for k in (5, 20)]  # fmt: skip
            rows += [same | dict(method="single", latent=i, k=1, validation_loss=v, rel_loss=r)
                     for i, v, r in ((3, 1.0, -loss / 10), (4, 2.0, -0.9))]  # fmt: skip
            rows += [same | dict(method=method, k=10, necessity=share / loss)
                     for method, share in (("own", 0.8), ("same_activation", 0.2))]  # fmt: skip
    return pd.DataFrame(rows)


def test_dictionaries_are_compared_at_equal_size_and_features_found_again_by_number(monkeypatch):
    matches = [dict(layer=11, latent=i, first=first, second="second_seed", cosine=c, correlation=c)
               for first, pairs in (("first_seed", ((3, 0.6), (4, 0.9))), ("shipped", ((3, 0.1), (4, 0.1))))
               for i, c in pairs]  # fmt: skip
    found = {"11_dictionaries": dictionaries_by_hand(), "stability": pd.DataFrame(matches)}
    monkeypatch.setattr(Book, "read", lambda self, stem: found[stem])
    monkeypatch.setattr(Book, "done", pd.Series({"one": True, "two": True}))
    names = (
        "training_beats_orthonormal", "training_beats_components", "training_beats_frozen_decoder",
        "training_steers_more", "training_is_needed_more", "features_recur", "recurrence_predicts_effect",
    )  # fmt: skip
    mean = {name: round(claims.NUMBERS[name](Book()).mean, 9) for name in names}
    assert mean == {
        "training_beats_orthonormal": -1.0, "training_beats_components": -0.5,
        "training_beats_frozen_decoder": -0.3,  # less the seed that learned from as much text
        "training_steers_more": 0.2,  # -.1 less -.3: the feature that validates best counts, not the one that does most
        "training_is_needed_more": 0.3, "features_recur": 0.5, "recurrence_predicts_effect": 1.0,
    }  # fmt: skip
    with pytest.raises(ClaimError, match="no prune_contrast rows of the dictionary frozen_encoder"):
        claims.NUMBERS["training_beats_frozen_encoder"](Book())


def test_labels_are_held_against_those_of_other_features_of_the_tasks_that_keep_them(monkeypatch):
    scores = ("detection", "output", "prediction")
    named = [dict(layer=6, latent=i, intruder=x, **dict.fromkeys(scores, x), **{f"{s}_shuffled": 0.5 for s in scores})
             for i, x in ((1, 0.9), (2, 0.7), (3, 0.1))]  # fmt: skip
    kept = pd.DataFrame([dict(layer=6, latent=i, kind="executor", task=task)
                         for i, task in ((1, "one"), (2, "one"), (2, "two"), (3, ""))])  # fmt: skip
    alone = [dict(task="one", kind="executor", layer=6, latent=i, which="best", in_clean=own, rel_loss=change)
             for i, own, change in ((1, True, -0.1), (2, True, 0.1), (3, False, 0.2), (-1, False, -0.9))]  # fmt: skip
    found = {"labels": pd.DataFrame(named), "15_labels": pd.DataFrame(alone)}
    monkeypatch.setattr(Book, "read", lambda self, stem: found[stem])
    monkeypatch.setattr(Book, "done", pd.Series({"one": True, "two": True}))
    monkeypatch.setattr(evidence, "surviving", lambda model, folder: kept)
    told = claims.NUMBERS["labels_tell_where"](Book())
    assert told.by_task.round(9).to_dict() == {"one": 0.3, "two": 0.2}
    assert round(claims.NUMBERS["contexts_are_alike"](Book()).mean, 9) == 0.75
    assert claims.NUMBERS["own_features_help_alone"](Book()).by_task.to_dict() == {"one": 0.5}


def test_a_task_of_which_it_is_not_known_whether_the_model_does_it_does_not_count(monkeypatch):
    found = pd.DataFrame({"task": ["one", "two", "three"], "loss": [1.0, 2.0, 3.0]})
    monkeypatch.setattr(Book, "read", lambda self, stem: found)
    monkeypatch.setattr(Book, "done", pd.Series({"one": True, "two": False}))
    assert Book().table("04_detectors")["task"].tolist() == ["one"]


@pytest.mark.parametrize("claim", ledger.entries(), ids=lambda claim: claim.id)
def test_what_a_claim_names_in_braces_is_there_also_where_its_tables_are_not(claim):
    named = {name for _, name, _, _ in Formatter().parse(claim.decides) if name}
    assert all(name in claims.NAMED or hasattr(Book, name) for name in named), named


def test_a_composed_vector_is_held_against_the_direct_one_and_the_best_part_of_tasks_that_are_done(monkeypatch):
    rights = {"one": 0.9, "two": 0.8, "undone": 0.1}
    lines = []
    for shift, (task, right) in enumerate(rights.items()):
        same = dict(task=task, on="list", mode="none", seed=0, which="none", accuracy=0.0, validation_loss=np.nan)
        lines += [same | dict(method="zero_shot", loss=6.0),
                  same | dict(method="few_shot", loss=1.0, accuracy=right)]
        same |= dict(method="fv_centred", mode="add")
        # Loss on test and on validation: of the parts another is best on each.
        ways = {"direct": (2.0, 2.0), "composed": (3.0 + shift, 3.0), "summed": (5.0, 4.0), "part_answer": (4.0, 5.0),
                "part_last": (7.0, 7.0)}  # fmt: skip
        lines += [same | dict(which=which, loss=loss, losses=[loss], validation_loss=judged)
                  for which, (loss, judged) in ways.items()]  # fmt: skip
    monkeypatch.setattr(Book, "table", lambda self, stem: pd.DataFrame(lines))
    assert claims.NUMBERS["fv_composes"](Book()).by_task.to_dict() == {"one": 0.75, "two": 0.5}
    assert claims.NUMBERS["composing_beats_parts"](Book()).by_task.to_dict() == {"one": -2.0, "two": -1.0}
    monkeypatch.setattr(Book, "table", lambda self, stem: pd.DataFrame(lines).assign(accuracy=0.0))
    with pytest.raises(ClaimError, match="no task whose lists"):
        claims.NUMBERS["fv_composes"](Book())


def test_the_head_that_is_looked_at_is_the_one_that_other_tasks_put_first(monkeypatch):
    effect = {"one": (0.1, 0.9), "two": (0.8, 0.3), "three": (0.5, 0.2)}  # of two heads
    spots = [(task, head) for task in effect for head in (0, 1)]
    found = {
        "21_heads": pd.DataFrame([dict(task=t, layer=4, head=h, method="head", effect=effect[t][h]) for t, h in spots]),
        "21_heads_attention": pd.DataFrame([dict(task=t, layer=4, head=h, output=0.7 - 0.6 * h) for t, h in spots]),
    }  # fmt: skip
    monkeypatch.setattr(Book, "table", lambda self, stem: found[stem])
    looks = claims.NUMBERS["first_head_reads_outputs"](Book()).by_task.round(9).to_dict()
    assert looks == {"one": 0.7, "two": 0.1, "three": 0.1}  # without "one" head 0 is first, else head 1
