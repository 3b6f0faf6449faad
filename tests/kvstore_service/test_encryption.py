"""Encryption at rest: what lies outside the process is sealed, and opens for its own key alone."""

import contextlib
import hmac
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.key_ring import KeyRing, read_keys
from kvstrata.kvstore_service.namespace import Namespace, ScopeOwners
from kvstrata.kvstore_service.redis_tier import value_key
from kvstrata.kvstore_service.seal import NoKeyError, TamperedError, seal, unseal
from kvstrata.kvstore_service.sealed_tier import SealedTier
from kvstrata.kvstore_service.tenants import DEFAULT, Tenant
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.kvstore_service.tier import SEAL_BYTES, SEALED_MAGIC
from kvstrata.protos import admin_pb2, kvstore_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import CapacityError, ConfigurationError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.service import call_metadata, open_channel
from tests.kvstore_service.tenancy import credentials, tenants_file

BASE, MID = 1, 2
FIRST, SECOND, THIRD = ("11" * 32, "22" * 32, "33" * 32)
PLACE = BlockKey(ScopeDigest(b"s" * 16), BlockHash(b"h" * 16))
FRAME = b"KVSTRATA and then the values" * 9


def key_file(path: Path, current: str, **keys: str) -> str:
    path.write_text(
        f'current = "{current}"\n[keys]\n' + "".join(f'{k} = "{v}"\n' for k, v in keys.items())
    )
    return str(path)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    return key_file(tmp_path / "keys.toml", "one", one=FIRST)


def ring(path: str, *tenants: str) -> KeyRing:
    return KeyRing([Tenant(name) for name in tenants] or [DEFAULT], path)


# The seal


def test_a_seal_opens_in_its_own_place_alone(keys: str) -> None:
    mine = ring(keys)
    session = mine.sealing("default")
    assert session is not None
    value = seal(session, PLACE, BASE, FRAME)
    assert len(value) == len(FRAME) + SEAL_BYTES
    assert value.startswith(SEALED_MAGIC)
    assert FRAME[:20] not in value
    assert unseal(mine, PLACE, BASE, value) == ("default", FRAME)
    assert unseal(ring(keys), PLACE, BASE, value) == ("default", FRAME)  # another process
    other_hash = BlockKey(PLACE.scope, BlockHash(b"x" * 16))
    other_scope = BlockKey(ScopeDigest(b"x" * 16), PLACE.block_hash)
    for place, stratum in ((other_hash, BASE), (other_scope, BASE), (PLACE, MID)):
        with pytest.raises(TamperedError):
            unseal(mine, place, stratum, value)


def test_no_changed_or_cut_value_opens(keys: str) -> None:
    mine = ring(keys)
    session = mine.sealing("default")
    assert session is not None
    value = seal(session, PLACE, BASE, FRAME)
    for position in range(len(SEALED_MAGIC), len(value)):
        changed = bytearray(value)
        changed[position] ^= 1
        with pytest.raises((TamperedError, NoKeyError)):
            unseal(mine, PLACE, BASE, bytes(changed))
    for length in (8, 47, SEAL_BYTES - 1, SEAL_BYTES, len(value) - 1):
        with pytest.raises(TamperedError):
            unseal(mine, PLACE, BASE, value[:length])
    with pytest.raises(TamperedError):
        unseal(mine, PLACE, BASE, value + b"x")


def test_no_nonce_comes_twice_under_one_key(keys: str) -> None:
    seen = set()
    for mine in (ring(keys), ring(keys)):  # two processes
        for _ in range(500):
            session = mine.sealing("default")
            assert session is not None
            seen.add(seal(session, PLACE, BASE, b"same")[16:44])
    assert len(seen) == 1000


def test_a_tenants_key_is_the_hkdf_that_the_format_says(keys: str) -> None:
    session = ring(keys, "alice").sealing("alice")
    assert session is not None

    def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
        extracted = hmac.digest(salt or bytes(32), secret, "sha256")
        return hmac.digest(extracted, info + b"\x01", "sha256")

    master, info = bytes.fromhex(FIRST), b"\0alice\0one"
    assert session.key.secret == hkdf(master, b"", b"kvstrata/at-rest-key/1" + info)
    assert session.key.key_id == hkdf(master, b"", b"kvstrata/at-rest-key-id/1" + info)[:8]


def test_no_key_is_in_a_repr_and_tenants_keys_differ(keys: str) -> None:
    mine = ring(keys, "alice", "bob")
    sessions = [mine.sealing("alice"), mine.sealing("bob")]
    assert len({s.key.secret for s in sessions if s}) == 2
    for session in sessions:
        assert session is not None
        value = seal(session, PLACE, BASE, FRAME)
        with pytest.raises(NoKeyError):
            unseal(ring(keys, "eve"), PLACE, BASE, value)
        assert repr(session.key.secret)[2:-1] not in repr(session)
    assert FIRST not in repr(read_keys(keys))


