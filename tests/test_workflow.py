"""The Snakefile, on notebooks that take no time: what fails is named, what is done stays done."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nb_utils.record import sources, tables
from nb_utils.record.tables import OWN_MODELS
from workflow import stale

ROOT = Path(__file__).resolve().parents[1]
SNAKEFILE = (ROOT / "workflow/Snakefile").read_text()
EVERYTHING = re.findall(r'^    "(\d\d_\w+)",$', SNAKEFILE, re.MULTILINE)
TWO = ("antonyms", "en_es")
# Those that read tables of the same task, of every task, and of none.
SAME, EVERY = (
    list(ast.literal_eval(line)) for line in re.findall(r"^(?:SAME|EVERY)_TASK = (.+)$", SNAKEFILE, re.MULTILINE)
)
# Those that have a list of tasks of their own.
OWN = ast.literal_eval(re.search(r"^OWN_TASKS = (\{.*?^\})", SNAKEFILE, re.MULTILINE | re.DOTALL)[1])
# Those that run on any model, and on the tasks that are asked for here.
STEMS = [stem for stem in EVERYTHING if stem not in OWN_MODELS and {*TWO} <= {*OWN.get(stem, TWO)}]
# Of every sort some: each run takes a kernel and seconds, and the Snakefile treats those of a sort alike.
SOME = [stem for stem in STEMS if int(stem[:2]) in (1, 2, 4, 5, 6, 8, 15)]
EVERY = [stem for stem in EVERY if stem in SOME]
FIRST = [stem for stem in SOME if stem not in [*SAME, *EVERY]]
SAME = [stem for stem in SAME if stem in SOME and stem not in EVERY]  # what reads both waits for every task
assert len(FIRST) > 1 and len(SAME) > 1 and len(EVERY) > 1
PARAMETERS = 'task = ""\nmodel = ""\nsae_set = ""\ntables_dir = ""\nseed = 0'
SAVE = """from pathlib import Path
if Path(f"fail-{task}").exists():
    raise ValueError("not today")
if Path("slow").exists():
    Path("started").touch()
    __import__("time").sleep(60)
with Path("parents").open("a") as file:
    print(__import__("os").getppid(), file=file)
with Path("budgets").open("a") as file:
    print(__import__("os").environ["NB_BYTE_BUDGET"], file=file)
