"""metrics.csv and TensorBoard: what is recorded, when, from what, and never twice."""

import csv
import math
import re
import signal
import time
from collections import defaultdict

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from nano_moe.accounting import count
from nano_moe.checkpoints import load_model
from nano_moe.evaluation import evaluate
from nano_moe.training import logbook, module, telemetry, validation
from nano_moe.training.alarm import LoadAlarm
from nano_moe.training.checkpoint import AtomicCheckpointIO
from nano_moe.training.clock import Clock
from nano_moe.training.module import Decoder
from nano_moe.training.optimizers import MuonAdamW

COLUMNS = ["step", "tokens", "flops", "seconds", "train/ce", "train/load_balancing_loss"]
COLUMNS += ["train/router_z_loss", "val/ce", "val/bpb"]
ALWAYS = {"train/loss", "train/ce", "val/ce", "val/bpb", "val_bpb/text", "grad_norm/total"}
ALWAYS |= {"optim/lr/hidden", "optim/lr/embedding", "speed/tokens_per_second"}
BUDGETS = ("tokens", "megaflops", "milliseconds")
ALWAYS |= {f"by_{budget}/{loss}" for budget in BUDGETS for loss in ("train_ce", "val_ce")}
LAYER = ("max_vio", "load_entropy", "max_share", "dead_experts", "router_entropy")
LAYER += ("load_balancing_loss", "router_z_loss")


