"""Timings: a layer, a training step, other libraries, the optimizer, the input pipeline.

Each benchmark is a module with a function of its name: `layer(quick) -> Report`.
"""
