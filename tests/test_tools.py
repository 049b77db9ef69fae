"""The tools that an export is for: each loads the file by the lines of its README, and finds the loss of its card.

    BOOK_TEST_TOOLS=1 pytest tests/test_tools.py

needs `make tools`, which installs them into an environment of their own; in place of 1, name another one's Python.
Without it, what their loaders ask of the files is tested in test_exports.py.
"""

import json
import os
import re
import subprocess

import pytest
from conftest import ROOT

from nb_utils import exports, saes, tasks, workbench
from nb_utils.show import evidence

NAMED = os.environ.get("BOOK_TEST_TOOLS", "")
PYTHON = ROOT / ".venv-tools/bin/python" if NAMED == "1" else NAMED
pytestmark = pytest.mark.skipif(not NAMED, reason="needs the tools themselves: make tools, then BOOK_TEST_TOOLS=1")
LAYER = 2
# Read the export, and print the mean loss of what `logits(ids, n)` gives for a prompt of n tokens and its answer.
BEFORE = """
import json, os, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

home, folder = sys.argv[1:]
os.chdir(folder)
model, tokenizer = (kind.from_pretrained(home) for kind in (AutoModelForCausalLM, AutoTokenizer))
vector, losses = load_file("vector.safetensors")["vector"], []
"""
AFTER = """
for prompt, answer in json.load(open("card.json"))["heldout"]:
    n, ids = len(tokenizer(prompt).input_ids), tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids
    said = logits(ids, n)[0, n - 1 : -1].float().log_softmax(-1)
    losses.append(-said.gather(1, ids[0, n:, None])[:2].sum().item())
print(sum(losses) / len(losses))
"""
STEERING_VECTORS = """
def logits(ids, n):
    space = dict(globals(), n=n, ids=ids)
    exec(LINES, space)
    return space["logits"]
"""
SHOWN, OURS = 'model(**tokenizer("hot ->", return_tensors="pt"))', "model(ids)"
LM_EVAL = """
from lm_eval.models.hf_steered import SteeredModel

steered = SteeredModel(pretrained=home, steer_path="steer.pt", device="cpu")
assert steered.tok_encode("hot ->") == tokenizer("hot ->").input_ids, "BOS once, as here"
logits = lambda ids, n: steered._model_call(ids)
"""
OLD_NUMPY = "import numpy; numpy.float_ = numpy.float64"  # repeng 0.4.0 was written for it, and needs no more
REPENG = "logits = lambda ids, n: control(ids).logits"


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """Return the folder of the model, that of an export, and its card."""
    home, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("made") / "vector"
    tiny.hf.save_pretrained(home)
    tiny.tokenizer.save_pretrained(home)
    task = tasks.parse("\n".join(f"in{i} -> out{i}" for i in range(20)))
    bench = workbench.prepare(task, LAYER, tiny, saes.random(tiny, LAYER))
    weighted = workbench.Weighted((3, 17, 40), (150.0, -50.0, 200.0), False, 0.0)
    exports.save(workbench.pack(bench.trial, weighted), folder)
    card = json.loads((folder / exports.CARD).read_text())
    assert len({round(loss, 2) for loss in card["losses"].values()}) == len(card["losses"]), "each place is another"
    return home, folder, card


def lines(folder, tool):
    """Return the code that the README has for a tool."""
    return re.search(rf"## {tool}\n.*?```python\n(.*?)```", (folder / exports.README).read_text(), re.DOTALL)[1]


def run(exported, *code):
    home, folder, _ = exported
    done = subprocess.run(
        [PYTHON, "-c", "\n".join([BEFORE, *code, AFTER]), home, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return pytest.approx(float(done.stdout.split()[-1]), abs=1e-4)


@pytest.mark.parametrize(
    "where, place",
    [("token_indices=[n - 1]", "last"), ("min_token_index=n - 1", "onward"), ("min_token_index=n", "after"),
     ("", "every")],
)  # fmt: skip
def test_steering_vectors_adds_it_where_it_is_told(exported, where, place):
    code = lines(exported[1], "steering-vectors")
    assert SHOWN in code and "token_indices=[n - 1]" in code
    code = code.replace(SHOWN, OURS).replace("token_indices=[n - 1]", where)
    assert run(exported, f"LINES = {code!r}", STEERING_VECTORS) == exported[2]["losses"][place]


def test_lm_evaluation_harness_adds_it_to_every_token(exported):
    assert run(exported, lines(exported[1], "lm-evaluation-harness"), LM_EVAL) == exported[2]["losses"]["every"]


def test_repeng_reads_the_control_vector_and_adds_it_to_every_token(exported):
    assert run(exported, OLD_NUMPY, lines(exported[1], "repeng"), REPENG) == exported[2]["losses"]["every"]


def test_sae_dashboard_reads_the_features_and_writes_the_same(tmp_path):
    data = evidence.dashboard(10, [2763, 3749])
    (tmp_path / "features.json").write_text(json.dumps(data))
    code = (
        "import json, sys; from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch\n"
        "print(json.dumps(NeuronpediaDashboardBatch(**json.load(open(sys.argv[1]))).to_dict()))"
    )
    done = subprocess.run([PYTHON, "-c", code, tmp_path / "features.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == data and all(feature["activations"] for feature in data["features"])
