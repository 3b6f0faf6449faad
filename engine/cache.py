"""The uncompressed KV cache of one sequence, and the probe queries its saliency is computed from.

Not covered: compressed blocks, and one kernel call for several sequences.
"""

import torch

from kvstrata.engine.attention import AttendOver, AttentionState, LayerRows
from kvstrata.engine.probes import Probes
from kvstrata.engine.spec import KVSpec
from kvstrata.kernels.rope import rotate
from kvstrata.kernels.saliency import normalised_saliency


class SequenceCache:
    """Keys and values of one sequence, post-RoPE, in the form that attention reads.

    A forward pass appends layer by layer and then advances ``length`` once. A pass that fails half
    way leaves ``length`` as it was, and the next pass overwrites what it left behind.

    Example: after a prompt of 100 tokens ``length`` is 100 and ``read(64, 100)`` returns the K and
    V of the last 36; ``truncate(64)`` forgets those, and the next token is written at position 64.

    Attributes:
        spec: Sizes and dtype.
        length: Tokens held.
        keys: ``spec.dtype``, (num_layers, num_kv_heads, capacity, head_dim), contiguous.
        values: As ``keys``.
    """

    def __init__(
        self,
        spec: KVSpec,
        capacity: int,
        probe_tokens: int = 64,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate room for ``capacity`` tokens; more is allocated when needed.

        Args:
            spec: Of the model that will fill the cache.
            capacity: Tokens to make room for at first; at most ``spec.max_positions``.
            probe_tokens: Most rows whose queries ``expect_probes`` keeps.
            device: Where K, V and the probe queries live.

        Raises:
            ValueError: ``capacity`` is not in 1..``spec.max_positions``, or ``probe_tokens`` < 1.
        """
        if not 1 <= capacity <= spec.max_positions:
            raise ValueError(f"capacity must be in 1..{spec.max_positions}, not {capacity}")
        if probe_tokens < 1:
            raise ValueError(f"probe_tokens must be at least 1, not {probe_tokens}")
        self.spec = spec
        self.length = 0
        self._device = torch.device(device)
        self._probes = Probes(spec, probe_tokens, device)
        self.keys = self._allocate(capacity)
        self.values = self._allocate(capacity)

    def _allocate(self, num_rows: int) -> torch.Tensor:
        # A tensor born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            return torch.zeros(
                (self.spec.num_layers, self.spec.num_kv_heads, num_rows, self.spec.head_dim),
                dtype=self.spec.dtype,
                device=self._device,
            )

    @property
    def capacity(self) -> int:
        """Tokens there is room for without another allocation."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def probe_tokens(self) -> int:
        """Most rows whose queries are kept."""
        return self._probes.max_rows

    @property
    def probe_rows(self) -> range | None:
        """Positions whose queries are kept, or None."""
        return self._probes.rows

    def grow(self, num_tokens: int) -> None:
        """Make room for ``num_tokens`` in all, by doubling; views from ``read`` then go stale.

        Raises:
            ValueError: More than ``spec.max_positions``; the cache is unchanged.
        """
        if num_tokens <= self.capacity:
            return
        if num_tokens > self.spec.max_positions:
            raise ValueError(
                f"{num_tokens} tokens do not fit: the model's limit is "
                f"{self.spec.max_positions} positions"
            )
        capacity = self.capacity
        while capacity < num_tokens:
            capacity *= 2
        capacity = min(capacity, self.spec.max_positions)
        keys = self._allocate(capacity)
        values = self._allocate(capacity)
        keys[:, :, : self.length] = self.keys[:, :, : self.length]
        values[:, :, : self.length] = self.values[:, :, : self.length]
        self.keys, self.values = keys, values

    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Make room for the next tokens and return what attends for them; see ``KVCache``."""
        self.grow(self.length + num_tokens)
        return AttendOver(self.append, rows=rows)

    def append(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new rows at ``length``, which stays until ``advance``.

        Args:
            layer: Layer index.
            queries: (num_heads, n, head_dim), post-RoPE; kept only where probes are expected.
            keys: (num_kv_heads, n, head_dim), post-RoPE.
            values: As ``keys``.

        Returns:
            Views of that layer's keys and values including the new rows, each
            (num_kv_heads, length + n, head_dim).
        """
        first, last = self.length, self.length + keys.shape[1]
        self.grow(last)
        self.keys[layer, :, first:last] = keys
        self.values[layer, :, first:last] = values
        self._probes.keep(layer, first, queries)
        return self.keys[layer, :, :last], self.values[layer, :, :last]

    def advance(self, num_tokens: int) -> None:
        """Count ``num_tokens`` appended to every layer as held."""
        self._probes.count(self.length, self.length + num_tokens)
        self.length += num_tokens

    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of K and V at positions ``first`` to ``last`` - 1.

        Returns:
            Keys and values, each (num_layers, num_kv_heads, last - first, head_dim), not
            contiguous; they show later writes until the cache grows.

        Raises:
            ValueError: The range is not within what is held.
        """
        if not 0 <= first <= last <= self.length:
            raise ValueError(f"positions {first}..{last} are not within the {self.length} held")
        return self.keys[:, :, first:last], self.values[:, :, first:last]

    def write(
        self,
        first: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        layers: slice = slice(None),
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Write K and V of several layers at ``first``; ``length`` becomes at least their end.

        When layers arrive one by one, write them all before the next forward pass.

        Args:
            first: Position of the first row; at most ``length``, so that no gap arises.
            keys: (layers, num_kv_heads, n, head_dim), any float dtype and device.
            values: As ``keys``.
            layers: The layers that ``keys`` and ``values`` hold.
            rotation: cos and sin, float32 (n, head_dim), by which keys before RoPE are turned;
                None for keys that are post-RoPE.

        Raises:
            ValueError: A gap, a shape that does not fit, or more than ``spec.max_positions``.
        """
        if not 0 <= first <= self.length:
            raise ValueError(f"writing at {first} would leave a gap: {self.length} tokens held")
        num_layers = len(range(*layers.indices(self.spec.num_layers)))
        expected = (num_layers, self.spec.num_kv_heads, keys.shape[-2], self.spec.head_dim)
        if keys.shape != expected or values.shape != expected:
            raise ValueError(
                f"expected keys and values of shape {expected}, "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        last = first + keys.shape[2]
        self.grow(last)
        if rotation is not None:
            keys = rotate(keys, *(table.to(keys.device) for table in rotation))
        self.keys[layers, :, first:last] = keys.to(self.keys)
        self.values[layers, :, first:last] = values.to(self.values)
        self.length = max(self.length, last)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on, and their probe queries.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self._probes.truncate(length)
        self.length = length

    def expect_probes(self, first_position: int, last_position: int) -> None:
        """Keep the queries of these positions as they pass; see ``Probes.expect``."""
        self._probes.expect(first_position, last_position)

    def expect_block(self, last_position: int) -> None:
        """Keep the queries of the tokens up to ``last_position``, if they are not expected yet."""
        rows = self._probes.rows
        if not rows or rows.stop != last_position:
            self._probes.expect(self.length, last_position)

    def probes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the probe queries seen so far and their positions; see ``Probes.read``."""
        return self._probes.read()

    def saliency(self, first: int, last: int, scaling: float) -> torch.Tensor:
        """Return how much the probes attend to each token from ``first`` to ``last`` - 1.

        Args:
            first: Position.
            last: Behind the last position.
            scaling: Factor on the dot products before the softmax.

        Returns:
            float32 (num_layers, num_kv_heads, last - first), on the CPU; 0 where no probe is behind
            the token.
        """
        queries, positions = self.probes()
        found = torch.zeros(self.spec.num_layers, self.spec.num_kv_heads, last - first)
        if len(positions):
            keys = self.read(0, int(positions[-1]) + 1)[0]
            seen = normalised_saliency(queries, positions, keys, scaling)[..., first:last].cpu()
            found[..., : seen.shape[-1]] = seen
        return found
