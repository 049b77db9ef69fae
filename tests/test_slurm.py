"""The cluster profile on a real Slurm: one node on loopback, from Debian's packages (skipped unless asked for).

    BOOK_TEST_SLURM=1 pytest tests/test_slurm.py

As root on a machine without a Slurm of its own: it installs the packages if they are missing, and puts a
configuration into /etc/slurm for as long as it runs.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.test_workflow import FIRST, ROOT, STEMS, project, runs_of  # noqa: F401

NEEDS = yaml.safe_load((ROOT / "workflow/needs.yaml").read_text())["needs"]
CONFIGURATION = Path("/etc/slurm/slurm.conf")  # inside a job, nothing else is looked for
SEARCH = f"{os.environ['PATH']}:/usr/sbin"
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=SEARCH)]
pytestmark = pytest.mark.skipif(
    os.environ.get("BOOK_TEST_SLURM") != "1",
    reason="starts a real Slurm as root: set BOOK_TEST_SLURM=1 where that is allowed",
)
CONF = """ClusterName=book
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000
PartitionName=book Nodes={host} Default=YES State=UP
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start munged, slurmctld and slurmd on loopback with files of their own; yield the environment that finds them."""
    if os.geteuid() != 0 or CONFIGURATION.exists():
        pytest.skip("a Slurm for the test needs root, and a machine that has no Slurm of its own")
    if MISSING:
        packages = ["slurmctld", "slurmd", "slurm-client", "munge"]
        subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], check=True)
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host, key = socket.gethostname().partition(".")[0], folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, folder=folder, ports=(free_port(), free_port()), cpus=os.cpu_count())
    )
    CONFIGURATION.symlink_to(folder / "slurm.conf")
    environ = {**os.environ, "PATH": SEARCH}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host],
    ]  # fmt: skip
    running = []
    for command in commands:
        with (folder / f"{command[0]}.out").open("w") as out:
            running.append(subprocess.Popen(command, env=environ, stdout=out, stderr=out))
        time.sleep(1)

    def idle():
        said = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environ, capture_output=True, text=True)
        return said.stdout.strip() == "idle"

    try:
        wait_for(idle, seconds=60)
        yield environ
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=30)
        CONFIGURATION.unlink()


def command(project):  # noqa: F811
    return [
        Path(sys.executable).with_name("snakemake"), "--snakefile", project / "workflow/Snakefile",
        "--directory", project, "--profile", project / "workflow/profiles/slurm", "--latency-wait", "5",
        "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5",  # no accounting here
        "--config", "size=book", "experiments=all", "model=tiny", "tasks=antonyms",
    ]  # fmt: skip


def clock(minutes):
    return f"{minutes // 60}:{minutes % 60:02}:00" if minutes >= 60 else f"{minutes}:00"


def jobs(environ):
    listed = subprocess.run(["squeue", "-h", "-o", "%i"], env=environ, capture_output=True, text=True)
    return listed.stdout.split()


def finished(project):  # noqa: F811
    return sorted(f"{path.parts[-3]} · {path.stem}" for path in project.glob("results/runs/[0-9]*/tiny/[!.]*.ipynb"))


@contextmanager
def killed_head(project, cluster):  # noqa: F811
    """Start the workflow on slow runs; once one of them has started and the block is through, kill the head alone."""
    (project / "slow").touch()
    with (project / "said").open("w") as said:
        head = subprocess.Popen(command(project), cwd=project, env=cluster, stdout=said, stderr=said)
    try:
        wait_for(lambda: (project / "started").exists(), seconds=240)
        yield
    finally:
        head.kill()
        head.wait()


def goes_on(project, cluster):  # noqa: F811
    """Call the workflow again: every run is there, and none ran twice to its end."""
    subprocess.run([*command(project), "--unlock"], check=True, capture_output=True, cwd=project, env=cluster)
    done = subprocess.run(command(project), cwd=project, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished(project) == runs_of("antonyms")
    assert len((project / "parents").read_text().split()) == len(STEMS)


def test_jobs_have_memory_and_time_and_go_on_when_the_head_is_killed(project, cluster):  # noqa: F811
    with killed_head(project, cluster):
        asked = subprocess.run(["squeue", "-h", "-o", "%m %l"], env=cluster, capture_output=True, text=True).stdout
        measured = {f"{need['mem_mb']}M {clock(need['runtime'])}" for need in NEEDS.values()}
        assert asked and set(asked.splitlines()) <= measured
    (project / "slow").unlink()
    waiting = jobs(cluster)
    subprocess.run(["scancel", waiting[-1]], env=cluster, check=True)  # and one of them is lost
    wait_for(lambda: not jobs(cluster), seconds=240)
    assert 0 < len(finished(project)) < len(FIRST)  # it, and those that wait for others, are not there
    goes_on(project, cluster)


def test_the_workflow_goes_on_when_everything_is_killed(project, cluster):  # noqa: F811
    with killed_head(project, cluster):
        pass
    assert jobs(cluster)
    subprocess.run(["scancel", "--signal=KILL", "--full", *jobs(cluster)], env=cluster)  # what runs dies at once
    subprocess.run(["scancel", *jobs(cluster)], env=cluster)  # what waits never starts
    wait_for(lambda: not jobs(cluster), seconds=120)
    (project / "slow").unlink()
    assert finished(project) == [] and not list(project.glob("results/runs/tables/*/tiny/*.parquet"))
    goes_on(project, cluster)
