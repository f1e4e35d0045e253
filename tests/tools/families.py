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
from kvpress.hf.support import check_model

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
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
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
}
FAMILIES = {name: given for name, given in FAMILIES.items() if given[1] in _THERE}

_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
_FEW_EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
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
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _MLA | _FEW_EXPERTS),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA | _FEW_EXPERTS),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", _MLA),
    "mamba": ("MambaConfig", "MambaForCausalLM", {}),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 24}),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"attention_hidden_size": 96}),
    "jamba": ("JambaConfig", "JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": ("BambaConfig", "BambaForCausalLM", {"mamba_d_head": 24, "mamba_n_heads": 8}),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", {"mamba_d_ssm": 96, "mamba_n_heads": 4}),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _EXPERTS),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"full_attn_idxs": [1]}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 16}),
    "gemma3n": ("Gemma3nTextConfig", "Gemma3nForCausalLM", {"num_kv_shared_layers": 1}),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {"num_local_experts": 2, "head_dim": 16}),
    "bert": ("BertConfig", "BertLMHeadModel", {}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_ff": 16, "num_layers": 1}),
    "bart": ("BartConfig", "BartForConditionalGeneration", _ENCODER),
    "gemma3-images": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"text_config": _TEXT, "vision_config": _VISION},
    ),
    "gemma4-wide": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "global_head_dim": 512,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
}
REFUSED = {name: given for name, given in REFUSED.items() if given[1] in _THERE}


def tiny(family: str = "llama", query_heads: int = 6, kv_heads: int = 2, **fields: Any) -> Any:
    """A random model of a family, in eval mode; the same weights for the same arguments."""
    config_class, model_class, own = (FAMILIES | REFUSED)[family]
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    width = {"hidden_size": 16 * query_heads}
    config = getattr(transformers, config_class)(**(_COMMON | heads | width | own | fields))
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


def described(family: str) -> tuple[str, str]:
    """How the table names a family, and what happens to it."""
    name = (FAMILIES | REFUSED)[family][1]
    for tail in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"):
        name = name.removesuffix(tail)
    with torch.device("meta"):  # the shapes are enough
        model = tiny(family)
    try:
        sliding = {kind.window is not None for kind in check_model(model).kinds}
    except UnsupportedModelError as error:
        return name, f"refused: {error.reason}"
    if sliding == {True, False}:
        return name, "full-attention layers are compressed, the others keep their sliding window"
    return name, "every layer keeps its sliding window" if True in sliding else (
        "every layer is compressed"
    )


def markdown() -> str:
    """The table of docs/models.md: one row for everything that may happen, in the order above."""
    rows = defaultdict(list)
    for family in FAMILIES | REFUSED:
        name, fate = described(family)
        if name not in rows[fate]:
            rows[fate].append(name)
    lines = [f"| {', '.join(names)} | {fate} |" for fate, names in rows.items()]
    return "\n".join(["| models | what happens |", "|---|---|", *lines])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    page, flag = Path(sys.argv[1]), "--check" in sys.argv[2:]
    if not fill(page, {"models": markdown}, flag) and flag:
        sys.exit(f"The table of models in {page} is out of date. Run scripts/lint.")
