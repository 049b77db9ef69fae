"""Labels of features, from evidence alone, and scores that say how far a label can be trusted.

No judge is asked, neither a person nor a model: a label is the tokens on which a feature fires more often than chance,
those that stand before such places, those that its direction promotes, the kind of token in few-shot prompts and the
language that hold most of its activation. The scores are simple on purpose: a label that scores well is right in a way
that anybody can check, and a shuffled label scores at chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

WORDS = 3  # at most of each sort in a label
SHARE, CHANCE = 0.05, 0.05  # of the places that a word needs; how likely any word of a label may be one by chance
LEAST = 3  # documents that hold it: one document has its names everywhere
MOST = 0.5  # share of the activation from which a kind of token, or a language, is in the label
BINS = 5  # equal parts of the activations, from the weakest to the strongest
LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}
WEIGHTS = (1.0, 0.5, 0.5)  # of what fires, of what stands before it, of what follows
SPOKEN = 0.25  # what the label's language adds


@dataclass(frozen=True)
class Label:
    """What a feature is called by: words that it fires on, words before them, words that it promotes, a kind of token,
    a language; any may lack."""

    fires: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    promotes: tuple[str, ...] = ()
    place: str = ""
    language: str = ""

    def __str__(self) -> str:
        parts = [
            f"fires on {' · '.join(self.fires)}" if self.fires else "",
            f"behind {' · '.join(self.behind)}" if self.behind else "",
            f"promotes {' · '.join(self.promotes)}" if self.promotes else "",
            f"at {self.place}s" if self.place else "",
            f"{LANGUAGES.get(self.language, self.language)} text" if self.language else "",
        ]
        return "; ".join(part for part in parts if part) or "no label"

    def __bool__(self) -> bool:
        return bool(self.fires or self.behind or self.promotes)


def word(token: str) -> str:
    """Return a token as a word: without the spaces around it, in lower case."""
    return token.strip().casefold()


def made(
    tokens: Sequence[str], languages: Sequence[str], everywhere: Counter, promoted: Sequence[str],
    mass: pd.Series | None = None, languages_everywhere: pd.Series | None = None,
    before: Sequence[Sequence[str]] = (), documents: Sequence[int] | None = None,
) -> Label:
    """Make a label of evidence.

    ``tokens``, ``languages``, ``before``: of places where the feature fires, of all quantiles alike, the token, the
    language of the text, and the tokens that stand before it. ``documents``: which one each place lies in; without,
    each is one of its own. ``everywhere``: how often each word occurs in the text. ``promoted``: what the direction
    promotes, the most first. ``mass``: the share of its activation in few-shot prompts by kind of token.
    ``languages_everywhere``: the share of each language in the text.
    """
    documents = range(len(tokens)) if documents is None else documents
    fires = _often([[token] for token in tokens], documents, everywhere)
    behind = [name for name in _often(before or [()] * len(tokens), documents, everywhere) if name not in fires]
    words = dict.fromkeys(word(token) for token in promoted if len(word(token)) > 1 and any(map(str.isalnum, token)))
    place = "" if mass is None or mass.empty or mass.max() < MOST else str(mass.idxmax())
    spoken = pd.Series(list(languages)).value_counts(normalize=True)
    usual = {} if languages_everywhere is None else languages_everywhere
    special = [name for name, share in spoken.items() if share >= MOST and share >= 1.5 * usual.get(name, 0)]
    told = (tuple(names[:WORDS]) for names in (fires, behind, list(words)))
    return Label(*told, place, special[0] if special else "")


def _often(places: Sequence[Collection[str]], documents: Sequence[int], everywhere: Counter) -> list[str]:
    """Return the words that more places hold than chance would have it, of enough documents, the most frequent first.

    ``places``: the tokens of each. By chance, so many tokens hold the word as often as any do; the test is binomial.
    """
    from scipy.stats import binom  # it takes a second to import, and pages have no need of it

    within: dict[str, list[int]] = {}
    for tokens, document in zip(places, documents, strict=True):
        for name in {word(token) for token in tokens} - {""}:
            within.setdefault(name, []).append(document)
    size, whole = sum(map(len, places)) / max(1, len(places)), 1 + sum(everywhere.values())
    counts = {name: len(found) for name, found in within.items() if len(set(found)) >= LEAST}
    chance = {name: 1 - (1 - (1 + everywhere[name]) / whole) ** size for name in counts}
    # Every word that was seen is a try, so each gets its part of the error (Bonferroni).
    often = [
        name for name, n in counts.items() if n >= SHARE * len(places)
        and binom.sf(n - 1, len(places), chance[name]) * len(within) < CHANCE
    ]  # fmt: skip
    return sorted(often, key=lambda name: (-counts[name], name))


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
    words: Sequence[Float[np.ndarray, "w d"]], tokens: Sequence[Float[np.ndarray, "n t d"]],
    spoken: Float[np.ndarray, " n"] | float = 0.0,
) -> Float[np.ndarray, " n"]:
    """Score places by a label alone: how near a token is to one that it fires on, one before it to one that it fires
    behind, or the next to one that it promotes; and whether the text is in its language.

    ``words``, ``tokens``: unit embeddings of the label's words and of a place's tokens, of each of the three sorts.
    ``spoken``: 1 where the language is the label's. The classifier of detection.
    """
    best = np.full(len(tokens[0]), -1.0)
    for mine, there, weight in zip(words, tokens, WEIGHTS, strict=True):
        if len(mine):
            best = np.maximum(best, weight * (there @ mine.T).max((1, 2)))
    return best + SPOKEN * spoken


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
