import uuid

import pytest

from kvstrata.client import AsyncClient, MethodSettings
from kvstrata.protos import retention_pb2
from kvstrata.protos.errors import CapacityError, InvalidRequestError, MalformedMessageError


def sent(gateway, index=-1):
    return [(m.role, m.content) for m in gateway.requests[index].messages.messages]


def test_a_turn_sends_the_whole_history(client, gateway):
    chat = client.chat(system="be kind", max_tokens=3)
    assert chat.send("hello").text == "be kind hello"
    chat.send("more", max_tokens=1)
    assert sent(gateway) == [
        ("system", "be kind"),
        ("user", "hello"),
        ("assistant", "be kind hello"),
        ("user", "more"),
    ]
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [r.sampling.max_tokens for r in gateway.requests] == [3, 1]


def test_a_session_has_one_random_id(client, gateway):
    chat = client.chat()
    chat.send("a")
    chat.send("b")
    assert {r.session_id for r in gateway.requests} == {chat.session_id}
    assert uuid.UUID(chat.session_id)
    assert client.chat().session_id != chat.session_id
    assert client.chat(session_id="mine").session_id == "mine"


def test_a_session_that_is_over_is_released(client, gateway):
    with client.chat(priority="high", keep_s=0.25) as chat:
        chat.send("a")
        chat.send("b", priority="low")
    hints = [(r.retention.priority, r.retention.keep_ms) for r in gateway.requests]
    assert hints == [(retention_pb2.PRIORITY_HIGH, 250), (retention_pb2.PRIORITY_LOW, 250)]
    assert gateway.released == [chat.session_id]
    assert client.release("mine") == 3
    with pytest.raises(InvalidRequestError, match="no session"):
        client.release("")
    gateway.error = CapacityError("full")
    with pytest.raises(CapacityError):
        chat.close()
    with client.chat():
        pass  # a lost hint is no reason to fail


def test_a_streamed_turn_joins_the_history_at_its_end(client):
    chat = client.chat()
    stream = chat.stream("one two")
    next(stream)
    assert chat.messages == ()
    stream.read()
    assert [m.content for m in chat.messages] == ["one two", "one two"]


def test_a_failed_turn_leaves_no_trace(client, gateway):
    chat = client.chat()
    chat.send("one")
    before = chat.messages
    gateway.error, gateway.error_after = CapacityError("full"), 1
    with pytest.raises(CapacityError):
        chat.send("two three")
    assert chat.messages == before
    gateway.error = None
    chat.send("four")
    assert [m.content for m in chat.messages][-2] == "four"


def test_a_cancelled_turn_leaves_no_trace(client):
    chat = client.chat()
    with chat.stream("one two") as stream:
        next(stream)
    assert chat.messages == ()
    assert chat.send("three").text == "three"


def test_turns_follow_one_another(client, gateway):
    gateway.delay_s = 0.1
    chat = client.chat()
    stream = chat.stream("one two")
    with pytest.raises(InvalidRequestError, match="still running"):
        chat.send("three")
    stream.close()
    chat.send("three")


def test_a_dropped_turn_does_not_block_the_next(client):
    chat = client.chat()
    for _ in chat.stream("one two"):
        break
    assert chat.send("three").text == "three"


def test_a_turns_settings_replace_the_sessions_preset(client, gateway):
    chat = client.chat(preset="small")
    chat.send("a", settings=MethodSettings("exact"))
    chat.send("b")
    methods = [request.WhichOneof("method") for request in gateway.requests]
    assert methods == ["settings", "preset"]
    chat = client.chat(settings=MethodSettings("exact"))
    chat.send("a", preset="small")
    assert gateway.requests[-1].preset == "small"


def test_bad_text_is_refused_before_it_is_sent(client, gateway):
    chat = client.chat()
    with pytest.raises(MalformedMessageError):
        chat.send("\ud800")
    with pytest.raises(MalformedMessageError):
        client.chat(system="\ud800")
    assert gateway.requests == []
    assert chat.messages == ()


async def test_async_turns_keep_the_history(gateway_here):
    async with (
        AsyncClient(gateway_here.address) as client,
        client.chat(system="be kind") as chat,
    ):
        await chat.send("hello")
        async with chat.stream("one two") as stream:
            await anext(stream)
        assert len(chat.messages) == 3
        await chat.send("more")
    assert sent(gateway_here)[-1] == ("user", "more")
    assert len(chat.messages) == 5
    assert gateway_here.released == [chat.session_id]
