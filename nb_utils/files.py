"""Files: where those of the book lie, and how they are written whole or not at all and checked when read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nb_utils.text import visible

if TYPE_CHECKING:
    from filelock import FileLock

# A package that is installed carries the data among its modules; in a clone they lie beside it, as all else does.
HERE = Path(__file__).resolve().parent
CLONE = None if (HERE / "data").is_dir() else HERE.parent
DATA = (CLONE or HERE) / "data"
MANIFEST = "manifest.json"
SEAL = hashlib.sha256().digest_size
SAID_AGAIN = 60  # seconds between two words of who waits
READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what is read of a folder with a model or SAEs


class FileError(ValueError):
    """A file that cannot be written or is damaged; the message says what to do."""


def cache() -> Path:
    """Return the folder for what can be rebuilt: that of ``NB_CACHE``, a clone's ``.cache``, or one of the user's."""
    if named := os.environ.get("NB_CACHE"):
        return Path(named)
    if CLONE is not None:
        return CLONE / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-task-vectors"


@contextmanager
def alone(target: str | Path) -> Iterator[None]:
    """Hold the lock of a target, beside which it lies: a second process waits until the first has ended or was killed.

    It says so once a minute. Raises FileError if no lock can be had there.
    """
    from filelock import FileLock

    target = Path(target)
    try:
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        target.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, target)
    except (OSError, ValueError, NotImplementedError) as error:  # no folder, a name no file can have, no locks
        raise FileError(unwritten(target, error)) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while we hold it: who waits sees that it went, and makes its own
        lock.release()


def _acquire(lock: FileLock, target: Path) -> None:
    """Wait for a lock that another process holds; one that cannot even be made is an OSError."""
    from filelock import Timeout

    said, missing = None, 0
    while True:
        try:
            return lock.acquire(timeout=2)
        except Timeout:
            missing = 0 if Path(lock.lock_file).exists() else missing + 1
        if missing > 1:  # the first time, who held it may have just ended
            raise OSError(errno.ENOLCK, "no lock can be made there")
        if not missing and (said is None or time.monotonic() > said + SAID_AGAIN):
            logging.getLogger(__name__).warning("Waiting for another process that makes %s.", target)
            said = time.monotonic()


@contextmanager
def whole(target: str | Path) -> Iterator[Path]:
    """Yield a path to write a file or a new folder at, and move what was written to `target` when that is done.

    It lies in a scratch folder beside the target, as does whatever else is put there. After a failure or a kill an
    older target is as it was; what a killed process left goes when the next one writes the same target. Only one
    process at a time does. Raises FileError for any OSError in between.
    """
    target = Path(target)
    scratch = target.with_name(f".{target.name}.part")
    with alone(target):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            made = scratch / target.name
            yield made
            mode = scratch.stat().st_mode & 0o777  # as the user's mask leaves it: some libraries write for one user
            for path in [made, *made.rglob("*")] if made.exists() else []:
                path.chmod(mode if path.is_dir() else mode & 0o666)
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            if made.exists():
                os.rename(made, target)
        except OSError as error:
            raise FileError(unwritten(target, error)) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def write(target: str | Path, *parts: bytes) -> Path:
    """Write bytes, whole or not at all, and return the path; raises FileError as `whole` does."""
    with whole(target) as made, made.open("wb") as stream:
        stream.writelines(parts)
    return Path(target)


def unwritten(target: str | Path, error: Exception) -> str:
    """Say that a target could not be written, why, and what to do."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    target = visible(str(target))
    remedy = "make room or give another folder, then run again; what was there is intact"
    return f"{target} could not be written ({said}): {remedy}."


def seal(target: str | Path, data: bytes) -> Path:
    """Write data with its hash before it, for `unsealed`; raises FileError as `write` does."""
    return write(target, hashlib.sha256(data).digest(), data)


def unsealed(path: str | Path) -> bytes | None:
    """Return the data of a sealed file; None if it has to be made: it isn't there, or a bit of it has changed."""
    try:
        stored = memoryview(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    if hashlib.sha256(stored[SEAL:]).digest() == stored[:SEAL]:
        return bytes(stored[SEAL:])
    logging.getLogger(__name__).warning("%s is damaged: it is made anew.", path)
    return None


def sha256(path: str | Path) -> str:
    """Hash a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content(folder: str | Path) -> bytes:
    """Return what stands for all that is read of a folder with a model or SAEs: names and hashes of its files.

    A file is hashed once in a process, unless it changes.
    """
    inside = [path for pattern in ("*", "[!.]*/*") for path in Path(folder).glob(pattern)]
    paths = sorted(path for path in inside if path.suffix in READ and path.is_file())
    named = [(path.relative_to(folder).as_posix(), _hashed(path, _changed(path))) for path in paths]
    return json.dumps(named).encode()


def _changed(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


@lru_cache(maxsize=1024)
def _hashed(path: Path, changed: tuple[int, ...]) -> str:
    return sha256(path)


def describe(folder: str | Path, names: list[str], **more: object) -> None:
    """Write the manifest of a folder: the hash of each of these files, and what else is to be said of them."""
    hashes = {name: sha256(Path(folder) / name) for name in names}
    write(Path(folder) / MANIFEST, json.dumps({**more, "files": hashes}, indent=1).encode())


def check(folder: str | Path) -> dict[str, str] | None:
    """Return {file: hash} of a folder's manifest once every file has matched it, None if it has no manifest.

    Raises FileError naming the manifest, or the first file that is missing or changed.
    """
    manifest = Path(folder) / MANIFEST
    try:
        hashes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        listed = [(Path(folder) / name, expected) for name, expected in hashes.items()]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{manifest} is damaged") from error
    for path, expected in listed:
        if not path.is_file() or sha256(path) != expected:
            raise FileError(f"{path} is damaged or incomplete")
    return hashes
