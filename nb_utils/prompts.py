"""Few-shot and zero-shot prompts, with the tokens that matter found by character offsets; and ordinary text."""

import functools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from nb_utils.tasks import DATA, Pair, Task, TaskError


@dataclass(frozen=True)
class Template:
    """How a prompt is written: ``opening``, then pairs as ``before`` + ``x`` + ``separator`` + `` y``.

    ``between`` joins the pairs.
    """

    separator: str = " ->"
    between: str = "\n"
    before: str = ""
    opening: str = ""


ARROW = Template()
TEMPLATES = {
    "arrow": ARROW, "colon": Template(":"), "equals": Template(" ="), "question": Template("\nA:", before="Q: "),
    "spanish": Template("\nRespuesta:", before="Pregunta: "), "instruction": Template(opening="Complete the list.\n"),
    "choice": ARROW,  # of pairs that are `offered`
}  # fmt: skip
# The same pairs in plain sentences, without an arrow.
SENTENCES = {
    "means": Template('" means', before='The word "'),
    "usually": Template('", it usually means', before='When I think of the word "'),
    "other_words": Template(", in other words:"),
}  # fmt: skip
DUMMY = Pair("X", "Y", ("Y",))  # the shot that says nothing of the task, on whose "Y" detectors are tested (the post)


# What the shipped tasks ask for, in words: what one would write in place of examples.
LANGUAGES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian"}
INSTRUCTIONS = {
    "algo_first": "Give the first word of the list.", "algo_second": "Give the second word of the list.",
    "algo_last": "Give the last word of the list.", "antonyms": "Give the opposite of the word.",
    "city_language": "Give the language that is spoken in the city.",
    "country_capital": "Give the capital of the country.", "element_symbol": "Give the symbol of the chemical element.",
    "last_plural": "Give the plural of the last word of the list.",
    "location_continent": "Give the continent that the country is on.",
    "location_country": "Give the country that the city is in.",
    "location_language": "Give the language that is spoken in the country.",
    "location_religion": "Give the main religion of the country.",
    "noun_category": "Say what sort of thing the word names.",
    "person_language": "Give the native language of the person.",
    "person_nationality": "Give the nationality of the person.",
    "person_profession": "Give the profession of the person.", "plural_singular": "Give the singular of the word.",
    "present_simple_gerund": "Give the -ing form of the verb.",
    "present_simple_past_perfect": "Give the past participle of the verb.",
    "present_simple_past_simple": "Give the past tense of the verb.", "singular_plural": "Give the plural of the word.",
    "word_sentiment": "Say whether the word is positive or negative.",
}  # fmt: skip


def instructions(task: Task) -> list[str]:
    """Return ways to ask for a task in words: a sentence where it is a shipped one, and its title."""
    source, _, target = task.name.partition("_")
    asked = [INSTRUCTIONS[task.name]] if task.name in INSTRUCTIONS else []
    if {source, target} <= set(LANGUAGES):
        asked = [f"Translate the {task.kind} from {LANGUAGES[source]} to {LANGUAGES[target]}."]
    return [*asked, f"{task.title}:"]


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt that ends in its answer.

    ``separators``: index of the last token of every separator, the query's last. ``outputs``: index of the last token
    of every shot's y. ``answer``: token ids of the query's answer, which are the last tokens of ``ids``.
    ``accepted``: token ids of every answer that counts as right.
    """

    ids: tuple[int, ...]
    separators: tuple[int, ...]
    outputs: tuple[int, ...]
    answer: tuple[int, ...]
    accepted: tuple[tuple[int, ...], ...]


def encode(tokenizer, shots, query, template: Template = ARROW) -> Prompt:
    """Tokenise ``shots`` (pairs) and ``query`` (a pair) as one text; no shots make a zero-shot prompt.

    Raises ValueError when the separator or an answer leaves no token of its own, TaskError when the tokenizer would
    take part of a pair for a special token.
    """
    text, separator_ends, output_ends = "", [], []
    for pair in (*shots, query):
        text += f"{template.between if text else template.opening}{template.before}{pair.x}{template.separator}"
        separator_ends.append(len(text))
        text += f" {pair.y}"
        output_ends.append(len(text))
    ids, ends = _read(tokenizer, text)
    try:
        separators = tuple(ends[end] for end in separator_ends)
        outputs = tuple(ends[end] for end in output_ends)
    except KeyError:
        raise ValueError(
            f"The tokenizer merges the separator {template.separator!r} or an answer with what follows in {text!r}: "
            "choose another separator."
        ) from None
    head, cut = ids[: separators[-1] + 1], separator_ends[-1]
    accepted = tuple(_answer(tokenizer, text[:cut], answer, len(head)) for answer in query.answers)
    return Prompt(tuple(ids), separators, outputs[:-1], tuple(ids[len(head) :]), accepted)


def _answer(tokenizer, head: str, answer: str, n_head: int) -> tuple[int, ...]:
    return tuple(_read(tokenizer, f"{head} {answer}")[0][n_head:])


def _read(tokenizer, text: str) -> tuple[list[int], dict[int, int]]:
    """Return the ids of a text and {end of a token: its index}.

    What the tokenizer adds itself spans no text; what it appends (EOS) is left out. Raises TaskError for a special
    token in the text.
    """
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special = _special(tokenizer)
    for index, (start, end) in zip(ids, offsets, strict=True):
        if index in special and end > start:
            token = tokenizer.convert_ids_to_tokens(index)
            raise TaskError(f"The tokenizer reads {text[start:end]!r} as its special token {token}: leave that out.")
    ends = {end: index for index, (start, end) in enumerate(offsets) if end > start}
    return ids[: max(ends.values()) + 1], ends


@functools.cache
def _special(tokenizer) -> frozenset[int]:
    """Return the ids of the tokens that control a model rather than stand for text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def opening(tokenizer) -> list[int]:
    """Return the tokens with which the tokenizer begins every text: BOS, or none."""
    ids, ends = _read(tokenizer, "a")
    return ids[: min(ends.values())]


