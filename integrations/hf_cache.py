"""KVStrata behind transformers' own ``generate``: a cache that begins with what a store has.

    from kvstrata.integrations.hf_cache import CacheStore

    with CacheStore(model, "127.0.0.1:7070", preset="exact") as store:
        inputs = tokenizer(prompt, return_tensors="pt")
        cache = store.cache(**inputs)
        output = model.generate(**inputs, past_key_values=cache)
        print(cache.cached_tokens, store.counts)

The longest stored prefix of the prompt is in the cache before ``generate`` runs, which computes the
rest as it always does; the prompt's other full blocks are saved in the background. With the preset
``exact`` the tokens are those of a run without a store. With a lossy one what was read is what was
stored, within the preset's precision, while a first run attends to what it computed.

Any trouble with the store means that its part is computed, and is counted.
"""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from transformers import DynamicCache

from kvstrata.integrations.hf_blocks import ModelBlocks
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.methods.presets import Method, from_preset
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import CorruptFrameError, KVStrataError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, BlockHash

LEASE_S = 10.0  # what was found stays so long for the read that follows
SLOWEST_LINK_BYTES_PER_S = 10e6  # saving gets that much longer than an idle exchange
MAX_SAVES = 4  # that may wait or run; further ones are dropped

T = TypeVar("T")


class StoredCache(DynamicCache):  # type: ignore[misc]
    """The KV of one sequence, as ``generate`` uses it; made by ``CacheStore.cache``.

    Attributes:
        token_ids: The prompt; None for several sequences, which are neither read nor saved.
        cached_tokens: Of these, read from the store.
    """

    def __init__(self, store: "CacheStore", token_ids: list[int] | None, config: Any) -> None:
        super().__init__(config=config)
        self.token_ids = token_ids
        self.cached_tokens = 0
        self._store = store
        self._num_layers = len(self.layers)
        self._num_saved = 0  # blocks that are in the store, or on their way
        self._is_prefilled = token_ids is None

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with the KV (L, H, n, D) of the first n tokens, n a multiple of 64."""
        for layer in range(self._num_layers):
            super().update(keys[layer][None], values[layer][None], layer)
        self.cached_tokens = keys.shape[2]
        self._num_saved = self.cached_tokens // BLOCK_TOKENS

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take KV as ``DynamicCache`` does; the prompt's last ones start the saving."""
        held: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        if layer_idx == self._num_layers - 1 and not self._is_prefilled:
            assert self.token_ids is not None
            self._is_prefilled = self.get_seq_length() >= len(self.token_ids)
            if self._is_prefilled:
                self.save(self.token_ids)
        return held

    def save(self, token_ids: Any) -> None:
        """Save full blocks that are not yet, in the background.

        Args:
            token_ids: Those of the cache from the first on, such as what ``generate`` returned: a
                list, or a tensor (n,) or (1, n).
        """
        ids = _as_list(token_ids)
        if ids is None or self.token_ids is None or _batch_size(self) != 1:
            self._store.count("unsaved_batch")
            return
        if ids[: len(self.token_ids)] != self.token_ids:
            self._store.count("unsaved_other_prompt")
            return
        first, last = self._num_saved, min(len(ids), self.get_seq_length()) // BLOCK_TOKENS
        if last <= first:
            return
        begin, end = first * BLOCK_TOKENS, last * BLOCK_TOKENS
        keys = torch.stack([layer.keys[0, :, begin:end] for layer in self.layers])
        values = torch.stack([layer.values[0, :, begin:end] for layer in self.layers])
        if self._store.save(ids[:end], first, keys, values):
            self._num_saved = last


