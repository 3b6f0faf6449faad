"""Layer 0's K and V of every token that was asked for, kept by token id.

They depend on token and position alone, and position enters by rotation. So sequences whose blocks
leave layer 0 out share one row per distinct token, whatever they are and wherever it stands.
"""

from collections.abc import Sequence

import torch

from kvstrata.engine.model import Model


class FirstLayer:
    """The table of one model. Not thread-safe: one thread runs the model.

    Attributes:
        keys: Before RoPE, ``spec.dtype``, (vocab_size, num_kv_heads, head_dim); a row means
            something once ``learn`` was given its token.
        values: As ``keys``.
    """

    def __init__(self, model: Model) -> None:
        """Reserve the table; the system maps what is written.

        Raises:
            ValueError: The model does not rotate its keys, so that they tell no token from another
                position.
        """
        spec = model.spec
        if spec.rope != "pre":
            raise ValueError(f"keys of {model.name} cannot be turned back")
        self._model = model
        with torch.inference_mode(False):
            shape = (spec.vocab_size, spec.num_kv_heads, spec.head_dim)
            self.keys, self.values = (
                torch.zeros(shape, dtype=spec.dtype, device=model.device) for _ in "kv"
            )
        self._is_known = torch.zeros(spec.vocab_size, dtype=torch.bool)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows that mean something."""
        row = self.keys[0].nbytes + self.values[0].nbytes
        return int(self._is_known.sum()) * row

    def learn(self, token_ids: Sequence[int]) -> None:
        """Compute the rows of tokens that are new."""
        ids = torch.tensor(token_ids, dtype=torch.int64).unique()
        ids = ids[~self._is_known[ids]]
        if len(ids):
            keys, values = self._model.first_layer_rows(ids.tolist())
            at = ids.to(self.keys.device)
            self.keys[at], self.values[at] = keys.transpose(0, 1), values.transpose(0, 1)
            self._is_known[ids] = True

    def read(
        self, token_ids: torch.Tensor, first_position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a cache would hold of learned tokens.

        Args:
            token_ids: int64 (n,).
            first_position: Of the first token.

        Returns:
            Post-RoPE keys and values, each (num_kv_heads, n, head_dim).
        """
        at = token_ids.to(self.keys.device)
        keys = self._model.rotate(self.keys[at].transpose(0, 1), first_position)
        return keys, self.values[at].transpose(0, 1)
