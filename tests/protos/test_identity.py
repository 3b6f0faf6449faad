"""Names of blocks: the same everywhere and for ever, different for whatever is different."""

import dataclasses
import hashlib
import os
import struct
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.protos.identity import (
    BLOCK_TOKENS,
    BlockHash,
    BlockKey,
    CacheScope,
    ScopeDigest,
    block_hash,
    block_hashes,
    digest,
    has_images,
    image_token_ids,
    is_of_image,
    split_hashes,
)

SCOPE = CacheScope(
    model=b"0123456789abcdef",
    kv_dtype="bfloat16",
    codec="fallback/1",
    method="sink_tokens=4",
    adapter="tuned",
    salt=b"tenant",
    profile=b"profile",
)
# Computed once with hashlib. They name blocks that stores hold: a change here orphans every block.
SCOPE_HEX = "98148017c1fd477c2820e43c6c981d6a"
BLOCK_HEX = ["8af7922122aabebac7dbfb22f0c2fdd7", "d8d9fcf507e4685ba256bebb3d5a3e8a"]

RANDOMLY = settings(max_examples=60, deadline=None, derandomize=True)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=4 * BLOCK_TOKENS)

PRINT_NAMES = """
from kvstrata.protos.identity import CacheScope, block_hashes
texts = "bfloat16", "fallback/1", "sink_tokens=4", "tuned"
scope = CacheScope(b"0123456789abcdef", *texts, b"tenant", b"profile")
print(scope.digest().hex(), *(h.hex() for h in block_hashes(scope.digest(), range(130))))
"""


def _by_hand(*parts: bytes) -> bytes:
    text = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return hashlib.sha256(text).digest()[:16]


def test_scope_and_block_hashes_are_the_golden_ones_and_those_computed_by_hand() -> None:
    scope = SCOPE.digest()
    assert scope == _by_hand(
        b"kvstrata",
        b"scope",
        b"0123456789abcdef",
        b"bfloat16",
        b"fallback/1",
        b"sink_tokens=4",
        b"tuned",
        b"tenant",
        b"profile",
    )
    first = _by_hand(b"kvstrata", b"block", scope, struct.pack("<64I", *range(64)))
    second = _by_hand(b"kvstrata", b"block", first, struct.pack("<64I", *range(64, 128)))
    assert block_hashes(scope, range(130)) == [first, second]
    assert scope.hex() == SCOPE_HEX
    assert [first.hex(), second.hex()] == BLOCK_HEX


def test_other_processes_agree_whatever_their_environment() -> None:
    variables: list[dict[str, str]] = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "2", "PYTHONUTF8": "1", "KVSTRATA_SALT": "x", "HOSTNAME": "other"},
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_NAMES],
            env={**os.environ, **extra},
            stdout=subprocess.PIPE,
            text=True,
        )
        for extra in variables
    ]
    expected = [SCOPE_HEX, *BLOCK_HEX]
    assert [run.communicate(timeout=240)[0].split() for run in runs] == [expected, expected]


@pytest.mark.parametrize("field", dataclasses.fields(CacheScope), ids=lambda field: field.name)
def test_every_field_of_the_scope_changes_its_digest(
    field: "dataclasses.Field[bytes | str]",
) -> None:
    value = getattr(SCOPE, field.name)
    longer = value + b"x" if isinstance(value, bytes) else value + "x"
    for other in (longer, value[:-1], value[:0]):
        change: dict[str, Any] = {field.name: other}
        assert dataclasses.replace(SCOPE, **change).digest() != SCOPE.digest()


@RANDOMLY
@given(
    fields=st.tuples(
        st.binary(max_size=3), *[st.text("ab", max_size=2)] * 4, *[st.binary(max_size=2)] * 2
    ),
    others=st.tuples(
        st.binary(max_size=3), *[st.text("ab", max_size=2)] * 4, *[st.binary(max_size=2)] * 2
    ),
)
def test_scopes_are_equal_exactly_if_their_digests_are(
    fields: tuple[bytes, str, str, str, str, bytes, bytes],
    others: tuple[bytes, str, str, str, str, bytes, bytes],
) -> None:
    one, two = CacheScope(*fields), CacheScope(*others)
    assert (one.digest() == two.digest()) == (one == two)


def test_no_field_runs_into_the_next() -> None:
    assert digest("d", [b"ab", b"c"]) != digest("d", [b"a", b"bc"])
    assert digest("d", [b"ab", b"c"]) != digest("d", [b"abc"])
    assert digest("d", [b"a", b""]) != digest("d", [b"a"])
    assert digest("d", [b"a"]) != digest("da", [])
    moved = dataclasses.replace(SCOPE, codec="fallback/", method="1sink_tokens=4")
    assert moved.digest() != SCOPE.digest()
    swapped = dataclasses.replace(SCOPE, salt=SCOPE.profile, profile=SCOPE.salt)
    assert swapped.digest() != SCOPE.digest()


