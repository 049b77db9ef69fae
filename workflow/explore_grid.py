"""Compute what the interactive page shows without a kernel: ``python -m workflow.explore_grid``.

Three tables: explore_steering (surviving features and random directions x scales on test prompts, with examples),
explore_tokens (where detector and executor candidates fire in a few-shot prompt) and explore_cleaning (one vector
cleaned from 20 pairs). The steering control has every task whose features are known, three of them in full. A call
that was killed goes on where it was: tables that would come out the same are kept.
"""

import argparse

import pandas as pd
import torch

from nb_utils import engine, interventions, models, prompts, saes, tasks, workbench
from nb_utils.record import tables
from nb_utils.show import microscope
from nb_utils.show.widgets import KEPT, N_EXAMPLES, N_TEST, N_TOKENS, WHOLE, offered, pruned_vector
from workflow import stale

TASKS = ("antonyms", "en_es", "present_simple_past_simple")  # in full; every feature is tried on these
SCALES = (-0.5, -0.25, -0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
ELSEWHERE = (-0.25, 0.1, 0.2, 0.3, 0.5)  # scales on the other tasks
LAYERS, MOST = (6, 8, 10), 8  # most features of one task at one layer, by weight
OTHER_LAYERS, OTHER_MOST = (8, 10), 4  # of the other tasks: a page must hold them all
N_RANDOM = 5  # random directions beside them, drawn anew for each layer
N_SHOTS, N_PROMPTS = 4, 12
N_PAIRS, CLEANED_LAYER = 20, 10  # of the workbench's example


def extent(task: str) -> tuple[tuple[int, ...], int]:
    """Say at which layers, and with how many features at each, a task is shown."""
    return (LAYERS, MOST) if task in TASKS else (OTHER_LAYERS, OTHER_MOST)


def directions(task: str, layer: int, sae: saes.Sae) -> tuple[pd.DataFrame, torch.Tensor]:
    """List the pruned vector, the largest features at a layer and random directions, with units [n, d_model]."""
    found, vector = offered(task), pruned_vector(task, layer, sae)
    found = found[found["layer"] == layer].nlargest(extent(task)[1], "weight")
    whole = pd.DataFrame([{"layer": layer, "latent": WHOLE, "weight": float(vector.norm()), "method": "pruned"}])
    noise = torch.randn(N_RANDOM, len(vector), generator=torch.Generator().manual_seed(layer))
    random = pd.DataFrame({"layer": layer, "latent": range(WHOLE - 1, WHOLE - 1 - N_RANDOM, -1), "method": "random"})
    units = [vector / vector.norm(), *(microscope.direction(sae, latent) for latent in found["latent"])]
    listed = pd.concat([whole, found, random], ignore_index=True)
    return listed, torch.cat([torch.stack(units), torch.nn.functional.normalize(noise, dim=1)])


def steering(lm: models.Model, task: str, layer: int, sites: dict, sae: saes.Sae) -> pd.DataFrame:
    """Steer with each direction of ``task`` at every scale, on its own test prompts and on those of other tasks.

    ``sites``: of the test prompts, by task.
    """
    listed, units = directions(task, layer, sae)
    norm = float(sites[task].at(layer).norm(dim=1).mean())
    parts = []
    for target, site in sites.items():
        scales = SCALES if target == task else ELSEWHERE
        steered = (norm * torch.tensor(scales)[None, :, None] * units[:, None]).flatten(0, 1)
        scores = site.evaluate(steered, layer)
        cells = listed.loc[listed.index.repeat(len(scales))].reset_index(drop=True).assign(
            task=task, target=target, norm=norm, scale=list(scales) * len(listed), loss=scores.loss().mean(1).tolist(),
            accuracy=scores.accepted.float().mean(1).tolist(), weight=lambda cells: cells["weight"] / norm)
        shown = site.take(torch.arange(N_EXAMPLES))
        told = steered[: cells["latent"].ge(WHOLE).sum()]  # random directions have no examples
        looked = examples(lm, shown, told, layer) if target == task else []
        cells["examples"] = looked + [[] for _ in range(len(cells) - len(looked))]
        parts.append(cells)
    print(f"{task}, block {layer}: {len(listed)} directions", flush=True)
    return pd.concat(parts, ignore_index=True)


def examples(lm: models.Model, site: engine.Site, steered: torch.Tensor, layer: int) -> list[list[dict]]:
    """Describe what each vector makes of each example prompt."""
    return [
        [
            {
                "loss": view.loss, "rank": view.rank, "continuation": texts[j],
                "tokens": microscope.pieces(lm.tokenizer, [token for token, _ in view.top]),
                "shares": [round(share, 4) for _, share in view.top],
            }
            for j, view in enumerate(looks)
        ]
        for part in steered.split(48)
        for looks, texts in zip(
            microscope.views(site, part, layer),
            continued(lm, site, part, layer),
            strict=True,
        )
    ]


def continued(lm: models.Model, site: engine.Site, steered: torch.Tensor, layer: int) -> list[tuple[str, ...]]:
    """Return how every prompt goes on with each vector, vector by vector."""
    what = interventions.Intervention({layer: interventions.add(steered)})
    return list(zip(*(interventions.continuations(lm, one, what, N_TOKENS) for one in site.prompts), strict=True))


def strips(lm: models.Model, splits: dict, dictionaries: dict) -> pd.DataFrame:
    """Choose a detector and an executor candidate for every task and layer, and follow both through one prompt.

    A candidate is the latent whose mean activation at the task's outputs (separators) exceeds the other tasks' most.
    ``share`` is the part of all its activation that falls on tokens of that kind, over ``N_PROMPTS`` prompts.
    """
    read = {
        task: prompts.few_shot(lm.tokenizer, split.vector, split.test[:N_PROMPTS], N_SHOTS, seed=0)
        for task, split in splits.items()
    }
    parts = []
    for layer, sae in dictionaries.items():
        codes, kinds = {}, {}
        for task, batch in read.items():
            spots = [tuple(range(p.separators[-1] + 1)) for p in batch]
            codes[task] = sae.encode(engine.residuals(lm, batch, spots, [layer])[layer])
            types = [prompts.token_types(p)[: p.separators[-1] + 1] for p in batch]
            kinds[task] = pd.Series([kind for row in types for kind in row])
        for role, kind in {"detector": "output", "executor": "arrow"}.items():
            means = {t: codes[t][torch.tensor((kinds[t] == kind).to_numpy())].mean(0) for t in read}
            for task, batch in read.items():
                others = torch.stack([mean for other, mean in means.items() if other != task]).amax(0)
                latent = int((means[task] - others).argmax())
                counted = torch.tensor(kinds[task].notna().to_numpy())
                here = torch.tensor((kinds[task] == kind).to_numpy())
                mass = codes[task][:, latent].where(counted, torch.nan)
                end = batch[0].separators[-1] + 1
                parts.append(pd.DataFrame({
                    "task": task, "layer": layer, "role": role, "latent": latent,
                    "share": float(mass[here].sum() / mass[counted].sum()), "position": range(end),
                    "token": microscope.pieces(lm.tokenizer, batch[0].ids[:end]),
                    "kind": [kind or "" for kind in prompts.token_types(batch[0])[:end]],
                    "activation": mass[:end].tolist(),
                }))
    return pd.concat(parts, ignore_index=True)


def cleaning(lm: models.Model, dictionaries: dict, task: str, layer: int) -> pd.DataFrame:
    """Do with the first 20 training pairs of a task what the workbench does; one row per vector."""
    pairs = [f"{pair.x} -> {pair.y}" for pair in tasks.split(tasks.load(task)).vector[:N_PAIRS]]
    bench = workbench.prepare(tasks.parse("\n".join(pairs)), layer, lm, dictionaries[layer], tuple(dictionaries))
    found = [{"method": "zero_shot", "layer": -1, "loss": bench.trial.zero_shot}]
    found += [{"method": "few_shot", "layer": -1, "loss": bench.few_shot}]
    for at in workbench.curve(bench):
        found += [{"method": name, "layer": at["layer"], "loss": at[name]} for name in ("task_vector", "centred")]
    for name, method in {"prune_contrast": workbench.pruned, "clean": workbench.cleaned}.items():
        found += [
            {
                "method": name, "layer": layer, "k": len(w.latents), "loss": w.losses["test"],
                "validation_loss": w.validation_loss, "latents": w.latents, "weights": w.weights,
            }
            for w in method(bench)
        ]
    frame = pd.DataFrame(found).assign(task=task, n=len(bench.trial.pairs))
    frame["pairs"] = [pairs] * len(frame)
    return frame


def main(argv: list[str] | None = None) -> None:
    """Write the three tables for the default model."""
    parser = argparse.ArgumentParser(prog="python -m workflow.explore_grid", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=tables.MODEL)
    parser.add_argument("--tables", default=None, help="folder of the tables (default: the book's)")
    args = parser.parse_args(argv)
    try:
        write(args)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def write(args: argparse.Namespace) -> None:
    """Compute the tables that are missing or stale, and save each as soon as it is there."""
    lm = models.load(args.model)
    splits = {task: tasks.split(tasks.load(task)) for task in TASKS}
    dictionaries = {layer: saes.load(lm, "shipped", layer) for layer in LAYERS}
    settings = dict(tasks=TASKS, scales=SCALES, n_test=N_TEST, kept=KEPT, n_shots=N_SHOTS, most=MOST,
                    other_layers=OTHER_LAYERS, other_most=OTHER_MOST)
    hashes = {layer: sae.sha256 for layer, sae in dictionaries.items()}

    def stale_ones(stem, names):
        paths = {name: tables.file(stem, name, args.model, args.tables) for name in names}
        return [name for name, path in paths.items() if not path.is_file() or stale.reasons(path, path.parents[2])]

    def save(frame, stem, name, inputs=None):
        origin = tables.provenance(settings, lm.sha256, hashes, inputs)
        print(tables.save(frame, stem, name, origin, folder=args.tables, model=args.model).name, stem, flush=True)

    if stale_ones("explore_tokens", TASKS):
        for task, frame in strips(lm, splits, dictionaries).groupby("task"):
            save(frame, "explore_tokens", task)
    if stale_ones("explore_cleaning", TASKS[:1]):
        others = [layer for layer in saes.layers(lm, "shipped") if layer not in dictionaries]
        every = dictionaries | {layer: saes.load(lm, "shipped", layer) for layer in others}
        save(cleaning(lm, dict(sorted(every.items())), TASKS[0], CLEANED_LAYER), "explore_cleaning", TASKS[0])
    known = sorted(tables.names("02_cleanup_features", args.model), key=lambda task: task not in TASKS)
    for task in stale_ones("explore_steering", known):
        sites = {
            name: engine.Site.prepare(lm, prompts.zero_shot(lm.tokenizer, split.test[:N_TEST]), answer_tokens=2)
            for name, split in ({task: tasks.split(tasks.load(task))} | splits).items()
        }
        parts = [steering(lm, task, layer, sites, dictionaries[layer]) for layer in extent(task)[0]]
        read = {"02_cleanup_features": tables.fingerprint("02_cleanup_features", args.model, task=task)}
        save(pd.concat(parts, ignore_index=True), "explore_steering", task, read)


if __name__ == "__main__":
    main()
