"""Our decoder against Hugging Face's: equal logits and gradients, with weights carried both ways.

Everything is float32, and every tensor must agree to 1e-5 of its own norm. Sizes are drawn, so no
two dimensions are equal by accident. A new family is a row of CASES, and of FAMILIES there.
Shapes: B batch, T time, D d_model, E experts, F hidden width.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig, GPT2Config, OlmoeConfig
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from nano_moe.config import ModelConfig
from nano_moe.export.families import model_of
from nano_moe.export.tensors import Rule, cut, ffn_rules, joined, rules_of
from nano_moe.model.balance import load_balancing_loss, router_z_loss
from nano_moe.model.ffn import FFN
from nano_moe.model.gpt import GPT
from nano_moe.model.moe import MoE

TOLERANCE = 1e-5
SEEDS = range(4)
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

# Their family, and what a recipe says to be of it, given the sizes that `draw` drew.
CASES = {
    "llama": ("Llama", lambda s: {"tie_embeddings": False}),
    "llama, tied": ("Llama", lambda s: {"head_dim": s.head_dim}),
    "qwen3": ("Qwen3", lambda s: {"head_dim": s.head_dim, "qk_norm": True}),
    "mixtral": ("Mixtral", lambda s: {"moe": s.moe, "tie_embeddings": False}),
    "qwen2_moe": ("Qwen2Moe", lambda s: {"moe": s.moe | s.gated | PLAIN}),
    "qwen2_moe, normalized": ("Qwen2Moe", lambda s: {"moe": s.moe | s.gated | NORMALIZED}),
    "qwen3_moe": ("Qwen3Moe", lambda s: QK_NORM | {"moe": s.moe | PLAIN, "head_dim": s.head_dim}),
    "qwen3_moe, normalized": ("Qwen3Moe", lambda s: QK_NORM | {"moe": s.moe | NORMALIZED}),
    "qwen3_moe, dense first": ("Qwen3Moe", lambda s: QK_NORM | {"moe": s.moe | DENSE_FIRST}),
    "qwen3_moe, every second": ("Qwen3Moe", lambda s: QK_NORM | {"moe": s.moe | EVERY_SECOND}),
    "glm4_moe": ("Glm4Moe", lambda s: {"moe": s.moe | s.biased, "tie_embeddings": False}),
    "glm4_moe, qk_norm": ("Glm4Moe", lambda s: QK_NORM | {"moe": s.moe | s.biased | s.groups}),
    "glm4_moe, head_dim": ("Glm4Moe", lambda s: {"moe": s.moe | s.biased, "head_dim": s.head_dim}),
    "glm4_moe, not normalized": ("Glm4Moe", lambda s: {"moe": s.moe | s.biased | PLAIN}),
    "deepseek_v2": ("DeepseekV2", lambda s: s.latent | {"moe": s.moe | s.shared | PLAIN}),
    "deepseek_v2, groups": (
        "DeepseekV2",
        lambda s: s.latent | {"moe": s.moe | s.shared | s.groups | PLAIN | {"group_score": "max"}},
    ),
    "deepseek_v3": ("DeepseekV3", lambda s: s.latent | {"moe": s.moe | s.biased | s.groups}),
    "deepseek_v3, whole queries": (
        "DeepseekV3",
        lambda s: whole_queries(s.latent) | {"moe": s.moe | s.biased | s.groups},
    ),
}
NORMALIZED, PLAIN = {"normalize_top_k": True}, {"normalize_top_k": False}
DENSE_FIRST, EVERY_SECOND = {"first_k_dense": 1}, {"every_n_layers": 2}
QK_NORM = {"qk_norm": True}


def whole_queries(latent: dict) -> dict:
    return latent | {"mla": latent["mla"] | {"q_lora_rank": None}}


def draw(seed: int) -> SimpleNamespace:
    """Sizes of a tiny decoder, and what of a recipe's fields depends on them."""
    pick = random.Random(seed)
    while True:
        chosen = sizes(pick)
        if len(set(chosen.dimensions)) == len(chosen.dimensions):
            return chosen


