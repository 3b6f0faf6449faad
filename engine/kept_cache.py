"""The KV cache of a sequence of which each head keeps its own tokens: what it evicts is freed.

Legend: L layers, Q query heads, H KV heads, G query heads of a group, m places of a head, n new
tokens, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.engine.attention import AttentionState, LayerRows
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.spec import KVSpec
from kvstrata.methods.h2o import H2O

GROW_PLACES = 64
# Vectors (..., n, D) and their positions int64 (..., n) to the vectors rotated, or back.
Rotate = Callable[..., torch.Tensor]


@dataclass(slots=True)
class _Layer:
    """What one layer holds. A place without a token has position -1.

    Attributes:
        keys: (H, m, D), post-RoPE at the true positions; before RoPE if positions roll.
        values: (H, m, D).
        positions: int64 (H, m), in any order.
        scores: float32 (H, m), attention received; None if nobody asks.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor | None

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: torch.Tensor,
        scores: torch.Tensor | None,
    ) -> "_Layer":
        """Copy the kept tokens of (H, n, D), in order; heads that keep fewer get empty places."""
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        held = kept.gather(1, order)
        rows = order[..., None].expand(-1, -1, keys.shape[-1])
        return cls(
            keys.gather(1, rows),
            values.gather(1, rows),
            order.masked_fill(~held, -1),
            None if scores is None else scores.gather(1, order).masked_fill(~held, 0.0),
        )

    def place(
        self, keys: torch.Tensor, values: torch.Tensor, new: torch.Tensor, limit: int
    ) -> None:
        """Put n new tokens into free places; more are made where there are too few.

        Args:
            keys: (H, n, D).
            values: As ``keys``.
            new: int64 (n,), their positions.
            limit: Places that will ever be needed.
        """
        num_new = keys.shape[1]
        lacking = num_new - int((self.positions < 0).sum(1).min())
        if lacking > 0:
            self._grow(max(lacking, min(GROW_PLACES, limit - self.positions.shape[1])))
        taken = (self.positions >= 0).to(torch.uint8)
        places = taken.argmin(1, keepdim=True) if num_new == 1 else taken.argsort(1)[:, :num_new]
        rows = places[..., None].expand(-1, -1, keys.shape[-1])
        self.keys.scatter_(1, rows, keys)
        self.values.scatter_(1, rows, values)
        self.positions.scatter_(1, places, new.expand(len(keys), -1))
        if self.scores is not None:
            self.scores.scatter_(1, places, 0.0)

    def _grow(self, num_places: int) -> None:
        self.keys = F.pad(self.keys, (0, 0, 0, num_places))
        self.values = F.pad(self.values, (0, 0, 0, num_places))
        self.positions = F.pad(self.positions, (0, num_places), value=-1)
        if self.scores is not None:
            self.scores = F.pad(self.scores, (0, num_places))

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        held = (self.keys, self.values, self.positions, self.scores)
        return sum(x.nbytes for x in held if x is not None)


