import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from nb_utils.record import sources, tables
from nb_utils.record.tables import ROOT, TableError

STEM = "01_reconstruction_loss"
ORIGIN = {"parameters": {"seed": 0}}


def made(task="antonyms", loss=1.5, **columns):
    row = {
        "task": task, "layer": 8, "method": "task_vector", "mode": "add", "k": None, "scale": 1.0, "l0": None,
        "penalty": None, "seed": 0, "on": "test", "loss": loss, "losses": [loss, loss + 1],
    }  # fmt: skip
    return pd.DataFrame([row | columns])


def saved(folder, task="antonyms", **columns):
    return tables.save(made(task, **columns), STEM, task, ORIGIN, folder)


def leftovers(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".parquet")


def test_a_saved_table_comes_back_with_its_values_and_types(tmp_path):
    saved(tmp_path, k=20, l0=17)
    row = tables.load(STEM, folder=tmp_path).iloc[0]
    assert (row["task"], row["layer"], row["k"], row["l0"], row["loss"]) == ("antonyms", 8, 20, 17, 1.5)
    assert row["losses"].dtype == np.float32
    assert row["losses"].tolist() == [1.5, 2.5]
    assert np.isnan(row["penalty"])


def test_tasks_are_put_together_in_the_order_of_their_names(tmp_path):
    for task in ("plurals", "antonyms", "capitals"):
        saved(tmp_path, task)
    assert tables.load(STEM, folder=tmp_path)["task"].tolist() == ["antonyms", "capitals", "plurals"]
    assert tables.names(STEM, folder=tmp_path) == ["antonyms", "capitals", "plurals"]


def test_tables_of_other_saes_lie_apart_and_latents_of_others_are_never_read(tmp_path):
    def save(sae_set, sha256, task="antonyms"):
        origin = {"parameters": {"sae_set": sae_set}, "sae_sha256": {"8": sha256}}
        return tables.save(made(task), STEM, task, origin, tmp_path)

    one, two = save("shipped", "a"), save("gemma-scope", "b")
    assert (one.parent.name, two.parent.name) == (tables.MODEL, f"{tables.MODEL}+gemma-scope")
    assert all(len(tables.load(STEM, folder=tmp_path, sae_set=name)) == 1 for name in ("shipped", "gemma-scope"))
    save("shipped", "c", "capitals")
    tables.check_saes(STEM, {8: "b", 3: "z"}, folder=tmp_path, sae_set="gemma-scope")
    tables.check_saes(STEM, {8: "a"}, folder=tmp_path, task="antonyms")
    with pytest.raises(TableError, match=r"capitals.parquet names latents of another SAE after block 8 than .* run 01"):
        tables.check_saes(STEM, {8: "a"}, folder=tmp_path)


@pytest.mark.parametrize("column", ["task", "method", "on"])
def test_markup_in_the_names_of_a_table_of_others_is_refused(tmp_path, column):
    saved(tmp_path, **{column: "<img src=x onerror=alert(1)>"})
    with pytest.raises(TableError, match=rf"is damaged \(its {column} '<img src=x"):
        tables.load(STEM, folder=tmp_path)


def test_types_do_not_depend_on_which_values_a_task_happens_to_have(tmp_path):
    saved(tmp_path, "antonyms")
    saved(tmp_path, "plurals", k=5, l0=5, penalty=0.1)
    frame = tables.load(STEM, folder=tmp_path)
    assert str(frame["k"].dtype) == str(frame["l0"].dtype) == "Int64"
    assert frame["penalty"].dtype == np.float64
    assert frame["k"].isna().tolist() == [True, False]


def test_records_of_another_stem_than_the_features_come_back_as_they_were(tmp_path):
    record = {"tokens": ["a", "b"], "shares": [0.5, 0.25], "rank": 3}
    frame, stem = pd.DataFrame({"task": ["antonyms"], "examples": [[record]]}), "explore_steering"
    tables.save(frame, stem, "antonyms", {}, tmp_path)
    found = tables.load(stem, folder=tmp_path)["examples"][0][0]
    assert {name: list(value) if name != "rank" else value for name, value in found.items()} == record


def test_a_hub_name_becomes_one_folder(tmp_path):
    path = tables.save(made(), STEM, "antonyms", ORIGIN, tmp_path, model="google/gemma-2-2b")
    assert path == tmp_path / STEM / "google--gemma-2-2b" / "antonyms.parquet"
    assert len(tables.load(STEM, "google/gemma-2-2b", tmp_path)) == 1
    assert tables.names(STEM, folder=tmp_path) == []


def test_saving_does_not_change_the_frame(tmp_path):
    frame = made()
    before = frame.copy(deep=True)
    tables.save(frame, STEM, "antonyms", ORIGIN, tmp_path)
    pd.testing.assert_frame_equal(frame, before)


def test_the_same_table_is_saved_as_the_same_bytes(tmp_path):
    first = saved(tmp_path).read_bytes()
    assert saved(tmp_path).read_bytes() == first


def test_columns_can_be_chosen(tmp_path):
    saved(tmp_path)
    assert list(tables.load(STEM, folder=tmp_path, columns=["task", "loss"])) == ["task", "loss"]


def test_a_full_disk_leaves_the_older_table_and_no_scratch_file(tmp_path, monkeypatch):
    saved(tmp_path, loss=1.0)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TableError, match=r"antonyms.parquet could not be written \(No space left on device\)"):
        saved(tmp_path, loss=2.0)
    assert tables.load(STEM, folder=tmp_path)["loss"].tolist() == [1.0]
    assert leftovers(tmp_path) == []


