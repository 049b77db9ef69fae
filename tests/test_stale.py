"""Stale tables: each thing that a table depends on, changed alone, is named, and nothing else is."""

import json
import shutil

import pandas as pd
import pytest

from nb_utils.record import sources, tables
from nb_utils.record.tables import MODEL, ROOT
from workflow import same, stale

STEM, INPUT = "04_detectors", "02_cleanup_features"
FRAME = pd.DataFrame({"task": ["antonyms"], "layer": [4], "loss": [1.5]})
SAE = ROOT / "saes" / MODEL / "blocks.4.hook_resid_post/sae_weights.safetensors"


def origin(folder, **changes):
    """Return what a table would be saved with today, with some of it changed."""
    settings = stale._defaults(sources.maker(STEM), MODEL) | {"layers": [4, 6], "penalties": [0.2], "task": "antonyms"}
    found = tables.provenance(
        settings, stale._model(MODEL), {4: stale._sha256(SAE)}, {INPUT: tables.fingerprint(INPUT, MODEL, folder)}
    )
    for name, value in changes.items():
        found[name] = {**found[name], **value} if isinstance(value, dict) else value
    return found


@pytest.fixture
def made(tmp_path):
    def make(**changes):
        tables.save(FRAME.assign(latent=7), INPUT, "antonyms", {}, tmp_path)
        tables.save(FRAME, STEM, "antonyms", origin(tmp_path, **changes), tmp_path)
        return [line for line in reasons(tmp_path)]

    return make


def reasons(folder):
    stale._fingerprint.cache_clear()
    return stale.reasons(folder / STEM / MODEL / "antonyms.parquet", folder)


def test_a_table_that_would_come_out_the_same_is_fresh(made):
    assert made() == []


def test_a_list_of_words_is_compared_as_its_numbers(made):
    assert made(parameters={"penalties": ["0.2"]}) == []


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"parameters": {"steps": 7}}, "steps was 7, is 30"),
        ({"parameters": {"penalties": [0.3, 1.0]}}, "penalties was 0.3,1, is 0.2"),
        ({"model_sha256": "0" * 64}, "other weights of the model"),
        ({"sae_sha256": {"4": "0" * 64}}, "another SAE at block 4"),
        ({"data_sha256": {"antonyms.json": "0" * 64}}, "other data in antonyms.json"),
        ({"inputs": {INPUT: "0" * 64}}, f"other rows in {INPUT}, which it reads"),
        ({"versions": {"torch": "1.0.0+cpu"}}, None),
    ],
)
def test_what_has_changed_is_named(made, change, reason):
    if "model_sha256" in change and stale._model(MODEL) is None:
        pytest.skip("the model is not converted on this machine")
    found = made(**change)
    assert found == [reason] if reason else found[0].startswith("torch was 1.0.0+cpu, is 2")


def test_other_models_are_held_against_their_own_blocks():
    maker = sources.maker("05_cross_task_steering")
    assert stale._defaults(maker, "google/gemma-2-2b")["layers"] == "14,10" != stale._defaults(maker, MODEL)["layers"]


def test_quick_tables_are_held_against_the_quick_settings(tmp_path, monkeypatch):
    maker, quick = sources.maker(STEM), stale.SETTINGS[1]
    assert stale._settings(ROOT / "results/runs/tables") == quick
    assert stale._settings(ROOT / "results/tables") == stale._settings(tmp_path) == stale.SETTINGS[0]
    sizes = stale._defaults(maker, MODEL, quick)
    assert sizes["layers"] == "6,8" != stale._defaults(maker, MODEL)["layers"]
    made = {"parameters": {**sizes, "task": "antonyms", "layers": [6, 8], "sizes": [20, 10]}}
    assert not list(stale._parameters(maker, made, ROOT / "results/runs/tables"))
    assert "layers was 6,8, is 4,6" in stale._parameters(maker, made, ROOT / "results/tables")


def test_a_build_of_the_same_version_is_no_other_version(made):
    assert made(versions={"torch": tables.versions()["torch"].partition("+")[0] + "+cu130"}) == []


def test_other_code_and_other_rows_of_an_input_are_named(made, tmp_path, monkeypatch):
    made()
    tables.save(FRAME.assign(latent=8), INPUT, "antonyms", {}, tmp_path)
    assert reasons(tmp_path) == [f"other rows in {INPUT}, which it reads"]
    monkeypatch.setattr(stale, "_code", lambda maker: "another")
    assert "other code" in reasons(tmp_path)


