"""Clean a vector from a few pairs: task vector, layer curve, cleaning that can be stopped, weights set by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import cleaning, engine, exports, models, prompts, tasks, vectors
from nb_utils.models import EMBEDDED, Model
from nb_utils.saes import Sae
from nb_utils.saes import load as load_sae
from nb_utils.text import visible

if TYPE_CHECKING:
    import pandas as pd

Pairs = tasks.Task | Mapping[str, object] | str | Path  # a task; pairs {x: y}; the name of a shipped task, or a file

MODEL, SAES = "gemma-3-270m", "shipped"
MAX_PAIRS = 1000
N_CLEAN, N_TEST, N_SHOTS = 24, 24, 16  # prompts to clean on, and to measure on; examples in a few-shot prompt
SIZES, STEPS, RATE = (50, 20, 10, 5), 16, 0.1
PENALTY, CLEAN_STEPS, CLEAN_RATE = 1.0, 80, 0.2


class WorkbenchError(ValueError):
    """Pairs or settings that cannot be cleaned; the message says what to change."""


@dataclass(frozen=True)
class Trial:
    """Where vectors are tried: a layer, by its SAE, and held-out prompts, on which nothing is chosen."""

    model: Model
    sae: Sae
    site: engine.Site
    pairs: tuple[tasks.Pair, ...]
    zero_shot: float
    title: str
    licence: str


@dataclass(frozen=True)
class Bench:
    """A task at one layer, ready to be cleaned; losses in nats over the first two answer tokens."""

    trial: Trial
    at: vectors.Streams
    problem: cleaning.Problem
    few_shot: float

    def __repr__(self) -> str:
        title, model, layer = visible(self.trial.title), visible(self.trial.model.name), self.trial.sae.layer
        return f"{title}, after block {layer} of {model}, {len(self.trial.pairs)} pairs held out"


@dataclass(frozen=True)
class Weighted:
    """Latents [k] with weights [k] in raw units; ``bias`` adds the decoder bias; loss on validation prompts (nats)."""

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    bias: bool
    validation_loss: float


@dataclass(frozen=True, repr=False)
class Found(Weighted):
    """A sparse task vector that was found: features with weights, what they do, and the bench that they are from.

    ``losses``: nats over the first two answer tokens, by the whole vocabulary, with the vector added to the prompts
    that it was cleaned on ("train"), chosen on ("validation") and never saw ("test"); those without a vector beside
    them, on the last, without and with examples ("zero_shot", "few_shot").
    """

    bench: Bench = field(compare=False)
    losses: dict[str, float] = field(hash=False)

    @cached_property
    def vector(self) -> Float[Tensor, " d_model"]:
        """What the features add up to, to be added after the SAE's block at the last token of a prompt."""
        return vector(self.bench.trial.sae, self)

    @cached_property
    def codes(self) -> Float[Tensor, " d_sae"]:
        """The weights as codes of the SAE, 0 for all other latents."""
        codes = torch.zeros(self.bench.trial.sae.d_sae)
        codes[list(self.latents)] = torch.tensor(self.weights)
        return codes

    def features(self, k: int = 5) -> pd.DataFrame:
        """List the features, as `features` does."""
        return features(self, k)

    def export(self, folder: str | Path) -> Path:
        """Write the vector into a new folder, as `export` does."""
        return export(self, folder)

    def __repr__(self) -> str:
        said = ", ".join(f"{name.replace('_', '-')} {loss:.2f}" for name, loss in self.losses.items())
        own = [f"{latent} ({weight:.3g})" for latent, weight in zip(self.latents, self.weights, strict=True)]
        many = f"{len(own)} feature{'s' * (len(own) != 1)} of {self.bench.trial.sae.name}{', and its bias' * self.bias}"
        return f"{self.bench}\n{many}: {', '.join(own)}\nnats: {said}"


