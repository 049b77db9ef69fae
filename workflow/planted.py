"""A planted world: a small model whose task features are known, to ask whether methods find them.

Features are random unit directions, four times as many as the stream is wide. What carries the book's argument is
planted among them, as on real models: features that every separator has, and that are most of its norm; *format*
features, which come with examples whatever the task and do nothing; *default* features, which are there without
examples and hold some tasks' answers down; the query's class; and each task's own. The model is a Llama of two blocks,
its weights set by hand. The first moves the query to the separator. The second, in one gated neuron a feature, writes
an answer where the query's class meets the task's feature; so a task needs all of its features, each for some of its
queries. Norms divide by all that is in the stream, so what is added in vain costs, too.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nb_utils import engine, prompts
from nb_utils.models import Model
from nb_utils.tasks import Pair
from nb_utils.vectors import Streams

WIDTH, FEATURES = 64, 256
TASKS, CLASSES = 6, 6  # a task has one feature for each class of queries, which it adds
QUERIES = 96  # a quarter each for vectors, training, validation and test
LAYER = 0  # the block after which vectors are added
KINDS = {"separator": 4, "format": 4, "default": 4, "query": CLASSES, "task": TASKS * CLASSES}
TAKEN = 2  # of the default features, those that a task takes away
SIZE = {"separator": 5.0, "format": 3.0, "default": 2.0, "query": 4.0, "task": 2.0, "other": 2.0}
DENSITY = 0.03  # of the other features, at any token
SHARE = 0.1  # of what SAEs are trained on: separators
JITTER = 0.2  # of sizes, from token to token, as a share
ERROR = 1.0  # norm of what no feature stands for
READ, WRITE, HOLD, SHARP = 2.0, 12.0, 4.0, 1.5  # strengths: of a neuron's gate and output, of defaults, of logits
SAME = 0.7  # cosine from which on a latent stands for a feature


@dataclass(frozen=True)
class Task:
    """A task: its pairs, and the sign with which it uses each of its features: {feature: +1 or -1}."""

    name: str
    pairs: tuple[Pair, ...]
    signs: dict[int, int]

    def part(self, i: int) -> tuple[Pair, ...]:
        """Return a quarter of the pairs, which holds all classes: 0 for vectors, 1 training, 2 validation, 3 test."""
        return self.pairs[i * QUERIES // 4 : (i + 1) * QUERIES // 4]


@dataclass(frozen=True)
class World:
    """Features and tasks of one seed, and the model that uses them."""

    seed: int
    directions: Float[Tensor, "features d_model"]
    kinds: dict[str, range]
    tasks: tuple[Task, ...]
    model: Model

    def separators(self, task: int, n: int = 240) -> Streams:
        """Return ``n`` separators of few-shot prompts, drawn, and those of zero-shot prompts, from the model."""
        pairs = prompts.zero_shot(self.model.tokenizer, self.tasks[task].part(0))
        zero = engine.residuals(self.model, pairs, [p.separators for p in pairs], [LAYER])
        return Streams({LAYER: self._drawn(self._few(task, n), 1000 + task)}, zero)

    def tokens(self, n: int, seed: int) -> Float[Tensor, "n d_model"]:
        """Draw what SAEs are trained on: text, and among it (`SHARE`) separators, half of them few-shot."""
        part = int(SHARE * n / 2)
        text = torch.full((n - part - part // TASKS * TASKS, FEATURES), DENSITY)
        few = [self._few(task, part // TASKS) for task in range(TASKS)]
        return self._drawn(torch.cat([text, *few, self._zero(part)]), seed)

    def truth(self, task: int) -> Float[Tensor, " features"]:
        """Return the codes by which few-shot separators differ from others, of the features that the task uses."""
        codes = torch.zeros(FEATURES)
        for feature, sign in self.tasks[task].signs.items():
            codes[feature] = sign * self._sizes[feature]
        return codes

    @property
    def _sizes(self) -> Float[Tensor, " features"]:
        sizes = torch.full((FEATURES,), SIZE["other"])
        for kind, features in self.kinds.items():
            sizes[list(features)] = SIZE[kind]
        return sizes

    def _zero(self, n: int) -> Float[Tensor, "n features"]:
        """Return how likely each feature is at separators that have seen no example."""
        likely = torch.full((n, FEATURES), DENSITY)
        for kind in KINDS:
            likely[:, list(self.kinds[kind])] = float(kind in ("separator", "default"))
        likely[torch.arange(n), self.kinds["query"][0] + torch.arange(n) % CLASSES] = 1
        return likely

    def _few(self, task: int, n: int) -> Float[Tensor, "n features"]:
        """Return the same where examples of a task have been seen."""
        likely = self._zero(n)
        likely[:, list(self.kinds["format"])] = 1
        likely[:, [f for f, sign in self.tasks[task].signs.items() if sign > 0]] = 1
        likely[:, [f for f, sign in self.tasks[task].signs.items() if sign < 0]] = 0
        return likely

    def _drawn(self, likely: Float[Tensor, "n features"], seed: int) -> Float[Tensor, "n d_model"]:
        generator = torch.Generator().manual_seed((self.seed << 20) + seed)
        return _drawn(likely, self._sizes, self.directions, generator)


def _drawn(likely, sizes, directions, generator) -> Float[Tensor, "n d_model"]:
    """Draw tokens whose features fire as likely as said, with the error that no feature stands for."""
    fires = torch.rand(likely.shape, generator=generator) < likely
    codes = fires * sizes * (1 + JITTER * torch.randn(likely.shape, generator=generator))
    error = torch.randn(len(likely), directions.shape[1], generator=generator)
    return codes @ directions + ERROR * error / directions.shape[1] ** 0.5


def world(seed: int) -> World:
    """Plant features, tasks and the model that does them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
    kinds, start = {}, 0
    for kind, n in KINDS.items():
        kinds[kind], start = range(start, start + n), start + n
    words = [f"q{i}" for i in range(QUERIES)]
    tasks = []
    for t in range(TASKS):
        own = kinds["task"][t * CLASSES : (t + 1) * CLASSES]
        away = [kinds["default"][(t + i) % KINDS["default"]] for i in range(TAKEN)]
        answers = [f"a{feature}" for feature in own]
        pairs = tuple(Pair(x, answers[i % CLASSES], (answers[i % CLASSES],)) for i, x in enumerate(words))
        tasks.append(Task(f"world {seed}, task {t}", pairs, dict.fromkeys(own, 1) | dict.fromkeys(away, -1)))
    plain = World(seed, directions, kinds, tuple(tasks), None)
    return replace(plain, model=_model(plain, words, generator))


