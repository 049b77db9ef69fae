"""What experiments share: what all of them load, and rows, scores of candidates as the book's tidy tables."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import models, saes, tasks
from nb_utils.engine import Scores, Site, Vocabulary
from nb_utils.models import Model
from nb_utils.saes import Sae
from nb_utils.tasks import Splits, Task
from nb_utils.text import verbatim


@dataclass(frozen=True)
class Loaded:
    """A task and its splits, a model, and what was asked for of its blocks, each with its SAE.

    ``fast`` is the model that gradients are taken in, ``repeated`` those of ``wanted`` that are run with every seed.
    """

    word: Task
    splits: Splits
    lm: Model
    fast: Model
    wanted: list[int]
    repeated: list[int]
    saes: dict[int, Sae]

    @property
    def about_task(self) -> str:
        """Say in Markdown how many pairs there are for what, with an example, and where they come from."""
        word, splits, shown = self.word, self.splits, self.splits.test[0]
        return (
            f"**{verbatim(word.title)}**: {len(splits.vector)} pairs make vectors, {len(splits.train)} train them, "
            f"{len(splits.validation)} validate, {len(splits.test)} test, for instance "
            f"{verbatim(f'{shown.x} -> {shown.y}')}. Source: {verbatim(word.origin)} ({verbatim(word.licence)})."
        )

    @property
    def about_model(self) -> str:
        """Say in Markdown how large the model is, and which SAEs are read."""
        blocks, model = ", ".join(map(str, self.wanted)), f"{self.lm.n_layers} blocks of width {self.lm.d_model}"
        if not self.saes:
            return f"{verbatim(self.lm.name)}: {model}."
        return (
            f"{verbatim(self.lm.name)}: {model}; SAEs with {self.saes[self.wanted[0]].d_sae:,} latents after "
            f"block{'s' * (len(self.wanted) > 1)} {blocks}."
        )


def prepare(
    task: str, model: str, sae_set: str | None, layers: str | int, repeat_layers: str | int = "all", seeds: int = 1,
    half: bool = False, kind: str = "word",
) -> Loaded:
    """Load what an experiment's parameters ask for; ``layers``: blocks with commas between, or all that have an SAE.

    ``sae_set``: None reads no SAE, and all blocks are all that the model has. ``half``: take gradients in the dtype
    that is fastest (`Model.fast`). ``kind`` of task, as `tasks.load` takes it. Raises what `tasks.load`, `models.load`
    and `saes.load` raise, and ValueError where there are several seeds and no block for them.
    """
    word, lm = tasks.load(task, kind), models.load(model)
    every = range(lm.n_layers) if sae_set is None else saes.layers(lm, sae_set)
    wanted = list(every) if layers == "all" else [int(part) for part in str(layers).split(",")]
    return Loaded(
        word, tasks.split(word), lm, lm.fast() if half else lm, wanted, repeated(wanted, repeat_layers, seeds),
        {} if sae_set is None else {layer: saes.load(lm, sae_set, layer) for layer in wanted},
    )


def prepare_exchanges(task: str, model: str, sae_set: str, layers: str | int, half: bool = False) -> Loaded:
    """Load exchanges, a model and SAEs as `prepare` loads a task's; the splits are those of topics.

    Raises what `tasks.exchanges`, `models.load` and `saes.load` raise.
    """
    talk, lm = tasks.exchanges(task), models.load(model)
    wanted = list(saes.layers(lm, sae_set)) if layers == "all" else [int(part) for part in str(layers).split(",")]
    dictionaries = {layer: saes.load(lm, sae_set, layer) for layer in wanted}
    return Loaded(talk.task, talk.splits, lm, lm.fast() if half else lm, wanted, wanted, dictionaries)


def controls(model: Model, names: Iterable[str], layer: int) -> dict[str, Sae]:
    """Load, of the sets that the shipped one is held against, those that are here and have an SAE after a block.

    They lie in ``controls/<model>/<name>`` of `saes.shipped`, where ``python -m workflow.train_saes --out
    saes/controls`` puts them (workflow/dictionaries.yaml names them all); none comes with the book.
    """
    home = saes.shipped() / "controls" / Path(model.name).name
    here = [name for name in names if (home / name).is_dir() and layer in saes.layers(model, home / name)]
    return {name: saes.load(model, home / name, layer) for name in here}


@dataclass(frozen=True)
class Candidate:
    """A vector to score, and how it was made; ``k`` atoms asked for, ``l0`` atoms used (None: dense).

    ``vector``: [d_model], or [batch, d_model], one a prompt; of candidates that are scored together all alike. None
    where something else than a vector is scored (`laid_out`).
    """

    method: str
    vector: Float[Tensor, "*batch d_model"] | None
    k: int | None = None
    l0: int | None = None
    scale: float = 1.0
    penalty: float = float("nan")
    seed: int = 0
    extra: dict = field(default_factory=dict)


def rows(
    site: Site, layer: int, candidates: list[Candidate], zero_shot: float, mode: str = "add", on: str = "test",
    reference: Float[Tensor, "batch vocab"] | None = None,
) -> pd.DataFrame:
    """Score every candidate, exactly and over the whole vocabulary; one row each.

    ``zero_shot`` is the mean zero-shot loss on the same prompts, to which ``rel_loss`` refers. ``reference`` holds
    few-shot next-token log-probabilities; with it, ``d_ntp`` is their mean KL divergence to the steered ones.
    """
    return laid_out(
        site.evaluate(torch.stack([c.vector for c in candidates]), layer, mode, reference),
        layer, candidates, zero_shot, mode, on,
    )  # fmt: skip


def laid_out(
    scores: Scores, layer: int, candidates: list[Candidate], zero_shot: float, mode: str = "add", on: str = "test"
) -> pd.DataFrame:
    """Lay out scores that were had in whatever way, such as by heads that were set, as `rows` does."""
    return pd.DataFrame([
        {
            "layer": layer, "method": c.method, "mode": mode, "k": c.k, "scale": c.scale, "l0": c.l0,
            "penalty": c.penalty, "seed": c.seed, "on": on, **measures(scores, i, zero_shot), **c.extra,
        }
        for i, c in enumerate(candidates)
    ]).astype({"k": "Int64", "l0": "Int64"})


def baseline(site: Site, method: str, zero_shot: float | None = None, on: str = "test") -> pd.DataFrame:
    """Score the site's prompts without steering: one row for "zero_shot" or "few_shot"."""
    scores = site.unsteered()
    zero_shot = scores.loss()[0].mean().item() if zero_shot is None else zero_shot
    row = {
        "layer": -1, "method": method, "mode": "none", "k": None, "scale": 1.0, "l0": None, "penalty": float("nan"),
        "seed": 0, "on": on, **measures(scores, 0, zero_shot),
    }
    return pd.DataFrame([row]).astype({"k": "Int64", "l0": "Int64"})


