"""Parameters that take gradients, or are trained, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """``parameters`` take gradients inside the block; after it they are as before, and have none."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """The parameters that ``model`` has now hold the same values, bit by bit, after the block."""
    parameters = list(model.parameters())
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