table = Path(tables_dir, STEM, model, f"{task}.parquet")
table.parent.mkdir(parents=True, exist_ok=True)
table.touch()"""


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    for settings in tmp_path.glob("workflow/*.yaml"):  # these import nothing, and have no sizes
        settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | {"parameters": {}, "forked": False}))
    (tmp_path / "book/experiments").mkdir(parents=True)
    for stem in EVERYTHING:
        own = OWN_MODELS.get(stem, "")
        cells = [
            new_markdown_cell(f"# {stem}"),
            new_code_cell(PARAMETERS.replace('model = ""', f'model = "{own}"'), metadata={"tags": ["parameters"]}),
            new_code_cell(SAVE.replace("STEM", repr(stem))),
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, tmp_path / f"book/experiments/{stem}.ipynb")
    return tmp_path


def command(project, *more, tasks="antonyms,en_es"):
    return [
        Path(sys.executable).with_name("snakemake"), "--snakefile", project / "workflow/Snakefile",
        "--directory", project, "--profile", project / "workflow/profiles/local", "--cores", "2",
        "--config", "size=book", f"experiments={','.join(SOME)}", "model=tiny", f"tasks={tasks}", *more,
    ]  # fmt: skip


def make(project, *more, **settings):
    """Run the workflow; return its exit code, what it says, and the runs that it started."""
    done = subprocess.run(command(project, *more, **settings), capture_output=True, text=True, cwd=project)
    said = done.stdout + done.stderr
    return done.returncode, said, sorted(re.findall(r"(\d\d_\w+ · \w+): running", said))


def runs_of(*tasks, stems=SOME):
    return sorted(f"{stem} · {task}" for stem in stems for task in tasks)


def test_a_failed_task_is_named_stops_no_other_and_is_all_that_the_next_call_redoes(project):
    (project / "fail-en_es").touch()
    code, said, started = make(project)
    assert code != 0 and started == sorted(runs_of("antonyms", "en_es", stems=FIRST) + runs_of("antonyms", stems=SAME))
    assert f"Failed: {', '.join(runs_of('en_es', stems=FIRST))}." in said and "not today" in said
    code, said, started = make(project)
    assert code != 0 and f"{', '.join(EVERY)} wait for the tables of every task" in said
    assert started == runs_of("en_es", stems=FIRST)
    (project / "fail-en_es").unlink()
    assert make(project)[::2] == (0, sorted(runs_of("en_es") + runs_of("antonyms", stems=EVERY)))
    os.utime(project / f"book/experiments/{STEMS[0]}.ipynb")  # what git does to a file it did not change
    assert make(project)[::2] == (0, [])
    (project / f"results/runs/tables/{STEMS[0]}/tiny/antonyms.parquet").unlink()
    assert make(project)[::2] == (0, [f"{STEMS[0]} · antonyms"])


def test_other_parameters_run_again_and_a_failure_keeps_the_finished_run(project):
    assert make(project, tasks="antonyms")[0] == 0
    run = project / f"results/runs/{STEMS[0]}/tiny/antonyms.ipynb"
    before = run.read_bytes()
    (project / "fail-antonyms").touch()
    for _ in range(2):
        first = runs_of("antonyms", stems=FIRST)
        assert make(project, "sae_set=other", tasks="antonyms")[::2] == (1, first)
    assert run.read_bytes() == before


def test_experiments_go_by_number_or_part_and_bring_along_those_that_they_read(project):
    assert make(project, "experiments=8", tasks="antonyms")[::2] == (
        0, ["02_cleanup · antonyms", "08_side_effects · antonyms"])  # fmt: skip
    post = [f"{stem} · antonyms" for stem in STEMS[:5] if stem != "02_cleanup"]
    assert make(project, "experiments=post", tasks="antonyms")[::2] == (0, post)
    numbers = dict.fromkeys(str(int(stem[:2])) for stem in EVERYTHING)
    heads = ["21_heads · antonyms"]
    assert make(project, "experiments=21_heads", tasks="antonyms")[::2] == (0, heads)
    assert make(project, "experiments=21", tasks="antonyms")[::2] == (0, ["21_function_vectors · antonyms"])
    code, said, started = make(project, "experiments=6,99", tasks="antonyms")
    assert code != 0 and not started and "Traceback" not in said
    assert f"Nothing was run. There is no experiment '99': EXPERIMENTS takes {', '.join(numbers)} with commas" in said


def test_an_experiment_with_tasks_of_its_own_runs_on_these_and_leaves_the_others_alone(project):
    """A behaviour is no task of words, and `en_fr` is not among those that the experiment of behaviours runs on."""
    stem = "22_in_context_vectors"
    names = OWN[stem]
    both = "experiments=1,22"
    started = [f"{STEMS[0]} · en_fr", f"{stem} · register"]
    assert make(project, both, tasks="register,en_fr")[::2] == (0, started)
    pairs = [{"input": f"x{i}", "output": f"y{i}"} for i in range(20)]
    mine = project / "mine.json"
    mine.write_text(json.dumps({"kind": "behaviour", "markers": ["thou"], "pairs": pairs}))
    code, said, _ = make(project, both, tasks=mine)
    assert code == 0 and re.findall(r"(\d\d_\w+) · .+: running", said) == [stem]
    code, said, started = make(project, "experiments=22", tasks="en_fr")
    assert code != 0 and not started and "Traceback" not in said
    assert f"Nothing was run. {stem} runs on {', '.join(names)}: let TASKS name some of these." in said


def test_exchanges_of_a_user_go_to_the_experiment_of_exchanges_alone(project):
    stem, mine = "25_instruct_vectors", project / "mine.json"
    rows = [{"topic": f"t{i % 8}", "question": f"What is {i}?", "answer": f"It is {i}."} for i in range(24)]
    mine.write_text(json.dumps(rows))
    code, said, _ = make(project, "experiments=1,25", tasks=f"assistant,{mine}")
    assert code == 0 and re.findall(r"(\d\d_\w+) · .+: running", said) == [stem, stem]
    mine.write_text(json.dumps([*rows[:-1], rows[-1] | {"answer": " "}]))
    code, said, started = make(project, "experiments=25", tasks=mine)
    assert code != 0 and not started and "Traceback" not in said
    assert 'entry 24 (input "What is 23?"): the answer must be a non-empty string' in said


def test_an_experiment_that_brings_its_models_runs_whatever_model_is_asked_for(project):
    stem, task = "24_grown_vectors", "offset"
    asked = {"tasks": f"{task},table"}
    assert make(project, "experiments=24", **asked)[::2] == (0, [f"{stem} · {task}", f"{stem} · table"])
    assert make(project, "experiments=24", "model=other", **asked)[::2] == (0, [])
    (project / "grown/offset/plain.0").mkdir(parents=True)
    (project / "grown/offset/plain.0/card.json").write_text("{}")
    assert make(project, "experiments=24", **asked)[::2] == (0, [f"{stem} · {task}"])
    (project / f"results/runs/tables/{stem}/{OWN_MODELS[stem]}/table.parquet").unlink()
    assert make(project, "experiments=24", **asked)[::2] == (0, [f"{stem} · table"])


def save(project, stem, task, **changes):
    """Save a table such as today's code would, for the settings of the report."""
    settings = stale._defaults(sources.maker(stem), "tiny") | {"task": task, "model": "tiny"} | changes
    folder = project / "results/runs/tables"
    tables.save(pd.DataFrame({"task": [task]}), stem, task, tables.provenance(settings, "", {}), folder, "tiny")


