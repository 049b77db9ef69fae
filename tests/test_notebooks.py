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
from test_saes import random_saelens

from nb_utils import statistics
from nb_utils.record import tables
from workflow import grow, grown, runs, same, see, stale, visual

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "book/experiments").glob("*.ipynb"))
FINDINGS = sorted((ROOT / "book/findings").glob("*.ipynb"))
SNAKEFILE = (ROOT / "workflow/Snakefile").read_text()
# Experiments that bring their models, and a task of theirs.
OWN = {"23_visual_task_vectors": "rotate", "24_grown_vectors": "offset"}
ASSIGNED = {"25_instruct_vectors": "assistant"}  # those that run on no pairs of a word task
COMMON = ("task", "model", "sae_set", "layers", "tables_dir")
# A tiny run of every experiment, in the sizes of the sample that `make same` runs.
SAMPLE = yaml.safe_load(same.SETTINGS.read_text())
TINY = {"task": "antonyms", "model": "tiny", "sae_set": "shipped", "layers": "2,3"}
SIZES = SAMPLE["sizes"] | SAMPLE["models"]["tiny"]["every"]
# The least that can be asked of every list, on a task with sentences. Experiment 05 is of two blocks, which may be one.
SINGLE = {
    "task": "en_es", "layers": "3", "atoms": "4", "penalties": "1", "sizes": "4", "templates": "arrow", "seeds": 1,
    "first_cuts": "12", "longer": "8", "counts": "6", "mean_rates": "1", "refit_rates": "0.1", "dense_rates": "0.05",
    "rescued": "3,3", "sae_layers": "3", "swap_sizes": "4", "scales": 5, "n_pairs": "8", "places": "ff",
    "strengths": "0.1", "budgets": "0.3", "arrow_scales": "1", "factors": "1", "decays": "1",
    "shots": "2", "sets": "second_seed", "widths": "1024", "actives": "20",
}  # fmt: skip
TWICE = {"05_cross_task_steering": {"layers": "3,3", "most": "1,1"}}
# Prose is held to paths too: this finds folders at the root of a disk and ~/, not a fraction or a route.
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|mnt|data|opt|var)/|[A-Z]:\\\\|(?<!\w)~/")


def name(path):
    return f"{path.parent.name}/{path.stem}"


def read(path):
    return nbformat.read(path, as_version=4)


EXPLORE, START = ROOT / "book/explore.ipynb", ROOT / "book/start.ipynb"
every_notebook = pytest.mark.parametrize("path", [*EXPERIMENTS, *FINDINGS, EXPLORE, START], ids=name)
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
of_text = pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path.stem not in OWN], ids=name)


def test_each_experiment_has_its_finding_and_its_place_in_the_workflow():
    stems = [path.stem for path in EXPERIMENTS]
    assert stems, "there are no experiments"
    assert {stem[:2] for stem in stems} <= {path.stem[:2] for path in FINDINGS}
    listed = re.findall(r'^    "(\d\d_\w+)",$', SNAKEFILE, re.MULTILINE)
    assert sorted(listed) == stems and [stem[:2] for stem in listed] == sorted(stem[:2] for stem in stems)
    for stem, others in workflow_needs().items():
        assert all(listed.index(other) < listed.index(stem) for other in others), f"{stem} reads tables of later ones"
    assert set(OWN) == set(stems) & set(tables.OWN_MODELS)


@pytest.mark.parametrize("path", FINDINGS, ids=name)
def test_a_finding_shows_no_code_unasked_but_what_its_reader_is_to_change(path):
    for cell in (cell for cell in read(path).cells if cell.cell_type == "code" and not cell.id.startswith("try-")):
        assert {"hide-input", "remove-input"} & set(cell.metadata.get("tags", [])), cell.id


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


@pytest.mark.parametrize("path", FINDINGS, ids=name)
def test_a_finding_uses_the_ledgers_choices(path):
    """Which tasks count, and at which block a vector stands, is asked of `Book`, which the claims ask, too."""
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert not re.search(r"best_layer|statistics\.solved|survivors", source)


@every_experiment
def test_parameters_come_first_and_are_flat_scalars(path):
    first = next(cell for cell in read(path).cells if cell.cell_type == "code")
    assert first.metadata.get("tags") == ["parameters"]
    defaults = runs.known_parameters(path)
    assert set(COMMON if path.stem not in OWN else ("task", "tables_dir")) <= set(defaults)
    assert all(isinstance(value, str | int | float | bool) for value in defaults.values())


