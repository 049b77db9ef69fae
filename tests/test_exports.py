"""Exported vectors: whole or not at all, checked when read, and usable without any of our code."""

import ast
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import export_code
from gguf import GGUFReader
from huggingface_hub import ModelCard

from nb_utils import engine, exports, saes, tasks, workbench
from nb_utils.exports import ExportError

LAYER = 3


@pytest.fixture(scope="module")
def sae(tiny):
    return saes.random(tiny, LAYER)


@pytest.fixture(scope="module")
def exported(tiny, sae):
    task = tasks.parse("\n".join(f"in{i} -> out{i}" for i in range(20)))
    bench = workbench.prepare(task, LAYER, tiny, sae)
    return workbench.pack(bench.trial, workbench.Weighted((3, 17, 40), (1.5, -0.5, 2.0), False, 0.0))


@pytest.fixture
def folder(exported, tmp_path):
    return exports.save(exported, tmp_path / "made" / "vector")


def test_a_vector_survives_the_way_to_a_folder_and_back(exported, folder, tiny, sae):
    found = exports.load(folder, tiny, sae)
    assert torch.equal(found.vector, exported.vector) and found.card == exported.card
    trial, weighted = workbench.restore(found, tiny, sae)
    assert weighted.latents == (3, 17, 40)
    assert workbench.loss(trial, weighted) == pytest.approx(found.card.loss, abs=1e-4)
    assert found.card.loss != pytest.approx(found.card.zero_shot_loss, abs=1e-3)


def test_the_card_says_where_the_vector_belongs(folder, tiny, sae):
    card = json.loads((folder / "card.json").read_text())
    assert card["where"] == (
        "added to the residual stream after block 3 (blocks.3.hook_resid_post), "
        "at the last token of the prompt and no other"
    )
    assert (card["model"], card["layer"], card["hook_name"]) == ("tiny", LAYER, f"blocks.{LAYER}.hook_resid_post")
    assert card["features"] == {"3": 1.5, "17": -0.5, "40": 2.0}
    assert (card["model_sha256"], card["sae_sha256"]) == (tiny.sha256, sae.sha256)
    assert card["licence"] and len(card["heldout"]) == 6


def test_the_card_says_where_the_vector_stands_by_other_counts_and_what_it_does_elsewhere(folder, exported, tiny):
    card = json.loads((folder / "card.json").read_text())
    assert card["bos"] == "<bos>" and "hidden_states it is layer + 1" in card["counted"]
    block = dict(tiny.hf.base_model.named_modules())[card["module"]]
    assert block is tiny.layout.blocks[LAYER]
    ids = torch.tensor([[2, 9, 17]])
    seen, twin = [], tiny.to(tiny.dtype)  # transformers leaves hooks of its own where it has given hidden states
    with twin.layout.hooked(LAYER, seen.append):
        entries = twin.hf(ids, output_hidden_states=True).hidden_states
    assert torch.equal(entries[LAYER + 1], seen[0])
    losses = card["losses"]
    assert set(losses) == set(exports.PLACES) and losses["last"] == pytest.approx(card["loss"], abs=1e-4)
    assert len({round(loss, 3) for loss in losses.values()}) == 4


def test_a_place_is_what_its_words_say(exported, tiny, sae):
    """Each loss once more, one prompt at a time, by `engine.steer`."""
    at = {"last": lambda n, end: [n - 1], "every": lambda n, end: list(range(end)),
          "onward": lambda n, end: list(range(n - 1, end)), "after": lambda n, end: list(range(n, end))}  # fmt: skip
    for name, tokens in at.items():
        total = 0
        for prompt, answer in exported.card.heldout:
            n, ids = len(tiny.tokenizer(prompt).input_ids), tiny.tokenizer(f"{prompt} {answer}").input_ids
            with engine.steer(tiny, exported.vector, LAYER, at=tokens(n, len(ids))):
                said = tiny.hf(torch.tensor([ids])).logits[0, n - 1 : -1].log_softmax(-1)
            total -= said.gather(1, torch.tensor(ids[n:])[:, None])[:2].sum().item()
        assert total / len(exported.card.heldout) == pytest.approx(exported.card.losses[name], abs=1e-4), name


def test_the_control_vector_holds_one_direction_at_the_number_of_its_block(folder, exported):
    reader = GGUFReader(folder / exports.CONTROL)
    (tensor,) = reader.tensors
    assert tensor.name == f"direction.{LAYER}" and tensor.tensor_type.name == "F32"
    assert torch.equal(torch.tensor(tensor.data), exported.vector)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "gemma3_text"


@pytest.mark.parametrize("change", [{"layer": 0}, {"mode": "replace"}])
def test_what_a_control_vector_cannot_say_is_not_written_as_one(exported, tmp_path, change):
    other = dataclasses.replace(exported, card=dataclasses.replace(exported.card, **change))
    folder = exports.save(other, tmp_path / "other")
    assert not (folder / exports.CONTROL).exists() and "llama" not in exports.readme(other).partition("## repeng")[2]
    assert "control-vector.gguf" not in (folder / exports.README).read_text()


