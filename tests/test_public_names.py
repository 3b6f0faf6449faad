"""Each room shows at most ten names, sorted, all of them real, and says what it is."""

import importlib

import pytest

from tests.test_rooms import ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_shows_a_few_sorted_names_that_exist(room: str):
    module = importlib.import_module(f"kvstrata.{room}")
    assert len((module.__doc__ or "").strip()) > 30, "the room says nothing about itself"
    names = list(getattr(module, "__all__", []))
    assert names == sorted(names)
    assert len(names) == len(set(names)) <= 10
    assert [name for name in names if not hasattr(module, name)] == []
