"""Labels of features, from evidence alone, and scores that say how far a label can be trusted.

No judge is asked, neither a person nor a model: a label is the tokens on which a feature fires more often than chance,
those that its direction promotes, the kind of token in few-shot prompts and the language that hold most of its
activation. The scores are simple on purpose: a label that scores well is right in a way that anybody can check, and a
shuffled label scores at chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

WORDS = 3  # at most of each sort in a label
SHARE, LIFT, LEAST = 0.05, 3.0, 2  # of firing tokens that a word needs; over its share of all tokens; how often
MOST = 0.5  # share of the activation from which a kind of token, or a language, is in the label
BINS = 5  # equal parts of the activations, from the weakest to the strongest
LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}
NEXT = 0.5  # weight of what follows beside what fires


@dataclass(frozen=True)
class Label:
    """What a feature is called by: words it fires on, words it promotes, a kind of token, a language; any may lack."""

    fires: tuple[str, ...] = ()
    promotes: tuple[str, ...] = ()
    place: str = ""
    language: str = ""

    def __str__(self) -> str:
        parts = [
            f"fires on {' · '.join(self.fires)}" if self.fires else "",
            f"promotes {' · '.join(self.promotes)}" if self.promotes else "",
            f"at {self.place}s" if self.place else "",
            f"{LANGUAGES.get(self.language, self.language)} text" if self.language else "",
        ]
        return "; ".join(part for part in parts if part) or "no label"

    def __bool__(self) -> bool:
        return bool(self.fires or self.promotes)


def word(token: str) -> str:
    """Return a token as a word: without the spaces around it, in lower case."""
    return token.strip().casefold()


def made(
    tokens: Sequence[str], languages: Sequence[str], everywhere: Counter, promoted: Sequence[str],
    mass: pd.Series | None = None, languages_everywhere: pd.Series | None = None,
) -> Label:
    """Make a label of evidence.

    ``tokens``, ``languages``: of places where the feature fires, of all quantiles alike. ``everywhere``: how often each
    word occurs in the text. ``promoted``: what the direction promotes, the most first. ``mass``: the share of its
    activation in few-shot prompts by kind of token. ``languages_everywhere``: the share of each language in the text.
    """
    found, whole = Counter(word(token) for token in tokens), max(1, sum(everywhere.values()))
    often = [
        (n / len(tokens), name) for name, n in found.items()
        if name and n >= LEAST and n / len(tokens) >= max(SHARE, LIFT * everywhere[name] / whole)
    ]
    fires = [name for _, name in sorted(often, key=lambda one: (-one[0], one[1]))][:WORDS]
    words = dict.fromkeys(word(token) for token in promoted if len(word(token)) > 1 and any(map(str.isalnum, token)))
    place = "" if mass is None or mass.empty or mass.max() < MOST else str(mass.idxmax())
    spoken = pd.Series(list(languages)).value_counts(normalize=True)
    usual = {} if languages_everywhere is None else languages_everywhere
    special = [name for name, share in spoken.items() if share >= MOST and share >= 1.5 * usual.get(name, 0)]
    return Label(tuple(fires), tuple(list(words)[:WORDS]), place, special[0] if special else "")


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the chance that a positive has the higher score than a negative, ties counted half; NaN without either."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return float("nan")
    ranks = pd.Series(np.concatenate([positive, negative])).rank().to_numpy()
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def quantiles(values: Float[np.ndarray, " n"]) -> np.ndarray:
    """Return in which of `BINS` equal parts each activation lies: 1 the weakest, BINS the strongest."""
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return 1 + order * BINS // max(1, len(values))


def alike(
    fires: Float[np.ndarray, "w d"], promotes: Float[np.ndarray, "v d"], own: Float[np.ndarray, "n d"],
    following: Float[np.ndarray, "n d"],
) -> Float[np.ndarray, " n"]:
    """Score places by a label's words alone: how near the token is to one it fires on, or the next to one it promotes.

    All are unit embeddings: of the label's words, of the tokens at the places, and of those that follow. The classifier
    of detection.
    """
    best = np.full(len(own), -1.0)
    for words, tokens, weight in ((fires, own, 1.0), (promotes, following, NEXT)):
        if len(words):
            best = np.maximum(best, weight * (tokens @ words.T).max(1))
    return best


def intruder(own: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"], rng, draws: int = 20) -> float:
    """Return how often, of four contexts of a feature and one of another, the other's is farthest from the rest.

    Contexts are embeddings; chance is a fifth. NaN where there are fewer than four.
    """
    if len(own) < 4 or not len(other):
        return float("nan")
    right = 0
    for _ in range(draws):
        five = np.concatenate([own[rng.choice(len(own), 4, replace=False)], other[rng.choice(len(other), 1)]])
        rest = (five.sum(0) - five) / 4
        lengths = np.linalg.norm(five, axis=1) * np.linalg.norm(rest, axis=1)
        cosine = (five * rest).sum(1) / lengths.clip(1e-9)
        right += int(cosine.argmin() == 4)
    return right / draws


def predicted(
    promotes: Float[np.ndarray, "v d"], answers: dict[str, Float[np.ndarray, " d"]], effects: pd.Series
) -> float:
    """Say how well a label's promoted words tell the tasks that a feature helps from those that it harms (AUROC).

    ``answers``: the mean unit embedding of a task's answers. ``effects``: the relative change of loss by the feature
    alone, of tasks that took no part in its label. NaN where it only helps, or only harms.
    """
    if not len(promotes):
        return float("nan")
    near = {task: float((promotes @ answers[task]).max()) for task in effects.index if task in answers}
    helped = [near[task] for task in near if effects[task] < 0]
    return auroc(helped, [near[task] for task in near if effects[task] >= 0])