def record(path, *pairs):
    """Write what `make same` would, had it found that these give the same rows."""
    told = {"experiment": STEM, "model": MODEL, "task": "en_es", "settings": {}, "rows": {STEM: "0" * 64}}
    made = [told | {"from": before, "to": after} for before, after in pairs]
    path.write_text(json.dumps([entry | {"seal": same._seal(entry)} for entry in made]))


def test_other_code_that_gives_the_same_rows_is_not_other_code(made, tmp_path, monkeypatch):
    monkeypatch.setattr(same, "RECORD", tmp_path / "same.json")
    made()
    then, between, another = sources.code(sources.maker(STEM)), "b" * 64, "c" * 64
    now = monkeypatch.setattr(stale, "_code", lambda maker: "a" * 64) or "a" * 64
    assert reasons(tmp_path) == ["other code"]
    record(same.RECORD, (then, between), (between, now))
    assert reasons(tmp_path) == []
    record(same.RECORD, (then, between), (another, now))  # no chain
    assert reasons(tmp_path) == ["other code"]
    same.RECORD.write_text(same.RECORD.read_text().replace(another, then))  # by hand
    with pytest.raises(same.SameError, match="what `make same` did not write"):
        reasons(tmp_path)
    assert stale.main([str(tmp_path)]) == 2


def test_a_table_without_provenance_or_maker_is_stale(made, tmp_path):
    made()
    path = tmp_path / STEM / MODEL / "antonyms.parquet"
    FRAME.to_parquet(path)
    assert reasons(tmp_path) == ["no provenance"]
    path.write_bytes(b"PAR1")
    assert reasons(tmp_path) == ["damaged"]
    tables.save(FRAME, "99_gone", "antonyms", origin(tmp_path) | {"code": "0"}, tmp_path)
    assert stale.reasons(tmp_path / "99_gone" / MODEL / "antonyms.parquet", tmp_path) == [
        "nothing makes such tables any more"
    ]


def test_the_command_groups_what_it_names_and_exits_with_1_if_there_is_any(made, tmp_path, capsys):
    made()
    shutil.rmtree(tmp_path / INPUT)
    tables.save(FRAME, STEM, "en_es", origin(tmp_path), tmp_path)
    (tmp_path / STEM / MODEL / "antonyms.parquet").unlink()
    assert stale.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "None of 1 tables is stale.\n"
    for task in ("en_fr", "en_it"):
        tables.save(FRAME, STEM, task, origin(tmp_path, parameters={"steps": 7}), tmp_path)
    assert stale.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said == f"steps was 7, is 30: {STEM} (en_fr, en_it)\n2 of 3 tables are stale.\n"


@pytest.mark.parametrize("model, sae_set", [("google--gemma-2-2b", "shipped"), (MODEL, "another/set")])
@pytest.mark.parametrize("last", ["a", "b"])
def test_tables_of_saes_that_are_not_here_are_held_against_one_another(tmp_path, capsys, model, sae_set, last):
    for task, sha256 in {"en_es": "a", "en_fr": "a", "en_it": last}.items():
        settings = {"task": task, "model": model, "sae_set": sae_set}
        found = origin(tmp_path) | {"parameters": settings, "sae_sha256": {"4": sha256}, "inputs": {}}
        tables.save(FRAME, STEM, task, found, tmp_path, model)
    stale.main([str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    place = tables.place(model, sae_set)
    group = STEM if place == MODEL else f"{STEM} of {place}"
    expected = f"at block 4 another SAE than most tables of its model: {group} (en_it)"
    assert (expected in said) == (last == "b") and ("another SAE" in said) == (last == "b")


def test_what_cannot_be_compared_is_one_sentence(made, tmp_path, capsys):
    made()
    (tmp_path / INPUT / MODEL / "antonyms.parquet").write_bytes(b"PAR1")
    stale._fingerprint.cache_clear()
    assert stale.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "antonyms.parquet is damaged" in said and said.count("\n") == 1


def test_every_committed_table_says_where_it_comes_from():
    """A stale table is named by the command; but each has all parts of its provenance."""
    for path in sorted((ROOT / tables.FOLDER).rglob("*.parquet")):
        found = tables.read_provenance(path)
        assert set(tables.PARTS) <= set(found), path
        assert all(found[name] for name in ("code", "model_sha256", "parameters", "versions")), path
        json.dumps(found)
