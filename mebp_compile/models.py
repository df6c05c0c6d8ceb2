"""Models that need no checkpoint: the published shapes of some language models, by name. Their weights are random."""

from __future__ import annotations

from typing import Any

QWEN = {
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
# name: (configuration class of transformers, its arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        "Qwen2Config", {**QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    ),
    "qwen2.5-1.5b": (
        "Qwen2Config", {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    ),
    "qwen2.5-3b": (
        "Qwen2Config", {**QWEN, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    ),
    "gemma3-1b": (
        "Gemma3TextConfig",
        {**GEMMA, "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
         "num_key_value_heads": 1, "sliding_window": 512},
    ),
    "gemma3-4b": (  # the text model
        "Gemma3TextConfig",
        {**GEMMA, "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
         "num_key_value_heads": 4, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        {**QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "max_position_embeddings": 40960},
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    ),
    "tiny-qwen2": (
        "Qwen2Config",
        {**QWEN, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 512},
    ),
}  # fmt: skip


def named_config(name: str) -> Any:
    """The transformers configuration of a name in CONFIGS."""
    import transformers

    kind, arguments = CONFIGS[name]
    return getattr(transformers, kind)(**arguments)