def test_keys_rotate_and_retire(tmp_path: Path, keys: str) -> None:
    old = ring(keys).sealing("default")
    assert old is not None
    value = seal(old, PLACE, BASE, FRAME)
    both = ring(key_file(tmp_path / "k2", "two", one=FIRST, two=SECOND))
    new = both.sealing("default")
    assert new is not None
    assert new.key.key_id != old.key.key_id
    assert unseal(both, PLACE, BASE, value) == ("default", FRAME)
    for wrong in (
        ring(key_file(tmp_path / "k3", "two", two=SECOND)),
        ring(key_file(tmp_path / "k4", "one", one=THIRD)),  # the name, but other bytes
    ):
        with pytest.raises(NoKeyError):
            unseal(wrong, PLACE, BASE, value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "must have"),
        ("s3cret", "no TOML"),
        ("[keys]\na = 's3cret'\n", "must have"),
        ("current = 'a'\n[keys]\na = 's3cret'\n", "key a is not 64 hex digits"),
        (f"current = 's3cret'\n[keys]\na = '{FIRST}'\n", "no key of the name"),
        (f"current = 'a'\nx = 's3cret'\n[keys]\na = '{FIRST}'\n", "must have"),
        (f"current = 'a'\n[keys]\n'a b' = '{FIRST}'\n", "a key's name"),
        ("current = 'a'\n[keys]\na = 1\n", "key a is not 64 hex digits"),
    ],
)
def test_a_bad_key_file_is_told_without_its_secrets(
    tmp_path: Path, content: str, told: str
) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        read_keys(str(tmp_path / "keys"))
    assert told in caught.value.message
    assert caught.value.remedy
    assert "s3cret" not in f"{caught.value!r} {caught.value}"


def test_keys_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTRATA_KEYS", f"b:{SECOND}, a:{FIRST}")
    session = ring("").sealing("default")
    monkeypatch.setenv("KVSTRATA_KEYS", f"b:{SECOND}")
    again = ring("").sealing("default")
    assert session is not None
    assert again is not None
    assert session.key == again.key
    monkeypatch.setenv("KVSTRATA_KEYS", "b:s3cret")
    with pytest.raises(ConfigurationError, match="KVSTRATA_KEYS: key b") as caught:
        ring("")
    assert "s3cret" not in str(caught.value)


# The tier


async def test_a_block_of_nobody_is_written_nowhere(keys: str) -> None:
    inner = DramTier(1 << 20)
    tier = SealedTier(inner, ring(keys), ScopeOwners(), Counters())
    with pytest.raises(CapacityError, match="tenant is unknown"):
        await tier.put(PLACE, {BASE: FRAME})
    assert await inner.keys(9) == []


async def test_what_another_tenants_key_sealed_is_refused_in_this_place(keys: str) -> None:
    inner, owners, counters = DramTier(1 << 20), ScopeOwners(), Counters()
    mine = ring(keys, "alice", "bob")
    tier = SealedTier(inner, mine, owners, counters)
    session = mine.sealing("bob")
    assert session is not None
    await inner.put(PLACE, {BASE: seal(session, PLACE, BASE, FRAME)})
    owners.note(PLACE.scope, "alice")
    assert await tier.get(PLACE, [BASE]) == {BASE: SEALED_MAGIC}
    assert counters.get(names.SEALS, outcome="foreign") == 1
    assert await tier.contains([PLACE]) == [None]
    owners.note(PLACE.scope, "bob")
    tier.forget_refusals()
    assert await tier.get(PLACE, [BASE]) == {BASE: FRAME}


def test_owners_are_bounded() -> None:
    owners = ScopeOwners()
    scopes = [ScopeDigest(number.to_bytes(16, "big")) for number in range(65_537)]
    for scope in scopes:
        owners.note(scope, "alice")
    assert owners.of(scopes[0]) is None
    assert owners.of(scopes[1]) == "alice"


# The store


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[LocalStore, StoreClient]]:
    settings = {"ssd_path": str(tmp_path / "ssd"), **settings}
    config = StoreConfig(dram_bytes=1 << 20, **settings)
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        yield store, client


async def read(store: LocalStore, client: StoreClient, key: BlockKey) -> list[Any]:
    """Return the strata below dram, or the reasons why they cannot be had."""
    dram = store.running.store.dram
    await dram.delete(await dram.keys(99))
    pieces = client.get(key.scope, [key.block_hash], [BASE, MID])
    return [bytes(p.frame.payload) if p.frame else p.miss async for p in pieces]


