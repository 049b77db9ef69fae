"""Measure the engine against its peers, against the machine, and how cost grows: ``make bench``.

All tools run interleaved in one process on one thread; times are processor seconds, which other work on the machine
hardly touches. A repeat gives one ratio; the spread over repeats is reported with it.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pandas as pd
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from benchmarks import peers
from nb_utils import cleaning, engine, models, prompts, saes, tables, tasks, vectors

TASK, LAYER, PROMPTS, PENALTIES = "antonyms", 10, 24, [0.3, 1.0, 3.0, 10.0]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


class Steps:
    """A cleaning problem whose training loss alone is computed, and kept to compare trajectories."""

    device = torch.device("cpu")

    def __init__(self, loss):
        self.loss, self.seen = loss, []

    def train_loss(self, given, step):
        losses = self.loss(given)
        self.seen.append(losses.detach())
        return losses

    def validation_loss(self, given):
        return torch.zeros(len(given))


def interleaved(benchmark, tools, repeats):
    """Time every tool ``repeats`` times in turn, after one unmeasured round.

    ``tools``: {name: (units of work, function)}; a function returns numbers to compare with those of the first tool.
    """
    rows, found = [], {name: run() for name, (_, run) in tools.items()}
    exact = next(iter(found.values()))
    for repeat in range(repeats):
        for name, (units, run) in tools.items():
            start = time.process_time()
            run()
            seconds = time.process_time() - start
            difference = (found[name][: len(exact)] - exact[: len(found[name])]).abs().max().item()
            rows.append(row(benchmark, name, seconds, units, repeat=repeat, difference=difference))
            print(f"{benchmark:12} {name:28} {seconds / units:9.4f} s  (differs by {difference:.1e})", flush=True)
    return rows


def row(benchmark, tool, seconds, units=1.0, repeat=0, size=0.0, difference=0.0, flops=0.0, peak=0.0):
    return {"benchmark": benchmark, "tool": tool, "repeat": repeat, "size": float(size), "seconds": seconds,
            "units": float(units), "difference": difference, "flops": float(flops), "bytes": float(peak)}  # fmt: skip


def needed(site, layer, kept):
    """Count the floating-point work of one vector: the products of the blocks after ``layer`` and the logits."""
    blocks = site.model.hf.model.layers[layer + 1 :]
    weights = sum(w.numel() for block in blocks for w in block.parameters() if w.ndim == 2)
    return 2 * (len(site.labels) * weights + len(site.labels) * kept * site.model.d_model)


def matmul_rate(n=2048, repeats=5):
    """Return floating-point operations a second of the best of a few square products on one thread."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * n**3 / min(times)


def problem(model, layer=LAYER, n=PROMPTS, task=TASK):
    pairs = tasks.split(tasks.load(task)).train[:n]
    made = prompts.zero_shot(model.tokenizer, pairs)
    return made, engine.Site.prepare(model, made, answer_tokens=2)


def cleaning_step(model, repeats, steps=4):
    """Clean one task at one layer: the same Adam steps on the same loss, once per penalty, or four in one pass."""
    made, site = problem(model)
    sae, kept = saes.load(model, "shipped", LAYER), engine.vocabulary(site)
    at = vectors.separators(model, tasks.split(tasks.load(TASK)).vector, [LAYER], 4, 8)
    start = sae.pre_activations(vectors.task_vector(at, LAYER))

    def run(loss, n=1):
        def clean():
            steps_taken = Steps(loss)
            cleaning.clean(steps_taken, sae, start.expand(n, -1), PENALTIES[:n], 0.2, steps, check_every=steps)
            return torch.stack(steps_taken.seen)[:, 0]

        return (steps + 1) * n, clean

    ours = {
        "ours, exact": run(lambda v: site.loss(v, LAYER)),
        "ours": run(lambda v: site.loss(v, LAYER, vocabulary=kept)),
        "ours, four penalties": run(lambda v: site.loss(v, LAYER, vocabulary=kept), 4),
        "ours, exact, four penalties": run(lambda v: site.loss(v, LAYER), 4),
    }
    theirs = {name: run(kind(model, made, LAYER).losses) for name, kind in peers.ALL.items()}
    rows = interleaved("cleaning", ours | theirs, repeats)
    for one in rows:
        if one["tool"] in ("ours", "ours, four penalties"):  # forward and backward, but for the last step
            one["flops"] = needed(site, LAYER, len(kept.weight)) * (2 * steps + 1) / (steps + 1) * one["units"]
    return rows


