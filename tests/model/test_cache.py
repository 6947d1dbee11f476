"""Reading with a cache gives the logits of reading all at once."""

import pytest
import torch

from nano_moe.config import MLAConfig
from nano_moe.model.cache import Cache

MLA = MLAConfig(kv_lora_rank=8, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6)
KINDS = {
    "dense": {"moe": None},
    "softmax": {},
    "top-1": {"top_k": 1},
    "sigmoid": {"score": "sigmoid", "bias_update_rate": 0.01, "n_shared_experts": 1, "d_expert": 8},
    "gated": {"n_shared_experts": 1, "shared_expert_gate": True, "d_expert": 8},
    "groups": {"n_groups": 2, "top_k_groups": 1},
    "hash": {"routing": "hash"},
    "noisy": {"noisy_top_k": True, "router_jitter": 0.1, "capacity_factor": 1.0},
    "window": {"router_window": 3},
    "scale": {"per_expert_scale": True},
}


@pytest.fixture(params=[None, MLA, "qk_norm"], ids=["gqa", "mla", "qk_norm"])
def attention(request):
    if request.param == "qk_norm":
        return {"qk_norm": True}
    return {} if request.param is None else {"mla": MLA, "n_kv_heads": None}


@pytest.fixture(params=KINDS)
def model(request, attention, moe_config, dense_config, build):
    fields = KINDS[request.param]
    dense = fields.get("moe", 0) is None
    config = dense_config(**attention) if dense else moe_config(moe=fields, **attention)
    return build(config).eval()


def read(model, cache, tokens, *counts):
    """The logits of a forward pass whose rows keep so many tokens each."""
    logits = model(tokens, cache)[0]
    cache.keep(torch.tensor(counts) if counts else None)
    return logits


@torch.no_grad()
def test_logits_are_those_of_reading_all_at_once(model, tokens):
    whole = model(tokens)[0]
    for cuts in ((12,), (1,) * 12, (5, 1, 1, 5), (3, 9)):
        cache, parts = Cache(model.config, 2), []
        for part in tokens.split(cuts, dim=1):
            parts.append(read(model, cache, part))
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_of_different_lengths_do_not_see_each_other(model, tokens):
    """Row 0 has 7 tokens and row 1 has 3; both grow, once by two of which one does not count."""
    first, second = model(tokens[:1])[0], model(tokens[1:])[0]
    cache = Cache(model.config, 2)
    padded = torch.stack([tokens[0, :7], torch.cat([tokens[1, :3], torch.full((4,), 9)])])
    logits = read(model, cache, padded, 7, 3)
    torch.testing.assert_close(logits[0], first[0, :7], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, :3], second[0, :3], rtol=0, atol=1e-5)
    logits = read(model, cache, torch.stack([tokens[0, 7:8], tokens[1, 3:4]]))
    torch.testing.assert_close(logits[0, 0], first[0, 7], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, 0], second[0, 3], rtol=0, atol=1e-5)
    logits = read(model, cache, torch.stack([tokens[0, 8:10], tokens[1, 4:6]]), 2, 1)
    torch.testing.assert_close(logits[0], first[0, 8:10], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1], second[0, 4:6], rtol=0, atol=1e-5)
    cache.select([1])
    logits = read(model, cache, tokens[1:, 5:7])
    torch.testing.assert_close(logits[0], second[0, 5:7], rtol=0, atol=1e-5)


def test_more_than_the_context_is_refused(moe_config, build, tokens):
    model = build(moe_config()).eval()
    cache = Cache(model.config, 2)
    read(model, cache, tokens)
    with pytest.raises(ValueError, match="13 tokens are more than context=12"):
        model(tokens[:, :1], cache)


def test_latent_attention_holds_latents_and_not_what_is_made_of_them(dense_config, build, tokens):
    wide = MLAConfig(kv_lora_rank=4, qk_nope_head_dim=8, qk_rope_head_dim=2, v_head_dim=8)
    held = {}
    for name, fields in (("mla", {"mla": wide, "n_kv_heads": None}), ("mha", {"n_kv_heads": 4})):
        model = build(dense_config(**fields)).eval()
        cache = Cache(model.config, 2)
        read(model, cache, tokens)
        numbers = sum(t.numel() for layer in cache.layers for t in layer.held.values())
        held[name] = numbers // (2 * 12 * 2)  # per row, position and layer
    assert held == {"mla": 4 + 2, "mha": 2 * 4 * 4}
