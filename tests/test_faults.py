"""Faults that lose nothing: kills, full disks, two processes at once, damaged files, and input that makes no sense.

    BOOK_TEST_FAULTS=1 pytest tests/test_faults.py

also kills the long commands at random moments (34 kills in all), runs each twice at once, and fills their disk.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from test_evidence import corpus
from test_exports import exported, sae  # noqa: F401
from test_models import entry, shelf  # noqa: F401
from test_notebooks import SIZES, TINY
from test_tables import ORIGIN, STEM, made

from nb_utils import exports, files, models, saes, tasks
from nb_utils.record import tables
from nb_utils.text import slug, visible
from workflow import build_corpus, collect_evidence, runs, train_saes

ROOT = tables.ROOT
LONG = os.environ.get("BOOK_TEST_FAULTS") == "1"
long = pytest.mark.skipif(not LONG, reason="kills many long commands: set BOOK_TEST_FAULTS=1")
FIRST = "01_reconstruction_loss"


def environment(cache):
    return {**os.environ, "NB_CACHE": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def cache_with_corpus(folder):
    (folder / "corpus").mkdir(parents=True)
    corpus(150).to_parquet(folder / "corpus/documents.parquet")
    return folder


def scratch(folder):
    """List what only a killed process leaves: scratch folders and locks."""
    return [path.name for path in folder.rglob(".*") if path.suffix in (".part", ".lock") or path.name[:4] == ".tmp"]


def contents(folder, pattern="*"):
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def one_sentence(text):
    assert text.strip() and "Traceback" not in text and "\n" not in text.strip(), text


# --- kill -9 ---------------------------------------------------------------------------------------------------------


SAVE = """
import sys
from test_tables import made, tables, ORIGIN
for task in range(40):
    tables.save(made(f"t{task:03}", loss=float(task)), "tables", f"t{task:03}", ORIGIN, sys.argv[1])
"""
CONVERT = """
import sys
sys.path.insert(0, {folder!r})
from nb_utils import models
models.EMBEDDED["toy"] = models.{entry!r}
models.load("toy")
"""


def job_tables(home):
    return [sys.executable, "-c", SAVE, str(home / "out")], home / "out"


def job_training(home):
    cache_with_corpus(home / "cache")
    options = "--model tiny --layers 1,4 --d-sae 64 --k 8 --tokens 250000 --checkpoint-minutes 0".split()
    return [sys.executable, "-m", "workflow.train_saes", *options, "--out", str(home / "out")], home / "out"


def job_evidence(home):
    cache_with_corpus(home / "cache")
    options = "--model tiny --layers 1,4 --tokens 30000 --checkpoint-seconds 0".split()
    return [sys.executable, "-m", "workflow.collect_evidence", *options, "--out", str(home / "out")], home / "out"


def job_run(home):
    notebook = ROOT / f"book/experiments/{FIRST}.ipynb"
    known = runs.known_parameters(notebook)
    given = TINY | {key: value for key, value in SIZES.items() if key in known} | {"tables_dir": str(home / "out")}
    words = [word for key, value in given.items() for word in ("-p", key, str(value))]
    output = ["-o", str(home / "runs/antonyms.ipynb"), "--log", str(home / "log")]
    return [sys.executable, "-m", "workflow.runs", str(notebook), *words, *output], home / "out"


def job_workflow(home):
    """Run all experiments on two tasks in a copy of the project, with tiny sizes; a kill's lock goes, as in make."""
    for part in ("workflow", "nb_utils", "book/experiments", "data"):
        shutil.copytree(ROOT / part, home / part, ignore=shutil.ignore_patterns("__pycache__"))
    sizes, small = SIZES | {"layers": "2,3"}, {}
    for path in (ROOT / "book/experiments").glob("*.ipynb"):
        small[path.stem] = {key: value for key, value in sizes.items() if key in runs.known_parameters(path)}
    book = yaml.safe_load((home / "workflow/book.yaml").read_text())
    book |= {"parameters": small, "model": "tiny", "sae_set": "shipped", "tables_dir": "out"}
    (home / "workflow/book.yaml").write_text(yaml.safe_dump(book))
    words = [Path(sys.executable).with_name("snakemake"), "--snakefile", "workflow/Snakefile", "--profile",
             "workflow/profiles/local", "--cores", "2", "--config", "size=book", "experiments=all",
             "tasks=antonyms,en_es"]  # fmt: skip
    call = " ".join(map(str, words))
    return ["sh", "-c", f"{call} --unlock >/dev/null 2>&1; {call}"], home / "out"


