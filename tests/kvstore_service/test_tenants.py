"""Who is let in as whom, and that nobody reaches another tenant's blocks by any call."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.namespace import Namespace
from kvstrata.kvstore_service.retention_table import RetentionTable
from kvstrata.kvstore_service.server import start_store
from kvstrata.kvstore_service.tenants import Tenants, read_tenants
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.protos import admin_pb2, frame_pb2, kvstore_pb2, retention_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.credentials import ClientCredentials
from kvstrata.protos.errors import (
    ConfigurationError,
    KVStrataError,
    PermissionDeniedError,
    UnauthenticatedError,
    from_rpc_error,
)
from kvstrata.protos.frame import Frame, draft_header, encode_frame, under_scope
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.retention import HIGH, Retention
from kvstrata.protos.service import call_metadata, open_channel
from tests.kvstore_service.tenancy import credentials, tenants_file, token

BASE, MID = 1, 2
EVERY_RPC = [
    f"{service.name}.{method.name}"
    for service in (
        kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"],
        admin_pb2.DESCRIPTOR.services_by_name["Admin"],
    )
    for method in service.methods
]


@pytest.fixture
def three(tmp_path: Path) -> str:
    """A file of two tenants and an operator."""
    return tenants_file(tmp_path, alice="", bob="", ops="admin = true")


@pytest.fixture
async def store(three: str) -> AsyncIterator[LocalStore]:
    async with LocalStore(StoreConfig(tenants=three)) as made:
        yield made


@dataclass(frozen=True)
class Scene:
    """Alice's pinned block in a store, and Bob, who knows all about it but her token."""

    store: LocalStore
    key: BlockKey
    frames: dict[int, bytes]
    kvstore: Any
    admin: Any

    @property
    def stored(self) -> BlockKey:
        return Namespace("alice").keys([self.key])[0]

    @property
    def message(self) -> kvstore_pb2.BlockKey:
        return kvstore_pb2.BlockKey(scope=self.key.scope, block_hash=self.key.block_hash)

    @property
    def stored_message(self) -> kvstore_pb2.BlockKey:
        return kvstore_pb2.BlockKey(scope=self.stored.scope, block_hash=self.stored.block_hash)

    async def call(self, method: Any, request: Any, name: str = "bob") -> Any:
        try:
            reply = method(request, metadata=call_metadata(credentials(name)), timeout=10)
            return [r async for r in reply] if hasattr(reply, "__aiter__") else await reply
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def alices_frame(self) -> bytes:
        async with StoreClient(self.store.address, credentials=credentials("alice")) as alice:
            pieces = alice.get(self.key.scope, [self.key.block_hash], [BASE])
            (got,) = [piece async for piece in pieces]
            return bytes(got.frame.payload) if got.frame else b""

    @property
    def is_pinned(self) -> bool:
        return self.store.running.store.pins.holds(
            self.stored
        ) or self.store.running.store.pins.holds(self.key)


@pytest.fixture
async def scene(store: LocalStore, scope: ScopeDigest) -> AsyncIterator[Scene]:
    key, frames = sample_block(scope)
    async with open_channel(store.address) as channel:
        kvstore: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
        admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        yield Scene(store, key, frames, kvstore, admin)


async def lookup(scene: Scene) -> bool:
    request = kvstore_pb2.LookupRequest(scope=scene.key.scope, block_hashes=scene.key.block_hash)
    return bool((await scene.call(scene.kvstore.Lookup, request)).strata)


async def get(scene: Scene) -> bool:
    for wait_ms in (0, 50):
        request = kvstore_pb2.GetRequest(
            scope=scene.key.scope,
            block_hashes=scene.key.block_hash,
            strata=[frame_pb2.STRATUM_BASE],
            wait_ms=wait_ms,
        )
        replies = await scene.call(scene.kvstore.Get, request)
        if any(reply.data for reply in replies):
            return True
    return False


