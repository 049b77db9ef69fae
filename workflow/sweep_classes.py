"""Is the engine exact on every class of causal language model that transformers has? Writes ``data/classes.json``.

Every class is built tiny and random, saved as a folder and loaded as a user's model would be, which tests it once
(`nb_utils.engine.check`). What is let in is then held against plain forward passes at other places, blocks and sizes.
Each class runs in a process of its own, with a bound on memory and time.

    python -m workflow.sweep_classes              # all: about twenty minutes of one core
    python -m workflow.sweep_classes gpt2 gemma3  # some, printed only
    python -m workflow.sweep_classes --page       # the file's table into the page *Reproduce*
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from nb_utils import engine, files, models, prompts
from nb_utils.tasks import Pair

TABLE = Path(__file__).resolve().parents[1] / "data" / "classes.json"
PAGE = Path(__file__).resolve().parents[1] / "book" / "reproduce.md"
MEMORY, SECONDS = 6 << 30, 300  # what one class may take
FAMILIES = (  # in every run of the suite
    "bloom", "cohere", "falcon", "gemma2", "gemma3", "gpt2", "gpt_neox", "gptj", "granite", "mamba", "opt", "phi",
    "phimoe", "qwen3",
)  # fmt: skip
TOLERANCE = 1e-3  # nats a prompt, and share of the gradient's length
WORDS = "hot cold big small up down old new wet dry far near".split()
PAIRS = [Pair(x, y, (y,)) for x, y in zip(WORDS[::2], WORDS[1::2], strict=True)]

MIXED = ["sliding_attention", "full_attention"] * 2
SHARED = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "layer_types": MIXED}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
OVERRIDES: dict[str, dict] = {  # switches that matter to exactness, and what a class insists on
    "phimoe": {"lm_head_bias": True},
    "ernie4_5_moe": {"use_bias": True},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "bamba": MAMBA, "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "reformer": {"is_decoder": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gemma3n_text": SHARED,
    "gemma4_text": SHARED | {"global_head_dim": 8},
    "gemma4_unified_text": SHARED | {"global_head_dim": 8},
}

N_VOCAB, N_BLOCKS, N_HEADS, D_MODEL, D_HEAD, D_MLP, CONTEXT = 259, 4, 4, 32, 8, 64, 256
SIZES = (
    (D_MODEL, "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size linear_key_value_dim dim_model_base"),
    (N_BLOCKS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (N_HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads"),
    (D_HEAD, "head_dim d_head query_pre_attn_scalar kv_lora_rank q_lora_rank v_head_dim qk_rope_head_dim "
    "qk_nope_head_dim rotary_dim linear_key_head_dim linear_value_head_dim index_head_dim"),
    (D_MLP, "intermediate_size n_inner ffn_dim decoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size "
    "mlp_intermediate_size dense_intermediate_size ffn_hidden_size intermediate_size_mlp "
    "prefix_dense_intermediate_size"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk first_k_dense_replace num_linear_key_heads "
    "linear_num_key_heads index_n_heads index_topk"),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads"),
    (1, "n_shared_experts n_group topk_group decoder_start_token_id num_shared_experts moe_num_shared_experts"),
    (16, "sliding_window sliding_window_size mamba_d_head mamba_headdim"),
    (CONTEXT, "max_position_embeddings n_positions max_sequence_length"),
    (N_VOCAB, "vocab_size vocab_size_per_layer_input"),
)  # fmt: skip
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def sizes(config) -> dict:
    """Return tiny values for whatever of our sizes a configuration knows."""
    config.allow_global_per_layer_attribute_access = True  # tiny models have the same sizes in every block
    known = {name: value for value, names in SIZES for name in names.split() if hasattr(config, name)}
    if "kv_lora_rank" in known:  # latent attention has as many keys as queries, of its own width
        known = {name: value for name, value in known.items() if name != "head_dim"} | {"num_key_value_heads": N_HEADS}
    return known | {name: value for name, value in TOKENS.items() if hasattr(config, name)}


def settled(kind, values: dict):
    """Make a configuration, without the values that it computes itself."""
    while True:
        try:
            return kind(**values)
        except AttributeError as error:  # "property 'head_dim' of 'FalconConfig' object has no setter"
            name = next((name for name in values if f"'{name}'" in str(error)), None)
            if name is None:
                raise
            values = {key: value for key, value in values.items() if key != name}


def build(model_type: str):
    """Return a tiny random model of a class, with norms near one and blocks that matter."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[model_type]
    default = kind()
    values = sizes(default)
    for part in default.sub_configs:
        if (inner := getattr(default, part, None)) is not None:
            values[part] = settled(type(inner), sizes(inner) | OVERRIDES.get(inner.model_type, {})).to_dict()
    config = settled(kind, values | OVERRIDES.get(model_type, {}))
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    for parameter in hf.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape) if parameter.ndim else torch.zeros(())
            parameter.data = 0.25 * noise if parameter.ndim > 1 else parameter.data + 0.2 * noise
    return hf


