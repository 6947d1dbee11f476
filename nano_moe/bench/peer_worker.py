"""One decoder in a process of its own, which takes training steps when asked: a side of `peers`.

Run by path in the interpreter of the library it plays, so it needs torch and that library alone
(nano_moe is imported by `ours` only). The job comes as JSON on the command line:
{"side", "model" (fields of our ModelConfig), "batch_size", "threads"}. Then one JSON line answers
each line read:
    on start                              -> {"name", "torch", "parameters", "choices", "refused"}
    {"use": {"precision", choice: value}} -> {}
    {"steps": n}                          -> {"seconds": [n of them], "loss"}
A fault is answered by {"fault": one line}; the end of the input ends the process.

Every side trains in float32 weights, under autocast where the precision is bf16, with one and the
same torch.optim.AdamW on the same random tokens.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = 4  # different ones, in turn
LARGEST_COPY = 2**30  # bytes; batched_mm copies an expert's weights for every assignment


@dataclass
class Side:
    """A decoder, its training loss (B, T), (B, T) -> scalar, and what can be chosen about it."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    choices: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)  # choice -> value -> why not
    use: Callable[[dict[str, str]], None] = lambda chosen: None


def ours(model: dict[str, Any], batch_size: int) -> Side:
    """Our decoder, with the load-balancing loss and without a z-loss."""
    from nano_moe.config import ModelConfig
    from nano_moe.model.balance import load_balancing_loss
    from nano_moe.model.gpt import GPT, init_weights
    from nano_moe.model.loss import cross_entropy

    config = ModelConfig.model_validate(model)
    gpt = init_weights(GPT(config), seed=0)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits, routings = gpt(tokens)
        total = cross_entropy(logits, targets)
        if config.moe is not None and config.moe.load_balancing_loss:
            for routing in filter(None, routings):
                term = load_balancing_loss(counts=routing.counts, probs=routing.probs)
                total = total + config.moe.load_balancing_loss * term
        return total

    return Side("ours", gpt, loss)


def transformers(model: dict[str, Any], batch_size: int) -> Side:
    """Qwen3Moe or Mixtral, Qwen3 or Llama: by `moe` and `qk_norm`."""
    import transformers

    moe = model["moe"]
    if moe is None:
        family = "Qwen3" if model["qk_norm"] else "Llama"
    else:
        family = "Qwen3Moe" if model["qk_norm"] else "Mixtral"
    config = getattr(transformers, f"{family}Config")(**_hugging_face_fields(model))
    decoder = getattr(transformers, f"{family}ForCausalLM")(config)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return decoder(tokens, labels=tokens, shift_labels=targets, use_cache=False).loss

    def use(chosen: dict[str, str]) -> None:
        decoder.set_attn_implementation(chosen["attention"])
        if moe is not None:
            decoder.set_experts_implementation(chosen["experts"])

    name = f"transformers {transformers.__version__} {family}"
    side = Side(name, decoder, loss, use=use)
    if moe is not None:
        side.choices["experts"] = ["grouped_mm", "eager", "batched_mm"]
        assignments = batch_size * model["context"] * moe["top_k"]
        copied = assignments * 3 * model["d_model"] * moe["d_expert"] * 4
        if copied > LARGEST_COPY:
            why = f"would copy {copied / 2**30:.1f} GiB of weights in each layer"
            side.refused["experts"] = {"batched_mm": why}
    side.choices["attention"] = ["sdpa", "eager"]
    return side


def _hugging_face_fields(model: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "vocab_size": model["vocab_size"],
        "max_position_embeddings": model["context"],
        "num_hidden_layers": model["n_layers"],
        "hidden_size": model["d_model"],
        "num_attention_heads": model["n_heads"],
        "num_key_value_heads": model["n_kv_heads"] or model["n_heads"],
        "head_dim": model["head_dim"] or model["d_model"] // model["n_heads"],
        "intermediate_size": model["d_ff"],
        "rms_norm_eps": model["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": model["rope_theta"]},
        "tie_word_embeddings": model["tie_embeddings"],
    }
    moe = model["moe"]
    if moe is None:
        return fields
    return fields | {
        "num_experts_per_tok": moe["top_k"],
        "norm_topk_prob": True,
        "router_aux_loss_coef": moe["load_balancing_loss"],
        "output_router_logits": moe["load_balancing_loss"] > 0,
        "intermediate_size": moe["d_expert"],  # Mixtral's name, and Qwen3Moe's
        "moe_intermediate_size": moe["d_expert"],
        "num_local_experts": moe["n_experts"],
        "num_experts": moe["n_experts"],
    }


