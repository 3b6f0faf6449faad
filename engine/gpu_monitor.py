"""Memory and use of a GPU, as its driver tells them (NVML), for admission and statistics.

What torch knows is its own: other processes take memory of the same GPU, and a node that admits a
request by its own books alone runs out in the middle of it. Where there is no driver, or it does
not answer, nothing is known, and only the pool's own bound holds.
"""

import logging
from dataclasses import dataclass
from typing import Any, Self

import pynvml
import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GPUUse:
    """What is used of a GPU, by all processes.

    Attributes:
        num_bytes: Its memory.
        used_bytes: Of it, not free.
        busy: Share of the last moment in which it computed, 0 to 1; 0 where a GPU does not tell,
            such as a part of one (MIG).
    """

    num_bytes: int
    used_bytes: int
    busy: float


class GPUMonitor:
    """Asks the driver about one GPU. Any thread may ask.

    Attributes:
        num_failures: How often the driver did not tell.
    """

    def __init__(self, handle: Any, device: torch.device) -> None:
        self._handle = handle
        self._device = device
        self.num_failures = 0

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """Return the monitor of a torch device; None where it is no GPU with an NVIDIA driver.

        It is found by its UUID: torch counts only the GPUs that a process may see.
        """
        if device.type != "cuda":
            return None
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            return cls(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), device)
        except (pynvml.NVMLError, AttributeError) as error:  # ROCm's devices have no UUID
            logger.warning("the GPU is not monitored", extra={"error": str(error)})
            return None

    def read(self) -> GPUUse | None:
        """Return what is used now; None if the driver does not tell."""
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        except pynvml.NVMLError as error:
            self.num_failures += 1
            if self.num_failures == 1:  # it is asked at every admission
                logger.warning("the GPU's driver does not answer", extra={"error": str(error)})
            return None
        try:
            busy = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        except pynvml.NVMLError:
            busy = 0.0
        return GPUUse(int(memory.total), int(memory.used), busy)

    def free_bytes(self) -> int | None:
        """Return what this process can still get; None if the driver does not tell.

        That is the GPU's free memory, and what torch has of it without using it.
        """
        use = self.read()
        if use is None:
            return None
        device = self._device
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return use.num_bytes - use.used_bytes + unused
