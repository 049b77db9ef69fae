"""Kernels forked from the warm parent: the same results, nothing left over, and a kernel of its own where it fails."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from workflow import runs

ROOT = Path(__file__).resolve().parents[1]
LOOK = """import os, sys, pandas as pd, torch, matplotlib.pyplot as plt
from nb_utils import engine, models, prompts, tasks
print("parent", os.getppid(), "warm" if models._KEPT else "cold")"""
COMPUTE = """lm = models.load("tiny")
site = engine.Site.prepare(lm, prompts.zero_shot(lm.tokenizer, tasks.load("antonyms").pairs[:4]))
scores = site.evaluate(torch.randn(3, lm.d_model, generator=torch.Generator().manual_seed(0)), 2)
scores.nll.tolist(), os.getcwd(), torch.get_num_threads(), __name__, sys.argv[0].rpartition("/")[2][:18]"""
PLOT = "plt.plot([1, 2]);"
SOIL = """print("clean" if not hasattr(engine, "soiled") and "mark" not in os.environ else "soiled")
engine.soiled = os.environ["mark"] = "yes"
lm.hf.lm_head.weight.zero_();"""


@pytest.fixture
def notebook(tmp_path):
    def write(*cells):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        first = [new_markdown_cell("# A run"), new_code_cell("seed = 0", metadata={"tags": ["parameters"]})]
        whole = new_notebook(cells=first + [new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel})
        nbformat.write(whole, tmp_path / "01_run.ipynb")
        return tmp_path / "01_run.ipynb"

    return write


@pytest.fixture
def parent(tmp_path, monkeypatch):
    """Start the parent as the workflow does; afterwards its standard input ends, and so must it."""
    started = []

    def start(package=ROOT):
        path = tmp_path / "socket"
        process = subprocess.Popen(
            [sys.executable, "-m", "workflow.kernels", str(path), "--model", "tiny"], stdin=subprocess.PIPE,
            cwd=package, env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        wait_for(path.exists)
        monkeypatch.setenv("NB_KERNELS", str(path))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return process, path

    yield start
    for process in started:
        process.stdin.close()
        assert process.wait(timeout=60) is not None


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def outputs(path):
    """Return what each cell says, and what kind of output that is."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [[(o.output_type, o.get("text") or dict(o.data).get("text/plain"), sorted(o.get("data", {})))
             for o in cell.outputs] for cell in cells[1:]]  # fmt: skip


def test_a_forked_run_is_that_of_a_fresh_kernel_and_leaves_nothing_to_the_next(notebook, parent, tmp_path, monkeypatch):
    source = notebook(LOOK, COMPUTE, PLOT, SOIL)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs.execute(source, {}, tmp_path / "fresh.ipynb")
    process, path = parent()
    for name in ("first", "second"):
        runs.execute(source, {}, tmp_path / f"{name}.ipynb", tmp_path / f"{name}.log")
        (look, *rest), (_, *expected) = outputs(tmp_path / f"{name}.ipynb"), outputs(tmp_path / "fresh.ipynb")
        assert look[0][1] == f"parent {process.pid} warm\n"
        assert rest == expected and "image/png" in str(rest[1]) and "clean" in str(rest[2])
        assert "clean" in (tmp_path / f"{name}.log").read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_parent_runs_one_thread_before_it_forks(parent, notebook, tmp_path):
    process, _ = parent()
    runs.execute(notebook(LOOK), {}, tmp_path / "run.ipynb")  # answered after the warm-up
    names = [task.read_text().strip() for task in Path(f"/proc/{process.pid}/task").glob("*/comm")]
    assert [name for name in names if not name.startswith("jemalloc")] == [names[0]]  # that one knows about forks


def test_a_kernel_ends_with_its_run_and_a_dead_one_fails_it(parent, notebook, tmp_path):
    process, _ = parent()
    with pytest.raises(runs.RunError, match="kernel died"):
        runs.execute(notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), {}, tmp_path / "dead.ipynb")
    mark = tmp_path / "pid"
    tell = f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))"
    slow = notebook(f"import os, pathlib, time\n{tell}\ntime.sleep(90)")
    run = subprocess.Popen(
        [sys.executable, "-m", "workflow.runs", slow, "-o", tmp_path / "slow.ipynb"], start_new_session=True
    )
    wait_for(lambda: mark.exists() and mark.read_text())
    kernel = Path("/proc", mark.read_text())
    assert re.search(rf"PPid:\s+{process.pid}\n", (kernel / "status").read_text())
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    wait_for(lambda: not kernel.exists(), seconds=10)
    assert process.poll() is None


def test_without_a_parent_a_run_starts_its_own_kernel(parent, notebook, tmp_path):
    process, path = parent()
    process.kill()
    process.wait()
    assert path.exists()  # a socket that nobody serves
    runs.execute(notebook(LOOK), {}, tmp_path / "run.ipynb")
    assert "cold" in str(outputs(tmp_path / "run.ipynb"))


def test_a_parent_with_other_code_serves_nobody(parent, notebook, tmp_path):
    for part in ("nb_utils", "workflow"):
        shutil.copytree(ROOT / part, tmp_path / "older" / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "older/nb_utils/engine.py").open("a") as file:
        file.write("# older\n")
    parent(tmp_path / "older")
    runs.execute(notebook(LOOK), {}, tmp_path / "run.ipynb")
    assert "cold" in str(outputs(tmp_path / "run.ipynb"))
