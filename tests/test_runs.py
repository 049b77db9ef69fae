import json
import os
import signal
import subprocess
import sys
import time
from html import unescape

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from workflow import runs

PARAMETERS = 'task = "antonyms"\nlayers = "8,10"\nseed = 0\nlearning_rate = 0.01\nnormalise = True'


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook with parameters and the given last cell; return its path."""

    def write(last="print(task, layers, seed)", more=""):
        cells = [
            new_markdown_cell("# A run"),
            new_code_cell(f"{PARAMETERS}\n{more}", metadata={"tags": ["parameters"]}),
            new_code_cell(last),
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = tmp_path / "01_run.ipynb"
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return write


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_run_is_the_executed_copy_and_its_title_names_the_task(notebook, tmp_path):
    output, log = tmp_path / "out/antonyms.ipynb", tmp_path / "logs/antonyms.log"
    runs.execute(notebook(), {"task": "en_es", "seed": 3}, output, log)
    cells = nbformat.read(output, as_version=4).cells
    assert cells[0].source == "# A run: en_es"
    assert cells[-1].outputs[0].text == "en_es 8,10 3\n"
    assert left_in(output.parent) == ["antonyms.ipynb"]
    assert "en_es 8,10 3" in log.read_text()


def test_a_page_says_what_was_merged_of_a_task_and_which_saes_a_set_stood_for(notebook, tmp_path):
    rows = [[f"w{i}", f"v{i}"] for i in range(40)] + [["w0", "v0"], ["w1", "<b>"]]
    own = tmp_path / "own task.json"
    own.write_text(json.dumps({"title": "Own", "pairs": rows}))
    save = """