def sizes(pick: random.Random) -> SimpleNamespace:
    """One draw; in `dimensions`, those of its tensors that must not be mistaken for one another."""
    n_groups, size, n_shared = pick.choice((3, 4)), pick.choice((2, 3)), pick.choice((1, 2))
    n_experts, top_k_groups = n_groups * size, pick.randrange(2, n_groups)
    top_k = pick.randrange(2, min(4, top_k_groups * size) + 1)
    d_expert, d_ff = 8 * pick.choice((2, 3, 5)), pick.randrange(40, 90)
    kv_heads, narrow, wide = pick.choice((1, 2, 3)), pick.choice((4, 6, 8)), pick.choice((10, 12))
    n_heads = kv_heads * pick.choice((2, 3))
    vocab_size, context, width = pick.randrange(40, 70), pick.randrange(9, 16), n_heads * narrow
    latents = pick.sample(range(4, 20, 2), 5)
    mla = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    shared = {"n_shared_experts": n_shared, "routed_scaling_factor": pick.uniform(0.5, 3)}
    keys = kv_heads * narrow, kv_heads * wide, n_heads * wide
    shared_width = (2 * d_expert,) if n_shared == 2 else ()
    return SimpleNamespace(
        dimensions=(vocab_size, context, width, d_ff, d_expert, n_experts, *keys, *shared_width),
        head_dim=wide,
        model={
            "n_layers": pick.choice((2, 3)),
            "n_heads": n_heads,
            "n_kv_heads": kv_heads,
            "d_model": width,
            "vocab_size": vocab_size,
            "context": context,
            "d_ff": d_ff,
            "rope_theta": pick.choice((100.0, 5_000.0, 500_000.0)),
            "norm_eps": pick.choice((1e-6, 1e-3)),
        },
        moe={"n_experts": n_experts, "top_k": top_k, "d_expert": d_expert},
        groups={"n_groups": n_groups, "top_k_groups": top_k_groups, "group_score": "top2_sum"},
        gated={"n_shared_experts": n_shared, "shared_expert_gate": True},
        shared=shared | DENSE_FIRST,
        biased=shared | DENSE_FIRST | {"score": "sigmoid", "bias_update_rate": 1e-3},
        latent={
            "n_kv_heads": None,
            "norm_eps": 1e-6,
            "mla": dict(zip(mla, latents, strict=True)),
        },
    )


def case_of(name: str, seed: int) -> tuple[str, ModelConfig]:
    family, fields = CASES[name]
    chosen = draw(seed)
    return family, ModelConfig(**chosen.model | fields(chosen))


@torch.no_grad()
def drawn(model: nn.Module, seed: int) -> nn.Module:
    """Every tensor drawn anew, the selection biases and the norms (around 1) too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        spread = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
        centre = 1.0 if "norm" in name or name.endswith("scale") else 0.0
        tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    return model


def answers(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the model makes of `x`, and every parameter's gradient of one drawn projection of it."""
    y = model(x)
    y = y[0] if isinstance(y, tuple) else getattr(y, "logits", y)
    generator = torch.Generator().manual_seed(7)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    parameters = model.named_parameters(remove_duplicate=False)
    return y.detach(), {name: parameter.grad for name, parameter in parameters}


def assert_equal(ours: Tensor, theirs: Tensor, name: str = "outputs") -> None:
    assert ours.shape == theirs.shape, name
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


def assert_all_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)


def tokens_of(config: ModelConfig, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (2, config.context), generator=generator)