@of_text
def test_an_experiment_loads_as_all_do(path):
    """What every experiment loads stands once, in `scores.prepare`."""
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert len(re.findall(r"scores\.prepare(?:_exchanges)?\(task, model, (?:sae_set|None), (?:sae_)?layers", code)) == 1
    assert not re.search(r"models\.load|tasks\.split\(word|saes\.layers|scores\.repeated|\.fast\(\)", code)


@every_experiment
def test_settings_of_the_workflow_name_only_known_parameters(path):
    for size in ("book", "report"):
        settings = yaml.safe_load((ROOT / f"workflow/{size}.yaml").read_text())
        assert set(settings["parameters"].get(path.stem, {})) <= set(runs.known_parameters(path))
    for model, own in yaml.safe_load((ROOT / "workflow/models.yaml").read_text())["models"].items():
        assert set(own) <= {"every", "more_mb", *(other.stem for other in EXPERIMENTS)}, model
        given = own.get(path.stem, {}) if path.stem in OWN else own.get("every", {}) | own.get(path.stem, {})
        assert set(given) <= set(runs.known_parameters(path)), model


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
        read = asked("21_function_vectors", "features_at")
        read = asked("21_function_vectors", "layers") if read == ["all"] else read
        assert set(read) <= {*made} & {*asked("21_function_vectors", "layers")}, model
        for stem in ("10_necessity", "14_shots"):
            assert set(asked(stem, "layers")) <= {*made, *asked("04_detectors", "layers")}, model
        assert set(asked("10_necessity", "rescued")) <= set(asked("10_necessity", "layers")), model
        assert set(asked("12_places", "layers")) <= set(made), model
        assert set(asked("12_places", "sizes")) <= set(asked("02_cleanup", "sizes")), model
        assert set(asked("08_side_effects", "sizes")) <= set(asked("02_cleanup", "sizes")), model
        penalties = [float(penalty) for penalty in asked("02_cleanup", "penalties")]
        assert float(*asked("08_side_effects", "penalty")) in penalties, model
        for stem in (stem for stem, given in defaults.items() if "repeat_layers" in given):
            layers, repeated = (set(asked(stem, key)) for key in ("layers", "repeat_layers"))
            assert asked(stem, "seeds") == ["1"] or "all" in layers | repeated or repeated <= layers, (model, stem)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """Models that experiments bring, small and hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("grown")
        sizes = {"d_model": 16, "d_mlp": 16, "heads": 2, "batch": 4, "steps": 2, "stages": 1}
        grow.grow_all(grown.planned(SIZES["seeds"], ("offset",), **sizes), folder)
        see.see(visual.Spec(blocks=3, d_model=16, heads=2, batch=4, steps=2, stages=1), folder)
    return {"grown_dir": str(folder), "visual_dir": str(folder)}


@pytest.fixture(scope="module", autouse=True)
def controls(tmp_path_factory):
    """Two sets that the shipped one is held against, for the tiny model: one after each block."""
    home = tmp_path_factory.mktemp("saes")
    for name, layer in (("second_seed", 2), ("width_1024_l0_20", 3)):
        hook = f"blocks.{layer}.hook_resid_post"
        random_saelens(hook=hook, seed=layer).save_model(home / "controls/tiny" / name / hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NB_SAES", str(home))
        yield


def runner(folder, small_models, sizes=(), **asked):
    """Run an experiment on the tiny model, once, after those whose tables it reads; return the folder of tables."""
    needs, done = same.readers(), set()

    def run(stem):
        for other in needs.get(stem, []):
            run(other)
        if stem not in done:
            path = ROOT / f"book/experiments/{stem}.ipynb"
            known, given = runs.known_parameters(path), same.sizes(path, "tiny") | small_models | dict(sizes)
            small = {key: value for key, value in given.items() if key in known}
            tiny = {"task": OWN[stem]} if stem in OWN else TINY
            parameters = tiny | small | asked.get(stem, {}) | {"tables_dir": str(folder)}
            parameters |= {"task": ASSIGNED[stem]} if stem in ASSIGNED else {}
            runs.execute(path, parameters, folder / f"{stem}.ipynb", folder / f"{stem}.log")
            done.add(stem)
        return folder

    return run


@pytest.fixture(scope="module")
def forked_kernels(tmp_path_factory):
    """Kernels are forked from a warm parent, as the workflow has them: they import nothing anew."""
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "workflow.kernels", str(folder / "socket"), "--model", "tiny"]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as parent:
        deadline = time.monotonic() + 60
        while not (folder / "socket").exists():
            assert parent.poll() is None and time.monotonic() < deadline, "the parent of the kernels did not start"
            time.sleep(0.1)
        patch.setenv("NB_KERNELS", str(folder / "socket"))
        yield patch
        parent.stdin.close()


@pytest.fixture(scope="module")
def tables_of(tmp_path_factory, small_models, forked_kernels):
    return runner(tmp_path_factory.mktemp("tables"), small_models)


@pytest.fixture(scope="module")
def tables_again(tmp_path_factory, small_models, forked_kernels):
    """The same once more."""
    return runner(tmp_path_factory.mktemp("again"), small_models)


def workflow_needs():
    """Say which experiments read the tables of others."""
    return same.readers()


@of_text
def test_an_experiment_runs_on_the_tiny_model_and_saves_its_table(path, tables_of):
    task = ASSIGNED.get(path.stem, "antonyms")
    table = pd.read_parquet(tables_of(path.stem) / path.stem / f"tiny/{task}.parquet")
    assert set(table["layer"]) - {-1} == {2, 3}
    assert set(table["task"]) == {task}
    if "repeat_layers" in runs.known_parameters(path):
        assert table[table["layer"] >= 0].groupby("layer")["seed"].nunique().to_dict() == {2: 1, 3: SIZES["seeds"]}


@pytest.fixture(scope="module")
def single_tables_of(tmp_path_factory, small_models, forked_kernels):
    return runner(tmp_path_factory.mktemp("single"), small_models, SINGLE, **TWICE)


@of_text
def test_an_experiment_runs_with_one_layer_and_one_value_in_every_list(path, single_tables_of):
    listed = {name for name, value in runs.known_parameters(path).items() if "," in str(value)}
    assert listed <= {*SINGLE, *TWICE.get(path.stem, {}), "fixed_scale"}, "a new list: give it one value here"
    task = ASSIGNED.get(path.stem, "en_es")
    table = pd.read_parquet(single_tables_of(path.stem) / path.stem / f"tiny/{task}.parquet")
    whole = table[table["method"].ne("head")]  # of a map of heads, effects alone are told
    assert set(table["layer"]) - {-1} == {3} and len(whole) and whole["loss"].notna().all()


@every_experiment
def test_two_runs_with_one_seed_give_the_same_bytes(path, tables_of, tables_again):
    first, second = tables_of(path.stem), tables_again(path.stem)
    place = tables.OWN_MODELS.get(path.stem, "tiny")
    made = [table.relative_to(first) for table in first.glob(f"{path.stem}*/{place}/*.parquet")]
    assert made
    for table in made:
        assert (first / table).read_bytes() == (second / table).read_bytes(), f"{table} differs"


def asked_of(stem):
    """Name the settings of an experiment that pages and claims ask its tables for."""
    pages = [*sorted((ROOT / "book/findings").glob("*.ipynb")), *sorted((ROOT / "book/ledger/numbers").glob("*.py"))]
    text = "".join(page.read_text() for page in pages).replace('\\"', '"')
    return set(re.findall(rf'setting\("{stem}", "(\w+)"\)', text))


@every_experiment
def test_a_table_says_all_that_it_depends_on(path, tables_of):
    made = list(tables_of(path.stem).glob(f"{path.stem}*/{tables.OWN_MODELS.get(path.stem, 'tiny')}/*.parquet"))
    assert made
    for table in made:
        assert len(tables.load(table.parents[1].name, table.parent.name, str(table.parents[2])))  # as pages read it
        origin = tables.read_provenance(table)
        assert set(origin) == set(tables.PARTS)
        assert asked_of(path.stem) <= set(origin["parameters"])
        assert set(runs.known_parameters(path)) - set(stale.NOT_COMPARED) <= set(origin["parameters"])
        if path.stem in OWN:
            assert origin["model_sha256"] and origin["parameters"]["task"] == OWN[path.stem]
            continue
        text = {"text/neutral.json"} if "prompts.passages" in path.read_text() else set()
        text |= {f"{rival}.json" for rival in origin["parameters"].get("rivals", [])}
        saes = set() if "scores.prepare(task, model, None" in path.read_text() else {"2", "3"}
        of = f"exchanges of {ASSIGNED[path.stem]}.json" if path.stem in ASSIGNED else "antonyms.json"
        assert set(origin["data_sha256"]) == {of} | text and set(origin["sae_sha256"]) == saes
    read = {text for text in re.findall(r'"(\d\d_[a-z_]+)"', path.read_text().replace('\\"', '"'))}
    assert set(origin["inputs"]) == {stem for stem in read if not stem.startswith(path.stem)}


def test_grown_models_are_looked_at_everywhere_and_over_their_training(tables_of):
    folder = tables_of("24_grown_vectors")
    table, places, timeline, planes = (
        pd.read_parquet(folder / f"24_grown_vectors{part}/grown/offset.parquet")
        for part in ("", "_places", "_timeline", "_planes")
    )
    sorts = {(variant, seed) for variant in grown.MAIN for seed in range(SIZES["seeds"])}
    sorts |= {(variant, 0) for variant in grown.VARIANTS}
    for part in (table, places, timeline, planes):
        assert set(part[["variant", "seed"]].itertuples(index=False, name=None)) == sorts
    assert places[places["variant"].eq("deeper")].groupby(["layer", "position"]).size().to_dict() == {
        (layer, position): 1 for layer in range(6) for position in range(24)
    }
    assert set(timeline["step"]) == {2} and timeline["layer"].ge(0).any()
    cleaned = table[table["on"].eq("test")]
    assert set(cleaned["variant"]) == set(grown.MAIN)
    sizes = cleaned.groupby("method")["k"].apply(lambda one: sorted(set(one.dropna())))
    assert all(sizes[method] == [2, 4, 10] for method in ("largest_codes", "prune_contrast", "prune_random"))
    assert cleaned[cleaned["method"].eq("mean")]["cosine"].round(4).eq(1).all()


def test_visual_vectors_are_held_against_masks_alone_and_the_page_has_its_pictures(tables_of):
    folder = tables_of("23_visual_task_vectors")
    table, sites, latents, pictures, timeline = (
        pd.read_parquet(folder / f"23_visual_task_vectors{part}/grids/rotate.parquet")
        for part in ("", "_sites", "_latents", "_pictures", "_timeline")
    )
    under = table[table["on"].eq("test") & table["values"].notna()].groupby(["method", "values"])["of_task"].nunique()
    rivals = len(visual.rivals("rotate"))
    for mask in ("reward", "shared", "foreign"):
        assert under[mask].to_dict() == {"own": 0, "none": 0, "wrong": rivals}
    assert under["mask_alone"].to_dict() == {"none": 0}
    others = {"example", "none", "mean_answer", "gradient", "greedy", "causal", "random", "all", "learned_vector"}
    assert others <= set(table["method"])
    assert set(table[table["method"].eq("residual")]["layer"]) == {0, 1, 2}
    assert table.groupby("method")["losses"].apply(lambda one: {len(losses) for losses in one}).eq({4}).all()
    assert sites.groupby(["method", "seed"]).size().eq(10).all()  # of 3 blocks of 2 heads; 2 of the last at the query
    assert set(latents["tokens"]) <= set(visual.GROUPS) and set(latents["k"]) == {10, 4, 2}
    assert pictures["pixels"].map(len).eq(3 * visual.SIDE**2).all() and pictures["what"].nunique() == 12
    assert set(timeline["step"]) == {2}


def test_cleanup_tries_rates_and_crosses_data_and_start_where_it_has_every_seed(tables_of):
    table = pd.read_parquet(tables_of("02_cleanup") / "02_cleanup/tiny/antonyms.parquet")
    ways = ["clean_all", "clean_mean_codes", "clean_mean_codes_all", "prune_contrast_few"]
    crossed = table[table["method"].isin(ways)]
    assert crossed["method"].nunique() == len(ways) and set(crossed["layer"]) == {3} and set(crossed["seed"]) == {0}
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


def test_heads_and_latents_are_chosen_in_every_way_at_equal_numbers_and_with_every_control(tables_of):
    folder = tables_of("26_heads_by_reward")
    table, items = (pd.read_parquet(folder / f"26_heads_by_reward{part}/tiny/antonyms.parquet")
                    for part in ("", "_items"))  # fmt: skip
    ways = {"gradient", "effect", "attribution", "size", "random"}
    for kind, more in (("heads", {"swapped"}), ("latents", set())):
        found = table[table["method"].str.startswith(kind) & table["says"].eq("own")]
        mine = found[found["method"].eq(f"{kind}_reward") & found["which"].eq("own")].set_index(["layer", "seed"])["k"]
        alike = found[found["which"].eq("equal")].set_index(["layer", "seed"])
        assert set(alike["method"]) == {f"{kind}_{way}" for way in ways | more} and len(mine) == mine.index.nunique()
        assert mine.max() > 0 and (alike["k"] == mine.reindex(alike.index)).all()
        kept = items[items["kind"].eq(kind) & items["way"].eq("reward")].groupby(["layer", "seed"])["kept"].sum()
        assert kept.groupby("seed").sum().tolist() == mine.groupby("seed").sum().tolist()
    own = table[table["which"].eq("own")].groupby("method")["says"].agg(set)
    assert own["heads_reward"] == own["heads_foreign"] == {"own", "others", "wrong"}
    assert own["heads_mask_only"] == {"others"}


def test_dictionaries_are_those_that_are_here_and_untrained_ones_and_those_of_the_sweep_only_write(tables_of):
    folder = tables_of("11_dictionaries")
    table = pd.read_parquet(folder / "11_dictionaries/tiny/antonyms.parquet")
    quality = pd.read_parquet(folder / "11_dictionaries_quality/tiny/antonyms.parquet")
    untrained = {"orthonormal", "components", "unembedding"}
    here = {2: {"trained", "second_seed", *untrained}, 3: {"trained", "width_1024_l0_20", *untrained}}
    for layer, names in here.items():
        for part in (table, quality):
            assert set(part.loc[part["layer"] == layer, "dictionary"]) == names
    swept = table[table["dictionary"] == "width_1024_l0_20"]
    assert set(swept["kind"]) == {"vector"} and set(swept["method"]) >= {"clean", "prune_contrast", "reconstruct"}
    whole = table[table["dictionary"].isin(["trained", *untrained])]
    assert whole.groupby(["layer", "dictionary"])["kind"].nunique().eq(3).all()
    origin = tables.read_provenance(folder / "11_dictionaries/tiny/antonyms.parquet")
    assert "frozen_decoder" in origin["parameters"]["missing"] and "second_seed" not in origin["parameters"]["missing"]


def test_every_feature_is_tried_alone_beside_random_directions(tables_of):
    table = pd.read_parquet(tables_of("15_labels") / "15_labels/tiny/antonyms.parquet")
    tried = table[table["which"] == "best"]
    kept = pd.read_parquet(tables_of("02_cleanup") / "02_cleanup_features/tiny/antonyms.parquet")
    own = set(statistics.survivors(kept)[["layer", "latent"]].itertuples(index=False, name=None))
    found = tried[tried["in_clean"] & tried["kind"].eq("executor")]
    assert own and set(found[["layer", "latent"]].itertuples(index=False, name=None)) == own
    assert tried[tried["latent"] < 0].groupby(["kind", "layer"]).size().nunique() == 1


def test_in_context_vectors_run_on_a_behaviour_as_well(tmp_path):
    """The other tests run it on a word task; a behaviour has other measures, and sentences of another source."""
    path = ROOT / "book/experiments/22_in_context_vectors.ipynb"
    small = {key: value for key, value in SIZES.items() if key in runs.known_parameters(path)}
    asked = {"task": "register", "layers": "2", "n_test": 4, "seeds": 1, "tries": 8, "tables_dir": str(tmp_path)}
    given = TINY | small | asked
    runs.execute(path, given, tmp_path / "run.ipynb", tmp_path / "run.log")
    table = pd.read_parquet(tmp_path / path.stem / "tiny/register.parquet")
    steered = table[table["budget"].notna()]
    assert (steered["kl"] / steered["budget"]).between(0.9, 1.11).all(), "vectors of other costs are compared"
    assert set(table["kind"]) == {"behaviour"} and set(steered["place"]) == {"ff", "mlp", "resid", "block"}
    told = ["kl", "effect", "shift", "shift_elsewhere", "loss_y", "loss_x", "validation_loss"]
    assert steered[told].notna().all(axis=None)
    assert table.loc[table["place"].eq("arrow"), ["loss_y", "loss_x"]].notna().all(axis=None)


def test_every_way_stands_after_one_block_and_is_tried_everywhere(tables_of):
    table = pd.read_parquet(tables_of("29_which_vector") / "29_which_vector/tiny/antonyms.parquet")
    own, read_off = table[table["own"]], {"task_vector", "centred_best_scale", "theta_mean", "contrast_codes", "icv"}
    read_off |= {"fv_centred", "heads_added"}
    few, many = (set(own.loc[own["budget"].eq(budget), "method"]) for budget in (5, 100))
    assert few == read_off | {"few_shot"}
    trained = {"learned_vector", "clean", "prune_contrast", "heads_reward", "heads_gradient"}
    assert many == few | trained | {"matched_random"}
    poor = table[table["budget"].eq(5)]
    assert poor["gradients"].eq(0).all() and poor["pairs"].eq(5).all() and poor["seed"].nunique() == SIZES["seeds"]
    # How many heads there are is a setting; how many features or examples, another way.
    way = own.assign(size=own["k"].where(~own["method"].isin(["fv_centred", "heads_added"]), -1).fillna(-1))
    counted = way.groupby(["on", "budget", "method", "mode", "size", "seed"]).size()
    assert counted.eq(1).all() and set(own["on"]) == {"test", "template", "sentence", "text"}
    first = counted[counted.index.get_level_values("seed") == 0].unstack("on")
    assert first.notna().all(axis=None), "a way was not tried somewhere"
    text = own[own["on"].eq("text")]
    assert text["d_ntp"].notna().all() and text.loc[text["method"].eq("zero_shot"), "d_ntp"].abs().max() < 1e-4


def test_features_are_taken_away_beside_as_many_others_and_come_back_one_by_one(tables_of):
    table = pd.read_parquet(tables_of("10_necessity") / "10_necessity/tiny/antonyms.parquet")
    zeroed = table[table["mode"].eq("zero") & table["on"].eq("test")]
    whole = zeroed[zeroed["back"].eq(0)]
    assert {"own", "same_activation", "same_density", "most_active"} <= set(whole["method"])
    halves = whole[whole["method"].isin(["kept_by_most", "kept_by_few"])]
    number = whole.drop(halves.index).groupby(["kind", "blocks"])["features"]
    assert number.nunique().eq(1).all(), "a control is of another number than the features"
    both = halves.groupby(["kind", "blocks"])["features"].sum()
    assert len(both) and both.eq(number.first()[both.index]).all(), "most and few are not all"
    assert set(whole["together"]) == {1, 2} and set(table["on"]) == {"test", "other", "text"}
    back = zeroed[zeroed["layer"].eq(3) & zeroed["together"].eq(1) & zeroed["method"].eq("own")]
    for _, part in back.groupby("kind"):
        assert sorted(part["back"]) == list(range(len(part))) and part["features"].min() == 0


def test_a_long_prompt_stands_for_short_ones_and_a_rise_is_cut_in_two(tables_of):
    table, course, growth, sums = (
        pd.read_parquet(tables_of("14_shots") / f"14_shots{part}/tiny/antonyms.parquet")
        for part in ("", "_course", "_growth", "_sums")
    )
    held = table[table["method"].eq("task_vector") & table["place"].eq("arrow")]
    assert set(held["shots"]) == {0, 1, 2, 4} and set(table.loc[table["method"].eq("few_shot"), "shots"]) == {1, 2, 4}
    assert held["validation_loss"].notna().all()
    assert set(table["place"]) == {"none", "input", "arrow", "output", "newline"}
    seen = course.groupby("place")["seen"].agg(["min", "max"])
    assert seen.loc["arrow"].tolist() == [0, 4] and seen.loc["output"].tolist() == [1, 4]
    numbers = growth.groupby(["kind", "layer", "method"]).size().unstack()
    assert numbers["own"].equals(numbers["same_activation"].rename("own"))
    assert set(sums["guess"]) == {"shown", "others", "constant"} and sums["explained"].dropna().le(1 + 1e-6).all()
