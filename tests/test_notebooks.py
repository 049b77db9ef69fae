"""Laws of the stored notebooks, and every experiment run on the tiny model."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from nb_utils.record import tables
from workflow import runs, stale

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "book/experiments").glob("*.ipynb"))
FINDINGS = sorted((ROOT / "book/findings").glob("*.ipynb"))
COMMON = ("task", "model", "sae_set", "layers", "tables_dir")
# A tiny run of every experiment: the parameters that all share, and sizes for those that an experiment has.
TINY = {"task": "antonyms", "model": "tiny", "sae_set": "shipped", "layers": "2,3"}
SIZES = {
    "n_prompts": 4, "n_shots": 4, "n_train": 8, "n_validation": 6, "n_test": 8, "n_sentences": 4, "seeds": 2,
    "atoms": "2,4,8", "penalties": "1,3", "penalty": 1.0, "sizes": "10,4,2", "steps": 6, "steps_a_stage": 2,
    "scales": 5, "coarse": 3, "n_others": 3, "n_text": 6, "following": 5, "templates": "arrow,question",
    "repeat_layers": "3", "longer": "8", "first_cuts": "12", "often": 12, "rescued": "3,3",
    "mean_rates": "1,2", "refit_rates": "0.05,0.1", "dense_rates": "0.02,0.05",
}  # fmt: skip
# Prose is held to paths too: this finds folders at the root of a disk and ~/, not a fraction or a route.
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|mnt|data|opt|var)/|[A-Z]:\\\\|(?<!\w)~/")


def name(path):
    return f"{path.parent.name}/{path.stem}"


def read(path):
    return nbformat.read(path, as_version=4)


EXPLORE = ROOT / "book/explore.ipynb"
every_notebook = pytest.mark.parametrize("path", [*EXPERIMENTS, *FINDINGS, EXPLORE], ids=name)
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=name)


def test_each_experiment_has_its_finding_and_its_place_in_the_workflow():
    stems = [path.stem for path in EXPERIMENTS]
    assert stems, "there are no experiments"
    assert set(stems) <= {path.stem for path in FINDINGS}
    snakefile = (ROOT / "workflow/Snakefile").read_text()
    assert re.findall(r'^    "(\d\d_\w+)",$', snakefile, re.MULTILINE) == stems


@every_notebook
def test_a_stored_notebook_is_valid_and_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"{cell.id}: clear the outputs"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_a_notebook_has_one_title_and_it_comes_first(path):
    cells = read(path).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"^# .+", prose, re.MULTILINE) == [cells[0].source.splitlines()[0]]


@every_notebook
def test_cells_have_readable_names_and_at_most_25_lines(path):
    for cell in read(path).cells:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cell.id), cell.id
        assert not re.fullmatch("[0-9a-f]{8,}", cell.id), f"{cell.id} is no name"
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 25, cell.id


@every_notebook
def test_a_notebook_holds_no_absolute_path_star_import_or_path_edit(path):
    for cell in read(path).cells:
        assert not ABSOLUTE.search(cell.source), f"{cell.id}: absolute path"
        if cell.cell_type == "code":
            assert "sys.path" not in cell.source and "autoreload" not in cell.source, cell.id
            source = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
            for node in ast.walk(ast.parse(source)):
                assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), cell.id


@pytest.mark.parametrize("path", [*FINDINGS, EXPLORE], ids=name)
def test_a_finding_reads_tables_and_never_imports_torch(path):
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert not re.search(r"\b(torch|transformer_lens|sae_lens)\b", source)
    assert "tables" in source


@every_experiment
def test_parameters_come_first_and_are_flat_scalars(path):
    first = next(cell for cell in read(path).cells if cell.cell_type == "code")
    assert first.metadata.get("tags") == ["parameters"]
    defaults = runs.known_parameters(path)
    assert set(COMMON) <= set(defaults)
    assert all(isinstance(value, str | int | float | bool) for value in defaults.values())


@every_experiment
def test_settings_of_the_workflow_name_only_known_parameters(path):
    for size in ("book", "report"):
        settings = yaml.safe_load((ROOT / f"workflow/{size}.yaml").read_text())
        assert set(settings["parameters"].get(path.stem, {})) <= set(runs.known_parameters(path))
    for model, own in yaml.safe_load((ROOT / "workflow/models.yaml").read_text())["models"].items():
        assert set(own) <= {"every", "more_mb", *(other.stem for other in EXPERIMENTS)}, model
        assert set(own.get("every", {}) | own.get(path.stem, {})) <= set(runs.known_parameters(path)), model


@pytest.mark.parametrize("size", ["book", "report"])
def test_settings_of_the_workflow_ask_of_an_experiment_only_what_those_before_it_make(size):
    """The tiny runs share their layers, so they cannot find that an experiment looks for vectors after other ones."""
    settings = yaml.safe_load((ROOT / f"workflow/{size}.yaml").read_text())["parameters"]
    models = yaml.safe_load((ROOT / "workflow/models.yaml").read_text())["models"]
    defaults = {path.stem: runs.known_parameters(path) for path in EXPERIMENTS}
    for model, own in {"the default": {}, **models}.items():

        def asked(stem, key, own=own):
            given = {**defaults[stem], **settings.get(stem, {}), **own.get("every", {}), **own.get(stem, {})}
            return str(given[key]).split(",")

        executors, detectors = asked("05_cross_task_steering", "layers")
        made = asked("02_cleanup", "layers")
        assert {executors, *asked("08_side_effects", "layers")} <= set(made), model
        assert detectors in asked("04_detectors", "layers"), model
        assert set(asked("10_necessity", "layers")) <= {*made, *asked("04_detectors", "layers")}, model
        assert set(asked("10_necessity", "rescued")) <= set(asked("10_necessity", "layers")), model
        assert set(asked("08_side_effects", "sizes")) <= set(asked("02_cleanup", "sizes")), model
        penalties = [float(penalty) for penalty in asked("02_cleanup", "penalties")]
        assert float(*asked("08_side_effects", "penalty")) in penalties, model
        for stem in (stem for stem, given in defaults.items() if "repeat_layers" in given):
            layers, repeated = (set(asked(stem, key)) for key in ("layers", "repeat_layers"))
            assert asked(stem, "seeds") == ["1"] or "all" in layers | repeated or repeated <= layers, (model, stem)


def runner(folder):
    """Run an experiment on the tiny model, once, after those whose tables it reads; return the folder of tables."""
    needs, done = workflow_needs(), set()

    def run(stem):
        for other in needs.get(stem, []):
            run(other)
        if stem not in done:
            path = ROOT / f"book/experiments/{stem}.ipynb"
            small = {key: value for key, value in SIZES.items() if key in runs.known_parameters(path)}
            parameters = TINY | small | {"tables_dir": str(folder)}
            runs.execute(path, parameters, folder / f"{stem}.ipynb", folder / f"{stem}.log")
            done.add(stem)
        return folder

    return run


@pytest.fixture(scope="module")
def tables_of(tmp_path_factory):
    return runner(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def tables_again(tmp_path_factory):
    """The same once more, in kernels that are forked from a warm parent, as the workflow has them."""
    folder = tmp_path_factory.mktemp("again")
    command = [sys.executable, "-m", "workflow.kernels", str(folder / "socket"), "--model", "tiny"]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as parent:
        patch.setenv("NB_KERNELS", str(folder / "socket"))
        deadline = time.monotonic() + 60
        while not (folder / "socket").exists():
            assert parent.poll() is None and time.monotonic() < deadline, "the parent of the kernels did not start"
            time.sleep(0.1)
        yield runner(folder)
        parent.stdin.close()


def workflow_needs():
    """Read from the Snakefile which experiments read the tables of others."""
    snakefile = (ROOT / "workflow/Snakefile").read_text()
    found = [ast.literal_eval(line) for line in re.findall(r"^(?:SAME|EVERY)_TASK = (.+)$", snakefile, re.MULTILINE)]
    assert len(found) == 2
    return found[0] | found[1]


@every_experiment
def test_an_experiment_runs_on_the_tiny_model_and_saves_its_table(path, tables_of):
    table = pd.read_parquet(tables_of(path.stem) / path.stem / "tiny/antonyms.parquet")
    assert set(table["layer"]) - {-1} == {2, 3}
    assert set(table["task"]) == {"antonyms"}
    if "repeat_layers" in runs.known_parameters(path):
        assert table[table["layer"] >= 0].groupby("layer")["seed"].nunique().to_dict() == {2: 1, 3: SIZES["seeds"]}


@every_experiment
def test_two_runs_with_one_seed_give_the_same_bytes(path, tables_of, tables_again):
    first, second = tables_of(path.stem), tables_again(path.stem)
    made = [table.relative_to(first) for table in first.glob(f"{path.stem}*/tiny/*.parquet")]
    assert made
    for table in made:
        assert (first / table).read_bytes() == (second / table).read_bytes(), f"{table} differs"


@every_experiment
def test_a_table_says_all_that_it_depends_on(path, tables_of):
    for table in tables_of(path.stem).glob(f"{path.stem}*/tiny/*.parquet"):
        origin = tables.read_provenance(table)
        assert set(origin) == set(tables.PARTS)
        assert set(runs.known_parameters(path)) - set(stale.NOT_COMPARED) <= set(origin["parameters"])
        text = {"text/neutral.json"} if "prompts.passages" in path.read_text() else set()
        assert set(origin["data_sha256"]) == {"antonyms.json"} | text and set(origin["sae_sha256"]) == {"2", "3"}
    read = {text for text in re.findall(r'"(\d\d_[a-z_]+)"', path.read_text().replace('\\"', '"'))}
    assert set(origin["inputs"]) == {stem for stem in read if not stem.startswith(path.stem)}


def test_cleanup_tries_rates_and_crosses_data_and_start_where_it_has_every_seed(tables_of):
    table = pd.read_parquet(tables_of("02_cleanup") / "02_cleanup/tiny/antonyms.parquet")
    crossed = table[table["method"].isin(["clean_all", "clean_mean_codes", "clean_mean_codes_all", "prune_contrast_few"])]
    assert crossed["method"].nunique() == 4 and set(crossed["layer"]) == {3} and set(crossed["seed"]) == {0}
    swept = {"prune_contrast": "refit_rates", "learned_vector": "dense_rates", "clean_mean_codes": "mean_rates"}
    for method, rates in swept.items():
        tried = {float(rate) for rate in SIZES[rates].split(",")}
        assert set(table.loc[table["method"] == method, "rate"]) <= tried, method
    tuned = table[table["choice_loss"].notna() & (table["on"] == "test")]
    assert tuned[["train_loss", "validation_loss"]].notna().all(axis=None)


def test_steering_has_as_many_controls_of_each_sort_as_features(tables_of):
    folder = tables_of("05_cross_task_steering")
    table = pd.read_parquet(folder / "05_cross_task_steering_controls/tiny/antonyms.parquet")
    drawn = table[table["control"] != "none"]
    numbers = drawn.groupby(["kind", "control"])["latent"].nunique().unstack()
    assert set(numbers) == {"feature", "matched", "active", "direction"} and numbers.loc["executor", "feature"] > 1
    assert numbers.nunique(axis=1).eq(1).all() and drawn["validation_loss"].notna().all()


def test_the_illusion_test_holds_every_support_at_every_budget(tables_of):
    table = pd.read_parquet(tables_of("07_illusion") / "07_illusion_budgets/tiny/antonyms.parquet")
    assert set(table["budget"]) == {SIZES["steps"], int(SIZES["longer"])} and set(table["seed"]) == {0}
    assert table.groupby(["layer", "method", "k"], dropna=False)["budget"].nunique().eq(2).all()


def test_features_are_taken_away_beside_as_many_others_and_come_back_one_by_one(tables_of):
    table = pd.read_parquet(tables_of("10_necessity") / "10_necessity/tiny/antonyms.parquet")
    zeroed = table[table["mode"].eq("zero") & table["on"].eq("test")]
    whole = zeroed[zeroed["back"].eq(0)]
    assert {"own", "same_activation", "same_density", "most_active"} <= set(whole["method"])
    assert whole.groupby(["kind", "blocks"])["features"].nunique().eq(1).all()
    assert set(whole["together"]) == {1, 2} and set(table["on"]) == {"test", "other", "text"}
    back = zeroed[zeroed["layer"].eq(3) & zeroed["together"].eq(1) & zeroed["method"].eq("own")]
    for _, part in back.groupby("kind"):
        assert sorted(part["back"]) == list(range(len(part))) and part["features"].min() == 0