def carried_over(name: str, seed: int) -> tuple[list[Rule], nn.Module, nn.Module, Tensor]:
    """Our drawn decoder, theirs with its weights, the rules in between, and tokens."""
    family, config = case_of(name, seed)
    rules, ours = rules_of(family, config), drawn(GPT(config).eval(), seed)
    theirs = model_of(family, config, **EAGER)
    theirs.load_state_dict(cut(ours.state_dict(), rules))
    return rules, ours, theirs, tokens_of(config, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_hugging_face(case, seed):
    _, ours, theirs, tokens = carried_over(case, seed)
    with torch.no_grad():
        assert_equal(ours(tokens)[0], theirs(tokens).logits)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_hugging_face(case, seed):
    rules, ours, theirs, tokens = carried_over(case, seed)
    _, our_gradients = answers(ours, tokens)
    _, their_gradients = answers(theirs, tokens)
    assert_all_equal(cut(our_gradients, rules), their_gradients)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_weights_of_hugging_face_do_the_same_in_our_decoder(case, seed):
    family, config = case_of(case, seed)
    theirs, ours = drawn(model_of(family, config, **EAGER), seed), GPT(config).eval()
    rules = rules_of(family, config)
    ours.load_state_dict(joined(theirs.state_dict(), rules))
    tokens = tokens_of(config, seed)
    our_logits, our_gradients = answers(ours, tokens)
    their_logits, their_gradients = answers(theirs, tokens)
    assert_equal(our_logits, their_logits)
    assert_all_equal(our_gradients, joined(their_gradients, rules))


# What the cases claim to compare: a case, and the fields that take it out of our decoder.
SWITCHES = {
    "groups": ("deepseek_v3", {"n_groups": 1, "top_k_groups": 1, "group_score": "max"}),
    "group score": ("deepseek_v3", {"group_score": "max"}),
    "selection bias": ("glm4_moe", {"bias_update_rate": 0.0}),
    "scaling factor": ("glm4_moe", {"routed_scaling_factor": 1.0}),
    "normalization": ("qwen3_moe, normalized", PLAIN),
    "softmax": ("deepseek_v2, groups", {"score": "sigmoid"}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case, change", SWITCHES.values(), ids=SWITCHES)
def test_what_the_cases_compare_shows_in_the_logits(case, change, seed):
    _, config = case_of(case, seed)
    model = drawn(GPT(config).eval(), seed)
    fields = config.model_dump()
    without = GPT(ModelConfig(**fields | {"moe": fields["moe"] | change})).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    tokens = tokens_of(config, seed)
    with torch.no_grad():
        logits = model(tokens)[0]
        assert (without(tokens)[0] - logits).norm() > 1e-2 * logits.norm()


def sparse(seed: int, moe: dict, **fields) -> tuple[ModelConfig, MoE, Tensor]:
    """A drawn sparse layer and its input."""
    chosen = draw(seed)
    config = ModelConfig(**chosen.model | fields | {"moe": chosen.moe | moe})
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, config.context, config.d_model, generator=generator)
    return config, drawn(MoE(config).eval(), seed), x


def assert_same_layer(ours: nn.Module, theirs: nn.Module, x: Tensor, rules: list[Rule]) -> None:
    theirs.load_state_dict(cut(ours.state_dict(), rules))
    our_y, our_gradients = answers(ours, x)
    their_y, their_gradients = answers(theirs.eval(), x)
    assert_equal(our_y, their_y)
    assert_all_equal(cut(our_gradients, rules), their_gradients)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("choice", [NORMALIZED, PLAIN], ids=str)
def test_a_sparse_layer_is_that_of_olmoe(choice, seed):
    config, ours, x = sparse(seed, choice)
    fields = OlmoeConfig(
        hidden_size=config.d_model,
        num_experts=config.moe.n_experts,
        num_experts_per_tok=config.moe.top_k,
        norm_topk_prob=config.moe.normalizes,
        intermediate_size=config.expert_width,
        experts_implementation="eager",
    )
    assert_same_layer(ours, olmoe.OlmoeSparseMoeBlock(fields), x, ffn_rules("Olmoe"))


class Gemma4Layer(nn.Module):
    """Gemma 4's router, without the norm and the factors before it, and its experts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        fields = Gemma4TextConfig(
            hidden_size=config.d_model,
            num_experts=config.moe.n_experts,
            top_k_experts=config.moe.top_k,
            moe_intermediate_size=config.expert_width,
            hidden_activation="silu",
            experts_implementation="eager",
        )
        self.router, self.experts = (
            gemma4.Gemma4TextRouter(fields),
            gemma4.Gemma4TextExperts(fields),
        )
        self.router.norm = nn.Identity()
        del self.router.scale
        self.router.scale = 1 / self.router.scalar_root_size

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        rows = x.flatten(0, 1)
        _, weights, ids = self.router(rows)
        return self.experts(rows, ids, weights).view_as(x)


@pytest.mark.parametrize("seed", SEEDS)
def test_scales_per_expert_are_those_of_gemma_4(seed):
    config, ours, x = sparse(seed, {"per_expert_scale": True})
    rules = [
        Rule("router.weight", ("router.proj.weight",)),
        Rule("router.scale", ("router.per_expert_scale",)),
        Rule("experts.gate_up", ("experts.gate_up_proj",)),
        Rule("experts.down", ("experts.down_proj",)),
    ]
    assert_same_layer(ours, Gemma4Layer(config), x, rules)


def gpt2_mlp(up: Tensor, down: Tensor) -> nn.Module:
    """GPT-2's MLP without biases, from our weights (F, D) and (D, F)."""
    made = gpt2.GPT2MLP(len(up), GPT2Config(n_embd=len(down), activation_function="gelu"))
    weights = {"c_fc.weight": up.T, "c_proj.weight": down.T}
    zeros = {"c_fc.bias": torch.zeros(len(up)), "c_proj.bias": torch.zeros(len(down))}
    made.load_state_dict(weights | zeros)
    return made.eval()


def test_a_gelu_ffn_is_that_of_gpt2():
    ours = drawn(FFN(10, 24, "gelu"), seed=0)
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    our_y, gradients = answers(ours, x)
    their_y, theirs = answers(gpt2_mlp(ours.up.weight.detach(), ours.down.weight.detach()), x)
    assert_equal(our_y, their_y)
    assert_equal(gradients["up.weight"], theirs["c_fc.weight"].T)
    assert_equal(gradients["down.weight"], theirs["c_proj.weight"].T)


class DenseMixture(nn.Module):
    """Every expert an MLP of GPT-2 that sees every token; weights of a given routing."""

    def __init__(self, layer: MoE, x: Tensor):
        super().__init__()
        routing, experts = layer.router(x), layer.experts
        n_experts = len(experts.down)
        spread = torch.zeros(len(routing.ids), n_experts)
        self.weights = spread.scatter(1, routing.ids, routing.weights).detach()  # (B*T, E)
        self.experts = nn.ModuleList(
            gpt2_mlp(experts.up[e].detach(), experts.down[e].detach()) for e in range(n_experts)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        outputs = torch.stack([expert(x.flatten(0, 1)) for expert in self.experts], 1)
        return (outputs * self.weights.unsqueeze(-1)).sum(1).view_as(x)


@pytest.mark.parametrize("seed", SEEDS)
def test_gelu_experts_are_mlps_of_gpt2(seed):
    _, ours, x = sparse(seed, {}, activation="gelu")
    theirs = DenseMixture(ours, x)
    our_y, our_gradients = answers(ours, x)
    their_y, their_gradients = answers(theirs, x)
    assert_equal(our_y, their_y)
    for name, layer in (("experts.up", "c_fc"), ("experts.down", "c_proj")):
        each = [their_gradients[f"experts.{e}.{layer}.weight"] for e in range(len(theirs.experts))]
        assert_equal(our_gradients[name], torch.stack(each).mT, name)


def assert_same_loss(ours: Tensor, theirs: Tensor, router: nn.Module) -> None:
    """Equal values, and equal gradients of the router's weight."""
    assert_equal(ours.detach(), theirs.detach(), "loss")
    (our_gradient,) = torch.autograd.grad(ours, router.weight, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, router.weight)
    assert_equal(our_gradient, their_gradient, "gradient")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_load_balancing_loss_is_that_of_mixtral_over_top_k(seed):
    config, layer, x = sparse(seed, {})
    routing, moe = layer.router(x), config.moe
    ours = load_balancing_loss(counts=routing.counts, probs=routing.probs)
    theirs = mixtral.load_balancing_loss_func((routing.logits,), moe.n_experts, moe.top_k)
    assert_same_loss(ours, theirs / moe.top_k, layer.router)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_load_balancing_loss_of_one_choice_is_that_of_switch(seed):
    _, layer, x = sparse(seed, {"top_k": 1})
    routing = layer.router(x)
    ours = load_balancing_loss(counts=routing.counts, probs=routing.probs)
    theirs = switch.load_balancing_loss_func(routing.probs.unsqueeze(0), routing.ids.T)
    assert_same_loss(ours, theirs, layer.router)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_z_loss_is_that_of_switch(seed):
    _, layer, x = sparse(seed, {})
    logits = layer.router(x).logits
    theirs = switch.router_z_loss_func(logits.unsqueeze(0))
    assert_same_loss(router_z_loss(logits=logits), theirs, layer.router)
