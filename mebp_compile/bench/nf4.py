"""A peer as its users set it up: transformers with bitsandbytes' NF4 weights and PEFT's LoRA (QLoRA, arXiv 2305.14314), on the CPU.

bitsandbytes is optional and imported here alone. Linear layers of the decoder are packed, in 4 bits with absolute maxima of blocks of 64
quantised once more; embedding and head stay in the model's dtype, as transformers leaves them.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mebp_compile.bench.unavailable import PeerUnavailable

INSTALL = 'pip install "bitsandbytes>=0.50,<0.51"'


def require_bitsandbytes() -> None:
    """Raise PeerUnavailable where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PeerUnavailable(f"bitsandbytes is not installed: {INSTALL}")


def nf4_model(model: Any, dtype: torch.dtype) -> Any:
    """A new model of the same weights and adapters, its frozen linear layers in NF4. `model`: PEFT's, with its weights in memory."""
    require_bitsandbytes()
    import peft
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        _write_checkpoint(model, Path(folder))
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}, local_files_only=True
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a property that has a new name
        packed: Any = peft.get_peft_model(base, model.peft_config["default"], autocast_adapter_dtype=False)
        peft.set_peft_model_state_dict(packed, peft.get_peft_model_state_dict(model))
    return packed.train()


def _write_checkpoint(model: Any, folder: Path) -> None:
    """The model without its adapters as a checkpoint folder; tied weights once."""
    from safetensors.torch import save_file

    base, tensors = model.get_base_model(), dict[str, torch.Tensor]()
    written = set[int]()
    for name, tensor in base.state_dict().items():
        if ".lora_" not in name and tensor.untyped_storage()._cdata not in written:
            written.add(tensor.untyped_storage()._cdata)
            tensors[name.replace(".base_layer.", ".")] = tensor.contiguous()
    base.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hidden_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside the packed weights: maxima, their own scales and tables. They are neither parameters nor buffers."""
    for parameter in model.parameters():
        states = [getattr(parameter, "quant_state", None)]
        while states:
            fields = getattr(states.pop(), "__dict__", {}).values()
            yield from (item for item in fields if isinstance(item, torch.Tensor))
            states += [item for item in fields if type(item).__name__ == "QuantState"]