def test_a_kill_while_writing_leaves_the_older_table(tmp_path):
    saved(tmp_path, loss=1.0)
    script = (
        "import os, signal, sys; sys.path.insert(0, 'tests'); from test_tables import saved, tables\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"import pathlib; saved(pathlib.Path({str(tmp_path)!r}), loss=2.0)"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert tables.load(STEM, folder=tmp_path)["loss"].tolist() == [1.0]
    assert tables.names(STEM, folder=tmp_path) == ["antonyms"]


def test_a_folder_that_cannot_be_made_is_a_table_error(tmp_path):
    (tmp_path / STEM).write_text("in the way")
    with pytest.raises(TableError, match="could not be written"):
        saved(tmp_path)


def test_a_missing_table_says_what_to_run(tmp_path):
    with pytest.raises(TableError, match=r"no tables of 02_cleanup for tiny .*make book.*make report"):
        tables.load("02_cleanup", "tiny", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}" * 100], ids=["empty", "cut", "other"])
def test_a_damaged_table_is_named(tmp_path, content):
    saved(tmp_path, "plurals")
    saved(tmp_path).write_bytes(content)
    for read in (
        lambda: tables.load(STEM, folder=tmp_path),
        lambda: tables.read_provenance(tmp_path / STEM / tables.MODEL / "antonyms.parquet"),
    ):
        with pytest.raises(TableError, match=r"antonyms.parquet is damaged .*delete it") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_table_cut_in_half_is_damaged(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TableError, match="is damaged"):
        tables.load(STEM, folder=tmp_path)


def test_provenance_comes_back_from_the_file(tmp_path):
    origin = tables.provenance({"layers": [4, 8], "half": True}, "aa", {8: "cc", 4: "bb"})
    path = tables.save(made(), STEM, "antonyms", origin, tmp_path)
    found = tables.read_provenance(path)
    assert found.pop("code") == sources.code(ROOT / f"book/experiments/{STEM}.ipynb")
    assert found == origin and {*found, "code"} == set(tables.PARTS)


def test_provenance_holds_what_a_table_depends_on_and_nothing_else():
    origin = tables.provenance({"seed": 1}, "aa", {10: "cc", 4: "bb"})
    assert origin == tables.provenance({"seed": 1}, "aa", {4: "bb", 10: "cc"})
    assert set(origin) == set(tables.PARTS) - {"code"}
    assert list(origin["sae_sha256"]) == ["4", "10"]
    assert origin["versions"]["numpy"] == np.__version__
    assert set(origin["versions"]) == {"python", *tables.PACKAGES}
    assert "not installed" not in origin["versions"].values()


def test_the_pairs_of_a_task_are_part_of_its_provenance(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"a": "b"}')
    before = tables.provenance({"task": str(mine)}, "aa", {})["data_sha256"]
    mine.write_text('{"a": "c"}')
    assert before.keys() == {"mine.json"} and tables.provenance({"task": str(mine)}, "aa", {})["data_sha256"] != before
    assert set(tables.provenance({"tasks": ["antonyms", "en_es"]}, "aa", {})["data_sha256"]) == {
        "antonyms.json", "en_es.json", "sentences of en_es.json",
    }  # fmt: skip
    assert set(tables.data_sha256({"task": "register"})) == {"register.json"}  # a behaviour
    assert set(tables.data_sha256({"text": "text/neutral.json"})) == {"text/neutral.json"}


def test_a_fingerprint_is_of_the_rows_alone(tmp_path):
    saved(tmp_path, loss=1.0)
    saved(tmp_path, "plurals", loss=1.0)
    whole, one = (tables.fingerprint(STEM, folder=tmp_path, task=task) for task in (None, "antonyms"))
    tables.save(made(loss=1.0), STEM, "antonyms", {"parameters": {"seed": 7}}, tmp_path)
    assert tables.fingerprint(STEM, folder=tmp_path) == whole != one
    saved(tmp_path, "plurals", loss=2.0)
    assert tables.fingerprint(STEM, folder=tmp_path) != whole
    assert tables.fingerprint(STEM, folder=tmp_path, task="antonyms") == one


def test_a_file_without_provenance_is_an_error(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(TableError, match="carries no provenance"):
        tables.read_provenance(tmp_path / "plain.parquet")
    with pytest.raises(TableError, match="There is no table"):
        tables.read_provenance(tmp_path / "none.parquet")


def test_a_relative_folder_is_below_the_project_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path / "project")
    assert saved("results/tables").is_relative_to(tmp_path / "project" / "results" / "tables")


def test_nb_tables_overrides_the_default_folder_only(tmp_path, monkeypatch):
    monkeypatch.setenv("NB_TABLES", str(tmp_path / "mine"))
    assert saved(None).is_relative_to(tmp_path / "mine")
    assert saved(tmp_path / "other").is_relative_to(tmp_path / "other")


def test_findings_need_no_torch():
    reads = "from book.ledger import ledger; from nb_utils.show import evidence, plots"
    script = f"import sys; {reads}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ}).returncode == 0


def test_filters_keep_the_rows_that_meet_them_all(tmp_path):
    frame = pd.DataFrame({"layer": [8, 8, 10], "latent": [1, 2, 1], "density": [0.25, 0.5, 0.75]})
    tables.save(frame, "some_rows", "one", {"seed": 0}, folder=tmp_path)
    found = tables.load("some_rows", folder=tmp_path, filters=[("layer", "in", [8]), ("latent", "==", 1)])
    assert found["density"].tolist() == [0.25]