def files(tmp_path: Path, key: BlockKey) -> Iterator[Path]:
    return (tmp_path / "ssd").rglob(f"*{key.block_hash.hex()}*")


async def test_the_disk_holds_ciphertext_and_the_reader_gets_the_frames(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 4000, MID: 2000})
    async with serving(tmp_path, key_file=keys) as (store, client):
        await client.put([(key, frames)])
        assert await read(store, client, key) == [frames[BASE], frames[MID]]
        counters = store.running.store.counters
        assert counters.get(names.SEALS, outcome="sealed") == 2
        assert counters.get(names.SEALS, outcome="opened") == 2
    (file,) = files(tmp_path, key)
    content = file.read_bytes()
    assert content.count(SEALED_MAGIC) == 2
    assert b"KVSTRATA" not in content
    assert not any(frame[at : at + 16] in content for frame in frames.values() for at in (100, 900))


async def test_without_the_key_a_block_is_a_miss_that_stays_for_those_who_have_it(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 4000, MID: 2000})
    async with serving(tmp_path, key_file=keys) as (_, client):
        await client.put([(key, frames)])
    wrong = key_file(tmp_path / "wrong", "one", one=SECOND)
    for settings in ({}, {"key_file": wrong}):
        async with serving(tmp_path, **settings) as (store, client):
            assert await read(store, client, key) == ["undecryptable"] * 2
            counters = store.running.store.counters
            assert counters.get(names.MISSES, reason="undecryptable") == 2
            assert counters.get(names.CORRUPT) == 0
            reply = await verify(store)
            assert (reply.num_undecryptable, reply.num_damaged) == (2, 0)
    async with serving(tmp_path, key_file=keys) as (store, client):
        assert await read(store, client, key) == [frames[BASE], frames[MID]]


async def verify(store: LocalStore, who: Any = None) -> admin_pb2.VerifyReply:
    async with open_channel(store.address) as channel:
        admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        replies = [r async for r in admin.Verify(admin_pb2.VerifyRequest())]
        last: admin_pb2.VerifyReply = replies[-1]
        return last


