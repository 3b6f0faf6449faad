"""Which models can be served: an allow-list, and the reasons why the others cannot.

A stored key must depend only on its token, its position and the tokens before it, and attention
must read the whole cache with a plain causal softmax. A model that breaks this would give wrong
text, not an error, so everything that was not verified is refused by name.
"""

from typing import Any

import torch

from kvstrata.engine.errors import UnsupportedModelError
from kvstrata.engine.spec import KVSpec

VERIFIED_MODEL_TYPES = ("llama", "mistral", "opt", "qwen2", "qwen3")
VISION_MODEL_TYPES = ("idefics3", "llava", "llava_onevision", "smolvlm")
_THREE_DIMENSIONAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_RECURRENT_FIELDS = (
    "state_size",
    "ssm_state_size",
    "mamba_d_state",
    "mamba_expand",
    "layers_block_type",
    "hybrid_override_pattern",
    "linear_num_key_heads",
    "conv_L_cache",
)
_BIAS_FIELDS = ("alibi", "relative_attention_num_buckets")


def check_config(config: Any, source: str, *, is_converted: bool = False) -> None:
    """Raise unless a model of this config can be served.

    Args:
        config: A transformers config.
        source: What the user named, for the message.
        is_converted: The weights come out of a GGUF file as plain floats.

    Raises:
        UnsupportedModelError: Names the source, the model type and every reason.
    """
    if config.model_type in VISION_MODEL_TYPES:
        check_config(config.get_text_config(), f"{source} ({config.model_type})")
        return
    text = config.get_text_config()
    reasons = [*_attention_reasons(text), *_position_reasons(text)]
    if getattr(config, "quantization_config", None) is not None and not is_converted:
        reasons.append("quantised checkpoints are not verified")
    if config.model_type not in VERIFIED_MODEL_TYPES:
        reasons.append(f"this model type is not verified (verified: {_verified()})")
    if reasons:
        raise UnsupportedModelError(
            f"{source}: cannot serve model type {config.model_type!r}: {'; '.join(reasons)}"
        )


def check_model(model: Any, source: str) -> None:
    """Raise if the instantiated model has what its config did not show.

    Raises:
        UnsupportedModelError: No support for the attention hook, or attention sinks.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{source}: {type(model).__name__} does not call transformers' AttentionInterface"
        )
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise UnsupportedModelError(f"{source}: {type(model).__name__} has attention sinks")


def build_spec(config: Any, dtype: torch.dtype, eos_token_ids: frozenset[int]) -> KVSpec:
    """Return the ``KVSpec`` of a config that passed ``check_config``."""
    num_heads = int(config.num_attention_heads)
    return KVSpec(
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        dtype=dtype,
        rope="none" if config.model_type == "opt" else "pre",
        max_positions=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
        eos_token_ids=eos_token_ids,
    )


def _verified() -> str:
    return ", ".join([*VERIFIED_MODEL_TYPES, *VISION_MODEL_TYPES])


def _attention_reasons(config: Any) -> list[str]:
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("encoder-decoder models are not served")
    recurrent = [name for name in _RECURRENT_FIELDS if getattr(config, name, None) is not None]
    if recurrent:
        reasons.append(
            f"recurrent (Mamba, SSM or linear) layers keep no KV ({recurrent[0]} is set)"
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        reasons.append(f"layer_types holds {', '.join(others)}; only full_attention is served")
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True)
    if window is not None and is_used and window < config.max_position_embeddings:
        reasons.append(f"sliding window of {window} tokens is active")
    if getattr(config, "attention_chunk_size", None) is not None:
        reasons.append("attention_chunk_size limits attention to chunks")
    if getattr(config, "kv_lora_rank", None) is not None:
        reasons.append("multi-head latent attention (kv_lora_rank) keeps latents, not K and V")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reasons.append("attn_logit_softcapping changes the softmax")
    if config.model_type == "gpt_oss":
        reasons.append("attention sinks are extra softmax terms")
    return reasons


def _position_reasons(config: Any) -> list[str]:
    reasons = []
    bias = [name for name in _BIAS_FIELDS if getattr(config, name, None)]
    if bias or config.model_type in ("bloom", "mpt"):
        reasons.append("positions enter attention as a bias (ALiBi or relative positions)")
    scheme = getattr(config, "position_embedding_type", None)
    if scheme not in (None, "absolute", "rope"):
        reasons.append(f"unknown position scheme {scheme!r}")
    rope = getattr(config, "rope_parameters", None)
    if config.model_type == "opt" or rope is None:
        return reasons
    if "mrope_section" in rope or config.model_type.startswith(_THREE_DIMENSIONAL):
        reasons.append("images have three-dimensional positions (M-RoPE)")
    if "rope_type" not in rope:
        return [*reasons, "rotary parameters differ between layers"]
    if rope["rope_type"] in ("dynamic", "longrope"):
        reasons.append(
            f"rope type {rope['rope_type']!r} changes its frequencies with the running length, "
            "so stored keys would go stale"
        )
    elif rope["rope_type"] not in STATIC_ROPE_TYPES:
        reasons.append(f"rope type {rope['rope_type']!r} is not verified")
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if factor not in (None, 1, 1.0):
        reasons.append(f"partial rotary (factor {factor}) is not handled")
    return reasons
