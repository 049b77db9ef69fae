"""Runs: one notebook executed on one set of parameters, kept only when it finished.

    python -m workflow.runs book/experiments/02_cleanup.ipynb -p task antonyms -p layers 8,10 -o run.ipynb
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillException, PapermillExecutionError
from traitlets import default

from nb_utils import files, tasks
from nb_utils.record import tables
from nb_utils.text import print_anything, verbatim, visible

# Errors of the book's own modules: their message says it all, so the type is not shown.
OWN_ERRORS = ("TaskError", "ModelError", "SaeError", "TableError", "FileError", "RunError", "GrownError")


class RunError(ValueError):
    """A run that cannot start or did not finish; the message is one sentence for the user."""


class KernelManager(AsyncKernelManager):
    """Start a kernel that listens at files of its own: a port that was free could be another's once it is bound.

    Where ``NB_KERNELS`` names the warm parent of `workflow.kernels`, the kernel is a copy of that.
    """

    @default("transport")
    def _files(self):
        return "ipc"

    @default("ip")
    def _own(self):
        return str(Path(tempfile.gettempdir(), f"kernel-{uuid.uuid4()}"))  # short: a socket's path has 107 characters

    def format_kernel_cmd(self, extra_arguments=None):
        command = super().format_kernel_cmd(extra_arguments)
        if socket := os.environ.get("NB_KERNELS"):
            return [*command[:2], "workflow.kernels", socket, "--attach", *command[3:]]
        return command


def known_parameters(notebook: str | Path) -> dict[str, object]:
    """Return the names and defaults of a notebook's parameters, from its cell tagged ``parameters``.

    A default that is not a plain Python value comes back as its source text.

    Raises RunError if there is no such notebook, or its parameters are not Python.
    """
    if not Path(notebook).is_file():
        raise RunError(f"There is no notebook {notebook}.")
    try:
        cells = nbformat.read(str(notebook), as_version=4).cells
        tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
        nodes = ast.parse(tagged[0]).body if tagged else []
    except SyntaxError as error:
        raise RunError(f"{notebook}: line {error.lineno} of its parameters is not Python.") from error
    except (ValueError, AttributeError, LookupError, TypeError, nbformat.ValidationError) as error:
        raise RunError(f"{notebook} is not a notebook.") from error
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return {node.targets[0].id: _value(ast.unparse(node.value)) for node in assigned}


def execute(
    notebook: str | Path, parameters: Mapping[str, object], output: str | Path, log: str | Path | None = None
) -> None:
    """Execute a notebook with papermill and move its executed copy to `output` once it is complete.

    Until then the copy lies beside `output` under a hidden name: a killed run leaves nothing that looks
    finished, and an older `output` stays. Where another process makes the same `output`, perhaps because what
    started it was killed, we wait for it to end. A failed run keeps its copy as ``<output stem>.failed.ipynb``.
    The title of a copy names its task, and the model and SAEs where they are not the book's; below it stand what was
    merged of the task's file, and which SAEs a set of the user stood for. What papermill reports and the cells print
    goes to `log`.

    Raises RunError if a parameter is unknown (papermill alone only warns), a cell fails or the copy can't be written.
    """
    output = Path(output)
    known = known_parameters(notebook)
    if unknown := [name for name in parameters if name not in known]:
        raise RunError(f"{notebook} has no parameter {unknown[0]!r}; it knows {', '.join(known)}.")
    failed = output.with_suffix(".failed.ipynb")
    try:
        with files.whole(output) as scratch:
            _execute(notebook, parameters, scratch, failed, log)
    except files.FileError as error:
        raise RunError(str(error)) from error
    failed.unlink(missing_ok=True)


def _execute(notebook, parameters: Mapping[str, object], scratch: Path, failed: Path, log) -> None:
    try:
        with _logged(log):
            papermill.execute_notebook(
                _literal(notebook), _literal(scratch), parameters=dict(parameters), kernel_name="python3",
                language="python", progress_bar=False, log_output=True, kernel_manager_class=KernelManager,
                start_timeout=600,  # the parent may be loading a large model
            )
        run = nbformat.read(scratch, as_version=4)
        if run.metadata.papermill.get("exception") or not run.metadata.papermill.get("end_time"):
            raise RunError(f"{notebook} stopped before its last cell.")
        if "task" in parameters:  # the pages of all tasks stand in one table of contents
            title, _, rest = run.cells[0].source.partition("\n")
            told = map(verbatim, _told(Path(notebook).stem, {**known_parameters(notebook), **parameters}))
            run.cells[0].source = "\n\n".join([f"{title}: {_described(parameters)}\n{rest}".rstrip(), *told])
            nbformat.write(run, scratch)
    except (PapermillException, RuntimeError, RunError) as error:  # the second: a kernel that died or never came
        if not scratch.exists():
            raise RunError(_sentence(error)) from error
        os.replace(scratch, failed)
        raise RunError(f"{_sentence(error)} (executed copy: {failed})") from error


def _literal(path: str | Path) -> str:
    """Write a path so that papermill, which formats it with the parameters, takes it as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _described(parameters: Mapping[str, object]) -> str:
    """Say what a run is of, as Markdown: its task, and the model and SAEs if they are not the book's."""
    task = str(parameters["task"])
    try:
        word = tasks.load(task)
        shown = task if word.name == task else f"{word.title} ({word.name.rpartition('.')[2]})"
    except tasks.TaskError:  # the notebook knows what to do with it
        shown = Path(task).stem
    given = {"model": tables.MODEL, "sae_set": "shipped", **parameters}
    place = tables.place(str(given["model"]), str(given["sae_set"]))
    return verbatim(shown if place == tables.MODEL else f"{shown}, {place.replace('+', ' with ')}")


