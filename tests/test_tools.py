"""The tools that an export is for: each loads the file by the lines of its README, and finds the loss of its card.

    BOOK_TEST_TOOLS=1 pytest tests/test_tools.py

needs `make tools`, which installs them into an environment of their own; in place of 1, name another one's Python.
Without it, what their loaders ask of the files is tested in test_exports.py.
"""

import json
import os
import re
import subprocess

import gguf
import pytest
from conftest import ROOT

from nb_utils import exports, models, saes, tasks, workbench
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
    home = tmp_path_factory.mktemp("model")
    tiny.hf.save_pretrained(home)
    tiny.tokenizer.save_pretrained(home)
    return made(tiny, home, tmp_path_factory.mktemp("made") / "vector")


def made(model, home, folder):
    task = tasks.parse("\n".join(f"in{i} -> out{i}" for i in range(20)))
    bench = workbench.prepare(task, LAYER, model, saes.random(model, LAYER))
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
        [PYTHON, "-c", "\n".join([BEFORE, *code, AFTER]), home, folder], capture_output=True, text=True
    )
    if done.returncode and done.stderr.split()[-1] == "absent":
        pytest.skip("this tool is not installed, or not for this system")
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


# llama.cpp, by llama-cpp-cffi, whose wheel of 290 MB is not in the list: install it beside the others to try it. What
# llama.cpp's own programs do with the file is done here: direction N is put where its function has block N.
LLAMA = """
import importlib.util, pathlib
import numpy, torch
from gguf import GGUFReader

package = importlib.util.find_spec("llama")
if package is None:
    sys.exit("absent")
path, = pathlib.Path(package.submodule_search_locations[0]).glob("_llama_cpp_cpu*.so")
spec = importlib.util.spec_from_file_location("_llama_cpp_cpu", path)
module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
except ImportError:  # made for a newer libstdc++
    sys.exit("absent")
lib, ffi = module.lib, module.ffi
lib.llama_backend_init()
loaded = lib.llama_model_load_from_file(f"{home}/model.gguf".encode(), lib.llama_model_default_params())
settings = lib.llama_context_default_params()
settings.n_ctx = settings.n_batch = 64
settings.n_threads = settings.n_threads_batch = 1
settings.type_k = settings.type_v = lib.GGML_TYPE_F32
context = lib.llama_init_from_model(loaded, settings)
width, blocks, n_vocab = model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size
directions = numpy.zeros((blocks, width), dtype=numpy.float32)  # of blocks 1, 2, ...
for tensor in GGUFReader("control-vector.gguf").tensors:
    directions[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
held = ffi.from_buffer("float[]", directions)
assert lib.llama_apply_adapter_cvec(context, held, directions.size, width, 1, blocks) == 0


def logits(ids, n):
    lib.llama_kv_self_clear(context)
    batch = lib.llama_batch_init(ids.numel(), 0, 1)
    batch.n_tokens = ids.numel()
    for i, token in enumerate(ids[0].tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert lib.llama_decode(context, batch) == 0
    rows = [ffi.buffer(lib.llama_get_logits_ith(context, i), 4 * n_vocab) for i in range(ids.numel())]
    return torch.tensor(numpy.stack([numpy.frombuffer(row, dtype=numpy.float32) for row in rows]))[None]
"""


def as_gguf(hf, path):
    """Write a Gemma 3 as llama.cpp reads it: without a tokenizer, and with norms that multiply by their weights."""
    c, writer = hf.config, gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["full_attention"]["rope_theta"])
    writer.add_sliding_window(c.sliding_window)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, c.num_hidden_layers)
    for name, weights in hf.state_dict().items():
        if name != "lm_head.weight":  # the embedding once more
            values = weights + 1 if name.endswith("norm.weight") else weights
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_reads_the_control_vector_and_adds_it_to_every_token(tiny, tmp_path):
    config = tiny.hf.config.to_dict() | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}  # as it has it
    hf = type(tiny.hf)(type(tiny.hf.config)(**config)).eval()
    hf.load_state_dict(tiny.hf.state_dict())
    hf.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    as_gguf(hf, tmp_path / "model/model.gguf")
    exported = made(models.load(str(tmp_path / "model")), tmp_path / "model", tmp_path / "vector")
    assert run(exported, LLAMA) == exported[2]["losses"]["every"]
