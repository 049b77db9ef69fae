"""Small models that the book trains itself: training that may be killed at any moment, and what is kept of them.

Started again, training goes on from its last checkpoint. A kept model is a folder: weights in half precision, a card
(how it was trained, and what was measured on the way) and a manifest, which is checked when it is loaded.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from nb_utils import files, models
from nb_utils.text import visible

WEIGHTS, CARD = "model.safetensors", "card.json"
HISTORY, STATE = "history", "state"


class TrainingError(ValueError):
    """Training that stopped for want of a device; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Course:
    """What is trained, and how: ``step`` takes one and says what is printed, ``measured`` is asked at every stage."""

    name: str
    weights: Mapping[str, Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    steps: int
    stages: int
    step: Callable[[int], str]
    measured: Callable[[], list[dict]]

    def states(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what its optimizer remembers of a weight; what is put there, it remembers."""
        for optimizer in self.optimizers:
            if any(weight is one for group in optimizer.param_groups for one in group["params"]):
                return optimizer.state[weight]
        return {}


@contextmanager
def checkpointed(name: str, settings: Mapping) -> Iterator[Path]:
    """Yield the path of the checkpoint of a training with these settings, which goes when all went well.

    Only one process at a time has it. Raises TrainingError where a device fails, its memory being full or itself gone.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    checkpoint = models.cache_dir() / "training" / f"{name.replace('/', '.')}.{key}.checkpoint"
    with files.alone(checkpoint.with_suffix(".training")):
        try:
            yield checkpoint
        except RuntimeError as error:
            if (device := models.placement()) == "cpu":
                raise
            raise TrainingError(
                f"{device} failed ({str(error).splitlines()[0][:160]}): call again to go on from the last checkpoint, "
                "with NB_DEVICE=cpu if it stays away."
            ) from error
        checkpoint.unlink(missing_ok=True)


def train(course: Course, checkpoint: Path, checkpoint_seconds: float) -> list[dict]:
    """Take all steps that a checkpoint lacks, writing one every so often; return what was measured, stage by stage."""
    done, history = 0, []
    if stored := files.unsealed(checkpoint):
        done, history = _put_back(safetensors.torch.load(stored), course)
        print(f"{course.name}: continuing after step {done}", flush=True)
    saved = time.time()
    for step in range(done, course.steps):
        said = course.step(step)
        if (step + 1) * course.stages // course.steps > step * course.stages // course.steps:
            history += [{"step": step + 1, **row} for row in course.measured()]
            print(f"{course.name}: {step + 1}/{course.steps}, {said}", flush=True)
        if time.time() - saved > checkpoint_seconds:
            files.seal(checkpoint, safetensors.torch.save(_state(step + 1, history, course)))
            saved = time.time()
    return history


def _state(done: int, history: list[dict], course: Course) -> dict[str, Tensor]:
    said = torch.frombuffer(bytearray(json.dumps([done, history]).encode()), dtype=torch.uint8)
    found = {HISTORY: said} | {name: weight.detach().cpu() for name, weight in course.weights.items()}
    for name, weight in course.weights.items():
        found |= {f"{STATE}.{name}.{key}": value.cpu() for key, value in course.states(weight).items()}
    return found


@torch.no_grad()
def _put_back(stored: dict[str, Tensor], course: Course) -> tuple[int, list[dict]]:
    for name, weight in course.weights.items():
        weight.copy_(stored[name])
        start = f"{STATE}.{name}."
        found = {key[len(start) :]: value for key, value in stored.items() if key.startswith(start)}
        course.states(weight).update({key: value.to(weight.device) for key, value in found.items()})
    done, history = json.loads(bytes(stored[HISTORY].tolist()))
    return done, history


@dataclass(frozen=True)
class Shelf:
    """Where models of a sort are kept: what one is called, what makes it, what its card says, what is raised."""

    sort: str
    command: str
    spec: type
    error: type[ValueError]

    def keep(self, folder: Path, spec: object, history: Sequence[dict], net: torch.nn.Module) -> Path:
        """Write weights (half precision), card and manifest of a model; return its folder."""
        weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in net.state_dict().items()}
        card = {"spec": asdict(spec), "history": list(history)}
        files.write(folder / WEIGHTS, safetensors.torch.save(weights))
        files.write(folder / CARD, json.dumps(card, indent=0).encode())
        files.describe(folder, [CARD, WEIGHTS])
        return folder

    def load(self, folder: Path, name: str, fresh: Callable) -> tuple[object, torch.nn.Module, tuple[dict, ...], str]:
        """Return what a folder holds: the spec, the model where models go (`models.placement`), history and hash.

        ``name``: what its spec must be called. ``fresh`` makes an untrained model of a spec. Raises the shelf's error,
        in one sentence, if there is none, its files are damaged, or it is of another sort.
        """
        shown, remedy = visible(str(folder)), f"take it from git again, or delete the folder and run `{self.command}`"
        try:
            if files.check(folder) is None:
                raise self.error(f"There is no {self.sort} {shown}: `{self.command}` trains it.")
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            spec, history = self.spec(**card["spec"]), tuple(card["history"])
            weights = safetensors.torch.load_file(folder / WEIGHTS)
        except files.FileError as error:
            raise self.error(f"{error}: {remedy}.") from error
        except self.error:
            raise
        except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
            raise self.error(f"{shown} holds no {self.sort}: {remedy}.") from error
        if spec.name != name:
            raise self.error(f"{shown} holds the model {visible(spec.name)}, which is another: {remedy}.")
        net = fresh(spec)
        try:
            net.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
        except RuntimeError as error:
            raise self.error(f"{shown} has weights of another model: {remedy}.") from error
        net = net.eval().requires_grad_(False).to(models.placement())
        return spec, net, history, files.sha256(folder / WEIGHTS)
