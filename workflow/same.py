"""Same rows: a sample run with older code and with today's, and the record of experiments in which nothing changed.

    python -m workflow.same --since 8978ffd --experiments 2,4

Tables carry the hash of the code that made them, and whatever changes that hash makes all of them stale. Where a change
leaves the numbers alone, the record says so: of this experiment, that code gives the rows of this one. `workflow.stale`
and the Snakefile go by it. The sample is one small task (`sample.yaml`), so it says nothing of what only other tasks,
models, sizes or devices meet.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from nb_utils import files
from nb_utils.record import tables
from nb_utils.record.tables import ROOT
from nb_utils.text import print_anything, visible

RECORD, SETTINGS = ROOT / "results/same.json", ROOT / "workflow/sample.yaml"
PARTS = ("experiment", "from", "to", "model", "task", "settings", "rows", "seal")
# Both read these where they are today, so that code is all that differs: tables carry their hashes, too.
READ = ("data", "saes")
CODE = (".", *(f":(exclude){part}" for part in (*READ, "results")))
HASHES = """import json, sys
from nb_utils.record import sources
print(json.dumps({stem: sources.code(sources.maker(stem)) for stem in sys.argv[1:] if sources.maker(stem)}))"""


class SameError(ValueError):
    """A sample that cannot be run, or a record that cannot be trusted; the message is one sentence for the user."""


def read() -> list[dict]:
    """Return the record, the oldest entry first.

    Raises SameError if an entry is not as this command wrote it. Whole entries may go: that costs runs, no more.
    """
    try:
        found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
        wrong = [str(entry.get("experiment")) for entry in found if not _is_ours(entry)]
    except (ValueError, TypeError, AttributeError) as error:
        raise SameError(f"{RECORD.name} is damaged: take the file from git again.") from error
    if wrong:
        said = visible(wrong[0])[:40]
        raise SameError(f"{RECORD.name} holds what `make same` did not write ({said}): take the file from git again.")
    return found


def _is_ours(entry: dict) -> bool:
    """Say whether an entry has all parts, as they were sealed."""
    if set(entry) != set(PARTS) or entry["seal"] != _seal(entry):
        return False
    hashes = [entry["from"], entry["to"], *entry["rows"].values()]
    return bool(entry["rows"]) and all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in hashes)


def _seal(entry: dict) -> str:
    said = {name: value for name, value in entry.items() if name != "seal"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def codes(stem: str, code: str) -> set[str]:
    """Return all code of an experiment, by its hash, that gives the same rows as this, as far as the record goes."""
    steps = [{entry["from"], entry["to"]} for entry in read() if entry["experiment"] == stem]
    found, more = set(), {code}
    while more:
        found |= more
        more = set().union(*(step for step in steps if step & more)) - found
    return found


def first(stem: str, code: str) -> str:
    """Return the code that stands for all that gives the same rows: the first that the record has of it."""
    alike = codes(stem, code)
    return next((entry["from"] for entry in read() if entry["experiment"] == stem and entry["from"] in alike), code)


def readers() -> dict[str, list[str]]:
    """Return whose tables each experiment reads, as the Snakefile has it."""
    text = (ROOT / "workflow/Snakefile").read_text(encoding="utf-8")
    found = re.findall(r"^(?:SAME|EVERY)_TASK = (.+)$", text, re.MULTILINE)
    needs: dict[str, list[str]] = {}
    for stem, read in (item for line in found for item in yaml.safe_load(line).items()):
        needs[stem] = [*needs.get(stem, []), *read]
    return needs


def sizes(notebook: Path, model: str) -> dict[str, object]:
    """Return the parameters that the sample gives an experiment: of its sizes, those that the notebook has.

    Raises SameError for a model that the sample has no blocks of.
    """
    from workflow import runs  # it takes seconds, which the Snakefile need not wait for

    sample = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    if model not in sample["models"]:
        raise SameError(f"The sample has no blocks of {visible(model)}: it knows {', '.join(sample['models'])}.")
    own, known = sample["models"][model], runs.known_parameters(notebook)
    given = {**sample["sizes"], **own["every"], **own.get(notebook.stem, {})}
    return {name: value for name, value in given.items() if name in known}


def difference(then: Path, now: Path) -> str | None:
    """Say where two tables differ first: in their columns, their number of rows, or a value; None if nowhere.

    Numbers are held against each other to the last bit, text to the last letter, rows in their order.
    """
    before, after = map(pq.read_table, (then, now))
    named = [{field.name: str(field.type) for field in one.schema} for one in (before, after)]
    if list(named[0].items()) != list(named[1].items()):
        changed = [name for name in {**named[0], **named[1]} if named[0].get(name) != named[1].get(name)]
        return f"column {changed[0]} was {named[0].get(changed[0])}, is {named[1].get(changed[0])}" if changed else (
            "its columns have another order")  # fmt: skip
    if len(before) != len(after):
        return f"{len(before)} rows were there, {len(after)} are"
    for name in before.column_names:
        pairs = zip(before[name].to_pylist(), after[name].to_pylist(), strict=True)
        for row, (one, other) in enumerate(pairs):
            if repr(one) != repr(other):  # of a float, the shortest text that no other float has
                return f"column {name}, row {row} was {_shown(one)}, is {_shown(other)}"
    return None


def _shown(value: object) -> str:
    text = visible(repr(value))
    return text if len(text) <= 60 else f"{text[:60]} ..."


def export(since: str, folder: Path) -> None:
    """Put the code of a commit into a folder; raises SameError if git has no such commit."""
    commit = _git("rev-parse", "--verify", "--end-of-options", f"{since}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit, "--", *CODE))) as archive:
        archive.extractall(folder, filter="data")


def copy(folder: Path) -> None:
    """Put today's code into a folder, committed or not."""
    for name in set(_git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE).split(b"\0")):
        path = ROOT / os.fsdecode(name)
        if path.is_file() and not path.is_symlink():
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _git(*words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise SameError("The code of a commit comes from git: install it.") from None
    except subprocess.CalledProcessError as error:
        said = visible(" ".join(os.fsdecode(error.stderr).split()))[:160]
        raise SameError(f"git does not have that code ({said}): name a commit of this project.") from error


class Tree:
    """The code of one time in a folder of its own, and the sample that it makes."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model
        for part in READ:
            (folder / part).symlink_to(ROOT / part, target_is_directory=True)
        sample = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
        notebooks = sorted((folder / "book/experiments").glob("*.ipynb"))
        notebooks = [path for path in notebooks if path.stem not in tables.OWN_MODELS]  # these bring their models
        self.settings, self.task = {path.stem: sizes(path, model) for path in notebooks}, sample["tasks"]
        given = {name: sample[name] for name in ("experiments", "tasks", "sae_set", "tables_dir")}
        given |= {"model": model, "parameters": self.settings}
        (folder / "workflow/sample.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")

    def codes(self) -> dict[str, str]:
        """Return the hash of every experiment's code, as this code's own `sources` has it."""
        command = [sys.executable, "-c", HASHES, *self.settings]
        done = subprocess.run(command, cwd=self.folder, env=self._environment(), capture_output=True)
        if done.returncode:
            raise SameError("The code of that commit says no hash of itself: name a younger one.")
        return json.loads(done.stdout)

    def run(self, stems: list[str], cores: int) -> None:
        """Run experiments, and those that they read, on the sample; what fails has no table."""
        numbers = [stem[:2] for stem in self.settings]
        asked = {"BOOK_EXPERIMENTS": ",".join(stem if numbers.count(stem[:2]) > 1 else stem[:2] for stem in stems)}
        command = ["snakemake", "--snakefile", "workflow/Snakefile", "--profile", "workflow/profiles/local"]
        command += ["--cores", str(cores), "--config", "size=sample"]
        subprocess.run([sys.executable, "-m", *command], cwd=self.folder, env=self._environment() | asked)

    def tables(self, stem: str) -> dict[str, Path]:
        """Return the tables of an experiment by their stems."""
        found = (self.folder / "results/tables").glob(f"{stem}*/{tables.place(self.model)}/{self.task}.parquet")
        return {path.parts[-3]: path for path in sorted(found)}

    def _environment(self) -> dict[str, str]:
        cache = Path(os.environ.get("NB_CACHE") or ROOT / ".cache").resolve()  # as `models.cache_dir`, without torch
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BOOK_", "NB_KERNELS"))}
        own = {"PYTHONPATH": str(self.folder), "NB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        return {"NB_DEVICE": "cpu", "NB_BYTE_BUDGET": str(1 << 27), **kept, **own}


def chosen(words: str, stems: list[str]) -> list[str]:
    """Return the experiments that are asked for, by number; raises SameError if there is no such one."""
    if words.strip() in ("", "all"):
        return stems
    known, found = {stem[:2] for stem in stems}, []
    for word in (word.strip().zfill(2) for word in words.split(",")):
        if word not in known:
            raise SameError(f"There is no experiment {visible(word)!r}: give numbers with commas between, or all.")
        found += [stem for stem in stems if stem.startswith(word)]
    return sorted(set(found))


def compared(then: Tree, now: Tree, stem: str) -> str | None:
    """Say in what the tables of an experiment differ; None if in nothing."""
    before, after = then.tables(stem), now.tables(stem)
    if not before or not after:
        return f"{stem} has not run with {'today’s' if before else 'that'} code: see above"
    if missing := sorted(set(before) ^ set(after)):
        return f"{stem}: only {'that' if missing[0] in before else 'today’s'} code makes the table {missing[0]}"
    found = ((name, difference(path, after[name])) for name, path in before.items())
    return next((f"{stem}: in {name}, {said}" for name, said in found if said), None)


def agreed(then: Tree, now: Tree, stem: str) -> dict:
    """Return what the record says of an experiment whose tables are the same."""
    code = [{tables.read_provenance(path)["code"] for path in tree.tables(stem).values()} for tree in (then, now)]
    (before,), (after,) = code
    rows = {name: tables.fingerprint(name, now.model, now.folder / "results/tables", now.task)
            for name in now.tables(stem)}  # fmt: skip
    found = {"experiment": stem, "from": before, "to": after, "model": now.model, "task": now.task,
             "settings": now.settings[stem], "rows": rows}  # fmt: skip
    return found | {"seal": _seal(found)}


def verdicts(since: str, words: str, model: str, cores: int) -> Iterator[tuple[str, dict | None]]:
    """Run the sample; yield what is to be said of each experiment, and what goes into the record (None: refused).

    An experiment whose code is the same, or known to give the same rows, is run only where others read its tables.
    """
    with tempfile.TemporaryDirectory(prefix="same.") as home:
        folders = Path(home, "then"), Path(home, "now")
        for folder in folders:
            folder.mkdir()
        export(since, folders[0])
        copy(folders[1])
        then, now = (Tree(folder, model) for folder in folders)
        old, new = then.codes(), now.codes()
        asked = chosen(words, list(new))
        tried = [stem for stem in asked if stem in old and old[stem] not in codes(stem, new[stem])]
        for tree, said in ((then, f"with the code of {visible(since)}"), (now, "with today’s code")) if tried else ():
            print(f"The sample {said}:", flush=True)
            tree.run(tried, cores)
        for stem in asked:
            if stem not in tried:
                yield f"{stem}: {'no other code' if stem in old else 'new'}", {}
            elif said := compared(then, now, stem):
                yield f"Refused: {said}", None
            else:
                yield f"{stem}: the same rows", agreed(then, now, stem)


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 if all rows are the same, 1 if some are not, 2 if that cannot be found out."""
    parser = argparse.ArgumentParser(prog="python -m workflow.same", description=__doc__.splitlines()[0])
    parser.add_argument("--since", required=True, help="the commit whose code the tables come from")
    parser.add_argument("--experiments", default="all", help="numbers with commas between, or all")
    parser.add_argument("--model", default=tables.MODEL)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    print_anything()
    try:
        if not args.since:
            raise SameError("Which code are the tables of? Name its commit: make same SINCE=<commit>.")
        found = []
        for said, what in verdicts(args.since, args.experiments, args.model, args.cores):
            print(said, flush=True)
            found.append(what)
        if new := list(filter(None, found)):
            files.write(RECORD, json.dumps(read() + new, indent=1, ensure_ascii=False).encode() + b"\n")
    except ValueError as error:  # of our own
        print(error, file=sys.stderr)
        return 2
    return int(None in found)


if __name__ == "__main__":
    sys.exit(main())