def check(task: tasks.Task) -> tasks.Splits:
    """Split a task; raises WorkbenchError for more than `MAX_PAIRS` pairs, TaskError where a split would be too small.
    """
    if len(task.pairs) > MAX_PAIRS:
        raise WorkbenchError(
            f"{len(task.pairs):,} pairs are more than the {MAX_PAIRS:,} we take here: give a sample of them, or run "
            "the experiment notebooks on the file."
        )
    return tasks.split(task)


def prepare(
    task: Pairs, layer: int, model: Model | str = MODEL, saes: Sae | str | Path = SAES,
    others: tuple[int, ...] = (), seed: int = 0,
) -> Bench:
    """Split a task, collect its separators after ``layer``, and prepare what every evaluation shares.

    ``task``: a shipped one by name, the path of a file (`tasks.load`), or pairs {x: y}. ``model``: loaded, or its name
    (`models.load`). ``saes``: an SAE, or a set of them (`saes.load`). ``others``: layers beside, for `curve`.
    Raises as `check` does, and as these do; WorkbenchError for an SAE of another layer.
    """
    if isinstance(task, Mapping):
        task = tasks.parse(json.dumps({"title": "Own pairs", "pairs": task}, default=str))
    task = task if isinstance(task, tasks.Task) else tasks.load(task)
    split = check(task)
    model = model if isinstance(model, Model) else models.load(model)
    sae = saes if isinstance(saes, Sae) else load_sae(model, saes, layer)
    if sae.layer != layer:
        raise WorkbenchError(f"{sae.name} reads block {sae.layer}, not {layer}: ask for that layer, or load its SAE.")
    at = vectors.separators(model, split.vector, sorted({layer, *others}), n_shots=N_SHOTS, seed=seed)
    trial = _trial(model, sae, split.test[:N_TEST], task.title, task.licence)
    few = _examples(model, split.vector, trial.pairs, seed).unsteered().loss().mean().item()
    train, validation = _site(model, split.train[:N_CLEAN]), _site(model, split.validation[:N_CLEAN])
    # The words of an answer that a vector brings about are likely with examples alone.
    shown = _examples(model, split.vector, split.validation[:N_CLEAN], seed)
    problem = cleaning.Problem(train, validation, layer, vocabulary=engine.vocabulary(train, validation, shown))
    return Bench(trial, at, problem, few)


def _site(model: Model, pairs) -> engine.Site:
    return engine.Site.prepare(model, prompts.zero_shot(model.tokenizer, pairs), answer_tokens=2)


def _examples(model: Model, pool, pairs, seed: int) -> engine.Site:
    shown = prompts.few_shot(model.tokenizer, pool, pairs, N_SHOTS, seed)
    return engine.Site.prepare(model, shown, answer_tokens=2)


def _trial(model: Model, sae: Sae, pairs, title: str, licence: str) -> Trial:
    site = _site(model, pairs)
    return Trial(model, sae, site, tuple(pairs), site.unsteered().loss().mean().item(), title, licence)


def curve(bench: Bench) -> list[dict]:
    """Return the held-out loss (nats) of the task vector and of the centred one, added after each layer."""
    found = []
    for layer in sorted(bench.at.few):
        both = torch.stack([vectors.task_vector(bench.at, layer), vectors.centred_task_vector(bench.at, layer)])
        losses = bench.trial.site.evaluate(both, layer).loss().mean(1).tolist()
        found.append({"layer": layer, "task_vector": losses[0], "centred": losses[1]})
    return found


def prune(
    task: Bench | Pairs, layer: int | None = None, model: Model | str = MODEL, saes: Sae | str | Path = SAES,
    sizes: tuple[int, ...] = SIZES, steps: int = STEPS, progress: cleaning.Progress | None = None,
) -> list[Found]:
    """Prune contrast codes with refit: one result for each of ``sizes`` that was reached.

    ``task`` to ``saes``: a bench alone, or what `prepare` makes one of. ``steps``: after each cut.
    """
    bench = _bench(task, layer, model, saes)
    start = vectors.contrast_codes(bench.at, bench.problem.layer, bench.trial.sae).codes[None]
    path = cleaning.prune_with_refit(bench.problem, bench.trial.sae, start, sizes, RATE, steps, progress=progress)[0]
    return _found(bench, path, bias=False)


