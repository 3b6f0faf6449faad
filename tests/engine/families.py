"""Tiny random models, one per verified family, and where their numbers come from."""

from typing import Any

import torch
import transformers

VOCAB_SIZE = 97
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = _SIZES | {"intermediate_size": 80, "num_key_value_heads": 2}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_GATED),
    "llama-llama3-rope": lambda: transformers.LlamaConfig(**_GATED, rope_parameters=_LLAMA3),
    "llama-yarn": lambda: transformers.LlamaConfig(**_GATED, rope_parameters=_YARN),
    "qwen2": lambda: transformers.Qwen2Config(**_GATED),
    "qwen3": lambda: transformers.Qwen3Config(**_GATED, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_GATED, sliding_window=None),
    "opt": lambda: transformers.OPTConfig(**_SIZES, ffn_dim=80, word_embed_proj_dim=48),
}
ROTARY_FAMILIES = [name for name in FAMILIES if name != "opt"]


def build_reference(config: Any) -> Any:
    """Return a random model with transformers' own attention, its logits well spread."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()
