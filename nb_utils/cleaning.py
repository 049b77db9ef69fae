"""Gradient-based cleanup: fine-tune sparse codes of a task vector on the task's own loss.

All of them drive one optimiser (`_descend`), which moves many candidate vectors at once through the engine: their
costs share every read of the model's weights. Nothing is chosen on training loss: each keeps the step that is best
on the validation pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nb_utils.engine import Site, Vocabulary
from nb_utils.saes import Sae
from nb_utils.vectors import keep_largest

Progress = Callable[[int, int], bool | None]  # told (step, steps in all) before each step; True stops
Rates = float | Sequence[float]  # of Adam: one for all rows, or one a row


@dataclass(frozen=True)
class Problem:
    """Where and on what a vector is cleaned: training and validation sites, layer, mode and softmax vocabulary."""

    train: Site
    validation: Site
    layer: int
    mode: str = "add"
    vocabulary: Vocabulary | None = None
    batch: int | None = None  # queries resampled at every step (None: always all of them)
    seed: int = 0  # with the step, draws these queries

    @property
    def device(self) -> torch.device:
        """Where the model is: there vectors are optimised, with the SAE beside them."""
        return self.train.model.device

    def drawn(self, step: int) -> Int[Tensor, " batch"] | None:
        """Return the training prompts of a step; None where all of them are taken at every step."""
        if not self.batch or self.batch >= len(self.train.prompts):
            return None
        draw = torch.Generator().manual_seed(step + (self.seed << 20))  # no run takes so many steps
        return torch.randperm(len(self.train.prompts), generator=draw)[: self.batch]

    def train_loss(self, vectors: Float[Tensor, "n d_model"], step: int) -> Float[Tensor, " n"]:
        """Return the loss of vectors on the prompts of a step, differentiable; on a GPU from a CUDA graph."""
        order = self.drawn(step)
        graph = self.train.captured(len(vectors), self.layer, self.mode, self.vocabulary, self.batch)
        if graph is not None:
            return graph(vectors, torch.arange(len(self.train.prompts)) if order is None else order)
        site = self.train if order is None else self.train.take(order)
        return site.loss(vectors, self.layer, self.mode, self.vocabulary)

    @torch.no_grad()
    def validation_loss(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        return self.validation.loss(vectors, self.layer, self.mode, self.vocabulary)


@dataclass(frozen=True)
class Cleaned:
    """A cleaned vector: codes [d_sae] (None for a dense one), what they decode to, and how they came about.

    Losses are nats per prompt over the answer tokens of the sites, in the problem's vocabulary, that of training on the
    batch of the step; `stated` gives them over the whole vocabulary and all prompts. ``choice_loss``: the validation
    loss, plus the penalty, that the step was chosen by. ``rate``: that of Adam.
    """

    codes: Float[Tensor, " d_sae"] | None
    vector: Float[Tensor, " d_model"]
    train_loss: float
    validation_loss: float
    choice_loss: float
    step: int
    rate: float
    penalty: float = 0.0

    @property
    def l0(self) -> int:
        return int((self.codes != 0).sum()) if self.codes is not None else len(self.vector)


def stated(problem: Problem, found: list[Cleaned]) -> list[Cleaned]:
    """Return vectors with the losses that a table may hold: over the whole vocabulary and all training prompts.

    ``problem``: its sites are taken, its vocabulary and batches are not.
    """
    vectors = torch.stack([one.vector for one in found])
    sites = problem.train, problem.validation
    scores = (site.evaluate(vectors, problem.layer, problem.mode, whole=False) for site in sites)
    losses = (score.nll.nansum(-1).mean(1).tolist() for score in scores)
    return [
        replace(one, train_loss=train, validation_loss=validation)
        for one, train, validation in zip(found, *losses, strict=True)
    ]


def best(found: Sequence[Cleaned]) -> Cleaned:
    """Return what validates best of vectors that were cleaned alike, at different rates."""
    return min(found, key=lambda one: one.choice_loss)


def clean(
    problem: Problem, sae: Sae, start: Float[Tensor, "n d_sae"], penalties: list[float], lr: Rates = 0.05,
    steps: int = 150, check_every: int = 10, bias: bool = True, patience: int | None = None,
    progress: Progress | None = None, act: Callable[[Tensor], Tensor] | None = None,
) -> list[Cleaned]:
    """Fine-tune SAE codes under an L1 penalty: the post's sparse SAE task-vector fine-tuning.

    ``start`` holds pre-activations, one row per penalty. A penalty of 1 costs one nat at the starting L1, whatever the
    SAE's scale; ``lr`` is in units of the mean active starting code. A latent that falls below its threshold is out
    for good; in a TopK SAE, which has none, one that falls below 0. ``bias`` adds the decoder bias. Kept is the step
    with the best validation loss *plus penalty*: with the loss alone, the early, dense steps would win at every
    penalty. With ``patience`` the run stops as the authors' do, when the L0 has found no new minimum for so many steps,
    and the last step is kept. ``progress`` is told of every step; where it says stop, the best of the steps so far is
    kept. ``act`` takes the place of the SAE's activation: a ReLU where ``start`` holds codes that are means.
    """
    sae, start = sae.to(problem.device), start.to(problem.device)
    active = (act or sae.act)(start)
    alive = active > 0
    # In a TopK SAE latents outside the support, which stay as they are, would compete for its places.
    fire = act or (sae.act if sae.k is None else torch.relu)
    unit = (active.sum(1) / alive.sum(1).clamp_min(1)).clamp_min(1e-9)[:, None]
    price = torch.tensor(penalties, device=start.device) / active.sum(1).clamp_min(1e-9)
    theta = _leaves(start / unit)

    def decode():
        codes = fire(torch.stack(theta) * unit) * alive
        return codes, codes @ sae.W_dec + (sae.b_dec if bias else 0), price * codes.sum(1)

    checks, lowest, since = [], torch.inf if patience is None else alive.sum().item(), 0
    for check in _descend(problem, theta, decode, lr, steps, check_every):
        alive = alive & (check.codes > 0)
        if check.validation is not None:
            checks.append(check)
        if patience is not None:
            l0 = alive.sum().item()
            lowest, since = (l0, 0) if l0 < lowest else (lowest, since + 1)
            if since >= patience and check.validation is not None:
                break
        if progress is not None and progress(check.step, steps):
            break
    return [_kept(checks, i, lr, penalty, last=patience is not None) for i, penalty in enumerate(penalties)]


def random_start(start: Float[Tensor, " d_sae"], sae: Sae, seed: int) -> Float[Tensor, " d_sae"]:
    """Give the active values of ``start`` (pre-activations) to random latents: the control that must fail.

    A latent whose threshold is above the value that it draws gets a value just above it, so that it starts alive.
    """
    values = start[sae.act(start) > 0]
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(seed))[: len(values)].to(start.device)
    strangers = torch.zeros_like(start)
    strangers[order] = torch.maximum(values, sae.threshold[order] * 1.01 + 1e-6)
    return strangers


def prune_with_refit(
    problem: Problem, sae: Sae, start: Float[Tensor, "n d_sae"], sizes=(200, 100, 50, 30, 20, 10, 5),
    lr: Rates = 0.05, steps: int = 20, check_every: int = 4, progress: Progress | None = None,
) -> list[list[Cleaned]]:
    """Prune signed codes to fewer and fewer latents, refitting the survivors' weights after each cut.

    ``start``: signed codes, one row per path (contrast codes, or a vector's codes without bias); the decoder bias is
    not used. Returns, per row, one result per size, so that one run gives the whole loss-L0 path at exact L0.
    ``progress`` is told of every step; where it says stop, the path ends with the size that it was at.
    """
    sae, codes = sae.to(problem.device), start.to(problem.device)
    paths = [[] for _ in codes]
    total = steps * len(sizes)
    for stage, size in enumerate(sizes):
        codes = keep_largest(codes, size, sae)
        unit = (codes.abs().sum(1) / (codes != 0).sum(1).clamp_min(1)).clamp_min(1e-9)[:, None]
        stopped = False

        def tell(step, first=stage * steps):
            nonlocal stopped
            stopped = progress is not None and bool(progress(first + step, total))
            return stopped

        best = refit(problem, sae, codes, unit, lr, steps, check_every, stage * steps, tell)
        for path, result in zip(paths, best, strict=True):
            path.append(result)
        codes = torch.stack([result.codes for result in best]).to(problem.device)
        if stopped:
            break
    return paths


def refit(
    problem: Problem, sae: Sae, start: Float[Tensor, "n d_sae"], unit: Float[Tensor, "#n #d_sae"], lr: Rates = 0.1,
    steps: int = 20, check_every: int = 4, first: int = 0, progress: Callable[[int], bool] | None = None,
) -> list[Cleaned]:
    """Tune the weights of signed codes on a frozen support: what is 0 stays 0, one result per row.

    ``unit``: the code that ``lr`` refers to. With one unit for all rows, a start that stands for a short vector goes
    as far as one for a long vector. The decoder bias is not used. ``first``: steps taken before, whose batches are not
    drawn again. ``progress`` is told of every step and stops after it by answering True.
    """
    sae, start, unit = sae.to(problem.device), start.to(problem.device), unit.to(problem.device)
    kept = start != 0
    weights = _leaves(start / unit)

    def decode():
        codes = torch.stack(weights) * unit * kept
        return codes, codes @ sae.W_dec, torch.zeros(len(codes), device=codes.device)

    checks = []
    for check in _descend(problem, weights, decode, lr, steps, check_every, first):
        if check.validation is not None:
            checks.append(check)
        if progress is not None and progress(check.step):
            break
    return [_kept(checks, i, lr) for i in range(len(start))]


def learned_vector(
    problem: Problem, start: Float[Tensor, "n d_model"], lr: Rates = 0.05, steps: int = 100, check_every: int = 5
) -> list[Cleaned]:
    """Optimise a free dense vector on the same loss: the upper bound without any SAE (Learned-TV).

    ``lr`` is in units of the start's root-mean-square entry.
    """
    start = start.to(problem.device)
    unit = start.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-9)
    free = _leaves(start / unit)

    def decode():
        return None, torch.stack(free) * unit, torch.zeros(len(start), device=start.device)

    checks = [c for c in _descend(problem, free, decode, lr, steps, check_every) if c.validation is not None]
    return [_kept(checks, i, lr) for i in range(len(start))]


@dataclass(frozen=True)
class _Check:
    """The state of all rows at one step; losses only where validation was due."""

    step: int
    codes: Tensor | None
    vectors: Tensor
    train: Tensor
    validation: Tensor | None
    penalty: Tensor


def _leaves(rows: Float[Tensor, "n d"]) -> list[Tensor]:
    """Return one parameter per row, so that each may have a rate of its own."""
    return [row.clone().requires_grad_() for row in rows]


def _descend(
    problem: Problem, parameters: list[Tensor], decode: Callable, lr: Rates, steps: int, check_every: int,
    first: int = 0,
) -> Iterator[_Check]:
    """Run Adam on all rows at once, yielding the state before every step and after the last.

    Rows do not influence each other: their losses are summed, and Adam normalises each entry by itself.
    """
    rows = [{"params": [row], "lr": _rate(lr, i)} for i, row in enumerate(parameters)]
    optimizer = torch.optim.Adam(rows, fused=problem.device.type == "cuda")  # there one kernel a row, not ten
    for step in range(steps + 1):
        codes, vectors, penalty = decode()
        due = step % check_every == 0 or step == steps
        train = problem.train_loss(vectors if step < steps else vectors.detach(), first + step)
        yield _Check(
            step, None if codes is None else codes.detach(), vectors.detach(), train.detach(),
            problem.validation_loss(vectors.detach()) if due else None, penalty.detach(),
        )
        if step < steps:
            optimizer.zero_grad()
            (train + penalty).sum().backward()
            optimizer.step()


def _rate(lr: Rates, row: int) -> float:
    return lr[row] if isinstance(lr, Sequence) else lr


def _kept(checks: list[_Check], row: int, lr: Rates, penalty: float = 0.0, last: bool = False) -> Cleaned:
    kept = checks[-1] if last else min(checks, key=lambda c: (c.validation[row] + c.penalty[row]).item())
    return Cleaned(
        codes=None if kept.codes is None else kept.codes[row].clone().cpu(), vector=kept.vectors[row].clone().cpu(),
        train_loss=kept.train[row].item(), validation_loss=kept.validation[row].item(),
        choice_loss=(kept.validation[row] + kept.penalty[row]).item(), step=kept.step, rate=_rate(lr, row),
        penalty=penalty,
    )
