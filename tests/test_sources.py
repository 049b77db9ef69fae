"""Sources: the hash of what makes a table changes with what can change its numbers, and with nothing else."""

import shutil

import nbformat
import pytest

from nb_utils.record import sources
from nb_utils.record.tables import FOLDER, ROOT

PARTS = ("nb_utils", "workflow", "benchmarks", "book/experiments")


@pytest.fixture
def project(tmp_path, monkeypatch):
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def code(stem):
    return sources.code(sources.maker(stem))


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def edit(path, cell_id, old, new):
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.id == cell_id)
    assert old in cell.source
    cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, path)


def test_every_committed_table_has_a_maker():
    stems = [path.name for path in (ROOT / FOLDER).iterdir()]
    assert stems and all(sources.maker(stem).exists() for stem in stems)
    notebook = ROOT / "book/experiments/02_cleanup.ipynb"
    assert sources.maker("02_cleanup_features") == sources.maker("02_cleanup") == notebook
    assert sources.maker("99_nothing") is None


def test_a_notebook_reaches_what_it_uses_directly_and_through_others():
    found = sources.reached(sources.maker("02_cleanup"))
    assert {
        "02_cleanup.ipynb", "nb_utils.cleaning.prune_with_refit", "nb_utils.statistics.choose", "nb_utils.engine._rows",
        "nb_utils.tasks.SIZES", "nb_utils.scores.Candidate", "nb_utils.models.Model",
    } <= set(found)  # fmt: skip
    others = ("nb_utils.statistics.survivors", "nb_utils.statistics.block_order")
    assert not set(others) & set(found)
    assert not [name for name in found if name.startswith(("nb_utils.show", "nb_utils.record", "nb_utils.exports"))]


ALL = {"01_reconstruction_loss", "02_cleanup", "04_detectors", "05_cross_task_steering"}
CHANGES = {
    "what 01 alone measures": ("vectors.py", "algorithm) -> Codes:\n", "algorithm) -> Codes:\n    k = 1\n", {0}),
    "what 04 and 05 take": ("statistics.py", "most: int = 5, k: int = 10", "most: int = 5, k: int = 20", {2, 3}),
    "what others call": ("engine.py", "*others: Site, keep: int = 16384", "*others: Site, keep: int = 8192", {1, 2, 3}),
    "a constant": ("tasks.py", '"vector": 0.35, "train": 0.20', '"vector": 0.30, "train": 0.25', {0, 1, 2, 3}),
    "a comment": ("tasks.py", "# The smallest bucket that", "# The least bucket that", set()),
    "a docstring": ("tasks.py", '"""A named set of pairs', '"""A set of pairs', set()),
    "a colour": ("show/plots.py", "#333333", "#333334", set()),
    "what nothing measures with": ("exports.py", "import hashlib", "import hashlib, zlib", set()),
}  # fmt: skip


@pytest.mark.parametrize("file, old, new, changed", CHANGES.values(), ids=CHANGES)
def test_only_what_a_table_comes_from_changes_its_code(project, file, old, new, changed):
    before = {stem: code(stem) for stem in ALL}
    replace(project / "nb_utils" / file, old, new)
    assert {stem for stem in ALL if code(stem) != before[stem]} == {sorted(ALL)[i] for i in changed}


def test_the_cells_of_a_notebook_count_but_neither_its_parameters_nor_its_prose(project):
    path, before = sources.maker("02_cleanup"), code("02_cleanup")
    edit(path, "parameters", "steps = 80", "steps = 60")
    edit(path, "measure-text", "## Measure", "## We measure")
    assert code("02_cleanup") == before
    edit(path, "prune", "for part in", "for one in")
    assert code("02_cleanup") != before


def test_a_name_is_followed_through_a_module_that_only_hands_it_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "nb_utils").mkdir()
    (tmp_path / "nb_utils/deep.py").write_text("X = 1\ndef f():\n    return X\ndef g():\n    return 2\nprint(X)\n")
    (tmp_path / "nb_utils/middle.py").write_text("from nb_utils.deep import f\n")
    (tmp_path / "script.py").write_text("from nb_utils import middle as m\nm.f()\n")
    found = sources.reached(tmp_path / "script.py")
    assert {"nb_utils.deep.f", "nb_utils.deep.X"} <= set(found) and "nb_utils.deep.g" not in found
    assert "print(X)" in found[f"nb_utils.deep.{sources.LOOSE}"]