@torch.no_grad()
def heatmap(model, repeats, few=4, many=32):
    """Steer by features at one scale: the exact loss of every feature, on every prompt, over the whole vocabulary."""
    made, site = problem(model)
    directions = saes.load(model, "shipped", LAYER).decoder_directions * site.at(LAYER).norm(dim=1).mean()
    tools = {"ours": (many, lambda: site.evaluate(directions[:many], LAYER).loss().mean(1))}
    for name, kind in peers.ALL.items():
        peer = kind(model, made, LAYER)
        tools[name] = (few, lambda peer=peer: peer.losses(directions[:few]))
    rows = interleaved("heatmap", tools, repeats)
    for one in rows:
        if one["tool"] == "ours":
            one["flops"] = needed(site, LAYER, len(model.hf.lm_head.weight)) * many
    return rows


@torch.no_grad()
def extraction(model, repeats):
    """Average the residual stream over the separators of 16 prompts of 16 shots."""
    pool = tasks.split(tasks.load(TASK)).vector
    made = prompts.few_shot(model.tokenizer, pool, pool[:16], 16, seed=0)
    spots = [p.separators[1:] for p in made]
    at = [(i, c) for i, spot in enumerate(spots) for c in spot]
    pick = tuple(torch.tensor(at).T)
    tools = {"ours": (1, lambda: engine.residuals(model, made, spots, [LAYER])[LAYER].mean(0))}
    for name, kind in peers.ALL.items():
        peer = kind(model, made, LAYER)
        tools[name] = (1, lambda peer=peer: peer.stream()[pick].mean(0))
    return interleaved("extraction", tools, repeats)


def sae_training(model, repeats, steps=3, batch=2048, d_sae=4096, k=46):
    """Train the same BatchTopK SAE on the same activations, in our loop and in SAELens's trainer; units are tokens."""
    import numpy as np
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from workflow import train_saes

    pool = tasks.load(TASK).pairs
    made = prompts.few_shot(model.tokenizer, pool, pool[:64], 16, seed=0)
    x = engine.residuals(model, made, [tuple(range(1, len(p.ids))) for p in made], [LAYER])[LAYER]
    x = x.repeat(-(-batch // len(x)), 1)[:batch]
    spec = train_saes.Spec("benchmark", 0, d_sae, k, len(x), 1e-3)
    mine = train_saes.Sae.fresh(x, spec)
    mine.find_dead()
    config = BatchTopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k, normalize_activations="none")
    settings = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=1e-3, lr_end=1e-4)
    scaled = (x - mine.mean) * mine.scale

    def ours():
        rng = np.random.default_rng(0)
        return torch.stack([mine.step(x, k, 1e-3, rng) for _ in range(steps)]) * torch.nan  # other initial weights

    def theirs():
        SAETrainer(settings, BatchTopKTrainingSAE(config), (scaled for _ in range(steps + 1))).fit()
        return torch.full((steps,), torch.nan)

    tools = {"ours": (steps * batch, ours), "SAELens": (steps * batch, theirs)}
    return interleaved("SAE training", tools, repeats)


def start_up(model, repeats):
    """Time a whole run whose one cell loads model and SAE: in a fresh kernel, and forked from a warm parent."""
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder, "start.ipynb"), Path(folder, "kernels", "socket")
        path.parent.mkdir()
        cell = "import os\nfrom nb_utils import engine, measurements, models, plots, saes, tables, tasks, vectors\n" + (
            f'sae = saes.load(models.load("{model.name}"), "shipped", {LAYER})\nprint(os.getppid())')
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [new_markdown_cell("# Start"), new_code_cell("seed = 0", metadata={"tags": ["parameters"]})]
        nbformat.write(new_notebook(cells=[*cells, new_code_cell(cell)], metadata={"kernelspec": kernel}), source)
        parent = subprocess.Popen(
            [sys.executable, "-m", "nb_utils.kernels", str(path), "--model", model.name], stdin=subprocess.PIPE)

        def run(**more):
            output = Path(folder, "out.ipynb")
            command = [sys.executable, "-m", "nb_utils.runs", source, "-o", output, "--log", f"{output}.log"]
            start = time.perf_counter()
            subprocess.run(command, env=os.environ | more, check=True, stdout=subprocess.DEVNULL)
            whole = time.perf_counter() - start
            last = nbformat.read(output, as_version=4).cells[-1]
            assert (int(last.outputs[-1].text) == parent.pid) == bool(more), "a kernel of the wrong kind: run it again"
            return whole, last.metadata.papermill.duration

        rows = []
        try:
            run(NB_KERNELS=str(path))  # waits for the warm-up
            for repeat in range(repeats):
                for tool, more in {"ours": {"NB_KERNELS": str(path)}, "fresh kernel": {}}.items():
                    whole, computing = run(**more)
                    rows += [row("start-up, run", tool, whole, repeat=repeat), row("start-up, cell", tool, computing,
                                                                                   repeat=repeat)]  # fmt: skip
                    print(f"start-up     {tool:28} {whole:9.2f} s, of which imports and loading {computing:.2f} s")
        finally:
            parent.stdin.close()
            parent.wait()
    return rows


