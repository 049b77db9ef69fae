"""Grown models: small transformers, trained from scratch to learn tasks from examples, and the vectors inside them.

A family of tasks is a table: what each task makes of each of the same symbols. A prompt is x z y x z y …, with z a
separator. A plain model learns to say every y. A *grown* one has a second loss (task-vector prompting; Yang et al.
2025): the stream at a separator, after a block that is chosen beforehand, is put in place of that of the separator in
a prompt of two tokens, x' z, of which the first is a query that the examples have not shown; y' is to follow. So where
the task vector has to be is known, which it is for no model that was found.

The model is a Llama, whose positions count from token to token: a vector is not tied to the place that it is read at.
`workflow.grow` trains the models, `book/experiments/24_grown_vectors.ipynb` looks into them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from nb_utils import files, saes
from nb_utils.text import visible
from workflow import train_saes, training

SHIPPED = Path(__file__).resolve().parents[1] / "grown"
FAMILIES = ("offset", "table", "linear")
SIZE = 24  # symbols, of which the last token, `SEPARATOR`, is none
SEPARATOR = SIZE
TABLES = 8  # tasks of the family of that name
STEPS_OF_SLOPE = 4  # slopes and intercepts of lines are quarters
HELD = 4  # one task of so many, drawn, is never trained on, where tasks have something in common
NOISE = (0.25, 0.5)  # shares of the answers shown that are drawn at random
SHOWN = 16  # prompts a task that a stage of training is measured on
# How models are trained: what differs from `Spec`. Those that are not `MAIN` are tried on one family, with one seed.
MAIN = ("plain", "grown")
VARIANTS = {
    "plain": {"weight": 0.0},
    "grown": {},
    "lighter": {"weight": 0.3},
    "later": {"at": 2},
    "deeper": {"blocks": 6},
    "added": {"mode": "add"},
    "afterwards": {"start": "plain"},
}


class GrownError(ValueError):
    """A grown model that cannot be had or is another than was asked for; the message says what to do."""


# Tasks


@dataclass(frozen=True)
class Family:
    """Tasks over the same symbols: ``maps`` says what each makes of them, ``held`` which are never trained on."""

    name: str
    maps: Int[Tensor, "tasks size"]
    held: Bool[Tensor, " tasks"]

    @property
    def trained(self) -> Int[Tensor, " trained"]:
        """The tasks that are trained on."""
        return (~self.held).nonzero()[:, 0]

    @property
    def chance(self) -> float:
        """The share of answers that the best guess gets right which knows the query, but not the task."""
        counts = one_hot(self.maps[self.trained], SIZE).sum(0)  # [query, answer]
        return (counts.amax(1) / len(self.trained)).mean().item()


def family(name: str) -> Family:
    """Return a family: numbers shifted in a circle, fixed tables drawn at random, or lines rounded to symbols.

    Raises GrownError if there is no such one.
    """
    x = torch.arange(SIZE)
    if name == "offset":
        maps = (x + x[:, None]) % SIZE
    elif name == "table":
        maps = torch.rand(TABLES, SIZE, generator=torch.Generator().manual_seed(0)).argsort(1)
    elif name == "linear":  # lines that stay inside
        middle, parts = (SIZE - 1) / 2, range(-STEPS_OF_SLOPE, STEPS_OF_SLOPE + 1)
        lines = [(a / STEPS_OF_SLOPE, b / STEPS_OF_SLOPE) for a in parts for b in parts if abs(a) + abs(b) <= parts[-1]]
        maps = torch.stack([(a * (x - middle) + (1 + b) * middle).round().long() for a, b in lines])
    else:
        raise GrownError(f"There is no family {visible(name)!r}: there are {', '.join(FAMILIES)}.")
    held = torch.zeros(len(maps), dtype=torch.bool)
    if name != "table":  # of a new table nothing can be known; and held at random, as what is left must have no pattern
        held[torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))[: len(maps) // HELD]] = True
    return Family(name, maps, held)


@dataclass(frozen=True)
class Prompts:
    """Prompts of some tasks, no query in one twice. ``rest``: the queries that a prompt does not show."""

    tasks: Int[Tensor, " n"]
    x: Int[Tensor, "n pairs"]
    y: Int[Tensor, "n pairs"]
    rest: Int[Tensor, "n others"]

    @property
    def ids(self) -> Int[Tensor, "n tokens"]:
        return torch.stack([self.x, torch.full_like(self.x, SEPARATOR), self.y], 2).flatten(1)


def draw(
    of: Family, tasks: Int[Tensor, " n"], pairs: int, generator: torch.Generator, noise: float = 0.0
) -> Prompts:  # fmt: skip
    """Draw a prompt for each of ``tasks``; ``noise``: the share of answers shown, but the last, that are any symbol."""
    order = torch.rand(len(tasks), SIZE, generator=generator).argsort(1)
    x = order[:, :pairs]
    y = of.maps[tasks].gather(1, x)
    if noise:
        wrong = torch.rand(y.shape, generator=generator) < noise
        wrong[:, -1] = False
        y = torch.where(wrong, torch.randint(SIZE, y.shape, generator=generator), y)
    return Prompts(tasks, x, y, order[:, pairs:])


# Models


@dataclass(frozen=True)
class Spec:
    """What is grown, and how. ``weight`` of the second loss, which reads and writes after block ``at`` (from 0).

    ``mode``: the vector takes the place of the separator's stream ("replace"), or is added to it ("add"). ``start``:
    the variant whose trained weights training begins with.
    """

    family: str
    variant: str = "grown"
    seed: int = 0
    weight: float = 1.0
    at: int = 1
    mode: str = "replace"
    start: str = ""
    blocks: int = 4
    d_model: int = 64
    d_mlp: int = 128
    heads: int = 4
    pairs: int = 8
    batch: int = 64
    steps: int = 3200
    rate: float = 2e-3
    stages: int = 16  # moments of training that are measured

    def __post_init__(self):
        if not 0 <= self.at < self.blocks - 1:
            raise GrownError(f"A vector after block {self.at} of {self.blocks} would have no block left to be used in.")
        if not 1 < self.pairs <= SIZE // 2:
            raise GrownError(f"A prompt has 2 to {SIZE // 2} pairs, not {self.pairs}: the others are queries.")

    @property
    def name(self) -> str:
        return f"{self.family}/{self.variant}.{self.seed}"


def planned(seeds: int = 3, families: Sequence[str] = FAMILIES, **sizes: object) -> list[Spec]:
    """List the models of the book: two variants of every family with ``seeds`` seeds, the others of the first family.

    What starts from another model stands after it.
    """
    main = [(name, variant, seed) for name in families for variant in MAIN for seed in range(seeds)]
    more = [(families[0], variant, 0) for variant in VARIANTS if variant not in MAIN]
    return [Spec(*one, **{**sizes, **VARIANTS[one[1]]}) for one in main + more]


def sha256(name: str, seeds: int, root: str | Path = SHIPPED) -> str:
    """Hash the weights of all models of a family that are planned; raises GrownError if one is not there."""
    digest = hashlib.sha256()
    for spec in planned(seeds):
        if spec.family == name:
            path = Path(root) / spec.name / training.WEIGHTS
            if not path.is_file():
                raise GrownError(f"There is no grown model {visible(str(path.parent))}: `make grow` trains it.")
            digest.update(files.sha256(path).encode())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Grown:
    """A model with what it was trained to; ``history``: what `measured` found at every stage, one row each."""

    spec: Spec
    hf: torch.nn.Module
    history: tuple[dict, ...] = field(default=(), repr=False)
    sha256: str = ""

    @property
    def device(self) -> torch.device:
        return self.hf.lm_head.weight.device

    @cached_property
    def family(self) -> Family:
        return family(self.spec.family)

    def logits(self, stream: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n vocab"]:
        return self.hf.lm_head(self.hf.model.norm(stream))

    def run(self, stream: Float[Tensor, "n tokens d_model"], first: int = 0, end: int | None = None) -> Tensor:
        """Run some blocks on whole prompts: those from ``first`` on, up to ``end``."""
        turns = self.hf.model.rotary_emb(stream, torch.arange(stream.shape[1], device=self.device)[None])
        for block in self.hf.model.layers[first:end]:
            stream = block(stream, position_embeddings=turns, attention_mask=None)  # without a mask it is causal
        return stream

    def embed(self, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "n tokens d_model"]:
        return self.hf.model.embed_tokens(ids.to(self.device))

    def two(self, block: int) -> Float[Tensor, "size 2 d_model"]:
        """Return the streams after a block of the prompts x z, for every symbol x."""
        x = torch.arange(SIZE)
        return self.run(self.embed(torch.stack([x, torch.full_like(x, SEPARATOR)], 1)), 0, block + 1)


def fresh(spec: Spec) -> Grown:
    """Return an untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZE + 1, hidden_size=spec.d_model, intermediate_size=spec.d_mlp, num_hidden_layers=spec.blocks,
        num_attention_heads=spec.heads, num_key_value_heads=spec.heads, head_dim=spec.d_model // spec.heads,
        max_position_embeddings=3 * SIZE, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return Grown(spec, LlamaForCausalLM(config))