def clean(
    task: Bench | Pairs, layer: int | None = None, model: Model | str = MODEL, saes: Sae | str | Path = SAES,
    penalty: float = PENALTY, steps: int = CLEAN_STEPS, progress: cleaning.Progress | None = None,
) -> Found:
    """Clean the task vector's codes as the post does, at one penalty (nats at the starting L1).

    ``task`` to ``saes``: a bench alone, or what `prepare` makes one of.
    """
    bench = _bench(task, layer, model, saes)
    start = bench.trial.sae.pre_activations(vectors.task_vector(bench.at, bench.problem.layer))[None]
    found = cleaning.clean(
        bench.problem, bench.trial.sae, start, [penalty], CLEAN_RATE, steps, bias=True, progress=progress)
    return _found(bench, found, bias=True)[0]


def _bench(task, layer, model, saes) -> Bench:
    if isinstance(task, Bench):
        return task
    if layer is None:
        raise WorkbenchError("Say after which block the vector is to be added: give a layer, such as layer=10.")
    return prepare(task, layer, model, saes)


def cleaned(bench: Bench, progress: cleaning.Progress | None = None) -> list[Found]:
    """Clean as `clean` does, and return a path as `prune` does."""
    return [clean(bench, progress=progress)]


def pruned(bench: Bench, progress: cleaning.Progress | None = None) -> list[Found]:
    """Prune as `prune` does."""
    return prune(bench, progress=progress)


METHODS = {"prune": pruned, "clean": cleaned}


def _found(bench: Bench, path: list[cleaning.Cleaned], bias: bool) -> list[Found]:
    path = cleaning.stated(bench.problem, path)
    test = bench.trial.site.evaluate(torch.stack([one.vector for one in path]), bench.problem.layer).loss().mean(1)
    found = []
    for one, loss in zip(path, test.tolist(), strict=True):
        latents = one.codes.nonzero()[:, 0]
        latents = latents[one.codes[latents].abs().argsort(descending=True)]
        losses = {"train": one.train_loss, "validation": one.validation_loss, "test": loss,
                  "zero_shot": bench.trial.zero_shot, "few_shot": bench.few_shot}  # fmt: skip
        weights = tuple(one.codes[latents].tolist())
        found.append(Found(tuple(latents.tolist()), weights, bias, one.validation_loss, bench, losses))
    return found


def vector(sae: Sae, weighted: Weighted) -> Float[Tensor, " d_model"]:
    """Add up the weighted decoder rows (and the bias)."""
    found = torch.tensor(weighted.weights) @ sae.W_dec[torch.tensor(weighted.latents, dtype=torch.long)]
    return found + sae.b_dec if weighted.bias else found


def loss(trial: Trial, weighted: Weighted) -> float:
    """Return the mean held-out loss (nats, first two answer tokens) with the weighted features added."""
    return trial.site.evaluate(vector(trial.sae, weighted)[None], trial.sae.layer).loss().mean().item()


def evaluate(bench: Bench, vector: Float[Tensor, " d_model"], mode: str = "add") -> float:
    """Return the mean held-out loss (nats, first two answer tokens) of any vector after the bench's block.

    ``mode``: "add" it at the prompt's last token, or "replace" the stream there.
    """
    return bench.trial.site.evaluate(vector[None], bench.problem.layer, mode).loss().mean().item()


def features(found: Found, k: int = 5) -> pd.DataFrame:
    """List features by the size of their code: latent, code (raw units), and the ``k`` tokens it promotes most.

    What a direction promotes is read by the logit lens, whatever the sign of its code (see `vectors.logit_lens`).
    """
    import pandas as pd

    trial = found.bench.trial
    promoted, _ = vectors.logit_lens(trial.model, trial.sae.decoder_directions[list(found.latents)], k)
    words = [[token for token, _ in row] for row in promoted]
    return pd.DataFrame({"latent": found.latents, "code": found.weights, "promoted": words})