async def put(scene: Scene) -> bool:
    """Another writing, with more strata, would replace the block."""
    block = sample_block(scene.key.scope, strata={BASE: 4000, MID: 4000}, seed=7)
    async with StoreClient(scene.store.address, credentials=credentials("bob")) as bob:
        (outcome,) = await bob.put([block])
    assert outcome.key == scene.key
    return await scene.alices_frame() != scene.frames[BASE]


async def write(scene: Scene) -> bool:
    """As ``put``, segment by segment."""
    key, frames = sample_block(scene.key.scope, strata={BASE: 4000, MID: 4000}, seed=7)
    draft = draft_header(Frame.open(frames[BASE]).header)
    async with (
        StoreClient(scene.store.address, credentials=credentials("bob")) as bob,
        bob.write(timeout_s=10) as writer,
    ):
        (opened,) = await writer.open([draft], {BASE: 9000, MID: 9000})
        assert (opened.key, opened.outcome) == (scene.key, "open")
        await writer.finish({key: frames})
    return await scene.alices_frame() != scene.frames[BASE]


async def attach(scene: Scene) -> bool:
    async with (
        StoreClient(scene.store.address, credentials=credentials("alice")) as alice,
        alice.write(timeout_s=10) as writer,
    ):
        unfinished, frames = sample_block(scene.key.scope, 1)
        await writer.open([draft_header(Frame.open(frames[BASE]).header)], {BASE: 9000})
        await writer.send([(unfinished, BASE, 0, b"only begun")])
        for silence_ms in (0, 50):
            request = kvstore_pb2.AttachRequest(
                scope=scene.key.scope,
                block_hashes=scene.key.block_hash + unfinished.block_hash,
                strata=[frame_pb2.STRATUM_BASE],
                silence_ms=silence_ms,
            )
            replies = await scene.call(scene.kvstore.Attach, request)
            if any(reply.segments or reply.opened for reply in replies):
                return True
    return False


async def pin(scene: Scene) -> bool:
    request = kvstore_pb2.PinRequest(keys=[scene.message], ttl_ms=60_000)
    reply = await scene.call(scene.kvstore.Pin, request)
    return not reply.missing


async def unpin(scene: Scene) -> bool:
    await scene.call(scene.kvstore.Unpin, kvstore_pb2.UnpinRequest(keys=[scene.message]))
    return not scene.is_pinned


async def delete(scene: Scene) -> bool:
    request = kvstore_pb2.DeleteRequest(keys=[scene.message])
    reply = await scene.call(scene.kvstore.Delete, request)
    return reply.deleted > 0 or not await scene.alices_frame()


async def release(scene: Scene) -> bool:
    request = retention_pb2.ReleaseRequest(session="talk")
    reply = await scene.call(scene.kvstore.Release, request)
    standing = scene.store.running.store.retention.standing(scene.stored)
    return reply.blocks > 0 or standing is None or standing.priority != HIGH


def by_admin(request: Callable[[Scene], Any], name: str) -> Callable[[Scene], Awaitable[bool]]:
    async def attack(scene: Scene) -> bool:
        try:
            await scene.call(getattr(scene.admin, name), request(scene))
        except PermissionDeniedError:
            return False
        return True

    return attack


async def retrieve(scene: Scene) -> bool:
    """By name, and by asking for all of her scope."""
    query = kvstore_pb2.RetrieveQuery(layer=0, vector=bytes(4 * 8))
    request = kvstore_pb2.RetrieveRequest(scope=scene.key.scope, queries=[query], sink_blocks=9)
    whole = await scene.call(scene.kvstore.Retrieve, request)
    request.block_hashes = scene.key.block_hash
    named = await scene.call(scene.kvstore.Retrieve, request)
    return bool(whole.block_hashes or whole.selections[0].ids or named.selections[0].ids)