def losses(model: Grown, shown: Prompts) -> tuple[Tensor, Tensor]:
    """Return both losses of training, differentiable: of every answer in context, and of answers by vector alone.

    The second takes the vector of every separator but the first, which has seen no example, each with a query of its
    own that the prompt does not show.
    """
    spec, device = model.spec, model.device
    middle = model.run(model.embed(shown.ids), 0, spec.at + 1)
    said = model.logits(model.run(middle, spec.at + 1)[:, 1::3])
    in_context = cross_entropy(said.flatten(0, 1), shown.y.flatten().to(device))
    if not spec.weight:
        return in_context, torch.zeros_like(in_context)
    query = shown.rest[:, : spec.pairs - 1].flatten()
    answer = model.family.maps[shown.tasks.repeat_interleave(spec.pairs - 1), query]
    prompt = _placed(model.two(spec.at)[query.to(device)], middle[:, 4::3].flatten(0, 1), spec.mode)
    said = model.logits(model.run(prompt, spec.at + 1)[:, 1])
    return in_context, cross_entropy(said, answer.to(device))


def _placed(two: Float[Tensor, "*n 2 d_model"], vectors: Float[Tensor, "*n d_model"], mode: str) -> Tensor:
    """Put vectors at the separators of two-token prompts."""
    at = vectors if mode == "replace" else two[..., 1, :] + vectors
    return torch.stack([two[..., 0, :].expand_as(at), at], -2)