@torch.no_grad()
def losses_by_place(trial: Trial, vector: Float[Tensor, " d_model"]) -> dict[str, float]:
    """Return the mean held-out loss (nats, first two answer tokens) with a vector added where other tools add it.

    By the names of `exports.PLACES`; in plain passes, one a prompt, with the prompt as a text of its own.
    """
    model, layer, totals = trial.model, trial.sae.layer, torch.zeros(len(exports.PLACES))
    for prompt in trial.site.prompts:
        answer, last = prompt.answer[:2], len(prompt.ids) - len(prompt.answer) - 1
        ids = torch.tensor(prompt.ids[: last + len(answer)], device=model.device)
        at = torch.arange(len(ids), device=model.device)
        share = {"last": at == last, "every": at >= 0, "onward": at >= last, "after": at > last}
        added = torch.stack([share[name] for name in exports.PLACES])[..., None] * vector.to(model.device)
        with model.layout.hooked(layer, lambda stream, added=added: stream + added.to(stream)):
            logits = model.hf(ids.expand(len(added), -1), use_cache=False, logits_to_keep=len(answer)).logits
        nll = -logits.float().log_softmax(-1)[:, torch.arange(len(answer)), list(answer)]
        totals += nll.sum(-1).cpu()
    return dict(zip(exports.PLACES, (totals / len(trial.site.prompts)).tolist(), strict=True))


def pack(trial: Trial, weighted: Weighted) -> exports.Vector:
    """Pack the weighted features with a card that lets others check them."""
    made, model, sae = vector(trial.sae, weighted), trial.model, trial.sae
    embedded = EMBEDDED.get(model.name)
    terms = embedded.licence if embedded else f"the licence of {model.name}"
    block, begins = model.layout.blocks[sae.layer], prompts.opening(model.tokenizer)
    card = exports.Card(
        task=trial.title, model=model.name, model_sha256=model.sha256, layer=sae.layer, bias=weighted.bias,
        hook_name=f"blocks.{sae.layer}.hook_resid_post", sae=sae.name, sae_set=sae.sae_set, sae_sha256=sae.sha256,
        features={str(latent): weight for latent, weight in zip(weighted.latents, weighted.weights, strict=True)},
        scale=float(made.norm() / trial.site.at(sae.layer).norm(dim=1).mean()), loss=loss(trial, weighted),
        zero_shot_loss=trial.zero_shot, heldout=tuple((f"{pair.x} ->", pair.y) for pair in trial.pairs),
        licence=f"Model and SAE: {terms}. Pairs: {trial.licence}.", hub_name=embedded.hub_name if embedded else "",
        module=next(name for name, module in model.hf.base_model.named_modules() if module is block),
        model_type=model.hf.config.get_text_config().model_type, bos=model.tokenizer.decode(begins),
        losses=losses_by_place(trial, made),
    )
    return exports.Vector(made, torch.tensor(weighted.latents, dtype=torch.long), torch.tensor(weighted.weights), card)


def export(found: Found, folder: str | Path) -> Path:
    """Write a vector, its card and what other tools need into a new folder and return its path.

    Raises ExportError as `exports.save` does.
    """
    return exports.save(pack(found.bench.trial, found), folder)


def restore(exported: exports.Vector, model: Model, sae: Sae) -> tuple[Trial, Weighted]:
    """Return an exported vector's features, and the trial on the held-out pairs of its card."""
    pairs = [tasks.Pair(prompt.removesuffix(" ->"), answer, (answer,)) for prompt, answer in exported.card.heldout]
    trial = _trial(model, sae, pairs, exported.card.task, exported.card.licence.partition("Pairs: ")[2].rstrip("."))
    latents, weights = tuple(exported.latents.tolist()), tuple(exported.weights.tolist())
    return trial, Weighted(latents, weights, exported.card.bias, float("nan"))
