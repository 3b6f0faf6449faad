import asyncio
import gc
import time

import grpc
import pytest

from kvstrata.client import AsyncClient
from kvstrata.protos.errors import (
    CapacityError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    LimitError,
    UnavailableError,
    UnknownPresetError,
)


@pytest.fixture
async def async_client(gateway_here):
    async with AsyncClient(gateway_here.address, timeout_s=20) as client:
        yield client


async def freed(gateway):
    for _ in range(500):
        if gateway.freed.is_set():
            return True
        await asyncio.sleep(0.01)
    return False


async def test_generate_returns_the_completion(async_client):
    completion = await async_client.generate("one two three", max_tokens=2)
    assert (completion.text, completion.token_ids) == ("one two", (1, 2))
    assert completion.finish_reason == "length"


async def test_stream_yields_chunks_then_has_a_completion(async_client):
    stream = async_client.stream("one two")
    assert [chunk.text async for chunk in stream] == ["one", " two"]
    assert stream.completion.text == "one two"
    assert [chunk async for chunk in stream] == []


async def test_many_calls_run_at_once(async_client, gateway_here):
    gateway_here.delay_s = 0.1
    start_s = time.monotonic()
    done = await asyncio.gather(*(async_client.generate(f"w{i}") for i in range(20)))
    assert [completion.text for completion in done] == [f"w{i}" for i in range(20)]
    assert time.monotonic() - start_s < 1.5


@pytest.mark.parametrize("way", ["with", "aclose", "drop", "task", "timeout", "client", "other"])
async def test_leaving_a_stream_early_frees_the_server(async_client, gateway_here, way):
    gateway_here.delay_s = 60
    if way == "with":
        async with async_client.stream("one two") as stream:
            await anext(stream)
    elif way == "aclose":
        stream = async_client.stream("one two")
        await anext(stream)
        await stream.aclose()
        assert [chunk async for chunk in stream] == []
    elif way == "drop":
        async for _ in async_client.stream("one two"):
            break
        gc.collect()
    elif way == "task":
        task = asyncio.create_task(async_client.generate("one two"))
        while not gateway_here.started.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await async_client.generate("one two")
    elif way == "client":
        stream = async_client.stream("one two")
        await anext(stream)
        await async_client.aclose()
        with pytest.raises(UnavailableError, match="cancelled"):
            await anext(stream)
    else:
        stream = async_client.stream("one two")
        await anext(stream)
        reader = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0.05)
        await stream.aclose()
        assert await reader is None
    assert await freed(gateway_here)


async def test_the_deadline_fires(async_client, gateway_here):
    gateway_here.delay_s = 60
    with pytest.raises(DeadlineError):
        await async_client.generate("one two", timeout_s=2)
    with pytest.raises(DeadlineError):
        await async_client.model(timeout_s=0.3)
    assert await freed(gateway_here)


async def test_a_refused_connection_names_address_and_remedy(no_server):
    async with AsyncClient(no_server) as client:
        with pytest.raises(UnavailableError, match="check the address") as caught:
            await client.generate("hi")
    assert no_server in caught.value.message


async def test_the_servers_errors_arrive_as_their_classes(async_client, gateway_here):
    with pytest.raises(UnknownPresetError):
        await async_client.generate("a", preset="tiny")
    gateway_here.error, gateway_here.error_after = CapacityError("full", "wait", retry_s="1"), 1
    with pytest.raises(CapacityError) as caught:
        await async_client.generate("one two")
    assert caught.value.metadata == {"retry_s": "1"}
    with pytest.raises(CapacityError):
        await async_client.model()


async def test_a_cancelling_server_does_not_cancel_the_task(async_client, gateway_here):
    gateway_here.status, gateway_here.error_after = (grpc.StatusCode.CANCELLED, "because"), 1
    with pytest.raises(UnavailableError, match="cancelled"):
        await async_client.generate("one two")


async def test_a_stream_without_finish_reason_is_an_error(async_client, gateway_here):
    gateway_here.without_end = True
    with pytest.raises(InternalError, match="without a finish reason"):
        await async_client.generate("one two")


async def test_bad_input_sends_nothing(async_client, gateway_here):
    with pytest.raises(InvalidRequestError):
        async_client.stream("")
    with pytest.raises(LimitError):
        await async_client.generate("a", timeout_s=float("inf"))
    assert gateway_here.requests == []


async def test_model_tells_its_limits(async_client):
    assert (await async_client.model()).vocab_size == 49152


async def test_a_closed_client_says_so(gateway_here):
    client = AsyncClient(gateway_here.address)
    await client.generate("a")
    await client.aclose()
    await client.aclose()
    assert "closed" in repr(client)
    with pytest.raises(InvalidRequestError, match="closed"):
        await client.generate("a")


async def test_an_unclosed_client_warns(gateway_here):
    client = AsyncClient(gateway_here.address)
    await client.model()
    with pytest.warns(ResourceWarning, match="unclosed <AsyncClient"):
        del client


def test_a_client_may_be_made_outside_a_loop():
    AsyncClient("127.0.0.1:1")


def test_a_client_belongs_to_one_loop(gateway):
    client = AsyncClient(gateway.address)
    assert asyncio.run(client.generate("a")).text == "a"

    async def elsewhere():
        with pytest.raises(InvalidRequestError, match="another event loop"):
            client.stream("a")
        await client.aclose()

    asyncio.run(elsewhere())