# What is in a model


def streams(model: Grown, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "blocks n tokens d_model"]:
    """Return the residual stream after every block."""
    found = [model.embed(ids)]
    for block in range(model.spec.blocks):
        found.append(model.run(found[-1], block, block + 1))
    return torch.stack(found[1:])


def prompted(
    model: Grown, vectors: Float[Tensor, "n d_model"], block: int, mode: str = "replace",
    queries: Int[Tensor, " asked"] | None = None,
) -> Float[Tensor, "n asked vocab"]:  # fmt: skip
    """Return what follows x z for every vector and query (None: all), with the vector at z after a block."""
    two = model.two(block) if queries is None else model.two(block)[queries.to(model.device)]
    n, asked = len(vectors), len(two)
    prompts = _placed(two.expand(n, *two.shape), vectors.to(two)[:, None].expand(n, asked, -1), mode)
    return model.logits(model.run(prompts.flatten(0, 1), block + 1)[:, 1]).unflatten(0, (n, asked))


def score(logits: Float[Tensor, "*n vocab"], answers: Int[Tensor, "*n"]) -> dict[str, float]:
    """Return the mean loss in nats, the share of first choices that are right, and their number."""
    answers = answers.to(logits.device)
    loss = cross_entropy(logits.flatten(0, -2), answers.flatten()).item()
    return {"loss": loss, "accuracy": (logits.argmax(-1) == answers).float().mean().item(), "n": answers.numel()}


@torch.no_grad()
def in_context(model: Grown, n: int, seed: int = 0) -> Iterator[dict]:
    """Measure what a model does with examples, on ``n`` prompts a task: rows of on, shots, loss, accuracy.

    "train": tasks that it was trained on; "held_out": tasks that it was not; "noise": with a share of wrong answers
    among the examples; "longer": more examples than it ever saw.
    """
    of, pairs = model.family, model.spec.pairs
    asked = [("train", of.trained, pairs, 0.0), ("longer", of.trained, 2 * pairs, 0.0)]
    asked += [(f"noise {share:g}", of.trained, pairs, share) for share in NOISE]
    asked += [("held_out", of.held.nonzero()[:, 0], pairs, 0.0)] if of.held.any() else []
    for on, tasks, shown, noise in asked:
        prompts = draw(of, tasks.repeat_interleave(n), min(shown, SIZE), torch.Generator().manual_seed(seed), noise)
        said = model.logits(streams(model, prompts.ids)[-1][:, 1::3])
        for shots in sorted({1, shown - 1} if on == "train" else {shown - 1}):
            yield {"method": "in_context", "layer": -1, "on": on, "shots": shots,
                   **score(said[:, shots], prompts.y[:, shots])}  # fmt: skip