def litgpt(model: dict[str, Any], batch_size: int) -> Side:
    """LLaMAMoE or LLaMAMLP blocks; litgpt has no load-balancing loss."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    gpt = GPT(Config(**_litgpt_fields(model)))
    gpt.apply(gpt._init_weights)
    if model["tie_embeddings"]:
        gpt.transformer.wte.weight = gpt.lm_head.weight

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:  # as litgpt's own pretraining
        return chunked_cross_entropy(gpt(tokens), targets)

    return Side(f"litgpt {version('litgpt')} {gpt.config.mlp_class_name}", gpt, loss)


def _litgpt_fields(model: dict[str, Any]) -> dict[str, Any]:
    moe = model["moe"]
    fields = {
        "block_size": model["context"],
        "vocab_size": model["vocab_size"],
        "padded_vocab_size": model["vocab_size"],
        "n_layer": model["n_layers"],
        "n_embd": model["d_model"],
        "n_head": model["n_heads"],
        "n_query_groups": model["n_kv_heads"] or model["n_heads"],
        "head_size": model["head_dim"] or model["d_model"] // model["n_heads"],
        "norm_class_name": "RMSNorm",
        "norm_eps": model["norm_eps"],
        "norm_qk": model["qk_norm"],
        "rope_base": int(model["rope_theta"]),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "intermediate_size": model["d_ff"],
        "mlp_class_name": "LLaMAMLP" if moe is None else "LLaMAMoE",
    }
    if moe is None:
        return fields
    return fields | {
        "moe_intermediate_size": moe["d_expert"],
        "n_expert": moe["n_experts"],
        "n_expert_per_token": moe["top_k"],
    }


SIDES = {"ours": ours, "transformers": transformers, "litgpt": litgpt}


class Trainer:
    """Takes steps of one side; float32 until told otherwise."""

    def __init__(self, side: Side, vocab_size: int, batch_size: int, context: int):
        self.side, self.precision, self.taken = side, "fp32", 0
        side.model.train()
        self.optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-3, fused=True)
        self.batches = random_tokens(vocab_size, batch_size, context)

    def use(self, chosen: dict[str, str]) -> dict[str, Any]:
        self.precision = chosen.pop("precision")
        self.side.use(chosen)
        return {}

    def steps(self, n: int) -> dict[str, Any]:
        seconds, loss = [], 0.0
        for _ in range(n):
            start = time.perf_counter()
            loss = self._step(*self.batches[self.taken % BATCHES])
            seconds.append(time.perf_counter() - start)
            self.taken += 1
        return {"seconds": seconds, "loss": loss}

    def _step(self, tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.side.loss(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def random_tokens(vocab_size: int, batch_size: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """BATCHES times tokens and targets, each (B, T), frequent and rare ones as in text (Zipf)."""
    generator = torch.Generator().manual_seed(0)
    odds, n_tokens = 1 / torch.arange(10, 10 + vocab_size), batch_size * (context + 1)
    drawn = [
        torch.multinomial(odds, n_tokens, replacement=True, generator=generator).view(
            batch_size, context + 1
        )
        for _ in range(BATCHES)
    ]
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in drawn]


def start(job: dict[str, Any]) -> tuple[Trainer, dict[str, Any]]:
    """Builds the job's side; the trainer and what to say about it."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model, batch_size = job["model"], job["batch_size"]
    side = SIDES[job["side"]](model, batch_size)
    trainer = Trainer(side, model["vocab_size"], batch_size, model["context"])
    return trainer, {
        "name": side.name,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in side.model.parameters()),
        "choices": side.choices,
        "refused": side.refused,
    }


def answer(trainer: Trainer, request: dict[str, Any]) -> dict[str, Any]:
    """What a request came to; a fault leaves the trainer ready for the next one."""
    try:
        return trainer.use(request["use"]) if "use" in request else trainer.steps(request["steps"])
    except Exception as fault:  # whatever a library raises
        trainer.optimizer.zero_grad()
        return {"fault": one_line(fault)}


def one_line(fault: Exception) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=json.loads)
    job = parser.parse_args().job
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    try:
        trainer, about = start(job)
    except Exception as fault:
        print(json.dumps({"fault": one_line(fault)}), file=answers)
        sys.exit(1)
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(trainer, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
