"""Gates that nobody trained, for tests: about half of the tokens, by chance, are above one half."""

import torch

from kvstrata.methods.gate_weights import GateWeights
from kvstrata.protos.identity import BLOCK_TOKENS


def random_gates(
    model_id: bytes,
    shape: tuple[int, int, int],
    *,
    window: int = BLOCK_TOKENS,
    bidirectional: bool = False,
    seed: int = 0,
) -> GateWeights:
    """Return gates of a model with ``shape`` (layers, KV heads, width)."""
    layers, heads, width = shape
    draw = torch.Generator().manual_seed(seed)
    return GateWeights(
        model_id=model_id,
        project=torch.randn(layers, 3, 8, width, generator=draw).half(),
        gate=torch.randn(layers, heads, 8, generator=draw).half(),
        bias=torch.zeros(layers, heads),
        num_heads=2,
        window=window,
        bidirectional=bidirectional,
        keep_rate=0.5,
        note="random",
    )
