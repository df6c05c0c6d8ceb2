"""Small trainings of plain modules, captured quickly: for tests of where state lies, not of which ops there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Training
from torch import nn

WIDTH = 64  # of a chain's layers: each parameter is large enough to move
Make = Callable[[Any], torch.optim.Optimizer]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, foreach=False)


def mean_square(model: nn.Module, optimizer: Make, batch: Callable[[int], tuple[Any, ...]]) -> Training:
    """Train the parameters of `model` that want a gradient so that its output becomes small."""
    own = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        own.step()
        own.zero_grad()
        return loss

    return Training([model], [own], step, batch)


def noise(*shape: int) -> Callable[[int], tuple[torch.Tensor]]:
    """Batches of normal numbers, decided by the number of the call."""
    return lambda call: (torch.randn(shape, generator=torch.Generator().manual_seed(call)),)


def chain(optimizer: Make, layers: int = 4, dropout: float = 0.0) -> Training:
    """Linear layers without biases."""
    torch.manual_seed(0)
    parts = (part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else ())))
    return mean_square(nn.Sequential(*parts), optimizer, noise(4, WIDTH))


def channels_last() -> Training:
    """Convolutions whose weights lie in another order than their shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Tanh(), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    return mean_square(model, adamw, noise(2, 8, 12, 12))
