"""Lightning: modules, optimizers, telemetry, checkpoints, fit."""