def begin(tokenizer, rows):
    """Begin rows of running text [n, tokens] as the tokenizer begins a prompt, and return them.

    Its BOS takes the place of each row's first token; without a BOS, that token stays. In both cases it is the first
    position of the model's context, which is unlike all others, and no SAE is to learn it.
    """
    start = opening(tokenizer)
    rows[:, : len(start)] = start
    return rows


def zero_shot(tokenizer, pairs, template: Template = ARROW) -> list[Prompt]:
    """Return one prompt ``x ->`` (with its answer) per pair."""
    return [encode(tokenizer, (), pair, template) for pair in pairs]


def dummy_shot(tokenizer, pairs, template: Template = ARROW) -> list[Prompt]:
    """Return one prompt ``X -> Y``, ``x ->`` (with its answer) per pair: a shot without content."""
    return [encode(tokenizer, (DUMMY,), pair, template) for pair in pairs]


def few_shot(
    tokenizer, pool, queries, n_shots: int, seed: int, template: Template = ARROW, shuffle_labels: bool = False
) -> list[Prompt]:
    """Return one prompt per query, each with ``n_shots`` shots drawn from ``pool`` without the query.

    ``shuffle_labels``: the shots of a prompt swap their answers (see `shuffled`); which they are stays the same.
    """
    rng, mixing = random.Random(seed), random.Random(f"{seed} labels")
    prompts = []
    for query in queries:
        others = [pair for pair in pool if pair.x != query.x]
        shots = rng.sample(others, min(n_shots, len(others)))
        prompts.append(encode(tokenizer, shuffled(shots, mixing) if shuffle_labels else shots, query, template))
    return prompts


def offered(pairs, n: int = 3) -> list[Pair]:
    """Give every input ``n`` answers to choose from, behind it in a random order: its own and wrong ones of others.

    Fewer where the pairs have no ``n`` answers that differ. What is offered depends on the pairs alone.
    """
    found = []
    for pair in pairs:
        rng = random.Random(pair.x)
        wrong = sorted({other.y for other in pairs} - set(pair.answers))
        options = [pair.y, *rng.sample(wrong, min(n - 1, len(wrong)))]
        rng.shuffle(options)
        found.append(Pair(f"{pair.x} ({', '.join(options)})", pair.y, pair.answers))
    return found


def plain(tokenizer, texts) -> list[Prompt]:
    """Return one prompt per text, without a separator: all of it is the answer but the first token, BOS or the text's.

    Raises TaskError as `encode` does.
    """
    read = [tuple(_read(tokenizer, text)[0]) for text in texts]
    return [Prompt(ids, (), (), ids[1:], (ids[1:],)) for ids in read]


def led(tokenizer, prompt: Prompt, text: str) -> Prompt:
    """Return a prompt behind some ``text``, to be read as one.

    Raises TaskError as `encode` does.
    """
    lead = _read(tokenizer, text)[0] if text else opening(tokenizer)
    begins = len(opening(tokenizer))  # of the prompt, which now stands in the middle
    moved = len(lead) - begins
    return Prompt(
        (*lead, *prompt.ids[begins:]), tuple(i + moved for i in prompt.separators),
        tuple(i + moved for i in prompt.outputs), prompt.answer, prompt.accepted,
    )  # fmt: skip


def shuffled(pairs, rng: random.Random) -> tuple[Pair, ...]:
    """Give every pair the answers of the next one in a random order: of two and more, none keeps its own."""
    order = rng.sample(range(len(pairs)), len(pairs))
    answers = {i: pairs[j] for i, j in zip(order, order[1:] + order[:1], strict=True)}
    return tuple(Pair(pair.x, answers[i].y, answers[i].answers) for i, pair in enumerate(pairs))


# A chat in words: a base model knows no tokens for turns.
TRANSCRIPT = Template("\nAssistant:", before="User: ")