def measures(scores: Scores, i: int, zero_shot: float) -> dict:
    """Return what a table says of the ``i``-th vector, or intervention, that was scored."""
    losses = scores.loss()[i]
    return {
        "loss": losses.mean().item(), "token_loss": scores.token_loss()[i].mean().item(),
        "accuracy": scores.accepted[i].float().mean().item(), "exact": scores.exact[i].float().mean().item(),
        "rel_loss": losses.mean().item() / zero_shot - 1, "n": len(losses), "losses": losses.tolist(),
        "d_ntp": scores.kl[i].mean().item(),
    }


def best_scale(
    site: Site, layer: int, vector: Float[Tensor, " d_model"], mode: str = "add",
    scales=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0), vocabulary: Vocabulary | None = None,
) -> float:
    """Return the scale of ``vector`` with the lowest loss on the (validation) site, over ``vocabulary`` if given."""
    tried = torch.tensor(scales, device=vector.device)
    with torch.no_grad():
        return float(tried[site.loss(tried[:, None] * vector, layer, mode, vocabulary).argmin()])


def repeated(layers: list[int], repeat_layers: str | int, seeds: int) -> list[int]:
    """Return those of ``layers`` that are run with every seed: all, or those that ``repeat_layers`` names.

    Raises ValueError where there are several seeds and no block for them.
    """
    named = str(repeat_layers).split(",")
    found = [layer for layer in layers if repeat_layers == "all" or str(layer) in (part.strip() for part in named)]
    if seeds > 1 and not found:
        raise ValueError(
            f"No block has several seeds: repeat_layers is {repeat_layers}, layers are {', '.join(map(str, layers))}; "
            "let it name one of these."
        )
    return found
