"""Arrays of other libraries: DLPack and CuPy, without a copy where a worker of this process has the array."""

from __future__ import annotations

from typing import Any

from meshtape.autograd.tensor import Tensor, make, owner_session
from meshtape.runtime.cuda.graphs import owner_of
from meshtape.runtime.dlpack import CPU, CUDA, capsule_of, host_array, lent
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import MeshError
from meshtape.scheduler import current
from meshtape.scheduler.session import Session


def device_name(t: Tensor) -> str:
    """What holds a tensor: "cpu", or the device of the workers ("gpu0"; "gpu" if each has one of its own)."""
    names = dict.fromkeys(owner_session(t).mesh.devices)
    return next(iter(names)) if len(names) == 1 else "/".join(
        dict.fromkeys(name.rstrip("0123456789:") for name in names))


def worker_here(session: Session) -> Any:
    """The one worker inside of this process, which works in this thread; None on other meshes."""
    return getattr(session.mesh, "_worker", None)


def block_here(t: Tensor) -> tuple[Any, Any]:
    """(the worker in this process, its array), once all that was recorded is begun; raises what went wrong.

    (None, None) on other meshes.
    """
    session = owner_session(t)
    worker = worker_here(session)
    if worker is None:
        return None, None
    session.wait()
    if t.block in session.inflight.poisoned:
        raise session.inflight.poisoned[t.block]
    return worker, worker.blocks[+t.block]


def dlpack_device(t: Tensor) -> tuple[int, int]:
    """Where __dlpack__ has the values: on the device of a worker in this process, else on the host."""
    worker = worker_here(owner_session(t))
    return (CPU, 0) if worker is None or worker.device is None else (CUDA, worker.device.index)


def dlpack(t: Tensor, *, stream: Any = None, max_version: tuple[int, int] | None = None,
           dl_device: tuple[Any, int] | None = None, copy: bool | None = None) -> Any:
    """A DLPack capsule of the values, as the Array API standard has it. Waits.

    The values of a worker in this process are shared, and read-only (tensors never change), where the reader
    takes that; others are a copy. Raises BufferError where that is not possible as asked.
    """
    here = dlpack_device(t)
    wanted = here if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
    if wanted not in (here, (CPU, 0)):
        raise BufferError(f"__dlpack__: a tensor on device {here} asked for on {wanted}")
    if wanted[0] == CUDA:
        array = as_cupy(t)
        with worker_here(owner_session(t)).device.active():
            # CuPy lets the reader's stream wait for the current one, on which the values are made.
            return (array.copy() if copy else array).__dlpack__(stream=stream, max_version=max_version)
    shared = here == wanted and worker_here(owner_session(t)) is not None
    if copy is False and not (shared and max_version is not None):
        raise BufferError("__dlpack__: copy=False, but these values must be copied: the workers are "
                          "elsewhere, or the reader takes no read-only memory")
    if shared and max_version is not None and not copy:
        return capsule_of(lent(block_here(t)[1], t.block), max_version)
    return capsule_of(t.numpy(), max_version)


def from_dlpack(x: Any, /, *, device: str | None = None, copy: bool | None = None) -> Tensor:
    """A tensor with the values of another library's array: of anything that has __dlpack__.

    The values are copied, as they may change there later; copy=False raises BufferError. Gradients stay
    behind. Raises DTypeError, MeshError.
    """
    if isinstance(x, Tensor):
        return x.detach()
    if copy is False:
        raise BufferError("from_dlpack: copy=False, but values are always copied")
    if device not in (None, "cpu") and device != current.session().mesh.devices[0]:
        raise MeshError(f"from_dlpack: device={device!r} given; tensors live where the workers do, on "
                        f"{current.session().mesh.devices[0]!r}: leave it out")
    if x.__dlpack_device__()[0] == CUDA and _device_here() is not None:
        cp = _device_here().cp
        return from_cupy(x if isinstance(x, cp.ndarray) else cp.from_dlpack(x))
    session, array = current.session(), host_array(x)
    return make(*session.place(array.astype(canonical(array.dtype), order="C", copy=True),
                               session.axes.replicated), None)


# --- CuPy -----------------------------------------------------------------------------------------------

def _device_here() -> Any:
    """The device of the worker in this process, None if there is none."""
    worker = worker_here(current.session())
    return None if worker is None else worker.device


def as_cupy(t: Tensor) -> Any:
    """The tensor's values as a CuPy array in the same memory, for the current stream.

    For a worker in this process that has a GPU (init(devices="gpu")): MeshError otherwise. Tensors do not
    change, so do not write to it; and be done with it on your streams before you let it go.
    """
    worker, array = block_here(t)
    device = None if worker is None else worker.device
    if device is None:
        raise MeshError(f"as_cupy: the tensor is on {device_name(t)!r} with the workers of a mesh of kind "
                        f"{owner_session(t).mesh.kind!r}; use .numpy(), or init(devices='gpu') for a GPU in "
                        f"this process")
    cp = device.cp
    reader = cp.cuda.get_current_stream()
    with device.active():
        if worker.graphs is not None and owner_of(worker.graphs.owners, array) is not None:
            array = array.copy()        # a graph will write there when it is replayed
        made = device.stream.record()
    reader.wait_event(made)
    if not array.size:
        return array
    whole = array.data.mem
    memory = cp.cuda.UnownedMemory(whole.ptr, whole.size, (array, t.block), device.index)
    place = cp.cuda.MemoryPointer(memory, array.data.ptr - whole.ptr)
    return cp.ndarray(array.shape, array.dtype, place, array.strides)


def from_cupy(array: Any) -> Tensor:
    """A tensor with the values of a CuPy array, copied on the device after all that was begun on the current
    stream.

    For a worker in this process on the array's GPU: MeshError otherwise.
    """
    device = _device_here()
    if device is None:
        raise MeshError("from_cupy: no worker in this process has a GPU; use init(devices='gpu'), or "
                        "mt.tensor(array.get())")
    if array.device.id != device.index:
        raise MeshError(f"from_cupy: the array is on GPU {array.device.id}, the worker's is {device.index}")
    session, reader = current.session(), device.cp.cuda.get_current_stream()
    given = reader.record()
    with device.active():
        device.stream.wait_event(given)
        own = array.astype(canonical(array.dtype), order="C", copy=True)
        made = device.stream.record()
    reader.wait_event(made)             # what comes later on that stream may write to the array
    return make(*session.place(own, session.axes.replicated), None)


def take_in(x: Any) -> Any:
    """Another library's array as what as_tensor() can do with: NumPy's, or a tensor if it is on a device."""
    if x.__dlpack_device__()[0] == CUDA:
        return from_dlpack(x)
    return host_array(x)


Tensor.__dlpack__ = dlpack  # type: ignore[attr-defined]
Tensor.__dlpack_device__ = dlpack_device  # type: ignore[attr-defined]
Tensor.device = property(device_name)  # type: ignore[attr-defined]