def events(run) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag, as TensorBoard shows them."""
    reader = EventAccumulator(str(run.path), size_guidance={"scalars": 0})
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def sparse_tags(layers: list[int], experts: int) -> set[str]:
    tags = {"train/load_balancing_loss", "train/router_z_loss", "optim/lr/router", "val/max_vio"}
    tags |= {"grad_norm/router", "grad_norm/experts"}
    tags |= {f"moe/layer{layer}/{figure}" for layer in layers for figure in LAYER}
    return tags | {f"moe_load/layer{i}/{e}" for i in layers for e in range(experts)}


WEIGHTED = {"train/weighted/load_balancing_loss", "train/weighted/router_z_loss"}


@pytest.mark.parametrize(
    ("kind", "tags"),
    [
        ("dense", set()),
        ("softmax", sparse_tags([0, 1], 4) | WEIGHTED),
        ("sigmoid", sparse_tags([1], 4) | {"moe/layer1/bias_spread"}),
    ],
)
def test_a_run_records_these_tags_and_columns(workshop, kind, tags):
    run, _ = workshop.train(workshop.recipe(kind))
    assert events(run).keys() == ALWAYS | tags
    with open(run.metrics_file, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert b"\r" not in run.metrics_file.read_bytes()


def test_rows_come_at_the_recipes_intervals_and_after_the_last_step(workshop):
    changes = {"trainer__steps": 11, "trainer__log_every": 3, "trainer__val_every": 4}
    run, _ = workshop.train(workshop.recipe("softmax", **changes))
    rows = workshop.rows(run)
    train = [int(row["step"]) for row in rows if row["train/ce"]]
    val = [int(row["step"]) for row in rows if row["val/ce"]]
    assert (train, val) == ([3, 6, 9, 11], [4, 8, 11])
    assert len(rows) == len(train) + len(val)
    found = events(run)
    assert [step for step, _ in found["train/ce"]] == train
    assert [step for step, _ in found["val_bpb/text"]] == val
    for row in rows:
        tokens = int(row["step"]) * 4 * 16
        assert int(row["tokens"]) == tokens
        assert int(row["flops"]) == tokens * count(run.recipe()).train_flops_per_token


def test_losses_are_drawn_over_tokens_flops_and_time(workshop):
    run, _ = workshop.train(workshop.recipe("softmax"))
    found, rows = events(run), workshop.rows(run)
    for loss in ("train", "val"):
        series = [(int(r["tokens"]), float(r[f"{loss}/ce"])) for r in rows if r[f"{loss}/ce"]]
        drawn = found[f"by_tokens/{loss}_ce"]
        assert [place for place, _ in drawn] == [tokens for tokens, _ in series]
        assert [value for _, value in drawn] == pytest.approx([ce for _, ce in series], rel=1e-6)
        places = [place for place, _ in found[f"by_megaflops/{loss}_ce"]]
        assert places == [round(int(r["flops"]) / 1e6) for r in rows if r[f"{loss}/ce"]]


def test_a_run_says_what_it_is_and_how_to_lay_it_out(workshop):
    run, result = workshop.train(workshop.recipe("softmax"))
    reader = EventAccumulator(str(run.path), size_guidance={"tensors": 0, "images": 0}).Reload()
    texts = {
        name: reader.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("recipe", "accounting")
    }
    assert "n_experts: 4" in texts["recipe"]
    assert f"| total_params | {count(run.recipe()).total_params:,} |" in texts["accounting"]
    assert "_hparams_/session_start_info" in reader.PluginTagToContent("hparams")
    charts = logbook.layout(run.recipe())
    tags = set(events(run))
    for category in charts.values():
        for _, patterns in category.values():
            assert any(re.fullmatch(patterns[0], tag) for tag in tags), patterns
    images = reader.Images("routing/load")
    assert [image.step for image in images] == [4, 8, 10]
    assert (images[0].width, images[0].height) == (160 + 4 * 36, 3 * 18)
    assert reader.Images("routing/domains")[0].height == (2 * 1 + 1) * 18
    worst = max(layer["max_vio"] for layer in result.evaluation.routing)
    assert events(run)["val/max_vio"][-1] == (10, pytest.approx(worst, rel=1e-6))


def test_a_heat_map_is_darkest_where_the_share_is_largest():
    picture = logbook.heat_map([[0.1, 0.9], [0.5, 0.0]], ["a", "b"], 2)
    corner = [[picture[18 * r + 1, 160 + 36 * c].sum() for c in (0, 1)] for r in (1, 2)]
    assert corner[0][1] < corner[1][0] < corner[0][0] < corner[1][1] == 3 * 255


def test_event_files_of_a_run_on_a_laptop_stay_small(workshop):
    """150 rows and 30 validations of 2 layers of 4 experts; bytes grow with layers and experts."""
    changes = {"trainer__steps": 150, "trainer__log_every": 1, "trainer__val_every": 5}
    run, _ = workshop.train(workshop.recipe("softmax", **changes))
    size = sum(file.stat().st_size for file in run.path.glob("events*"))
    assert size < 1_500_000


def alarm_on(*counts, top_k=1):
    found = LoadAlarm(top_k, every=10, enabled=False)
    return [found.faults(torch.tensor(each), [0, 3][: len(each)]) for each in counts]


def test_an_alarm_names_a_crowded_expert_and_a_dead_one_once():
    told = alarm_on([[25, 25, 25, 25]], [[70, 10, 10, 10]], [[75, 25, 0, 0]], [[75, 25, 0, 0]])
    assert told == [
        [],
        ["layer 0: 70% of the tokens go to expert 0"],
        ["layer 0: experts 2, 3 got no token for 10 steps"],
        [],
    ]


class Stepped:
    """A trainer at a step, of a module with one sparse layer."""

    layers = (0,)

    def __init__(self, step):
        self.global_step = step


def test_an_alarm_sees_all_of_a_step_and_whole_intervals_alone(capsys):
    alarm = LoadAlarm(1, every=2, enabled=True)
    crowded, even = (
        {"counts": torch.tensor([[8, 0, 0, 0]])},
        {"counts": torch.tensor([[0, 8, 0, 0]])},
    )
    for step in (2, 3, 4):  # resumed after step 1
        for outputs in (crowded, even) if step == 3 else (crowded, crowded):
            alarm.on_micro_batch_end(outputs)
        alarm.on_step_end(Stepped(step), Stepped, outputs)
        assert alarm.worst_share == (0.5 if step == 3 else 1.0)
        told = capsys.readouterr().err
        assert ("75% of the tokens go to expert 0" in told) == (step == 4)
        assert ("experts 2, 3 got no token for 2 steps" in told) == (step == 4)


def test_an_alarm_counts_tokens_and_not_assignments():
    """Of top-2 assignments half is all tokens; of 4 experts each has half of the tokens anyway."""
    assert alarm_on([[40, 20, 20, 20, 20, 20, 20, 40]], top_k=2) == [[]]
    (crowded,) = alarm_on([[80, 20, 20, 20, 20, 20, 10, 10]], top_k=2)
    assert crowded == ["layer 0: 80% of the tokens go to expert 0"]
    assert alarm_on([[65, 45, 45, 45]], top_k=2) == [[]]  # 65 % of the tokens, and 50 % is even


def test_tensorboard_and_metrics_csv_hold_the_same_figures(workshop):
    run, _ = workshop.train(workshop.recipe("softmax"))
    found = events(run)
    for tag in COLUMNS[4:]:
        column = [(int(r["step"]), float(r[tag])) for r in workshop.rows(run) if r[tag]]
        assert [step for step, _ in column] == [step for step, _ in found[tag]]
        assert [v for _, v in column] == pytest.approx([v for _, v in found[tag]], rel=1e-6)


def test_training_figures_are_means_over_all_micro_batches_since_the_last_row(
    workshop, monkeypatch
):
    outputs, original = [], Decoder.training_step

    def training_step(decoder, batch, batch_idx):
        outputs.append(original(decoder, batch, batch_idx))
        return outputs[-1]

    monkeypatch.setattr(Decoder, "training_step", training_step)
    changes = {"trainer__steps": 5, "trainer__accumulate": 2, "trainer__log_every": 3}
    run, _ = workshop.train(workshop.recipe("softmax", **changes))
    found = events(run)
    for i, (step, part) in enumerate(((3, outputs[:6]), (5, outputs[6:]))):
        mean = {
            name: sum(o[name].double().sum().item() for o in part) / len(part)
            for name in ("loss", "ce", "load_balancing_loss", "router_z_loss")
        }
        for name, value in mean.items():
            per_layer = value / 2 if name.endswith(("balancing_loss", "z_loss")) else value
            assert found[f"train/{name}"][i] == (step, pytest.approx(per_layer, rel=1e-6))
        weighted = 0.01 * mean["load_balancing_loss"] + 0.001 * mean["router_z_loss"]
        for name, coefficient in (("load_balancing_loss", 0.01), ("router_z_loss", 0.001)):
            recorded = found[f"train/weighted/{name}"][i]
            assert recorded == (step, pytest.approx(coefficient * mean[name], rel=1e-6))
        assert found["train/loss"][i][1] == pytest.approx(mean["ce"] + weighted, rel=1e-6)
        counts = sum(o["counts"] for o in part).double()  # (2 layers, 4 experts)
        assert counts.sum(1).tolist() == [len(part) * 4 * 16 * 2] * 2
        for layer, load in enumerate(counts):
            share = load / load.sum()
            expected = {
                "max_share": share.max(),
                "max_vio": (load.max() - load.mean()) / load.mean(),
                "dead_experts": (load == 0).sum(),
                "load_entropy": -(share * share.clamp_min(1e-30).log()).sum() / math.log(4),
                "router_entropy": sum(o["router_entropy"][layer] for o in part) / len(part),
            }
            for figure, value in expected.items():
                value = pytest.approx(value.item(), rel=1e-5, abs=1e-6)
                assert found[f"moe/layer{layer}/{figure}"][i] == (step, value)
            loads = [found[f"moe_load/layer{layer}/{e}"][i][1] for e in range(4)]
            assert loads == pytest.approx(share.tolist(), rel=1e-6)


def test_what_a_capacity_drops_and_what_a_bias_spans_are_recorded(workshop):
    moe = {"n_experts": 4, "top_k": 2, "capacity_factor": 0.5, "score": "sigmoid"}
    moe |= {"bias_update_rate": 0.01}
    run, _ = workshop.train(workshop.recipe("softmax", model__moe=moe))
    found = events(run)
    per_layer = [[v for _, v in found[f"moe/layer{i}/dropped_share"]] for i in range(2)]
    means = [sum(layers) / 2 for layers in zip(*per_layer, strict=True)]
    assert [v for _, v in found["train/dropped_share"]] == pytest.approx(means, rel=1e-5)
    assert all(0.5 <= share < 1 for share in means)  # 16 tokens x 2 choices for 4 x 4 places
    bias = workshop.checkpoint(run.last)["state_dict"]["model.blocks.1.ffn.router.expert_bias"]
    spread = found["moe/layer1/bias_spread"][-1][1]
    assert spread == pytest.approx((bias.max() - bias.min()).item(), rel=1e-5) and spread > 0


def test_a_recorded_learning_rate_is_the_one_the_step_was_taken_with(workshop, monkeypatch):
    taken, original = defaultdict(list), MuonAdamW.step

    def step(optimizer, closure=None):
        for group in optimizer.param_groups:
            taken[group["name"]].append(group["lr"])
        return original(optimizer, closure)

    monkeypatch.setattr(MuonAdamW, "step", step)
    changes = {"trainer__log_every": 1, "optim__warmup_steps": 3, "optim__router_lr": 0.001}
    run, _ = workshop.train(workshop.recipe("softmax", **changes))
    found = events(run)
    for group, rates in taken.items():
        recorded = [value for _, value in found[f"optim/lr/{group}"]]
        assert recorded == pytest.approx(rates), group


def test_validation_in_training_is_what_eval_says_of_the_same_weights(workshop):
    """Bitwise, for the last step's weights: both sum the same windows in the same order."""
    recipe = workshop.recipe("softmax")
    run, result = workshop.train(recipe)
    rows = [row for row in workshop.rows(run) if row["val/ce"]]
    run.best.unlink()
    _, model, step = load_model(run)
    scored = evaluate(model, workshop.corpus(recipe), batch_size=4, precision="fp32")
    assert (step, int(rows[-1]["step"])) == (10, 10)
    assert (float(rows[-1]["val/ce"]), float(rows[-1]["val/bpb"])) == (
        scored.overall.ce,
        scored.overall.bpb,
    )
    assert result.evaluation == scored


