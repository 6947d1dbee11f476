"""A recipe of each kind that a class or architecture holds, by name; and drawn weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nano_moe.config import MLAConfig, ModelConfig, MoEConfig

SIZES = {
    "vocab_size": 264,  # 7 more than the byte tokenizer's
    "context": 48,
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 96,
}
EXPERTS = {"n_experts": 6, "top_k": 2, "d_expert": 24}
SHARED = {"n_shared_experts": 2}
GATED = SHARED | {"shared_expert_gate": True}
SIGMOID = {"score": "sigmoid", "bias_update_rate": 0.01}
GROUPS = {"n_groups": 3, "top_k_groups": 2}
PLAIN = {"normalize_top_k": False}
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}

# Fields, and the Hugging Face class and GGUF architecture that hold them (None: none).
CASES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "dense": ({}, "Llama", "llama"),
    "dense, untied, wide heads": ({"tie_embeddings": False, "head_dim": 12}, "Llama", "llama"),
    "dense, normed heads": ({"qk_norm": True}, "Qwen3", "qwen3"),
    "sparse": ({"moe": {}}, "Mixtral", "llama"),
    "sparse, scaled": (
        {"moe": {"routed_scaling_factor": 1.7, "per_expert_scale": True}},
        "Mixtral",
        "llama",
    ),
    "sparse, dense first": ({"moe": {"first_k_dense": 1}}, "Ernie4_5_Moe", "glm4moe"),
    "sparse, every second": ({"moe": {"every_n_layers": 2}}, "Ernie4_5_Moe", None),
    "sparse, biased": (
        {"moe": {"bias_update_rate": 0.1, "bias_rule": "error"}},
        "Ernie4_5_Moe",
        "glm4moe",
    ),
    "sparse, one choice": ({"moe": {"top_k": 1}}, "Qwen2Moe", "glm4moe"),
    "shared": ({"moe": SHARED, "tie_embeddings": False}, "Ernie4_5_Moe", "glm4moe"),
    "shared, not normalized": ({"moe": SHARED | PLAIN}, "Qwen2Moe", "glm4moe"),
    "gated": ({"moe": GATED}, "Qwen2Moe", None),
    "gated, not normalized": ({"moe": GATED | PLAIN}, "Qwen2Moe", "qwen2moe"),
    "normed": ({"moe": {}, "qk_norm": True}, "Qwen3Moe", "glm4moe"),
    "normed, one choice": ({"moe": {"top_k": 1}, "qk_norm": True}, "Qwen3Moe", "glm4moe"),
    "normed, noisy": ({"moe": {"noisy_top_k": True}, "qk_norm": True}, "Qwen3Moe", "glm4moe"),
    "normed, biased": (
        {"moe": {"bias_update_rate": 0.1, "bias_rule": "error"}, "qk_norm": True},
        None,
        "glm4moe",
    ),
    "normed, shared": (
        {"moe": SHARED | {"first_k_dense": 1}, "qk_norm": True},
        "Qwen3Next",
        "glm4moe",
    ),
    "normed, gated": ({"moe": GATED, "qk_norm": True, "head_dim": 12}, "Qwen3Next", None),
    "sigmoid": ({"moe": SIGMOID | SHARED | {"first_k_dense": 1}}, "Glm4Moe", "glm4moe"),
    "sigmoid, normed, scaled": (
        {"moe": SIGMOID | {"routed_scaling_factor": 2.5}, "qk_norm": True},
        "Glm4Moe",
        "glm4moe",
    ),
    "sigmoid, groups": (
        {"moe": SIGMOID | GROUPS | {"group_score": "top2_sum"}},
        "Glm4Moe",
        "glm4moe",
    ),
    "sigmoid, groups by their best": ({"moe": SIGMOID | GROUPS}, None, None),
    "latent, dense": ({"mla": MLA}, "DeepseekV3", "deepseek2"),
    "latent, sigmoid": (
        {"mla": MLA | {"q_lora_rank": 10}, "moe": SIGMOID | SHARED | {"first_k_dense": 1}},
        "DeepseekV3",
        "deepseek2",
    ),
    "latent, plain": ({"mla": MLA, "moe": PLAIN | SHARED}, "DeepseekV2", "deepseek2"),
    "latent, groups": ({"mla": MLA, "moe": PLAIN | GROUPS}, "DeepseekV2", None),
    "latent, normalized": ({"mla": MLA, "moe": {}}, None, "deepseek2"),
    "gelu": ({"activation": "gelu"}, None, None),
    "hash": ({"moe": {"routing": "hash"}}, None, None),
    "context router": ({"moe": {"router_window": 2}}, None, None),
}


def config_of_case(name: str) -> ModelConfig:
    fields = SIZES | CASES[name][0]
    if "mla" in fields:
        fields |= {"n_kv_heads": None, "mla": MLAConfig(**fields["mla"])}
    if "moe" in fields:
        fields |= {"moe": MoEConfig(**{**EXPERTS, **fields["moe"]})}
    return ModelConfig(**fields)


# One of each class, for what takes longer.
ONE_OF_EACH = (
    "dense",
    "dense, normed heads",
    "sparse, scaled",
    "normed",
    "shared",
    "gated",
    "normed, shared",
    "sigmoid",
    "latent, sigmoid",
    "latent, plain",
)
HELD = [name for name, (_, family, _) in CASES.items() if family is not None]
REFUSED = [name for name, (_, family, _) in CASES.items() if family is None]
GGUF_HELD = [name for name, (_, _, arch) in CASES.items() if arch is not None]
GGUF_REFUSED = [name for name, (_, _, arch) in CASES.items() if arch is None]


@torch.no_grad()
def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor drawn anew, the selection biases and the norms (around 1) too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        spread = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
        centre = 1.0 if "norm" in name or name.endswith("scale") else 0.0
        tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    return model.eval()
