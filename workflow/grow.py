"""Grow the book's small models: with and without a loss that asks for a task vector.

Run as ``python -m workflow.grow``, on a GPU if torch finds one (``NB_DEVICE``), several models at a time. It may be
killed at any moment: started again, there or on another device, it goes on from the last checkpoint of every model, on
the same prompts in the same order. Models that are there already stay. Each is written whole, with its manifest, its
card and what was measured at every stage of its training.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from nb_utils import files, models
from workflow import grown, training
from workflow.grown import Grown, GrownError, Spec

WARM, FALL = 100, 0.3  # steps in which the rate rises, and the last part of training in which it falls
DECAY = 0.01  # AdamW's
ON_A_GPU = 8  # models at a time there: each alone leaves it idle
ABOUT = """# Grown models

Small transformers that `make grow` trains from scratch on families of generated tasks, with and without a loss that
asks for a task vector after a block; finding 24 of the book looks into them. Each folder holds weights in half
precision, a card (how it was trained, and what was measured on the way) and a manifest, which is checked when the model
is loaded. They are ours, under CC BY 4.0.

At the end of training, on the tasks of training: right answers with all examples of a prompt, and by the mean vector
after the block alone.

| family | model | seed | block | steps | with examples | by the vector |
| --- | --- | --- | --- | --- | --- | --- |
"""


def grow(spec: Spec, root: str | Path = grown.SHIPPED, checkpoint_seconds: float = 60) -> Path:
    """Train a model, going on from its checkpoint if there is one, and save it; return its folder.

    One that is there already, grown as asked for, is left alone. Raises GrownError if what it starts from is missing.
    """
    torch.set_num_threads(1)  # the products are small, and the order of their sums must not vary
    with training.checkpointed(f"grown/{spec.name}", asdict(spec)) as checkpoint:
        if not _is_there(spec, root):
            grown.save(learn(spec, root, checkpoint, checkpoint_seconds), root)
    return Path(root) / spec.name


def _is_there(spec: Spec, root: str | Path) -> bool:
    try:
        return grown.load(spec.family, spec.variant, spec.seed, root).spec == spec
    except GrownError:
        return False


def learn(spec: Spec, root: str | Path, checkpoint: Path, checkpoint_seconds: float) -> Grown:
    """Return the trained model; the checkpoint is written every so often."""
    model = grown.fresh(spec)
    if spec.start:
        model.hf.load_state_dict(grown.load(spec.family, spec.start, spec.seed, root).hf.state_dict())
    model.hf.to(models.placement())
    optimizer = torch.optim.AdamW(model.hf.parameters(), lr=spec.rate, weight_decay=DECAY, fused=True)
    course = training.Course(
        spec.name, dict(model.hf.named_parameters()), [optimizer], spec.steps, spec.stages,
        lambda step: f"losses {' and '.join(f'{x:.2f}' for x in _step(model, optimizer, step))}",
        lambda: measured(model),
    )  # fmt: skip
    return Grown(spec, model.hf, tuple(training.train(course, checkpoint, checkpoint_seconds)))


def _step(model: Grown, optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
    """Take one step, on prompts that its number draws; return both losses."""
    spec, tasks = model.spec, model.family.trained
    generator = torch.Generator().manual_seed(spec.seed << 32 | step)
    drawn = tasks[torch.randint(len(tasks), (spec.batch,), generator=generator)]
    in_context, by_vector = grown.losses(model, grown.draw(model.family, drawn, spec.pairs, generator))
    falling = min(1.0, (1 - step / spec.steps) / FALL)
    optimizer.param_groups[0]["lr"] = spec.rate * min(1.0, (step + 1) / WARM) * falling
    optimizer.zero_grad()
    (in_context + spec.weight * by_vector).backward()
    optimizer.step()
    return in_context.detach(), by_vector.detach()


def measured(model: Grown) -> list[dict]:
    """Return what a stage keeps: rows of `grown.in_context` and of `grown.by_vector`, rounded."""
    rows = [*grown.in_context(model, grown.SHOWN), *grown.by_vector(model, grown.SHOWN)]
    return [row | {name: round(row[name], 4) for name in ("loss", "accuracy")} for row in rows]


def grow_all(wanted: Sequence[Spec], root: str | Path = grown.SHIPPED, jobs: int = 1, **more: object) -> None:
    """Grow models, so many at a time, and describe them; those that start from another one come after the rest."""
    job = partial(grow, root=root, **more)
    for wave in ([spec for spec in wanted if not spec.start], [spec for spec in wanted if spec.start]):
        if jobs == 1:
            list(map(job, wave))
        elif wave:  # processes of their own: a fork of one that has used a GPU cannot use it
            with ProcessPoolExecutor(min(jobs, len(wave)), get_context("spawn")) as pool:
                list(pool.map(job, wave))
    describe(root)


def describe(root: str | Path) -> None:
    """Write the card of all models in a folder: what they are, and what each does at the end of its training."""
    lines = []
    for path in sorted(Path(root).glob(f"*/*/{training.CARD}")):
        card = json.loads(path.read_text(encoding="utf-8"))
        spec, end = card["spec"], [row for row in card["history"] if row["step"] == card["spec"]["steps"]]
        end = [row for row in end if row["on"] == "train"]
        shown = max((row for row in end if row["method"] == "in_context"), key=lambda row: row["shots"])
        (vector,) = (row for row in end if row["method"] == "mean" and row["layer"] == spec["at"])
        lines.append(f"| {spec['family']} | {spec['variant']} | {spec['seed']} | {spec['at']} | {spec['steps']:,} | "
                     f"{shown['accuracy']:.2f} | {vector['accuracy']:.2f} |\n")  # fmt: skip
    files.write(Path(root) / "README.md", (ABOUT + "".join(lines)).encode())


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m workflow.grow", description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(grown.FAMILIES), help="with commas between them")
    parser.add_argument("--seeds", type=int, default=3, help="models of each sort")
    parser.add_argument("--steps", type=int, default=Spec.steps)
    parser.add_argument("--jobs", type=int, help="models at a time (one a core; on a GPU several)")
    parser.add_argument("--checkpoint-seconds", type=float, default=60)
    parser.add_argument("--out", default=str(grown.SHIPPED))
    asked = parser.parse_args(argv)
    try:
        jobs = asked.jobs or (ON_A_GPU if models.placement() != "cpu" else len(os.sched_getaffinity(0)))
        names = [grown.family(name.strip()).name for name in asked.families.split(",")]
        wanted = grown.planned(asked.seeds, names, steps=asked.steps)
        grow_all(wanted, asked.out, jobs, checkpoint_seconds=asked.checkpoint_seconds)
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
