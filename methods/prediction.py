"""Predicting a layer's keys and values from what a reader has already decoded.

Heads of one layer are decoded in a fixed order, V's and then K's. Each is predicted linearly from
all heads of the layer before and from those that precede it in its own layer:

    p = before @ across[layer] + own @ within[layer]

Encoder and decoder run the same ``Recursion`` over the same vectors, those of the BASE stratum:
what MID adds to a token is never predicted from, so that a reader of BASE alone and one of both
have the same prediction. Sums are float64 and rounded once to float32, so the order in which BLAS
adds, which depends on threads and on how many blocks are read together, shows in about one number
of 10^8, in its last bit. Nor could more do harm: decoding is linear in p, no decision hangs on it.

Legend: L stored layers, H KV heads, D head_dim, C = 2 H D channels of a layer.

Source:
    Differential pulse code modulation with the quantiser in the loop, across layers instead of
    time: Jayant and Noll, Digital Coding of Waveforms (1984), chapter 6.
"""

import torch


class Recursion:
    """One pass over the layers of some tokens, from the first layer to the last."""

    def __init__(self, across: torch.Tensor, within: torch.Tensor, num_tokens: int, dim: int):
        """Start before the first layer; matrices float16 (L, C, C)."""
        self._across, self._within, self._dim = across, within, dim
        self._layer = -1
        self._current = torch.zeros(num_tokens, across.shape[1], dtype=torch.float64)
        self._ahead, self._own = self._current, torch.empty(0)

    def enter_next_layer(self) -> None:
        """Go on to the next layer, whose heads then follow in order."""
        self._layer += 1
        if self._layer:
            self._ahead = self._current @ self._across[self._layer].double()
        self._own = self._within[self._layer].double()

    def predict(self, part: int) -> torch.Tensor:
        """Return what head ``part`` of 2 H is predicted to be, float32 (n, D)."""
        begin = part * self._dim
        columns = slice(begin, begin + self._dim)
        ahead = self._ahead[:, columns]
        if not part:
            return ahead.float()
        return torch.addmm(ahead, self._current[:, :begin], self._own[:begin, columns]).float()

    def put(self, part: int, vectors: torch.Tensor) -> None:
        """Tell what head ``part`` turned out to be at BASE, float32 (n, D)."""
        begin = part * self._dim
        self._current[:, begin : begin + self._dim] = vectors
