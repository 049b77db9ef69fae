"""Where models go, and that everything still meets there: on a stand-in for a GPU that refuses what a GPU refuses.

No GPU is needed. A tensor of the stand-in names another device and keeps its values on the CPU, where its operations
are computed; operations that mix devices, NumPy, and generators of the CPU raise, as they do on a real one. Two of the
experiments run there too; all of them, which takes minutes, with

    BOOK_TEST_PLACEMENT=1 pytest tests/test_placement.py

and ``BOOK_TEST_PLACEMENT=cuda`` runs all of that on a real GPU, with CUDA graphs and a step of a model of Gemma 2 2B's
shape.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from test_notebooks import ASSIGNED, OWN, SIZES, TINY
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import cases, peers
from nb_utils import cleaning, engine, models, prompts, saes, tasks, vectors
from nb_utils.show import plots
from workflow import grown, runs, visual

EXPERIMENTS = sorted(Path(__file__).resolve().parents[1].glob("book/experiments/*.ipynb"))
ALL = [path.stem for path in EXPERIMENTS if path.stem not in OWN]
SOME = ("02_cleanup", "08_side_effects")  # the second reads the first's vectors
TUNED = ("cleaned", "pruned", "learned")  # Adam makes differences of rounding larger
AWAY = torch.device("privateuseone:0")  # called faraway once it is registered
MOVES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


@functools.cache
def registered():
    """Tell torch of the device, once; outside of these tests there is none."""

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self):
            return Elsewhere.entered

    backend_registration._setup_privateuseone_for_python_backend("faraway", hook=Hook())


class Away(torch.Tensor):
    """A tensor elsewhere; ``held`` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=AWAY)

    def __init__(self, held):
        self.held = held

    def tolist(self):  # allowed on any device
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of another device to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Makes the stand-in's tensors where they are asked for."""

    entered = False

    def __enter__(self):
        registered()
        Elsewhere.entered = True
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) becomes a copy that we see
        return super().__enter__()

    def __exit__(self, *error):
        Elsewhere.entered = False
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """Compute an operation on the CPU, and place its result where a device of its own would have it."""
    name, leaves = func._schema.name, tree_leaves((args, kwargs))
    away = [leaf for leaf in leaves if isinstance(leaf, Away)]
    here = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Away)]
    asked = kwargs.get("device")
    there = bool(away) if asked is None else torch.device(asked).type == AWAY.type
    if there and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{name}: a generator of the CPU on another device")
    if name in INDEXING:  # a device takes indices from the CPU, the CPU none from a device, and neither foreign values
        if isinstance(args[0], Away) != bool(away) or len({isinstance(x, Away) for x in (args[0], *args[2:3])}) > 1:
            raise RuntimeError(f"{name}: tensors of two devices")
    elif away and name not in MOVES and any(leaf.ndim for leaf in here):
        raise RuntimeError(f"{name}: tensors of two devices")
    inside = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    out = func(*tree_map(_held, args), **tree_map(_held, inside))
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    return tree_map(lambda leaf: Away(leaf) if isinstance(leaf, torch.Tensor) else leaf, out) if there else out


def _held(leaf):
    return leaf.held if isinstance(leaf, Away) else leaf


ALONE = "TEST_PLACEMENT_ALONE"


@pytest.mark.skipif(ALONE in os.environ, reason="this is that process")
def test_the_stand_in_in_a_process_of_its_own():
    # Torch's autograd counts devices when it first runs: in a process that has used it, a new one comes too late.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, ALONE: "1"})
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture
def elsewhere(monkeypatch):
    if ALONE not in os.environ:
        pytest.skip("runs in a process of its own")
    # Parameters of another class cannot be moved in place.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with Elsewhere():
        monkeypatch.setenv("NB_DEVICE", str(AWAY))
        yield


