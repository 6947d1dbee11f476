"""Published models on the command line: counted in words and as JSON, and never trained."""

from pathlib import Path

import pytest

from nano_moe import recipe_file

PUBLISHED = Path(__file__).parents[2] / "recipes" / "published"
MIXTRAL, RUMOUR = str(PUBLISHED / "mixtral-8x7b.yaml"), str(PUBLISHED / "gpt-4-rumour.yaml")


@pytest.mark.parametrize("verb", ["train", "prepare"])
@pytest.mark.parametrize("path", [MIXTRAL, RUMOUR])
def test_a_published_model_is_not_trained_and_the_fault_says_what_to_run(shop, verb, path):
    message = shop.fault(verb, path)
    assert "a published model, for counting only" in message
    assert f"make count RECIPE={path}" in message and "recipes/mixtral.yaml" in message


def test_a_model_block_alone_is_counted_and_its_training_misses_the_rest(shop):
    shop.edit("tiny.yaml", Path("tiny.yaml").read_text().partition("data:")[2], "")
    shop.edit("tiny.yaml", "data:", "")
    shop.edit("tiny.yaml", "seed: 5\n", "")
    assert shop.json("count", "tiny.yaml")["by"] == "built"
    assert "optim: missing" in shop.fault("train", "tiny.yaml")


def test_count_says_all_that_articles_say_of_mixtral(shop):
    status, out, _ = shop.run("count", MIXTRAL)
    assert status == 0
    for part in (
        "Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088)",
        "46,702,792,704", "12,879,925,248", "46.7B", "12.9B",
        "87 GiB", "24 GiB",  # bf16
        "from the modules of the decoder",
        "3.7 times as much", "27.6%", "all 46.70B must be held",
        "8 x 7.242B = 57.93B would count the 1.606B outside the experts 8 times",
        "1.606B outside the experts + 8 x 5.637B = 46.70B", "1.606B + 2 x 5.637B = 12.88B",
    ):  # fmt: skip
        assert part in out


def test_count_as_json_has_the_figures_that_it_has_in_words(shop):
    found = shop.json("count", MIXTRAL)
    assert found["published"]["total"] == 46.7 and found["by"] == "built"
    assert (found["total_params"], found["active_params"]) == (46_702_792_704, 12_879_925_248)
    assert found["weight_bytes"]["bf16"] == 2 * 46_702_792_704
    assert found["active_bytes"]["int4"] == 12_879_925_248 / 2
    assert found["sparsity"]["one_expert_params"] == 7_241_732_096
    assert found["sparsity"]["compute_saved"] == pytest.approx(3.65, abs=0.01)
    for every, used in (("total_params", "params_by_kind"), ("active_params", "active_by_kind")):
        assert sum(found[used].values()) == found[every]
    four = shop.json("count", MIXTRAL, "model.moe.top_k=4")
    assert four["total_params"] == found["total_params"]
    assert four["active_params"] > found["active_params"]


def test_hours_on_a_gpu_are_of_a_training(shop):
    assert "says nothing of a training; drop it" in shop.fault("count", MIXTRAL, "--gpu")
    found = shop.json("count", "tiny.yaml", "--gpu")
    assert found["gpu"]["total_params"] == found["total_params"]
    assert found["gpu"]["seconds"] == found["gpu"]["flops"] / (0.35 * 312e12)
    assert "gpu" not in shop.json("count", "tiny.yaml")


def test_a_changed_model_is_not_shown_beside_its_sources_figures(shop):
    _, out, _ = shop.run("count", MIXTRAL, "model.moe.top_k=4")
    assert "changed: model.moe.top_k=4" in out and "12.9B" not in out and "Jiang" not in out
    message = shop.fault("count", RUMOUR, "n_experts=8")
    assert "lists weights and has no model block" in message


def test_many_experts_are_summed_and_not_taken_for_as_many_models(shop):
    _, out, _ = shop.run("count", str(PUBLISHED / "deepseek-v2.yaml"))
    assert "13.02B outside the experts + 160 x 1.392B = 235.7B" in out and "160 models" not in out


def test_a_list_of_weights_says_that_it_is_one_and_a_rumour_that_it_is_one(shop):
    _, out, _ = shop.run("count", RUMOUR)
    assert out.startswith("RUMOUR: nobody who built GPT-4 has confirmed")
    assert "counted by formula" in out and "from the modules" not in out
    assert shop.json("count", RUMOUR)["published"]["rumour"] is True
    _, out, _ = shop.run("count", MIXTRAL)
    assert "RUMOUR" not in out and "by formula" not in out


def test_activations_are_counted_where_there_is_a_model_block_and_no_training_step(shop):
    kept = shop.json("count", MIXTRAL)["activation_bytes_per_token"]
    assert kept["bf16"]["checkpointed"]["total"] < kept["bf16"]["all"]["total"]
    assert shop.json("count", RUMOUR)["activation_bytes_per_token"] is None
    for path, counted in ((MIXTRAL, True), (RUMOUR, False)):
        _, out, _ = shop.run("count", path)
        assert ("activations that training keeps" in out) == counted
        assert "training step" not in out


def test_a_dense_model_saves_nothing_and_says_nothing_of_it(shop):
    _, out, _ = shop.run("count", str(PUBLISHED / "llama-2-70b.yaml"))
    assert "68,976,648,192" in out and "saved" not in out
    assert shop.json("count", str(PUBLISHED / "llama-2-70b.yaml"))["sparsity"] is None


def test_count_of_a_recipe_says_the_same_of_its_experts(shop):
    counted = shop.json("count", "tiny.yaml")
    found = counted["sparsity"]
    assert found["n_experts"] == 4
    assert found["outside_params"] + 4 * found["expert_params"] == counted["total_params"]
    _, out, _ = shop.run("count", "tiny.yaml")
    assert "4 experts are not 4 models" in out
    _, out, _ = shop.run("count", "tiny.yaml", "model.moe.n_experts=1", "model.moe.top_k=1")
    assert "outside the experts + 1 x" in out and "models" not in out
    assert shop.json("count", "tiny.yaml", "model.moe=null")["sparsity"] is None


@pytest.mark.parametrize("path", [MIXTRAL, RUMOUR])
def test_show_prints_a_published_model_that_reads_back_the_same(shop, path):
    status, out, _ = shop.run("show", path)
    Path("shown.yaml").write_text(out)
    assert status == 0 and ("\nmodel:" in out) != ("\nweights:" in out)
    assert recipe_file.load_any("shown.yaml") == recipe_file.load_any(path)


@pytest.mark.parametrize("verb", ["count", "show"])
def test_a_misspelt_field_of_a_published_model(shop, verb):
    Path("mine.yaml").write_text(Path(MIXTRAL).read_text().replace("source:", "sorce:"))
    message = shop.fault(verb, "mine.yaml")
    assert "mine.yaml:10: published.sorce: no such field; did you mean 'source'?" in message
    assert "no such field" in shop.fault(verb, MIXTRAL, "model.moe.topk=4")
    assert "n_experts=8" in shop.fault(verb, MIXTRAL, "model.moe.top_k=9")