import pandas as pd
from nb_utils import tasks
from nb_utils.record import tables
used = dict(task=task, model=model, sae_set=sae_set)
origin = tables.provenance(used, "m", {8: "hub:a-release:layer_8/width_16k", 10: "0123456789abcdef"})
tables.save(pd.DataFrame({"loss": [1.0]}), "01_run", tasks.load(task).name, origin, folder=tables_dir, model=model)"""
    path = notebook(save, f'model = "tiny"\nsae_set = "shipped"\ntables_dir = {str(tmp_path / "tables")!r}')
    merged = "Entries that repeat an earlier input: 1 copy, dropped; 1 with other answers, accepted too."
    told = []
    for saes in ("shipped", "a-release"):
        runs.execute(path, {"task": str(own), "sae_set": saes}, tmp_path / "out/run.ipynb")
        heading, *more = nbformat.read(tmp_path / "out/run.ipynb", as_version=4).cells[0].source.split("\n\n")
        assert heading.startswith("# A run: Own ")
        told.append([*map(unescape, more)])
    saes = "SAEs of a-release: after block 8, a-release:layer_8/width_16k; after block 10, the one of hash 01234567."
    assert told == [[merged], [merged, saes]]


def test_an_unknown_parameter_is_refused_with_the_known_ones(notebook, tmp_path):
    with pytest.raises(runs.RunError, match=r"no parameter 'sead'; it knows task, layers, seed"):
        runs.execute(notebook(), {"sead": 1}, tmp_path / "out/run.ipynb")
    assert not (tmp_path / "out").exists()


def test_a_failed_run_keeps_its_copy_and_the_older_output(notebook, tmp_path):
    output = tmp_path / "out/run.ipynb"
    runs.execute(notebook(), {}, output)
    before = output.read_bytes()
    with pytest.raises(runs.RunError, match=r"^ZeroDivisionError: division by zero \(executed copy: .*\)$"):
        runs.execute(notebook("1 / 0"), {}, output)
    assert output.read_bytes() == before
    assert left_in(output.parent) == ["run.failed.ipynb", "run.ipynb"]
    assert "ZeroDivisionError" in (output.parent / "run.failed.ipynb").read_text()
    runs.execute(notebook(), {}, output)
    assert left_in(output.parent) == ["run.ipynb"]


def test_an_error_of_our_own_is_shown_as_its_message(notebook, tmp_path):
    own = "from nb_utils import tasks\ntasks.load('antonims')"
    with pytest.raises(runs.RunError, match=r"^There is no task 'antonims'\. Did you mean 'antonyms'\?"):
        runs.execute(notebook(own), {}, tmp_path / "run.ipynb")


def test_a_dead_kernel_fails_the_run(notebook, tmp_path):
    deadly = notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(runs.RunError, match="kernel died"):
        runs.execute(deadly, {}, tmp_path / "run.ipynb")
    assert (tmp_path / "run.failed.ipynb").exists() and not (tmp_path / "run.ipynb").exists()


def test_a_killed_run_leaves_nothing_that_looks_finished(notebook, tmp_path):
    output, started = tmp_path / "out/run.ipynb", tmp_path / "started"
    slow = notebook(f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)")
    command = [sys.executable, "-m", "workflow.runs", str(slow), "-o", str(output)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert started.exists()
    assert all(name.startswith(".") for name in left_in(output.parent))
    runs.execute(notebook(), {}, output)
    assert output.exists()


@pytest.mark.parametrize(
    "name, text, value",
    [("layers", "8", "8"), ("seed", "7", 7), ("learning_rate", "1", 1.0), ("normalise", "false", False)],
)
def test_words_of_the_command_line_take_the_type_of_the_default(notebook, name, text, value):
    typed = runs._typed(name, text, runs.known_parameters(notebook())[name])
    assert typed == value and type(typed) is type(value)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("missing.ipynb",), "There is no notebook missing.ipynb."),
        (("{}", "-p", "seed", "many"), "Parameter 'seed' needs a value like 0, not 'many'."),
        (("{}", "-p", "taks", "antonyms"), "has no parameter 'taks'"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(notebook, tmp_path, capsys, words, complaint):
    words = [word.format(notebook()) for word in words]
    assert runs.main([*words, "-o", str(tmp_path / "out.ipynb")]) == 1
    errors = capsys.readouterr().err
    assert complaint in errors and errors.count("\n") == 1


def test_the_command_refuses_a_file_that_is_no_notebook(tmp_path, capsys):
    (tmp_path / "01.ipynb").write_text("no notebook")
    assert runs.main([str(tmp_path / "01.ipynb"), "-o", str(tmp_path / "out.ipynb")]) == 1
    assert "is not a notebook" in capsys.readouterr().err


def test_a_notebook_without_a_kernel_runs_and_braces_in_a_path_are_braces(notebook, tmp_path):
    path = notebook()
    bare = nbformat.read(path, as_version=4)
    bare.metadata.clear()
    bare_path = tmp_path / "{task} {x}.ipynb"
    nbformat.write(bare, bare_path)
    output = tmp_path / "{seed}/{task}.ipynb"
    runs.execute(bare_path, {"task": "en_es"}, output)
    assert left_in(output.parent) == ["{task}.ipynb"]


def test_parameters_that_are_not_python_are_named(notebook):
    path = notebook()
    broken = nbformat.read(path, as_version=4)
    broken.cells[1].source = "task = 1\n2 +"
    nbformat.write(broken, path)
    with pytest.raises(runs.RunError, match=r"01_run.ipynb: line 2 of its parameters is not Python\.$"):
        runs.known_parameters(path)


def test_a_log_that_cannot_be_written_is_named(notebook, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match=r"^The log \S+/file/run.log could not be written"):
        runs.execute(notebook(), {}, tmp_path / "out/run.ipynb", tmp_path / "file/run.log")


def test_ctrl_c_ends_a_run_with_one_line(notebook, tmp_path):
    started = tmp_path / "started"
    slow = notebook(f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)")
    command = [sys.executable, "-m", "workflow.runs", str(slow), "-o", str(tmp_path / "out/run.ipynb")]
    process = subprocess.Popen([*command, "--log", str(tmp_path / "log")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "01_run · run: stopped, and nothing of it is kept\n"
    assert left_in(tmp_path / "out") == []


OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("terminal, task", [({"PYTHONIOENCODING": "ascii"}, "日本"), (OLD, "en_es")])
def test_a_terminal_without_the_characters_shows_question_marks(notebook, tmp_path, terminal, task):
    if terminal is OLD and not sys.prefix.isascii():
        pytest.skip("with this locale Python itself cannot start from a folder of such a name; make gives it another")
    command = [sys.executable, "-m", "workflow.runs", str(notebook()), "-p", "task", task]
    command += ["-o", str(tmp_path / "out/run.ipynb"), "--log", str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **terminal})
    assert done.returncode == 0 and done.stdout.startswith(b"01_run ? ") and b"Traceback" not in done.stderr