REFUSED = {
    "two devices": lambda there: there + torch.ones(2),
    "indices of a device on the CPU": lambda there: torch.ones(2)[there.long()],
    "foreign values": lambda there: there.index_put((torch.tensor([0]),), torch.ones(1)),
    "numpy": lambda there: there.numpy(),
    "a data frame": lambda there: pd.DataFrame({"x": there}),
    "an array": lambda there: np.asarray(there),
    "a generator": lambda there: torch.randn(2, generator=torch.Generator(), device=AWAY),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_stand_in_refuses_what_a_device_refuses(elsewhere, what):
    there = torch.ones(2, device=AWAY)
    assert (there * 2).cpu().tolist() == [2, 2] and there[torch.tensor([1])].item() == 1
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](there)


def measured(lm):
    """Everything that the engine gives, and a cleaning: tensors of the CPU, whatever the device."""
    splits = tasks.split(tasks.load("antonyms"))
    site = engine.Site.prepare(lm, prompts.zero_shot(lm.tokenizer, splits.test[:6]))
    few = engine.Site.prepare(lm, prompts.few_shot(lm.tokenizer, splits.vector, splits.test[:6], 4, seed=0))
    at = vectors.separators(lm, splits.vector, [2], 4, 4)
    sae, steer = saes.load(lm, "random", 2), torch.randn(3, lm.d_model, generator=torch.Generator().manual_seed(0))
    given = steer.clone().requires_grad_()
    site.loss(given, 2).sum().backward()
    kept = engine.vocabulary(site)
    reference = few.log_probs(torch.zeros(1, lm.d_model), lm.n_layers - 1)[0]
    scores = site.take(torch.tensor([4, 1, 2])).evaluate(steer, 2, reference=reference[[4, 1, 2]])
    problem = cleaning.Problem(site, site, 2, vocabulary=kept, batch=4)
    cleaned = cleaning.clean(problem, sae, sae.pre_activations(vectors.task_vector(at, 2))[None], [1.0], steps=3)[0]
    path = cleaning.prune_with_refit(problem, sae, cleaned.codes[None], (4, 2), steps=2)[0]
    return {
        "gradient": given.grad, "loss": site.loss(steer, 2, vocabulary=kept), "nll": scores.nll, "kl": scores.kl,
        "exact": scores.exact, "replaced": site.evaluate(steer, 2, "replace").nll, "read": site.read(steer, 2, 4),
        "at": site.at(3), "few": at.few[2], "zero": at.zero[2], "cleaned": cleaned.vector, "pruned": path[-1].codes,
        "unsteered": site.unsteered().token_loss(),
        "learned": cleaning.learned_vector(problem, steer, steps=2)[0].vector,
    }  # fmt: skip


