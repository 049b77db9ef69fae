"""Stale tables: those that today's code, parameters, data, model, SAEs or packages would not give.

    python -m workflow.stale results/tables results/runs/tables

It names them in groups and exits with 1 if there are any. A table that is not stale need not be made again. The
parameters are those of the settings that write into the folder: the report's, or the quick ones of the book. Other code
counts as today's where the record of `workflow.same` says that both give the same rows.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import yaml

from nb_utils.record import sources, tables
from nb_utils.record.tables import ROOT, TableError
from nb_utils.text import print_anything
from workflow import runs, same

SETTINGS, MODELS = [ROOT / "workflow/report.yaml", ROOT / "workflow/book.yaml"], ROOT / "workflow/models.yaml"
# Parameters that say what a table is of or where it is stored, or that it holds by what they led to on its machine.
NOT_COMPARED = ("task", "model", "sae_set", "tables_dir", "half")


def reasons(path: Path, folder: Path) -> list[str]:
    """Say what has changed since a table below ``folder`` was made; nothing if it would come out the same."""
    stem, model = path.relative_to(folder).parts[:2]
    try:
        origin = tables.read_provenance(path)
    except TableError as error:
        return ["no provenance" if "no provenance" in str(error) else "damaged"]
    missing = [part for part in tables.PARTS if part not in origin]
    found = [f"provenance without {', '.join(missing)}"] if missing else []
    maker = sources.maker(stem)
    if maker is None:
        found.append("nothing makes such tables any more")
    elif origin.get("code") not in same.codes(maker.stem, _code(maker)):
        found.append("other code")
    found += _parameters(maker, origin, folder)
    found += _weights(origin)
    for name, today in tables.data_sha256(origin.get("parameters", {})).items():
        if origin.get("data_sha256", {}).get(name, today) != today:
            found.append(f"other data in {name}")
    for name, then in origin.get("inputs", {}).items():
        if then not in (_fingerprint(name, model, folder, None), _fingerprint(name, model, folder, path.stem)):
            found.append(f"other rows in {name}, which it reads")
    for name, today in tables.versions().items():
        then = origin.get("versions", {}).get(name, "unknown")
        if then.partition("+")[0] != today.partition("+")[0]:  # what follows a + names a build
            found.append(f"{name} was {then}, is {today}")
    return found


def _group(path: Path, folder: Path) -> str:
    """Name what a table stands under: the notebook or script that makes it, and the model if it is not the book's."""
    stem, model = path.relative_to(folder).parts[:2]
    maker = sources.maker(stem)
    name = stem if maker is None else maker.stem if maker.suffix == ".ipynb" else str(maker.relative_to(ROOT))
    return name if model == tables.MODEL else f"{name} of {model}"


def _parameters(maker: Path | None, origin: Mapping, folder: Path) -> Iterator[str]:
    """Compare what a table records with the defaults of its notebook and the settings that write into its folder."""
    if maker is None or maker.suffix != ".ipynb":
        return
    today = _defaults(maker, _model_of(origin), _settings(folder))
    for name, then in origin.get("parameters", {}).items():
        if name in today and not _same(then, today[name]):
            yield f"{name} was {_shown(then)}, is {_shown(today[name])}"


def _model_of(origin: Mapping) -> str:
    return origin.get("parameters", {}).get("model", tables.MODEL)


def _settings(folder: Path) -> Path:
    """Return the settings whose tables lie in a folder: those of the report, unless others name it."""
    for path in SETTINGS:
        if (ROOT / yaml.safe_load(path.read_text(encoding="utf-8"))["tables_dir"]).resolve() == folder.resolve():
            return path
    return SETTINGS[0]


@cache
def _defaults(maker: Path, model: str, settings: Path = SETTINGS[0]) -> dict[str, object]:
    """Return the parameters that the workflow gives a notebook for a model with these settings."""
    sizes, models = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (settings, MODELS))
    own = models["models"].get(model, {})
    given = runs.known_parameters(maker) | sizes["parameters"].get(maker.stem, {})
    given |= own.get("every", {}) | own.get(maker.stem, {})
    return {name: value for name, value in given.items() if name not in NOT_COMPARED}


def _same(then: object, today: object) -> bool:
    """Compare a recorded value with a parameter, maybe its text: [8, 10] is "8,10"; "all" and "auto" are any list."""
    if today in ("all", "auto") and isinstance(then, list):
        return True
    return sorted(_parts(then), key=str) == sorted(_parts(today), key=str)


def _parts(value: object) -> list:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, str):
        return [_number(part) for part in value.split(",")]
    if isinstance(value, list):
        return [_number(part) if isinstance(part, str) else part for part in value]
    return [value]


def _number(text: str) -> object:
    try:
        return float(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, TypeError):
        return text.strip()


def _shown(value: object) -> str:
    return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in _parts(value))