class CacheStore:
    """A model of transformers, and the store that its caches are read from and saved to.

    Its calls never raise for a store that is gone, slow or wrong. Belongs to one thread.

    Args:
        model: A causal language model whose attention reads the whole cache; it is not changed.
        address: The store's, "host:port".
        preset: How blocks are stored, or a ``Method`` without stages.
        timeout_s: How long a prompt waits for the store before it is computed.
        salt: Secret part of the blocks' identity, for users who must not hit each other's.
        credentials: Shown to the store.

    Attributes:
        counts: What happened: tokens ``cached``, blocks ``saved``, and each reason for which
            something was not.

    Raises:
        UnsupportedModelError: The model's KV does not depend on tokens and position alone.
        UnknownPresetError: There is no such preset.
        MethodConflictError: A method that needs more than a cache.
    """

    def __init__(
        self,
        model: Any,
        address: str,
        *,
        preset: str | Method = "exact",
        timeout_s: float = 5.0,
        salt: bytes = b"",
        credentials: ClientCredentials = ANONYMOUS,
    ) -> None:
        method = from_preset(preset) if isinstance(preset, str) else preset
        self._blocks = ModelBlocks(model, method, salt)
        self.counts: Counter[str] = Counter()
        self._config = model.config
        self._method = method
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._saves: set[Future[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = self._submit(_connect(address, timeout_s, credentials)).result()

    def cache(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> StoredCache:
        """Return the cache of a prompt; takes what a tokenizer returns.

        Several sequences, or padding, get a cache that neither reads nor saves, which is counted.

        Args:
            input_ids: The prompt: a list, or a tensor (n,) or (1, n).
            attention_mask: All ones.
        """
        ids = _as_list(input_ids)
        if ids is None or (attention_mask is not None and not bool((attention_mask == 1).all())):
            self.count("batch")
            return StoredCache(self, None, self._config)
        made = StoredCache(self, ids, self._config)
        if blocks := self._fetched(ids):
            try:
                made.fill(*self._blocks.decoded(ids, blocks))
            except CorruptFrameError:
                self.count("corrupt")
        self.count("cached", made.cached_tokens)
        return made

    def count(self, what: str, amount: int = 1) -> None:
        """Count what happened."""
        with self._lock:
            self.counts[what] += amount

    def _fetched(self, ids: Sequence[int]) -> list[Mapping[Stratum, Frame]]:
        """Return the longest prefix's blocks that can be used; a token is left to compute."""
        num_blocks = (len(ids) - 1) // BLOCK_TOKENS
        if not num_blocks:
            return []
        hashes = self._blocks.hashes(ids[: num_blocks * BLOCK_TOKENS])
        try:
            found = self._submit(self._fetch(hashes)).result()
        except (KVStrataError, TimeoutError) as error:
            self.count("timeout" if isinstance(error, TimeoutError) else "store_unavailable")
            return []
        chosen, reason = self._blocks.usable(ids, found)
        if reason is not None:
            self.count(reason)
        return chosen

    async def _fetch(self, hashes: Sequence[BlockHash]) -> list[dict[Stratum, Frame]]:
        """Return the frames of the blocks that the store tells, within the time limit."""
        wanted = self._method.wanted
        async with asyncio.timeout(self._timeout_s):
            told = await self._client.lookup(self._blocks.scope, hashes, lease_s=LEASE_S)
            run = 0
            while run < len(told.blocks) and set(wanted) <= set(told.blocks[run].strata):
                run += 1
            blocks: list[dict[Stratum, Frame]] = [{} for _ in range(run)]
            if run:
                pieces = self._client.get(self._blocks.scope, hashes[:run], wanted)
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        if piece.frame is not None:
                            blocks[piece.index][cast(Stratum, piece.stratum)] = piece.frame
            return blocks

    def save(
        self, token_ids: Sequence[int], first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> bool:
        """Save blocks from ``first`` on in the background; False if they are dropped at once.

        Args:
            token_ids: From the first on, whole blocks.
            first: Index of the first block to save.
            keys: (L, H, n, D), as the cache has them; not changed from now on.
            values: Likewise.
        """
        if not self._method.reads_all:
            return False  # what was computed on top of a coarser reading is nobody else's
        self._saves = {each for each in self._saves if not each.done()}
        if len(self._saves) >= MAX_SAVES:
            self.count("unsaved_busy")
            return False
        self._saves.add(self._submit(self._save(token_ids, first, keys, values)))
        return True

    async def _save(
        self, token_ids: Sequence[int], first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        try:
            sealed = await asyncio.to_thread(self._blocks.sealed, token_ids, first, keys, values)
            limit_s = self._timeout_s + sum(b.num_bytes for b in sealed) / SLOWEST_LINK_BYTES_PER_S
            outcomes = await self._client.put(
                ((b.identity.key, {int(s): f for s, f in b.frames.items()}) for b in sealed),
                timeout_s=limit_s,
            )
        except ValueError:
            self.count("unsaved_unencodable")
        except KVStrataError:
            self.count("unsaved_store_unavailable")
        else:
            for outcome in outcomes:
                word = "unsaved_rejected" if outcome.outcome == "rejected" else "saved"
                self.count(word)

    def flush(self) -> None:
        """Wait for what is being saved; each has a time limit of its own."""
        for each in self._saves:
            each.result()
        self._saves = set()

    def close(self) -> None:
        """Finish what is being saved, and end the connection. Idempotent."""
        if not self._thread.is_alive():
            return
        self.flush()
        self._submit(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _connect(address: str, timeout_s: float, credentials: ClientCredentials) -> StoreClient:
    return StoreClient(address, timeout_s=timeout_s, credentials=credentials)


def _batch_size(cache: DynamicCache) -> int:
    keys = cache.layers[0].keys
    return 0 if keys is None else int(keys.shape[0])


def _as_list(token_ids: Any) -> list[int] | None:
    """Return the ids of one sequence; None for several."""
    if isinstance(token_ids, torch.Tensor):
        if token_ids.ndim == 2:
            return [int(i) for i in token_ids[0]] if len(token_ids) == 1 else None
        return [int(i) for i in token_ids] if token_ids.ndim == 1 else None
    return [int(i) for i in token_ids]
