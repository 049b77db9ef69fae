"""Same rows: a changed number is named and refused, other names are recorded, an edited record is no record."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import yaml

from nb_utils.record.tables import ROOT
from workflow import same

STEM = "06_training_prompts"
A, B, C, D = (letter * 64 for letter in "abcd")


@pytest.fixture
def project(tmp_path):
    """A clone with all code committed."""
    for part in ("nb_utils", "workflow", "book/experiments", "benchmarks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in same.READ:
        (tmp_path / part).symlink_to(ROOT / part)
    git = ["git", "-C", tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in ("init -q", "add nb_utils workflow book benchmarks", "commit -qm All"):
        subprocess.run([*git, *words.split()], check=True)
    return tmp_path


def call(project, since, experiments):
    command = [sys.executable, "-m", "workflow.same", "--since", since, "--experiments", experiments, "--model", "tiny"]
    env = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run([*command, "--cores", "2"], cwd=project, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def edit(path, old, new):
    notebook = nbformat.read(path, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.source = re.sub(old, new, cell.source)
    nbformat.write(notebook, path)


def test_a_changed_number_is_refused_and_other_names_are_recorded(project):
    edit(project / f"book/experiments/{STEM}.ipynb", r"learning_rate, steps\)", "learning_rate * 1.01, steps)")
    edit(project / "book/experiments/09_templates.ipynb", r"\bboth\b", "pair_of_them")
    code, said, errors = call(project, "HEAD", "6,9")
    assert code == 1, said + errors
    assert re.search(rf"^Refused: {STEM}: in {STEM}, column \w+, row \d+ was \S+, is \S+$", said, re.MULTILINE), said
    assert "\n09_templates: the same rows\n" in said
    (entry,) = json.loads((project / "results/same.json").read_text())
    assert entry["experiment"] == "09_templates" and set(entry["rows"]) == {"09_templates"}
    assert entry["from"] != entry["to"] and entry["settings"]["templates"] == "arrow,question"
    assert call(project, "HEAD", "9")[:2] == (0, "09_templates: no other code\n")  # it is known, and nothing is run
    left = subprocess.run(["git", "-C", project, "worktree", "list"], capture_output=True, text=True)
    assert left.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "since, experiments, complaint",
    [
        ("", "all", "Which code are the tables of? Name its commit: make same SINCE=<commit>."),
        ("no-such", "all", "git does not have that code"),
        ("--help", "all", "git does not have that code"),
        ("HEAD", "6,99", "There is no experiment '99': give numbers with commas between, or all."),
    ],
)
def test_what_cannot_be_run_is_one_sentence(project, since, experiments, complaint):
    command = [sys.executable, "-m", "workflow.same", f"--since={since}", "--experiments", experiments]
    env = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1
    assert not (project / "results").exists()


FRAME = pd.DataFrame({"task": ["a", "b"], "loss": [0.1, float("nan")], "losses": [[1.0, 2.0], [3.0]], "k": [1, 2]})


@pytest.mark.parametrize(
    "other, said",
    [
        (FRAME, None),
        (FRAME.assign(loss=[0.1 + 2**-56, float("nan")]), "column loss, row 0 was 0.1, is 0.10000000000000002"),
        (FRAME.assign(loss=[0.1, 0.0]), "column loss, row 1 was None, is 0.0"),
        (FRAME.assign(task=["a", "B"]), "column task, row 1 was 'b', is 'B'"),
        (FRAME.assign(losses=[[1.0, 2.0], [3.5]]), "column losses, row 1 was [3.0], is [3.5]"),
        (FRAME.assign(k=[1.0, 2.0]), "column k was int64, is double"),
        (FRAME.drop(columns="k"), "column k was int64, is None"),
        (FRAME[["loss", "task", "losses", "k"]], "its columns have another order"),
        (FRAME[::-1], "column task, row 0 was 'a', is 'b'"),
        (FRAME[:1], "2 rows were there, 1 are"),
    ],
)
def test_tables_are_the_same_to_the_last_bit_or_where_they_differ_is_named(tmp_path, other, said):
    FRAME.to_parquet(tmp_path / "then.parquet")
    other.reset_index(drop=True).to_parquet(tmp_path / "now.parquet")
    assert same.difference(tmp_path / "then.parquet", tmp_path / "now.parquet") == said


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Write a record of pairs of code, each as the command would, with some of it changed afterwards."""
    monkeypatch.setattr(same, "RECORD", tmp_path / "same.json")

    def write(*pairs, stem=STEM, **changes):
        made = []
        for before, after in pairs:
            entry = {"experiment": stem, "from": before, "to": after, "model": "tiny", "task": "en_es", "settings": {},
                     "rows": {stem: A}}  # fmt: skip
            made.append(entry | {"seal": same._seal(entry)} | changes)
        same.RECORD.write_text(json.dumps(made))

    return write


def test_code_gives_the_rows_of_all_that_it_is_tied_to(record):
    assert same.codes(STEM, A) == {A} and same.first(STEM, A) == A
    record((A, B), (B, C), (D, D))
    assert all(same.codes(STEM, code) == {A, B, C} and same.first(STEM, code) == A for code in (A, B, C))
    assert same.codes(STEM, D) == {D} and same.codes("09_templates", B) == {B}
    record((A, B), (B, A))  # there and back
    assert same.first(STEM, A) == same.first(STEM, B) == A


@pytest.mark.parametrize("changes", [{"to": C}, {"rows": {}}, {"seal": A}, {"model": "other"}, {"note": "trust me"}])
def test_a_record_that_was_edited_is_refused_in_one_sentence(record, changes):
    record((A, B), **changes)
    with pytest.raises(same.SameError, match=rf"^same.json holds what `make same` did not write \({STEM}\): take the"):
        same.codes(STEM, A)


@pytest.mark.parametrize("entry", [{"to": "b"}, {"rows": {}}, {"rows": {STEM: "1"}}, {"from": None}])
def test_an_entry_that_was_sealed_anew_must_still_hold_hashes(record, entry):
    record((A, B))
    (made,) = json.loads(same.RECORD.read_text())
    made = {name: value for name, value in {**made, **entry}.items() if name != "seal"}
    same.RECORD.write_text(json.dumps([made | {"seal": same._seal(made)}]))
    with pytest.raises(same.SameError, match="did not write"):
        same.read()


@pytest.mark.parametrize("text", ["", "[", "{}x", "[1]", '{"a": 1}'])
def test_a_damaged_record_is_one_sentence(record, text):
    record((A, B))
    same.RECORD.write_text(text)
    with pytest.raises(same.SameError, match=r"^same.json is damaged: take the file from git again\.$"):
        same.read()


def test_the_committed_record_is_of_experiments_and_of_the_sample():
    models = yaml.safe_load(same.SETTINGS.read_text())["models"]
    for entry in same.read():
        assert (ROOT / f"book/experiments/{entry['experiment']}.ipynb").exists() and entry["model"] in models
        assert all(name.startswith(entry["experiment"]) for name in entry["rows"])


def test_the_sample_repeats_seeds_reads_sentences_and_has_what_others_read():
    sample = yaml.safe_load(same.SETTINGS.read_text())
    assert (ROOT / f"data/sentences/{sample['tasks']}.json").exists() and sample["sizes"]["seeds"] > 1
    for model in sample["models"]:
        given = {path.stem: same.sizes(path, model) for path in (ROOT / "book/experiments").glob("*.ipynb")}
        assert all(set(given[stem]["layers"].split(",")) <= set(given[other]["layers"].split(","))
                   for stem, read in same.readers().items() for other in read)  # fmt: skip
