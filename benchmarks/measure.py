"""Measure the engine against its peers, against the machine, and how cost grows: ``make bench``.

All tools run interleaved in one process. On a CPU that has one thread, and times are processor seconds, which other
work on the machine hardly touches; on a GPU they are seconds on the wall, the device being waited for. A repeat gives
one ratio; the spread over repeats is reported with it. The table is written anew after each part.

``--shape gemma2-2b`` measures a model of that shape with random weights, alone. It needs no download, and of packages
only torch, transformers and what tables need: a peer whose package is not there is *unsupported*. Where models go to a
GPU, ``make bench`` measures it too.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks import cases, peers
from nb_utils import cleaning, engine, models, prompts, saes, tasks
from nb_utils.record import tables

PENALTIES = [0.3, 1.0, 3.0, 10.0]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
EXACT = 1e-3  # how far exact numbers may differ, as a share of the largest of them, or of 1


class Late(Exception):
    """The time is over."""


@dataclass
class Bench:
    """What has been measured so far, and where it is written. ``until``: the time to stop."""

    model: models.Model
    repeats: int
    folder: str | None = None
    until: float = float("inf")
    rows: list[dict] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def seconds(self, work) -> float:
        """Return what ``work`` takes: of the processor, on a GPU on the wall."""
        if not self.on_gpu:
            start = time.process_time()
            work()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def interleaved(self, benchmark, tools, reduced=(), needs=None):
        """Time every tool in turn, ``repeats`` times, after one unmeasured round.

        ``tools``: {name: (units of work, function)}. A function returns numbers, which are compared with those of the
        first tool: *exact*, *wrong*, or *reduced* for those of ``reduced``, which differ on purpose; it may return
        None. What raises is *unsupported*. ``needs``: {name: columns that say what the work needs}.
        """
        found = {}
        for name, (_, run) in tools.items():
            self.in_time()
            try:
                found[name] = run()
            except Exception as error:  # whatever a library does that is not there, or that cannot do this
                self.add(benchmark, name, torch.nan, difference=torch.nan, state="unsupported")
                print(f"{benchmark:12} {name:32} unsupported: {type(error).__name__}: {str(error)[:200]!r}", flush=True)
        exact = next(iter(found.values()), None)
        judged = {name: judge(one, exact, name in reduced) for name, one in found.items()}
        for repeat in range(self.repeats):
            for name in found:
                self.in_time()
                (units, run), (difference, state) = tools[name], judged[name]
                seconds = self.seconds(run)
                self.add(benchmark, name, seconds, units, repeat=repeat, difference=difference, state=state,
                         **(needs or {}).get(name, {}))  # fmt: skip
                print(f"{benchmark:12} {name:32} {seconds / units:9.4f} s  {state} ({difference:.1e})", flush=True)
        self.save()

    def add(self, benchmark, tool, seconds, units=1.0, repeat=0, size=0.0, difference=0.0, state="", flops=0.0,
            traffic=0.0, peak=0.0):  # fmt: skip
        """Note a measurement. ``flops``, ``traffic``: operations, and bytes of weights to read, that it needs at least.

        ``peak``: bytes that it took beside the model.
        """
        self.rows.append({
            "benchmark": benchmark, "tool": tool, "repeat": repeat, "size": float(size), "seconds": seconds,
            "units": float(units), "difference": difference, "state": state, "flops": float(flops),
            "traffic": float(traffic), "bytes": float(peak),
        })  # fmt: skip

    def in_time(self):
        if time.monotonic() > self.until:
            raise Late

    def save(self):
        """Write all there is. What was measured on a GPU has a folder of its own."""
        given = {"model": self.model.name, "repeats": self.repeats, "machine": machine(self.model)}
        origin = tables.provenance(given, self.model.sha256, {})
        place = f"{self.model.name}.cuda" if self.on_gpu else self.model.name
        tables.save(pd.DataFrame(self.rows), "benchmarks", "speed", origin, folder=self.folder, model=place)


def judge(found, exact, reduced):
    """Return the largest difference of numbers from the exact ones, as far as there are both, and the word for it."""
    if found is None:
        return torch.nan, ""
    n = min(len(found), len(exact))
    found, exact = found[:n].float().cpu(), exact[:n].float().cpu()
    difference = (found - exact).abs().max().item()
    bound = EXACT * max(1.0, exact.abs().max().item())
    return difference, "reduced" if reduced else "exact" if difference <= bound else "wrong"


class Steps:
    """A cleaning problem whose training loss alone is computed, and kept to compare trajectories."""

    def __init__(self, loss, device):
        self.loss, self.device, self.seen = loss, device, []

    def train_loss(self, given, step):
        losses = self.loss(given)
        self.seen.append(losses.detach())
        return losses

    def validation_loss(self, given):
        return torch.zeros(len(given), device=given.device)


def needed(site, layer, kept, passes=1.0, reads=1.0):
    """Say what the work needs for whom the blocks after ``layer`` run ``passes`` times, and ``kept`` logits are made.

    Operations: the products at the answers' positions; bytes: of these weights, read ``reads`` times.
    """
    layout = site.model.layout
    weights = sum(w.numel() for block in layout.blocks[layer + 1 :] for w in block.parameters() if w.ndim == 2)
    weights += kept * layout.d_model
    return {"flops": 2 * passes * len(site.labels) * weights, "traffic": reads * weights * site.model.dtype.itemsize}


def limits(bench):
    """Measure what the machine does at most: the best of a few square products, and of a few copies."""
    device = bench.model.device
    n, size = (8192, 1 << 30) if bench.on_gpu else (2048, 1 << 28)
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    for name, work, more in (("matmul", lambda: a @ b, {"flops": 2 * n**3}),
                             ("copy", lambda: target.copy_(source), {"traffic": 2 * size})):  # fmt: skip
        best = min(bench.seconds(work) for _ in range(6))
        bench.add(name, "machine", best, repeat=sum(one["benchmark"] == name for one in bench.rows), **more)
    print(f"{2 * n**3 / best_of(bench, 'matmul') / 1e9:.0f} GFLOP/s, "
          f"{2 * size / best_of(bench, 'copy') / 1e9:.0f} GB/s", flush=True)  # fmt: skip


def best_of(bench, name):
    return statistics.median(one["seconds"] for one in bench.rows if one["benchmark"] == name)


def rivals(case, made, units, work):
    """Return {name: (units, function)} of the peers; each is made when it first runs, and may not be there."""
    ready = {}

    def run(name, kind):
        if name not in ready:
            ready[name] = kind(case.model, made, case.layer)
        return work(ready[name])

    return {name: (units, partial(run, name, kind)) for name, kind in peers.ALL.items()}


def cleaning_step(bench, case, steps=4):
    """Clean at one layer: the same Adam steps on the same loss, once per penalty, or four in one pass."""
    site, layer = case.site, case.layer
    everything = torch.arange(len(site.prompts))

    def run(loss, n=1):
        given = Steps(loss, bench.model.device)
        cleaning.clean(given, case.sae, case.start.expand(n, -1), PENALTIES[:n], 0.2, steps, check_every=steps)
        return torch.stack(given.seen)[:, 0]

    def ours(n, kept, eager):
        graph = None if eager else site.captured(n, layer, vocabulary=kept)
        if graph is None:
            return run(lambda v: site.loss(v, layer, vocabulary=kept), n)
        return run(lambda v: graph(v, everything), n)

    theirs = rivals(case, case.prompts, steps + 1, lambda peer: run(peer.losses))
    plain = theirs.pop("plain hook")
    hook = peers.PlainHook(case.model, case.prompts, layer)
    tools = {"plain hook": plain, "plain hook, four penalties": (4 * (steps + 1), lambda: run(hook.losses, 4))}
    needs = {}
    for how, eager in {"": False, ", eager": True}.items():
        for n, count in {1: "", 4: ", four penalties"}.items():
            for exactly, kept in {"": case.kept, ", exact": None}.items():
                if eager and not bench.on_gpu:  # there everything is
                    continue
                tool, tokens = f"ours{exactly}{count}{how}", len((kept or site.model.layout.head).weight)
                tools[tool] = n * (steps + 1), partial(ours, n, kept, eager)
                # Forwards and backwards, but for the last step; weights are read for all penalties at once.
                needs[tool] = needed(site, layer, tokens, n * (2 * steps + 1), 2 * steps + 1)
    reduced = [tool for tool in needs if "exact" not in tool]
    bench.interleaved("cleaning", tools | theirs, reduced, needs)


@torch.no_grad()
def heatmap(bench, case):
    """Steer by features at one scale: the exact loss of every feature, on every prompt, over the whole vocabulary."""
    few, many = (16, 64) if bench.on_gpu else (4, 32)
    site, vectors = case.site, case.directions
    theirs = rivals(case, case.prompts, few, lambda peer: peer.losses(vectors[:few]))
    tools = {"plain hook": theirs.pop("plain hook")}
    tools["ours"] = (many, lambda: site.evaluate(vectors[:many], case.layer).loss().mean(1))
    bench.interleaved("heatmap", tools | theirs, needs={
        "ours": needed(site, case.layer, site.model.layout.n_vocab, many)})  # fmt: skip


@torch.no_grad()
def extraction(bench, case):
    """Average the residual stream over the separators of 16 prompts of 16 shots."""
    spots = [p.separators[1:] for p in case.shots]
    pick = tuple(torch.tensor([(i, c) for i, spot in enumerate(spots) for c in spot]).T)
    theirs = rivals(case, case.shots, 1, lambda peer: peer.stream()[pick].mean(0))
    tools = {"plain hook": theirs.pop("plain hook")}
    at = case.layer
    tools["ours"] = (1, lambda: engine.residuals(case.model, case.shots, spots, [at])[at].mean(0))
    bench.interleaved("extraction", tools | theirs)


def sae_training(bench, case, steps=3, batch=2048, d_sae=4096, k=46):
    """Train the same BatchTopK SAE on the same activations, in our loop and in SAELens's trainer; units are tokens."""
    import numpy as np
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from workflow import train_saes

    model, pool = case.model, tasks.load(cases.TASK).pairs
    made = prompts.few_shot(model.tokenizer, pool, pool[:64], 16, seed=0)
    x = engine.residuals(model, made, [tuple(range(1, len(p.ids))) for p in made], [case.layer])[case.layer]
    x = x.repeat(-(-batch // len(x)), 1)[:batch].to(model.device)
    spec = train_saes.Spec("benchmark", 0, d_sae, k, len(x), 1e-3)
    mine = train_saes.Sae.fresh(x, spec)
    mine.find_dead()
    config = BatchTopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k, normalize_activations="none",
                                        device=str(model.device))  # fmt: skip
    settings = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=1e-3, lr_end=1e-4,
        device=str(model.device))
    scaled = (x - mine.mean) * mine.scale

    def ours():
        rng = np.random.default_rng(0)
        for _ in range(steps):
            mine.step(x, k, 1e-3, rng)

    def theirs():  # from other initial weights: nothing to compare
        SAETrainer(settings, BatchTopKTrainingSAE(config), (scaled for _ in range(steps + 1))).fit()

    bench.interleaved("SAE training", {"ours": (steps * batch, ours), "SAELens": (steps * batch, theirs)})


