"""Copies through pinned buffers: right bytes whatever runs late, and a bound on every wait."""

import time

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.sequence import Loaded, RunningSequence
from kvstrata.engine.staging import MAX_PINNED_BYTES, Staging, StagingLateError
from kvstrata.methods.presets import Method
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.calibrating import profile_of
from tests.engine.fake_cuda import CUDA, FakeCuda, cuda
from tests.engine.test_calibrated_sequence import method_of
from tests.engine.test_paged_cache import start
from tests.engine.test_sequence import opened, prompt_of, tail

__all__ = ["cuda"]
SIZE = 64
POOL_BYTES = 1 << 21


def staging_of(timeout_s: float = 30.0, num_buffers: int = 2) -> Staging:
    return Staging(CUDA, num_buffers=num_buffers, buffer_bytes=SIZE, timeout_s=timeout_s)


def block(seed: int, num_bytes: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (num_bytes,), dtype=torch.uint8, generator=made)


@pytest.fixture(params=["late", "hasty copies"])
def gpu(request: pytest.FixtureRequest, cuda: FakeCuda) -> FakeCuda:
    """With streams for copies that run as late, or as early, as their waits allow."""
    cuda.is_hasty = request.param == "hasty copies"
    return cuda


def test_each_block_is_read_as_it_was_stored(gpu: FakeCuda) -> None:
    staging = staging_of()
    # Smaller than a buffer, as large, and several times as large; more blocks than buffers.
    blocks = [block(i, size) for i, size in enumerate((1, 40, SIZE, 3 * SIZE + 5, 63, 65, 2))]
    arena = torch.zeros(sum(map(len, blocks)), dtype=torch.uint8)
    targets = list(arena.split([len(data) for data in blocks]))
    decoded: list[torch.Tensor] = []
    for target in staging.write(targets, blocks):
        gpu.launch(lambda own=target: decoded.append(own.clone()))
    gpu.computing.synchronize()
    assert [found.tolist() for found in decoded] == [data.tolist() for data in blocks]
    total = sum(map(len, blocks))
    assert staging.counts == {"staged_blocks": len(blocks), "staged_bytes": total}


def test_what_lay_there_before_is_read_before_it_is_overwritten(gpu: FakeCuda) -> None:
    staging = staging_of()
    old, new = block(1, SIZE), block(2, SIZE)
    arena = old.clone()
    seen: list[torch.Tensor] = []
    gpu.launch(lambda: seen.append(arena.clone()))  # of a sequence that has just ended
    for _ in staging.write([arena], [new]):
        gpu.launch(lambda: seen.append(arena.clone()))
    gpu.computing.synchronize()
    assert torch.equal(seen[0], old)
    assert torch.equal(seen[1], new)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [0, 1, 16, 5 * SIZE + 3])
def test_what_a_kernel_has_just_written_comes_back(
    gpu: FakeCuda, dtype: torch.dtype, count: int
) -> None:
    staging = staging_of()
    source = torch.zeros(count, 2, dtype=dtype)
    data = torch.arange(2 * count).view(count, 2).to(dtype)
    gpu.launch(lambda: source.copy_(data))
    found = staging.read(source)
    assert (found.dtype, found.shape) == (dtype, data.shape)
    assert torch.equal(found, data)
    assert staging.counts == {"read_bytes": data.nbytes}


def test_one_row_after_another_comes_back_through_the_same_buffers(gpu: FakeCuda) -> None:
    staging = staging_of()
    for seed in range(6):
        data = block(seed, 100)
        assert torch.equal(staging.read(data.clone()), data)


def test_the_gpu_computes_while_the_next_block_is_copied(cuda: FakeCuda) -> None:
    """Nothing waits for what was launched for the block before."""
    staging = staging_of()
    copying = cuda.streams[0]
    blocks = [block(i, SIZE) for i in range(2)]
    arena = torch.zeros(2 * SIZE, dtype=torch.uint8)
    ran: list[int] = []
    writing = staging.write(list(arena.split(SIZE)), blocks)
    next(writing)
    cuda.launch(lambda: ran.append(0))
    next(writing)
    copying.synchronize()
    assert torch.equal(arena, torch.cat(blocks))
    assert not ran  # the first block is still to be decoded
    cuda.computing.synchronize()
    assert ran


def test_a_copy_that_does_not_end_is_given_up_and_counted(cuda: FakeCuda) -> None:
    staging = staging_of(timeout_s=0.05)
    copying = cuda.streams[0]
    copying.is_stuck = True
    blocks = [block(i, SIZE) for i in range(3)]
    arena = torch.zeros(3 * SIZE, dtype=torch.uint8)
    begin = time.monotonic()
    writing = staging.write(list(arena.split(SIZE)), blocks)
    with pytest.raises(StagingLateError, match=r"within 0\.05 s"):
        list(writing)
    assert 0.05 <= time.monotonic() - begin < 30
    assert staging.counts["late_blocks"] == 1
    # Whatever comes to lie there is written behind the copies that were launched.
    other = block(9, len(arena))
    cuda.launch(lambda: arena.copy_(other))
    copying.is_stuck = False
    cuda.computing.is_stuck = False
    cuda.computing.synchronize()
    copying.synchronize()
    assert torch.equal(arena, other)
    assert len(list(staging.write([arena[:SIZE]], blocks[:1]))) == 1


