"""The numbers of a model that the rest of the system needs: sizes of K and V, and limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstrata.protos.identity import is_of_image

_BYTES_BF16 = 2


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What the KV cache of one model looks like.

    Attributes:
        num_layers: Decoder layers, each with its own K and V.
        num_heads: Query heads.
        num_kv_heads: Heads of K and V; divides ``num_heads``.
        head_dim: Channels of one head.
        dtype: Of the weights, of K and of V.
        rope: ``"pre"`` if keys can be rotated back to position 0 and on to another position,
            ``"none"`` if the model does not rotate keys (OPT).
        max_positions: Most tokens in one sequence.
        vocab_size: Rows of the output logits.
        eos_token_ids: Any of these ends a generation.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    rope: str
    max_positions: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    @property
    def dtype_name(self) -> str:
        """The dtype in a word: "float32", "bfloat16" or "float16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def kv_bytes_per_token_bf16(self) -> int:
        """Bytes of K and V of one token over all layers, if stored as bf16."""
        return self.num_layers * self.num_kv_heads * self.head_dim * 2 * _BYTES_BF16

    def check_tokens(self, token_ids: Sequence[int], first: int) -> None:
        """Raise unless the model can run these tokens from position ``first`` on.

        Raises:
            ValueError: No tokens, an id that is neither of the vocabulary nor of an image, or
                positions beyond ``max_positions``.
        """
        if len(token_ids) == 0:
            raise ValueError("token_ids must hold at least one token")
        last = self.vocab_size - 1
        wrong = next((i for i in token_ids if not 0 <= i <= last and not is_of_image(i)), None)
        if wrong is not None:
            raise ValueError(f"token ids must be in 0..{last}, not {wrong}")
        if first < 0 or first + len(token_ids) > self.max_positions:
            raise ValueError(
                f"{len(token_ids)} tokens at position {first} do not fit: the model's limit is "
                f"{self.max_positions} positions"
            )