def finish(command, home):
    place = {"cwd": home if (home / "workflow").exists() else ROOT}
    env = environment(home / "cache")
    if (home / "workflow").exists():
        env["PYTHONPATH"] = str(home)
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, **place)  # fmt: skip
    return process


def kill_and_finish(job, home, kills, seed, from_=0.3):
    """Run a job undisturbed, then killed again and again, then to its end: same bytes, nothing left behind.

    A kill comes at a random moment of what an undisturbed job takes, its first imports left out; one that had ended
    before is none. Finished files must stay as they are. Returns how many kills hit.
    """
    rng = random.Random(seed)
    command, out = job(home / "whole")
    start = time.monotonic()
    process = finish(command, home / "whole")
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]
    lasts, expected = time.monotonic() - start, contents(out)
    assert expected
    command, out = job(home / "killed")
    hits = 0
    for _ in range(3 * kills):
        before = contents(out, "[!.]*")
        process = finish(command, home / "killed")
        try:
            process.communicate(timeout=lasts * rng.uniform(from_, 1))
            shutil.rmtree(out)  # it was faster: once more from the start
            shutil.rmtree(home / "killed/cache/training", ignore_errors=True)
            shutil.rmtree(home / "killed/cache/evidence", ignore_errors=True)
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        hits += 1
        after = {name: data for name, data in contents(out, "[!.]*").items() if ".part/" not in name}
        assert all(expected[name] == data for name, data in after.items())  # whole, or not there
        assert {name for name in before if ".part/" not in name} <= set(after)
        if hits == kills:
            break
    process = finish(command, home / "killed")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    assert contents(out) == expected
    assert scratch(home / "killed") == []
    return hits


@long
def test_a_killed_loop_of_tables_is_gone_on_with_and_gives_the_same_bytes(tmp_path):
    assert kill_and_finish(job_tables, tmp_path, 8, seed=1, from_=0.6)


@long
def test_a_killed_training_goes_on_and_gives_the_same_saes_bit_by_bit(tmp_path):
    assert kill_and_finish(job_training, tmp_path, 6, seed=2, from_=0.5)


