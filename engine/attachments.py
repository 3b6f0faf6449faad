"""What is stored beside a block, for whoever retrieves by content: ``methods.representatives``."""

import torch

from kvstrata.engine.model import Model
from kvstrata.methods.presets import Method
from kvstrata.methods.representatives import attachments, chosen_layers
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.representatives import ATTACHMENT


def attachments_of(
    model: Model, method: Method, keys: torch.Tensor, first_position: int
) -> list[dict[str, bytes]]:
    """Return what is stored beside each block of cached ``keys`` (L, H, n, D); [] for none."""
    layers = chosen_layers(method.represented, model.spec.num_layers)
    if not layers:
        return []
    chosen = keys[layers]
    if model.spec.rope != "none":
        chosen = model.rotate(chosen, first_position, inverse=True)
    blocks = chosen.unflatten(2, (-1, BLOCK_TOKENS))
    return [{ATTACHMENT: data} for data in attachments(blocks, layers)]
