"""SAEs: our view equals SAELens, sets and layers are found, and every bad file is a SaeError."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from nb_utils import saes, tables
from nb_utils.saes import SaeError
from workflow import measure_saes

D_IN, D_SAE = 32, 96
KINDS = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 7}),
    "topk, rescaled": (TopKSAE, TopKSAEConfig, {"k": 7, "rescale_acts_by_decoder_norm": True}),
}


def random_saelens(kind="jumprelu", hook="blocks.2.hook_resid_post", seed=0, model_name="tiny", **settings):
    sae_class, config_class, own = KINDS[kind]
    settings = {"apply_b_dec_to_input": False} | own | settings
    metadata = SAEMetadata(model_name=model_name, hook_name=hook)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if name == "r_mag" else 1.0)
        if name == "threshold":
            parameter.data = parameter.data.abs() * 3
    return sae


def view(sae):
    return saes.from_saelens(sae, "an SAE", "test", "0" * 64)


def saved(folder, **kwargs):
    random_saelens(**kwargs).save_model(folder)
    return folder


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_equal_those_of_saelens(kind, apply_b_dec_to_input):
    theirs = random_saelens(kind, apply_b_dec_to_input=apply_b_dec_to_input)
    ours = view(theirs)
    x = 3 * torch.randn(5, 40, D_IN)
    codes = theirs.encode(x).detach()
    assert 0 < (codes > 0).float().mean() < 0.9
    close(ours.encode(x), codes)
    close(ours.decode(codes), theirs.decode(codes).detach())
    close(ours.act(ours.pre_activations(x[0, 0])), codes[0, 0])
    close(ours.decode(codes, bias=False) + ours.b_dec, ours.decode(codes))
    assert not any(value.requires_grad for value in vars(ours).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("rescale", [False, True])
def test_a_batchtopk_checkpoint_means_what_saelens_saves_of_it(tmp_path, rescale, tiny):
    config = BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=8, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=True,
        metadata=SAEMetadata(model_name="tiny", hook_name="blocks.2.hook_resid_post"),
    )
    trained = BatchTopKTrainingSAE(config)
    for parameter in trained.parameters():
        parameter.data = torch.randn(parameter.shape)
    trained.topk_threshold += 4.0
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "inference")
    x = torch.randn(50, D_IN)
    theirs = SAE.load_from_disk(tmp_path / "inference")
    assert (theirs.encode(x) > 0).any()
    for folder in ("checkpoint", "inference"):
        ours = saes.load(tiny, tmp_path / folder, 2)
        close(ours.encode(x), theirs.encode(x).detach())
        close(ours.decode(ours.encode(x)), theirs(x).detach())


def test_a_folded_normalisation_is_read_and_an_unfolded_one_refused():
    theirs = random_saelens(normalize_activations="expected_average_only_in")
    with pytest.raises(SaeError, match="normalises its input"):
        view(theirs)
    theirs.fold_activation_norm_scaling_factor(0.25)
    x = torch.randn(9, D_IN)
    close(view(theirs).encode(x), theirs.encode(x).detach())
    with pytest.raises(SaeError, match="layer_norm"):
        view(random_saelens(normalize_activations="layer_norm"))


def test_only_firing_latents_have_a_gradient():
    ours = view(random_saelens())
    pre = ours.pre_activations(torch.randn(D_IN)).requires_grad_()
    ours.act(pre).sum().backward()
    assert torch.equal(pre.grad, (pre > ours.threshold).float())


def test_decoder_directions_have_unit_norm():
    ours = view(random_saelens())
    assert not torch.allclose(ours.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(ours.decoder_directions.norm(dim=1), torch.ones(D_SAE))


def test_a_resid_pre_sae_belongs_to_the_block_before(tmp_path, tiny):
    saved(tmp_path / "a", hook="blocks.3.hook_resid_pre")
    assert saes.layers(tiny, tmp_path) == (2,)
    ours = saes.load(tiny, tmp_path, 2)
    assert (ours.layer, ours.hook_name) == (2, "blocks.3.hook_resid_pre")


def test_the_hook_name_decides_and_not_the_folder(tmp_path, tiny):
    saved(tmp_path / "layer_5", hook="blocks.1.hook_resid_post")
    saved(tmp_path / "mlp", hook="blocks.4.hook_mlp_out")
    saved(tmp_path / ".half-written", hook="blocks.3.hook_resid_post")
    assert saes.layers(tiny, tmp_path) == (1,)
    assert saes.load(tiny, tmp_path, 1).name == "layer_5"
    assert saes.load(tiny, tmp_path / "layer_5", 1).sha256 == saes.load(tiny, str(tmp_path), 1).sha256
    with pytest.raises(SaeError, match="hook_mlp_out"):
        saes.load(tiny, tmp_path / "mlp", 4)


def test_half_precision_weights_are_computed_with_in_single_precision(tmp_path, tiny):
    random_saelens().to(dtype=torch.bfloat16).save_model(tmp_path)
    ours = saes.load(tiny, tmp_path, 2)
    tensors = [value for value in vars(ours).values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize(
    ("sae_set", "layer", "says"),
    [
        ("shiped", 2, "'shipped', 'random', a folder"),
        ("gemma-scope-2b-pt-res-canonicl", 2, "gemma-scope-2b-pt-res-canonical"),
        ("gemma-scope-2b-pt-res-canonical", 40, "only for 0, 1, 2"),
        ("gemma-scope-2b-pt-res-canonical:layer_12", 12, "nearest are layer_12"),
        (__file__, 2, "is a file"),
        (str(Path(__file__).parent), 2, "cfg.json"),
        ("random", 6, "layers 0 to 5"),
    ],
)
def test_a_set_or_layer_that_does_not_exist_says_what_does(tiny, sae_set, layer, says):
    with pytest.raises(SaeError, match=says) as caught:
        saes.load(tiny, sae_set, layer)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_layer_says_which_it_has(tmp_path, tiny):
    saved(tmp_path / "a", hook="blocks.1.hook_resid_post")
    saved(tmp_path / "b", hook="blocks.4.hook_resid_post")
    with pytest.raises(SaeError, match="layer 3, only for 1, 4"):
        saes.load(tiny, tmp_path, 3)


def test_sets_that_do_not_fit_the_model_are_refused(tmp_path, tiny):
    saved(tmp_path / "other", model_name="google/gemma-2-2b")
    saved(tmp_path / "deep", hook="blocks.9.hook_resid_post")
    with pytest.raises(SaeError, match="trained on google/gemma-2-2b"):
        saes.load(tiny, tmp_path / "other", 2)
    assert saes.load(tiny, tmp_path / "other", 2, allow_other_model=True).layer == 2
    with pytest.raises(SaeError, match="6 blocks"):
        saes.load(tiny, tmp_path / "deep", 9)
    wide = SimpleNamespace(name="google/gemma-2-2b", d_model=2304, n_layers=26)
    with pytest.raises(SaeError, match=r"width 32.*width 2304"):
        saes.load(wide, tmp_path / "other", 2, allow_other_model=True)
    with pytest.raises(SaeError, match="No SAEs are shipped for 'google/gemma-2-2b'"):
        saes.load(wide, "shipped", 2)


def test_a_model_is_known_by_its_hub_name_its_alias_and_its_embedded_name(tmp_path):
    for stored, loaded in [
        ("gemma-2-2b", "google/gemma-2-2b"), ("google/gemma-3-270m", "gemma-3-270m"), ("gpt2-small", "gpt2"),
    ]:
        saved(tmp_path, model_name=stored)
        model = SimpleNamespace(name=loaded, d_model=D_IN, n_layers=12)
        assert saes.load(model, tmp_path, 2).layer == 2


def test_a_pickle_or_an_unknown_architecture_is_refused(tmp_path, tiny):
    saved(tmp_path / "pickled")
    os.rename(tmp_path / "pickled/sae_weights.safetensors", tmp_path / "pickled/ae.pt")
    with pytest.raises(SaeError, match=r"ae\.pt, and pickled weights are not loaded"):
        saes.load(tiny, tmp_path / "pickled", 2)
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.2.hook_resid_post")
    pursuit = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE, metadata=metadata))
    pursuit.save_model(tmp_path / "pursuit")
    with pytest.raises(SaeError, match=r"matching_pursuit.*standard, jumprelu, gated, topk"):
        saes.load(tiny, tmp_path / "pursuit", 2)
    broken = random_saelens()
    broken.threshold.data[3] = torch.nan
    broken.save_model(tmp_path / "nan")
    with pytest.raises(SaeError, match="not finite"):
        saes.load(tiny, tmp_path / "nan", 2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One good folder per kind, with its two files in memory, to be damaged."""
    kinds = ("jumprelu", "topk", "gated")
    folders = {kind: saved(tmp_path_factory.mktemp("sae"), kind=kind) for kind in kinds}
    return {
        kind: (folder, (folder / "cfg.json").read_text(), (folder / "sae_weights.safetensors").read_bytes())
        for kind, folder in folders.items()
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["topk", "gated", "batchtopk", "float16", "hook_z", "6.0.0", "blocks.2.hook_z"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, database=None
)


def loads_or_says_why(tiny, folder):
    try:
        ours = saes.load(tiny, folder, 2)
    except SaeError as error:
        assert str(error) and "\n" not in str(error)
    else:  # what does load, works
        assert ours.decode(ours.encode(torch.randn(2, D_IN))).shape == (2, D_IN)


@fuzz
@given(data=st.data())
def test_any_configuration_loads_or_is_a_sae_error(stored, tiny, data):
    folder, config, _ = stored[data.draw(st.sampled_from(list(stored)))]
    changed = json.loads(config)
    for _ in range(data.draw(st.integers(1, 3))):
        inner = changed.get("metadata")
        part = inner if isinstance(inner, dict) and data.draw(st.booleans()) else changed
        key = data.draw(st.sampled_from([*part, "k", "architecture", "hook_name"]))
        if data.draw(st.booleans()):
            part[key] = data.draw(json_values)
        else:
            part.pop(key, None)
    (folder / "cfg.json").write_text(json.dumps(changed))
    loads_or_says_why(tiny, folder)
    (folder / "cfg.json").write_text(config)


@fuzz
@given(data=st.data())
def test_any_bytes_in_place_of_a_file_load_or_are_a_sae_error(stored, tiny, data):
    folder, config, weights = stored["jumprelu"]
    files = [("cfg.json", config.encode()), ("sae_weights.safetensors", weights)]
    file, whole = data.draw(st.sampled_from(files))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    noise = bytearray(whole)
    noise[data.draw(st.integers(0, min(len(whole), 600) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / file).write_bytes(data.draw(st.sampled_from([cut, bytes(noise), b"[" * 100_000])))
    loads_or_says_why(tiny, folder)
    (folder / file).write_bytes(whole)


def test_a_truncated_weight_file_is_called_damaged(tmp_path, tiny):
    weights = saved(tmp_path) / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SaeError, match="damaged"):
        saes.load(tiny, tmp_path, 2)


def test_the_tiny_model_has_sparse_random_saes_on_every_layer(tiny):
    assert saes.layers(tiny) == tuple(range(6))
    for layer in saes.layers(tiny):
        ours = saes.load(tiny, "shipped", layer)
        assert ours.sha256 == saes.load(tiny, "random", layer).sha256
        torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(64))
        rows = measure_saes.windows(np.arange(4000) % 200 + 50, 4, 2)
        x = measure_saes.harvest(tiny.hf, rows, [layer])[layer].float()
        assert 2 < (ours.encode(x) > 0).sum(1).float().mean() < 20
    assert saes.random(tiny, 1, seed=0).sha256 != saes.random(tiny, 1, seed=1).sha256


def test_the_registry_choice_is_narrow_and_near_fifty():
    entries = saes._registry()
    choice = saes._release_layers(entries["gemma-scope-2b-pt-res"])
    assert choice[12] == "gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_41"
    choice = saes._release_layers(entries["gemma-scope-2-270m-pt-res"])
    assert choice == {i: f"gemma-scope-2-270m-pt-res:layer_{i}_width_16k_l0_medium" for i in (5, 9, 12, 15)}
    assert sorted(saes._release_layers(entries["gpt2-small-res-jb"])) == list(range(12))
    assert saes._release_layers(entries["gpt2-small-mlp-tm"]) == {}


GEMMA_SCOPE = """
    import torch
    from types import SimpleNamespace
    from nb_utils import saes

    model = SimpleNamespace(name="google/gemma-2-2b", d_model=2304, n_layers=26)
    sae = saes.load(model, "gemma-scope-2b-pt-res-canonical", 12)
    assert sae.hook_name == "blocks.12.hook_resid_post" and sae.layer == 12, sae.hook_name
    assert sae.sha256 == "hub:gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical", sae.sha256
    x = torch.zeros(2, 2304)
    x[0, :3], x[1, 0] = torch.tensor([4.0, 2.0, 1.0]), 1.4
    codes = sae.encode(x)
    assert codes[0].nonzero().flatten().tolist() == [0, 1] and codes[0, :2].tolist() == [4.0, 2.0]
    assert codes[1].count_nonzero() == 0  # under the threshold
    assert sae.decode(codes)[0, :4].tolist() == [4.5, 2.0, 0.0, 0.0]
    try:
        saes.load(model, "gemma-scope-2b-pt-res-canonical", 13)
    except saes.SaeError as error:
        assert "could not be loaded" in str(error) and "\\n" not in str(error)
        print("said why")
"""


def test_a_gemma_scope_file_in_the_hub_cache_loads_without_a_hub(tmp_path):
    repo = tmp_path / "models--google--gemma-scope-2b-pt-res"
    place = repo / "snapshots" / ("0" * 40) / "layer_12/width_16k/average_l0_82"
    place.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0" * 40)
    # SAELens takes the width from the folder's name, so the SAE is of full size; its zeros pack into little.
    W_enc, W_dec = np.zeros((2304, 16384), np.float16), np.zeros((16384, 2304), np.float16)
    W_enc[range(16), range(16)] = W_dec[range(16), range(16)] = 1
    b_dec, threshold = np.zeros(2304, np.float16), np.full(16384, 1.5, np.float16)
    b_dec[0] = 0.5
    np.savez_compressed(
        place / "params.npz", W_enc=W_enc, W_dec=W_dec, b_enc=np.zeros(16384, np.float16), b_dec=b_dec,
        threshold=threshold,
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GEMMA_SCOPE)], env=environment, capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[1], timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "said why"
    shutil.rmtree(repo)