def _weights(origin: Mapping) -> Iterator[str]:
    """Compare the hashes of the model and of the shipped SAEs with those of the files that are here."""
    model = _model_of(origin)
    own = model in tables.OWN_MODELS.values()
    brought = {"grown": _grown, "grids": _visual}
    today = brought.get(model, lambda parameters: None)(origin["parameters"]) if own else _model(model)
    if today and origin.get("model_sha256") != today:
        yield "other weights of the model"
    if not _shipped(origin):
        return  # `_trainings`
    for layer, then in origin.get("sae_sha256", {}).items():
        file = ROOT / "saes" / model / f"blocks.{layer}.hook_resid_post/sae_weights.safetensors"
        if not file.exists() or _sha256(file) != then:
            yield f"another SAE at block {layer}"


def _sae_set(origin: Mapping) -> str:
    return origin.get("parameters", {}).get("sae_set", "shipped")


def _shipped(origin: Mapping) -> bool:
    """Say whether a table read SAEs that are here."""
    return _sae_set(origin) == "shipped" and (ROOT / "saes" / _model_of(origin)).is_dir()


def _trainings(paths: Iterable[Path], folder: Path) -> dict[Path, list[str]]:
    """Say which tables read other SAEs than most tables of their model and set, where these SAEs are not here.

    Without the files only the tables can be held against one another; SAEs that are trained again are other SAEs.
    """
    read: dict[tuple[str, str, str], dict[str, list[Path]]] = {}
    for path in paths:
        model = path.relative_to(folder).parts[1]
        try:
            origin = tables.read_provenance(path)
        except TableError:
            continue  # `reasons` names it
        if _shipped(origin):
            continue
        for layer, sha256 in origin.get("sae_sha256", {}).items():
            read.setdefault((model, _sae_set(origin), layer), {}).setdefault(sha256, []).append(path)
    found: dict[Path, list[str]] = {}
    for (_, _, layer), trainings in read.items():
        most = max(trainings, key=lambda sha256: len(trainings[sha256]))
        for path in (path for sha256, group in trainings.items() if sha256 != most for path in group):
            found.setdefault(path, []).append(f"at block {layer} another SAE than most tables of its model")
    return found


@cache
def _model(name: str) -> str | None:
    """Return the hash of a model's weights; None if it is not on this machine."""
    from nb_utils import models  # it imports torch

    return models.sha256(name)


def _grown(parameters: Mapping) -> str | None:
    """Return the hash of a family of grown models; None if they are not on this machine."""
    from workflow import grown  # it imports torch

    try:
        return grown.sha256(parameters["task"], parameters["seeds"], ROOT / parameters["grown_dir"])
    except grown.GrownError:
        return None


def _visual(parameters: Mapping) -> str | None:
    """Return the hash of the visual model; None if it is not on this machine."""
    from workflow import visual  # it imports torch

    try:
        return visual.sha256(ROOT / parameters["visual_dir"])
    except visual.VisualError:
        return None


@cache
def _code(maker: Path) -> str:
    return sources.code(maker)


@cache
def _fingerprint(stem: str, model: str, folder: Path, task: str | None) -> str:
    return tables.fingerprint(stem, model, folder, task)


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def report(folder: Path) -> tuple[list[str], bool]:
    """Return the lines that name what is stale below a folder, and whether anything is."""
    everything = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    total = Counter(_group(path, folder) for path in everything)
    others = _trainings(everything, folder)
    stale = {path: why for path in everything if (why := reasons(path, folder) + others.get(path, []))}
    found: dict[str, dict[str, list[str]]] = {}
    for path, why in stale.items():
        for reason in why:
            found.setdefault(reason, {}).setdefault(_group(path, folder), []).append(path.stem)
    lines = []
    for reason, groups in found.items():
        said = [f"{group} ({_listed(names, total[group])})" for group, names in groups.items()]
        lines += textwrap.wrap(f"{reason}: {'; '.join(said)}", 120, subsequent_indent="  ", break_on_hyphens=False)
    where = f" in {folder.relative_to(ROOT)}" if folder.is_relative_to(ROOT) else ""
    many = "is" if len(stale) < 2 else "are"
    lines.append(f"{len(stale) or 'None'} of {len(everything)} tables{where} {many} stale.")
    return lines, bool(stale)


def _listed(names: list[str], total: int, most: int = 5) -> str:
    if len(names) == total:
        return f"all {total}"
    names = list(dict.fromkeys(names))  # the tables of one task have its name
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def main(argv: list[str] | None = None) -> int:
    """Run the command line: 0 if there are no stale tables, 1 if there are some, 2 if that cannot be found out."""
    parser = argparse.ArgumentParser(prog="python -m workflow.stale", description="Name the tables to make again.")
    parser.add_argument("folders", nargs="*", default=[tables.FOLDER], help="where the tables are")
    print_anything()
    any_stale = False
    for folder in parser.parse_args(argv).folders:
        try:
            lines, found = report(ROOT / folder)
        except ValueError as error:  # of our own: a damaged model or input
            print(error, file=sys.stderr)
            return 2
        print(*lines, sep="\n")
        any_stale |= found
    return int(any_stale)


if __name__ == "__main__":
    sys.exit(main())
