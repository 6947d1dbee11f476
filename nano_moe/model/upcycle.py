"""Sparse upcycling: a dense decoder's weights into a sparse one of the same shape.

Shapes: D d_model, F hidden width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nano_moe.model.gpt import GPT


@torch.no_grad()
def upcycle(sparse: GPT, dense: GPT) -> GPT:
    """Copy every weight the two share, and the dense FFN into each expert; routers stay as drawn.

    With weights that sum to 1 the sparse model then computes what the dense one does. Raises
    KeyError or RuntimeError where shapes differ. Komatsuzaki et al. 2022, sec. 3.
    """
    source = dense.state_dict()
    for name, parameter in sparse.named_parameters():
        if ".router." not in name:
            parameter.copy_(_weight_for(name, source))  # (D, F) fills (E, D, F)
    return sparse


def _weight_for(name: str, source: dict[str, Tensor]) -> Tensor:
    if ".experts." not in name:
        return source[name]
    return source[name.replace(".experts.", ".") + ".weight"]