def plain_sae(layer, W_enc, W_dec, threshold=0.0):
    zeros = torch.zeros
    return saes.Sae(
        name="by hand", sae_set="test", hook_name=f"blocks.{layer}.hook_resid_post", layer=layer,
        architecture="jumprelu", W_enc=W_enc, b_enc=zeros(W_enc.shape[1]), W_dec=W_dec, b_dec=zeros(D_IN),
        threshold=torch.full((W_enc.shape[1],), threshold), k=None, sha256="0" * 64,
    )


@pytest.fixture(scope="module")
def rows():
    return measure_saes.windows(np.random.default_rng(0).integers(3, 259, 3000), 12, 2)


def test_windows_start_with_bos_and_span_the_stream():
    rows = measure_saes.windows(np.arange(10_000), 5, bos=7)
    assert rows.shape == (5, 128) and (rows[:, 0] == 7).all()
    assert rows[0, 1] == 0 and rows[-1, -1] == 9_999
    with pytest.raises(ValueError, match="fewer than"):
        measure_saes.windows(np.arange(100), 5, bos=7)


def test_a_perfect_sae_changes_nothing_and_an_empty_one_is_a_zero_ablation(tiny, rows):
    eye = torch.eye(D_IN)
    perfect = plain_sae(1, torch.cat([eye, -eye, eye], dim=1), torch.cat([eye, -eye, 0 * eye]))
    perfect.threshold[-D_IN:] = torch.inf  # a third of the latents never fires
    empty = plain_sae(3, eye, eye, threshold=torch.inf)
    table = measure_saes.measure(tiny, [perfect, empty], rows, rows[:5]).set_index("layer")
    first = table.loc[1]
    assert first.fvu == pytest.approx(0, abs=1e-9)
    assert first.ce_delta == pytest.approx(0, abs=1e-5)
    assert first.ce_recovered == pytest.approx(1, abs=1e-4)
    assert first.dead_share == pytest.approx(1 / 3)
    assert first.l0_mean == D_IN  # each coordinate is positive or negative
    assert first.density_p95 <= first.density_max <= 1
    assert first.n_tokens == 12 * 127 and first.n_tokens_ce == 5 * 126
    last = table.loc[3]
    assert last.l0_mean == 0 and last.dead_share == 1 and last.fvu >= 1
    assert last.ce_sae == pytest.approx(last.ce_zero_ablation, abs=1e-5)
    assert last.ce_recovered == pytest.approx(0, abs=1e-4)
    assert not tiny.hf.model.layers[1]._forward_hooks


