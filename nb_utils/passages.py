"""Passages: ordinary text in which a vector is added, to see what it does where there is no task."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from nb_utils.prompts import Prompt
from nb_utils.tasks import DATA

NEUTRAL = DATA / "text/neutral.json"
# What prose has in the place of an arrow: a colon, a dash, a sign between two words. A hyphen inside a word is none.
SEPARATOR_LIKE = re.compile(r"->|[=|–—]|--|(?<=\s)-(?=\s)|:(?=\s)")
BEFORE = 16  # least number of tokens before a steered one: the model needs a context to predict from


@dataclass(frozen=True)
class Passage:
    """Some sentences of ordinary text, and the package they come from."""

    text: str
    source: str


def load(path: str | Path = NEUTRAL) -> tuple[Passage, ...]:
    """Read the passages of a file that `workflow.build_passages` has written."""
    return tuple(Passage(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["passages"])


def at_separators(tokenizer, passages, following: int = 16, seed: int = 0) -> list[Prompt]:
    """Return one prompt per passage, steered at a token that ends as `SEPARATOR_LIKE` does, drawn by ``seed``.

    Its answer is the ``following`` tokens. A passage without such a token, far enough from its ends, is left out.
    """
    return _prompts(tokenizer, passages, following, seed, like=True)


def at_random(tokenizer, passages, following: int = 16, seed: int = 0) -> list[Prompt]:
    """Return one prompt per passage, steered at any other token, as `at_separators` does."""
    return _prompts(tokenizer, passages, following, seed, like=False)


def _prompts(tokenizer, passages, following, seed, like) -> list[Prompt]:
    rng, made = random.Random(seed), []
    for passage in passages:
        encoded = tokenizer(passage.text, return_offsets_mapping=True)
        ids, marks = encoded["input_ids"], {mark.end() for mark in SEPARATOR_LIKE.finditer(passage.text)}
        spots = range(BEFORE, len(ids) - following)
        ends = encoded["offset_mapping"]
        if spots := [i for i in spots if (ends[i][1] in marks) == like and ends[i][1] != ends[i + 1][1]]:
            at = rng.choice(spots)
            answer = tuple(ids[at + 1 : at + 1 + following])
            made.append(Prompt(tuple(ids[: at + 1]) + answer, (at,), (), answer, (answer,)))
    return made