def _told(stem: str, given: Mapping[str, object]) -> Iterator[str]:
    """Say what became of the inputs of a finished run: which entries of the task were merged, which SAEs were taken.

    The experiment leaves both to its task and to its table's provenance; here the reader of the page is told.
    """
    try:
        word = tasks.load(str(given["task"]))
        yield from [word.merged] * bool(word.merged)
        if (sae_set := str(given.get("sae_set", "shipped"))) not in ("shipped", "random"):
            path = tables.file(stem, word.name, str(given["model"]), str(given["tables_dir"]), sae_set)
            found = tables.read_provenance(path)["sae_sha256"]
            named = (f"after block {layer}, {_named(found[layer])}" for layer in sorted(found, key=int))
            yield f"SAEs of {sae_set}: {'; '.join(named)}."
    except (tasks.TaskError, tables.TableError, LookupError):  # no task or table of ours: nothing to tell
        return


def _named(sha256: str) -> str:
    hub, _, name = sha256.partition(":")
    return name or f"the one of hash {hub[:8]}"


def _sentence(error: Exception) -> str:
    if isinstance(error, DeadKernelError):
        return (
            "The kernel died: unless its workflow was killed, memory most likely ran out, so run it with fewer layers "
            "or more memory."
        )
    if isinstance(error, PapermillExecutionError):
        own = error.ename.rpartition(".")[2] in OWN_ERRORS
        message = " ".join(str(error.evalue).split())
        return message if own else f"{error.ename}: {message}"
    return " ".join(str(error).split())


@contextmanager
def _logged(log: str | Path | None):
    """Send what papermill and the kernel report, cell outputs included, to a file instead of the terminal."""
    if log is None:
        yield
        return
    try:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        logger, handler = logging.getLogger("papermill"), logging.FileHandler(log, mode="w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"The log {files.unwritten(log, error)}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level, propagate, terminal = logger.level, logger.propagate, os.dup(2)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    os.dup2(handler.stream.fileno(), 2)  # the kernel is a child process: it inherits this
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        handler.close()


def _value(source: str) -> object:
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return source


def _typed(name: str, text: str, default: object) -> object:
    """Read a word of the command line as the type of the parameter's default: ``8`` stays text if that is."""
    if isinstance(default, str) or default is None:
        return text
    value = _value({"true": "True", "false": "False"}.get(text.lower(), text))
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise RunError(f"Parameter {name!r} needs a value like {default!r}, not {text!r}.")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command line; every error is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m workflow.runs", description="Execute one notebook.")
    parser.add_argument("notebook")
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="a parameter of the notebook; may be repeated",
    )
    parser.add_argument("-o", "--output", required=True, help="where the executed copy goes")
    parser.add_argument("--log", help="file for what papermill reports and the cells print")
    args = parser.parse_args(argv)
    print_anything()
    label = visible(f"{Path(args.notebook).stem} · {dict(args.parameters).get('task', Path(args.output).stem)}")
    start = time.monotonic()
    try:
        known = known_parameters(args.notebook)
        given = {name: _typed(name, text, known.get(name)) for name, text in args.parameters}
        print(f"{label}: running", flush=True)
        execute(args.notebook, given, args.output, args.log)
    except (RunError, OSError) as error:
        print(f"{label}: FAILED: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"{label}: stopped, and nothing of it is kept", file=sys.stderr, flush=True)
        return 130
    print(f"{label}: done in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
