"""The GPU's driver as a stand-in tells it; and the real library, which finds no driver here."""

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from kvstrata.engine.gpu_monitor import GPUMonitor, GPUUse

GIB = 1 << 30
CUDA = torch.device("cuda:1")


class Driver:
    """What NVML tells of one GPU, found by its UUID alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = 30 * GIB
        self.is_gone = False
        self.is_part = False
        for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))
        for name in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))
        properties = SimpleNamespace(uuid="11-22")
        monkeypatch.setattr(torch.cuda, "get_device_properties", {CUDA: properties}.__getitem__)
        monkeypatch.setattr(torch.cuda, "memory_reserved", {CUDA: 8 * GIB}.__getitem__)
        monkeypatch.setattr(torch.cuda, "memory_allocated", {CUDA: 5 * GIB}.__getitem__)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.is_gone:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-11-22":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        assert handle == "handle"
        if self.is_gone:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=80 * GIB, used=self.used, free=80 * GIB - self.used)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        if self.is_part:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=35, memory=10)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def monitor_of(device: torch.device) -> GPUMonitor:
    monitor = GPUMonitor.of(device)
    assert monitor is not None
    return monitor


def test_memory_and_use_are_those_of_the_gpu_with_the_devices_uuid(driver: Driver) -> None:
    monitor = monitor_of(CUDA)
    assert monitor.read() == GPUUse(80 * GIB, 30 * GIB, 0.35)
    assert monitor.free_bytes() == 53 * GIB  # with what torch holds and does not use
    driver.used = 79 * GIB
    assert monitor.free_bytes() == 4 * GIB


def test_the_memory_of_a_part_is_told_though_its_use_is_not(driver: Driver) -> None:
    driver.is_part = True
    monitor = monitor_of(CUDA)
    assert monitor.read() == GPUUse(80 * GIB, 30 * GIB, 0.0)
    assert monitor.num_failures == 0


def test_a_driver_that_is_lost_tells_nothing_and_is_counted(driver: Driver) -> None:
    monitor = monitor_of(CUDA)
    driver.is_gone = True
    assert (monitor.read(), monitor.free_bytes()) == (None, None)
    assert monitor.num_failures == 2
    driver.is_gone = False
    assert monitor.read() is not None


def test_without_a_driver_there_is_no_monitor(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.is_gone = True
    assert GPUMonitor.of(CUDA) is None
    driver.is_gone = False
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert GPUMonitor.of(CUDA) is None  # a device of another make has no UUID


def test_a_processor_is_not_monitored() -> None:
    assert GPUMonitor.of(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_library_says_that_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    assert GPUMonitor.of(CUDA) is None
