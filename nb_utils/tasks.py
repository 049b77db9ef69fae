"""Tasks: pairs (x, y) read from JSON, JSONL, CSV or TSV files, and their disjoint splits."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nb_utils.files import DATA
from nb_utils.text import slug, visible

FOLDERS = {"word": DATA / "tasks", "sentence": DATA / "sentences", "behaviour": DATA / "behaviour"}
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
DELIMITERS = {".csv": (",", "comma"), ".tsv": ("\t", "tab")}
# What files call an input and its answer, our own name first, and a list of rows that stands among other things.
INPUTS = ("input", "inputs", "question", "query", "source", "x", "prompt", "text")
OUTPUTS = ("output", "outputs", "answer", "answers", "target", "targets", "y", "completion", "label")
HOLDERS = ("pairs", "rows", "data", "examples", "train", "validation", "test")
SPACES, CONTROLS = re.compile(r"[ \t\r\n]*"), re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# A prompt of 16 shots and its query need 17 different pairs; below 20 no bucket of a split holds even three.
MIN_PAIRS = 20
# The smallest bucket that still gives a query and two shots.
MIN_BUCKET = 3
# A title stands above figures and in the list of pages.
MAX_TITLE = 120  # characters
# vector: task vectors are averaged over it; train: cleaning; validation: choices; test: reported numbers.
SIZES = {"vector": 0.35, "train": 0.20, "validation": 0.15, "test": 0.30}

# Exchanges, questions and answers by topic, and how these are cut: what is shown, trained on, chosen by, reported.
EXCHANGES = DATA / "exchanges"
TOPIC_SIZES = {"vector": 0.15, "train": 0.45, "validation": 0.15, "test": 0.25}
MIN_TOPICS = 8  # then no bucket of theirs is empty
ITSELF = "itself"  # the topic of questions about who answers


class TaskError(ValueError):
    """A task that does not exist or a task file that cannot be used; the message is one line and says what to mend."""

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


@dataclass(frozen=True)
class Pair:
    """One input and its accepted answers; `y` is the first of them, the one losses are computed on."""

    x: str
    y: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A named set of pairs with where they come from; `kind` is "word", "sentence" or "behaviour".

    A behaviour is a way to say things, and its pairs are texts without and with it: ``markers`` are words that show it,
    ``opposed`` those that show the contrary, ``elsewhere`` pairs of another source, only to be tested on.

    Entries of a file that repeat an earlier input are merged into it: ``copies`` say nothing new and are dropped,
    ``joined`` have other answers, which are accepted too, after those before them.
    """

    name: str
    title: str
    pairs: tuple[Pair, ...]
    licence: str
    origin: str
    kind: str
    category: str
    copies: int = 0
    joined: int = 0
    markers: tuple[str, ...] = ()
    opposed: tuple[str, ...] = ()
    elsewhere: tuple[Pair, ...] = ()

    @property
    def merged(self) -> str:
        """Say in a sentence what was merged; empty where nothing was."""
        parts = [f"{self.copies} cop{'y' if self.copies == 1 else 'ies'}, dropped"] * bool(self.copies)
        parts += [f"{self.joined} with other answers, accepted too"] * bool(self.joined)
        return f"Entries that repeat an earlier input: {'; '.join(parts)}." if parts else ""


@dataclass(frozen=True)
class Splits:
    """Four disjoint buckets of a task's pairs, each in the order of their hashes."""

    vector: tuple[Pair, ...]
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


@dataclass(frozen=True)
class Exchanges:
    """Questions with answers, all of them as a `task`; ``splits`` cuts them by topic: no topic is in two buckets.

    ``itself``: the questions about who answers, which are no topic of the others; cut question by question. All
    buckets are empty where there are none. ``topics``: that of every other pair.
    """

    task: Task
    splits: Splits
    itself: Splits
    topics: dict[Pair, str]


def names(kind: str = "word") -> list[str]:
    """List the shipped tasks of a kind ("word", "sentence" or "behaviour") in alphabetical order."""
    return sorted(path.stem for path in FOLDERS[kind].glob("*.json"))


