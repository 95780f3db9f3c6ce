"""How much memory is free where a model is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may take."""


def free_bytes(devices: Iterable[torch.device]) -> int | None:
    """What is free on the fullest of some devices; None where none says it.

    On a GPU that is what its driver has left and what PyTorch has reserved and doesn't use; on a CPU what Linux could
    hand out, or the container may still take.
    """
    found = [_free_ram() if where.type == "cpu" else _free_on(where) for where in dict.fromkeys(devices)]
    return min((each for each in found if each is not None), default=None)


def _free_on(where: torch.device) -> int | None:
    module: Any = torch.get_device_module(where)
    if hasattr(module, "mem_get_info"):
        unused = module.memory_reserved(where) - module.memory_allocated(where)
        return int(module.mem_get_info(where)[0]) + int(unused)
    if where.type == "mps":
        return int(module.recommended_max_memory()) - int(module.driver_allocated_memory())
    return None


def _free_ram() -> int | None:
    found: list[int] = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # of a group without a limit there is "max"
        found.append(int((GROUP / "memory.max").read_text()) - int((GROUP / "memory.current").read_text()))
    if not found:
        with suppress(OSError, ValueError):  # names that other systems lack
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(found, default=None)
