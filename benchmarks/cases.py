"""What is measured on: a model with prompts, a place to steer and an SAE; the embedded model, or the shape of another.

A model of a shape has random weights: what it computes means nothing, what it costs is what that model costs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from nb_utils import engine, models, prompts, saes, tasks, vectors
from nb_utils.prompts import Prompt

TASK, LAYER, PROMPTS, SHOTS = "antonyms", 10, 24, 16
GEMMA2 = {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# The layer to steer after, the latents of the SAE, and the configuration. "small" rehearses the others.
SHAPES = {
    "gemma2-2b": (12, 16_384, dict(
        vocab_size=262_144, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
    )),
    "small": (1, 64, dict(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=64,
        initializer_range=0.3,  # so narrow a model would hardly care for a vector
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, zero-shot and few-shot prompts, the block to steer after, and an SAE that lies where the model does."""

    model: models.Model
    prompts: list[Prompt]
    shots: list[Prompt]
    layer: int
    sae: saes.Sae
    start: Float[Tensor, " d_sae"]  # pre-activations from which cleaning begins

    @cached_property
    def site(self) -> engine.Site:
        return engine.Site.prepare(self.model, self.prompts, answer_tokens=2)

    @cached_property
    def kept(self) -> engine.Vocabulary:
        """The tokens of the reduced softmax."""
        return engine.vocabulary(self.site)

    @cached_property
    def directions(self) -> Float[Tensor, "d_sae d_model"]:
        """The SAE's directions, of the length of the stream."""
        directions = self.sae.decoder_directions
        return directions * self.site.at(self.layer).norm(dim=1).mean().to(directions)


def embedded() -> Case:
    """Return Gemma 3 270M with its shipped SAE, on a task."""
    model, splits = models.load("gemma-3-270m"), tasks.split(tasks.load(TASK))
    made = prompts.zero_shot(model.tokenizer, splits.train[:PROMPTS])
    shots = prompts.few_shot(model.tokenizer, splits.vector, splits.vector[:SHOTS], SHOTS, seed=0)
    sae = saes.load(model, "shipped", LAYER)
    start = sae.pre_activations(vectors.task_vector(vectors.separators(model, splits.vector, [LAYER], 4, 8), LAYER))
    return Case(model, made, shots, LAYER, sae.to(model.device), start)


def shaped(name: str) -> Case:
    """Return a model of a shape, with random weights in single precision, where `models.placement` says."""
    layer, d_sae, sizes = SHAPES[name]
    model = _random(name, sizes)
    sae = saes.random(model, layer, d_sae)
    case = Case(model, *_texts(sizes["vocab_size"]), layer, sae, torch.empty(0))
    start = sae.pre_activations(case.site.at(layer).mean(0))
    return Case(model, case.prompts, case.shots, layer, sae.to(model.device), start)


def _random(name, sizes) -> models.Model:
    """Build a Gemma 2, whose attention needs to be eager: torch's own knows no soft cap."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    with torch.device(models.placement()):
        hf = AutoModelForCausalLM.from_config(
            Gemma2Config(**sizes, **GEMMA2), dtype=torch.float32, attn_implementation="eager")
    tokenizer = models.load("tiny", "cpu").tokenizer  # gives only as many tokens as there are bytes
    return models.Model(name, hf.eval().requires_grad_(False), tokenizer, "")


def _texts(n_vocab) -> tuple[list[Prompt], list[Prompt]]:
    """Draw prompts of a BOS, words of one token, an arrow each, and answers of one token or two; and few-shot ones."""
    draw = torch.Generator().manual_seed(0)
    arrow, line = 3, 4

    def words(n):
        return torch.randint(5, n_vocab, (n,), generator=draw).tolist()

    made, shots = [], []
    for i in range(PROMPTS):
        x, *answer = words(2 + i % 2)
        made.append(Prompt((2, x, arrow, *answer), (2,), (), tuple(answer), (tuple(answer),)))
    for _ in range(SHOTS):
        ids = [2, *(token for _ in range(SHOTS + 1) for token in (words(1)[0], arrow, words(1)[0], line))][:-1]
        separators, outputs = range(2, len(ids), 4), range(3, len(ids) - 1, 4)
        shots.append(Prompt(tuple(ids), tuple(separators), tuple(outputs), tuple(ids[-1:]), (tuple(ids[-1:]),)))
    return made, shots
