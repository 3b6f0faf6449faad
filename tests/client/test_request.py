import math

import pytest

from kvstrata.client import ChatMessage, MethodSettings
from kvstrata.client.request import build_request
from kvstrata.protos.errors import (
    EmptyPromptError,
    InvalidRequestError,
    InvalidTokenError,
    LimitError,
    MalformedMessageError,
    MessageTooLargeError,
)

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("prompt", "kind", "words"),
    [
        ("", EmptyPromptError, "empty"),
        ([], EmptyPromptError, "empty"),
        ("a\ud800", MalformedMessageError, "surrogate at character 1"),
        ([1, -1], InvalidTokenError, "token id 1 is -1"),
        ([2**32], InvalidTokenError, "token id 0"),
        ([10**400], InvalidTokenError, "token id 0"),
        ([1, 2.0], InvalidTokenError, "not an integer"),
        ([True], InvalidTokenError, "not an integer"),
        (["a"], InvalidTokenError, "not an integer"),
        ([1, USER], InvalidTokenError, "not an integer"),
        ([USER, 1], InvalidRequestError, "message 1 is no chat message"),
        ([{"role": "user"}], InvalidRequestError, "message 0 is no chat message"),
        ([{**USER, "name": "x"}], InvalidRequestError, "message 0 is no chat message"),
        ([{**USER, "role": "tool"}], InvalidRequestError, "'tool'"),
        ([{**USER, "content": 5}], InvalidRequestError, "content of message 0"),
        ([{**USER, "content": "\udfff"}], MalformedMessageError, "content of message 0"),
        (USER, InvalidRequestError, "dict"),
        (b"bytes", InvalidRequestError, "bytes"),
        (None, InvalidRequestError, "NoneType"),
        (7, InvalidRequestError, "int"),
        ("x" * (4 << 20), MessageTooLargeError, "bytes"),
    ],
)
def test_a_bad_prompt_is_refused_with_a_remedy(prompt, kind, words):
    with pytest.raises(kind, match=words) as caught:
        build_request(prompt, {})
    assert type(caught.value) is kind
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"preset": "exact", "settings": MethodSettings("exact")}, InvalidRequestError),
        ({"preset": ""}, InvalidRequestError),
        ({"preset": 5}, InvalidRequestError),
        ({"settings": MethodSettings("")}, InvalidRequestError),
        ({"settings": MethodSettings(h2o=5)}, InvalidRequestError),
        ({"settings": MethodSettings(h2o={"budget": 0.2})}, InvalidRequestError),
        ({"settings": MethodSettings(h2o={"heavy": "much"})}, LimitError),
        ({"settings": MethodSettings(h2o={"heavy": math.nan})}, LimitError),
        ({"settings": MethodSettings(h2o={"sinks": -1})}, LimitError),
        ({"settings": MethodSettings(h2o={"sinks": 0.5})}, InvalidRequestError),
        ({"settings": MethodSettings(zipcache={"share_heads": 1})}, InvalidRequestError),
        ({"settings": MethodSettings(zipcache={"normaliser": 7})}, InvalidRequestError),
        ({"settings": MethodSettings(skipdecode={"layers": 3})}, InvalidRequestError),
        ({"settings": MethodSettings(skipdecode={"speedup": "fast"})}, LimitError),
        ({"settings": MethodSettings(skipdecode={"max_layers": -1})}, LimitError),
        ({"settings": MethodSettings("calibrated", bits="2")}, LimitError),
        ({"settings": MethodSettings("fallback", sink_tokens=-1)}, LimitError),
        ({"settings": MethodSettings("fallback", read_stratum="top")}, InvalidRequestError),
        ({"settings": MethodSettings("fallback", representatives=5)}, InvalidRequestError),
        ({"coarsest": "top"}, InvalidRequestError),
        ({"coarsest": 1}, InvalidRequestError),
        ({"first_token_s": 0}, LimitError),
        ({"first_token_s": math.nan}, LimitError),
        ({"max_tokens": 0}, LimitError),
        ({"max_tokens": 2**32}, LimitError),
        ({"max_tokens": 1.5}, InvalidRequestError),
        ({"temperature": math.nan}, LimitError),
        ({"temperature": math.inf}, LimitError),
        ({"temperature": -0.1}, LimitError),
        ({"temperature": 1e39}, LimitError),
        ({"temperature": "hot"}, LimitError),
        ({"top_p": 0}, LimitError),
        ({"top_p": 1.1}, LimitError),
        ({"top_p": math.nan}, LimitError),
        ({"top_k": -1}, LimitError),
        ({"seed": -1}, LimitError),
        ({"seed": 2**64}, LimitError),
        ({"stop": ""}, InvalidRequestError),
        ({"stop": ["a", ""]}, InvalidRequestError),
        ({"stop": [5]}, InvalidRequestError),
        ({"stop": "\ud800"}, MalformedMessageError),
        ({"session_id": "\ud800"}, MalformedMessageError),
        ({"priority": "urgent"}, InvalidRequestError),
        ({"keep_s": 0}, LimitError),
        ({"keep_s": math.inf}, LimitError),
        ({"model": 5}, InvalidRequestError),
        ({"max_token": 5}, InvalidRequestError),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_with_a_remedy(options, kind):
    with pytest.raises(kind) as caught:
        build_request("hi", options)
    assert type(caught.value) is kind
    assert caught.value.remedy