def test_only_what_is_stale_or_reads_what_is_made_anew_is_run(project, monkeypatch):
    monkeypatch.setenv("BOOK_ONLY", "stale")
    for stem in SOME:
        save(project, stem, "antonyms")
        save(project, stem, "en_es")
    assert make(project)[::2] == (0, [])
    save(project, "06_training_prompts", "en_es", steps=7)
    save(project, "01_reconstruction_loss_more", "en_es")  # a table that the other task lacks
    again = ["01_reconstruction_loss · antonyms", "06_training_prompts · en_es"]
    assert make(project)[::2] == (0, again)
    (project / "results/runs/tables/02_cleanup/tiny/en_es.parquet").unlink()
    code, said, started = make(project, "experiments=2,4,5")
    steered = runs_of("antonyms", "en_es", stems=["05_cross_task_steering"])
    assert (code, started) == (0, sorted(["02_cleanup · en_es", "04_detectors · en_es", *steered])), said
    monkeypatch.setenv("BOOK_ONLY", "fresh")
    code, said, started = make(project)
    assert code != 0 and not started and "Traceback" not in said
    assert "Nothing was run. ONLY is 'fresh': leave it out, or set it to stale." in said


def test_make_book_runs_the_experiments_of_the_post_and_make_report_all_of_them():
    asked = {size: yaml.safe_load((ROOT / f"workflow/{size}.yaml").read_text()) for size in ("book", "report")}
    assert {size: one["experiments"] for size, one in asked.items()} == {"book": "post", "report": "all"}


def test_a_killed_workflow_goes_on(project):
    (project / "slow").touch()
    process = subprocess.Popen(command(project), cwd=project, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (project / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (project / "slow").unlink()
    assert (project / "started").exists() and not list(project.glob("results/runs/*/*/[!.]*"))
    subprocess.run([*command(project), "--unlock"], check=True, capture_output=True, cwd=project)
    assert make(project)[::2] == (0, runs_of("antonyms", "en_es"))


def test_all_kernels_are_forked_from_one_parent_that_ends_with_the_workflow(project):
    every = ("forked=True", "experiments=all")
    assert make(project, *every, tasks="antonyms")[::2] == (0, runs_of("antonyms", stems=STEMS))
    parents = (project / "parents").read_text().split()
    assert len(parents) == len(STEMS) and len(set(parents)) == 1
    deadline = time.monotonic() + 60
    while (parent := Path("/proc", parents[0])).exists():
        assert time.monotonic() < deadline, f"{parent} outlives the workflow"
        time.sleep(0.1)


def test_an_unknown_task_is_named_before_anything_runs(project):
    code, said, started = make(project, tasks="antonims")
    assert code != 0 and not started
    assert "Nothing was run. There is no task 'antonims'." in said and "Traceback" not in said


def test_a_second_call_in_the_same_folder_runs_nothing_and_says_why(project):
    (project / ".snakemake").mkdir()
    with FileLock(project / ".snakemake/book.lock"):  # what a call holds as long as it lives
        code, said, started = make(project, tasks="antonyms")
    assert code != 0 and not started
    assert "Nothing was run. Another call is running experiments in this folder" in said and "Traceback" not in said


def test_batches_fit_the_memory_of_a_run_and_too_little_is_one_sentence(project, monkeypatch):
    monkeypatch.delenv("NB_BYTE_BUDGET", raising=False)
    needs = yaml.safe_load((ROOT / "workflow/needs.yaml").read_text())["needs"]
    runs = [needs[stem] for stem in STEMS if stem in needs]
    assert runs and all(4000 / 2 < run["mem_mb"] <= 4000 for run in runs)  # MEMORY=4G: one at a time

    def given(memory, task):
        (project / "budgets").unlink(missing_ok=True)
        more = ("--resources", f"mem={memory}", "--until", f"run_{STEMS[0]}")
        code, said, started = make(project, *more, tasks=task)
        assert (code, started) == (0, runs_of(task, stems=STEMS[:1])), said
        return int((project / "budgets").read_text())

    assert given("4G", "antonyms") == 1 << 28
    assert given(f"{max(run['mem_mb'] for run in runs) - 100}M", "en_es") == (1 << 28) - 100 * 10**6
    code, said, started = make(project, "--resources", "mem=2G", tasks="en_fr")
    assert code != 0 and not started and "Traceback" not in said
    assert re.search(r"Nothing was run. \w+ needs \d.\d GB of memory for tiny, and MEMORY allows 2.0 GB: give it", said)


@pytest.mark.parametrize("size", ["book", "report"])
def test_no_setting_is_empty_as_no_run_would_get_it(size):
    given = yaml.safe_load((ROOT / f"workflow/{size}.yaml").read_text())["parameters"]
    assert all(str(value).strip() for settings in given.values() for value in settings.values())
