"""InternLM v1, InternLM2 and CoLLaVO-7B in plain torch, written from their published descriptions.

Tensors go by the names of the original checkpoints; one sequence at a time, without cache or padding. Nothing here is
shared with the code under test, nor with transformers' Llama.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of one head [tokens, head_dim]: dimension i turns with dimension i + head_dim / 2."""
    tokens, dim = x.shape
    out = torch.empty_like(x)
    for i in range(dim // 2):
        angle = torch.arange(tokens) * base ** (-2 * i / dim)
        first, second = x[:, i], x[:, i + dim // 2]
        out[:, i] = first * angle.cos() - second * angle.sin()
        out[:, i + dim // 2] = second * angle.cos() + first * angle.sin()
    return out


def ntk_base(config: dict[str, Any], tokens: int) -> float:
    """The base of the rotary embedding; dynamic NTK scaling raises it once a sequence outgrows the training length."""
    rotary = config.get("rotary") or {"base": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    longest, dim = config["max_position_embeddings"], config["hidden_size"] // config["num_attention_heads"]
    if rotary.get("type") != "dynamic" or tokens <= longest:
        return rotary["base"]
    factor = rotary.get("factor", rotary.get("scaling_factor", 1.0))
    return rotary["base"] * (factor * tokens / longest - (factor - 1)) ** (dim / (dim - 2))


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, base: float) -> torch.Tensor:
    """Causal attention of one head, [tokens, head_dim] each."""
    scores = rotated(q, base) @ rotated(k, base).T / math.sqrt(q.shape[1])
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


def linear(weights: Weights, name: str, x: torch.Tensor, image: torch.Tensor | None, cells: Any = None) -> torch.Tensor:
    """A linear layer, with the branches of CoLLaVO-7B where it has them: at image tokens, alpha / r = 1."""
    if f"{name}.Plora_main.weight" not in weights:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out
    out = linear(weights, f"{name}.Plora_main", x, None)
    if image is not None:
        out[image] += x[image] @ weights[f"{name}.Plora_A.weight"].T @ weights[f"{name}.Plora_B.weight"].T
        if cells is not None:
            out[image] += cells @ weights[f"{name}.Plora_seg_A.weight"].T @ weights[f"{name}.Plora_seg_B.weight"].T
    return out


def internlm2_logits(
    weights: Weights,
    config: dict[str, Any],
    embeds: torch.Tensor,
    image: torch.Tensor | None = None,
    cells: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [tokens, vocabulary] of embeddings [tokens, hidden]; `image` marks the tokens that `cells` belong to."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim, shared = config["hidden_size"] // heads, heads // groups
    base = ntk_base(config, len(embeds))
    x = embeds
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        h = rms_norm(x, weights[f"{layer}.attention_norm.weight"], config["rms_norm_eps"])
        qkv = linear(weights, f"{layer}.attention.wqkv", h, image, cells)
        contexts = []
        for group in range(groups):
            rows = qkv[:, group * (shared + 2) * dim : (group + 1) * (shared + 2) * dim]
            *queries, key, value = rows.split(dim, dim=1)
            contexts += [attended(query, key, value, base) for query in queries]
        x = x + linear(weights, f"{layer}.attention.wo", torch.cat(contexts, 1), image, cells)
        h = rms_norm(x, weights[f"{layer}.ffn_norm.weight"], config["rms_norm_eps"])
        gate = linear(weights, f"{layer}.feed_forward.w1", h, image, cells)
        up = linear(weights, f"{layer}.feed_forward.w3", h, image, cells)
        x = x + linear(weights, f"{layer}.feed_forward.w2", gate * gate.sigmoid() * up, image)
    return rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["output.weight"].T


def internlm_v1_logits(weights: Weights, config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of InternLM v1."""
    dim = config["hidden_size"] // config["num_attention_heads"]
    base = ntk_base(config, len(ids))
    x = weights["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        h = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = (linear(weights, f"{layer}.self_attn.{p}_proj", h, None).split(dim, 1) for p in "qkv")
        context = torch.cat([attended(*head, base) for head in zip(q, k, v, strict=True)], 1)
        x = x + linear(weights, f"{layer}.self_attn.o_proj", context, None)
        h = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate = linear(weights, f"{layer}.mlp.gate_proj", h, None)
        up = linear(weights, f"{layer}.mlp.up_proj", h, None)
        x = x + linear(weights, f"{layer}.mlp.down_proj", gate * gate.sigmoid() * up, None)
    return rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["lm_head.weight"].T


def clip_patch_features(weights: Weights, prefix: str, pixels: torch.Tensor, heads: int) -> torch.Tensor:
    """Last hidden layer of a CLIP vision encoder without the class token: [patches, width] of [3, height, width]."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{prefix}{name}.weight"] + weights[f"{prefix}{name}.bias"]

    kernel = weights[f"{prefix}embeddings.patch_embedding.weight"]
    side = kernel.shape[-1]
    patches = pixels.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
    x = torch.cat([weights[f"{prefix}embeddings.class_embedding"][None], patches @ kernel.flatten(1).T])
    x = norm("pre_layrnorm", x + weights[f"{prefix}embeddings.position_embedding.weight"])
    for n in range(sum(name.startswith(prefix) and name.endswith("mlp.fc1.weight") for name in weights)):
        layer = f"encoder.layers.{n}"
        h = norm(f"{layer}.layer_norm1", x)
        q, k, v = (linear(weights, f"{prefix}{layer}.self_attn.{p}_proj", h, None).chunk(heads, 1) for p in "qkv")
        context = [(a @ b.T / math.sqrt(a.shape[1])).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = x + linear(weights, f"{prefix}{layer}.self_attn.out_proj", torch.cat(context, 1), None)
        h = linear(weights, f"{prefix}{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x), None)
        x = x + linear(weights, f"{prefix}{layer}.mlp.fc2", h * (1.702 * h).sigmoid(), None)
    return x[1:]


def mlp(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Two linear layers, `name.0` and `name.2`, with an exact GELU between."""
    h = linear(weights, f"{name}.0", x, None)
    return linear(weights, f"{name}.2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), None)


def release_logits(
    weights: Weights,
    config: dict[str, Any],
    ids: list[int],
    image_token: int,
    pixels: torch.Tensor,
    semantic: torch.Tensor,
    numbering: torch.Tensor,
) -> torch.Tensor:
    """Logits of CoLLaVO-7B for ids in which one `image_token` stands for the image; queries [rows, columns] each."""
    vision = "vit.vision_tower.vision_model."
    heads = len(weights[f"{vision}embeddings.class_embedding"]) // 64
    features = mlp(weights, "vision_proj", clip_patch_features(weights, vision, pixels, heads))
    queries = weights["seg_prompt_embed.weight"][semantic] + weights["seg_num_embed.weight"][numbering]
    cells = mlp(weights, "vision_proj_for_seg", queries.flatten(0, 1))
    at = ids.index(image_token)
    table = weights["model.tok_embeddings.weight"]
    embeds = torch.cat([table[ids[:at]], features, table[ids[at + 1 :]]])
    image = torch.zeros(len(embeds), dtype=torch.bool)
    image[at : at + len(features)] = True
    return internlm2_logits(weights, config, embeds, image, cells)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Tensors of these shapes: norms around one, the others of a scale at which every part of a model shows."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def save_checkpoint(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def internlm2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    fused = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (config["vocab_size"], hidden),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.attention.wqkv.weight": (fused, hidden),
            f"{layer}.attention.wo.weight": (hidden, hidden),
            f"{layer}.feed_forward.w1.weight": (inner, hidden),
            f"{layer}.feed_forward.w3.weight": (inner, hidden),
            f"{layer}.feed_forward.w2.weight": (hidden, inner),
            f"{layer}.attention_norm.weight": (hidden,),
            f"{layer}.ffn_norm.weight": (hidden,),
        }
        if config["bias"]:
            shapes |= {f"{layer}.attention.wqkv.bias": (fused,), f"{layer}.attention.wo.bias": (hidden,)}
    return shapes


def internlm_v1_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for projection in "qkvo":
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (hidden, hidden)
            if config["bias"]:
                shapes[f"{layer}.self_attn.{projection}_proj.bias"] = (hidden,)
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.rotary_emb.inv_freq": (hidden // config["num_attention_heads"] // 2,),
        }
    return shapes


def clip_shapes(prefix: str, width: int, layers: int, patch_size: int, cells: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.class_embedding": (width,),
        f"{prefix}embeddings.patch_embedding.weight": (width, 3, patch_size, patch_size),
        f"{prefix}embeddings.position_embedding.weight": (1 + cells, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for n in range(layers):
        layer = f"encoder.layers.{n}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name, rows, columns in (
            *((f"self_attn.{p}_proj", width, width) for p in ("q", "k", "v", "out")),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{prefix}{layer}.{name}.weight": (rows, columns), f"{prefix}{layer}.{name}.bias": (rows,)}
    return shapes | {f"{prefix}{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}


def release_shapes(
    config: dict[str, Any], rank: int, width: int, grid: int, patch_size: int
) -> dict[str, tuple[int, ...]]:
    """CoLLaVO-7B: InternLM2 whose linear layers are `Plora_main` beside two families of branches, and the rest."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in internlm2_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if ".attention.w" not in name and ".feed_forward.w" not in name:
            shapes[name] = shape
            continue
        shapes[f"{module}.Plora_main.{kind}"] = shape
        if kind == "weight":
            rows, columns = shape
            for family in ("Plora", "Plora_seg"):
                shapes |= {f"{module}.{family}_A.weight": (rank, columns), f"{module}.{family}_B.weight": (rows, rank)}
    # One more row than the language head has: that of <image>.
    shapes["model.tok_embeddings.weight"] = (config["vocab_size"] + 1, hidden)
    shapes |= {"seg_prompt_embed.weight": (134, width), "seg_num_embed.weight": (21, width)}
    for name in ("vision_proj", "vision_proj_for_seg"):
        shapes |= {f"{name}.0.weight": (hidden, width), f"{name}.0.bias": (hidden,)}
        shapes |= {f"{name}.2.weight": (hidden, hidden), f"{name}.2.bias": (hidden,)}
    return shapes | clip_shapes("vit.vision_tower.vision_model.", width, 2, patch_size, grid * grid)
