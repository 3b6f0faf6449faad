import contextlib
import gc
import signal
import socket
import threading
import time

import grpc
import pytest

from kvstrata.client import Client, MethodSettings
from kvstrata.protos.errors import (
    CapacityError,
    ConfigurationError,
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidRequestError,
    InvalidTokenError,
    LimitError,
    PromptTooLongError,
    ProtocolVersionError,
    UnavailableError,
    UnknownPresetError,
)

LONG = " ".join(f"w{i}" for i in range(130))


def test_generate_returns_text_tokens_and_usage(client):
    completion = client.generate("one two three")
    assert completion.text == "one two three"
    assert completion.token_ids == (1, 2, 3)
    assert completion.finish_reason == "stop"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 3)
    assert completion.cache.cached_fraction == 0.0


def test_a_repeated_prompt_reports_its_hit(client):
    first = client.generate(LONG)
    again = client.generate(LONG)
    assert first.cache.cached_tokens == 0
    assert first.cache.committed_blocks == 2
    assert (again.cache.cached_tokens, again.cache.cached_fraction) == (128, 1.0)
    assert (again.cache.tier, again.cache.precision) == ("redis", "base+mid")
    assert again.cache.recomputes[0].reason == "corrupt"
    assert again.cache.stages[0].stage == "prefill"


def test_every_option_reaches_the_server(client, gateway):
    client.generate(
        [5, 6],
        settings=MethodSettings("fallback", sink_tokens=4, read_stratum="base"),
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=2**64 - 1,
        stop=["a", "b"],
        ignore_eos=True,
        session_id="s",
        model="m",
    )
    (request,) = gateway.requests
    assert list(request.token_ids.ids) == [5, 6]
    assert request.settings.codec == "fallback"
    assert (request.settings.sink_tokens, request.settings.read_stratum) == (4, 1)
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (7, 3, 2**64 - 1)
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
    assert (list(sampling.stop), sampling.ignore_eos) == (["a", "b"], True)
    assert (request.session_id, request.model) == ("s", "m")


def test_calls_name_the_protocol_version(client, gateway):
    client.generate("a")
    client.model()
    assert [m["kvstrata-protocol"] for m in gateway.metadata] == ["1", "1"]


def test_stream_yields_chunks_then_has_a_completion(client):
    stream = client.stream("one two")
    assert [(c.text, c.token_ids) for c in stream] == [("one", (1,)), (" two", (2,))]
    assert stream.ended
    assert stream.completion.text == "one two"
    assert list(stream) == []


def test_a_stream_has_no_completion_before_its_end(client):
    with client.stream("one two") as stream:
        next(stream)
        with pytest.raises(InvalidRequestError, match="read the stream to its end"):
            stream.completion  # noqa: B018
    assert list(stream) == []


def test_max_tokens_ends_with_length(client):
    assert client.generate("one two three", max_tokens=2).finish_reason == "length"


@pytest.mark.parametrize("way", ["with", "close", "drop", "error", "client"])
def test_leaving_a_stream_early_frees_the_server(client, gateway, way):
    gateway.delay_s = 60
    if way == "with":
        with client.stream("one two") as stream:
            next(stream)
    elif way == "close":
        stream = client.stream("one two")
        next(stream)
        stream.close()
        stream.close()
    elif way == "drop":
        for _ in client.stream("one two"):
            break
        gc.collect()
    elif way == "error":
        with pytest.raises(ZeroDivisionError), client.stream("one two") as stream:
            len(next(stream).text) / 0
    else:
        stream = client.stream("one two")
        next(stream)
        client.close()
        with pytest.raises(UnavailableError, match="cancelled"):
            next(stream)
    assert gateway.freed.wait(5)


def test_keyboard_interrupt_cancels_the_call(client, gateway):
    gateway.delay_s = 60
    main = threading.main_thread().ident

    def interrupt():
        gateway.started.wait(5)
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        client.generate("one two")
    assert gateway.freed.wait(5)


def test_the_deadline_covers_the_whole_call(client, gateway):
    gateway.delay_s = 60
    start_s = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        client.generate("one two", timeout_s=3)  # long enough to reach a busy machine's gateway
    assert time.monotonic() - start_s < 8
    assert gateway.started.is_set()
    assert "timeout" in caught.value.remedy
    assert gateway.freed.wait(5)


def test_the_clients_own_deadline_holds_for_model(gateway):
    gateway.delay_s = 60
    with Client(gateway.address, timeout_s=0.3) as client, pytest.raises(DeadlineError):
        client.model()


def test_a_refused_connection_names_address_and_remedy(no_server):
    with Client(no_server) as client, pytest.raises(UnavailableError) as caught:
        client.generate("hi")
    assert no_server in caught.value.message
    assert "refused" in caught.value.message
    assert "check the address" in caught.value.remedy


