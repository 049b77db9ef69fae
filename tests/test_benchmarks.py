"""The benchmarks, rehearsed on a small model: what they compare, what they say of it, and what they leave when cut."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import cases, measure
from nb_utils.record import tables

ROOT = Path(__file__).resolve().parents[1]
# What a machine with a GPU may not have.
LACKING = [
    "IPython", "datasets", "gguf", "matplotlib", "nbformat", "nnsight", "papermill", "pyvene", "sae_lens", "scipy",
    "seaborn", "snakemake", "transformer_lens",
]  # fmt: skip
REHEARSAL = f"""import sys
sys.modules |= dict.fromkeys({LACKING})
from benchmarks import measure
folder = sys.argv[1]
measure.main(["--shape", "small", "--repeats", "2", "--tables-dir", folder])
measure.main(["--shape", "small", "--seconds", "0", "--tables-dir", folder + "/cut"])"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Measure the small shape where few packages are, whole and cut at once; return the folder of tables."""
    folder = tmp_path_factory.mktemp("tables")
    done = subprocess.run([sys.executable, "-c", REHEARSAL, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The time is over" in done.stdout
    return folder


def test_a_shape_is_measured_where_few_packages_are(rehearsed):
    table = pd.read_parquet(rehearsed / "benchmarks/small/speed.parquet")
    states = table.groupby(["benchmark", "tool"])["state"].agg(lambda found: " ".join(set(found)))
    for benchmark in ("cleaning", "heatmap", "extraction"):
        here = states[benchmark]
        assert set(here[[tool for tool in here.index if tool.startswith(("plain", "ours"))]]) <= {"exact", "reduced"}
        assert set(here[["TransformerLens", "nnsight", "pyvene"]]) == {"unsupported"}
    ours = [tool for tool in states["cleaning"].index if tool.startswith("ours")]
    assert sorted(ours) == ["ours", "ours, exact", "ours, exact, four penalties", "ours, four penalties"]
    measured = table[table["state"].isin(["exact", "reduced"])]
    assert set(measured["repeat"]) == {0, 1} and (measured["seconds"] > 0).all()
    assert (measured.loc[measured["tool"].isin(ours[1:]), ["flops", "traffic"]] > 0).all(axis=None)
    assert {"matmul", "copy"} < set(table["benchmark"])
    machine = tables.read_provenance(rehearsed / "benchmarks/small/speed.parquet")["parameters"]["machine"]
    assert machine["device"] == "cpu"


def test_what_was_measured_until_the_time_was_over_stays(rehearsed):
    table = pd.read_parquet(rehearsed / "cut/benchmarks/small/speed.parquet")
    assert set(table["benchmark"]) == {"matmul", "copy"}


def test_numbers_are_exact_wrong_or_reduced_on_purpose():
    exact = torch.tensor([2.0, 400.0])
    assert measure.judge(exact + 0.1, exact, False)[1] == "exact"  # a thousandth of the largest is 0.4
    difference, state = measure.judge(exact + 0.5, exact, False)
    assert (difference, state) == (0.5, "wrong")
    assert measure.judge(exact + torch.tensor([torch.nan, 0]), exact, False)[1] == "wrong"
    assert measure.judge(exact[:1] + 0.5, exact, True)[1] == "reduced"


def test_a_tool_that_computes_something_else_or_cannot_run_is_named_so(tiny, tmp_path):
    bench = measure.Bench(tiny, 1, str(tmp_path))
    tools = {"plain hook": (1, lambda: torch.ones(2)), "no cap": (1, lambda: torch.ones(2) * 2), "other": (1, broken)}
    bench.interleaved("cleaning", tools)
    assert {row["tool"]: row["state"] for row in bench.rows} == {
        "plain hook": "exact", "no cap": "wrong", "other": "unsupported"}  # fmt: skip


def broken():
    raise RuntimeError("Expected all tensors to be on the same device")


def test_a_shape_has_the_prompts_that_it_says(monkeypatch):
    monkeypatch.setenv("NB_DEVICE", "cpu")
    case = cases.shaped("small")
    assert len(case.prompts) == cases.PROMPTS and {len(prompt.ids) for prompt in case.prompts} == {4, 5}
    for prompt in case.shots:
        assert len(prompt.separators) == cases.SHOTS + 1 and len(prompt.outputs) == cases.SHOTS
        assert {prompt.ids[at] for at in prompt.separators} == {3} and prompt.ids[-1:] == prompt.answer
