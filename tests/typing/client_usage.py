"""Uses of the public client that must type-check; never run."""

from collections.abc import Sequence
from typing import Literal, assert_type

from kvstrata.client import (
    AsyncChatSession,
    AsyncClient,
    AsyncStream,
    ChatMessage,
    ChatSession,
    Client,
    Completion,
    MethodSettings,
    Stream,
)
from kvstrata.client.results import CacheReport, Chunk, ModelInfo, Usage


def blocking(ids: Sequence[int], history: list[dict[str, str]]) -> None:
    with Client("127.0.0.1:50051", timeout_s=5, connect_timeout_s=1.5) as client:
        assert_type(client, Client)
        completion = client.generate("text", max_tokens=8, stop=["a"], seed=1)
        assert_type(completion, Completion)
        assert_type(completion.finish_reason, Literal["stop", "length"])
        assert_type(completion.token_ids, tuple[int, ...])
        assert_type(completion.usage, Usage)
        assert_type(completion.cache, CacheReport)
        assert_type(completion.cache.cached_fraction, float)
        client.generate(ids, preset="exact", timeout_s=3)
        client.generate(history, temperature=1)
        client.generate([{"role": "user", "content": "hi"}])
        client.generate([ChatMessage("user", "hi")], settings=MethodSettings("exact"))
        client.generate("text", preset=None, stop="END")
        with client.stream("text") as stream:
            assert_type(stream, Stream)
            for chunk in stream:
                assert_type(chunk, Chunk)
            assert_type(stream.completion, Completion)
        chat = client.chat(system="be kind", max_tokens=5)
        assert_type(chat, ChatSession)
        assert_type(chat.send("hi"), Completion)
        assert_type(chat.stream("hi"), Stream)
        assert_type(chat.messages, tuple[ChatMessage, ...])
        assert_type(client.model(), ModelInfo)


async def awaited(ids: range) -> None:
    async with AsyncClient("127.0.0.1:50051") as client:
        assert_type(await client.generate(ids, max_tokens=8), Completion)
        async with client.stream("text") as stream:
            assert_type(stream, AsyncStream)
            async for chunk in stream:
                assert_type(chunk, Chunk)
        chat = client.chat()
        assert_type(chat, AsyncChatSession)
        assert_type(await chat.send("hi"), Completion)
        assert_type(await client.model(), ModelInfo)


def refused(client: Client) -> None:
    client.generate(5)  # type: ignore[arg-type]
    client.generate("text", max_token=5)  # type: ignore[call-arg]
    client.generate("text", max_tokens="5")  # type: ignore[arg-type]
    client.generate("text", settings=MethodSettings("fallback", read_stratum="top"))  # type: ignore[arg-type]
    client.chat().send([1, 2])  # type: ignore[arg-type]
    ChatMessage("tool", "hi")  # type: ignore[arg-type]
    client.model().name = "x"  # type: ignore[misc]