def test_a_training_that_stopped_goes_on_from_its_checkpoint_and_gives_the_same_saes_bit_by_bit(tmp_path, monkeypatch):
    options = "--model tiny --layers 1,4 --d-sae 64 --k 8 --tokens 190000 --checkpoint-minutes 0".split()
    monkeypatch.setenv("NB_CACHE", str(cache_with_corpus(tmp_path / "whole")))
    train_saes.main([*options, "--out", str(tmp_path / "a")])
    monkeypatch.setenv("NB_CACHE", str(cache_with_corpus(tmp_path / "stopped")))
    harvest, calls = train_saes.harvest, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return harvest(*args)

    monkeypatch.setattr(train_saes, "harvest", stops)
    with pytest.raises(KeyboardInterrupt):
        train_saes.main([*options, "--out", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists() and len(list((tmp_path / "stopped/training").glob("*.checkpoint"))) == 1
    train_saes.main([*options, "--out", str(tmp_path / "b")])
    assert len(calls) == 4  # only the chunk that was not finished is done again
    assert contents(tmp_path / "b") == contents(tmp_path / "a") != {}
    assert scratch(tmp_path) == []


@long
def test_killed_evidence_goes_on_and_gives_the_same_tables(tmp_path):
    assert kill_and_finish(job_evidence, tmp_path, 5, seed=3, from_=0.5)


@long
def test_a_killed_run_is_run_again_and_gives_the_same_tables(tmp_path):
    assert kill_and_finish(job_run, tmp_path, 5, seed=4)


@long
def test_a_killed_workflow_goes_on_and_gives_the_same_tables(tmp_path):
    assert kill_and_finish(job_workflow, tmp_path, 4, seed=5)


@long
def test_a_killed_conversion_is_made_again_and_gives_the_same_model(shelf, tmp_path):  # noqa: F811
    script = CONVERT.format(folder=str(shelf.folder), entry=entry(shelf.sha256))
    job = lambda home: ([sys.executable, "-c", script], home / "cache/models")  # noqa: E731
    assert kill_and_finish(job, tmp_path, 6, seed=6, from_=0.6)


# --- two processes at once -------------------------------------------------------------------------------------------


JOBS = {"tables": job_tables, "training": job_training, "evidence": job_evidence, "run": job_run}


@long
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_that_make_the_same_at_once_both_end_well(tmp_path, name):
    command, out = JOBS[name](tmp_path / "alone")
    said, _ = finish(command, tmp_path / "alone").communicate()
    expected = contents(out)
    command, out = JOBS[name](tmp_path / "both")
    both = [finish(command, tmp_path / "both") for _ in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert contents(out) == expected != {}
    assert scratch(tmp_path / "both") == []


def test_who_waits_takes_over_when_the_holder_is_killed(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from nb_utils import files
        with files.whole(sys.argv[1]) as made:
            made.write_text(sys.argv[2])
            print("holds", flush=True)
            time.sleep(float(sys.argv[3]))
    """)

    def start(text, seconds):
        words = [sys.executable, "-c", script, str(tmp_path / "file"), text, str(seconds)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(tmp_path))

    first = start("first", 60)
    assert first.stdout.readline() == "holds\n"
    second = start("second", 0)
    time.sleep(0.5)
    assert second.poll() is None and not (tmp_path / "file").exists()
    first.kill()
    first.wait()
    assert second.wait(timeout=60) == 0
    assert (tmp_path / "file").read_text() == "second" and scratch(tmp_path) == []


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mount a small disk; call it to remount it with other options."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk to fill needs the right to mount one: run this as root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def resized(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def fill(disk, leave=0):
    """Fill a disk but for some bytes; return the file to delete to make room."""
    with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 1024)
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - leave)
    return disk / "filler"


def large(task="antonyms"):
    return pd.concat([made(task, losses=np.random.default_rng(i).normal(size=400).tolist()) for i in range(20)])


@pytest.mark.parametrize("leave", [0, 8192])
def test_on_a_full_disk_a_table_is_refused_and_the_older_one_stays(disk, leave):
    older = tables.save(made(loss=1.0), STEM, "antonyms", ORIGIN, disk).read_bytes()
    filler = fill(disk, leave)
    with pytest.raises(tables.TableError, match=r"written \(No space left on device\): make room") as error:
        tables.save(large(), STEM, "antonyms", ORIGIN, disk)
    one_sentence(str(error.value))
    path = disk / STEM / tables.MODEL / "antonyms.parquet"
    assert path.read_bytes() == older and scratch(disk) == []
    filler.unlink()
    assert tables.save(large(), STEM, "antonyms", ORIGIN, disk).read_bytes() != older


def test_on_a_full_disk_an_older_checkpoint_stays(disk):
    files.seal(disk / "a.checkpoint", b"older")
    filler = fill(disk, 4096)
    with pytest.raises(files.FileError, match="No space left"):
        files.seal(disk / "a.checkpoint", os.urandom(50_000))
    assert files.unsealed(disk / "a.checkpoint") == b"older" and scratch(disk) == []
    filler.unlink()
    files.seal(disk / "a.checkpoint", b"newer")
    assert files.unsealed(disk / "a.checkpoint") == b"newer"


def test_on_a_full_disk_nothing_is_exported(exported, disk):  # noqa: F811
    filler = fill(disk, 4096)
    with pytest.raises(exports.ExportError, match="make room") as error:
        exports.save(exported, disk / "vector")
    one_sentence(str(error.value))
    assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    assert torch.equal(exports.load(exports.save(exported, disk / "vector")).vector, exported.vector)


def test_on_a_full_disk_a_run_says_so_in_one_line_and_the_older_copy_stays(disk, tmp_path, capsys):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells = [new_markdown_cell("# A run"), new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
             new_code_cell("print('x' * 60_000)")]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "01_run.ipynb")
    words = [str(tmp_path / "01_run.ipynb"), "-o", str(disk / "run.ipynb")]
    assert runs.main(words) == 0
    older = (disk / "run.ipynb").read_bytes()
    filler = fill(disk, 8192)
    capsys.readouterr()
    assert runs.main(words) == 1
    said = capsys.readouterr().err
    one_sentence(said)
    assert "No space left on device" in said and "make room" in said
    assert (disk / "run.ipynb").read_bytes() == older and scratch(disk) == []
    filler.unlink()
    assert runs.main(words) == 0


def test_where_no_file_can_be_made_a_model_is_not_converted(disk, shelf, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NB_CACHE", str(disk))
    monkeypatch.syspath_prepend(str(shelf.folder))
    monkeypatch.setitem(models.EMBEDDED, "toy", entry(shelf.sha256))
    resized(disk, "size=4g,nr_inodes=7")  # so much room is asked for; the disk is full of files
    with pytest.raises(models.ModelError, match="No space left") as error:
        models.load("toy")
    one_sentence(str(error.value))
    assert scratch(disk) == [] and not (disk / "models/toy").exists()
    resized(disk, "nr_inodes=1000")
    assert models.load("toy").n_layers == 2


def test_a_file_that_may_not_grow_further_is_a_full_disk(tmp_path):
    files.write(tmp_path / "file", b"older")
    script = textwrap.dedent("""
        import resource, signal, sys
        from nb_utils import files
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            files.write(sys.argv[1], b"x" * 5000)
        except files.FileError as error:
            print(error)
    """)
    words = [sys.executable, "-c", script, str(tmp_path / "file")]
    said = subprocess.run(words, capture_output=True, text=True, env=environment(tmp_path))
    assert "could not be written (File too large): make room" in said.stdout, said.stderr
    assert (tmp_path / "file").read_bytes() == b"older" and scratch(tmp_path) == []


@long
@pytest.mark.parametrize("name", ["training", "evidence"])
def test_on_a_full_disk_a_command_ends_in_one_sentence_and_goes_on_when_there_is_room(tmp_path, disk, name):
    command, out = JOBS[name](tmp_path / "whole")
    finish(command, tmp_path / "whole").communicate()
    expected = contents(out)
    command, out = JOBS[name](disk)
    filler = fill(disk, 8192)
    process = finish(command, disk)
    said, _ = process.communicate()
    last = said.strip().splitlines()[-1]
    assert process.returncode == 1 and "No space left on device" in last and "make room" in last, said
    assert "Traceback" not in said and scratch(disk) == []
    filler.unlink()
    resized(disk, "size=20m")
    assert finish(command, disk).wait() == 0
    assert contents(out) == expected != {}


# --- damaged files ---------------------------------------------------------------------------------------------------


def damages(data, count, seed):
    """Yield copies of some bytes: a bit changed at a random place, or the end cut off."""
    rng = random.Random(seed)
    for number in range(count):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(changed) if number % 4 else data[: rng.randrange(len(data))]


def test_a_damaged_table_is_named_or_reads_as_it_was(tmp_path):
    path = tables.save(large(), STEM, "antonyms", ORIGIN, tmp_path)
    data, frame, origin = path.read_bytes(), tables.load(STEM, folder=tmp_path), tables.read_provenance(path)
    named = 0
    for damaged in damages(data, 300, seed=1):
        path.write_bytes(damaged)
        try:
            found = tables.load(STEM, folder=tmp_path)
        except tables.TableError as error:
            one_sentence(str(error))
            assert "antonyms.parquet is damaged" in str(error) and "delete it" in str(error)
            named += 1
        else:
            pd.testing.assert_frame_equal(found, frame)
            assert tables.read_provenance(path) == origin
    assert named > 290


def test_a_damaged_table_without_a_hash_gives_a_table_or_a_table_error(tmp_path):
    path = tmp_path / STEM / tables.MODEL / "antonyms.parquet"
    path.parent.mkdir(parents=True)
    made().to_parquet(path)
    for damaged in damages(path.read_bytes(), 200, seed=2):
        path.write_bytes(damaged)
        try:
            tables.load(STEM, folder=tmp_path)
        except tables.TableError as error:
            one_sentence(str(error))


def test_damaged_weights_or_settings_of_an_sae_are_never_used(tiny, tmp_path):
    from test_saes import saved

    folder = saved(tmp_path / "sae")
    files.describe(folder, ["cfg.json", "sae_weights.safetensors"])
    before = saes.load(tiny, folder, 2)
    for name in ("cfg.json", "sae_weights.safetensors", "manifest.json"):
        data = (folder / name).read_bytes()
        for damaged in damages(data, 30, seed=3):
            (folder / name).write_bytes(damaged)
            try:
                found = saes.load(tiny, folder, 2)
            except saes.SaeError as error:
                one_sentence(str(error))
            else:
                assert name == "manifest.json" and torch.equal(found.W_enc, before.W_enc)
        (folder / name).write_bytes(data)
    (folder / "cfg.json").unlink()
    with pytest.raises(saes.SaeError):
        saes.load(tiny, folder, 2)


def test_the_shipped_saes_are_those_of_their_manifests():
    folders = sorted(path.parent for path in saes.shipped().glob("*/*/cfg.json"))
    assert folders and all(set(files.check(folder)) == {"cfg.json", "sae_weights.safetensors"} for folder in folders)


def test_damaged_files_of_a_model_are_never_used(shelf, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NB_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(shelf.folder))
    monkeypatch.setitem(models.EMBEDDED, "toy", entry(shelf.sha256))
    before, folder = models.load("toy").sha256, tmp_path / "models/toy"
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for damaged in damages(data, 12, seed=4):
            path.write_bytes(damaged)
            try:
                found = models.load("toy")
            except models.ModelError as error:
                one_sentence(str(error))
                assert f"delete {folder}" in str(error)
            else:
                assert path.name == "manifest.json" and found.sha256 == before
        path.unlink()
        with pytest.raises(models.ModelError, match="delete"):
            models.load("toy")
        path.write_bytes(data)
    (folder / "manifest.json").write_text('{"files": ["model.safetensors"]}')
    with pytest.raises(models.ModelError, match=r"manifest\.json is damaged"):
        models.load("toy")


def test_a_damaged_checkpoint_is_made_anew(tiny, tmp_path, caplog):
    text = collect_evidence.showable(corpus(), tiny.tokenizer, 20 * collect_evidence.WIDTH)
    loaded, path = [saes.random(tiny, 1)], tmp_path / "state.checkpoint"
    whole = collect_evidence.collect(tiny, loaded, text, path)[1]
    data = path.read_bytes()
    for damaged in damages(data, 8, seed=5):
        path.write_bytes(damaged)
        again = collect_evidence.collect(tiny, loaded, text, path)[1]
        assert torch.equal(again.value, whole.value) and torch.equal(again.fired, whole.fired)
        assert path.read_bytes() == data
    assert f"{path} is damaged: it is made anew." in caplog.text


def test_a_damaged_corpus_is_named(tmp_path):
    path = cache_with_corpus(tmp_path) / "corpus/documents.parquet"
    files.describe(path.parent, [path.name])
    data = path.read_bytes()
    for damaged in damages(data, 20, seed=6):
        path.write_bytes(damaged)
        with pytest.raises(build_corpus.CorpusError, match=r"damaged: run `python -m workflow\.build_corpus` again"):
            build_corpus.read(path.parent)
    (path.parent / "manifest.json").unlink()
    path.write_bytes(data[:1000])
    with pytest.raises(build_corpus.CorpusError, match="damaged"):
        build_corpus.read(path.parent)


def test_a_command_meets_a_damaged_corpus_with_one_sentence(tmp_path, monkeypatch):
    path = cache_with_corpus(tmp_path) / "corpus/documents.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setenv("NB_CACHE", str(tmp_path))
    for command in (train_saes.main, collect_evidence.main):
        with pytest.raises(SystemExit) as said:
            command(["--model", "tiny", "--layers", "1"])
        one_sentence(str(said.value))


# --- input that makes no sense ---------------------------------------------------------------------------------------


fuzz = settings(max_examples=300 if LONG else 60, deadline=3000, derandomize=True, database=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6), max_leaves=6,
    extend=lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)  # fmt: skip


shown = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
hostile = st.text(max_size=12) | shown | st.sampled_from([
    "$(touch INJECTED)", "a;touch INJECTED", "it's", '"', "a b", "-p", "*", "a,b", "a\nb", "a\r\tb", "{x}", "{{", "%s",
    "`x`", "<img src=x onerror=alert(1)>", "$x$", "\u202eabc", "אב", "日本語", "👩\u200d🚀", "a\0b", "\ud800",
    "x" * 300, "", " ", ".", "..", "a/b", "../a", "a\\b", "CON", "con.json",
])  # fmt: skip
file_names = hostile.filter(lambda text: "/" not in text and text != "..")  # written to, so they stay where they belong


@fuzz
@given(text=st.text() | st.lists(st.text(max_size=12)).map("\n".join) | json_values.map(json.dumps))
def test_any_pasted_text_gives_a_task_or_a_task_error(text):
    try:
        task = tasks.parse(text)
    except tasks.TaskError as error:
        one_sentence(str(error))
    else:
        assert len(task.pairs) >= tasks.MIN_PAIRS


def placed(path, data):
    """Write a file where its name can be one; return its path."""
    with contextlib.suppress(OSError, ValueError):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return path


@fuzz
@given(data=st.data())
def test_a_task_of_any_name_title_and_words_loads_as_it_says_or_is_a_task_error(tmp_path_factory, data):
    pairs = {f"x{i}": f"y{i}" for i in range(20)} | {data.draw(hostile): data.draw(hostile)}
    fields = data.draw(st.dictionaries(st.sampled_from(["name", "title", "licence", "origin", "category"]), hostile))
    record = {"pairs": [{"input": x, "output": y} for x, y in pairs.items()], **fields} if fields else pairs
    path = tmp_path_factory.getbasetemp() / f"{data.draw(file_names)}.json"
    try:
        task = tasks.load(placed(path, json.dumps(record).encode()))
    except tasks.TaskError as error:
        one_sentence(str(error))
        return
    said = {field: text.strip() for field, text in fields.items()}
    assert task.name == slug(said.pop("name", path.stem.strip()), path.read_bytes())
    assert {field: getattr(task, field) for field in said} == said | (
        {"title": visible(said["title"])} if "title" in said else {})
    texts = [task.name, task.title, task.licence, task.origin, task.category]
    texts += [text for pair in task.pairs for text in (pair.x, *pair.answers)]
    assert all(text == text.strip() and len(text.splitlines()) == 1 and "\0" not in text for text in texts)
    assert "/" not in task.name and len(task.pairs) >= tasks.MIN_PAIRS


@fuzz
@given(data=st.data(), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]))
def test_any_lines_in_a_task_file_give_a_task_or_a_task_error(tmp_path_factory, data, suffix):
    mark = {".csv": ",", ".tsv": "\t"}.get(suffix)
    cells = st.lists(hostile | json_values.map(json.dumps), min_size=1, max_size=3)
    lines = data.draw(st.lists(cells.map((mark or " ").join), max_size=6))
    row = f"{{}}{mark}{{}}" if mark else '["{}", "{}"]'
    known = [f"input{mark}output"] * bool(mark) + [row.format(f"x{i}", i) for i in range(20)]
    text = "\n".join(data.draw(st.permutations(lines + known) | st.just(known + lines)))
    try:
        task = tasks.load(placed(tmp_path_factory.getbasetemp() / f"mine{suffix}", text.encode("utf-8", "replace")))
    except tasks.TaskError as error:
        one_sentence(str(error))
    else:
        assert len(task.pairs) >= tasks.MIN_PAIRS


@fuzz
@given(data=st.data())
def test_an_sae_of_any_name_and_words_loads_as_what_it_says_or_is_a_sae_error(tiny, header_folder, data):
    source, weights = header_folder
    config = json.loads((source / "cfg.json").read_text())
    words = hostile | json_values
    keys = """architecture activation_fn activation_fn_str activation_fn_kwargs k normalize_activations dtype device
        reshape_activations finetuning_scaling_factor rescale_acts_by_decoder_norm""".split()
    config |= data.draw(st.dictionaries(st.sampled_from(keys) | hostile, words, max_size=2))
    keys = "model_name hook_name hook_name_out hook_head_index model_from_pretrained_kwargs model_sha256".split()
    config["metadata"] |= data.draw(st.dictionaries(st.sampled_from(keys) | hostile, words, max_size=2))
    folder = source.parent / data.draw(file_names)
    placed(folder / "cfg.json", json.dumps(config).encode())
    placed(folder / "sae_weights.safetensors", weights)
    try:
        found = saes.load(tiny, folder, 2)
    except saes.SaeError as error:
        one_sentence(str(error))
    else:
        assert found.name == folder.resolve().name and found.architecture == config["architecture"] == "jumprelu"
        assert config.get("activation_fn") in (None, "relu", "jumprelu")
        assert config["normalize_activations"] in (None, False, "none")


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 50_000, "1" * 5_000_000, '{"a": NaN}', '{"a": 1e999}', "[" + "{}," * 100_000 + "{}]",
     "{" + ", ".join('"same": "pair"' for _ in range(100_000)) + "}", '"' + "x" * 5_000_000 + '"'],
    ids=["deep lists", "deep objects", "a long number", "NaN", "infinity", "many", "one key again and again", "long"],
)  # fmt: skip
def test_a_monstrous_task_file_is_refused_in_one_line_and_soon(tmp_path, text):
    (tmp_path / "task.json").write_text(text)
    start = time.process_time()
    with pytest.raises(tasks.TaskError) as error:
        tasks.load(tmp_path / "task.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.process_time() - start < 5


@fuzz
@given(data=st.data())
def test_any_header_of_weights_loads_or_is_a_sae_error(tiny, header_folder, data):
    folder, weights = header_folder
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    name = data.draw(st.sampled_from(sorted(header)))
    part = header[name] if data.draw(st.booleans()) and isinstance(header[name], dict) else header
    key = data.draw(st.sampled_from(sorted(part)))
    part[key] = data.draw(json_values | st.sampled_from(["F16", "I64", "BOOL", [3, 4], [0], [-1, 2], [0, 10**18]]))
    written = json.dumps(header).encode()
    (folder / "sae_weights.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + weights[end:])
    try:
        found = saes.load(tiny, folder, 2)
    except saes.SaeError as error:
        one_sentence(str(error))
    else:
        assert found.decode(found.encode(torch.randn(2, found.d_in))).shape == (2, found.d_in)


@pytest.fixture(scope="module")
def header_folder(tmp_path_factory):
    from test_saes import saved

    folder = saved(tmp_path_factory.mktemp("sae"))
    return folder, (folder / "sae_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def export_folder(exported, tmp_path_factory):  # noqa: F811
    return exports.save(exported, tmp_path_factory.mktemp("export") / "vector")


tensors = st.sampled_from([
    torch.zeros(32), torch.zeros(0), torch.zeros(2, 16), torch.full((3,), torch.nan), torch.tensor([1, 70, -3]),
    torch.tensor([0.5, 1.5, 2.5]), torch.tensor([True, False, True]), torch.tensor(3), torch.zeros(3, dtype=torch.int8),
    torch.zeros(32, dtype=torch.float64), torch.tensor([1, 2, 3], dtype=torch.int32), torch.zeros(32, dtype=torch.half),
])  # fmt: skip


@fuzz
@given(data=st.data())
def test_any_exported_folder_loads_or_is_an_export_error(export_folder, tiny, sae, data):  # noqa: F811
    card = json.loads((export_folder / "card.json").read_text())
    kept = exports.load(export_folder)
    parts = {"vector": kept.vector, "latents": kept.latents, "weights": kept.weights}
    for name in data.draw(st.sets(st.sampled_from(sorted(parts)))):
        parts[name] = data.draw(tensors)
    weights = save_tensors({name: tensor.clone() for name, tensor in parts.items()})
    for key in data.draw(st.sets(st.sampled_from(sorted(card)), max_size=2)):
        card[key] = data.draw(json_values | hostile)
    card["sha256"] = hashlib.sha256(weights).hexdigest()  # the hash is right: what it vouches for need not be
    folder = export_folder.with_name("fuzzed")
    folder.mkdir(exist_ok=True)
    (folder / "vector.safetensors").write_bytes(weights)
    (folder / "card.json").write_text(json.dumps(card))
    try:
        said = exports.load(folder, tiny, sae).card
    except exports.ExportError as error:
        one_sentence(str(error))
    else:
        assert all(map(math.isfinite, (said.loss, said.zero_shot_loss, said.scale, *said.features.values())))


@fuzz
@given(task=hostile, licence=hostile, prompt=hostile, name=file_names)
def test_a_vector_of_any_task_survives_its_export_or_is_an_export_error(export_folder, task, licence, prompt, name):
    kept = exports.load(export_folder)
    card = dataclasses.replace(kept.card, task=task, licence=licence, heldout=((prompt, task),))
    folder = export_folder.parent / "named" / name
    try:
        saved = exports.save(exports.Vector(kept.vector, kept.latents, kept.weights, card), folder)
        assert exports.load(saved).card == card
        with pytest.raises(exports.ExportError) as again:
            exports.save(kept, folder)
        one_sentence(str(again.value))
    except exports.ExportError as error:
        one_sentence(str(error))
    shutil.rmtree(export_folder.parent / "named", ignore_errors=True)


# --- an interrupted installation -------------------------------------------------------------------------------------


@long
def test_an_installation_killed_before_its_commands_are_there_is_gone_on_with(tmp_path):
    """pip takes a package for installed once its METADATA is there; a kill then leaves it without its commands."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nb_utils", "workflow", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name in ("README.md", "LICENSE", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "requirements.txt").write_text("nbstripout\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    make = ["make", ".venv/installed"]
    process = subprocess.Popen(make, cwd=tmp_path, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True)
    half = None
    while process.poll() is None and half is None:
        found = tmp_path.glob(".venv/lib/python3*/site-packages/*.dist-info")
        half = next((p for p in found if not p.name.startswith(("pip", "setuptools"))
                     and (p / "METADATA").exists() and not (p / "RECORD").exists()), None)  # fmt: skip
    if half is None:
        pytest.skip(f"nothing could be installed here: {process.stderr.read()[-200:]}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / ".venv/installed").exists()
    done = subprocess.run(make, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv/bin/nbstripout").exists() and (half / "RECORD").exists()
