"""Kernels forked from a parent that has done the imports and loaded the model, so that no run pays for them again.

    python -m workflow.kernels /tmp/private/kernels --model gemma-3-270m

The workflow starts this parent before its first job. It ends when its standard input does, that is, with the workflow,
however that ends, and its kernels end with it: nobody waits for them any more. A run (`workflow.runs`) asks for a
kernel through the socket, which only its owner may use. The parent never executes a cell: every kernel is a fresh copy
of it, as clean as a new process. Where there is no parent, or it imported other code than there is now, a run starts a
kernel of its own.

The parent computes nothing before it forks, and runs one thread: pools of threads do not survive a fork.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import nb_utils

# What the experiments import. A module that is missing here costs time in every run, and nothing else.
MODULES = (
    "IPython", "ipykernel.ipkernel", "ipykernel.kernelapp", "numpy", "pandas", "pyarrow.parquet", "sae_lens", "seaborn",
    "torch", "transformers", "nb_utils.cleaning", "nb_utils.engine", "nb_utils.models", "nb_utils.prompts",
    "nb_utils.record.tables", "nb_utils.saes", "nb_utils.scores", "nb_utils.show.plots",
    "nb_utils.statistics", "nb_utils.tasks", "nb_utils.vectors",
)  # fmt: skip


def version() -> str:
    """Hash our modules: a parent that has imported others serves nobody."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(nb_utils.__file__).parent.rglob("*.py")), Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def serve(path: str | Path, model: str | None = None) -> None:
    """Warm up, then fork a kernel for every connection to the socket ``path``, until standard input ends.

    ``model`` is loaded to the CPU, from where each kernel takes it to its device; one that cannot be loaded is left to
    the runs.
    """
    path, ours = Path(path), version()
    mask = os.umask(0o177)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.umask(mask)
        listener.listen(128)  # who comes during the warm-up waits here
        try:
            _warm_up(model)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no kernel stays as a zombie
            while True:
                ready, _, _ = select.select([listener, 0], [], [])
                if 0 in ready:
                    return
                connection, _ = listener.accept()
                if os.fork() == 0:
                    listener.close()
                    _become_kernel(connection, ours)
                connection.close()
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # a folder that was made for the socket alone goes with it
                path.parent.rmdir()


def _warm_up(model: str | None) -> None:
    from tqdm import tqdm

    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as in any kernel; read on import
    tqdm.monitor_interval = 0  # a thread would not survive the fork
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # nor would CUDA, which asking for a GPU would start otherwise
    for module in MODULES:
        importlib.import_module(module)
    if model:
        from nb_utils import models

        try:
            models.keep(model)
        except models.ModelError as error:
            print(f"The kernels' parent has no model: {error}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # the copies share these objects; collecting would write to them


def _become_kernel(connection: socket.socket, ours: str) -> None:
    """Take over the caller's streams, environment and folder, and run the kernel; never returns."""
    parent = os.getppid()
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        caller = json.loads(connection.makefile("r").readline())
        if caller["code"] != ours:
            connection.sendall(b"other code\n")
            os._exit(0)
        connection.sendall(f"{os.getpid()}\n".encode())
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.setsid()
        os.chdir(caller["cwd"])
        os.environ.clear()
        os.environ.update(caller["environ"])
        sys.argv = ["ipykernel_launcher", *caller["arguments"]]
        sys.path[:] = [entry for entry in sys.path if entry not in ("", caller["cwd"])]  # IPython puts "" there itself
        threading.Thread(target=_end_with, args=[connection, parent], daemon=True).start()
        random.seed()

        import torch

        torch.seed()  # as in a new process, what is not seeded is random
        torch.set_num_threads(int(caller["environ"].get("OMP_NUM_THREADS") or os.cpu_count()))

        from ipykernel.kernelapp import IPKernelApp

        # Jupyter would watch the wrong parent, ours: 1 tells it to watch none.
        IPKernelApp.launch_instance(caller["arguments"], parent_handle=1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end_with(connection: socket.socket, parent: int) -> None:
    """End the kernel when its caller has ended, or the parent and with it the workflow, however that happened."""
    _until_ended(connection, parent)
    os._exit(1)


def _until_ended(connection: socket.socket, parent: int) -> None:
    while os.getppid() == parent and not select.select([connection], [], [], 1)[0]:
        pass


def attach(path: str | Path, arguments: list[str]) -> None:
    """Stand for a kernel of the parent at ``path`` as long as it lives; without one, become a kernel.

    ``arguments`` are those of ``ipykernel_launcher``.
    """
    run, fresh = os.getppid(), [sys.executable, "-m", "ipykernel_launcher", *arguments]
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        socket.send_fds(connection, [b"\0"], [0, 1, 2])
        caller = {"arguments": arguments, "code": version(), "cwd": os.getcwd(), "environ": dict(os.environ)}
        connection.sendall(json.dumps(caller).encode() + b"\n")
        answer = connection.makefile("r").readline()
    except OSError:
        answer = ""
    if not answer.strip().isdigit():
        os.execv(sys.executable, fresh)
    pid = int(answer)
    signal.signal(signal.SIGINT, lambda *_: os.kill(pid, signal.SIGINT))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    _until_ended(connection, run)  # the kernel, or the run that it belongs to


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.kernels", description="Fork kernels from a warm parent.")
    parser.add_argument("socket", help="where runs ask for a kernel")
    parser.add_argument("--model", help="loaded once, for all kernels")
    parser.add_argument("--attach", nargs=argparse.REMAINDER, help="ask for a kernel (Jupyter calls this)")
    args = parser.parse_args(argv)
    if args.attach is not None:
        attach(args.socket, args.attach)
    else:
        serve(args.socket, args.model)


if __name__ == "__main__":
    main()