def ended(tokenizer, prompts) -> list[Prompt]:
    """Return prompts whose answers end with the tokenizer's end of text, the last of their tokens."""
    end = (tokenizer.eos_token_id,)
    return [
        Prompt(p.ids + end, p.separators, p.outputs, p.answer + end, tuple(answer + end for answer in p.accepted))
        for p in prompts
    ]


@dataclass(frozen=True)
class Case:
    """What one vector of Hendel et al. (2023) is made of and tried on: all drawn for one query.

    ``demonstrations`` are shown; after them stand ``dummies``, one at a time, in place of the ``query``.
    """

    demonstrations: tuple[Pair, ...]
    dummies: tuple[Pair, ...]
    query: Pair

    def shown(self, tokenizer, query: Pair | None = None, template: Template = ARROW) -> Prompt:
        """Return the few-shot prompt of the case: its demonstrations, then its query (or another)."""
        return encode(tokenizer, self.demonstrations, query or self.query, template)


def cases(pool, queries, n_shots: int, n_dummies: int, seed: int) -> list[Case]:
    """Draw one case per query from ``pool``, without the query; no dummy is a demonstration.

    (In the authors' code one may be, and its answer can then be copied.) Raises ValueError if the pool is too small.
    """
    rng, drawn = random.Random(seed), []
    for query in queries:
        others = [pair for pair in pool if pair.x != query.x]
        if len(others) < n_shots + n_dummies:
            raise ValueError(f"{n_shots} demonstrations and {n_dummies} dummies are more than {len(others)} pairs.")
        some = tuple(rng.sample(others, n_shots + n_dummies))
        drawn.append(Case(some[:n_shots], some[n_shots:], query))
    return drawn


TOKENS = ("separator", "output", "separators", "outputs", "every", "generated")


def positions(prompt: Prompt, tokens: str) -> tuple[int, ...]:
    """Return the indices of the tokens that a name of `TOKENS` stands for, in order.

    "separator" is the query's, "output" the last token of the last shot's y; "separators" and "outputs" are all of
    them. "every": all but the first, which is unlike any other (BOS, or without one the sink of attention).
    "generated": the answer's tokens and, before them, the query's separator, which says the first of them.
    Raises ValueError for any other name.
    """
    last = prompt.separators[-1:]  # a plain text has none
    found = {
        "separator": last, "output": prompt.outputs[-1:], "separators": prompt.separators,
        "outputs": prompt.outputs, "every": tuple(range(1, len(prompt.ids))),
        "generated": tuple(range(*last, len(prompt.ids))) if last else (),
    }  # fmt: skip
    if tokens not in found:
        raise ValueError(f"Tokens are one of {', '.join(TOKENS)}, not {tokens!r}.")
    return found[tokens]


def token_types(prompt: Prompt) -> list[str | None]:
    """Say of every token what it belongs to: "input", "arrow", "output" or "newline"; None where to no pair shown.

    That is the answer, and the first token (BOS, or without one the sink of attention). An arrow is the separator's
    last token; where a separator or a line break has several, the others count to what precedes them.
    """
    kinds: list[str | None] = ["input"] * (len(prompt.ids) - len(prompt.answer)) + [None] * len(prompt.answer)
    for start, end in zip(prompt.separators, prompt.outputs, strict=False):  # the query has no output
        kinds[start + 1 : end + 1] = ["output"] * (end - start)
        kinds[end + 1] = "newline"
    for separator in prompt.separators:
        kinds[separator] = "arrow"
    kinds[0] = None
    return kinds


# Ordinary text, in which a vector is added to see what it does where there is no task

NEUTRAL = DATA / "text/neutral.json"
# What prose has in the place of an arrow: a colon, a dash, a sign between two words. A hyphen inside a word is none.
SEPARATOR_LIKE = re.compile(r"->|[=|–—]|--|(?<=\s)-(?=\s)|:(?=\s)")
BEFORE = 16  # least number of tokens before a steered one: the model needs a context to predict from


@dataclass(frozen=True)
class Passage:
    """Some sentences of ordinary text, and the package they come from."""

    text: str
    source: str


def passages(path: str | Path = NEUTRAL) -> tuple[Passage, ...]:
    """Read the passages of a file that `workflow.build_passages` has written."""
    return tuple(Passage(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["passages"])


def at_separators(tokenizer, passages, following: int = 16, seed: int = 0) -> list[Prompt]:
    """Return one prompt per passage, steered at a token that ends as `SEPARATOR_LIKE` does, drawn by ``seed``.

    Its answer is the ``following`` tokens; its separators are all such tokens up to the steered one. A passage without
    such a token, far enough from its ends, is left out.
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
        spots, ends = range(1, len(ids) - following), encoded["offset_mapping"]
        spots = [i for i in spots if (ends[i][1] in marks) == like and ends[i][1] != ends[i + 1][1]]
        if far := [i for i in spots if i >= BEFORE]:
            at = rng.choice(far)
            answer, alike = tuple(ids[at + 1 : at + 1 + following]), tuple(i for i in spots if i <= at)
            made.append(Prompt(tuple(ids[: at + 1]) + answer, alike if like else (at,), (), answer, (answer,)))
    return made
