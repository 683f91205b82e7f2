"""From a group of ranks on the host to the communicator of their devices."""

from __future__ import annotations

from typing import Any

from meshtape.runtime.collectives.device import DeviceCommunicator, OneDevice
from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.nccl import NcclCommunicator
from meshtape.runtime.collectives.staged import StagedCommunicator


def join_devices(inner: HostCommunicator, device: Any, transport: str) -> DeviceCommunicator:
    """The communicator of arrays on `device` between the ranks of `inner`, which it keeps and closes.

    transport: "nccl" or "staged" (see choice.py), the same on all ranks. Called by all of them, each from the
    thread that will use it.
    """
    with device.handle:
        if inner.size == 1:
            return OneDevice(device)
        return NcclCommunicator(inner, device) if transport == "nccl" else StagedCommunicator(inner, device)