def test_rows_that_do_not_come_back_are_given_up_and_counted(cuda: FakeCuda) -> None:
    staging = staging_of(timeout_s=0.05)
    leaving = cuda.streams[1]
    leaving.is_stuck = True
    with pytest.raises(StagingLateError):
        staging.read(block(1, 5 * SIZE))
    assert staging.counts == {"late_reads": 1}
    with staging._out.lock, pytest.raises(StagingLateError, match="another copy"):
        staging.read(block(1, 1))
    assert staging.counts == {"late_reads": 2}
    leaving.is_stuck = False
    assert torch.equal(staging.read(block(1, 5 * SIZE)), block(1, 5 * SIZE))


def test_pinned_memory_is_bounded_and_taken_once(cuda: FakeCuda) -> None:
    staging = staging_of(num_buffers=3)
    assert cuda.pinned_bytes == 2 * 3 * SIZE
    for seed in range(9):
        staging.read(block(seed, 300))
    assert cuda.pinned_bytes == 2 * 3 * SIZE
    for num_buffers, size in ((0, SIZE), (1, 0), (2, MAX_PINNED_BYTES // 2 + 1)):
        with pytest.raises(ValueError, match="cannot be pinned"):
            Staging(CUDA, num_buffers=num_buffers, buffer_bytes=size)
    assert cuda.pinned_bytes == 2 * 3 * SIZE


def test_where_nothing_can_be_pinned_plain_memory_serves(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.can_pin = False
    staging = staging_of()
    assert torch.equal(staging.read(block(1, 100)), block(1, 100))
    assert "no memory can be pinned" in caplog.text


def immediately(cuda: FakeCuda) -> Staging:
    """Return copies that have ended once their waits allow, as torch computes at once here."""
    cuda.is_hasty = cuda.computing.is_hasty = True
    return Staging(CUDA, buffer_bytes=200, timeout_s=0.05)


@pytest.fixture
def method(models: dict[str, Model]) -> Method:
    return method_of(profile_of(models["qwen3"]), "frame")


def test_a_pools_blocks_and_rows_go_through_the_buffers(
    cuda: FakeCuda, models: dict[str, Model], method: Method
) -> None:
    """Sealed, settled, read in place, and loaded by another sequence."""
    model, prompt = models["qwen3"], prompt_of(3 * BLOCK_TOKENS + 5)
    plain, sealed = start(model, method, prompt, KVPool(model, POOL_BYTES, max_sequences=2))
    pool = KVPool(model, POOL_BYTES, max_sequences=2, staging=immediately(cuda))
    staged, again = start(model, method, prompt, pool)
    assert [b.frames for b in again] == [b.frames for b in sealed]
    assert torch.equal(tail(staged), tail(plain))
    assert pool.staging is not None
    assert pool.staging.counts["staged_blocks"] == 3
    assert pool.staging.counts["read_bytes"] > 0
    reader = RunningSequence(model, method, prompt, pool=pool)
    assert reader.load(opened(sealed, method.wanted)).num_blocks == 3
    other = RunningSequence(model, method, prompt, pool=KVPool(model, POOL_BYTES))
    other.load(opened(sealed, method.wanted))
    assert torch.equal(tail(reader), tail(other))
    assert pool.staging.counts["staged_blocks"] == 6
    pool.check_integrity()


def go_on(cuda: FakeCuda) -> None:
    """Let copies end that were only slow, and with them what was to be computed behind them."""
    cuda.streams[0].is_stuck = cuda.computing.is_stuck = False
    cuda.computing.synchronize()  # before torch, which computes at once here


def test_blocks_that_do_not_get_there_are_computed_anew(
    cuda: FakeCuda, models: dict[str, Model], method: Method
) -> None:
    model, prompt = models["qwen3"], prompt_of(3 * BLOCK_TOKENS + 5)
    _, sealed = start(model, method, prompt, KVPool(model, POOL_BYTES, max_sequences=2))
    pool = KVPool(model, POOL_BYTES, max_sequences=2, staging=immediately(cuda))
    cuda.streams[0].is_stuck = True
    sequence = RunningSequence(model, method, prompt, pool=pool)
    assert sequence.load(opened(sealed, method.wanted)) == Loaded(0, "late_copy")
    assert pool.staging is not None
    assert pool.staging.counts["late_blocks"] == 2  # all of them, then the first alone
    pool.check_integrity()
    go_on(cuda)
    for _ in sequence.compute(3 * BLOCK_TOKENS):
        pass
    blocks = sequence.seal(0, 3)
    assert [b.frames for b in blocks] == [b.frames for b in sealed]
    cuda.streams[0].is_stuck = True
    sequence.settle(blocks)  # does not get there either
    assert not sequence.committable
    go_on(cuda)
    assert sequence.cache.length == 3 * BLOCK_TOKENS
    assert torch.isfinite(tail(sequence)).all()
    pool.check_integrity()


def test_rows_that_do_not_come_back_are_not_stored(
    cuda: FakeCuda, models: dict[str, Model], method: Method
) -> None:
    model, prompt = models["qwen3"], prompt_of(BLOCK_TOKENS + 5)
    pool = KVPool(model, POOL_BYTES, max_sequences=2, staging=immediately(cuda))
    cuda.streams[1].is_stuck = True
    sequence, sealed = start(model, method, prompt, pool)
    assert not sealed
    assert not sequence.committable
    assert sequence.num_unencodable == 1
    assert pool.staging is not None
    assert pool.staging.counts == {"late_reads": 1}
    assert torch.isfinite(tail(sequence)).all()


def test_a_processor_stages_nothing() -> None:
    assert Staging.of(torch.device("cpu")) is None


def test_a_gpu_is_staged_for(cuda: FakeCuda) -> None:
    assert isinstance(Staging.of(CUDA), Staging)
    assert 0 < cuda.pinned_bytes <= 2 * MAX_PINNED_BYTES
