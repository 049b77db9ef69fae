"""Are planted features found? Every method on worlds whose task features are known.

Run as ``python -m workflow.ground_truth``. The table is made anew, in a few minutes on one core, only if what it comes
from has changed.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nb_utils import cleaning, engine, prompts, saes, vectors
from nb_utils.record import sources, tables
from nb_utils.vectors import Streams
from workflow import planted, train_saes
from workflow.planted import LAYER, World

STEM, NAME = "13_ground_truth", "worlds"  # the one table of the stem
DICTIONARIES = ("true", "trained", "spoiled")
# What is written with few latents, and of which vector: the task vector as it is, or the centred one.
WAYS = (
    ("gradient_pursuit", "raw"), ("nonnegative_omp", "centred"), ("top_k_projection", "raw"),
    ("top_k_projection", "centred"), ("random_support", "centred"),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    seeds: int = 5
    sizes: tuple[int, ...] = (32, 24, 16, 12, 10, 8, 6, 4)  # the first: twice what is active at a time, as in the book
    steps_a_stage: int = 15
    refit_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    penalties: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    steps: int = 80
    k: int = 12  # latents of a dictionary that are active at a time
    # To train an encoder, and to learn a whole dictionary: tokens drawn, tokens of a step, steps.
    encoder: tuple[int, int, int] = (65_536, 2048, 300)
    learned: tuple[int, int, int] = (131_072, 512, 2400)
    lost: float = 0.25  # of all features, those that "spoiled" lacks
    apart: float = 0.9  # cosine of a feature with each of the two latents that "spoiled" has for it


def dictionary_of(world: World, kind: str, has: Settings) -> saes.Sae:
    """Return a dictionary of a world: a known decoder, or a learned one; the encoder is always trained.

    "true": a latent each feature. "trained": as many latents, learned. "spoiled": some features have no latent, and
    every other task feature has two, to either side of it.
    """
    if kind == "trained":
        return _trained(world, None, kind, has)
    if kind == "true":
        return _trained(world, world.directions, kind, has)
    generator = torch.Generator().manual_seed(world.seed)
    known = torch.rand(len(world.directions), generator=generator) >= has.lost
    halved = torch.zeros_like(known)
    halved[list(world.kinds["task"])[::2]] = True
    rows = world.directions[known & halved]
    away = torch.randn(rows.shape, generator=generator)
    away = torch.nn.functional.normalize(away - (away * rows).sum(1, keepdim=True) * rows, dim=1)
    sides = [has.apart * rows + side * (1 - has.apart**2) ** 0.5 * away for side in (1, -1)]
    return _trained(world, torch.cat([world.directions[known & ~halved], *sides]), kind, has)


def _trained(world: World, decoder: torch.Tensor | None, kind: str, has: Settings) -> saes.Sae:
    """Train as the book's SAEs are, with a fixed decoder if one is given."""
    (tokens, batch, steps), d_sae = has.learned if decoder is None else has.encoder, len(world.directions)
    x, rng = world.tokens(tokens, seed=1), np.random.default_rng(world.seed)
    # Another seed than the world's, from which its features are drawn.
    spec = train_saes.Spec("planted", LAYER, d_sae, has.k, tokens, lr=3e-3, seed=world.seed + 1)
    if decoder is not None:
        spec = replace(spec, d_sae=len(decoder), freeze="decoder")
    sae = train_saes.Sae.fresh(x, spec)
    if decoder is not None:
        sae = train_saes.Sae.of({**sae.state(), "encoder": decoder.clone(), "decoder": decoder.clone()}, spec)
    for step in range(steps):
        if step % (tokens // batch) == 0:
            order = torch.from_numpy(rng.permutation(tokens))
            sae.find_dead()
        first = step * batch % tokens
        lr = spec.lr * min(1.0, (1 - step / steps) / 0.3)
        sae.step(x[order[first : first + batch]], spec.k, lr, rng)
    tensors = sae.folded()
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
    hook = f"blocks.{LAYER}.hook_resid_post"
    return saes.Sae(kind, "planted", hook, LAYER, "jumprelu", **tensors, k=None, sha256=digest)


def problem_of(world: World, task: int) -> cleaning.Problem:
    """Return what vectors of a task are cleaned on."""
    model, own = world.model, world.tasks[task]
    train, validation = (engine.Site.prepare(model, prompts.zero_shot(model.tokenizer, own.part(i))) for i in (1, 2))
    return cleaning.Problem(train, validation, LAYER, seed=world.seed)


def centred(at: Streams, sae: saes.Sae) -> Streams:
    """Return streams whose task vector is the centred one, as pursuits see it: less the decoder's bias."""
    return Streams({LAYER: vectors.centred_task_vector(at, LAYER)[None] + sae.b_dec}, at.zero)


def pruned(problem, sae, at, has: Settings):
    """Prune contrast codes at every rate; yield what validates best of each size."""
    start = vectors.contrast_codes(at, LAYER, sae).codes.expand(len(has.refit_rates), -1)
    paths = cleaning.prune_with_refit(problem, sae, start, has.sizes, has.refit_rates, has.steps_a_stage)
    for k, found in zip(has.sizes, zip(*paths, strict=True), strict=True):
        yield {"method": "prune_contrast", "of": "centred", "k": k}, cleaning.best(found)


def cleaned(problem, sae, at, has: Settings):
    """Clean the task vector's codes at every penalty and rate, as the post does; yield the best of each penalty."""
    pre = sae.pre_activations(vectors.task_vector(at, LAYER))
    grid = list(product(has.penalties, has.rates))
    penalties, rates = zip(*grid, strict=True)
    found = cleaning.clean(problem, sae, pre.expand(len(grid), -1), list(penalties), rates, has.steps)
    for i, penalty in enumerate(has.penalties):
        n = len(has.rates)
        yield {"method": "clean", "of": "raw", "penalty": penalty}, cleaning.best(found[i * n : (i + 1) * n])


def tuned(problem, sae, truth, has: Settings):
    """Tune the weights of a task's own features, for as many steps as pruning takes to their number."""
    k = int((truth != 0).sum())
    steps = has.steps_a_stage * (has.sizes.index(k) + 1)
    starts, unit = truth.expand(len(has.refit_rates), -1), (truth.abs().sum() / k).expand(1, 1)
    yield {"method": "planted_tuned", "of": "centred", "k": k}, cleaning.best(
        cleaning.refit(problem, sae, starts, unit, has.refit_rates, steps))


def written(sae, at, has: Settings):
    """Write the task vector, or the centred one, with few latents: no loss is looked at."""
    streams = {"raw": at, "centred": centred(at, sae)}
    for k in has.sizes:
        yield {"method": "contrast_codes", "k": k, "of": "centred"}, vectors.contrast_codes(at, LAYER, sae, k)
        for name, of in WAYS:
            yield {"method": name, "k": k, "of": of}, getattr(vectors, name)(streams[of], LAYER, sae, k)


def measure(world: World, task: int, sae: saes.Sae, has: Settings) -> pd.DataFrame:
    """Return one row a vector: what it recovers, and its loss on test prompts."""
    at, own, problem = world.separators(task), world.tasks[task], problem_of(world, task)
    feature = planted.stands_for(sae.W_dec, world.directions)
    site = engine.Site.prepare(world.model, prompts.zero_shot(world.model.tokenizer, own.part(3)))
    found = [*pruned(problem, sae, at, has), *cleaned(problem, sae, at, has), *written(sae, at, has)]
    if sae.name == "true":
        found += tuned(problem, sae, world.truth(task), has)
    rows = [told | planted.recovery(one.codes, feature, own.signs) for told, one in found]
    for row, (_, one) in zip(rows, found, strict=True):
        row["validation_loss"] = getattr(one, "validation_loss", float("nan"))
    references = {
        "zero_shot": torch.zeros(world.model.d_model), "task_vector": vectors.task_vector(at, LAYER),
        "centred": vectors.centred_task_vector(at, LAYER), "planted": world.truth(task) @ world.directions,
    }
    rows += [{"method": name, "of": ""} for name in references]
    # A centred vector is added without the decoder's bias, which the pursuits took off before.
    given = [one.codes @ sae.W_dec if told.get("of") == "centred" else one.vector for told, one in found]
    scores = site.evaluate(torch.stack([*given, *references.values()]), LAYER)
    reachable = len(set(feature.tolist()) & set(own.signs)) / len(own.signs)
    return pd.DataFrame(rows).assign(
        task=own.name, seed=world.seed, dictionary=sae.name, features=len(own.signs), reachable=reachable,
        loss=scores.loss().mean(1).numpy(), accuracy=scores.accepted.float().mean(1).numpy())


def table(has: Settings) -> pd.DataFrame:
    """Measure all tasks of all worlds with every dictionary."""
    parts = []
    for seed in range(has.seeds):
        world = planted.world(seed)
        for kind in DICTIONARIES:
            sae = dictionary_of(world, kind, has)
            parts += [measure(world, task, sae, has) for task in range(len(world.tasks))]
            print(f"world {seed}, {kind} dictionary: measured", flush=True)
    found = pd.concat(parts, ignore_index=True)
    return found.astype({"l0": "Int64", "k": "Int64", "method": "str", "of": "str"})


def origin(has: Settings) -> dict:
    """Return the provenance: all follows from the code, the settings and the worlds, whose models are hashed as one."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(has).items()}
    weights = "".join(planted.world(seed).model.sha256 for seed in range(has.seeds))
    weights = hashlib.sha256(weights.encode()).hexdigest()
    return tables.provenance({"model": tables.OWN_MODELS[STEM], **settings}, weights, {})


def main() -> None:
    """Write the table, unless it is what would be made today."""
    torch.set_num_threads(1)  # the products are small, and the order of their sums must not vary
    has = Settings()
    today = origin(has)
    if tables.origins(STEM) != [today | {"code": sources.code(Path(__file__))}]:
        tables.save(table(has), STEM, NAME, today)


if __name__ == "__main__":
    main()