async def test_a_put_heals_what_cannot_be_read_any_more(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    async with serving(tmp_path, key_file=keys) as (_, client):
        await client.put([(key, frames)])
    new = key_file(tmp_path / "new", "two", two=SECOND)
    async with serving(tmp_path, key_file=new) as (store, client):
        assert (await read(store, client, key))[0] == "undecryptable"
        assert not (await client.lookup(scope, [key.block_hash])).blocks
        (outcome,) = await client.put([(key, frames)])
        assert outcome.tiers == ("dram", "ssd")
        assert (await read(store, client, key))[0] == frames[BASE]


async def test_rotated_keys_are_read_again_on_demand(
    tmp_path: Path, keys: str, scope: ScopeDigest, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = sample_block(scope, 0), sample_block(scope, 1)
    async with serving(tmp_path, key_file=keys) as (store, client):
        await client.put([old])
        key_file(Path(keys), "two", one=FIRST, two=SECOND)
        assert store.running.reload()
        await client.put([new])
        for key, frames in (old, new):
            assert (await read(store, client, key))[0] == frames[BASE]
        ids = [next(files(tmp_path, key)).read_bytes()[8:16] for key, _ in (old, new)]
        assert ids[0] != ids[1]
        key_file(Path(keys), "two", two=SECOND)
        assert store.running.reload()
        assert (await read(store, client, old[0]))[0] == "undecryptable"
        assert (await read(store, client, new[0]))[0] == new[1][BASE]
        Path(keys).write_text("s3cret")
        assert not store.running.reload()
        assert (await read(store, client, new[0]))[0] == new[1][BASE]
        key_file(Path(keys), "two", one=FIRST, two=SECOND)
        assert store.running.reload()
        assert (await read(store, client, old[0]))[0] == old[1][BASE]
    assert "the old ones stay" in caplog.text
    assert "s3cret" not in caplog.text


async def test_swapped_or_damaged_values_are_never_served(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    a, b, c = (sample_block(scope, n) for n in range(3))
    async with serving(tmp_path, key_file=keys) as (store, client):
        await client.put([a, b, c])
        first, second, third = (next(files(tmp_path, key)) for key, _ in (a, b, c))
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two[: len(one)].ljust(len(one)))
        second.write_bytes(one[: len(two)].ljust(len(two)))
        damaged = bytearray(third.read_bytes())
        damaged[200] ^= 1
        third.write_bytes(damaged)
        for key, _ in (a, b, c):
            assert (await read(store, client, key))[0] == "corrupt"
        assert store.running.store.counters.get(names.SEALS, outcome="damaged") == 3
        await client.put([a])
        assert (await read(store, client, a[0]))[0] == a[1][BASE]


async def test_plaintext_is_not_taken_from_a_tenant_who_has_a_key(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    async with serving(tmp_path) as (_, client):
        await client.put([(key, frames)])
    async with serving(tmp_path, key_file=keys) as (store, client):
        assert (await read(store, client, key))[0] == "undecryptable"
        assert store.running.store.counters.get(names.SEALS, outcome="plaintext") == 1
        await client.put([(key, frames)])
        assert (await read(store, client, key))[0] == frames[BASE]
    assert next(files(tmp_path, key)).read_bytes().startswith(SEALED_MAGIC)


async def test_each_tenant_has_its_own_key_or_none(tmp_path: Path, scope: ScopeDigest) -> None:
    shared = key_file(tmp_path / "shared", "one", one=FIRST)
    own = key_file(tmp_path / "own", "mine", mine=SECOND)
    path = tenants_file(
        tmp_path, alice="", bob=f'key_file = "{own}"', carol="encrypt = false", ops="admin = true"
    )
    key, frames = sample_block(scope)

    async def look(**settings: str) -> dict[str, Any]:
        async with serving(tmp_path, tenants=path, **settings) as (store, _):
            found = {}
            for name in ("alice", "bob", "carol"):
                async with StoreClient(store.address, credentials=credentials(name)) as client:
                    found[name] = (await read(store, client, key))[0]
            return found

    async with serving(tmp_path, tenants=path, key_file=shared) as (store, _):
        for name in ("alice", "bob", "carol"):
            async with StoreClient(store.address, credentials=credentials(name)) as client:
                await client.put([(key, frames)])
        stored = {
            name: next(
                (tmp_path / "ssd").rglob(f"*{Namespace(name).keys([key])[0].encode()}*")
            ).read_bytes()
            for name in ("alice", "bob", "carol")
        }
    assert [content.startswith(SEALED_MAGIC) for content in stored.values()] == [True, True, False]
    assert stored["alice"][8:16] != stored["bob"][8:16]
    assert await look(key_file=shared) == dict.fromkeys(("alice", "bob", "carol"), frames[BASE])
    another = key_file(tmp_path / "another", "one", one=THIRD)
    assert await look(key_file=another) == {
        "alice": "undecryptable",
        "bob": frames[BASE],
        "carol": frames[BASE],
    }


async def test_blocks_that_are_written_later_or_moved_are_sealed_too(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    async with serving(
        tmp_path,
        key_file=keys,
        object_url=(tmp_path / "objects").as_uri(),
        object_bytes=1 << 20,
    ) as (store, client):
        await client.put([(key, frames)], durability="dram")
        assert await store.running.store.flush(30)
        message = kvstore_pb2.BlockKey(scope=key.scope, block_hash=key.block_hash)
        async with open_channel(store.address) as channel:
            admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
            for source, target in (("object", "dram"), ("ssd", "object"), ("dram", "ssd")):
                request = admin_pb2.MoveRequest(keys=[message], source=source, target=target)
                assert (await admin.Move(request, metadata=call_metadata(credentials("x")))).moved
        for path in (*(tmp_path / "ssd").rglob("*"), *(tmp_path / "objects").rglob("*")):
            if path.is_file() and key.block_hash.hex() in str(path):
                assert path.read_bytes().startswith(SEALED_MAGIC)
        assert (await read(store, client, key))[0] == frames[BASE]


async def test_redis_holds_ciphertext_and_processes_with_the_key_share_it(
    keys: str, redis: RedisServer, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    config = StoreConfig(redis_url=redis.url, key_file=keys)
    async with LocalStore(config) as first, LocalStore(config) as second:
        async with StoreClient(first.address) as client:
            await client.put([(key, frames)])
        async with Redis.from_url(redis.url) as connection:
            value = await connection.get(value_key(key, BASE))
        assert value.startswith(SEALED_MAGIC)
        assert len(value) == len(frames[BASE]) + SEAL_BYTES
        async with StoreClient(second.address) as client:
            (got,) = [p async for p in client.get(scope, [key.block_hash], [BASE])]
            assert got.frame is not None
            assert (bytes(got.frame.payload), got.tier) == (frames[BASE], "redis")


async def test_a_client_cannot_put_a_sealed_value(
    tmp_path: Path, keys: str, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    async with serving(tmp_path, key_file=keys) as (_, client):
        (outcome,) = await client.put([(key, {BASE: SEALED_MAGIC + frames[BASE][8:]})])
        assert outcome.outcome == "rejected"


async def test_a_store_with_a_bad_key_file_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the key file"):
        async with serving(tmp_path, key_file=str(tmp_path / "absent")):
            pass