def load(name_or_path: str | Path, kind: str = "word") -> Task:
    """Read a task by the name of a shipped one, or by the path of a file: with a slash or one of `SUFFIXES`.

    JSON is a dict {x: y}, or rows {"input": x, "output": y} or [x, y], or two columns "input" and "output" of equal
    length. `INPUTS` and `OUTPUTS` are what the two may be called. Rows and columns may stand as "pairs" (or one of
    `HOLDERS`) beside "name", "title", "category", "kind", "licence" and "origin" (each optional). JSONL is one row a
    line. CSV and TSV name their columns in the first line. A file of kind "behaviour" has "markers" besides, and may
    have "opposed" and "elsewhere" (see `Task`).

    An output may be a list of accepted answers, the preferred one first. A number is taken as it is written. Spaces
    around inputs and answers are dropped, and entries of one input are merged (see `Task`).
    The name of a task that is not shipped is made safe and gains a hash of its file, so that it can name results (see
    `nb_utils.text.slug`).

    Raises TaskError, naming the file and the entry, if there is no such task or the file cannot be used.
    """
    text = str(name_or_path)
    if kind not in FOLDERS:
        raise TaskError(f"There is no kind {kind!r} of task: use one of {', '.join(FOLDERS)}.")
    if not _is_path(text):
        if text not in names(kind):
            close = difflib.get_close_matches(text, names(kind), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TaskError(
                f"There is no task {text!r}.{hint} Shipped are: {', '.join(names(kind))}; "
                f"a file of your own is given by its path, ending in {', '.join(SUFFIXES)}."
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
    if _is_path(name_or_path):
        found = {"word": Path(name_or_path)}
    else:
        found = {kind: folder / f"{name_or_path}.json" for kind, folder in FOLDERS.items()}
    return {kind: path for kind, path in found.items() if path.is_file()}


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.casefold().endswith(SUFFIXES)


def parse(text: str, separator: str = "->") -> Task:
    """Read a task from text: one ``x -> y`` on a line, or the JSON or JSONL of a task file.

    Raises TaskError, naming the line or the entry, if the text cannot be used.
    """
    where = "the pasted text"
    if text.lstrip().startswith(("{", "[")):
        return _task(where, where, _json(where, text))
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        x, found, y = line.partition(separator)
        if line.strip() and not found:
            raise TaskError(f"{where}, line {number} has no separator: write it as x {separator} y.")
        if line.strip():
            rows.append((x.strip(), y.strip()))
    return _task(where, where, rows)


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


def exchanges(name_or_path: str | Path = "assistant") -> Exchanges:
    """Read questions and answers by topic: a shipped set by its name, or a file of the user's own by its path.

    The file is one of `load` whose rows have a "topic" beside the question and the answer. Raises TaskError, naming
    the file and the entry, as `load` does, and where there is no topic or too few of them.
    """
    path = exchanges_file(name_or_path)
    if not path.is_file() and not _is_path(str(name_or_path)):
        shipped = ", ".join(sorted(path.stem for path in EXCHANGES.glob("*.json")))
        raise TaskError(
            f"There are no exchanges {str(name_or_path)!r}. Shipped are: {shipped}; a file of your own is given by its "
            "path, ending in .json."
        )
    task = _read(path)
    task = task if path.resolve().parent == EXCHANGES else _identified(task, path)
    rows = _entries(path)
    topics: dict[str, list[Pair]] = {}
    pair_of = {pair.x: pair for pair in task.pairs}
    for number, row in enumerate(rows, start=1):
        entry = f"{path}, entry {number}"
        question, _ = row if isinstance(row, tuple) else _row(entry, row)
        topic = _text(_topic(row), f"{entry} (input {_what(question)}): the topic")
        if (pair := pair_of.pop(str(question).strip(), None)) is not None:  # an entry that repeats one is merged
            topics.setdefault(topic, []).append(pair)
    itself = [[pair] for pair in topics.pop(ITSELF, [])]
    ranked = [topics[topic] for topic in sorted(topics, key=_digest)]
    if len(ranked) < MIN_TOPICS or 0 < len(itself) < MIN_TOPICS:
        few, what = (ranked, "topics") if len(ranked) < MIN_TOPICS else (itself, f"questions of topic {ITSELF!r}")
        raise TaskError(f"{path} has {len(few)} {what} and needs {MIN_TOPICS}, so that each part has some of its own.")
    if (size := min(map(len, ranked))) < MIN_BUCKET:
        topic = next(topic for topic in topics if len(topics[topic]) == size)
        raise TaskError(f"{path} has {size} of topic {_what(topic)} and needs {MIN_BUCKET} of each topic.")
    own = sorted(itself, key=lambda group: _digest(group[0].x))
    return Exchanges(task, _cut(ranked), _cut(own), {pair: topic for topic in topics for pair in topics[topic]})


def has_topics(name_or_path: str | Path) -> bool:
    """Say whether a file of the user's own is one of `exchanges`: whether a row of it has a topic.

    Raises TaskError as `load` does.
    """
    if not _is_path(str(name_or_path)):
        return False
    _read(Path(name_or_path))
    return any(_topic(row) is not None for row in _entries(Path(name_or_path)))


def _topic(row: object) -> object:
    return dict(row.entries).get("topic") if isinstance(row, _Entries) else None


def _entries(path: Path) -> list:
    """Return the rows of a file that `_read` has read, as they stand there."""
    where, text, mark = str(path), path.read_text(encoding="utf-8-sig"), DELIMITERS.get(path.suffix.casefold())
    return _rows(where, _table(where, text, *mark) if mark else _json(where, text))[1]


def exchanges_file(name_or_path: str | Path) -> Path:
    """Return the file that exchanges given by name or path are read from, whether it is there or not."""
    text = str(name_or_path)
    return Path(text) if _is_path(text) else EXCHANGES / f"{text}.json"


def _cut(groups: list[list[Pair]]) -> Splits:
    """Cut groups of pairs, in their order, at the fractions `TOPIC_SIZES`."""
    ends = [round(end * len(groups)) for end in itertools.accumulate(TOPIC_SIZES.values())]
    parts = [groups[start:end] for start, end in itertools.pairwise([0, *ends])]
    return Splits(*(tuple(itertools.chain(*part)) for part in parts))


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
    where = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise TaskError(
            f"There is no file {where}: give the path of a task file, or one of {', '.join(names())}."
        ) from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise TaskError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    mark = DELIMITERS.get(path.suffix.casefold())
    return _task(where, path.stem, _table(where, text, *mark) if mark else _json(where, text))


class _Entries:
    """A JSON object with its entries in order, repeated keys kept: a dict would hide a duplicate input."""

    def __init__(self, entries: list[tuple[str, object]]):
        self.entries = entries


class _Number(str):
    """A number of a JSON file, as it is written there."""


DECODER = json.JSONDecoder(object_pairs_hook=_Entries, parse_int=_Number, parse_float=_Number)


def _json(where: str, text: str) -> object:
    """Read JSON; several values, each on lines of its own, are JSONL and read as a list."""
    values, at = [], SPACES.match(text).end()
    try:
        while at < len(text) or not values:
            value, end = DECODER.raw_decode(text, at)
            values.append(value)
            at = SPACES.match(text, end).end()
            if at < len(text) and "\n" not in text[end:at]:
                raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno} "
            f"(files of other kinds end in {', '.join(DELIMITERS)})."
        ) from None
    except RecursionError:
        raise TaskError(f"{where} is nested too deeply to be a task.") from None
    return values if len(values) > 1 else values[0]