def alone(work, model, copies=1):
    """Run ``work`` in forks of this process; return their processor seconds and how much their memory rose at most."""
    reader, writer = os.pipe()
    for _ in range(copies):
        if os.fork():
            continue
        for weight in model.hf.parameters():
            weight.sum()  # maps the weights, which are files, before we look at the memory
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark so far
        before = _memory("VmRSS")
        start = time.process_time()
        work()
        os.write(writer, f"{time.process_time() - start} {_memory('VmHWM') - before}\n".encode())
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


def growth(model):
    """Measure seconds and memory of the engine as one size at a time grows; the rest as in ``cleaning_step``."""
    _, site = problem(model)
    kept = engine.vocabulary(site)
    noise = torch.randn(64, model.d_model, generator=torch.Generator().manual_seed(0)) * 100

    def descend(site, layer, n, vocabulary):
        def step():
            given = noise[:n, : site.model.d_model].clone().requires_grad_()
            site.loss(given, layer, vocabulary=vocabulary).sum().backward()

        return step

    def clean(d_sae):
        sae = saes.random(model, LAYER, d_sae)
        start = sae.pre_activations(site.at(LAYER).mean(0)).expand(4, -1)
        return lambda: cleaning.clean(
            Steps(lambda v: site.loss(v, LAYER, vocabulary=kept)), sae, start, PENALTIES, 0.2, 1, check_every=1)

    works = {("features", n): lambda n=n: site.evaluate(noise[:n], LAYER) for n in (1, 4, 16, 64)}
    for n in (8, 16, 24, 48):  # a task may have fewer
        more = problem(model, n=n)[1]
        works["prompts", len(more.prompts)] = lambda more=more: more.evaluate(noise[:4], LAYER)
    works |= {("gradient rows", n): descend(site, LAYER, n, kept) for n in (1, 4, 16, 64)}
    works |= {("blocks after the vector", model.n_layers - 1 - at): descend(site, at, 4, kept) for at in (4, 8, 12, 16)}
    works |= {("latents of the SAE", d_sae): clean(d_sae) for d_sae in (1024, 4096, 16384, 65536)}
    works |= {("tasks at a time", n): works["features", 16] for n in (1, 2, 4)}
    rows = []
    for (axis, size), work in works.items():
        seconds, peak = alone(work, model, size if axis == "tasks at a time" else 1)
        rows.append(row("growth", axis, seconds, size=size, peak=peak))
        print(f"{axis:28} {size:8} {seconds:9.3f} s {peak / 1e6:9.0f} MB", flush=True)
    for name in ("tiny", "smollm2-135m-instruct", model.name):
        other = models.load(name)
        small = problem(other)[1]
        weights = sum(w.numel() for w in other.hf.parameters())
        layer, vocabulary = other.n_layers // 2, engine.vocabulary(small)
        seconds, peak = alone(descend(small, layer, 4, vocabulary), other)
        flops = 2 * 4 * needed(small, layer, len(vocabulary.weight))
        rows.append(row("model", name, seconds, size=weights, peak=peak, flops=flops))
        print(f"{name:28} {weights:12} {seconds:9.3f} s {peak / 1e6:9.0f} MB", flush=True)
    return rows


def machine():
    """Describe what was measured on, without naming it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    has = text.partition("flags")[2].partition("\n")[0].split()
    brand = text.partition("model name")[2].partition("\n")[0].strip(" \t:") or platform.processor()
    return {"processor": brand, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "features": [flag for flag in FLAGS if flag in has], "byte_budget": engine.BYTE_BUDGET}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tables-dir", help="another folder for the table")
    parser.add_argument("--only", help="one part, and no table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load("gemma-3-270m")
    if args.only:
        return globals()[args.only](model, *[args.repeats] * (args.only != "growth"))
    rates = [matmul_rate() for _ in range(3)]
    begun = time.monotonic()
    rows = growth(model)  # first: it forks, which the libraries below may not survive
    print(f"growth: {time.monotonic() - begun:.0f} s in all", flush=True)
    for part in (cleaning_step, heatmap, extraction, sae_training, start_up):
        begun = time.monotonic()
        rows += part(model, args.repeats)
        rates.append(matmul_rate())
        print(f"{part.__name__}: {time.monotonic() - begun:.0f} s in all", flush=True)
    rows += [row("matmul", "machine", 2 * 2048**3 / rate, flops=2 * 2048**3, repeat=i) for i, rate in enumerate(rates)]
    print(f"matmul: {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    origin = tables.provenance({"repeats": args.repeats, "machine": machine()}, model.sha256, {})
    tables.save(pd.DataFrame(rows), "benchmarks", "speed", origin, folder=args.tables_dir, model=model.name)


if __name__ == "__main__":
    main()
