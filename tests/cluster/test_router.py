"""Which path a request takes."""

from typing import Any, cast

import pytest

from kvstrata.cluster.router import Route, Router
from kvstrata.kvstore_service.client import FoundBlock, LookupResult, StoreClient
from kvstrata.methods.presets import Method
from kvstrata.prefill_node import WorkerInfo
from kvstrata.prefill_node.read_plan import StoredBlock
from kvstrata.protos.errors import DeadlineError, KVStrataError, UnavailableError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockHash, ScopeDigest
from kvstrata.protos.retention import Retention
from tests.prefill_node.nodes import BALANCED, EXACT, prompt_of, task_of

BASE, MID, FULL = Stratum.STRATUM_BASE, Stratum.STRATUM_MID, Stratum.STRATUM_EXACT
INFO = WorkerInfo("tiny", b"f" * 16, "float32", 4096, 259, 64, 1)


class Found:
    """A store that says what it is told to say."""

    def __init__(
        self, *blocks: tuple[int, ...], error: KVStrataError | None = None, pending: int = 0
    ) -> None:
        self.blocks = blocks
        self.pending = pending
        self.error = error
        self.asked: list[tuple[ScopeDigest, list[BlockHash]]] = []

    async def lookup(
        self,
        scope: ScopeDigest,
        hashes: list[BlockHash],
        *,
        lease_s: float,
        retention: Retention | None,
    ) -> LookupResult:
        assert lease_s > 0  # what it told must still be there when a node fetches it
        self.asked.append((scope, hashes))
        if self.error is not None:
            raise self.error
        found = tuple(FoundBlock(b, 1, "dram") for b in self.blocks)
        return LookupResult(found, False, self.pending)


def router(store: Found, **settings: Any) -> Router:
    return Router(cast(StoreClient, store), INFO, **settings)


def stored(count: int) -> tuple[StoredBlock, ...]:
    """What nodes are told of blocks that ``Found`` has."""
    return (StoredBlock(1, "dram"),) * count


@pytest.mark.parametrize("length", [1, 63])
async def test_a_prompt_without_a_full_block_asks_nobody(length: int) -> None:
    store = Found()
    assert await router(store).route(task_of(prompt_of(length))) == Route(0, 0, False)
    assert store.asked == []


@pytest.mark.parametrize(
    ("length", "cached", "needs_prefill"),
    [
        (257, 0, False),  # four blocks: 256 tokens
        (319, 0, False),
        (320, 0, True),
        (321, 0, True),
        (321, 1, False),
        (1000, 10, True),
        (1000, 11, False),
        (1000, 15, False),
    ],
)
async def test_only_long_uncached_suffixes_go_to_a_prefill_node(
    length: int, cached: int, needs_prefill: bool
) -> None:
    route = await router(Found(*[(BASE, MID)] * cached)).route(task_of(prompt_of(length)))
    assert route == Route(cached, length // 64, needs_prefill, stored=stored(cached))


@pytest.mark.parametrize(
    ("cached", "pending", "needs_prefill"), [(0, 15, False), (5, 6, False), (5, 5, True)]
)
async def test_what_is_being_made_for_another_request_is_not_prefilled_again(
    cached: int, pending: int, needs_prefill: bool
) -> None:
    store = Found(*[(BASE, MID)] * cached, pending=pending)
    route = await router(store).route(task_of(prompt_of(1000)))
    assert route == Route(cached, 15, needs_prefill, pending_blocks=pending, stored=stored(cached))


async def test_what_is_pending_after_a_block_that_lacks_a_stratum_is_no_use() -> None:
    route = await router(Found((BASE, MID), (BASE,), pending=13)).route(task_of(prompt_of(1000)))
    assert route == Route(1, 15, needs_prefill=True, stored=stored(1))


async def test_the_limit_of_direct_tokens_can_be_set() -> None:
    task = task_of(prompt_of(130))
    assert (await router(Found(), direct_tokens=64).route(task)).needs_prefill
    assert not (await router(Found(), direct_tokens=128).route(task)).needs_prefill


@pytest.mark.parametrize(
    ("method", "held", "cached"),
    [
        (BALANCED, [(BASE, MID), (BASE,), (BASE, MID)], 1),
        (Method(BALANCED.codec, BASE), [(BASE, MID), (BASE,), (BASE, MID)], 3),
        (Method(BALANCED.codec, MID), [(BASE, MID), (MID,)], 1),
        (EXACT, [(FULL,), (BASE, MID)], 1),
        (EXACT, [(BASE, FULL)], 1),
    ],
)
async def test_the_cached_run_ends_where_a_wanted_stratum_is_missing(
    method: Method, held: list[tuple[int, ...]], cached: int
) -> None:
    route = await router(Found(*held)).route(task_of(prompt_of(200), method))
    assert (route.cached_blocks, route.num_blocks) == (cached, 3)


async def test_a_coarse_read_never_goes_to_a_prefill_node() -> None:
    task = task_of(prompt_of(1000), Method(BALANCED.codec, BASE))
    assert not (await router(Found()).route(task)).needs_prefill


@pytest.mark.parametrize(
    ("error", "label"),
    [
        (UnavailableError("gone"), "store_unavailable"),
        (DeadlineError("late"), "store_timeout"),
    ],
)
async def test_a_store_that_does_not_answer_holds_nothing(error: KVStrataError, label: str) -> None:
    route = await router(Found(error=error)).route(task_of(prompt_of(1000)))
    assert route == Route(0, 15, False, label)


async def test_full_blocks_are_asked_for_once_by_their_names() -> None:
    store = Found()
    long, short = prompt_of(200), prompt_of(200)[:193]
    await router(store).route(task_of(long))
    await router(store).route(task_of(short))
    await router(store).route(task_of(long, EXACT))
    (first, second, other) = store.asked
    assert first == second
    assert len(first[1]) == 3
    assert other[0] != first[0]