def test_fvu_is_squared_error_over_variance(tiny, rows):
    sae = saes.random(tiny, 2)
    got = measure_saes.measure(tiny, [sae], rows, rows[:2]).iloc[0]
    x = measure_saes.harvest(tiny.hf, rows, [2])[2].float()
    error = (x - sae.decode(sae.encode(x))).square().sum(1)
    assert got.fvu == pytest.approx((error.sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
    assert got.l0_mean == pytest.approx((sae.encode(x) > 0).sum(1).float().mean().item(), rel=1e-6)
    density = (sae.encode(x) > 0).double().mean(0)
    assert got.density_p50 == pytest.approx(density.quantile(0.5).item(), rel=1e-6)


def test_one_sequence_gives_the_loss_of_an_ablation_everywhere(tiny, rows):
    vector = torch.randn(D_IN, generator=torch.Generator().manual_seed(0))
    with measure_saes.spliced(tiny.hf, 2, lambda x: vector.expand_as(x)):
        whole = measure_saes.cross_entropy(tiny, rows)
    assert measure_saes.ablated_cross_entropy(tiny, 2, vector, rows) == pytest.approx(whole, abs=1e-5)


def test_the_loss_is_that_of_the_model(tiny, rows):
    logits = tiny.hf(rows).logits[:, 1:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, rows[:, 2:].flatten()).item()
    assert measure_saes.cross_entropy(tiny, rows) == pytest.approx(expected, abs=1e-5)


def test_measuring_writes_a_table_and_cards_with_its_numbers(tmp_path, monkeypatch, capsys):
    text = ["hot -> cold, big -> small, and so on. " * 40] * 4
    (tmp_path / "corpus").mkdir()
    pd.DataFrame({"split": "heldout", "text": text}).to_parquet(tmp_path / "corpus/documents.parquet")
    folder = tmp_path / "saes"
    for layer in (1, 4):
        saved(folder / f"L{layer}", hook=f"blocks.{layer}.hook_resid_post", seed=layer)
    monkeypatch.setenv("NB_CACHE", str(tmp_path))
    out = tmp_path / "tables"
    arguments = ["--model", "tiny", "--folder", str(folder), "--tokens", "2000", "--ce-tokens", "500"]
    monkeypatch.setattr(sys, "argv", ["measure_saes", *arguments, "--out", str(out)])
    measure_saes.main()
    table = tables.load("saes", "tiny", out).set_index("layer")
    assert tables.origins("saes", "tiny", out)[0]["sae_sha256"]["4"] == table.sae_sha256[4]
    assert list(table.index) == [1, 4]
    for layer, row in table.iterrows():
        card = (folder / f"L{layer}/README.md").read_text()
        assert f"`blocks.{layer}.hook_resid_post`" in card and row.sae_sha256 in card
        assert f"| {row.fvu:.3g} | at most 0.2 | **not met** |" in card
        assert f"| {row.l0_mean:.3g} | at most 50 | met |" in card
    assert not list(tmp_path.rglob("*.part"))
    assert "Table:" in capsys.readouterr().out


def test_measuring_a_folder_without_saes_ends_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    pd.DataFrame({"split": ["heldout"], "text": ["hot -> cold"]}).to_parquet(tmp_path / "corpus/documents.parquet")
    monkeypatch.setenv("NB_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["measure_saes", "--model", "tiny", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="no SAE on the residual stream"):
        measure_saes.main()
