"""Read InternLM v1 and InternLM2 checkpoints as transformers' Llama.

transformers has neither, but both have Llama's shape. InternLM v1 adds only biases on the four attention projections.
InternLM2 names its tensors differently, and fuses queries, keys and values into one `wqkv`, see `split_wqkv`.

Sources: the InternLM repositories' modeling_internlm.py and modeling_internlm2.py; arXiv 2403.17297, section 2.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig

_SAME_ENTRIES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps"),
)
_LLAMA_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_PARAMETER = re.compile(r"(model\.layers\.\d+\.)?(.+)\.(weight|bias)")


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Translate the config.json of InternLM v1 or 2 into Llama's configuration.

    Raises:
        KeyError: if an entry is missing.
        ValueError: for rotary embeddings that Llama does not have.
    """
    return LlamaConfig(
        **{name: config[name] for name in _SAME_ENTRIES},
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        attention_bias=config.get("bias", True),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        rope_parameters=_rope_parameters(config),
    )


def llama_weights(weights: Mapping[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Rename the tensors of InternLM v1 or 2 to LlamaForCausalLM's names; unknown names stay.

    Raises:
        ValueError: if the shape of a `wqkv` does not fit the configuration.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        match = _PARAMETER.fullmatch(name)
        layer, module, kind = (match[1] or "", match[2], match[3]) if match else ("", "", "")
        if module == "attention.wqkv":
            for projection, rows in zip("qkv", split_wqkv(name, tensor, config), strict=True):
                renamed[f"{layer}self_attn.{projection}_proj.{kind}"] = rows
        else:
            renamed[f"{layer}{_LLAMA_NAMES[module]}.{kind}" if module in _LLAMA_NAMES else name] = tensor
    return renamed


def split_wqkv(name: str, fused: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the rows of a fused `wqkv` into those of queries, keys and values.

    The rows come in groups, one per key-value head: first the query heads that share it, then its key, then its value.
    With 32 heads and 8 key-value heads, a group is 4 queries, 1 key and 1 value. Llama wants all queries first, in the
    order of the groups, then all keys, then all values.

    Args:
        fused: [(heads + 2 * key-value heads) * head_dim, ...], a weight or a bias.

    Raises:
        ValueError: for another number of rows.
    """
    groups, head_dim = config.num_key_value_heads, config.head_dim
    group_heads = config.num_attention_heads // groups + 2  # the queries, a key and a value
    if fused.shape[0] != groups * group_heads * head_dim:
        raise ValueError(
            f"{name} has shape {tuple(fused.shape)}, but {config.num_attention_heads} heads of {head_dim} in "
            f"{groups} groups need {groups * group_heads * head_dim} rows"
        )
    grouped = fused.unflatten(0, (groups, group_heads, head_dim))
    return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the rotary embeddings of v2 (`rope_theta`, `rope_scaling`) or v1 (`rotary`, dynamic by default)."""
    if "rope_theta" in config:
        rotary = {"base": config["rope_theta"], **(config.get("rope_scaling") or {"type": "origin"})}
    else:
        rotary = config.get("rotary") or {"base": 10000, "type": "dynamic"}
    if rotary["type"] == "origin":
        return {"rope_type": "default", "rope_theta": rotary["base"]}
    if rotary["type"] not in ("dynamic", "linear"):
        raise ValueError(f"rotary embeddings of type {rotary['type']!r}; origin, dynamic and linear are supported")
    factor = rotary.get("factor", rotary.get("scaling_factor", 1.0))
    return {"rope_type": rotary["type"], "rope_theta": rotary["base"], "factor": factor}
