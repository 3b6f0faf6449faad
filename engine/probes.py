"""The queries of a few chosen rows of a prompt, from which its saliency is computed."""

import torch

from kvstrata.engine.spec import KVSpec


class Probes:
    """Keeps the queries of the rows that are expected, as they pass layer by layer."""

    def __init__(self, spec: KVSpec, max_rows: int, device: torch.device | str = "cpu") -> None:
        """Expect none yet, and never more than ``max_rows``."""
        self._spec = spec
        self.max_rows = max_rows
        self._device = torch.device(device)
        self.rows: range | None = None
        self._queries = self._allocate(0)
        self._seen = torch.zeros(0, dtype=torch.bool)

    def _allocate(self, num_rows: int) -> torch.Tensor:
        spec = self._spec
        # A tensor born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            shape = (spec.num_layers, spec.num_heads, num_rows, spec.head_dim)
            return torch.zeros(shape, dtype=spec.dtype, device=self._device)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept queries."""
        return self._queries.nbytes

    def expect(self, first_position: int, last_position: int) -> None:
        """Keep the queries of positions ``first_position`` to ``last_position`` - 1 as they pass.

        Only the last ``max_rows`` of the range are kept; queries kept before are forgotten.

        Raises:
            ValueError: The range is empty or not within the model's positions.
        """
        if not 0 <= first_position < last_position <= self._spec.max_positions:
            raise ValueError(
                f"probe positions {first_position}..{last_position} are empty or not within "
                f"the model's {self._spec.max_positions}"
            )
        first_position = max(first_position, last_position - self.max_rows)
        self.rows = range(first_position, last_position)
        self._queries = self._allocate(len(self.rows))
        self._seen = torch.zeros(len(self.rows), dtype=torch.bool)

    def forget(self) -> None:
        """Expect none, and free what was kept."""
        self.rows = None
        self._queries, self._seen = self._allocate(0), torch.zeros(0, dtype=torch.bool)

    def keep(self, layer: int, first: int, queries: torch.Tensor) -> None:
        """Keep what is expected of one layer's queries (H, n, D), the first at ``first``."""
        rows = self._between(first, first + queries.shape[1])
        if rows and self.rows is not None:
            kept = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
            self._queries[layer, :, kept] = queries[:, rows.start - first : rows.stop - first]

    def count(self, first: int, last: int) -> None:
        """Count positions ``first`` to ``last`` - 1 as passed in every layer."""
        rows = self._between(first, last)
        if rows and self.rows is not None:
            self._seen[rows.start - self.rows.start : rows.stop - self.rows.start] = True

    def truncate(self, length: int) -> None:
        """Forget the queries from position ``length`` on."""
        if self.rows is not None:
            self._seen[max(0, length - self.rows.start) :] = False

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries seen so far and their positions.

        Returns:
            Queries, ``spec.dtype``, (num_layers, num_heads, r, head_dim), post-RoPE, and
            positions, int64, (r,), ascending. r is 0 if none was expected or has passed.
        """
        seen = self._seen.nonzero().flatten()
        start = 0 if self.rows is None else self.rows.start
        queries = self._queries
        if len(seen) < queries.shape[2]:
            queries = queries[:, :, seen.to(self._device)]
        return queries, (seen + start).to(self._device)

    def _between(self, first: int, last: int) -> range:
        if self.rows is None:
            return range(0)
        return range(max(first, self.rows.start), min(last, self.rows.stop))