def start_up(bench, case):
    """Time a whole run whose one cell loads model and SAE: in a fresh kernel, and forked from a warm parent."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    model = case.model
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder, "start.ipynb"), Path(folder, "kernels", "socket")
        path.parent.mkdir()
        cell = "import os\nfrom nb_utils import engine, models, saes, scores, tasks, vectors\n" + (
            "from nb_utils.record import tables\nfrom nb_utils.show import plots\n"
            f'sae = saes.load(models.load("{model.name}"), "shipped", {case.layer})\nprint(os.getppid())')
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [new_markdown_cell("# Start"), new_code_cell("seed = 0", metadata={"tags": ["parameters"]})]
        nbformat.write(new_notebook(cells=[*cells, new_code_cell(cell)], metadata={"kernelspec": kernel}), source)
        parent = subprocess.Popen(
            [sys.executable, "-m", "workflow.kernels", str(path), "--model", model.name], stdin=subprocess.PIPE)

        def run(**more):
            output = Path(folder, "out.ipynb")
            command = [sys.executable, "-m", "workflow.runs", source, "-o", output, "--log", f"{output}.log"]
            start = time.perf_counter()
            subprocess.run(command, env=os.environ | more, check=True, stdout=subprocess.DEVNULL)
            whole = time.perf_counter() - start
            last = nbformat.read(output, as_version=4).cells[-1]
            assert (int(last.outputs[-1].text) == parent.pid) == bool(more), "a kernel of the wrong kind: run it again"
            return whole, last.metadata.papermill.duration

        try:
            run(NB_KERNELS=str(path))  # waits for the warm-up
            for repeat in range(bench.repeats):
                for tool, more in {"ours": {"NB_KERNELS": str(path)}, "fresh kernel": {}}.items():
                    whole, computing = run(**more)
                    bench.add("start-up, run", tool, whole, repeat=repeat)
                    bench.add("start-up, cell", tool, computing, repeat=repeat)
                    print(f"start-up     {tool:28} {whole:9.2f} s, of which imports and loading {computing:.2f} s")
        finally:
            parent.stdin.close()
            parent.wait()
    bench.save()


def alone(bench, work, copies=1):
    """Return the seconds of ``work`` and how much memory it takes at most beside the model.

    On a CPU it runs in forks of this process, whose seconds and memory are summed; a GPU does not outlive a fork.
    """
    if bench.on_gpu:
        work()  # what is built when a kernel first runs stays
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return bench.seconds(work), torch.cuda.max_memory_allocated() - before
    reader, writer = os.pipe()
    for _ in range(copies):
        if os.fork():
            continue
        for weight in bench.model.hf.parameters():
            weight.sum()  # maps the weights, which are files, before we look at the memory
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark so far
        before = _memory("VmRSS")
        seconds = bench.seconds(work)
        os.write(writer, f"{seconds} {_memory('VmHWM') - before}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = [tuple(map(float, line.split())) for line in stream]
    for _ in range(copies):
        os.wait()
    assert len(said) == copies, "a fork died"
    return tuple(map(sum, zip(*said, strict=True)))


def _memory(name):
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def growth(bench, case):
    """Measure seconds and memory of the engine as one size at a time grows; the rest as in ``cleaning_step``."""
    model, site, layer, kept = case.model, case.site, case.layer, case.kept
    noise = torch.randn(64, model.d_model, generator=torch.Generator().manual_seed(0)) * 100

    def descend(site, layer, n, vocabulary):
        def step():
            given = noise[:n, : site.model.d_model].clone().requires_grad_()
            site.loss(given, layer, vocabulary=vocabulary).sum().backward()

        return step

    def clean(d_sae):
        sae = saes.random(model, layer, d_sae).to(model.device)
        start = sae.pre_activations(site.at(layer).mean(0).to(model.device)).expand(4, -1)
        steps = Steps(lambda v: site.loss(v, layer, vocabulary=kept), model.device)
        return lambda: cleaning.clean(steps, sae, start, PENALTIES, 0.2, 1, check_every=1)

    works = {("features", n): lambda n=n: site.evaluate(noise[:n], layer) for n in (1, 4, 16, 64)}
    for n in (8, 16, 24, 48):  # a task may have fewer
        more = engine.Site.prepare(model, zero_shot(model, n), answer_tokens=2)
        works["prompts", len(more.prompts)] = lambda more=more: more.evaluate(noise[:4], layer)
    works |= {("gradient rows", n): descend(site, layer, n, kept) for n in (1, 4, 16, 64)}
    works |= {("blocks after the vector", model.n_layers - 1 - at): descend(site, at, 4, kept) for at in (4, 8, 12, 16)}
    works |= {("latents of the SAE", d_sae): clean(d_sae) for d_sae in (1024, 4096, 16384, 65536)}
    works |= {("tasks at a time", n): works["features", 16] for n in (1, 2, 4) if not bench.on_gpu}
    for (axis, size), work in works.items():
        seconds, peak = alone(bench, work, size if axis == "tasks at a time" else 1)
        bench.add("growth", axis, seconds, size=size, peak=peak)
        print(f"{axis:28} {size:8} {seconds:9.3f} s {peak / 1e6:9.0f} MB", flush=True)
    for name in ("tiny", "smollm2-135m-instruct", model.name):
        other = models.load(name)
        small = engine.Site.prepare(other, zero_shot(other), answer_tokens=2)
        weights = sum(w.numel() for w in other.hf.parameters())
        layer, vocabulary = other.n_layers // 2, engine.vocabulary(small)
        seconds, peak = alone(Bench(other, 1), descend(small, layer, 4, vocabulary))
        bench.add("model", name, seconds, size=weights, peak=peak, **needed(small, layer, len(vocabulary.weight), 8, 2))
        print(f"{name:28} {weights:12} {seconds:9.3f} s {peak / 1e6:9.0f} MB", flush=True)
    bench.save()


def zero_shot(model, n=cases.PROMPTS):
    return prompts.zero_shot(model.tokenizer, tasks.split(tasks.load(cases.TASK)).train[:n])


def machine(model):
    """Describe what was measured on, without naming it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    has = text.partition("flags")[2].partition("\n")[0].split()
    brand = text.partition("model name")[2].partition("\n")[0].strip(" \t:") or platform.processor()
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return {"device": device, "processor": brand, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "features": [flag for flag in FLAGS if flag in has],
            "byte_budget": engine.BYTE_BUDGET}  # fmt: skip


