"""Evidence for features: collected as a brute-force pass finds it, whole after a kill, shown as text."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from nb_utils import saes
from nb_utils.record import tables
from workflow import collect_evidence
from workflow.collect_evidence import EXAMPLES, WIDTH, EvidenceError

ROOT = tables.ROOT
LAYERS = (1, 4)
WORDS = "the cat sat on a très vieux 猫 <script> &lt; `x` $y$ *z* mat\n".split(" ")


def corpus(documents=23, seed=0):
    """Documents of 100 to 700 words; some may not be shown, some were trained on."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "source": [f"source-{i % 3}" for i in range(documents)],
            "language": [("en", "fr")[i % 2] for i in range(documents)],
            "split": ["train" if i % 7 == 3 else "heldout" for i in range(documents)],
            "showable": [i % 5 != 4 for i in range(documents)],
            "text": [" ".join(rng.choice(WORDS, rng.integers(20, 500))) for _ in range(documents)],
        }
    )


@pytest.fixture(scope="module")
def loaded(tiny):
    return [saes.random(tiny, layer) for layer in LAYERS]


@pytest.fixture(scope="module")
def text(tiny):
    return collect_evidence.showable(corpus(), tiny.tokenizer, 60 * WIDTH)


@pytest.fixture(scope="module")
def tallies(tiny, loaded, text, tmp_path_factory):
    return collect_evidence.collect(tiny, loaded, text, tmp_path_factory.mktemp("cache") / "state.safetensors")


@torch.no_grad()
def brute_force(model, sae, text):
    """Encode each sequence alone with the bridge's own cache: codes [sequences, WIDTH, d_sae]."""
    found = []
    for row in text.rows:
        _, cache = model.bridge.run_with_cache(row[None], names_filter=sae.hook_name)
        found.append(sae.encode(cache[sae.hook_name][0, 1:]))
    return torch.stack(found)


def test_only_text_that_is_held_out_and_may_be_shown_is_read(text):
    frame = corpus()
    allowed = frame[(frame["split"] == "heldout") & frame["showable"]]["text"].tolist()
    assert text.documents["text"].tolist() == allowed
    assert len(set(text.document)) > EXAMPLES


def test_a_sequence_is_one_run_of_one_document_after_bos(tiny, text):
    assert len(text.rows) == 60
    for row, which, start in zip(text.rows, text.document, text.start, strict=True):
        assert row[0] == tiny.tokenizer.bos_token_id
        ids = tiny.tokenizer(text.documents["text"][which], add_special_tokens=False).input_ids
        assert row[1:].tolist() == ids[start : start + WIDTH]
    assert len({(which, start) for which, start in zip(text.document, text.start, strict=True)}) == 60


def test_too_little_text_is_refused_with_what_there_is(tiny):
    with pytest.raises(EvidenceError, match=r"Only [\d,]+ tokens of held-out text may be shown"):
        collect_evidence.showable(corpus(), tiny.tokenizer, 10_000_000)


def test_chunks_are_runs_of_whole_documents(text):
    runs = list(collect_evidence.chunks(text.document))
    assert [first for first, _ in runs] == [0, *(end for _, end in runs[:-1])]
    assert runs[-1][1] == len(text.rows)
    assert all(text.document[end - 1] != text.document[end] for _, end in runs[:-1])
    assert all(end - first >= collect_evidence.SEQUENCES for first, end in runs[:-1])


