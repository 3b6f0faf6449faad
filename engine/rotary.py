"""Rotating stored keys from one position to another, with the model's own rotary embedding."""

from typing import Any

import torch

from kvstrata.kernels.rope import rotate
from kvstrata.protos.frame_pb2 import RopeForm
from kvstrata.protos.identity import BLOCK_TOKENS

_FIRST_TABLE_ROWS = 1024


def stored_turns(rope: RopeForm, first: int, last: int) -> torch.Tensor | None:
    """Return by which positions stored keys of a range are turned, int64; None if by none."""
    positions = torch.arange(first, last)
    if rope is RopeForm.ROPE_FORM_FRAME:
        return positions // BLOCK_TOKENS * BLOCK_TOKENS
    return positions if rope is RopeForm.ROPE_FORM_PRE else None


class Rotary:
    """The cosines and sines of a model's rotary embedding, and keys rotated by them."""

    def __init__(self, module: Any, max_positions: int, device: torch.device) -> None:
        """Wrap the rotary module of a transformers model.

        Args:
            module: Called as ``module(x, position_ids)``, returns cos and sin.
            max_positions: The table never grows beyond this.
            device: Where the module lives.
        """
        self._module = module
        self._max_positions = max_positions
        self._device = device
        self._table = (torch.empty(0), torch.empty(0))

    def cos_sin(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of positions ``first`` to ``last`` - 1.

        Returns:
            Two views, float32, (last - first, head_dim), with the module's attention scaling.

        Raises:
            ValueError: The range is not within the model's positions.
        """
        if not 0 <= first <= last <= self._max_positions:
            raise ValueError(f"positions {first}..{last} are not within 0..{self._max_positions}")
        cos, sin = self._table
        if len(cos) < last:
            cos, sin = self._table = self._compute(self._num_rows(last))
        return cos[first:last], sin[first:last]

    def rotate(
        self, keys: torch.Tensor, positions: int | torch.Tensor, *, inverse: bool
    ) -> torch.Tensor:
        """Return ``keys`` rotated to their positions, or back; see ``Model.rotate``."""
        if isinstance(positions, int):
            cos, sin = self.cos_sin(positions, positions + keys.shape[-2])
        else:
            last = int(positions.max()) + 1 if positions.numel() else 0
            cos, sin = (table[positions.to(table.device)] for table in self.cos_sin(0, last))
        cos, sin = cos.to(keys.device), sin.to(keys.device)
        if inverse:
            # With a scaling s the tables hold s cos and s sin; the inverse needs cos/s, -sin/s.
            squared_scaling = cos.square() + sin.square()
            cos, sin = cos / squared_scaling, sin / squared_scaling
        if not keys.requires_grad and cos.ndim == 2:
            return rotate(keys, cos, sin, inverse=inverse)
        # The kernel has no gradients, nor positions that differ from head to head (H2O's).
        low, high = keys.float().chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1) * (-sin if inverse else sin)
        return (keys.float() * cos + turned).to(keys.dtype)

    def _num_rows(self, needed: int) -> int:
        num_rows = max(_FIRST_TABLE_ROWS, len(self._table[0]))
        while num_rows < needed:
            num_rows *= 2
        return min(num_rows, self._max_positions)

    def _compute(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(num_rows, device=self._device)[None]
            like = torch.empty(0, dtype=torch.float32, device=self._device)
            cos, sin = self._module(like, positions)
        return cos[0], sin[0]