def measure(case, parts, *given):
    """Measure the parts one after another, until the time of `Bench` is over; return what there is then."""
    bench = Bench(case.model, *given)
    try:
        limits(bench)
        for part in parts:
            begun = time.monotonic()
            part(bench, case)
            limits(bench)
            print(f"{part.__name__}: {time.monotonic() - begun:.0f} s in all", flush=True)
    except Late:
        print("The time is over: the table holds what was measured so far.", flush=True)
    bench.save()
    return bench.rows


PARTS = {part.__name__: part for part in (growth, cleaning_step, heatmap, extraction, sae_training, start_up)}
SHAPED = (cleaning_step, heatmap, extraction)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tables-dir", help="another folder for the tables")
    parser.add_argument("--only", choices=PARTS, help="one part; its table is no page's")
    parser.add_argument("--shape", choices=cases.SHAPES, help="a model of this shape with random weights, and no other")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop by then; what there is stays")
    args = parser.parse_args(argv)
    until = time.monotonic() + args.seconds
    trial = "results/runs/tables" if args.only or args.shape == "small" else None  # not the table of the page
    device, rest = torch.device(models.placement()).type, (args.repeats, args.tables_dir or trial, until)
    rows = []
    if device not in ("cpu", "cuda"):
        sys.exit(f"The benchmarks can time a CPU or a GPU of CUDA, not {device!r}: set NB_DEVICE=cpu.")
    if device == "cpu":
        torch.set_num_threads(1)
    if not args.shape:
        # Growth comes first: it forks, which the libraries of the others may not survive.
        parts = [part for name, part in PARTS.items() if args.only in (None, name)]
        parts = [part for part in parts if device == "cpu" or part is not start_up]  # which no GPU changes
        rows += measure(cases.embedded(), parts, *rest)
    if args.shape or (device == "cuda" and not args.only):
        rows += measure(cases.shaped(args.shape or "gemma2-2b"), SHAPED, *rest)
    off = {one["tool"] for one in rows if one["tool"].startswith("ours") and one["state"] in ("wrong", "unsupported")}
    if off:
        sys.exit(f"Not exact, or not possible at all: {', '.join(sorted(off))}.")


if __name__ == "__main__":
    main()
