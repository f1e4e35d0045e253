"""Tiny random models: of every family that is tested, and of families that are refused.

As a command it writes the table of models, or checks it:
`python tests/tools/families.py docs/models.md [--check]`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from kvpress.bench.docs.marks import fill

from kvpress.errors import UnsupportedModelError
from kvpress.hf.support import Fingerprint, check_model

VOCAB = 97
_THERE = set(dir(transformers))  # once: each time takes half a second

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = {
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": None,
}
_FEW_EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
_SCALED = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
_ONE_TO_ONE = {"num_key_value_heads": None}  # families without grouped queries
_OWN_WIDTH = {"head_dim": 16}

# name -> (config class, model class, fields)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 11}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2-mixed": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _OWN_WIDTH),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _OWN_WIDTH),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 9} | _OWN_WIDTH),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _MIXED | _OWN_WIDTH),
    "gemma4": (  # full layers with other heads and values that are the keys
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 0,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        _SCALED,
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", _MIXED),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", _MIXED),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", _OWN_WIDTH),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": 11}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _ONE_TO_ONE),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _ONE_TO_ONE),
    "gpt2-scaled": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True} | _ONE_TO_ONE,
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"num_key_value_heads": 1}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 96} | _ONE_TO_ONE),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"moe_intermediate_size": 32, **_EXPERTS},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": 32, **_EXPERTS},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", _EXPERTS),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2} | _MIXED | _OWN_WIDTH,
    ),
    "granite_swa": ("GraniteSWAConfig", "GraniteSWAForCausalLM", _SCALED | _MIXED),
    "granitemoe_swa": (
        "GraniteMoeSWAConfig",
        "GraniteMoeSWAForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2} | _SCALED | _MIXED,
    ),
    "mimo_v2_flash": (  # windows have twice the KV heads, and values are narrower than keys
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | _MIXED
        | {"head_dim": 24, "v_head_dim": 16, "num_attention_heads": 8},
    ),
    "flint": ("FlintConfig", "FlintForCausalLM", _EXPERTS | _MIXED | _OWN_WIDTH),
    "bloom": ("BloomConfig", "BloomForCausalLM", _ONE_TO_ONE),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"num_key_value_heads": 1}),
    "falcon-alibi": (
        "FalconConfig",
        "FalconForCausalLM",
        {"alibi": True, "multi_query": False, "bias": True} | _ONE_TO_ONE,
    ),
    "falcon-new": (
        "FalconConfig",
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_key_value_heads": None},
    ),
    "mpt": ("MptConfig", "MptForCausalLM", {"max_seq_len": 1024} | _ONE_TO_ONE),
    "jamba": ("JambaConfig", "JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": (
        "BambaConfig",
        "BambaForCausalLM",
        {"mamba_d_head": 24, "mamba_n_heads": 8, "attn_layer_indices": [1]},
    ),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", {"mamba_d_ssm": 96, "mamba_n_heads": 4}),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    ),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _EXPERTS | _LINEAR),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _LINEAR),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"full_attn_idxs": [1]}),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _MLA | _FEW_EXPERTS | {"num_experts_per_tok": 2},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA | _FEW_EXPERTS),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", _MLA),
    "gemma4-wide": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "global_head_dim": 512,
            "sliding_window": 9,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 9,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_local_experts": 2,
            "head_dim": 16,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 24,
            "head_dim": 16,
            "ssm_state_size": 16,
        },
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", _LINEAR),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": _LINEAR["layer_types"],
            "mamba_n_heads": 8,
            "mamba_d_head": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        _MLA
        | _EXPERTS
        | {
            "layer_types": _LINEAR["layer_types"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
        },
    ),
    "mistral4": (
        "Mistral4Config",
        "Mistral4ForCausalLM",
        _MLA | _FEW_EXPERTS | {"num_experts_per_tok": 2},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        _MLA | _FEW_EXPERTS | {"num_experts_per_tok": 2, "num_key_value_heads": 6},
    ),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", {}),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", _OWN_WIDTH),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", _MIXED),
}
MISSING = [name for name, given in FAMILIES.items() if given[1] not in _THERE]
FAMILIES = {name: given for name, given in FAMILIES.items() if given[1] in _THERE}

_ENCODER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
_TEXT = {
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_VISION = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "image_size": 28,
    "num_attention_heads": 2,
    "patch_size": 14,
}

# As above, for families that are refused.
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "inkling2": (
        "Inkling2TextConfig",
        "Inkling2ForCausalLM",
        {"n_routed_experts": 4, "moe_intermediate_size": 16, "head_dim": 16},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {}),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 24}),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"attention_hidden_size": 96}),
    "recurrent_gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {}),
    "bert": ("BertConfig", "BertLMHeadModel", {}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_ff": 16, "num_layers": 1}),
    "bart": ("BartConfig", "BartForConditionalGeneration", _ENCODER),
}
_NO_CAUSAL = ("bert", "t5", "bart")
REFUSED = {name: given for name, given in REFUSED.items() if given[1] in _THERE}


def tiny(family: str = "llama", query_heads: int = 6, kv_heads: int = 2, **fields: Any) -> Any:
    """A random model of a family, in eval mode; the same weights for the same arguments."""
    config_class, model_class, own = (FAMILIES | REFUSED)[family]
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    width = {"hidden_size": 16 * query_heads}
    config = getattr(transformers, config_class)(**(_COMMON | heads | width | own | fields))
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):  # they start at 0, or near it
            torch.nn.init.normal_(parameter, std=1.5)
    return model


def described(family: str) -> tuple[str, str]:
    """How the table names a family, and what happens to it."""
    name = (FAMILIES | REFUSED)[family][1]
    for tail in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"):
        name = name.removesuffix(tail)
    with torch.device("meta"):  # the shapes are enough
        model = tiny(family)
    try:
        shape = check_model(model)
    except UnsupportedModelError as error:
        return name, f"refused: {error.reason}"
    return name, ", ".join(_fates(shape))


def _fates(shape: Fingerprint) -> list[str]:
    """What happens to layers of every sort."""
    sliding = {kind.window is not None for kind in shape.kinds}
    readers = any(kind.readers for kind in shape.kinds)
    made = ["latents" if shape.kinds[0].latent else "attention layers"]
    made[0] += " are compressed" if False in sliding else ""
    if sliding == {True}:
        made = ["every layer keeps its sliding window"]
    elif True in sliding:
        made.append("those with a sliding window keep it")
    if readers:
        made.append("layers that read the keys of others keep nothing")
    if any(state.count for state in shape.states):
        made.append("states of linear attention and convolutions are kept as they are")
    if any(state.chunk for state in shape.states):
        made.append("layers that attend within chunks keep the last tokens")
    return made


def counts() -> tuple[int, int]:
    """Architectures of causal language models with a tiny configuration: that work, and all."""
    working = {given[1] for given in FAMILIES.values()}
    refused = {given[1] for name, given in REFUSED.items() if name not in _NO_CAUSAL}
    return len(working), len(working | refused)


def share() -> str:
    """A sentence of the page and of the README."""
    working, every = counts()
    return f"{working} of {every} architectures ({working / every:.0%})"


def markdown() -> str:
    """The table of docs/models.md: one row for everything that may happen, in the order above."""
    rows = defaultdict(list)
    for family in FAMILIES | REFUSED:
        name, fate = described(family)
        if name not in rows[fate]:
            rows[fate].append(name)
    lines = [f"| {', '.join(names)} | {fate} |" for fate, names in rows.items()]
    table = ["| models | what happens |", "|---|---|", *lines]
    said = f"Of the causal language models with a tiny configuration in the tests, {share()} work."
    return "\n".join([said, "", *table])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    page, flag = Path(sys.argv[1]), "--check" in sys.argv[2:]
    print(f"With a tiny configuration here, {share()} of causal language models work.")
    if not fill(page, {"models": markdown}, flag) and flag:
        sys.exit(f"The table of models in {page} is out of date. Run scripts/lint.")
