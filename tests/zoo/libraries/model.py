"""What the tables of models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Any] | None = None  # inputs are made in the default dtype, which is the model's


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def tokens(length: int = 16, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(vocabulary, (2, length))
