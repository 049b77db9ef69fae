"""Tasks: pairs (x, y) read from JSON files, and their disjoint splits."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from nb_utils.text import slug, visible

DATA = Path(__file__).resolve().parents[1] / "data"
FOLDERS = {"word": DATA / "tasks", "sentence": DATA / "sentences"}

# A prompt of 16 shots and its query need 17 different pairs; below 20 no bucket of a split holds even three.
MIN_PAIRS = 20
# The smallest bucket that still gives a query and two shots.
MIN_BUCKET = 3
# A title stands above figures and in the list of pages.
MAX_TITLE = 120  # characters
# vector: task vectors are averaged over it; train: cleaning; validation: choices; test: reported numbers.
SIZES = {"vector": 0.35, "train": 0.20, "validation": 0.15, "test": 0.30}


class TaskError(ValueError):
    """A task that does not exist or a task file that cannot be used; the message says what to mend."""


@dataclass(frozen=True)
class Pair:
    """One input and its accepted answers; `y` is the first of them, the one losses are computed on."""

    x: str
    y: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A named set of pairs with where they come from; `kind` is "word" or "sentence"."""

    name: str
    title: str
    pairs: tuple[Pair, ...]
    licence: str
    origin: str
    kind: str
    category: str


@dataclass(frozen=True)
class Splits:
    """Four disjoint buckets of a task's pairs, each in the order of their hashes."""

    vector: tuple[Pair, ...]
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


def names(kind: str = "word") -> list[str]:
    """List the shipped tasks of a kind ("word" or "sentence") in alphabetical order."""
    return sorted(path.stem for path in FOLDERS[kind].glob("*.json"))


