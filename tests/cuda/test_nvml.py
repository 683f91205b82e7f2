"""What the driver's library says, on a stand-in for it."""

from __future__ import annotations

from typing import Any

from meshtape.runtime.cuda import nvml


class Library:
    """Four GPUs, in another order than on the bus; NVLink joins 0 with 2 and 1 with 3 of that order."""

    BUSES = (0x9B, 0x3B, 0xDB, 0x5B)

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += not self.status
        return self.status

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: Any) -> int:
        buffer.value = b"580.65.06"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, out: Any) -> int:
        out._obj.value = 13000
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = 4
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, out: Any) -> int:
        out._obj.value = index.value + 100
        return 0

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, out: Any) -> int:
        out._obj.domain, out._obj.bus, out._obj.device = 0, self.BUSES[handle.value - 100], 0
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> int:
        out._obj.total = 150 << 30
        return 0

    def nvmlDeviceGetP2PStatus(self, a: Any, b: Any, index: Any, out: Any) -> int:
        assert index.value == 2
        out._obj.value = 0 if abs(a.value - b.value) == 2 else 5
        return 0

    class nvmlErrorString:
        restype: Any = None

        def __new__(cls, status: int) -> Any:
            return b"Driver/library version mismatch"


def test_gpus_come_in_order_of_their_bus_with_those_that_nvlink_reaches() -> None:
    library = Library()
    found = nvml.driver(library)
    assert (found.version, found.cuda, found.trouble, library.open) == ("580.65.06", 13000, "", 0)
    assert [(card.pci, card.linked) for card in found.cards] == [
        ("0000:3B:00.0", ("0000:5B:00.0",)), ("0000:5B:00.0", ("0000:3B:00.0",)),
        ("0000:9B:00.0", ("0000:DB:00.0",)), ("0000:DB:00.0", ("0000:9B:00.0",))]
    assert (found.cards[0].name, found.cards[0].memory) == ("NVIDIA H200", 150 << 30)


def test_a_driver_that_does_not_start_says_why() -> None:
    assert nvml.driver(Library(18)) == nvml.Driver(trouble="Driver/library version mismatch")


def test_this_machine_can_be_asked() -> None:
    found = nvml.driver()
    assert found.trouble or found.version