ATTACKS: dict[str, Callable[[Scene], Awaitable[bool]]] = {
    "KVStore.Lookup": lookup,
    "KVStore.Get": get,
    "KVStore.Put": put,
    "KVStore.Write": write,
    "KVStore.Attach": attach,
    "KVStore.Pin": pin,
    "KVStore.Unpin": unpin,
    "KVStore.Delete": delete,
    "KVStore.Retrieve": retrieve,
    "KVStore.Release": release,
    "Admin.Stats": by_admin(lambda _: admin_pb2.StatsRequest(), "Stats"),
    "Admin.ListBlocks": by_admin(lambda _: admin_pb2.ListBlocksRequest(), "ListBlocks"),
    "Admin.Inspect": by_admin(
        lambda scene: admin_pb2.InspectRequest(key=scene.stored_message), "Inspect"
    ),
    "Admin.Evict": by_admin(
        lambda scene: admin_pb2.EvictRequest(keys=[scene.stored_message]), "Evict"
    ),
    "Admin.Drain": by_admin(lambda _: admin_pb2.DrainRequest(), "Drain"),
    "Admin.Explain": by_admin(
        lambda scene: admin_pb2.ExplainRequest(
            scope=scene.key.scope, block_hashes=scene.key.block_hash, tenant="alice"
        ),
        "Explain",
    ),
    "Admin.Pin": by_admin(
        lambda scene: kvstore_pb2.PinRequest(keys=[scene.stored_message], ttl_ms=1000), "Pin"
    ),
    "Admin.Unpin": by_admin(
        lambda scene: kvstore_pb2.UnpinRequest(keys=[scene.stored_message]), "Unpin"
    ),
    "Admin.Move": by_admin(
        lambda scene: admin_pb2.MoveRequest(keys=[scene.stored_message], target="dram"), "Move"
    ),
    "Admin.Verify": by_admin(lambda _: admin_pb2.VerifyRequest(repair=True), "Verify"),
    "Admin.Quota": by_admin(
        lambda _: admin_pb2.QuotaRequest(tenant="alice", requests_per_s=0.001), "Quota"
    ),
}


async def prepare(scene: Scene) -> None:
    async with StoreClient(scene.store.address, credentials=credentials("alice")) as alice:
        hint = Retention(HIGH, session="talk")
        (outcome,) = await alice.put([(scene.key, scene.frames)], retention=hint)
        assert (outcome.outcome, outcome.key) == ("committed", scene.key)
        assert await alice.pin([scene.key], 60) == []
    assert await scene.alices_frame() == scene.frames[BASE]


def test_every_call_is_attacked() -> None:
    assert sorted(ATTACKS) == sorted(EVERY_RPC)