def test_the_best_checkpoint_is_of_the_lowest_validation_loss(workshop, monkeypatch):
    """The run unlearns from step 6 on, so the best is not the last."""
    learned = module.cross_entropy

    def unlearn():
        monkeypatch.setattr(module, "cross_entropy", lambda *args: -learned(*args))

    workshop.during(5, unlearn)
    run, _ = workshop.train(workshop.recipe(trainer__val_every=1))
    losses = [float(row["val/ce"]) for row in workshop.rows(run) if row["val/ce"]]
    best = losses.index(min(losses)) + 1
    assert 1 < best < 9 and len(losses) == 10
    assert workshop.checkpoint(run.best)["global_step"] == best


def test_a_resumed_run_repeats_no_step_and_misses_none(workshop, monkeypatch):
    # TensorBoard reads files in the order of their names, which end in second.host.pid.counter:
    # within one second and process, 10 would come before 9. A resume by a user takes longer.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    recipe = workshop.recipe("softmax", trainer__log_every=1)
    whole, _ = workshop.train(recipe, "whole")
    workshop.signal_at(4, signal.SIGTERM)
    broken, _ = workshop.train(recipe, "broken")
    workshop.during(9, lambda: 1 / 0)  # rows of 7 and 8 are past the checkpoint of step 6
    with pytest.raises(ZeroDivisionError):
        workshop.resume(broken)
    with open(broken.metrics_file, "a") as file:
        file.write("10,640,1079377\n1")  # rows cut short by a power cut, the last to its step's 1
    workshop.resume(broken)
    assert workshop.rows(broken) == workshop.rows(whole)
    mine, theirs = events(broken), events(whole)
    assert mine.keys() == theirs.keys()
    for tag in mine.keys() - {"speed/tokens_per_second"}:
        here, there = mine[tag], theirs[tag]
        if tag.startswith("by_milliseconds/"):  # the clock's own
            here, there = ([value for _, value in series] for series in (here, there))
        assert here == there, tag
    assert [step for step, _ in mine["train/ce"]] == list(range(1, 11))


