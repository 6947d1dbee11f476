"""Published models: counted right, from files of either kind and from a bare `model:` block.

The references are figures that the authors print, and the Hugging Face classes built from the
published config.json on the meta device.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as hf

from nano_moe import recipe_file
from nano_moe.accounting import parameters, sparsity, weight_groups
from nano_moe.census import census, count_built
from nano_moe.cli.output import params
from nano_moe.config import MLAConfig, ModelConfig, MoEConfig
from nano_moe.errors import UserError
from nano_moe.published import Published

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "published"

# Billions of parameters: all, and of one token (embeddings, head and routers included).
TARGETS = {
    "mixtral-8x7b": (46.70, 12.88),
    "deepseek-v2": (235.74, 21.38),
    "deepseek-v3": (671.03, 37.55),  # without the multi-token prediction block
    "llama-2-70b": (68.98, 68.98),
    "gpt-3-175b": (174.6, 174.6),
    "switch-c": (1571, None),
    "grok-1": (314, None),
    "gpt-4-rumour": (1800, 280),
}


def read(name: str, *overrides: str) -> Published:
    loaded = recipe_file.load_any(FOLDER / f"{name}.yaml", overrides)
    assert isinstance(loaded, Published)
    return loaded


def hf_parameters(config: hf.PretrainedConfig, *left_out: str) -> tuple[int, int]:
    """All parameters of the Hugging Face model and those of one token, but for names `left_out`."""
    auto = hf.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = hf.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model = auto.from_config(config)
    sizes = {
        name: p.numel()
        for name, p in model.named_parameters()
        if not any(part in name for part in left_out)
    }
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    n_experts = next((getattr(config, f) for f in EXPERTS if getattr(config, f, None)), 1)
    top_k = next((getattr(config, f) for f in TOP_K if getattr(config, f, None)), 1)
    return total, total - experts + experts * top_k // n_experts


EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
TOP_K = ("num_experts_per_tok", "moe_k")


# --- the files -----------------------------------------------------------------------------------


def test_every_published_file_has_a_target():
    assert set(TARGETS) == {path.stem for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("name", TARGETS)
def test_a_published_model_counts_to_its_published_size(name):
    total, active = TARGETS[name]
    counted = census(read(name))
    tolerance = 0.02 if name in ("grok-1", "gpt-4-rumour") else 0.005  # those two are rounded
    assert counted.total_params / 1e9 == pytest.approx(total, rel=tolerance)
    if active is not None:
        assert counted.active_params / 1e9 == pytest.approx(active, rel=2 * tolerance)


HF_OF_FILE = {
    "mixtral-8x7b": hf.MixtralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
    "deepseek-v2": hf.DeepseekV2Config(
        vocab_size=102_400, hidden_size=5120, intermediate_size=12_288, moe_intermediate_size=1536,
        num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=2,
        n_routed_experts=160, num_experts_per_tok=6, kv_lora_rank=512, q_lora_rank=1536,
        qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, first_k_dense_replace=1,
        n_group=8, topk_group=3, tie_word_embeddings=False,
    ),
    "deepseek-v3": hf.DeepseekV3Config(
        vocab_size=129_280, hidden_size=7168, intermediate_size=18_432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1,
        n_routed_experts=256, num_experts_per_tok=8, kv_lora_rank=512, q_lora_rank=1536,
        qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, first_k_dense_replace=3,
        tie_word_embeddings=False,
    ),
    "llama-2-70b": hf.LlamaConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "gpt-3-175b": hf.GPT2Config(
        vocab_size=50_257, n_positions=2048, n_embd=12_288, n_layer=96, n_head=96
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HF_OF_FILE)
def test_a_published_model_equals_the_hugging_face_class_to_the_last_weight(name):
    counted = census(read(name))
    assert (counted.total_params, counted.active_params) == hf_parameters(HF_OF_FILE[name])


def test_switch_c_equals_the_hugging_face_class_to_the_last_weight():
    """Built with few experts, since 2048 take long, and on to 2048: each one adds the same."""

    def built(n_experts: int) -> tuple[int, int]:
        return hf_parameters(
            hf.SwitchTransformersConfig(
                vocab_size=32_128, d_model=2080, d_kv=64, d_ff=6144, num_heads=32, num_layers=15,
                num_decoder_layers=15, num_sparse_encoder_layers=15, num_sparse_decoder_layers=15,
                num_experts=n_experts, tie_word_embeddings=True,
            )
        )  # fmt: skip

    counted = census(read("switch-c"))
    ours = (counted.total_params, counted.active_params)
    assert ours == tuple(a + (2048 - 2) * (b - a) for a, b in zip(built(2), built(3), strict=True))


def test_grok_1_is_a_mixtral_with_two_more_norms_a_block():
    same_but_for_norms = hf.MixtralConfig(
        vocab_size=131_072, hidden_size=6144, intermediate_size=32_768, num_hidden_layers=64,
        num_attention_heads=48, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    counted, norms = census(read("grok-1")), 2 * 64 * 6144
    total, active = hf_parameters(same_but_for_norms)
    assert (counted.total_params, counted.active_params) == (total + norms, active + norms)


def test_what_our_decoder_cannot_be_is_counted_by_formula_and_the_rest_is_built():
    by = {name: census(read(name)).by for name in TARGETS}
    listed = {"gpt-3-175b", "switch-c", "grok-1", "gpt-4-rumour"}
    assert by == {name: "formula" if name in listed else "built" for name in TARGETS}


def test_only_the_rumour_is_a_rumour():
    assert [name for name in TARGETS if read(name).published.rumour] == ["gpt-4-rumour"]


def test_the_readme_prints_what_is_counted():
    table = re.findall(
        r"^\| `recipes/published/(.+?)\.yaml` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {row[0] for row in table} == set(TARGETS)
    for name, total, active, said, by in table:
        counted, published = census(read(name)), read(name).published
        assert (total, active) == (params(counted.total_params), params(counted.active_params))
        quoted = " / ".join(f"{n:,g}B" for n in (published.total, published.active) if n)
        assert (said, by.split(",")[0]) == (quoted, counted.by)
        assert ("rumour" in by) == published.rumour


# --- other published models, as a block of our schema --------------------------------------------

SIGMOID = {"score": "sigmoid", "bias_update_rate": 0.001}
OTHERS = {
    "Qwen3-30B-A3B": (
        {"vocab_size": 151_936, "n_layers": 48, "d_model": 2048, "n_heads": 32, "n_kv_heads": 4,
         "head_dim": 128, "d_ff": 6144, "qk_norm": True},
        {"n_experts": 128, "top_k": 8, "d_expert": 768},
        hf.Qwen3MoeConfig(
            vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768,
            num_experts=128, num_experts_per_tok=8, tie_word_embeddings=False,
        ),
        (), (30.53, 3.35),
    ),
    "OLMoE-1B-7B, but for its norms of all query and key heads at once": (
        {"vocab_size": 50_304, "n_layers": 16, "d_model": 2048, "n_heads": 16, "d_ff": 1024},
        {"n_experts": 64, "top_k": 8, "d_expert": 1024},
        hf.OlmoeConfig(
            vocab_size=50_304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
            tie_word_embeddings=False,
        ),
        ("q_norm", "k_norm"), (6.92, 1.28),
    ),
    "DeepSeek-V2-Lite": (
        {"vocab_size": 102_400, "n_layers": 27, "d_model": 2048, "n_heads": 16, "d_ff": 10_944,
         "mla": MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                          v_head_dim=128)},
        {"n_experts": 64, "top_k": 6, "d_expert": 1408, "n_shared_experts": 2, "first_k_dense": 1},
        hf.DeepseekV2Config(
            vocab_size=102_400, hidden_size=2048, intermediate_size=10_944, n_routed_experts=64,
            moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
            num_key_value_heads=16, n_shared_experts=2, num_experts_per_tok=6, kv_lora_rank=512,
            q_lora_rank=None, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
            first_k_dense_replace=1, tie_word_embeddings=False,
        ),
        (), (15.7, 2.66),
    ),
    "Kimi-K2": (
        {"vocab_size": 163_840, "n_layers": 61, "d_model": 7168, "n_heads": 64, "d_ff": 18_432,
         "mla": MLAConfig(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
                          qk_rope_head_dim=64, v_head_dim=128)},
        {"n_experts": 384, "top_k": 8, "d_expert": 2048, "n_shared_experts": 1,
         "first_k_dense": 1, **SIGMOID},
        hf.DeepseekV3Config(
            vocab_size=163_840, hidden_size=7168, intermediate_size=18_432, n_routed_experts=384,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=64,
            num_key_value_heads=64, n_shared_experts=1, num_experts_per_tok=8, kv_lora_rank=512,
            q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
            first_k_dense_replace=1, n_group=1, topk_group=1, tie_word_embeddings=False,
        ),
        (), (1026, 32.9),
    ),
    "Qwen2-57B-A14B, but for its biases": (
        {"vocab_size": 151_936, "n_layers": 28, "d_model": 3584, "n_heads": 28, "n_kv_heads": 4,
         "d_ff": 18_944},
        {"n_experts": 64, "top_k": 8, "d_expert": 2560, "n_shared_experts": 8,
         "shared_expert_gate": True},
        hf.Qwen2MoeConfig(
            vocab_size=151_936, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, moe_intermediate_size=2560,
            shared_expert_intermediate_size=20_480, num_experts=64, num_experts_per_tok=8,
            tie_word_embeddings=False,
        ),
        (".bias",), (57.4, 14.2),
    ),
    "GLM-4.5-Air, but for its biases": (
        {"vocab_size": 151_552, "n_layers": 46, "d_model": 4096, "n_heads": 96, "n_kv_heads": 8,
         "head_dim": 128, "d_ff": 10_944},
        {"n_experts": 128, "top_k": 8, "d_expert": 1408, "n_shared_experts": 1,
         "first_k_dense": 1, **SIGMOID},
        hf.Glm4MoeConfig(
            vocab_size=151_552, hidden_size=4096, intermediate_size=10_944, num_hidden_layers=46,
            num_attention_heads=96, num_key_value_heads=8, head_dim=128, n_routed_experts=128,
            moe_intermediate_size=1408, num_experts_per_tok=8, n_shared_experts=1,
            first_k_dense_replace=1, attention_bias=True, use_qk_norm=False,
            tie_word_embeddings=False,
        ),
        (".bias",), (106.85, 13.42),
    ),
    "Phi-3.5-MoE, but for its biases": (
        {"vocab_size": 32_064, "n_layers": 32, "d_model": 4096, "n_heads": 32, "n_kv_heads": 8,
         "d_ff": 6400},
        {"n_experts": 16, "top_k": 2, "d_expert": 6400},
        hf.PhimoeConfig(
            vocab_size=32_064, hidden_size=4096, intermediate_size=6400, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=16,
            num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
            tie_word_embeddings=False,
        ),
        (".bias",), (41.9, 6.6),
    ),
    "Mixtral-8x22B": (
        {"vocab_size": 32_768, "n_layers": 56, "d_model": 6144, "n_heads": 48, "n_kv_heads": 8,
         "d_ff": 16_384},
        {"n_experts": 8, "top_k": 2, "d_expert": 16_384},
        hf.MixtralConfig(
            vocab_size=32_768, hidden_size=6144, intermediate_size=16_384, num_hidden_layers=56,
            num_attention_heads=48, num_key_value_heads=8, num_local_experts=8,
            num_experts_per_tok=2,
        ),
        (), (140.6, 39.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_written_in_our_schema_equals_the_hugging_face_class(name):
    fields, moe, config, left_out, (total, active) = OTHERS[name]
    model = ModelConfig(context=4096, tie_embeddings=False, moe=MoEConfig(**moe), **fields)
    built = count_built(model)
    assert built == hf_parameters(config, *left_out) == parameters(weight_groups(model))
    assert built[0] / 1e9 == pytest.approx(total, rel=0.005)
    assert built[1] / 1e9 == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(
    ("name", "fields", "moe", "total", "active"),
    [
        ("DeepSeekMoE-16B (Dai et al. 2024)",
         {"vocab_size": 102_400, "n_layers": 28, "d_model": 2048, "n_heads": 16, "d_ff": 10_944},
         {"n_experts": 64, "top_k": 6, "d_expert": 1408, "n_shared_experts": 2,
          "first_k_dense": 1}, 16.4, 2.8),
        ("DBRX (databricks/dbrx-base)",
         {"vocab_size": 100_352, "n_layers": 40, "d_model": 6144, "n_heads": 48, "n_kv_heads": 8,
          "d_ff": 10_752},
         {"n_experts": 16, "top_k": 4, "d_expert": 10_752}, 132, 36),
    ],
)  # fmt: skip
def test_a_model_written_in_our_schema_has_its_published_size(name, fields, moe, total, active):
    model = ModelConfig(context=4096, tie_embeddings=False, moe=MoEConfig(**moe), **fields)
    built = count_built(model)
    assert built[0] / 1e9 == pytest.approx(total, rel=0.005), name
    assert built[1] / 1e9 == pytest.approx(active, rel=0.02), name


# --- what articles say ---------------------------------------------------------------------------


def test_8x7b_is_eight_times_mistral_7b_only_in_name():
    """Mistral 7B holds 7,241,732,096 weights (mistralai/Mistral-7B-v0.1)."""
    counted = census(read("mixtral-8x7b"))
    found = counted.sparsity
    assert found.one_expert_params == 7_241_732_096
    assert found.all_models_params == 8 * 7_241_732_096
    assert found.outside_params + 8 * found.expert_params == counted.total_params
    assert found.active_share == pytest.approx(0.276, abs=0.001)


def test_compute_is_saved_by_as_much_as_experts_are_left_out(moe_config):
    """With all experts chosen nothing is saved; with half of them, half of the experts' FLOPs."""
    everything, half = (
        sparsity(weight_groups(moe_config(moe={"n_experts": 4, "top_k": k, "d_expert": 16})), 4)
        for k in (4, 2)
    )
    assert everything.compute_saved == 1
    experts = 2 * 2 * 4 * 3 * 16 * 16  # 2 FLOPs, 2 layers, 4 experts, 3 matrices of 16 x 16
    assert everything.flops_per_token - half.flops_per_token == experts // 2
    assert half.dense_flops_per_token == everything.flops_per_token


