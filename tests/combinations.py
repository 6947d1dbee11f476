"""Recipes' models drawn field by field, for tests that must hold for any of them."""

from __future__ import annotations

from hypothesis import reject
from hypothesis import strategies as st
from pydantic import ValidationError

from nano_moe.config import MLAConfig, ModelConfig, MoEConfig

LATENT = MLAConfig(
    kv_lora_rank=6, q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10
)
# Each field at its default more often than not, so that most draws are recipes.
MOE = {
    "n_experts": (4, 8, 1),
    "top_k": (2, 1, 3),
    "n_shared_experts": (0, 1),
    "shared_expert_gate": (False, True),
    "first_k_dense": (0, 1),
    "routing": ("token_choice", "hash", "expert_choice"),
    "score": ("softmax", "sigmoid"),
    "normalize_top_k": (None, False),
    "routed_scaling_factor": (1.0, 2.5),
    "per_expert_scale": (False, True),
    "n_groups": (1, 4),
    "top_k_groups": (1, 2),
    "group_score": ("max", "top2_sum"),
    "router_window": (1, 3),
    "train_router": (True, False),
    "noisy_top_k": (False, True),
    "router_jitter": (0.0, 0.2),
    "capacity_factor": (None, 0.5, 1.25),
    "bias_update_rate": (0.0, 0.1),
    "bias_rule": ("sign", "error"),
}
MODEL = {
    "activation": ("swiglu", "gelu"),
    "qk_norm": (False, True),
    "tie_embeddings": (True, False),
}


@st.composite
def models(draw) -> ModelConfig:
    """A tiny sparse model of a few changed fields, if a recipe may say it."""

    def fields(choices: dict) -> dict:
        changed = draw(st.sets(st.sampled_from(sorted(choices)), max_size=6))
        return {name: draw(st.sampled_from(choices[name][1:])) for name in sorted(changed)}

    moe = {"n_experts": 4, "top_k": 2, **fields(MOE)}
    model = {
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_model": draw(st.sampled_from((16, 20))),
        **fields(MODEL),
    }
    if draw(st.booleans()) and not model.get("qk_norm"):
        model |= {"mla": LATENT, "n_kv_heads": None}
    sizes = {"vocab_size": 50, "context": 8, "n_layers": 2, "d_ff": 48, "init_std": 0.3}
    try:
        return ModelConfig(**sizes, **model, moe=MoEConfig(d_expert=8, **moe))
    except ValidationError:
        reject()