def test_seconds_only_grow_and_go_on_after_a_resume(workshop):
    workshop.signal_at(5)
    run, stopped = workshop.train(workshop.recipe(trainer__log_every=1))
    done = workshop.resume(run)
    with open(run.metrics_file, newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds)
    assert done.seconds > stopped.seconds > 0
    assert seconds[-1] <= done.seconds + 0.001


def test_seconds_are_of_training_alone(workshop, monkeypatch):
    slept = []

    def slowly(work):
        def wrapped(*args, **named):
            slept.append(0.1)
            time.sleep(0.1)
            return work(*args, **named)

        return wrapped

    for owner, name in ((validation, "evaluate"), (AtomicCheckpointIO, "save_checkpoint")):
        monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))
    begun = time.perf_counter()
    _, result = workshop.train(workshop.recipe())
    assert len(slept) == 3 + 5 + 3  # validations at 4, 8, 10; last.ckpt at 0, 3, 6, 9, 10; best
    assert 0 < result.seconds <= time.perf_counter() - begun - sum(slept)


def test_the_clock_leaves_out_what_is_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    assert clock.read() == 0
    clock.start()
    now[0] += 2
    with clock.paused():
        now[0] += 50
        assert clock.read() == 2
    now[0] += 1
    assert clock.read() == 3
    clock.set(10)
    now[0] += 4
    assert clock.read() == 14


def test_looking_often_does_not_change_the_course(workshop):
    runs = [
        workshop.train(
            workshop.recipe("softmax", trainer__log_every=every, trainer__val_every=every),
            f"run{every}",
        )[0]
        for every in (1, 10)
    ]
    weights = [workshop.checkpoint(run.last)["state_dict"] for run in runs]
    assert workshop.differences(*weights) == []


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA RTX A1000 Laptop GPU", None),
    ],
)
def test_a_peak_is_of_a_device_of_that_name(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert telemetry.peak_flops(torch.device("cuda")) == known