def test_the_readme_is_a_model_card_whose_code_can_be_read_and_no_file_is_a_pickle(folder, exported):
    found = ModelCard.load(folder / exports.README)
    assert found.data.license == "other" and "sparse-autoencoder" in found.data.tags
    blocks = re.findall(r"```python\n(.*?)```", found.text, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        ast.parse(block)
    every = f"| {exported.card.losses['every']:.4f} |"
    assert all(words in found.text for words in (every, "counted from 0", "&#60;bos&#62;, once", "steering-vectors"))
    assert not [path for path in folder.iterdir() if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")]


def test_what_a_card_says_is_text_in_the_readme_and_a_string_in_its_code(exported, tmp_path):
    nasty = 'a"b`<script>$x\n```\n# c'
    names = ("task", "model", "hub_name", "module", "model_type", "mode", "place", "bos", "licence")
    card = dataclasses.replace(exported.card, **dict.fromkeys(names, nasty))
    text = exports.readme(dataclasses.replace(exported, card=card))
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 4 and "<script>" not in re.sub(r"(?s)^---.*?---\n|```python.*?\n```", "", text)
    said = [node.value for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert said.count(nasty) == 3


def test_a_card_of_an_earlier_version_is_read(folder, exported):
    card = json.loads((folder / "card.json").read_text())
    later = {"counted", "module", "model_type", "hub_name", "bos", "losses"}
    (folder / "card.json").write_text(json.dumps({name: card[name] for name in card.keys() - later}))
    assert exports.load(folder).card.loss == exported.card.loss and exports.load(folder).card.losses == {}


def test_an_existing_folder_is_never_overwritten(exported, folder):
    with pytest.raises(ExportError, match="exists already"):
        exports.save(exported, folder)


def test_a_failed_write_leaves_nothing_behind(exported, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports.files.os, "rename", full)
    with pytest.raises(ExportError, match="No space left"):
        exports.save(exported, tmp_path / "vector")
    assert list(tmp_path.iterdir()) == []


NAMES = [
    "$(touch INJECTED)", "a; b", "it's \"q\"", "{x} [a]*", "<img src=x>", "two words é", "שלום \u202eabc", "日本語",
    "-p", "a\nb",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_written_and_read(exported, tmp_path, name):
    folder = exports.save(exported, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name] and exports.load(folder).card == exported.card


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "/dev/null/x", "/proc/x", "/", ".", ".."])
def test_a_folder_that_cannot_be_is_refused_in_one_sentence_and_soon(exported, name):
    start = time.monotonic()
    with pytest.raises(ExportError, match=r"could not be written|exists already") as caught:
        exports.save(exported, name)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 30


def test_a_tilde_is_the_home(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert exports.save(exported, "~/v") == tmp_path / "v" and exports.load("~/v").card == exported.card


@pytest.mark.parametrize("name", ["", "  "])
def test_a_folder_needs_a_name(exported, name):
    with pytest.raises(ExportError, match="no name"):
        exports.save(exported, name)


def change(folder, **fields):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **fields}))


def cut(folder):
    (folder / "vector.safetensors").write_bytes((folder / "vector.safetensors").read_bytes()[:-8])


DAMAGE = {
    "no vector": (lambda f: (f / "vector.safetensors").unlink(), "There is no"),
    "no card": (lambda f: (f / "card.json").unlink(), "There is no"),
    "not JSON": (lambda f: (f / "card.json").write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / "card.json").write_text("[]"), "not a card of the format"),
    "another format": (lambda f: change(f, format="other/9"), "not a card of the format"),
    "cut": (cut, "does not match the hash"),
    "layer is text": (lambda f: change(f, layer="3"), "no usable 'layer'"),
    "layer is true": (lambda f: change(f, layer=True), "no usable 'layer'"),
    "a loss that is no number": (lambda f: change(f, loss=math.nan), "no usable 'loss'"),
    "a scale without end": (lambda f: change(f, scale=math.inf), "no usable 'scale'"),
    "a scale that is true": (lambda f: change(f, scale=True), "no usable 'scale'"),
    "losses are text": (lambda f: change(f, losses={"last": "0"}), "of held-out pairs, features or losses"),
    "weights are text": (lambda f: change(f, features={"3": "<b>"}), "of held-out pairs, features or losses"),
    "held-out pairs are one": (lambda f: change(f, heldout=["a ->"]), "no usable list of held-out pairs"),
    "another model": (lambda f: change(f, model_sha256="0"), "made for other weights"),
    "a layer too high": (lambda f: change(f, layer=99), "does not fit"),
    "another SAE": (lambda f: change(f, sae_sha256="0"), "another SAE"),
    "another bias": (lambda f: change(f, bias=True), "don't add up"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(folder, tiny, sae, name):
    damage, says = DAMAGE[name]
    damage(folder)
    with pytest.raises(ExportError, match=says) as caught:
        exports.load(folder, tiny, sae)
    assert "\n" not in str(caught.value)


def test_the_code_on_the_page_finds_the_loss_of_the_card(exported, folder, tiny, tmp_path):
    code = export_code()
    assert "nb_utils" not in code and "sae" not in code
    home = tmp_path / "elsewhere"
    shutil.copytree(folder, home / "my-vector")
    tiny.hf.save_pretrained(home / ".cache/models/gemma-3-270m")
    tiny.tokenizer.save_pretrained(home / ".cache/models/gemma-3-270m")
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, said = map(float, done.stdout.split())
    assert said == exported.card.loss
    assert found == pytest.approx(said, abs=1e-4)