def test_a_use_under_another_domain_has_another_hash() -> None:
    assert digest("scope", [b"a"]) != digest("block", [b"a"])


@RANDOMLY
@given(tokens=TOKENS, more=TOKENS)
def test_a_prefix_has_the_hashes_of_its_full_blocks(tokens: list[int], more: list[int]) -> None:
    scope = SCOPE.digest()
    hashes = block_hashes(scope, tokens)
    assert len(hashes) == len(tokens) // BLOCK_TOKENS
    assert block_hashes(scope, tokens + more)[: len(hashes)] == hashes
    assert len(set(hashes)) == len(hashes)


@RANDOMLY
@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), min_size=192, max_size=192), at=st.integers(0, 191)
)
def test_a_changed_token_changes_its_block_and_all_that_follow(tokens: list[int], at: int) -> None:
    scope = SCOPE.digest()
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    same = [
        a == b
        for a, b in zip(block_hashes(scope, tokens), block_hashes(scope, changed), strict=True)
    ]
    assert same == [block < at // BLOCK_TOKENS for block in range(3)]


def test_equal_tokens_under_another_parent_or_scope_share_no_hash() -> None:
    tokens = list(range(BLOCK_TOKENS))
    assert block_hash(b"p" * 16, tokens) != block_hash(b"q" * 16, tokens)
    other = dataclasses.replace(SCOPE, salt=b"other tenant")
    twice = tokens * 2
    hashes = block_hashes(SCOPE.digest(), twice) + block_hashes(other.digest(), twice)
    assert len(set(hashes)) == 4


@RANDOMLY
@given(scope=st.binary(min_size=16, max_size=16), hashed=st.binary(min_size=16, max_size=16))
def test_a_block_key_survives_printing(scope: bytes, hashed: bytes) -> None:
    key = BlockKey(ScopeDigest(scope), BlockHash(hashed))
    assert key.encode() == f"{scope.hex()}.{hashed.hex()}"
    assert BlockKey.decode(key.encode()) == key
    assert hash(BlockKey.decode(key.encode())) == hash(key)


HALF = "00" * 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        HALF,
        HALF + HALF,
        f"{HALF}.{HALF[:-1]}",
        f"{HALF}.{HALF}0",
        f"{HALF}.{HALF}.",
        f"{HALF}..{HALF}",
        f"{HALF}:{HALF}",
        f" {HALF}.{HALF}",
        f"{HALF}.{HALF}\n",
        f"{HALF}.{'0g' * 16}",
        f"{HALF}.{'00 ' * 10}00",
        f"{HALF}.{' ' * 32}",
        f"{HALF}.{'０' * 32}",  # noqa: RUF001 - full-width digits are no hex digits
        "x" * 100_000,
    ],
)
def test_text_that_is_no_block_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - two wordings, both checked for length
        BlockKey.decode(text)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(("scope", "hashed"), [(b"", b"h" * 16), (b"s" * 16, b"h" * 17)])
def test_a_block_key_of_other_lengths_is_refused(scope: bytes, hashed: bytes) -> None:
    with pytest.raises(ValueError, match="two 16-byte values"):
        BlockKey(ScopeDigest(scope), BlockHash(hashed))


def test_hashes_joined_for_the_wire_split_again() -> None:
    hashes = block_hashes(SCOPE.digest(), range(200))
    assert split_hashes(b"".join(hashes)) == hashes
    assert split_hashes(b"") == []
    with pytest.raises(ValueError, match="17 in all"):
        split_hashes(bytes(17))


@RANDOMLY
@given(st.data())
def test_blocks_of_other_images_have_other_names(data: st.DataObject) -> None:
    one, two = data.draw(st.lists(st.binary(max_size=8), min_size=2, max_size=2, unique=True))
    first = data.draw(st.integers(0, 3 * BLOCK_TOKENS - 1))
    count = data.draw(st.integers(1, 3 * BLOCK_TOKENS - first))
    words = list(range(192))
    scope = SCOPE.digest()
    hashes = []
    for content in (one, one, two):
        ids = words[:first] + image_token_ids(content, count) + words[first + count :]
        assert len(ids) == 192
        hashes.append(block_hashes(scope, ids))
    assert hashes[0] == hashes[1]
    touched = first // BLOCK_TOKENS
    assert hashes[0][:touched] == hashes[2][:touched] == block_hashes(scope, words)[:touched]
    assert not set(hashes[0][touched:]) & set(hashes[2][touched:])


def test_an_images_tokens_are_those_of_no_vocabulary_and_of_no_other_place() -> None:
    ids = image_token_ids(b"content", 1000)
    assert len(set(ids)) == 1000
    assert all(is_of_image(i) and i < 2**63 for i in ids)
    assert ids[:10] == image_token_ids(b"content", 10)
    assert not is_of_image(2**32 - 1)
    assert has_images([7, *ids, 2**32 - 1])
    assert not has_images([7, 2**32 - 1])
    assert not has_images([])