@torch.no_grad()
def _model(plain: World, words: list[str], generator: torch.Generator) -> Model:
    """Build the model: see the module's first lines."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kinds, tasks = plain.kinds, plain.tasks
    answers = [f"a{feature}" for feature in kinds["task"]]
    tokenizer = _tokenizer((*words, *(f" {answer}" for answer in answers)))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=len(answers), num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=WIDTH, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        hf = LlamaForCausalLM(config)
    for name, parameter in hf.named_parameters():
        parameter.fill_(float("norm" in name))
    ids = tokenizer.convert_tokens_to_ids
    # Every query has the same length, so that the norm before attention takes nothing from it.
    likely = torch.full((QUERIES, FEATURES), DENSITY)
    likely[:, : sum(KINDS.values())] = 0
    likely[torch.arange(QUERIES), kinds["query"][0] + torch.arange(QUERIES) % CLASSES] = 1
    queries = _drawn(likely, plain._sizes, plain.directions, generator)
    length = queries.norm(dim=1).median()
    there = [*kinds["separator"], *kinds["default"]]
    separator = (plain._sizes[there, None] * plain.directions[there]).sum(0)
    embed, first, second = hf.model.embed_tokens.weight, *hf.model.layers
    embed[ids(words)] = length * torch.nn.functional.normalize(queries, dim=1)
    # Attention is uniform over BOS (nothing), the query and the separator, which so comes twice.
    embed[ids(" ->")] = separator * (1 - length / separator.norm())
    first.self_attn.v_proj.weight.copy_(torch.eye(WIDTH))
    first.self_attn.o_proj.weight.copy_(3 * length / WIDTH**0.5 * torch.eye(WIDTH))
    # What reads a feature ignores those that are at every separator, and the classes of queries.
    everywhere = [feature for kind in ("separator", "format", "default", "query") for feature in kinds[kind]]
    dual = torch.linalg.pinv(plain.directions[everywhere]).T
    reads = dict(zip(everywhere, dual, strict=True))

    def ignoring(rows):
        return rows - rows @ plain.directions[everywhere].T @ dual

    rows = torch.nn.functional.normalize(ignoring(torch.randn(len(tokenizer), WIDTH, generator=generator)), dim=1)
    hf.lm_head.weight.copy_(SHARP * rows)
    for neuron, (feature, answer) in enumerate(zip(kinds["task"], answers, strict=True)):
        task, token = tasks[neuron // CLASSES], ids(f" {answer}")
        second.mlp.gate_proj.weight[neuron] = READ * reads[kinds["query"][neuron % CLASSES]]
        second.mlp.up_proj.weight[neuron] = ignoring(plain.directions[feature])
        second.mlp.down_proj.weight[:, neuron] = WRITE * rows[token]
        for default in (f for f, sign in task.signs.items() if sign < 0):
            hf.lm_head.weight[token] -= HOLD * reads[default]
    digest = hashlib.sha256(b"".join(parameter.numpy().tobytes() for parameter in hf.parameters())).hexdigest()
    return Model(f"planted {plain.seed}", hf.eval().requires_grad_(False), tokenizer, digest)


@cache
def _tokenizer(words: tuple[str, ...]):
    """Return a tokenizer with one token for each word, the arrow and the line break."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "\n", " ->", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ \n]+|\n"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", name_or_path="planted"
    )


def stands_for(W_dec: Float[Tensor, "d_sae d_model"], directions) -> Int[Tensor, " d_sae"]:
    """Return the feature that each latent stands for: that of the nearest direction, -1 if none is near (`SAME`)."""
    cosine, feature = (torch.nn.functional.normalize(W_dec, dim=1) @ directions.T).max(1)
    return torch.where(cosine >= SAME, feature, -1)


def recovery(codes: Float[Tensor, " d_sae"], feature: Int[Tensor, " d_sae"], signs: dict[int, int]) -> dict[str, float]:
    """Score codes against a task's features.

    ``feature``: from `stands_for`. precision: of the latents, those that stand for a feature of the task. recall: of
    the task's features, those for which a latent stands. sign: of the right latents, those of the right sign.
    """
    kept = codes.nonzero()[:, 0]
    wanted = torch.tensor([signs.get(f, 0) for f in feature[kept].tolist()])
    right = wanted != 0
    precision = right.float().mean().item() if len(kept) else 0.0
    recall = len(set(feature[kept][right].tolist())) / len(signs)
    f1 = 2 * precision * recall / (precision + recall) if precision else 0.0
    sign = (codes[kept][right].sign() == wanted[right]).float().mean().item() if right.any() else float("nan")
    return {"l0": len(kept), "precision": precision, "recall": recall, "f1": f1, "sign": sign}
