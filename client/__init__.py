"""The client: ask a KVStrata gateway for text, and see what its cache did.

    from kvstrata.client import Client

    with Client("127.0.0.1:50051") as client:
        completion = client.generate("The capital of France is", max_tokens=8)
        print(completion.text, completion.cache.cached_fraction)

        with client.stream([{"role": "user", "content": "Count to ten."}]) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)

``AsyncClient`` has the same calls for asyncio. The commands ``kvstrata`` and ``kvctl`` are here
too.
"""

from kvstrata.client.async_client import AsyncChatSession, AsyncClient, AsyncStream
from kvstrata.client.method_settings import MethodSettings
from kvstrata.client.request import ChatMessage
from kvstrata.client.results import Completion
from kvstrata.client.sync_client import ChatSession, Client, Stream
from kvstrata.protos.errors import KVStrataError

__all__ = [
    "AsyncChatSession",
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "ChatSession",
    "Client",
    "Completion",
    "KVStrataError",
    "MethodSettings",
    "Stream",
]
