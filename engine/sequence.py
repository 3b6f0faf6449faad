"""One running sequence: its tokens, its cache, and the blocks that leave and enter it.

Every full block is attended at the precision at which it is stored, whether it came from the store
or was computed here (``settle``); the unfilled rest is uncompressed. So cold, warm, replayed and
recomputed requests give the same tokens.

One thing remains of a lossy method: within one call of ``compute`` the model attends to what it
just computed, uncompressed, as any prefill does. When only part of a prompt is cached, the rest is
computed on top of the stored part, and its KV differs from that of a cold run within the method's
precision.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvstrata.engine.attachments import attachments_of
from kvstrata.engine.batch import Span
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.decoded_blocks import write_decoded
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.last_token import LastToken
from kvstrata.engine.model import Model
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.rotary import stored_turns
from kvstrata.engine.staging import StagingLateError, to_host
from kvstrata.methods.codec import BlockShape, KVBlocks
from kvstrata.methods.framing import (
    BlockIdentity,
    SealedBlock,
    UnusableBlockError,
    draft,
    seal,
    usable,
)
from kvstrata.methods.presets import Method
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import FrameHeader, RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, BlockHash, CacheScope, block_hash, block_hashes

PREFILL_CHUNK = 1024
MAX_PROBE_ROWS = 256  # bounds the scores held at once
PROBE_FRACTION = 0.1  # share of prompt rows that saliency is taken from (codec.md, section 5)

FrameSet = Mapping[Stratum, Frame]


@dataclass(frozen=True, slots=True)
class Loaded:
    """How far a load got: blocks now in the cache, why it ended early, and how long it took."""

    num_blocks: int
    reason: str | None
    seconds: float = 0.0


class RunningSequence:
    """The state of one request on one node. Not thread-safe: one call at a time.

    Attributes:
        token_ids: All tokens, computed or not.
        cache: KV of the first ``cache.length`` of them.
        committable: False once nothing computed here may be stored any more: a block was read below
            its stored precision, or a block before could not be encoded.
        num_unencodable: Blocks whose values the codec cannot represent, or that did not come back
            from a GPU in time; attended uncompressed.
        layer_bytes: Of all blocks sealed or loaded, layer by layer.
        num_stored_tokens: Tokens in them.
        layer_executions: Layers that ran for generated tokens, if not all of them did.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        token_ids: Sequence[int],
        *,
        salt: bytes = b"",
        pool: KVPool | None = None,
    ) -> None:
        """Start with an empty cache: in ``pool``, or in memory of its own without one.

        Raises:
            ArenaFullError: The pool has no place for another sequence.
        """
        self.model = model
        self.method = method
        self.token_ids = list(token_ids)
        self.scope = self._scope(salt).digest()
        self.hashes: list[BlockHash] = block_hashes(self.scope, token_ids)
        probes = max(BLOCK_TOKENS, min(int(len(token_ids) * PROBE_FRACTION), MAX_PROBE_ROWS))
        self.cache: SequenceCache | PagedCache
        if pool is not None:
            self.cache = PagedCache(pool, method.codec, self.token_ids, probes)
        else:
            capacity = min(model.spec.max_positions, len(token_ids) + 4 * BLOCK_TOKENS)
            self.cache = SequenceCache(model.spec, capacity, probes, device=model.device)
        self._staging = None if pool is None else pool.staging
        self._first_layer_kv = (pool or model).first_layer_kv
        self.committable = method.reads_all
        self.num_unencodable = 0
        self.layer_bytes = [0] * model.spec.num_layers
        self.num_stored_tokens = 0
        self.layer_executions = 0
        self._is_again = False  # the pass is over the last token, which is held

    def _scope(self, salt: bytes) -> CacheScope:
        """Return the scope of this sequence's blocks."""
        return self.method.scope(
            model=self.model.fingerprint, kv_dtype=self.model.spec.dtype_name, salt=salt
        )

    @property
    def layer_bits(self) -> list[float]:
        """Stored bits per element of K and V, layer by layer, of all blocks sealed or loaded.

        A layer that is recomputed from token ids has 0.
        """
        spec = self.model.spec
        elements = 2 * spec.num_kv_heads * spec.head_dim * max(1, self.num_stored_tokens)
        return [8 * num_bytes / elements for num_bytes in self.layer_bytes]

    @property
    def kept_fraction(self) -> float:
        """What the running cache holds, as a share of all tokens of all heads."""
        return 1.0

    @property
    def num_blocks_held(self) -> int:
        """Full blocks in the cache."""
        return self.cache.length // BLOCK_TOKENS

    def identity(self, index: int) -> BlockIdentity:
        """Return who block ``index`` is."""
        first = index * BLOCK_TOKENS
        return BlockIdentity(
            scope=self.scope,
            block_hash=self.hashes[index],
            parent_hash=self.hashes[index - 1] if index else self.scope,
            token_ids=tuple(self.token_ids[first : first + BLOCK_TOKENS]),
            first_position=first,
        )

    def draft(self, index: int) -> FrameHeader:
        """Return what the headers of block ``index`` will say once it is sealed."""
        spec = self.model.spec
        return draft(
            self.method.codec,
            self.identity(index),
            rope=self._rope,
            kv_dtype=spec.dtype_name,
            num_layers=self._num_stored_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )

    def load(self, blocks: Sequence[FrameSet]) -> Loaded:
        """Decode stored blocks into the cache, from the first block not held on.

        Stops before the first block that must not or cannot be used. A block lacking a stratum that
        the method reads counts as unusable: precision is never lowered silently.
        """
        loaded = self._take(self.num_blocks_held, blocks, self.method.wanted)
        self.num_stored_tokens += loaded.num_blocks * BLOCK_TOKENS
        return loaded

    def refine(
        self, method: Method, first: int, blocks: Sequence[FrameSet], added: Sequence[Stratum]
    ) -> Loaded:
        """Replace held blocks from ``first`` on by what ``method`` reads, ``added`` among it.

        Like ``load``: what precedes a block that cannot be used is refined. Only tokens to come
        attend to it, so nothing of this sequence may be stored any more.

        Raises:
            ArenaFullError: There is no room to hold them twice for a moment; nothing has changed.
        """
        self.committable, self.method = False, method
        return self._take(first, blocks, added)

    def _take(self, first: int, blocks: Sequence[FrameSet], counted: Sequence[Stratum]) -> Loaded:
        """Bring blocks into the cache from ``first`` on; ``counted`` are the new strata."""
        chosen: list[dict[Stratum, Frame]] = []
        reason = None
        for index, frames in enumerate(blocks, start=first):
            try:
                chosen.append(self._usable(index, frames))
            except UnusableBlockError as error:
                reason = error.reason
                break
        loaded = Loaded(len(chosen), reason)
        if chosen:
            try:
                self._write(first, chosen)
            except (CorruptFrameError, StagingLateError):  # go block by block up to it
                loaded = self._load_singly(first, chosen)
        for frames in chosen[: loaded.num_blocks]:
            for stratum in counted:
                self._count({i: len(part) for i, part in frames[stratum].segments().items()})
        return loaded

    def _count(self, sizes: Mapping[int, int]) -> None:
        for layer, num_bytes in sizes.items():
            self.layer_bytes[layer] += num_bytes

    def compute(self, until: int, chunk: Callable[[], int] | None = None) -> Iterator[int]:
        """Run the model over the tokens up to ``until``, each time over at most ``chunk()``.

        Yields the tokens computed by each chunk, so that a caller can stop in between.
        """
        if until <= self.cache.length:
            return
        self.begin_prompt(until)
        while self.cache.length < until:
            first = self.cache.length
            self.model.forward_batch([self.prompt_span(until, chunk() if chunk else PREFILL_CHUNK)])
            yield self.cache.length - first

    def begin_prompt(self, until: int) -> None:
        """Expect the probes of a prompt whose tokens up to ``until`` are computed next."""
        self.cache.expect_probes(
            until - int((until - self.cache.length) * PROBE_FRACTION) - 1, until
        )

    def prompt_span(self, stop: int, limit: int, *, wants_logits: bool = False) -> Span:
        """Return the next tokens of a prompt, at most ``limit`` and none from ``stop`` on.

        Logits come after the last one before ``stop``, if they are wanted at all.
        """
        first = self.cache.length
        last = min(first + limit, stop)
        return Span(self.cache, self.token_ids[first:last], wants_logits and last == stop)

    def extend(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[SealedBlock]]:
        """Append tokens after the computed ones, run the model over them, settle blocks that fill.

        Returns:
            The float32 logits (vocab,) after the last token, and the blocks that filled, sealed.
        """
        self.token_ids[self.cache.length :] = token_ids
        logits, sealed = torch.empty(0), []
        while self.cache.length < len(self.token_ids):
            span = self.next_span(BLOCK_TOKENS)
            rows = self.model.forward_batch([span])
            logits = rows[0] if span.wants_logits else logits
            blocks = self.fill()
            self.settle(blocks)
            sealed += blocks
        return logits, sealed

    def next_span(self, limit: int) -> Span:
        """Return the next tokens, at most ``limit`` and none beyond the block that fills.

        They want logits if they are the last that are known. Where all are computed, it is the last
        one once more, for its logits.
        """
        first = self.cache.length
        if first == len(self.token_ids):
            self._is_again = True
            return Span(LastToken(self.cache), self.token_ids[-1:])
        boundary = (first // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        self.cache.expect_block(min(boundary, self.model.spec.max_positions))
        stop = min(first + limit, boundary, len(self.token_ids))
        tokens = self.token_ids[first:stop]
        return Span(self.cache, tokens, wants_logits=stop == len(self.token_ids))

    def fill(self) -> list[SealedBlock]:
        """After a pass over ``next_span``: if that filled a block, return it sealed, to settle."""
        was_again, self._is_again = self._is_again, False
        if was_again or self.cache.length % BLOCK_TOKENS:
            return []
        return self.seal(self.num_blocks_held - 1, self.num_blocks_held)

    def seal(self, first: int, last: int) -> list[SealedBlock]:
        """Return blocks [first, last) of the cache, encoded and framed.

        Returns nothing, and commits nothing from here on, if the codec cannot represent them, or a
        GPU does not give them back in time.
        """
        for index in range(len(self.hashes), last):
            parent = self.hashes[-1] if self.hashes else self.scope
            begin = index * BLOCK_TOKENS
            self.hashes.append(block_hash(parent, self.token_ids[begin : begin + BLOCK_TOKENS]))
        codec, spec = self.method.codec, self.model.spec
        begin, end = first * BLOCK_TOKENS, last * BLOCK_TOKENS
        keys, values = self.cache.read(begin, end)
        attached = attachments_of(self.model, self.method, keys, begin)
        keys, values = keys[codec.first_layer :], values[codec.first_layer :]
        if (turns := stored_turns(self._rope, begin, end)) is not None:
            keys = self.model.rotate(keys, turns, inverse=True)
        saliency = self.cache.saliency(begin, end, self.model.attention_scaling)
        try:
            keys, values = (to_host(part, self._staging) for part in (keys, values))
            blocks = KVBlocks(
                keys=keys.unflatten(2, (-1, BLOCK_TOKENS)),
                values=values.unflatten(2, (-1, BLOCK_TOKENS)),
                saliency=saliency[codec.first_layer :].unflatten(2, (-1, BLOCK_TOKENS)),
                first_position=begin,
            )
            encoded = codec.encode(self._chosen(blocks))
        except (ValueError, StagingLateError):
            self.committable = False
            self.num_unencodable += last - first
            return []
        for segments in encoded:
            for layers in segments.values():
                self._count({codec.first_layer + i: len(data) for i, data in layers.items()})
        self.num_stored_tokens += len(encoded) * BLOCK_TOKENS
        return [
            seal(
                codec,
                segments,
                self.identity(index),
                rope=self._rope,
                kv_dtype=spec.dtype_name,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                attachments=attached[index - first] if attached else None,
            )
            for index, segments in enumerate(encoded, start=first)
        ]

    def _chosen(self, blocks: KVBlocks) -> KVBlocks:
        """Return blocks with what the method's stages say of their tokens; here nothing."""
        return blocks

    def _note(self, first: int, blocks: Sequence[FrameSet]) -> None:
        """Take note of what blocks, now in the cache from ``first`` on, tell of their tokens."""

    def settle(self, blocks: Sequence[SealedBlock]) -> None:
        """Replace consecutive held blocks by what a reader of their sealed form gets."""
        if self.method.codec.lossless or not blocks:
            return
        first = blocks[0].identity.first_position // BLOCK_TOKENS
        wanted = self.method.wanted
        frames = [{s: Frame.open(f) for s, f in b.frames.items() if s in wanted} for b in blocks]
        try:
            self._write(first, frames)
        except StagingLateError:  # they stay as they are, which no reader gets
            self.committable = False

    @property
    def _rope(self) -> RopeForm:
        if self.model.spec.rope == "none":
            return RopeForm.ROPE_FORM_NONE
        return self.method.codec.rope

    @property
    def _num_stored_layers(self) -> int:
        return self.model.spec.num_layers - self.method.codec.first_layer

    def _usable(self, index: int, frames: FrameSet) -> dict[Stratum, Frame]:
        identity = self.identity(index)
        chosen = usable(
            frames,
            identity,
            self.method.codec,
            num_layers=self._num_stored_layers,
            finest=self.method.finest,
        )
        if tuple(chosen) != self.method.wanted:
            raise UnusableBlockError("stratum_absent")
        header = next(iter(chosen.values())).header
        spec = self.model.spec
        own = self._rope, spec.dtype_name, spec.num_kv_heads, spec.head_dim
        if (header.rope, header.kv_dtype, header.num_kv_heads, header.head_dim) != own:
            raise UnusableBlockError("foreign")
        return chosen

    def _load_singly(self, first: int, chosen: Sequence[FrameSet]) -> Loaded:
        for count, frames in enumerate(chosen):
            try:
                self._write(first + count, [frames])
            except CorruptFrameError:
                return Loaded(count, "corrupt")
            except StagingLateError:
                return Loaded(count, "late_copy")
        return Loaded(len(chosen), None)

    def _write(self, first: int, blocks: Sequence[FrameSet]) -> None:
        if isinstance(self.cache, PagedCache) and self.cache.takes_block(first):
            self.cache.hold(blocks, first)
            return
        codec, spec = self.method.codec, self.model.spec
        begin, end = first * BLOCK_TOKENS, (first + len(blocks)) * BLOCK_TOKENS
        rotation = None
        if (turns := stored_turns(self._rope, begin, end)) is not None:
            at, tables = turns.to(self.model.device), self.model.cos_sin(0, end)
            rotation = tables[0][at], tables[1][at]
        shape = BlockShape(spec.num_kv_heads, spec.head_dim, spec.dtype, self.model.device)
        write_decoded(self.cache, codec, blocks, shape, begin, rotation)
        if codec.first_layer:
            k0, v0 = self._first_layer_kv(self.token_ids[begin:end], begin)
            self.cache.write(begin, k0[None], v0[None], layers=slice(0, 1))
        self._note(first, blocks)
