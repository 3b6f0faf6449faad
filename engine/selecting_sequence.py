"""A running sequence under the papers' stages: what they choose enters its blocks and its cache.

Stages that change stored blocks act while the prompt is computed, and what they chose travels in
the blocks' masks. Eviction by H2O acts on the running cache alone, after the whole prompt: blocks
in the store stay whole, for other questions. Its scores come from the blocks' saliency tags and
the prompt's tail, which a request has whether its blocks were computed or fetched, so that both
give the same tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.kept_cache import KeptCache
from kvstrata.engine.model import Model
from kvstrata.engine.sequence import (
    PREFILL_CHUNK,
    PROBE_FRACTION,
    FrameSet,
    Loaded,
    RunningSequence,
)
from kvstrata.engine.staged_cache import StagedCache
from kvstrata.methods.codec import BlockShape, KVBlocks, SelectiveCodec
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.gate_weights import GATES, GateError, GateWeights
from kvstrata.methods.presets import Method
from kvstrata.methods.saliency_tag import decode_tags
from kvstrata.methods.token_scores import TokenScores
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS, CacheScope


class SelectingSequence(RunningSequence):
    """A request whose method has stages. Not thread-safe: one call at a time.

    Attributes:
        kept: bool (L, H, n): what each head keeps of the first full blocks; None for all. What the
            cache holds of the others means nothing.
        selected: The cache of what is kept, once the prompt has passed; None while all is.
        scores: Of the tokens that ``compute`` saw; None before it, or if no stage asks.
        important: bool (L, n): those of them that matter to ZipVL; None without it.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        token_ids: Sequence[int],
        *,
        salt: bytes = b"",
        num_prompt: int | None = None,
    ) -> None:
        """Start with an empty cache.

        Args:
            model: To run.
            method: What happens to the KV.
            token_ids: The prompt, and after it what was generated before.
            salt: The tenant's.
            num_prompt: Tokens of the prompt; None for all.
        """
        self._num_prompt = len(token_ids) if num_prompt is None else num_prompt
        self._prompt_ids = tuple(token_ids[: self._num_prompt])
        super().__init__(model, method, token_ids, salt=salt)
        self._gates = None if method.pipeline.gate is None else gates_for(model, method)
        self.kept: torch.Tensor | None = None
        self.selected: KeptCache | None = None
        self.scores: TokenScores | None = None
        self.important: torch.Tensor | None = None
        self._saliency_of_blocks = torch.zeros(self._num_stored_layers, 0)

    def load(self, blocks: Sequence[FrameSet]) -> Loaded:
        """Decode stored blocks of the prompt into the cache; see ``RunningSequence.load``.

        Where blocks depend on what follows them, all of them are taken or none: computed on top of
        some, the rest would be others than those that were stored.
        """
        wanted = max(0, (self._num_prompt - 1) // BLOCK_TOKENS - self.num_blocks_held)
        if not self.method.pipeline.needs_whole_prompt:
            return super().load(blocks[:wanted])
        if len(blocks) < wanted:
            return Loaded(0, "incomplete_prompt")
        loaded = super().load(blocks[:wanted])
        if loaded.num_blocks == wanted:
            return loaded
        self.cache.truncate(0)
        return Loaded(0, loaded.reason)

    def _scope(self, salt: bytes) -> CacheScope:
        spec = self.model.spec
        return self.method.scope(
            model=self.model.fingerprint,
            kv_dtype=spec.dtype_name,
            salt=salt,
            prompt_ids=self._prompt_ids,
        )

    @property
    def _dense(self) -> SequenceCache:
        """The prompt's cache: no pool holds it, because stages act on all of its rows."""
        assert isinstance(self.cache, SequenceCache)
        return self.cache

    @property
    def kept_fraction(self) -> float:
        """What the running cache holds, as a share of all tokens of all heads."""
        if self.selected is not None:
            return self.selected.kept_fraction
        return 1.0 if self.kept is None else self.kept.float().mean().item()

    def compute(self, until: int, chunk: Callable[[], int] | None = None) -> Iterator[int]:
        """Run the model over the tokens up to ``until``; see ``RunningSequence.compute``."""
        if until <= self.cache.length:
            return
        pipeline = self.method.pipeline
        if self.kept is not None:
            self.kept = self.kept[..., : self.cache.length]
        # Layers that are not stored come back whole, so a hit and a miss gate the same ones.
        first_layer = self.method.codec.first_layer
        staged = StagedCache(self._dense, pipeline, self.kept, self._gates, first_layer)
        staged.expect(until - self.cache.length)
        while self.cache.length < until:
            first = self.cache.length
            most = until if pipeline.needs_whole_prompt else chunk() if chunk else PREFILL_CHUNK
            self.model.forward(staged, self.token_ids[first : min(first + most, until)])
            yield self.cache.length - first
        self.scores, self.important, self.kept = staged.scores(), staged.important, staged.kept
        self._leave_out_unimportant()

    def _leave_out_unimportant(self) -> None:
        """Drop what did not matter to the prompt, if that is what ZipVL is set to."""
        stage = self.method.pipeline.attention
        if stage is None or stage.rest != "evict" or self.important is None:
            return
        matter = self.important[:, None].expand(-1, self.model.spec.num_kv_heads, -1).clone()
        matter[: self.method.codec.first_layer] = True  # recomputed from token ids, all of it
        if self.kept is not None:
            matter &= F.pad(self.kept, (0, matter.shape[2] - self.kept.shape[2]), value=True)
        self.kept = matter

    def settle(self, blocks: Sequence[SealedBlock]) -> None:
        """Replace held blocks by their sealed form; see ``RunningSequence.settle``."""
        super().settle(blocks)
        if self.method.codec.lossless and blocks:
            first = blocks[0].identity.first_position // BLOCK_TOKENS
            self._note(first, [{s: Frame.open(f) for s, f in b.frames.items()} for b in blocks])

    def extend(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[SealedBlock]]:
        """Append tokens and run the model over them; see ``RunningSequence.extend``.

        Tokens of the prompt see what its heads keep. Those that follow come one by one, because
        each may evict another.
        """
        if self.method.pipeline.evict is None and self.kept is None and self.selected is None:
            return super().extend(token_ids)
        logits, sealed = torch.empty(0), list[SealedBlock]()
        if self.selected is None:
            self.token_ids[self.cache.length :] = token_ids
            token_ids = self.token_ids[self._num_prompt :]
            logits, sealed = self._finish_prompt()
        else:
            self.token_ids += token_ids
        assert self.selected is not None
        for token_id in token_ids:
            logits = self.model.forward(self.selected, [token_id])
        return logits, sealed

    def _finish_prompt(self) -> tuple[torch.Tensor, list[SealedBlock]]:
        """Run the prompt's tail and select; returns as ``extend`` does."""
        logits, tail = torch.empty(0), None
        sealed: list[SealedBlock] = []
        first, last = self.cache.length, self._num_prompt
        if first < last:
            tail = StagedCache(self._dense, self.method.pipeline, self.kept)
            tail.expect_all(last - first)
            self.cache.expect_probes(first, last)
            logits = self.model.forward(tail, self.token_ids[first:last])
            if last % BLOCK_TOKENS == 0 and not self.method.pipeline.leaves_out:
                sealed = self.seal(self.num_blocks_held - 1, self.num_blocks_held)
        self._select(first, tail)
        return logits, sealed

    def _select(self, first_of_tail: int, tail: StagedCache | None) -> None:
        """Go on with the cache of what is kept; blocks that fill from now on are nobody else's."""
        spec, evict = self.model.spec, self.method.pipeline.evict
        length = self.cache.length
        kept = torch.ones(spec.num_layers, spec.num_kv_heads, length, dtype=torch.bool)
        if self.kept is not None:
            kept[..., : self.kept.shape[2]] = self.kept
        scores = None if evict is None else self._accumulated(first_of_tail, tail)
        self.selected = KeptCache(
            self._dense, kept, evict=evict, scores=scores, rotate=self.model.rotate
        )
        self.committable = False
        self.cache = self.model.new_cache(1)

    def _accumulated(self, first_of_tail: int, tail: StagedCache | None) -> torch.Tensor:
        """Return the attention that each token has received, float32 (L, H, n), an estimate.

        Rows in blocks count by the blocks' tags, which are means over heads; the tail's rows as
        they were.
        """
        spec, first_layer = self.model.spec, self.method.codec.first_layer
        scores = torch.zeros(spec.num_layers, spec.num_kv_heads, self.cache.length)
        rows = torch.arange(first_of_tail, 0, -1)
        if first_of_tail:
            blocks = self._saliency_of_blocks[:, None, :first_of_tail]
            scores[first_layer:, :, :first_of_tail] = blocks * rows
            if first_layer:
                scores[0, :, :first_of_tail] = self._first_layer_saliency(first_of_tail) * rows
        if tail is not None:
            scores += tail.sums()
        return scores

    def _first_layer_saliency(self, num_tokens: int) -> torch.Tensor:
        """Return layer 0's saliency, float32 (H, n): no block tells it, but token ids do."""
        first = num_tokens - int(num_tokens * PROBE_FRACTION) - 1
        queries = self.model.first_layer_queries(self.token_ids[first:num_tokens], first)
        keys = self.cache.read(0, num_tokens)[0][:1]
        rows = torch.arange(first, num_tokens)
        scaling = self.model.attention_scaling
        return TokenScores.of(queries[None], rows, keys.contiguous(), scaling).saliency[0].cpu()

    def _chosen(self, blocks: KVBlocks) -> KVBlocks:
        """Return blocks with the stages' scores and choices."""
        pipeline, codec = self.method.pipeline, self.method.codec
        begin = blocks.first_position
        end = begin + blocks.keys.shape[2] * BLOCK_TOKENS
        layers, cut = slice(codec.first_layer, None), slice(begin, end)
        if self.kept is not None and self.kept.shape[2] >= end:
            kept = self.kept[layers, :, cut]
            if not kept.all():
                blocks = replace(blocks, kept=kept.unflatten(2, (-1, BLOCK_TOKENS)))
        if self.scores is not None and self.scores.num_tokens >= end:
            normaliser = pipeline.quantise.normaliser if pipeline.quantise else "probe_nnz"
            saliency = self.scores.normalised(normaliser)[layers, :, cut]
            blocks = replace(blocks, saliency=saliency.unflatten(2, (-1, BLOCK_TOKENS)))
        if self.important is not None and self.important.shape[1] >= end:
            matter = self.important[layers, None, cut].expand_as(blocks.saliency.flatten(2))
            blocks = replace(blocks, salient=matter.unflatten(2, (-1, BLOCK_TOKENS)))
        return blocks

    def _note(self, first: int, blocks: Sequence[FrameSet]) -> None:
        """Take over tags and masks of blocks, now in the cache from block ``first`` on."""
        codec, spec = self.method.codec, self.model.spec
        begin, end = first * BLOCK_TOKENS, (first + len(blocks)) * BLOCK_TOKENS
        if self.method.pipeline.evict is not None:
            tags = decode_tags(codec.tags(blocks)).flatten(1)
            self._saliency_of_blocks = torch.cat([self._saliency_of_blocks[:, :begin], tags], 1)
        if not isinstance(codec, SelectiveCodec):
            return
        shape = BlockShape(spec.num_kv_heads, spec.head_dim, spec.dtype)
        found = codec.kept(blocks, shape)
        if found is None and self.kept is None:
            return
        kept = torch.ones(spec.num_layers, spec.num_kv_heads, end, dtype=torch.bool)
        if self.kept is not None:
            kept[..., :begin] = self.kept[..., :begin]
        if found is not None:
            kept[codec.first_layer :, :, begin:] = found.flatten(2)
        self.kept = kept


def gates_for(model: Model, method: Method) -> GateWeights:
    """Return the gates that a method names.

    Raises:
        GateError: They are not here, or of another model.
    """
    assert method.pipeline.gate is not None
    named, own = method.pipeline.gate.gates, model.gates
    gates = own if own is not None and own.gates_id == named else GATES.by_id(named)
    if gates.model_id != model.model_id:
        raise GateError(f"gates {gates.gates_id} are those of another model")
    return gates
