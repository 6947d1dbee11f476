"""Learning-rate schedules: a multiplier of the peak rate for every step."""

from __future__ import annotations

import math

from nano_moe.config import OptimConfig


def multiplier(step: int, n_steps: int, config: OptimConfig) -> float:
    """Share of the peak rate at optimizer step `step`, counted from 0, of `n_steps`.

    Linear warm-up; then a cosine towards `min_lr_ratio` (Loshchilov & Hutter 2017, eq. 5), or a
    constant and a linear decay over the last `decay_fraction` of all steps (warmup-stable-decay,
    Hu et al. 2024, sec. 4.2). The first step is above 0, the last one above the floor.
    """
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        progress = max(0, step - config.warmup_steps) / (n_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1, round(config.decay_fraction * n_steps))
        share = min(1.0, (n_steps - step) / decay_steps)
    return min(warm, config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
