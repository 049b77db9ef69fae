"""Train the book's visual model.

Run as ``python -m workflow.see``, on a GPU if torch finds one (``NB_DEVICE``). It may be killed at any moment: started
again, there or on another device, it goes on from its last checkpoint, on the same grids in the same order. A model
that is there already stays. It is written whole, with its manifest, its card and what was measured at every stage.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from nb_utils import files, models
from workflow import training, visual
from workflow.visual import Spec, Visual, VisualError

WARM, FALL = 100, 0.4  # steps in which the rate rises, and the last part of training in which it falls
DECAY = 0.01  # of weights
ABOUT = """# Visual model

A small transformer that `make visual` trains from scratch to do to a picture what an example shows; finding 23 of the
book looks into it. `grids` holds its weights in half precision, a card (how it was trained, and what was measured on
the way) and a manifest, which is checked when it is loaded. It is ours, under CC BY 4.0.

After {steps:,} steps of {batch} grids, on figures that it was not trained on: {right:.0%} of answers are nearest to the
right operation with the right example, {none:.0%} without one; {wrong:.0%} follow an example of another operation.
"""
ALONE = 8  # one grid of so many is seen without example, too


def see(spec: Spec, root: str | Path = visual.SHIPPED, checkpoint_seconds: float = 60) -> Path:
    """Train a model, going on from its checkpoint if there is one, and save it; return its folder.

    One that is there already, trained as asked for, is left alone.
    """
    torch.set_num_threads(1)  # the products are small, and the order of their sums must not vary
    with training.checkpointed(f"visual/{spec.name}", asdict(spec)) as checkpoint:
        if not _is_there(spec, root):
            visual.save(learn(spec, checkpoint, checkpoint_seconds), root)
    describe(visual.load(spec.name, root), root)
    return Path(root) / spec.name


def describe(model: Visual, root: str | Path) -> None:
    """Write what the folder of a model says of it."""
    end = {row["shown"]: row["nearest"] for row in model.history if row["step"] == model.spec.steps}  # wrong: followed
    files.write(Path(root) / "README.md", ABOUT.format(**asdict(model.spec), **end).encode())


def _is_there(spec: Spec, root: str | Path) -> bool:
    try:
        return visual.load(spec.name, root).spec == spec
    except VisualError:
        return False


def learn(spec: Spec, checkpoint: Path, checkpoint_seconds: float) -> Visual:
    """Return the trained model; the checkpoint is written every so often."""
    model = visual.fresh(spec)
    model.net.to(models.placement())
    optimizers = optimized(model)
    course = training.Course(
        f"visual/{spec.name}", dict(model.net.named_parameters()), optimizers, spec.steps, spec.stages,
        partial(_step, model, optimizers), lambda: list(visual.measured(model, visual.SHOWN)),
    )  # fmt: skip
    return Visual(spec, model.net, tuple(training.train(course, checkpoint, checkpoint_seconds)))


def optimized(model: Visual) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, AdamW for the rest."""
    inside = [weight for weight in model.net.blocks.parameters() if weight.ndim == 2]
    rest = [weight for weight in model.net.parameters() if all(weight is not one for one in inside)]
    return [
        torch.optim.Muon(inside, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=DECAY),
    ]


def losses(model: Visual, of: visual.Grids) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the errors with example and, on some of the grids, without.

    Products are taken in bfloat16, of weights that stay in float32.
    """
    part = max(1, len(of) // ALONE)
    with torch.autocast(model.device.type, torch.bfloat16):
        painted = visual.seen(model, of.query, of.example), visual.seen(model, of.query[:part])
    return visual.error(painted[0], of.answer).mean(), visual.error(painted[1], of.answer[:part]).mean()


def _step(model: Visual, optimizers: list[torch.optim.Optimizer], step: int) -> str:
    """Take one step, on grids that its number draws; return what to print."""
    spec, generator = model.spec, torch.Generator().manual_seed(model.spec.seed << 32 | step)
    kinds, asked = visual.numbered(visual.TRAINED)
    drawn = torch.randint(len(kinds), (spec.batch,), generator=generator)
    shown, alone = losses(model, visual.grids(visual.figures().split[0], kinds[drawn], asked[drawn], generator))
    rate = spec.rate * min(1.0, (step + 1) / WARM, (1 - step / spec.steps) / FALL)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
    (shown + spec.alone * alone).backward()
    torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return f"errors {shown.item():.4f} with example and {alone.item():.4f} without"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m workflow.see", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Spec.steps)
    parser.add_argument("--checkpoint-seconds", type=float, default=60)
    parser.add_argument("--out", default=str(visual.SHIPPED))
    asked = parser.parse_args(argv)
    try:
        see(Spec(steps=asked.steps), asked.out, asked.checkpoint_seconds)
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