def load(name_or_path: str | Path, kind: str = "word") -> Task:
    """Read a task by the name of a shipped one, or by the path of a JSON file.

    A file is a dict {x: y}, a list of {"input": x, "output": y}, or a dict with such a list as "pairs" beside
    "name", "title", "category", "kind", "licence" and "origin" (each optional). An output may be a list of
    accepted answers, the preferred one first. Spaces around inputs and answers are dropped. The name of a task that is
    not shipped is made safe and gains a hash of its file, so that it can name results (see `nb_utils.text.slug`).

    Raises TaskError, naming the file and the entry, if there is no such task or the file cannot be used.
    """
    text = str(name_or_path)
    if kind not in FOLDERS:
        raise TaskError(f"There is no kind {kind!r} of task: use one of {', '.join(FOLDERS)}.")
    if not text.endswith(".json") and "/" not in text and "\\" not in text:
        if text not in names(kind):
            close = difflib.get_close_matches(text, names(kind), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TaskError(
                f"There is no task {text!r}.{hint} Shipped are: {', '.join(names(kind))}; "
                "a file of your own is given by its path, ending in .json."
            )
        return _read(FOLDERS[kind] / f"{text}.json")
    return _identified(_read(Path(text)), Path(text))


def _identified(task: Task, path: Path) -> Task:
    """Name a task of a user's file by what the file holds: no other file, and no shipped task, has that name."""
    if len(title := visible(task.title)) > MAX_TITLE:
        raise TaskError(
            f"{path}: its title has {len(title)} characters and {MAX_TITLE} are the most: give it a shorter 'title'."
        )
    shipped = path.resolve().parent == FOLDERS[task.kind]
    return replace(task, title=title, name=task.name if shipped else slug(task.name, path.read_bytes()))


def files(name_or_path: str) -> dict[str, Path]:
    """Return the files that a task given by name or path is read from, by kind; none where there is no such file."""
    if name_or_path.endswith(".json"):
        found = {"word": Path(name_or_path)}
    else:
        found = {kind: folder / f"{name_or_path}.json" for kind, folder in FOLDERS.items()}
    return {kind: path for kind, path in found.items() if path.is_file()}


def parse(text: str, separator: str = "->") -> Task:
    """Read a task from text: one ``x -> y`` on a line, or the JSON of a task file.

    Raises TaskError, naming the line or the entry, if the text cannot be used.
    """
    path = Path("the pasted text")
    if text.lstrip().startswith(("{", "[")):
        return _task(path, _record(path, text.encode("utf-8", "surrogatepass")))
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        x, found, y = line.partition(separator)
        if line.strip() and not found:
            raise TaskError(f"{path}, line {number} has no separator: write it as x {separator} y.")
        if line.strip():
            rows.append((x.strip(), y.strip()))
    return _task(path, rows)


def split(task: Task, sizes: dict[str, float] = SIZES) -> Splits:
    """Cut a task into four disjoint buckets by hash ranking; `sizes` are fractions, summing to 1.

    The pairs are sorted by a hash of their text and cut at the fixed fractions, so neither the order of the
    file nor other tasks matter, and a small task fills its buckets in proportion. The price: adding pairs may
    move the few pairs next to a cut (a threshold on each hash alone would move none, but leaves the buckets
    of a small task to chance). Pairs linked by a reversal (hot -> cold, cold -> hot) share a bucket, else one
    would give the other away.

    Raises TaskError naming the bucket that would hold fewer than `MIN_BUCKET` pairs.
    """
    if list(sizes) != list(SIZES) or min(sizes.values()) <= 0 or abs(sum(sizes.values()) - 1) > 1e-9:
        raise TaskError(
            f"Split sizes must be positive fractions of {', '.join(SIZES)} that sum to 1, not {sizes}."
        )
    ends, total = [], 0.0
    for fraction in sizes.values():
        total += fraction
        ends.append(total * len(task.pairs))
    groups = _reversal_groups(task.pairs)
    buckets: list[list[Pair]] = [[] for _ in sizes]
    placed = 0
    for group in groups:
        # A group lies where its middle falls: it crosses no cut.
        middle = placed + len(group) / 2
        bucket = next(i for i, end in enumerate(ends) if middle <= end + 1e-9 or i == len(ends) - 1)
        buckets[bucket].extend(group)
        placed += len(group)
    for name, bucket in zip(sizes, buckets, strict=True):
        if len(bucket) < MIN_BUCKET:
            enough = math.ceil((MIN_BUCKET + max(map(len, groups)) - 1) / min(sizes.values()) - 1e-9)
            raise TaskError(
                f"The {name} bucket of task {task.name!r} would hold {len(bucket)} of its {len(task.pairs)} "
                f"pairs and needs {MIN_BUCKET}: a task of {enough} pairs fills every bucket "
                "(pairs that reverse each other stay together)."
            )
    return Splits(*(tuple(bucket) for bucket in buckets))


def _reversal_groups(pairs: tuple[Pair, ...]) -> list[list[Pair]]:
    """Group pairs that answer each other; sort the groups by the least hash of their inputs."""
    key = {pair: pair.x.casefold() for pair in pairs}
    answers = {}
    for pair in pairs:
        answers.setdefault(key[pair], set()).update(answer.casefold() for answer in pair.answers)
    parent = {text: text for text in answers}

    def root(text: str) -> str:
        while parent[text] != text:
            text = parent[text]
        return text

    for text, accepted in answers.items():
        for answer in sorted(accepted):
            if text in answers.get(answer, ()):
                first, second = sorted((root(text), root(answer)))
                parent[second] = first
    groups = {}
    for pair in sorted(pairs, key=lambda pair: (_digest(key[pair]), _digest(pair.x))):
        groups.setdefault(root(key[pair]), []).append(pair)
    return list(groups.values())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> Task:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise TaskError(
            f"There is no file {path}: give the path of a JSON file, or one of {', '.join(names())}."
        ) from None
    except (OSError, ValueError) as error:
        raise TaskError(
            f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    return _task(path, _record(path, data))


def _record(path: Path, data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_Entries)
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except (RecursionError, ValueError):
        raise TaskError(f"{path} is nested too deeply or holds a number too long to be a task.") from None


def _task(path: Path, record: object) -> Task:
    fields, rows = {}, record
    if isinstance(record, _Entries):
        fields, rows = dict(record.entries), record.entries
        # Objects under "pairs" make it our own format; else "pairs" is an input of {x: y} like any other.
        if isinstance(pairs := fields.pop("pairs", None), list) and any(
            isinstance(row, _Entries) for row in pairs
        ):
            rows = pairs
        else:
            fields = {}
    if not isinstance(rows, list):
        raise TaskError(
            f'{path} must hold a dict {{x: y}} or a list of {{"input": x, "output": y}}, not {_what(rows)}.'
        )
    pairs = _pairs(path, rows)
    defaults = {
        "name": path.stem,
        "title": path.stem.replace("_", " ").capitalize(),
        "licence": "not stated",
        "origin": f"the user's file {path.name}",
        "kind": "word",
        "category": "own",
    }
    for field, default in defaults.items():
        value = fields.get(field, default)
        if not isinstance(value, str) or not value.strip():
            raise TaskError(f"{path}: {field!r} must be a non-empty string, not {_what(value)}.")
        defaults[field] = value.strip()
    if defaults["kind"] not in FOLDERS:
        raise TaskError(f"{path}: 'kind' must be one of {', '.join(FOLDERS)}, not {defaults['kind']!r}.")
    return Task(pairs=pairs, **defaults)


class _Entries:
    """A JSON object with its entries in order, repeated keys kept: a dict would hide a duplicate input."""

    def __init__(self, entries: list[tuple[str, object]]):
        self.entries = entries


def _pairs(path: Path, rows: list) -> tuple[Pair, ...]:
    pairs, where_is = [], {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, tuple):
            x, output = row
        else:
            entry = dict(row.entries) if isinstance(row, _Entries) else {}
            if not {"input", "output"} <= set(entry):
                raise TaskError(
                    f'{path}, entry {number}: expected {{"input": x, "output": y}}, found {_what(row)}.'
                )
            x, output = entry["input"], entry["output"]
        where = f"{path}, entry {number} (input {_what(x)})"
        x = _text(x, f"{where}: the input")
        if isinstance(output, list) and not output:
            raise TaskError(f"{where}: the list of accepted answers is empty.")
        accepted = output if isinstance(output, list) else [output]
        answers = tuple(dict.fromkeys(_text(answer, f"{where}: the answer") for answer in accepted))
        if x in where_is:
            raise TaskError(
                f"{where} repeats the input of entry {where_is[x]}: keep one, with all its answers in a list."
            )
        where_is[x] = number
        pairs.append(Pair(x, answers[0], answers))
    if len(pairs) < MIN_PAIRS:
        raise TaskError(
            f"{path} holds {len(pairs)} pairs and a task needs {MIN_PAIRS}: "
            "16 examples of a prompt, its query, and something left over to test on."
        )
    return tuple(pairs)


def _text(value: object, subject: str) -> str:
    """Return a usable string without the spaces around it; prompts put one pair on a line."""
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{subject} must be a non-empty string, not {_what(value)}.")
    value = value.strip()
    if len(value.splitlines()) > 1:
        raise TaskError(f"{subject} must be one line, not {_what(value)}.")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise TaskError(
            f"{subject} holds half of a surrogate pair, which no tokenizer reads: {_what(value)}."
        )
    return value


def _what(value: object) -> str:
    """Name a JSON value briefly, for an error message."""
    if isinstance(value, _Entries):
        return f"an object with {len(value.entries)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