def test_nothing_given_leaves_everything_to_the_server():
    request = build_request("hi", {"preset": None, "max_tokens": None, "stop": None})
    assert request.WhichOneof("method") is None
    assert not any(request.sampling.HasField(f) for f in ("max_tokens", "temperature", "seed"))


def test_explicit_zeros_are_sent():
    sampling = build_request("hi", {"temperature": 0, "top_k": 0, "seed": 0}).sampling
    assert all(sampling.HasField(name) for name in ("temperature", "top_k", "seed"))


def test_messages_may_be_dicts_or_values():
    request = build_request([ChatMessage("system", "be kind"), USER], {})
    assert [(m.role, m.content) for m in request.messages.messages] == [
        ("system", "be kind"),
        ("user", "hi"),
    ]


def test_anything_that_holds_integers_is_token_ids():
    numpy = pytest.importorskip("numpy")
    for ids in ((1, 2), range(1, 3), numpy.array([1, 2])):
        assert list(build_request(ids, {}).token_ids.ids) == [1, 2]


def test_one_stop_string_is_not_split_into_characters():
    assert list(build_request("hi", {"stop": "END"}).sampling.stop) == ["END"]


def test_stages_are_sent_as_they_are_given_and_an_empty_one_is_there():
    settings = MethodSettings(
        h2o={"heavy": 0.2, "recent_tokens": 64, "positions": "rolling"},
        zipcache={"seed": 2**64 - 1, "share_heads": False},
        zipvl={},
    )
    sent = build_request("x", {"settings": settings}).settings
    assert sent.codec == ""
    assert (sent.h2o.heavy, sent.h2o.recent_tokens, sent.h2o.positions) == (0.2, 64, "rolling")
    assert not sent.h2o.HasField("decay")
    assert sent.zipcache.seed == 2**64 - 1
    assert sent.zipcache.HasField("share_heads")
    assert sent.HasField("zipvl")
    assert not sent.HasField("attention_gate")


def test_the_client_knows_the_stages_that_the_server_knows():
    from kvstrata.client.method_settings import STAGES as OURS
    from kvstrata.methods.pipeline import STAGES

    assert set(OURS) == {*STAGES, "skipdecode"}  # a schedule of layers is told like a stage


def test_what_may_be_given_up_for_time_is_told():
    request = build_request("hi", {"coarsest": "base", "first_token_s": 0.25})
    assert (request.coarsest_stratum, request.first_token_ms) == (1, 250)
    assert build_request("hi", {"first_token_s": 1e-9}).first_token_ms == 1
    request = build_request("hi", {})
    assert (request.coarsest_stratum, request.first_token_ms) == (0, 0)
