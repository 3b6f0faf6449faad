"""A model that cannot be served is told before workers start."""

from pathlib import Path

import pytest

from kvstrata.cluster.model_check import load_model, load_served_model
from kvstrata.methods.profile import SUFFIX, ProfileStore
from kvstrata.protos.errors import ConfigurationError, UnknownModelError


def test_a_damaged_profile_is_named_with_what_to_do(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.engine.model_tables.profile_folder", lambda: tmp_path)
    model = load_model(str(model_folder), "float32")
    path = tmp_path / f"{model.model_id.hex()}{SUFFIX}"
    path.write_bytes(b"not a profile")
    monkeypatch.setattr("kvstrata.engine.model_tables.PROFILES", ProfileStore())
    with pytest.raises(ConfigurationError, match=path.name) as caught:
        load_served_model(str(model_folder), "float32")
    assert "calibrate" in caught.value.remedy
    assert load_model(str(model_folder), "float32").model_id == model.model_id


def test_nothing_at_the_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="nowhere"):
        load_served_model(str(tmp_path / "nowhere"), "float32")


def test_a_folder_without_an_adapter_is_named(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="no adapter") as caught:
        load_served_model(str(model_folder), "float32", str(tmp_path))
    assert "--adapter" in caught.value.remedy