def judge(model_type: str) -> tuple[str, str]:
    """Return "exact", "refused", "untested" or "WRONG", and why."""
    try:
        hf = build(model_type).eval()
        with torch.no_grad():
            hf(torch.tensor([[2, 5, 6, 7]]))
    except BaseException as error:  # also what a class asks for that is not installed
        return "untested", said(error)
    tokenizer = models.load("tiny", "cpu").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        try:
            hf.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            return "untested", said(error)
        try:
            model = models.load(folder, "cpu")
        except models.ModelError as error:
            return "refused", str(error).replace(folder, model_type)
    try:
        off = difference(model)
    except Exception as error:
        return "WRONG", f"crashes after the test at load: {said(error)}"
    return ("exact", "") if off <= TOLERANCE else ("WRONG", f"differs by {off:.1e} after the test at load")


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def difference(model) -> float:
    """Return how far the engine is from plain passes: losses, gradients and residuals, the largest of all."""
    batch = prompts.few_shot(model.tokenizer, PAIRS, PAIRS[:2], 2, seed=0)
    batch += prompts.few_shot(model.tokenizer, PAIRS, PAIRS[2:3], 5, seed=0)
    batch += prompts.dummy_shot(model.tokenizer, PAIRS[3:5])
    off = []
    for layer in sorted({0, 1, model.n_layers - 2}):
        for at in ("separator", "output"):
            for mode in ("add", "replace"):
                off += compare(model, batch, layer, at, mode)
    for n_prompts, n in ((1, 1), (1, 5), (2, 2), (4, 5), (5, 1)):  # where sizes coincide: heads, tokens, vectors
        off += compare(model, batch[:n_prompts], 0, "separator", "add", n)
    kept = engine.residuals(model, batch, [p.separators for p in batch], [1])[1]
    off.append((kept - torch.cat([plain(model, p, None, 1)[list(p.separators)] for p in batch])).abs().max() / 10)
    return max(float(value) if value == value else float("inf") for value in off)


def compare(model, batch, layer, at, mode, n=2):
    site = engine.Site.prepare(model, batch, at=at)
    start = torch.randn(n, model.d_model, generator=torch.Generator().manual_seed(1))
    start *= site.at(layer).norm(dim=-1).mean() / start.norm(dim=-1, keepdim=True)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    losses = [[plain(model, p, v, layer, at, mode) for p in batch] for v in theirs]
    expected = torch.stack([torch.stack(row) for row in losses])
    scored = site.evaluate(start, layer, mode).nll.nansum(-1)
    (gradient,) = torch.autograd.grad(site.loss(ours, layer, mode).sum(), ours)
    (reference,) = torch.autograd.grad(expected.mean(-1).sum(), theirs)
    return [(scored - expected).abs().max().detach(), (gradient - reference).norm() / reference.norm().clamp_min(1e-6)]


def plain(model, prompt, vector, layer, at="separator", mode="add"):
    """Return the loss of one unpadded forward pass with one hook; without a vector, the block's output."""
    position = prompt.separators[-1] if at == "separator" else prompt.outputs[-1]
    seen = []

    def hook(block, args, out):
        stream = out[0] if isinstance(out, tuple) else out
        seen.append(stream[0])
        if vector is not None:
            here = stream[:, position : position + 1] + vector if mode == "add" else vector.expand_as(stream[:, :1])
            stream = torch.cat([stream[:, :position], here, stream[:, position + 1 :]], 1)
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

    handle = model.layout.blocks[layer].register_forward_hook(hook)
    try:
        logits = model.hf(torch.tensor([prompt.ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    if vector is None:
        return seen[0].detach()
    first = len(prompt.ids) - len(prompt.answer)
    return -logits[first - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(prompt.answer)[:, None]).sum()


def child(model_type: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.alarm(SECONDS)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pipe.send(judge(model_type))


def alone(model_type: str) -> tuple[str, str]:
    """Judge a class in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        verdict = ours.recv()
    except EOFError:
        verdict = ("untested", f"takes more than {MEMORY >> 30} GB or {SECONDS} s")
    process.join()
    return verdict


def sweep(types) -> dict:
    """Judge classes, several model types of one class together."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    models.load("tiny", "cpu")  # what every child needs is imported once
    found = {}
    for model_type in types or sorted(names):
        verdict, why = alone(model_type)
        found[model_type] = {"class": names[model_type], "verdict": verdict, "why": why}
        print(f"{model_type:24} {names[model_type]:36} {verdict:9} {why}", flush=True)
    return found


def rendered(table: dict) -> str:
    """Return the table as Markdown for the page *Reproduce*: the model types of each verdict."""
    lines = ["| | `model_type` |", "| --- | --- |"]
    for verdict in ("exact", "refused", "untested"):
        types = [f"`{name}`" for name, found in sorted(table["classes"].items()) if found["verdict"] == verdict]
        lines.append(f"| {verdict} | {', '.join(types)} |")
    return "\n".join(lines)


def show() -> None:
    """Put the table into the page in place of the one that is there."""
    head = "| | `model_type` |\n"
    before, _, rest = PAGE.read_text().partition(head)
    after = rest[rest.index("\n\n") :]
    PAGE.write_text(before + rendered(json.loads(TABLE.read_text())) + after)


def main(types) -> None:
    import transformers

    if types == ["--page"]:
        return show()
    torch.set_num_threads(1)
    found = sweep(types)
    if not types:
        text = json.dumps({"transformers": transformers.__version__, "classes": found}, indent=1) + "\n"
        files.write(TABLE, text.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
