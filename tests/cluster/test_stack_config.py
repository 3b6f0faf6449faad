"""The local stack's settings."""

from typing import Any

import pytest

from kvstrata.cluster.stack_config import StackConfig
from kvstrata.protos.errors import ConfigurationError


@pytest.mark.parametrize(
    "config",
    [
        StackConfig(),
        StackConfig("0.0.0.0:80", "a/b", "bfloat16", False, None, 1, 2, 0.5, 3, 4),
        StackConfig(redis_url="redis://:secret@h:1/0"),
    ],
)
def test_settings_come_back_as_they_were_and_without_the_secret(config: StackConfig) -> None:
    config.validate()
    text = config.encode()
    assert "secret" not in text
    assert StackConfig.decode(text, config.redis_url) == config


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:65535", "localhost:80"])
def test_an_address_is_host_and_port(listen: str) -> None:
    StackConfig(listen=listen).validate()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(({"listen": listen}, "listen") for listen in ("", "80", ":80", "h:", "h:x", "h:65536")),
        ({"listen": "h:-1"}, "listen"),
        ({"dram_bytes": 0}, "dram_bytes"),
        ({"redis_bytes": -1}, "redis_bytes"),
        ({"ttl_s": 0.0}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"prefill_workers": 0}, "prefill_workers"),
        ({"decode_workers": 0}, "decode_workers"),
        ({"redis": False, "redis_url": "redis://h:1"}, "--no-redis"),
    ],
)
def test_a_bad_setting_is_named_with_a_remedy(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StackConfig(**settings).validate()
    assert named in caught.value.message
    assert caught.value.remedy
