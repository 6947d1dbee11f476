"""Which device a recipe runs on, in what precision, and whether it fits."""

from __future__ import annotations

import os

import torch

from nano_moe.accounting import FLOAT32_BYTES, count
from nano_moe.config import FieldFault, Recipe
from nano_moe.errors import UserError


def choose_device(recipe: Recipe) -> torch.device:
    """The device a recipe asks for; raises UserError where there is none or it could not run."""
    available = torch.cuda.is_available()
    if recipe.trainer.accelerator == "gpu" and not available:
        raise UserError("trainer.accelerator: gpu, but no CUDA GPU is usable; set it to auto")
    use_gpu = available and recipe.trainer.accelerator != "cpu"
    if use_gpu and recipe.model.moe is not None and recipe.model.moe.backend == "fused":
        raise UserError(
            "model.moe.backend: fused runs on CPUs alone, and this is a GPU; set it to auto, or "
            "trainer.accelerator to cpu"
        )
    return torch.device("cuda" if use_gpu else "cpu")


def choose_devices(recipe: Recipe) -> int:
    """Processes on this node, each with a GPU of its own where there are any; raises UserError."""
    wanted, gpus = recipe.trainer.devices, torch.cuda.device_count()
    if choose_device(recipe).type == "cpu":
        there = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
        return there if wanted == "auto" else wanted
    if wanted == "auto":
        return gpus
    if wanted > gpus:
        raise UserError(
            f"trainer.devices: {wanted} GPUs, but this node has {gpus}; set it to {gpus} or auto, "
            "or trainer.accelerator to cpu"
        )
    return wanted


def count_processes(recipe: Recipe) -> int:
    """Processes on all nodes; raises UserError where they cannot share the recipe evenly."""
    n = choose_devices(recipe) * recipe.trainer.nodes
    try:
        recipe.check_split(n)
    except FieldFault as fault:
        raise UserError(f"{fault.field}: {fault}") from fault
    return n


def choose_precision(recipe: Recipe) -> str:
    """ "fp32" or "bf16"; `auto` is bf16 on GPUs that have it and fp32 elsewhere."""
    if recipe.trainer.precision != "auto":
        return recipe.trainer.precision
    device = choose_device(recipe)
    return "bf16" if device.type == "cuda" and native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are a hardware instruction on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return False


def check_memory(recipe: Recipe) -> None:
    """Raises UserError where weights, their training state and logits alone exceed the memory.

    A lower bound: it refuses what cannot run, and promises nothing of what it lets pass.
    """
    counted = count(recipe)
    n, on_gpu = count_processes(recipe), choose_device(recipe).type == "cuda"
    together = 1 if on_gpu else choose_devices(recipe)  # processes that share one memory
    shared = n if recipe.trainer.strategy in ("fsdp", "ep") else 1
    state = counted.weight_bytes + counted.gradient_bytes + counted.optimizer_bytes
    state = state * together // shared
    tokens = recipe.trainer.batch_size * recipe.model.context * together // n
    logits = 2 * FLOAT32_BYTES * tokens * recipe.model.vocab_size  # and their gradient
    if on_gpu:
        available = torch.cuda.mem_get_info()[1]
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if state + logits > available:
        lower = "trainer.batch_size" if logits > state else "model's sizes"
        raise UserError(
            f"{lower}: training needs at least {(state + logits) / 2**30:,.1f} GiB "
            f"(weights and state {state / 2**30:,.1f}, logits {logits / 2**30:,.1f}), "
            f"there are {available / 2**30:,.1f} GiB; lower it"
        )