def test_memory_is_that_of_all_weights_in_each_precision():
    counted = census(read("mixtral-8x7b"))
    per_weight = {p: b / counted.total_params for p, b in counted.weight_bytes.items()}
    assert per_weight == {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}
    assert counted.active_bytes["bf16"] == 2 * counted.active_params


def test_latent_attention_keeps_70_kilobytes_of_a_token_in_deepseek_v3():
    """512 + 64 numbers in each of 61 layers, in bf16 (DeepSeek-AI 2025, arXiv:2505.09343)."""
    assert census(read("deepseek-v3")).kv_cache_bytes_per_token == 70_272
    assert census(read("llama-2-70b")).kv_cache_bytes_per_token == 320 * 1024
    assert census(read("gpt-3-175b")).kv_cache_bytes_per_token is None


# --- files as users write them -------------------------------------------------------------------

LISTED = """\
published:
  name: Mine
  source: my notes
  total: 3
n_experts: 4
weights:
  - name: embedding
    kind: embedding
    shape: [10, 4]
    copies: 1
    active: 1
    source: notes
  - name: experts
    kind: experts
    shape: [4, 4]
    copies: 8
    active: 2
    source: notes
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("x.yaml").write_text(text)


def test_an_override_changes_a_published_model():
    four = census(read("mixtral-8x7b", "model.moe.top_k=4"))
    assert four.total_params == 46_702_792_704
    experts = 32 * 3 * 4096 * 14_336
    assert four.active_params == census(read("mixtral-8x7b")).active_params + 2 * experts


def test_a_model_block_alone_is_counted(write):
    text = (FOLDER / "mixtral-8x7b.yaml").read_text()
    write("model:" + text.partition("\nmodel:")[2])
    loaded = recipe_file.load_any("x.yaml")
    assert loaded.published is None
    assert census(loaded).total_params == 46_702_792_704


@pytest.mark.parametrize("name", TARGETS)
def test_a_dumped_file_reads_back_the_same(write, name):
    write(recipe_file.dump(read(name)))
    assert recipe_file.load_any("x.yaml") == read(name)


def test_a_list_of_weights_sums_its_shapes(write):
    write(LISTED)
    counted = census(recipe_file.load_any("x.yaml"))
    assert (counted.total_params, counted.active_params) == (40 + 8 * 16, 40 + 2 * 16)
    assert counted.sparsity.flops_per_token == 2 * 2 * 16  # a looked-up row multiplies nothing


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("total: 3", "totl: 3", ["x.yaml:4: published.totl: no such field", "'total'"]),
        ("weights:", "wieghts:", ["x.yaml:6: wieghts: no such field", "'weights'"]),
        ("published:", "publishd:", ["x.yaml:1: publishd: no such field", "'published'"]),
        ("    kind: experts", "    knd: experts", ["x.yaml:14: weights.1.knd:", "'kind'"]),
        ("kind: experts", "kind: expert", ["x.yaml:14: weights.1.kind:", "'experts'"]),
        ("[4, 4]", "[4, 0]", ["x.yaml:15: weights.1.shape.1:", "equal to 1, not 0"]),
        ("[4, 4]", "[4, 4.5]", ["x.yaml:15: weights.1.shape.1:", "whole number"]),
        ("active: 2", "active: 9", ["x.yaml:17: weights.1.active:", "copies=8"]),
        ("active: 2", "active: 0", ["x.yaml:6: weights: no token visits an expert"]),
        ("n_experts: 4\n", "", ["x.yaml: n_experts:", "add it"]),
        ("n_experts: 4", "n_experts: 3", ["x.yaml:5: n_experts:", "8 copies"]),
        ("    source: notes\n", "", ["x.yaml:7: weights.0.source: missing"]),
        ("  source: my notes\n", "", ["x.yaml:1: published.source: missing"]),
        ("n_experts: 4", "model:\n  d_ff: 4", ["x.yaml:5: model.vocab_size: missing"]),
        ("n_experts: 4", "optim:\n  lr: 4", ["x.yaml:5: optim: no such field"]),
    ],
)
def test_a_faulty_published_file(write, old, new, parts):
    assert old in LISTED
    write(LISTED.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        recipe_file.load_any("x.yaml")
    for part in parts:
        assert part in str(error.value)


def test_a_model_and_a_list_of_weights_are_one_too_many(write):
    text = (FOLDER / "llama-2-70b.yaml").read_text()
    write(text + LISTED.partition("n_experts: 4\n")[2])
    with pytest.raises(UserError, match="x.yaml:.*: weights: the model block says them already"):
        recipe_file.load_any("x.yaml")
    write(text + "n_experts: 4\n")
    with pytest.raises(UserError, match="n_experts: the model block says it already"):
        recipe_file.load_any("x.yaml")
