"""What a layer's attention gets in, shown to the pass's state before it runs.

Gates decide by it (Attention-Gate). A state that wants it has a method ``observe``; for others
nothing happens.
"""

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class ObservingState(Protocol):
    """An ``AttentionState`` that is shown each layer's input before ``attend``."""

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Take note of the normalised input of a layer's attention.

        Args:
            layer: Layer index.
            hidden: (n, width), of the new tokens that run the layer.
        """
        ...


def show_inputs_in(hf_model: Any) -> None:
    """Let every attention module of a transformers model show its input. Call it once."""
    inner = hf_model.base_model
    for layer in getattr(inner, "decoder", inner).layers:
        layer.self_attn.register_forward_pre_hook(_show, with_kwargs=True)


def _show(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = kwargs.get("kv_cache_state")
    if isinstance(state, ObservingState):
        hidden = args[0] if args else kwargs["hidden_states"]
        state.observe(int(module.layer_idx), hidden[0])