def test_the_engine_gives_the_same_from_another_device(elsewhere):
    there = measured(models.load("tiny"))
    for name, here in measured(models.load("tiny", "cpu")).items():
        assert not isinstance(there[name], Away), f"{name} was left elsewhere"
        torch.testing.assert_close(there[name], here, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


def test_grown_models_learn_and_their_vectors_are_cleaned_on_another_device(elsewhere, tmp_path, monkeypatch):
    spec = grown.Spec("offset", d_model=16, d_mlp=16, heads=2)
    queries, vectors, found = torch.arange(grown.SIZE).split(12), torch.ones(2, 16), {}
    grown.save(grown.fresh(spec), tmp_path)
    for device in (str(AWAY), "cpu"):
        monkeypatch.setenv("NB_DEVICE", device)
        model = grown.load("offset", "grown", 0, tmp_path)
        assert model.device == torch.device(device)
        asked = grown.Asked(model, 1, torch.tensor([2, 5]), *queries, common=torch.ones(16).to(device))
        found[device] = [one.validation_loss for one in cleaning.learned_vector(asked, vectors, lr=0.1, steps=2)]
        rows = [*grown.in_context(model, 1), *grown.by_vector(model, 1, ("mean", "one", "centred"))]
        found[device] += [row["loss"] for row in rows]
        model.hf.requires_grad_(True)
        drawn = grown.draw(model.family, torch.tensor([2, 5]), spec.pairs, torch.Generator().manual_seed(0))
        both = grown.losses(model, drawn)
        sum(both).backward()
        found[device] += [*(loss.item() for loss in both), model.hf.lm_head.weight.grad.norm().item()]
    assert found[str(AWAY)] == pytest.approx(found["cpu"], abs=1e-3)


def test_visual_vectors_do_the_same_on_another_device(elsewhere, tmp_path, monkeypatch):
    visual.save(visual.fresh(visual.Spec(blocks=2, d_model=16, heads=2)), tmp_path)
    kinds, asked = visual.numbered([("clean", "invert"), ("dark", "copy")])
    of, found = visual.grids(visual.figures(), kinds, asked, torch.Generator().manual_seed(0)), {}
    for device in (str(AWAY), "cpu"):
        monkeypatch.setenv("NB_DEVICE", device)
        model = visual.load("grids", tmp_path)
        assert model.device == torch.device(device)
        values, masks = visual.means(model, of)[0], torch.eye(len(visual.sites(model.spec)))
        rewards = visual.in_turns(model, of, torch.stack([values, values]))(masks)
        problem = visual.Painted(model, 0, of, of)
        found[device] = [*visual.closer(model, of, values, masks).flatten().tolist(), *rewards.nansum(0).tolist()]
        found[device] += problem.validation_loss(torch.ones(1, 32)).tolist()
        found[device] += [row["mse"] for row in visual.measured(model, 1)]
        assert visual.nearest(visual.seen(model, of.query, of.example), of).shape == (2,)
    assert found[str(AWAY)] == pytest.approx(found["cpu"], abs=1e-4)


def run_cells(path, given):
    """Run an experiment's cells in this process, where the stand-in is; return what they have defined."""
    scope = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.stem}, {cell.id}", "exec"), scope)
        if "parameters" in cell.metadata.get("tags", []):
            scope |= {name: value for name, value in given.items() if name in runs.known_parameters(path)}
    plots.plt.close("all")
    return scope


def test_experiments_run_on_another_device(elsewhere, tmp_path, monkeypatch):
    stems = ALL if os.environ.get("BOOK_TEST_PLACEMENT") == "1" else SOME
    agree(stems, str(AWAY), "faraway", tmp_path, monkeypatch)


def agree(stems, device, kind, tmp_path, monkeypatch):
    """Run experiments on a device and on the CPU, and compare their tables."""
    # In single precision: each processor rounds sums of bfloat16 in its own way, and tuning widens that at will.
    given = TINY | SIZES | {"layers": "2,3", "seeds": 1, "steps": 4, "half": False}
    monkeypatch.setenv("MPLBACKEND", "agg")
    for path in (path for path in EXPERIMENTS if path.stem in stems):
        for place, name in (("there", device), ("here", "cpu")):
            monkeypatch.setenv("NB_DEVICE", name)
            task = {"task": ASSIGNED[path.stem]} if path.stem in ASSIGNED else {}
            ran = run_cells(path, {**given, **task, "tables_dir": str(tmp_path / place)})
            assert ran["lm"].device.type == (kind if place == "there" else "cpu")
    made = sorted((tmp_path / "here").rglob("*.parquet"))
    assert {path.parts[-3] for path in made} >= set(stems)
    for path in made:
        here, there = pd.read_parquet(path), pd.read_parquet(tmp_path / "there" / path.relative_to(tmp_path / "here"))
        assert here.shape == there.shape and list(here) == list(there), path.parts[-3]
        if "method" in here and "loss" in here:  # tuning widens differences of rounding, measuring does not
            untuned = here["layer"].eq(-1) | here["method"].eq("task_vector")
            pd.testing.assert_series_equal(here["loss"][untuned], there["loss"][untuned], atol=1e-4)
            pd.testing.assert_series_equal(here["loss"], there["loss"], atol=0.5)


def test_models_go_where_they_are_told_and_to_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.delenv("NB_DEVICE", raising=False)
    assert models.placement() == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("NB_DEVICE", "cpu")
    assert models.placement() == "cpu" == models.load("tiny").device.type
    for wrong in ("gpu", "xpu:7"):
        monkeypatch.setenv("NB_DEVICE", wrong)
        with pytest.raises(models.ModelError, match=f"There is no device '{wrong}' for torch here: set NB_DEVICE"):
            models.load("tiny")