def _table(where: str, text: str, delimiter: str, called: str) -> list[_Entries]:
    """Read CSV (also with semicolons) or TSV, whose first line names the columns."""
    first = text.partition("\n")[0]
    if delimiter not in first and ";" in first:
        delimiter, called = ";", "semicolon"
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if line]
    except csv.Error as error:
        raise TaskError(f"{where} cannot be read as a table: {error}.") from None
    if not lines or not _columns(lines[0]):
        found = _listed(lines[0]) if lines else "nothing"
        raise TaskError(
            f"{where} must name its columns in the first line, input and output with a {called} between them, and "
            f"there is {found}."
        )
    return _headed(where, lines[0], lines[1:])


def _headed(where: str, header: list, rows: list) -> list:
    """Return the rows of a table as objects with the header's keys."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != len(header):
            raise TaskError(
                f"{where}, entry {number} has other columns than the {len(header)} that the header names (in a file "
                f"of text, a field that holds the separator stands in double quotes): {_what(row)}."
            )
    return [_Entries(list(zip(header, row, strict=True))) for row in rows]


def _task(where: str, stem: str, record: object) -> Task:
    fields, rows = _rows(where, record)
    pairs, copies, joined = _pairs(where, rows)
    defaults = {
        "name": stem,
        "title": stem.replace("_", " ").capitalize(),
        "licence": "not stated",
        "origin": f"the user's file {Path(where).name}",
        "kind": "word",
        "category": "own",
    }
    for field, default in defaults.items():
        value = fields.get(field, default)
        if type(value) is not str or not value.strip():
            raise TaskError(f"{where}: {field!r} must be a non-empty string, not {_what(value)}.")
        defaults[field] = _text(value, f"{where}: {field!r}")
    if defaults["kind"] not in FOLDERS:
        raise TaskError(f"{where}: 'kind' must be one of {', '.join(FOLDERS)}, not {defaults['kind']!r}.")
    shown = _shown(where, fields) if defaults["kind"] == "behaviour" else {}
    return Task(pairs=pairs, copies=copies, joined=joined, **defaults, **shown)


def _shown(where: str, fields: dict) -> dict:
    """Return what a behaviour has beside its pairs: the words that show it or the contrary, and pairs elsewhere."""
    if not fields.get("markers"):
        raise TaskError(f"{where} is of a behaviour and names no words that show it: list some as 'markers'.")
    found = {}
    for field in ("markers", "opposed"):
        words = fields.get(field, [])
        if not isinstance(words, list) or any(not isinstance(word, str) or word.split() != [word] for word in words):
            raise TaskError(f"{where}: {field!r} must be a list of single words, not {_what(words)}.")
        found[field] = tuple(dict.fromkeys(words))
    if both := set(found["markers"]) & set(found["opposed"]):
        raise TaskError(f"{where}: {_what(min(both))} cannot be in 'markers' and in 'opposed': keep it in one.")
    rows = fields.get("elsewhere", [])
    if not isinstance(rows, list):
        raise TaskError(f"{where}: 'elsewhere' must be a list of pairs, not {_what(rows)}.")
    return found | {"elsewhere": _pairs(f"{where}, 'elsewhere'", rows, least=0)[0]}


def _rows(where: str, record: object) -> tuple[dict, list]:
    """Return the fields beside the rows, where a file has any, and the rows: (x, y), or what `_row` reads.

    A dict of 20 entries may be {x: y}; with fewer it is no task, so its keys can be those of a holder or of columns.
    Objects and lists of lists are no answers: only a key that holds some is taken for a holder.
    """
    fields = {}
    while isinstance(record, _Entries) and len(record.entries) < MIN_PAIRS:
        found = dict(record.entries)
        held = [key for key in HOLDERS if _nested(found.get(key))]
        if len(held) > 1 and held[0] != "pairs":
            raise TaskError(f"{where} holds rows as {_listed(held)}: keep those of one.")
        if not held:
            record = _zipped(where, record)
            break
        fields, record = found, found[held[0]]
        if isinstance(record, list) and _columns(header := found.get("columns")):
            record = _headed(where, header, record)
    record = record.entries if isinstance(record, _Entries) else record
    if not isinstance(record, list):
        raise TaskError(
            f'{where} must hold a dict {{x: y}} or a list of {{"input": x, "output": y}}, not {_what(record)}.'
        )
    return fields, record


def _nested(value: object) -> bool:
    """Tell whether a value holds rows."""
    inner = value if isinstance(value, list) else [value]
    return any(isinstance(row, _Entries) or (isinstance(row, list) and row is not value) for row in inner)


def _zipped(where: str, record: _Entries) -> list[tuple]:
    """Turn two columns, each a list or an object of one value a row, into rows; return {x: y} as it is."""
    found = {
        key: [each for _, each in value.entries] if isinstance(value, _Entries) else value
        for key, value in record.entries
    }
    keys = _columns(found)
    if keys and all(isinstance(found[key], list) for key in keys):
        x, y = (found[key] for key in keys)
        if len(x) == len(y):
            return list(zip(x, y, strict=True))
        raise TaskError(f"{where} has {len(x)} of {keys[0]!r} and {len(y)} of {keys[1]!r}: give one for each.")
    if any(_nested(value) or (isinstance(value, list) and len(value) >= MIN_PAIRS) for _, value in record.entries):
        raise TaskError(
            f'{where} holds lists or objects as {_listed(found)}: call two that are columns "input" and "output", or a '
            f'list of pairs "{HOLDERS[0]}".'
        )
    return record.entries


def _columns(keys: object) -> tuple[str, str] | None:
    """Find the key of an input and that of its answer; None where one is missing or there are several."""
    texts = [key for key in keys if isinstance(key, str)] if isinstance(keys, dict | list) else []
    found = []
    for known in (INPUTS, OUTPUTS):
        alike = [key for key in texts if key == known[0]]
        found.append(alike or [key for key in texts if key.strip().casefold() in known])
    return (found[0][0], found[1][0]) if list(map(len, found)) == [1, 1] else None


def _pairs(where: str, rows: list, least: int = MIN_PAIRS) -> tuple[tuple[Pair, ...], int, int]:
    """Return the pairs, each input once with all its answers, and how many entries were `copies` and `joined`."""
    accepted: dict[str, dict[str, None]] = {}
    copies = joined = 0
    for number, row in enumerate(rows, start=1):
        x, output = row if isinstance(row, tuple) else _row(f"{where}, entry {number}", row)
        entry = f"{where}, entry {number} (input {_what(x)})"
        x = _text(x, f"{entry}: the input")
        if isinstance(output, list) and not output:
            raise TaskError(f"{entry}: the list of accepted answers is empty.")
        answers = [_text(y, f"{entry}: the answer") for y in (output if isinstance(output, list) else [output])]
        before = len(known := accepted.setdefault(x, {}))
        known.update(dict.fromkeys(answers))
        copies += len(known) == before
        joined += 0 < before < len(known)
    if len(accepted) < least:
        raise TaskError(
            f"{where} holds {len(accepted)} pairs{' of different inputs' * bool(copies + joined)} and a task needs "
            f"{least}: 16 examples of a prompt, its query, and something left over to test on."
        )
    return tuple(Pair(x, next(iter(known)), tuple(known)) for x, known in accepted.items()), copies, joined


def _row(entry: str, row: object) -> tuple[object, object]:
    """Return the input and the answer of an object or of a list of two."""
    if isinstance(row, list) and len(row) == 2:
        if _columns(row):
            raise TaskError(f"{entry} looks like the names of the columns, not like a pair: leave it out.")
        return tuple(row)
    found = dict(row.entries) if isinstance(row, _Entries) else {}
    if isinstance(found.get("row"), _Entries):  # rows as the hub's viewer gives them
        row = found["row"]
        found = dict(row.entries)
    if keys := _columns([key for key, _ in row.entries] if isinstance(row, _Entries) else None):
        return found[keys[0]], found[keys[1]]
    raise TaskError(f'{entry}: expected {{"input": x, "output": y}} or [x, y], found {_what(row)}.')


def _text(value: object, subject: str) -> str:
    """Return a usable string without the spaces around it; prompts put one pair on a line."""
    if not isinstance(value, str) or not value.strip():
        hint = ": put it in quotes" if isinstance(value, bool) else ""
        raise TaskError(f"{subject} must be a non-empty string or a number, not {_what(value)}{hint}.")
    value = str(value).strip()
    if len(value.splitlines()) > 1:
        raise TaskError(f"{subject} must be one line, not {_what(value)}.")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise TaskError(
            f"{subject} holds half of a surrogate pair, which no tokenizer reads: {_what(value)}."
        )
    if CONTROLS.search(value):
        raise TaskError(f"{subject} holds a control character: {_what(value)}.")
    return value


def _what(value: object) -> str:
    """Name a JSON value briefly, for an error message."""
    if isinstance(value, _Entries):
        return f"an object with the keys {_listed([key for key, _ in value.entries])}" if value.entries else "{}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = str(value) if isinstance(value, _Number) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(keys) -> str:
    """Name the first few keys of an object, for an error message."""
    return ", ".join([*map(_what, list(keys)[:4]), *["..."] * (len(keys) > 4)])
