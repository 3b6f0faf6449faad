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
        StackConfig(ssd_path="/a", ssd_bytes=7, object_url="file:///b", object_bytes=8),
        StackConfig(adapter="/tuned"),
        StackConfig(metrics_listen="127.0.0.1:0", store_metrics_listen="127.0.0.1:9"),
    ],
)
def test_settings_come_back_as_they_were_and_without_the_secret(config: StackConfig) -> None:
    config.validate()
    text = config.encode()
    assert "secret" not in text
    assert StackConfig.decode(text, config.redis_url) == config


def test_the_store_is_told_of_the_tiers_that_are_asked_for_alone() -> None:
    plain = StackConfig(dram_bytes=1, redis_bytes=2, ttl_s=3.0)
    options = plain.store_options()
    assert options == ["--dram", "1", "--redis-bytes", "2", "--ttl-s", "3.0"]
    full = StackConfig(
        ssd_path="/a",
        ssd_bytes=7,
        object_url="file:///b",
        object_bytes=8,
        store_metrics_listen="127.0.0.1:9",
    ).store_options()
    for option, value in (
        ("--ssd-path", "/a"),
        ("--ssd", "7"),
        ("--object-url", "file:///b"),
        ("--object", "8"),
        ("--metrics-listen", "127.0.0.1:9"),
    ):
        assert full[full.index(option) + 1] == value


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:65535", "localhost:80"])
def test_an_address_is_host_and_port(listen: str) -> None:
    StackConfig(listen=listen).validate()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(({"listen": listen}, "listen") for listen in ("", "80", ":80", "h:", "h:x", "h:65536")),
        ({"listen": "h:-1"}, "listen"),
        ({"metrics_listen": "80"}, "metrics_listen"),
        ({"store_metrics_listen": "h:65536"}, "store_metrics_listen"),
        ({"ssd_bytes": 0}, "ssd_bytes"),
        ({"object_bytes": 0}, "object_bytes"),
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