@torch.no_grad()
def separators(
    model: Grown, tasks: Int[Tensor, " tasks"], n: int, seed: int = 0
) -> Float[Tensor, "blocks tasks n pairs d_model"]:  # fmt: skip
    """Return the streams at all separators of ``n`` prompts a task; the i-th of a prompt has seen i examples."""
    prompts = draw(
        model.family, tasks.repeat_interleave(n), model.spec.pairs, torch.Generator().manual_seed(1 << 20 | seed)
    )
    return streams(model, prompts.ids)[:, :, 1::3].unflatten(1, (len(tasks), n))


@torch.no_grad()
def by_vector(
    model: Grown, n: int, methods: Sequence[str] = ("mean",), seed: int = 0, singles: int = 4
) -> Iterator[dict]:
    """Measure what the last separator's stream does alone, after every block: rows as `in_context` has them.

    "mean": of ``n`` prompts, in place of the stream; "one": each of a few, likewise; "centred": the mean, less that of
    separators without examples, is added.
    """
    for on, tasks in (("train", model.family.trained), ("held_out", model.family.held.nonzero()[:, 0])):
        if not len(tasks):
            continue
        last, answers = separators(model, tasks, n, seed)[:, :, :, -1], model.family.maps[tasks]
        for layer in range(model.spec.blocks):
            mean, zero = last[layer].mean(1), model.two(layer)[:, 1].mean(0)
            given = {"mean": (mean, "replace", 1), "centred": (mean - zero, "add", 1),
                     "one": (last[layer][:, :singles].flatten(0, 1), "replace", min(singles, n))}  # fmt: skip
            for method in methods:
                vectors, mode, each = given[method]
                said = prompted(model, vectors, layer, mode)
                yield {"method": method, "layer": layer, "on": on, "shots": model.spec.pairs - 1,
                       **score(said, answers.repeat_interleave(each, 0))}  # fmt: skip


# Sparse codes of a vector


@dataclass(frozen=True)
class Asked:
    """What vectors are cleaned on, as a `cleaning.Problem`: row i is a vector of ``tasks[i]``, in place after a block.

    The two-token prompts of some queries train it, others validate. ``common`` is added to every vector: what is
    written with few latents stands on top of what every separator has.
    """

    model: Grown
    block: int
    tasks: Int[Tensor, " n"]
    training: Int[Tensor, " queries"]
    validation: Int[Tensor, " others"]
    common: Float[Tensor, " d_model"] | float = 0.0

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train_loss(self, vectors: Float[Tensor, "n d_model"], step: int) -> Float[Tensor, " n"]:
        return self.loss(vectors, self.training)

    @torch.no_grad()
    def validation_loss(self, vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        return self.loss(vectors, self.validation)

    def loss(self, vectors: Float[Tensor, "n d_model"], queries: Int[Tensor, " asked"]) -> Float[Tensor, " n"]:
        """Return the mean loss of every vector over some queries, in nats."""
        said = prompted(self.model, vectors + self.common, self.block, queries=queries)
        answers = self.model.family.maps[self.tasks][:, queries].to(self.device)
        return cross_entropy(said.transpose(1, 2), answers, reduction="none").mean(1)


def dictionary(
    x: Float[Tensor, "n d_model"], layer: int, latents: int, k: int, steps: int, seed: int, batch: int = 512
) -> saes.Sae:
    """Train an SAE on streams after a block as the book's are, in seconds: it has ``k`` active latents on average."""
    x, rng = x.cpu(), np.random.default_rng(seed)
    spec = train_saes.Spec("grown", layer, latents, k, len(x), lr=3e-3, seed=seed)
    sae = train_saes.Sae.fresh(x, spec)
    for step in range(steps):
        if (first := step * batch % len(x) // batch * batch) == 0 or step == 0:
            order = torch.from_numpy(rng.permutation(len(x)))
            sae.find_dead()
        sae.step(x[order[first : first + batch]], k, spec.lr * min(1.0, (1 - step / steps) / 0.3), rng)
    tensors = sae.folded()
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
    hook = f"blocks.{layer}.hook_resid_post"
    return saes.Sae("grown", "grown", hook, layer, "jumprelu", **tensors, k=None, sha256=digest)


# Files


SHELF = training.Shelf("grown model", "make grow", Spec, GrownError)


def save(model: Grown, root: str | Path = SHIPPED) -> Path:
    """Keep a model below a folder; return its own folder."""
    return SHELF.keep(Path(root) / model.spec.name, model.spec, model.history, model.hf)


def load(name: str, variant: str, seed: int, root: str | Path = SHIPPED) -> Grown:
    """Load a grown model to where models go; raises GrownError, in one sentence, if it cannot be had."""
    name = f"{name}/{variant}.{seed}"
    return Grown(*SHELF.load(Path(root) / name, name, lambda spec: fresh(spec).hf))