def test_a_silent_server_is_given_up_after_connect_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start_s = time.monotonic()
        with Client(address, connect_timeout_s=0.5) as client, pytest.raises(UnavailableError):
            client.model()
        assert time.monotonic() - start_s < 5


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CapacityError("no slot", "retry", retry_s="1"), CapacityError),
        (PromptTooLongError("9000 tokens", "shorten it"), PromptTooLongError),
        (InvalidTokenError("token 99999", "stay below 49152"), InvalidTokenError),
        (DrainingError("draining", "ask another"), DrainingError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("after", [0, 1])
def test_the_servers_error_arrives_as_its_class(client, gateway, error, kind, after):
    gateway.error, gateway.error_after = error, after
    with pytest.raises(kind) as caught:
        client.generate("one two")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.remedy) == (error.message, error.remedy)
    assert caught.value.metadata == error.metadata


def test_an_unknown_preset_is_told_by_the_server(client):
    with pytest.raises(UnknownPresetError, match="tiny"):
        client.generate("a", preset="tiny")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, ProtocolVersionError),
        (grpc.StatusCode.UNKNOWN, InternalError),
    ],
    ids=str,
)
def test_a_bare_status_maps_to_the_nearest_class(client, gateway, status, kind):
    gateway.status, gateway.error_after = (status, "because"), 1
    with pytest.raises(kind, match="because"):
        client.generate("one two")


def test_a_stream_without_finish_reason_is_an_error(client, gateway):
    gateway.without_end = True
    with pytest.raises(InternalError, match="without a finish reason"):
        client.generate("one two")


def test_a_failed_stream_stays_ended(client, gateway):
    gateway.error, gateway.error_after = CapacityError("full"), 1
    stream = client.stream("one two")
    next(stream)
    with pytest.raises(CapacityError):
        next(stream)
    assert list(stream) == []


def test_model_tells_limits_and_presets(client):
    model = client.model()
    assert (model.name, model.max_positions, model.block_tokens) == ("smollm2", 8192, 64)
    assert "balanced" in model.presets
    assert model.fingerprint == bytes(range(16)).hex()


def test_two_threads_share_a_client(client):
    texts = {}

    def ask(word):
        texts[word] = client.generate(word).text

    threads = [threading.Thread(target=ask, args=(f"w{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {f"w{i}": f"w{i}" for i in range(8)}


def test_bad_input_sends_nothing(client, gateway):
    with pytest.raises(InvalidRequestError):
        client.generate("")
    assert gateway.requests == []


@pytest.mark.parametrize("limit", [0, -1, float("inf"), float("nan"), 1e300, None, "5", True])
def test_a_time_limit_is_positive_and_finite(limit):
    with pytest.raises(LimitError, match="timeout_s"):
        Client("127.0.0.1:1", timeout_s=limit)
    with pytest.raises(LimitError, match="connect_timeout_s"):
        Client("127.0.0.1:1", connect_timeout_s=limit)


@pytest.mark.parametrize("address", ["", "  ", None, "http://127.0.0.1:1", "a\nb"])
def test_an_impossible_address_is_refused(address):
    with pytest.raises(ConfigurationError):
        Client(address)


def test_a_closed_client_says_so(gateway):
    client = Client(gateway.address)
    client.close()
    client.close()
    assert "closed" in repr(client)
    with pytest.raises(InvalidRequestError, match="closed"):
        client.generate("a")
    with pytest.raises(InvalidRequestError, match="closed"):
        client.model()


def test_an_unclosed_client_warns(gateway):
    client = Client(gateway.address)
    with pytest.warns(ResourceWarning, match="unclosed <Client"):
        del client


def test_a_stream_keeps_its_client_alive(gateway):
    client = Client(gateway.address)
    stream = client.stream("one two")
    close = client.close
    del client
    gc.collect()
    assert stream.read().text == "one two"
    close()


def test_another_thread_may_close_a_stream(client, gateway):
    gateway.delay_s = 60
    stream = client.stream("one two")
    next(stream)
    threading.Timer(0.1, stream.close).start()
    assert list(stream) == []
    assert gateway.freed.wait(5)


def test_a_client_finds_a_server_that_starts_later(gateway, no_server):
    with Client(no_server) as client:
        with pytest.raises(UnavailableError):
            client.model()
        port = no_server.rpartition(":")[2]
        with socket.create_server(("127.0.0.1", int(port))) as listener:
            forward = threading.Thread(target=forward_one, args=(listener, gateway.address))
            forward.start()
            deadline_s = time.monotonic() + 5
            while True:
                try:
                    assert client.generate("found").text == "found"
                    break
                except UnavailableError:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.05)
            client.close()
            forward.join()


def forward_one(listener, address):
    """Pass one connection on, byte by byte, until the caller hangs up."""
    host, port = address.split(":")
    with listener.accept()[0] as near, socket.create_connection((host, int(port))) as far:
        back = threading.Thread(target=copy, args=(far, near))
        back.start()
        copy(near, far)
        back.join()


def copy(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