# --- a real GPU ------------------------------------------------------------------------------------------------------

WANTED = os.environ.get("BOOK_TEST_PLACEMENT") == "cuda" and ALONE not in os.environ
on_a_gpu = pytest.mark.skipif(
    not WANTED or not torch.cuda.is_available(),
    reason="torch finds no GPU here" if WANTED else "BOOK_TEST_PLACEMENT=cuda runs this on a GPU",
)


@on_a_gpu
def test_the_engine_gives_the_same_from_a_gpu():
    there = measured(models.load("tiny", "cuda"))
    for name, here in measured(models.load("tiny", "cpu")).items():
        assert there[name].device.type == "cpu", f"{name} was left on the GPU"
        if name in TUNED:
            assert torch.cosine_similarity(there[name].flatten(), here.flatten(), dim=0) > 0.999, name
        else:
            torch.testing.assert_close(there[name], here, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@on_a_gpu
def test_losses_and_gradients_on_a_gpu_are_those_of_a_plain_hooked_pass():
    loss, gradient = engine.differences(models.load("tiny", "cuda"))
    assert loss < 1e-4 and gradient < 1e-4


@on_a_gpu
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("reduced", [True, False])
def test_a_graph_gives_the_losses_and_gradients_of_the_plain_engine(mode, batch, reduced):
    lm = models.load("tiny", "cuda")
    pairs = tasks.split(tasks.load("antonyms")).test[:6]
    site = engine.Site.prepare(lm, prompts.zero_shot(lm.tokenizer, pairs), answer_tokens=2)
    kept = engine.vocabulary(site, keep=50) if reduced else None
    graph = site.captured(3, 2, mode, kept, batch)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):  # the graph is replayed on what it has not seen
        order = torch.randperm(6, generator=draw)[: batch or 6]
        plain = torch.randn(3, lm.d_model, generator=draw).cuda().requires_grad_()
        replayed = plain.detach().clone().requires_grad_()
        expected, found = site.take(order).loss(plain, 2, mode, kept), graph(replayed, order)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        expected.sum().backward()
        found.sum().backward()
        torch.testing.assert_close(replayed.grad, plain.grad, rtol=1e-4, atol=1e-5)


@on_a_gpu
def test_all_experiments_run_on_a_gpu(tmp_path, monkeypatch):
    agree(ALL, "cuda", "cuda", tmp_path, monkeypatch)


@on_a_gpu
def test_a_step_of_a_model_of_2_billion_weights_is_exact_on_a_gpu():
    if (free := torch.cuda.mem_get_info()[0]) < 30e9:
        pytest.skip(f"it takes 30 GB of a GPU, of which {free / 1e9:.0f} are free")
    step(cases.shaped("gemma2-2b"))


def test_the_same_step_is_exact_on_a_small_model_of_that_kind(monkeypatch):
    monkeypatch.setenv("NB_DEVICE", "cpu")
    step(cases.shaped("small"))


def step(case):
    """One step of cleaning at four penalties: its losses and gradients against a plain hook, then the step itself."""
    device, layer = case.model.device, case.layer
    noise = torch.randn(4, case.model.d_model, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    start = noise * (case.site.at(layer).norm(dim=1).mean().item() / noise.norm(dim=1, keepdim=True))
    hook, problem = peers.PlainHook(case.model, case.prompts, layer), cleaning.Problem(case.site, case.site, layer)
    found = []
    for loss in (lambda given: problem.train_loss(given, 0), hook.losses):
        given = start.clone().requires_grad_()
        losses = loss(given)
        losses.sum().backward()
        found.append((losses.detach(), given.grad))
    (ours, gradient), (plain, reference) = found
    assert plain.std() > 0.01  # else it would not matter where they are added
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)
    assert (gradient - reference).norm() < 1e-3 * reference.norm()
    cleaned = cleaning.clean(problem, case.sae, case.start.expand(4, -1), [0.3, 1, 3, 10], steps=1)
    assert all(one.vector.isfinite().all() for one in cleaned)