class KeptCache:
    """Keys and values of the tokens that each head keeps, at their true positions.

    Made of a prompt's cache, of which it copies what is kept; the prompt's cache can then go. With
    ``H2O`` it evicts after every pass, without it it grows. A pass that fails half way leaves it as
    it was.

    Attributes:
        spec: Sizes and dtype.
        length: Tokens that have passed, evicted ones too: the next token's position.
    """

    def __init__(
        self,
        prompt: SequenceCache,
        kept: torch.Tensor,
        *,
        evict: H2O | None = None,
        scores: torch.Tensor | None = None,
        rotate: Rotate | None = None,
    ) -> None:
        """Take over the kept tokens of ``prompt``.

        Args:
            prompt: The whole prompt's cache; stays as it is.
            kept: bool (L, H, n): the tokens that earlier stages keep. ``evict`` then cuts each head
                down to its seats.
            evict: Its settings; None to evict nothing.
            scores: float32 (L, H, n): attention that each token has received; needed by ``evict``.
            rotate: ``Model.rotate``; needed if the positions of ``evict`` roll.

        Raises:
            ValueError: ``evict`` without scores, or with rolling positions where keys cannot be
                turned back.
        """
        if evict is not None and scores is None:
            raise ValueError("evicting needs the scores of the prompt's tokens")
        self._rolling = evict is not None and evict.positions == "rolling"
        if self._rolling and (rotate is None or prompt.spec.rope == "none"):
            raise ValueError("rolling positions need keys that can be rotated")
        self.spec: KVSpec = prompt.spec
        self.length = prompt.length
        self._rotate = rotate
        self._evict = evict
        self._seats = evict.seats(prompt.length) if evict is not None else None
        if evict is not None and self._seats is not None and scores is not None:
            positions = torch.arange(prompt.length, device=kept.device)
            positions = positions.expand_as(kept).masked_fill(~kept, -1)
            kept = evict.keep(scores, positions, self._seats)
        self._layers = [
            self._take(
                prompt, layer, kept[layer], scores[layer] if evict and scores is not None else None
            )
            for layer in range(self.spec.num_layers)
        ]
        self._weights: dict[int, torch.Tensor] = {}
        self._new = torch.empty(0, dtype=torch.int64)
        self._rows: LayerRows = ()

    def _take(
        self, prompt: SequenceCache, layer: int, kept: torch.Tensor, scores: torch.Tensor | None
    ) -> _Layer:
        keys, values = (x[layer] for x in prompt.read(0, prompt.length))
        if self._rolling and self._rotate is not None:
            keys = self._rotate(keys, 0, inverse=True)
        return _Layer.of(keys, values, kept.to(keys.device), scores)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, positions and scores."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def kept_fraction(self) -> float:
        """Held tokens of all heads, as a share of all that have passed."""
        held = sum(int((layer.positions >= 0).sum()) for layer in self._layers)
        return held / (self.length * self.spec.num_layers * self.spec.num_kv_heads)

    def positions(self, layer: int) -> list[list[int]]:
        """Return the true positions that each head of a layer holds, ascending."""
        return [
            sorted(p for p in head if p >= 0) for head in self._layers[layer].positions.tolist()
        ]

    def scores(self, layer: int) -> list[dict[int, float]]:
        """Return what each head of a layer has recorded of the attention to what it holds."""
        held = self._layers[layer]
        assert held.scores is not None
        pairs = zip(held.positions.tolist(), held.scores.tolist(), strict=True)
        return [{p: s for p, s in zip(*head, strict=True) if p >= 0} for head in pairs]

    @torch.inference_mode()
    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Forget a pass that failed, and return what attends in the next; see ``KVCache``."""
        if self.length + num_tokens > self.spec.max_positions:
            raise ValueError(
                f"{self.length + num_tokens} tokens do not fit: the model's limit is "
                f"{self.spec.max_positions} positions"
            )
        self._weights.clear()
        self._new = torch.arange(self.length, self.length + num_tokens)
        self._rows = rows
        for layer in self._layers:
            layer.positions.masked_fill_(layer.positions >= self.length, -1)
        return self

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which of the new tokens run this layer; see ``AttentionState.rows``."""
        return self._rows[layer] if self._rows else None

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend over what is held and the new tokens; see ``AttentionState.attend``."""
        held = self._layers[layer]
        running = self.rows(layer)
        new = (self._new if running is None else self._new[running]).to(keys.device)
        if self._rolling and self._rotate is not None:
            keys = self._rotate(keys, new, inverse=True)
        limit = self.spec.max_positions if self._seats is None else self._seats.total + len(new)
        held.place(keys, values, new, limit)
        visible = (held.positions >= 0)[:, None] & (held.positions[:, None] <= new[:, None])
        seen_keys = held.keys
        if self._rolling:
            queries, seen_keys = self._rolled(held, queries, new)
        if self._evict is None:
            mask = visible.repeat(1, len(queries) // len(keys), 1)  # (H, G * n, m)
            rows = queries.reshape(1, len(keys), -1, queries.shape[-1])
            output = F.scaled_dot_product_attention(
                rows, seen_keys[None], held.values[None], attn_mask=mask[None], scale=scaling
            )
            return output.reshape(queries.shape)
        grouped = queries.unflatten(0, (len(keys), -1))  # (H, G, n, D)
        logits = (grouped @ seen_keys[:, None].transpose(2, 3)).float() * scaling
        weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        self._weights[layer] = weights
        attended: torch.Tensor = weights.to(values.dtype) @ held.values[:, None]
        return attended.flatten(0, 1)

    def _rolled(
        self, held: _Layer, queries: torch.Tensor, new: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries and keys rotated to their places among what each head holds."""
        assert self._rotate is not None
        at = held.positions.masked_fill(held.positions < 0, 1 << 40)
        places = at.argsort(1).argsort(1)
        keys = self._rotate(held.keys, places.masked_fill(held.positions < 0, 0))
        counts = (held.positions >= 0).sum(1, keepdim=True)
        last = counts - len(new) + torch.arange(len(new), device=new.device)  # (H, n)
        last = last.repeat_interleave(len(queries) // len(counts), 0)
        return self._rotate(self._rotate(queries, new, inverse=True), last), keys

    @torch.inference_mode()
    def advance(self, num_tokens: int) -> None:
        """Count a finished pass, add its weights to the scores, and evict what has no seat."""
        for layer, weights in self._weights.items():
            held = self._layers[layer]
            assert self._evict is not None
            assert self._seats is not None
            assert held.scores is not None
            held.scores = self._evict.add(held.scores, weights)
            kept = self._evict.keep(held.scores, held.positions, self._seats, decoding=True)
            held.positions.masked_fill_(~kept, -1)
        self._weights.clear()
        self.length += num_tokens