@pytest.mark.parametrize("which", range(len(LAYERS)))
def test_density_and_examples_are_those_of_a_brute_force_pass(tiny, loaded, text, tallies, which):
    sae = loaded[which]
    tally, codes = tallies[sae.layer], brute_force(tiny, sae, text)
    # A pre-activation at the very threshold may fall on either side when batches differ.
    assert ((tally.fired - (codes > 0).sum((0, 1))).abs() <= 2).all()
    assert tally.fired.sum() > 1000
    best = torch.stack([codes[text.document == d].amax((0, 1)) for d in np.unique(text.document)])
    expected = best.sort(dim=0, descending=True).values[:EXAMPLES]
    torch.testing.assert_close(tally.value, expected, rtol=1e-3, atol=1e-3)
    for latent in range(sae.d_sae):
        ats = tally.at[:, latent]
        ats = ats[ats >= 0]
        assert len(set(text.document[ats // WIDTH])) == len(ats)  # each from another document
        there = codes[ats // WIDTH, ats % WIDTH, latent]
        torch.testing.assert_close(there, tally.value[: len(ats), latent], rtol=1e-3, atol=1e-3)


def test_a_latent_that_never_fires_has_no_example(tiny, text, tmp_path):
    sae = saes.random(tiny, 1)
    sae.threshold[5] = float("inf")
    tally = collect_evidence.collect(tiny, [sae], text, tmp_path / "state.safetensors")[1]
    frame = collect_evidence.frame(tiny, sae, text, tally, tmp_path)
    assert (frame["density"][5], frame["largest"][5], frame["examples"][5]) == (0, 0, [])
    tables.save(frame, "features", "blocks.1", {}, tmp_path, "tiny")
    assert len(tables.load("features", "tiny", tmp_path)["examples"][5]) == 0


def test_equal_activations_keep_the_earlier_document():
    tally = collect_evidence.Tally.empty(1)
    for document in range(7):
        tally.add(torch.tensor([[0.0], [2.0]]), first=10 * document)
    assert tally.at[:, 0].tolist() == [1, 11, 21, 31, 41]
    assert tally.fired.item() == 7


def test_examples_are_cut_from_the_text_at_the_firing_token(loaded, text, tallies):
    for at in tallies[4].at.flatten().tolist():
        found = collect_evidence.example(text, at, 1.0)
        whole = text.documents["text"][text.document[at // WIDTH]]
        assert found["before"] + found["token"] + found["after"] in whole
        assert found["token"]
        assert found["source"] in ("source-0", "source-1", "source-2")


def test_a_part_of_a_character_is_shown_as_the_whole_character(tiny):
    documents = corpus().assign(text="é猫" * 200, split="heldout", showable=True)
    text = collect_evidence.showable(documents, tiny.tokenizer, 3 * WIDTH)
    for at in range(3 * WIDTH):
        found = collect_evidence.example(text, at, 1.0)
        assert found["token"] in ("é", "猫")
        assert set(found["before"] + found["after"]) <= {"é", "猫"}


def command(cache, out, *more):
    options = ["--model", "tiny", "--layers", "1,4", "--tokens", "30000", "--checkpoint-seconds", "0", "--out", out]
    environment = {**os.environ, "NB_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "workflow.collect_evidence", *map(str, options), *more], environment


def finished(cache, out):
    said, environment = command(cache, out)
    done = subprocess.run(said, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [path.read_bytes() for path in sorted((out / "features/tiny").glob("*.parquet"))], done.stderr


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache/corpus").mkdir(parents=True)
    corpus(150).to_parquet(tmp_path / "cache/corpus/documents.parquet")
    return tmp_path / "cache"


def test_a_killed_run_goes_on_and_gives_the_same_tables(cache, tmp_path):
    said, environment = command(cache, tmp_path / "killed")
    running = subprocess.Popen(said, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(cache.glob("evidence/*.checkpoint")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed/features").exists()
    resumed, log = finished(cache, tmp_path / "killed")
    assert not re.search(r"\r? *0%\|[^|]*\| 0\.00/", log.split("logit lens")[0])  # it did not start anew
    for state in cache.glob("evidence/*"):
        state.unlink()
    whole, _ = finished(cache, tmp_path / "whole")
    assert resumed == whole
    assert len(whole) == 2


def test_without_a_corpus_the_command_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="build_corpus"):
        collect_evidence.main(["--model", "tiny"])


def test_tables_hold_a_row_per_latent_and_name_what_they_depend_on(cache, tmp_path, tiny):
    finished(cache, tmp_path / "out")
    frame = tables.load("features", "tiny", tmp_path / "out")
    assert frame.groupby("layer").size().to_dict() == {1: 64, 4: 64}
    assert frame["density"].between(0, 1).all()
    example = next(found for found in frame["examples"] if len(found))[0]
    assert set(example) == {"before", "token", "after", "activation", "source", "language"}
    origin = tables.read_provenance(tmp_path / "out/features/tiny/blocks.4.parquet")
    assert origin["model_sha256"] == tiny.sha256
    assert origin["sae_sha256"] == {"4": saes.random(tiny, 4).sha256}
    assert origin["parameters"]["n_tokens"] >= 30_000
    assert re.fullmatch("[0-9a-f]{64}", origin["parameters"]["corpus_sha256"])
