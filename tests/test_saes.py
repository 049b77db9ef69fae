"""SAEs: our view equals SAELens, sets and layers are found, and every bad file is a SaeError."""

import copy
import json
import os
import re
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
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tokenizers.processors import TemplateProcessing

from nb_utils import files, saes
from nb_utils.record import tables
from nb_utils.saes import SaeError
from workflow import measure_saes, train_saes

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


# --- what the file says, and not the object that SAELens makes of it ---


OLD = {
    "model_name": "tiny", "hook_name": "blocks.2.hook_resid_post", "hook_layer": 2, "d_in": D_IN, "d_sae": D_SAE,
    "dtype": "torch.float32", "apply_b_dec_to_input": False, "normalize_activations": "none", "l1_coefficient": 5,
}  # fmt: skip
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}


def stated(folder, config, kind="standard", **more):
    """Write an SAE with a configuration of our own and more tensors; return the folder."""
    saved(folder, kind=kind)
    path = folder / "sae_weights.safetensors"
    path.write_bytes(save_tensors(load_tensors(path.read_bytes()) | more))
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def edited(folder, **changes):
    """Change keys of a configuration (None: leave it out)."""
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def refused(tiny, folder, says):
    with pytest.raises(SaeError, match=says) as said:
        saes.load(tiny, folder, 2)
    assert "\n" not in str(said.value) and "damaged" not in str(said.value)
    return str(said.value)


