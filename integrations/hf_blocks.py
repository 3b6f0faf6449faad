"""A transformers model's KV as stored blocks, and back."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kvstrata.engine.compatibility import build_spec, check_config, check_model
from kvstrata.engine.fingerprint import FINGERPRINT_BYTES, compute_fingerprint
from kvstrata.engine.rotary import Rotary, stored_turns
from kvstrata.methods.codec import BlockShape, KVBlocks
from kvstrata.methods.framing import (
    BlockIdentity,
    SealedBlock,
    UnusableBlockError,
    seal,
    usable,
)
from kvstrata.methods.presets import Method
from kvstrata.protos.errors import MethodConflictError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, BlockHash, block_hashes

_CHUNK = 1024  # tokens of a pass for layer 0, which bounds its mask

Frames = Mapping[Stratum, Frame]


class ModelBlocks:
    """The blocks of one model under one method.

    Attributes:
        scope: Of all of them.

    Raises:
        UnsupportedModelError: The model's KV does not depend on tokens and position alone.
        MethodConflictError: A method that needs more than a cache.
    """

    def __init__(self, model: Any, method: Method, salt: bytes) -> None:
        check_config(model.config, type(model).__name__)
        check_model(model, type(model).__name__)
        if method.pipeline.stages or method.skip or method.represented:
            raise MethodConflictError(
                "a transformers cache holds every token of every layer",
                "use a preset that is a codec: exact, near-lossless, balanced or small",
                rule="cache_only",
            )
        self._model = model
        self._method = method
        self._spec = build_spec(model.config, model.dtype, frozenset())
        self._rotary: Rotary | None = None
        if self._spec.rope == "pre":
            module = model.base_model.rotary_emb
            self._rotary = Rotary(module, self._spec.max_positions, model.device)
        self.scope = method.scope(
            model=fingerprint_of(model), kv_dtype=self._spec.dtype_name, salt=salt
        ).digest()

    def hashes(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Return the hashes of the full blocks of a sequence."""
        return block_hashes(self.scope, token_ids)

    def usable(
        self, token_ids: Sequence[int], blocks: Sequence[Frames]
    ) -> tuple[list[Frames], str | None]:
        """Return what a sequence's first blocks are decoded from, and why the next one is not.

        It is another block than that, or not as precise as the method reads.
        """
        hashes, run = self.hashes(token_ids), list[Frames]()
        try:
            for index, frames in enumerate(blocks):
                run.append(self._usable(self._identity(hashes, token_ids, index), frames))
        except UnusableBlockError as error:
            return run, error.reason
        return run, None

    def _usable(self, identity: BlockIdentity, frames: Frames) -> Frames:
        method, spec = self._method, self._spec
        chosen = usable(
            frames,
            identity,
            method.codec,
            num_layers=spec.num_layers - method.codec.first_layer,
            finest=method.finest,
        )
        if tuple(chosen) != method.wanted:
            raise UnusableBlockError("stratum_absent")
        header = next(iter(chosen.values())).header
        own = self._rope, spec.dtype_name, spec.num_kv_heads, spec.head_dim
        if (header.rope, header.kv_dtype, header.num_kv_heads, header.head_dim) != own:
            raise UnusableBlockError("foreign")
        return chosen

    def decoded(
        self, token_ids: Sequence[int], blocks: Sequence[Frames]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (L, H, n, D) of a sequence's first blocks, as attention reads.

        Raises:
            CorruptFrameError: A checksum does not hold.
        """
        shape = BlockShape(self._spec.num_kv_heads, self._spec.head_dim, self._spec.dtype)
        decoded = self._method.codec.decode(blocks, shape)
        device = self._model.device
        keys, values = (tensor.flatten(2, 3).to(device) for tensor in decoded)
        keys = self._turned(keys, 0, inverse=False)
        if self._method.codec.first_layer:
            ids = token_ids[: keys.shape[2]]
            first = [
                _first_layer_kv(self._model, ids[begin : begin + _CHUNK], begin)
                for begin in range(0, len(ids), _CHUNK)
            ]
            keys, values = (
                torch.cat([torch.cat([pair[i] for pair in first], dim=1)[None], later])
                for i, later in enumerate((keys, values))
            )
        return keys, values

    def sealed(
        self, token_ids: Sequence[int], first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> list[SealedBlock]:
        """Return blocks from ``first`` on, ready to be stored.

        Args:
            token_ids: Of the sequence, up to the end of the last block.
            first: Index of the first block.
            keys: (L, H, n, D), as attention reads them.
            values: Likewise.

        Raises:
            ValueError: The codec cannot represent the values.
        """
        codec, spec = self._method.codec, self._spec
        begin = first * BLOCK_TOKENS
        keys, values = keys[codec.first_layer :], values[codec.first_layer :]
        keys = self._turned(keys, begin, inverse=True)
        blocks = KVBlocks(
            keys=keys.cpu().unflatten(2, (-1, BLOCK_TOKENS)),
            values=values.cpu().unflatten(2, (-1, BLOCK_TOKENS)),
            saliency=torch.zeros(*keys.shape[:3]).unflatten(2, (-1, BLOCK_TOKENS)),
            first_position=begin,
        )
        hashes = self.hashes(token_ids)
        return [
            seal(
                codec,
                segments,
                self._identity(hashes, token_ids, index),
                rope=self._rope,
                kv_dtype=spec.dtype_name,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
            )
            for index, segments in enumerate(codec.encode(blocks), start=first)
        ]

    def _turned(self, keys: torch.Tensor, begin: int, *, inverse: bool) -> torch.Tensor:
        """Return keys (L, H, n, D) from ``begin`` on as the cache has them, or as stored."""
        positions = stored_turns(self._rope, begin, begin + keys.shape[2])
        if self._rotary is None or positions is None:
            return keys
        return self._rotary.rotate(keys, positions, inverse=inverse)

    @property
    def _rope(self) -> RopeForm:
        none = RopeForm.ROPE_FORM_NONE
        return none if self._spec.rope == "none" else self._method.codec.rope

    def _identity(
        self, hashes: Sequence[BlockHash], token_ids: Sequence[int], index: int
    ) -> BlockIdentity:
        first = index * BLOCK_TOKENS
        return BlockIdentity(
            scope=self.scope,
            block_hash=hashes[index],
            parent_hash=hashes[index - 1] if index else self.scope,
            token_ids=tuple(token_ids[first : first + BLOCK_TOKENS]),
            first_position=first,
        )


def fingerprint_of(model: Any) -> bytes:
    """Return 16 bytes of weights, config and dtype as they are in memory, adapters included.

    Another name than that of the same model's files: blocks of nodes are not shared with.
    """
    hashed = hashlib.sha256(compute_fingerprint([], model.config, model.dtype))
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.digest()[:FINGERPRINT_BYTES]


class _Captured(Exception):  # noqa: N818 - it tells of no error
    """Layer 0's KV, (1, H, n, D) each."""


class _FirstLayerOnly(DynamicCache):  # type: ignore[misc]
    """A cache that ends a pass as soon as layer 0 has its KV."""

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        raise _Captured(key_states, value_states)


def _first_layer_kv(
    model: Any, token_ids: Sequence[int], begin: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return layer 0's keys, post-RoPE, and values (H, n, D), which need no attention."""
    ids = torch.tensor([token_ids], device=model.device)
    positions = torch.arange(begin, begin + len(token_ids), device=model.device)[None]
    try:
        with torch.no_grad():
            cache = _FirstLayerOnly(config=model.config)
            model.base_model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except _Captured as captured:
        keys, values = captured.args
        return keys[0], values[0]
    raise AssertionError("the model keeps no KV")
