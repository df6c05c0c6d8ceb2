"""Where the tensors of a step are: on the CPU, or on one accelerator beside which the CPU holds a few numbers (an optimizer's step counts)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mebp_compile.capture.find import State
from mebp_compile.errors import Unsupported


def place_of(tensor: torch.Tensor) -> str:
    """The accelerator that a tensor is on ("cuda:0"); nothing for the CPU, and for meta tensors, which are nowhere."""
    return "" if tensor.device.type in ("cpu", "meta") else str(tensor.device)


def device_of(state: State) -> str:
    """The accelerator that a step's parameters are on."""
    return common_device(parameter for _, _, parameter in state.parameters())


def common_device(tensors: Iterable[torch.Tensor]) -> str:
    """The one accelerator of some tensors, or nothing where all are on the CPU. Raises Unsupported for two of them."""
    places = sorted({place_of(tensor) for tensor in tensors} - {""})
    if len(places) > 1:
        raise Unsupported(f"the step's tensors are on {', '.join(places)}", "put the model, its optimizer and the batch on one device")
    return places[0] if places else ""


def torch_device(place: str) -> torch.device:
    """The torch device of a place."""
    return torch.device(place or "cpu")