@pytest.mark.parametrize("apply_b_dec_to_input", [False, True, None])
@pytest.mark.parametrize(
    "topk", [TOPK, {"activation_fn": "topk", "k": 7}, {"architecture": "topk", "k": 7}, TOPK | {"architecture": "topk"}]
)
def test_an_old_topk_file_is_read_with_its_k_wherever_that_stands(tmp_path, tiny, topk, apply_b_dec_to_input):
    config = OLD | topk | {"apply_b_dec_to_input": apply_b_dec_to_input}
    if apply_b_dec_to_input is None:  # SAELens's own default, then and now
        del config["apply_b_dec_to_input"]
    theirs = random_saelens("topk", apply_b_dec_to_input=apply_b_dec_to_input is not False)
    x = 3 * torch.randn(40, D_IN)
    ours = saes.load(tiny, stated(tmp_path, config), 2)
    assert ours.k == 7 and ours.architecture == "topk"
    close(ours.encode(x), theirs.encode(x).detach())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "TopK SAE whose k is None"),
        ({"activation_fn": "topk"}, "TopK SAE whose k is None"),
        ({"architecture": "topk"}, "TopK SAE whose k is None"),
        ({"activation_fn": "topk", "k": 7, "activation_fn_kwargs": {"k": 8}}, "settings beside its k of 7"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7, "signed": True}}, "settings beside its k of 7"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": [7], "k": 7}, "settings beside its k of 7"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 97}}, "k of 97, and it has 96 latents"),
        ({"k": 7}, "has a k of 7 and is no TopK SAE"),
        ({"activation_fn_str": "tanh-relu"}, "the activation 'tanh-relu' in a 'standard' SAE"),
        ({"activation_fn": "leaky_relu"}, "the activation 'leaky_relu'"),
        ({"activation_fn": "gelu"}, "the activation 'gelu'"),
        ({"activation_fn": "softplus", "activation_fn_str": "relu"}, "the activation 'softplus'"),
        ({"activation_fn_str": "topk", "architecture": "gated"}, "the activation 'topk' in a 'gated' SAE"),
        ({"activation_fn_str": "relu", "architecture": "topk", "k": 7}, "the activation 'relu' in a 'topk' SAE"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm'.*depends on each token"),
        ({"normalize_activations": "constant_norm_rescale"}, "depends on each token"),
        ({"normalize_activations": "constant_scalar_rescale"}, "depends on each token"),
        ({"normalize_activations": True}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": ["median"]}, "is unknown here"),
        ({"apply_b_dec_to_input": "false"}, "'false'.*set them to true or false"),
        ({"rescale_acts_by_decoder_norm": True}, "units of the decoder norm"),
        ({"reshape_activations": "hook_z"}, "single attention heads"),
        ({"hook_head_index": 3}, "single attention heads"),
        ({"hook_name_out": "blocks.2.hook_mlp_out"}, "is a transcoder to 'blocks.2.hook_mlp_out'"),
        ({"finetuning_scaling_factor": True}, "finetuning factors"),
        ({"architecture": "jumprelu"}, "a 'jumprelu' SAE without threshold"),
        ({"architecture": "transcoder"}, "a 'transcoder' SAE: the architectures that work are"),
        ({"d_sae": 97}, "SAELens can't make"),
    ],
)  # fmt: skip
def test_a_configuration_that_computes_something_else_is_refused_by_name(tmp_path, tiny, changes, says):
    refused(tiny, stated(tmp_path, OLD | changes), says)
    if not {"architecture", "apply_b_dec_to_input", "d_sae"} & set(changes):
        inner = {key: changes.pop(key) for key in ("hook_head_index", "hook_name_out") if key in changes}
        metadata = {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post", **inner}
        new = {"d_in": D_IN, "d_sae": D_SAE, "architecture": "standard", "metadata": metadata, **changes}
        refused(tiny, stated(tmp_path / "new", new), "." if "topk" in str(changes) else says)


@pytest.mark.parametrize("none", ["none", None, False])
def test_without_normalisation_an_old_file_loads_whatever_it_calls_that(tmp_path, tiny, none):
    assert saes.load(tiny, stated(tmp_path, OLD | {"normalize_activations": none}), 2).k is None


def test_a_configuration_without_a_version_or_with_a_byte_order_mark_is_read(tmp_path, tiny):
    folder = saved(tmp_path)
    before, config = saes.load(tiny, folder, 2), json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["sae_lens_version"]
    (folder / "cfg.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    assert saes.layers(tiny, tmp_path) == (2,)
    assert torch.equal(saes.load(tiny, folder, 2).threshold, before.threshold)


def test_thresholds_stored_as_logarithms_are_thresholds(tmp_path, tiny):
    folder, theirs = saved(tmp_path), random_saelens()
    path, x = folder / "sae_weights.safetensors", torch.randn(9, D_IN)
    tensors = load_tensors(path.read_bytes())
    tensors["log_threshold"] = tensors.pop("threshold").log()
    path.write_bytes(save_tensors(tensors))
    close(saes.load(tiny, folder, 2).encode(x), theirs.encode(x).detach())


def test_an_sae_of_the_centred_stream_centres_its_input_where_the_model_has_a_stream_to_centre(tmp_path, tiny):
    theirs = random_saelens("topk", apply_b_dec_to_input=True)
    theirs.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    theirs.save_model(tmp_path)
    x = 3 * torch.randn(9, D_IN) + 5
    centred = theirs.encode(x - x.mean(1, keepdim=True)).detach()
    with_layer_norm = SimpleNamespace(name="tiny", d_model=D_IN, n_layers=6, hf=torch.nn.LayerNorm(D_IN))
    close(saes.load(with_layer_norm, tmp_path, 2).encode(x), centred)
    close(saes.load(tiny, tmp_path, 2).encode(x), theirs.encode(x).detach())  # RMSNorm: nothing was taken off


def test_unused_factors_are_dropped_and_other_tensors_named(tmp_path, tiny):
    folder = stated(tmp_path / "ones", OLD | {"finetuning_scaling_factor": True}, scaling_factor=torch.ones(D_SAE))
    assert saes.load(tiny, folder, 2).d_sae == D_SAE
    refused(tiny, stated(tmp_path / "more", OLD, W_skip=torch.ones(3)), r"doesn't use \(W_skip\)")


# --- advice, followed ---


def resaved(theirs, folder):
    theirs.save_model(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_folding_a_factor_in_as_told_gives_the_sae_of_scaled_inputs(tmp_path, tiny, kind):
    theirs = random_saelens(kind, normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
    x = torch.randn(9, D_IN)
    codes = theirs.encode(0.25 * x).detach()
    decoded = theirs.decode(codes).detach() / 0.25
    refused(tiny, resaved(theirs, tmp_path / "a"), "call fold_activation_norm_scaling_factor with")
    read = SAE.load_from_disk(tmp_path / "a")
    read.fold_activation_norm_scaling_factor(0.25)
    ours = saes.load(tiny, resaved(read, tmp_path / "b"), 2)
    if kind != "topk, rescaled":  # there the units of the codes are folded with the decoder
        close(ours.encode(x), codes)
    close(ours.decode(ours.encode(x)), decoded)


def test_folding_a_whitening_in_as_told_gives_the_sae_of_whitened_inputs(tmp_path, tiny):
    theirs = random_saelens(normalize_activations="covariance_whitening")
    x, mean = torch.randn(9, D_IN), torch.randn(D_IN)
    matrix = torch.eye(D_IN) + 0.1 * torch.randn(D_IN, D_IN)
    codes = theirs.encode((x - mean) @ matrix).detach()
    refused(tiny, resaved(theirs, tmp_path / "a"), "call fold_activation_whitening with")
    read = SAE.load_from_disk(tmp_path / "a")
    read.fold_activation_whitening(mean, matrix, matrix.inverse())
    close(saes.load(tiny, resaved(read, tmp_path / "b"), 2).encode(x), codes)


def test_multiplying_finetuning_factors_in_as_told_gives_their_decoder(tmp_path, tiny):
    factors, theirs = torch.rand(D_SAE) + 0.5, random_saelens("standard")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        folder = stated(tmp_path / name, OLD | {"finetuning_scaling_factor": True}, **{name: factors})
        refused(tiny, folder, "multiply the rows of W_dec by these, leave out their tensor, and set finetuning_")
        path = folder / "sae_weights.safetensors"
        tensors = load_tensors(path.read_bytes())
        tensors["W_dec"] = tensors["W_dec"] * tensors.pop(name)[:, None]
        path.write_bytes(save_tensors(tensors))
        ours, codes = saes.load(tiny, edited(folder, finetuning_scaling_factor=False), 2), torch.rand(9, D_SAE)
        close(ours.decode(codes), theirs.decode(codes * factors).detach())


@pytest.mark.parametrize("activation", ["activation_fn", "activation_fn_str"])
def test_adding_what_a_configuration_lacks_as_told_makes_it_load(tmp_path, tiny, activation):
    x = 3 * torch.randn(9, D_IN)
    folder = stated(tmp_path / "k", OLD | {activation: "topk"})
    refused(tiny, folder, "add the k that it was trained with to cfg.json")
    close(saes.load(tiny, edited(folder, k=7), 2).encode(x), random_saelens("topk").encode(x).detach())
    folder = stated(tmp_path / "standard", OLD | {"k": 7})
    refused(tiny, folder, 'add "architecture": "topk" to cfg.json')
    assert saes.load(tiny, edited(folder, architecture="topk"), 2).k == 7
    folder = edited(saved(tmp_path / "none"), architecture=None)
    refused(tiny, folder, "names no architecture: add it to cfg.json, one of standard, jumprelu")
    close(saes.load(tiny, edited(folder, architecture="jumprelu"), 2).encode(x), random_saelens().encode(x).detach())
    folder = edited(saved(tmp_path / "switch"), apply_b_dec_to_input="false")
    refused(tiny, folder, "set them to true or false")
    assert saes.load(tiny, edited(folder, apply_b_dec_to_input=False), 2).layer == 2


def test_a_batchtopk_checkpoint_has_to_say_whether_it_rescales(tmp_path, tiny):
    config = BatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=8, metadata=SAEMetadata(model_name="tiny", hook_name="blocks.2.hook_resid_post"),
        rescale_acts_by_decoder_norm=False,
    )  # fmt: skip
    BatchTopKTrainingSAE(config).save_model(tmp_path)
    edited(tmp_path, rescale_acts_by_decoder_norm=None)
    refused(tiny, tmp_path, 'add "rescale_acts_by_decoder_norm": true or false')
    assert saes.load(tiny, edited(tmp_path, rescale_acts_by_decoder_norm=False), 2).architecture == "batchtopk"


def converted(kind, tensors, folder, **settings):
    """Do what the sentences on other formats say: put tensors into a class of SAELens and save that."""
    theirs = random_saelens(kind, **settings)
    theirs.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
    return resaved(theirs, folder)


def test_the_formats_of_others_are_named_and_convert_as_told(tmp_path, tiny):
    x, w = torch.randn(9, D_IN), {name: tensor.detach() for name, tensor in random_saelens().state_dict().items()}
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]

    for name in ("params.npz", "params.safetensors"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        np.savez(folder / "params.npz", **w)
        (folder / "params.npz").rename(folder / name)
        refused(tiny, folder, rf"holds {name}, .*into JumpReLUSAE \(apply_b_dec_to_input=False\), of SAELens")
    arrays = dict(np.load(tmp_path / "params_npz/params.npz"))
    ours = saes.load(tiny, converted("jumprelu", arrays, tmp_path / "scope", apply_b_dec_to_input=False), 2)
    close(ours.encode(x), random_saelens().encode(x).detach())

    folder = tmp_path / "eleuther/layers.2"
    folder.mkdir(parents=True)
    config = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": D_SAE, "k": 7, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps(config))
    linear = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    (folder / "sae.safetensors").write_bytes(save_tensors(linear | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}))
    for place in (folder, folder.parent):
        refused(tiny, place, "holds sae.safetensors, .*EleutherAI's.*into TopKSAE")
    theirs = load_tensors((folder / "sae.safetensors").read_bytes())
    theirs = {"W_enc": theirs.pop("encoder.weight").T, "b_enc": theirs.pop("encoder.bias"), **theirs}
    ours = saes.load(tiny, converted("topk", theirs, tmp_path / "topk", apply_b_dec_to_input=True), 2)
    top = pre.relu().topk(7)
    close(ours.encode(x), torch.zeros_like(pre).scatter(1, top.indices, top.values))

    folder = tmp_path / "dictionary"
    folder.mkdir()
    torch.save(linear | {"decoder.weight": w["W_dec"].T, "bias": w["b_dec"]}, folder / "ae.pt")
    for place in (folder, tmp_path / "dictionary"):
        refused(tiny, place, r"ae\.pt, and pickled weights are not loaded.*AutoEncoder.*into StandardSAE")
    theirs = torch.load(folder / "ae.pt", weights_only=True)
    theirs = {
        "W_enc": theirs["encoder.weight"].T, "b_enc": theirs["encoder.bias"], "W_dec": theirs["decoder.weight"].T,
        "b_dec": theirs["bias"],
    }  # fmt: skip
    ours = saes.load(tiny, converted("standard", theirs, tmp_path / "relu", apply_b_dec_to_input=True), 2)
    close(ours.encode(x), pre.relu())


def test_a_pickle_saved_as_told_loads_and_a_manifest_deleted_as_told_is_not_missed(tmp_path, tiny):
    folder = saved(tmp_path)
    weights, pickle = folder / "sae_weights.safetensors", folder / "weights.pt"
    torch.save(load_tensors(weights.read_bytes()), pickle)
    weights.unlink()
    refused(tiny, folder, r"only weights\.pt, .*: save the SAE as sae_weights\.safetensors")
    weights.write_bytes(save_tensors(torch.load(pickle, weights_only=True)))
    assert saes.load(tiny, folder, 2).layer == 2
    files.describe(folder, ["cfg.json"])
    edited(folder, dataset_path="mine")
    with pytest.raises(SaeError, match=r"or delete its manifest\.json if you changed it yourself"):
        saes.load(tiny, folder, 2)
    (folder / "manifest.json").unlink()
    assert saes.load(tiny, folder, 2).layer == 2


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


def test_of_several_saes_for_a_layer_one_has_to_be_named(tmp_path, tiny):
    for seed, name in enumerate(("100000", "200000", "final_300000")):
        saved(tmp_path / name, seed=seed)
    saved(tmp_path / "other", hook="blocks.1.hook_resid_post")
    assert saes.layers(tiny, tmp_path) == (1, 2)
    assert saes.load(tiny, tmp_path, 1).name == "other"
    with pytest.raises(SaeError, match=r"3 SAEs for layer 2 \(100000, 200000, final_300000\): name one") as said:
        saes.load(tiny, tmp_path, 2)
    named = re.search("one of them, as (.*), or", str(said.value))[1]
    assert saes.load(tiny, named, 2).name == "final_300000"


def test_an_sae_of_a_release_that_reads_another_block_than_its_id_says_is_had_as_told(tiny, monkeypatch):
    # What the hub would give for an id that counts blocks by what they read.
    monkeypatch.setattr(saes, "_read_release", lambda source: random_saelens(hook="blocks.3.hook_resid_pre"))
    with pytest.raises(SaeError, match="block 2, not of block 3: name it so, and ask for layer 2") as said:
        saes.load(tiny, "gemma-scope-2b-pt-res-canonical", 3)
    named = str(said.value).split(" reads ")[0]
    assert named == "gemma-scope-2b-pt-res-canonical:layer_3/width_16k/canonical"
    assert saes.load(tiny, named, 2).name == named


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


def test_sets_that_do_not_fit_the_model_are_refused(tmp_path, tiny, monkeypatch):
    saved(tmp_path / "other", model_name="google/gemma-2-2b")
    saved(tmp_path / "deep", hook="blocks.9.hook_resid_post")
    with pytest.raises(SaeError, match=r"trained on google/gemma-2-2b.*NB_OTHER_MODEL=1.*allow_other_model=True"):
        saes.load(tiny, tmp_path / "other", 2)
    assert saes.load(tiny, tmp_path / "other", 2, allow_other_model=True).layer == 2
    monkeypatch.setenv("NB_OTHER_MODEL", "1")
    assert saes.load(tiny, tmp_path / "other", 2).layer == 2
    with pytest.raises(SaeError, match="trained on"):
        saes.load(tiny, tmp_path / "other", 2, allow_other_model=False)
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
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"), ("", "anything"), ("  ", "anything"),
    ]:  # fmt: skip
        saved(tmp_path, model_name=stored)
        model = SimpleNamespace(name=loaded, d_model=D_IN, n_layers=12)
        assert saes.load(model, tmp_path, 2).layer == 2


def test_a_model_is_known_wherever_its_folder_lies_and_by_its_weights(tmp_path, monkeypatch):
    model = SimpleNamespace(name="", d_model=D_IN, n_layers=12, sha256="f" * 64)
    cached = tmp_path / "models--google--gemma-2-2b/snapshots/0123abc"
    own = tmp_path / "Gemma-2-2B"
    for folder in (cached, own):
        folder.mkdir(parents=True)
    saved(tmp_path / "sae", model_name="google/gemma-2-2b")
    monkeypatch.chdir(own)
    for name in (str(cached), f"{cached}/", ".", str(own), f"{own}/"):
        model.name = name
        assert saes.load(model, tmp_path / "sae", 2).layer == 2
    model.name = "renamed"
    with pytest.raises(SaeError, match="trained on google/gemma-2-2b, not on 'renamed'"):
        saes.load(model, tmp_path / "sae", 2)
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    edited(tmp_path / "sae", metadata=config["metadata"] | {"model_sha256": model.sha256})
    assert saes.load(model, tmp_path / "sae", 2).layer == 2


def test_the_shipped_saes_are_those_of_a_model_in_the_hubs_cache_too(tmp_path):
    cached = tmp_path / "models--google--gemma-3-270m/snapshots/0123abc"
    cached.mkdir(parents=True)
    model = SimpleNamespace(name=str(cached), d_model=640, n_layers=18)
    assert saes.layers(model) == saes.layers(SimpleNamespace(name="gemma-3-270m", n_layers=18))
    assert saes.load(model, "shipped", 12).name == "blocks.12.hook_resid_post"


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
        rows = measure_saes.windows(np.arange(4000) % 200 + 50, 4, tiny.tokenizer)
        x = measure_saes.harvest(tiny.layout, rows, [layer])[layer].float()
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
def rows(tiny):
    return measure_saes.windows(np.random.default_rng(0).integers(3, 259, 3000), 12, tiny.tokenizer)


def test_windows_start_with_bos_and_span_the_stream(tiny):
    rows = measure_saes.windows(np.arange(10_000), 5, tiny.tokenizer)
    assert rows.shape == (5, 128) and (rows[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert rows[0, 1] == 0 and rows[-1, -1] == 9_999
    with pytest.raises(ValueError, match="fewer than"):
        measure_saes.windows(np.arange(100), 5, tiny.tokenizer)


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
    x = measure_saes.harvest(tiny.layout, rows, [2])[2].float()
    error = (x - sae.decode(sae.encode(x))).square().sum(1)
    assert got.fvu == pytest.approx((error.sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-4)
    assert got.l0_mean == pytest.approx((sae.encode(x) > 0).sum(1).float().mean().item(), rel=1e-6)
    density = (sae.encode(x) > 0).double().mean(0)
    assert got.density_p50 == pytest.approx(density.quantile(0.5).item(), rel=1e-6)


def test_one_sequence_gives_the_loss_of_an_ablation_everywhere(tiny, rows):
    vector = torch.randn(D_IN, generator=torch.Generator().manual_seed(0))
    with measure_saes.spliced(tiny.layout, 2, lambda x: vector.expand_as(x)):
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
        assert f"| {row.fvu:.3g} | at most 0.12 | **not met** |" in card
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


def test_text_for_saes_begins_with_bos_where_prompts_do_and_goes_on_from_the_token_before_where_they_do_not(tiny):
    bare, stream = copy.deepcopy(tiny.tokenizer), np.arange(100_000, dtype=np.int32) % 200 + 50
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for cut in (lambda t: measure_saes.windows(stream, 5, t), lambda t: train_saes.sequences(t, stream, 1, 0.0)):
        usual, ours = cut(tiny.tokenizer), cut(bare)
        assert usual.shape == ours.shape and torch.equal(usual[:, 1:], ours[:, 1:])
        assert (usual[:, 0] == tiny.tokenizer.bos_token_id).all()
        assert ((ours[1:, 1] - ours[1:, 0] - 1) % 200 == 0).all(), "the first token is the one before in the text"