@pytest.mark.parametrize("rpc", EVERY_RPC)
async def test_no_call_reaches_another_tenants_block(scene: Scene, rpc: str) -> None:
    await prepare(scene)
    assert not await ATTACKS[rpc](scene)
    assert await scene.alices_frame() == scene.frames[BASE]
    assert scene.is_pinned


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the checks away, before the store starts."""
    monkeypatch.setattr(Namespace, "scope", lambda self, scope: scope)
    monkeypatch.setattr(Namespace, "keys", lambda self, keys: list(keys))
    monkeypatch.setattr(Tenants, "authorize", lambda self, method, metadata: "bob")
    release = RetentionTable.release
    anybodys = lambda table, tenant, *name: release(table, "alice", *name)  # noqa: E731
    monkeypatch.setattr(RetentionTable, "release", anybodys)


@pytest.mark.parametrize("rpc", EVERY_RPC)
async def test_without_the_checks_each_attack_would_succeed(
    unchecked: None, scene: Scene, rpc: str
) -> None:
    await prepare(scene)
    assert await ATTACKS[rpc](scene)


@pytest.mark.parametrize("rpc", EVERY_RPC)
async def test_no_call_is_answered_without_a_known_token(scene: Scene, rpc: str) -> None:
    service, _, name = rpc.partition(".")
    method = getattr(scene.kvstore if service == "KVStore" else scene.admin, name)
    headers: list[tuple[tuple[str, str], ...]] = [
        (),
        (("authorization", ""),),
        (("authorization", token("bob")),),
        (("authorization", "Bearer "),),
        (("authorization", f"Bearer {token('mallory')}"),),
        (("authorization", f"Basic {token('bob')}"),),
        (("authorization", f"Bearer {token('bob')}"),) * 2,
        (("tenant", "bob"), ("kvstrata-tenant", "bob")),
    ]
    for header in headers:
        request = iter(()) if name in ("Put", "Write") else _empty(rpc)
        call = method(request, metadata=header, timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            _ = [r async for r in call] if hasattr(call, "__aiter__") else await call
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, header
        error = from_rpc_error(caught.value)
        assert isinstance(error, UnauthenticatedError)
        assert error.remedy
        assert "token-of" not in f"{error} {error.metadata}"


def _empty(rpc: str) -> Any:
    name = f"{rpc.partition('.')[2]}Request"
    known = (admin_pb2, kvstore_pb2, retention_pb2)
    return next(getattr(module, name)() for module in known if hasattr(module, name))


async def test_the_operator_sees_stored_keys_and_may_act_on_them(scene: Scene) -> None:
    await prepare(scene)
    page = await scene.call(scene.admin.ListBlocks, admin_pb2.ListBlocksRequest(), "ops")
    assert [b.key for b in page.blocks] == [scene.stored_message]
    request = admin_pb2.InspectRequest(key=scene.stored_message)
    found = await scene.call(scene.admin.Inspect, request, "ops")
    assert found.headers[0].scope == scene.stored.scope
    evict = admin_pb2.EvictRequest(keys=[scene.stored_message])
    assert (await scene.call(scene.admin.Evict, evict, "ops")).skipped_pinned == 1


async def test_a_frame_of_another_scope_is_rejected(store: LocalStore, scope: ScopeDigest) -> None:
    key, frames = sample_block(scope)
    other = ScopeDigest(b"o" * 16)
    moved = {BASE: under_scope(frames[BASE], scope, other)}
    damaged = {BASE: frames[BASE][:-1] + b"?"}
    async with StoreClient(store.address, credentials=credentials("bob")) as bob:
        for wrong in (moved, damaged, {BASE: b"no frame at all, but long enough to be read"}):
            (outcome,) = await bob.put([(key, wrong)])
            assert outcome.outcome == "rejected"
        assert not (await bob.lookup(scope, [key.block_hash])).blocks


async def test_a_range_of_layers_comes_back_as_it_was_put(
    store: LocalStore, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 2_400_000}, num_layers=8)
    async with StoreClient(store.address, credentials=credentials("bob")) as bob:
        await bob.put([(key, frames)])
        pieces = bob.get(scope, [key.block_hash], [BASE], layers=(2, 4))
        (got,) = [piece async for piece in pieces]
        assert got.frame is not None
        want = Frame.open(frames[BASE])
        assert got.frame.header == want.header
        assert got.frame.segment(3) == want.segment(3)


def test_only_a_frame_in_our_own_form_moves_to_another_scope(scope: ScopeDigest) -> None:
    key, frames = sample_block(scope)
    there = under_scope(frames[BASE], scope, b"x" * 16)
    assert Frame.open(there).header.scope == b"x" * 16
    Frame.open(there).verify()
    assert under_scope(there, b"x" * 16, scope) == frames[BASE]
    header = Frame.open(frames[BASE]).header
    assert header.scope == key.scope
    header.scope = b"x" * 8
    short = encode_frame(header, Frame.open(frames[BASE]).segments())
    with pytest.raises(KVStrataError, match="canonical"):
        under_scope(short, b"x" * 8, scope)


async def test_store_processes_with_one_redis_agree_on_tenants(
    three: str, redis: RedisServer, scope: ScopeDigest
) -> None:
    config = StoreConfig(tenants=three, redis_url=redis.url)
    key, frames = sample_block(scope)
    async with LocalStore(config) as first, LocalStore(config) as second:
        async with StoreClient(first.address, credentials=credentials("alice")) as alice:
            await alice.put([(key, frames)])
        for name, expected in (("alice", 1), ("bob", 0)):
            async with StoreClient(second.address, credentials=credentials(name)) as client:
                assert len((await client.lookup(scope, [key.block_hash])).blocks) == expected


async def test_admin_has_a_port_of_its_own_where_told(tmp_path: Path) -> None:
    path = tenants_file(tmp_path, bob="", ops="admin = true")
    running = await start_store(StoreConfig(tenants=path, admin_listen="127.0.0.1:0"))
    try:
        assert running.admin_address != running.address
        for address, name, code in (
            (running.address, "ops", "UNIMPLEMENTED"),
            (running.admin_address, "bob", "PERMISSION_DENIED"),
            (running.admin_address, "ops", "OK"),
        ):
            async with open_channel(address) as channel:
                admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
                metadata = call_metadata(credentials(name))
                call = admin.Stats(admin_pb2.StatsRequest(), metadata=metadata)
                assert (await call.code()).name == code
        async with open_channel(running.admin_address) as channel:
            kvstore: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
            call = kvstore.Lookup(
                kvstore_pb2.LookupRequest(), metadata=call_metadata(credentials("bob"))
            )
            assert (await call.code()).name == "UNIMPLEMENTED"
    finally:
        await running.stop(0)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "tables"),
        ("x = 1", "tables"),
        ("[tenants]", "tables"),
        ("[tenants.a]\ntoken_sha256 = 's3cret", "no TOML"),
        ("[tenants.a]\ntoken_sha256 = 's3cret'", "token_sha256"),
        (f"[tenants.a]\ntoken_sha256 = '{'0' * 64}'\nsalt_seed = 's3cret'", "salt_seed"),
        ("[tenants.A]\n", "not a name"),
        ("[tenants.a]\ntoken = 's3cret'", "unknown fields ['token']"),
        ("[tenants]\na = 1", "unknown fields"),
    ],
)
def test_a_bad_file_is_told_without_its_secrets(lines: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text(lines)
    with pytest.raises(ConfigurationError) as caught:
        read_tenants(str(path))
    assert told in caught.value.message
    assert caught.value.remedy
    assert "s3cret" not in f"{caught.value!r} {caught.value}"


@pytest.mark.parametrize("line", ["quota_bytes = -1", "admin = 1", "requests_per_s = nan",
                                  "in_flight_bytes = 1.5", "quota_bytes = true"])  # fmt: skip
def test_a_bad_limit_is_told(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=line.split()[0]):
        read_tenants(tenants_file(tmp_path, bob=line))


def test_tenants_that_share_a_secret_are_refused(tmp_path: Path) -> None:
    path = Path(tenants_file(tmp_path, bob=""))
    path.write_text(path.read_text() + path.read_text().replace("bob]", "eve]"))
    with pytest.raises(ConfigurationError, match="'bob' and 'eve' have the same token"):
        read_tenants(str(path))


def test_no_secret_is_in_a_repr_and_salts_differ(three: str) -> None:
    tenants = read_tenants(three)
    assert "secret seed" not in repr(tenants)
    assert repr(tenants[0].token_hash) not in repr(tenants)
    salts = {tenant.scope_salt(base) for tenant in tenants for base in (b"", b"deployment")}
    assert len(salts) == 6


async def test_a_hangup_reads_the_file_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    path = tenants_file(tmp_path, bob="")
    command = [sys.executable, "-P", "-m", "kvstrata.kvstore_service", "--tenants", path]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stderr is not None
    address = json.loads(process.stdout.readline())["address"]

    async def knows(name: str) -> bool:
        async with StoreClient(address, credentials=credentials(name)) as client:
            try:
                await client.lookup(scope, [])
            except UnauthenticatedError:
                return False
            return True

    def hang_up() -> str:
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        while "tenants" not in (line := process.stderr.readline()):
            assert line
        return line

    assert [await knows("bob"), await knows("eve")] == [True, False]
    tenants_file(tmp_path, eve="")
    assert "tenants read again count=1" in hang_up()
    assert [await knows("bob"), await knows("eve")] == [False, True]
    Path(path).write_text("nonsense")
    assert "the old ones stay" in hang_up()
    assert await knows("eve")
    process.terminate()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "token-of" not in err


def test_credentials_of_nobody_need_no_file() -> None:
    assert Tenants().identify(()).name == "default"
    assert Tenants().identify(ClientCredentials(token="any").metadata).name == "default"
