"""Tables of results: one tidy parquet file a task, with its provenance inside.

results/tables/<experiment>/<model>/<task>.parquet; with SAEs other than the shipped ones, <model>+<SAEs>/
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nb_utils import files, tasks
from nb_utils.record import sources
from nb_utils.text import slug, visible

ROOT = files.CLONE or Path()  # outside a clone, tables lie below the folder that one works in
FOLDER = "results/tables"
MODEL = "gemma-3-270m"
NAMED = (MODEL, "smollm2-135m-instruct", "tiny", "random")  # models and SAEs that are taken before a folder so called
OWN_MODELS = {  # experiments that bring their model, whatever model is asked for
    "13_ground_truth": "planted", "23_visual_task_vectors": "grids", "24_grown_vectors": "grown",
}  # fmt: skip
PACKAGES = ("numpy", "sae-lens", "torch", "transformer-lens", "transformers")
# What the provenance of a table holds.
PARTS = ("code", "data_sha256", "inputs", "model_sha256", "parameters", "sae_sha256", "versions")
PROVENANCE = b"provenance"
SEAL, UNSEALED = b"sha256", b"unsealed".ljust(64, b".")  # the hash of the file as it is before the hash is put in

# Columns that would come out differently from task to task (a column of NaN only, a column without NA).
DTYPES = {
    "task": "str", "layer": "int64", "method": "str", "mode": "str", "k": "Int64", "scale": "float64",
    "l0": "Int64", "penalty": "float64", "seed": "int64", "on": "str", "loss": "float64",
    "token_loss": "float64", "accuracy": "float64", "exact": "float64", "rel_loss": "float64", "n": "int64",
    "d_ntp": "float64", "train_loss": "float64", "validation_loss": "float64", "step": "Int64",
    "latent": "int32", "before": "float32", "after": "float32",
    "density": "float32", "largest": "float32",
}  # fmt: skip
NAMES = ("task", "target", "tested", "method", "mode", "kind", "on", "which", "template", "role", "language", "place",
         "vector")  # fmt: skip
# Columns of a stem that hold a list of records, some of them empty: what is in them cannot be told from the first rows.
_LOGITS = pa.list_(pa.struct({"token": pa.string(), "logit": pa.float32()}))
_EXAMPLE = {
    "before": pa.string(), "token": pa.string(), "after": pa.string(), "activation": pa.float32(),
    "source": pa.string(), "language": pa.string(),
}  # fmt: skip
RECORDS = {
    "features": {"examples": pa.list_(pa.struct(_EXAMPLE)), "promoted": _LOGITS, "suppressed": _LOGITS},
    "labels": {
        "quantiles": pa.list_(pa.struct({**_EXAMPLE, "quantile": pa.int32()})),
        "fires": pa.list_(pa.string()), "behind": pa.list_(pa.string()), "promotes": pa.list_(pa.string()),
    },
}  # fmt: skip


class TableError(ValueError):
    """A table that is not there, is damaged or cannot be written; the message says what to do."""


def provenance(
    parameters: Mapping[str, object], model_sha256: str, sae_sha256: Mapping[int, str],
    inputs: Mapping[str, str] | None = None,
) -> dict[str, object]:  # fmt: skip
    """Collect what a table depends on: same in, same out (no date, no machine).

    ``parameters``: the notebook's, as JSON values. ``sae_sha256``: {layer: hash of the SAE's weights}. ``inputs``:
    {stem: `fingerprint`} of the tables that were read. Adds the hash of the files of the parameters ``task`` (or
    ``tasks``) and ``text``, and the versions of Python and of the packages that compute; ``dtype`` if NB_DTYPE
    sets that of the weights. `save` adds the code.
    """
    return {
        "parameters": dict(parameters),
        "model_sha256": model_sha256,
        "sae_sha256": {str(layer): sae_sha256[layer] for layer in sorted(sae_sha256)},
        "data_sha256": data_sha256(parameters),
        "inputs": dict(sorted((inputs or {}).items())),
        "versions": versions(),
        **({"dtype": dtype} if (dtype := os.environ.get("NB_DTYPE")) else {}),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def data_sha256(parameters: Mapping[str, object]) -> dict[str, str]:
    """Hash the files of the tasks that the parameters ``task`` or ``tasks`` name, words, sentences, exchanges alike.

    And those of the list ``rivals``, and that of the parameter ``text``, below ``data``, if there are such.
    """
    named = [parameters["task"]] if "task" in parameters else parameters.get("tasks", [])
    named = [*named, *parameters.get("rivals", [])]
    found = {f"sentences of {path.name}" if kind == "sentence" else path.name: path
             for task in named for kind, path in tasks.files(str(task)).items()}  # fmt: skip
    if "text" in parameters:
        found[str(parameters["text"])] = tasks.DATA / str(parameters["text"])
    found |= {f"exchanges of {task}.json": tasks.EXCHANGES / f"{task}.json" for task in named}
    found = {name: path for name, path in found.items() if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(found.items())}


def place(model: str = MODEL, sae_set: str = "shipped") -> str:
    """Name the folder of a model and the SAEs that are read with it.

    Models and releases of SAEs go by their name, folders of a user by name and content: what holds something else is
    another folder.
    """
    own = _name(model)
    return own if sae_set == "shipped" else f"{own}+{_name(sae_set)}"


def _name(given: str) -> str:
    if given not in NAMED and os.path.isdir(given):  # False too for what no folder can be called
        return slug(Path(given).resolve().name, files.content(given))
    if re.fullmatch(r"[\w.+-]+(/[\w.+-]+)?", given, re.ASCII) and len(given) < 100 and not given.startswith("."):
        return given.replace("/", "--")  # a name of a hub has a slash, a folder must not
    return slug(given, given.encode("utf-8", "surrogatepass"))


def fingerprint(
    stem: str, model: str = MODEL, folder: str | Path | None = None, task: str | None = None,
    sae_set: str = "shipped",
) -> str:  # fmt: skip
    """Hash the rows of an experiment's tables, of one task or of all; provenance and storage don't count.

    Raises TableError if one is damaged.
    """
    digest = hashlib.sha256()
    for path in _paths(_place(stem, model, folder, sae_set)):
        if task in (None, path.stem):
            digest.update(json.dumps([path.stem, _checked(path, pq.read_table).to_pydict()]).encode())
    return digest.hexdigest()


def save(
    frame: pd.DataFrame, stem: str, name: str, provenance: Mapping[str, object],
    folder: str | Path | None = None, model: str = MODEL,
) -> Path:  # fmt: skip
    """Write one table whole or not at all, and return its path.

    The provenance gains ``code``, the hash of what makes tables of this stem (see `sources`). A full disk or a
    kill leaves an older table intact. The file carries its own hash, which `load` checks. Columns of `DTYPES` get these
    types; ``losses`` becomes a list of float32 a row, those of `RECORDS` lists of records.
    ``folder``: a relative one is below `ROOT` (None: that of NB_TABLES, or results/tables). The parameter
    ``sae_set`` of the provenance says which SAEs were read.

    Raises TableError if the table cannot be written.
    """
    sae_set = provenance.get("parameters", {}).get("sae_set", "shipped")
    path = _place(stem, model, folder, sae_set) / f"{name}.parquet"
    if maker := sources.maker(stem):
        provenance = {**provenance, "code": sources.code(maker)}
    frame = frame.astype({column: kind for column, kind in DTYPES.items() if column in frame})
    if "losses" in frame:
        frame["losses"] = [np.asarray(losses, np.float32) for losses in frame["losses"]]
    records = {name: kind for name, kind in RECORDS.get(stem, {}).items() if name in frame}
    table = pa.Table.from_pandas(frame.drop(columns=list(records)), preserve_index=False)
    for column, kind in records.items():
        table = table.append_column(column, pa.array(frame[column].tolist(), kind))
    table = table.replace_schema_metadata(
        {
            **(table.schema.metadata or {}),
            PROVENANCE: json.dumps(dict(provenance), sort_keys=True).encode(),
            SEAL: UNSEALED,
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=15)
    data = sink.getvalue().to_pybytes()
    try:
        return files.write(path, data.replace(UNSEALED, hashlib.sha256(data).hexdigest().encode(), 1))
    except files.FileError as error:
        raise TableError(str(error)) from error


def load(
    stem: str, model: str = MODEL, folder: str | Path | None = None, columns: Sequence[str] | None = None,
    filters: Sequence[tuple] | None = None, sae_set: str = "shipped",
) -> pd.DataFrame:  # fmt: skip
    """Read all tasks of an experiment into one frame, in the order of their names.

    ``columns``: only these. ``filters``: only the rows that meet all of these (column, operator, value).

    Raises TableError, saying what to run, if there are none or one is damaged.
    """
    here = _place(stem, model, folder, sae_set)
    if not (paths := _paths(here)):
        raise TableError(
            f"There are no tables of {stem} for {here.name} in {here.parent}: `make book` measures three tasks, "
            "`make report` all of them."
        )
    frames = [_read(path, columns, filters) for path in paths]
    return pd.concat(frames, ignore_index=True)


def check_saes(
    stem: str, saes: Mapping[int, str], model: str = MODEL, folder: str | Path | None = None,
    sae_set: str = "shipped", task: str | None = None,
) -> None:  # fmt: skip
    """Make sure that latents which tables name by number are those of the SAEs that are loaded.

    ``saes``: {layer: hash of the SAE's weights}. ``task``: check its table alone. Raises TableError, naming the table.
    """
    for path in _paths(_place(stem, model, folder, sae_set)):
        if task in (None, path.stem):
            then = read_provenance(path).get("sae_sha256", {})
            if other := [layer for layer, sha256 in saes.items() if then.get(str(layer), sha256) != sha256]:
                raise TableError(
                    f"{path} names latents of another SAE after block {other[0]} than the one that is loaded: run "
                    f"{stem.partition('_')[0]} again for its task with these SAEs, or load those it was made with."
                )


def names(
    stem: str, model: str = MODEL, folder: str | Path | None = None, sae_set: str = "shipped"
) -> list[str]:
    """List the tasks that have a table of this experiment, in alphabetical order."""
    return [path.stem for path in _paths(_place(stem, model, folder, sae_set))]


def file(
    stem: str, task: str, model: str = MODEL, folder: str | Path | None = None, sae_set: str = "shipped"
) -> Path:
    """Return where the table of an experiment and a task lies, whether it is there or not."""
    return _place(stem, model, folder, sae_set) / f"{task}.parquet"


def origins(stem: str, model: str = MODEL, folder: str | Path | None = None) -> list[dict[str, object]]:
    """Return what every table of an experiment was saved with, in the order of the tasks' names."""
    return [read_provenance(path) for path in _paths(_place(stem, model, folder))]


def read_provenance(path: str | Path) -> dict[str, object]:
    """Return what a table was saved with.

    Raises TableError if the file is missing, damaged or carries no provenance.
    """
    path = Path(path)
    found = (_checked(path, pq.read_schema).metadata or {}).get(PROVENANCE)
    if found is None:
        raise TableError(f"{path} carries no provenance: delete it, then run its experiment again.")
    return json.loads(found)


def _place(stem: str, model: str, folder: str | Path | None, sae_set: str = "shipped") -> Path:
    if folder is None:
        folder = os.environ.get("NB_TABLES") or FOLDER
    own = [name for other, name in OWN_MODELS.items() if f"{stem}_".startswith(f"{other}_")]
    return ROOT / folder / stem / (own[0] if own else place(model, sae_set))  # a folder may be called like one of these


def _paths(place: Path) -> list[Path]:
    return sorted(place.glob("*.parquet"))


def _read(path: Path, columns: Sequence[str] | None, filters: Sequence[tuple] | None) -> pd.DataFrame:
    read = partial(pq.read_table, columns=columns, filters=filters, partitioning=None)
    return _checked(path, lambda found: _named(read(found).to_pandas()))


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Make sure that what pages take for names are names: a table of others may hold markup there."""
    for column in frame.columns.intersection(NAMES):
        for value in frame[column].dropna().unique():
            if re.search(r"[<>&\"'`$*\\\[\]{}|]", str(value)):
                raise ValueError(f"its {column} {visible(str(value))!r} is no name")
    return frame


def _checked(path: Path, reader):
    try:
        data = path.read_bytes()
        found = (pq.read_metadata(pa.BufferReader(data)).metadata or {}).get(SEAL)  # tables of others have none
        if found and hashlib.sha256(data.replace(found, UNSEALED, 1)).hexdigest().encode() != found:
            raise pa.ArrowInvalid("its content does not match its hash")
        return reader(pa.BufferReader(data))
    except FileNotFoundError:
        raise TableError(f"There is no table {path}: run its experiment (`make report` runs all).") from None
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:  # whatever its bytes bring about
        raise TableError(
            f"{path} is damaged ({' '.join(str(error).split())[:120]}): delete it, then run `make report` or "
            "take it from git again."
        ) from error


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
