"""Graphs of cuDNN: built once for each geometry, kept, and executed on addresses.

The frontend describes a computation as a graph of tensors with explicit extents, strides and types; cuDNN
ranks engines that can run it; the first that builds is kept as a plan. Operands are what the caller's arrays
are, with their strides, so nothing is copied to suit a kernel: cuDNN turns what its engine wants otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from meshtape.runtime.shards import Shape

DATA_TYPES = {"float16": "HALF", "bfloat16": "BFLOAT16", "float32": "FLOAT"}
ITEM = {"float16": 2, "bfloat16": 2, "float32": 4}
# Of a deterministic gradient of attention on compute capability 9.0, which keeps all scores up to so many
# bytes, and adds up gradients in a fixed order, in little memory, beyond (cuDNN 9.25 and later).
SCORES_LIMIT = 2 << 30
SCORES_VARIABLE = "CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT"


class Operand(NamedTuple):
    """A tensor of a graph: extents, strides in elements, name of the dtype."""

    shape: Shape
    strides: Shape
    dtype: str

    @classmethod
    def of(cls, x: Any) -> Operand:
        return cls(x.shape, tuple(s // x.itemsize for s in x.strides), x.dtype.name)


class Plan(NamedTuple):
    """A graph that was built, its tensors' numbers in the order of `run`'s arrays, and the bytes it needs."""

    graph: Any
    uids: tuple[int, ...]
    workspace: int


class Building:
    """A graph while it is described."""

    def __init__(self, cudnn: Any, graph: Any) -> None:
        self.cudnn, self.graph = cudnn, graph
        self.uids: list[int] = []

    def take(self, operand: Operand) -> Any:
        """The next tensor that is read."""
        uid = self._next()
        return self.graph.tensor(dim=list(operand.shape), stride=list(operand.strides),
                                 data_type=self.data_type(operand.dtype), uid=uid, name=f"in{uid}")

    def give(self, tensor: Any, operand: Operand) -> None:
        """`tensor`, which an operation made, is the next one that is written."""
        tensor.set_output(True).set_data_type(self.data_type(operand.dtype)).set_dim(list(operand.shape))
        tensor.set_stride(list(operand.strides)).set_uid(self._next())

    def data_type(self, name: str) -> Any:
        return getattr(self.cudnn.data_type, DATA_TYPES[name])

    def _next(self) -> int:
        self.uids.append(len(self.uids) + 1)
        return self.uids[-1]


class Dnn:
    """cuDNN for one device: a handle, built graphs by key, and memory for their intermediate results.

    refused     why cuDNN does not take a graph, by key; the caller goes another way
    workspace   shared by all graphs, which run one after another on the device's stream. It grows when a
                graph is built, never when one runs, and old memory stays: captured CUDA graphs point there.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._cudnn = device.libraries.cudnn
        self._plans: dict[Hashable, Plan | None] = {}
        self.refused: dict[Hashable, str] = {}
        self._workspaces: list[Any] = []
        self._size = 0
        self._stream = -1
        os.environ.setdefault(SCORES_VARIABLE, str(SCORES_LIMIT))
        with device.handle:
            self._handle = self._cudnn.create_handle()

    @property
    def tf32(self) -> bool:
        """Whether float32 may be multiplied with 10 bits of mantissa."""
        return bool(self._device.blas.tf32)

    @property
    def workspace(self) -> int:
        """Bytes held for intermediate results."""
        return sum(memory.mem.size for memory in self._workspaces)

    def close(self) -> None:
        """Give handle, plans and workspace back."""
        self._plans.clear()
        self._workspaces.clear()
        self._size = 0
        self._cudnn.destroy_handle(self._handle)

    # --- plans ------------------------------------------------------------------------------------------

    def plan(self, key: Hashable, describe: Callable[[Building], None], io: str,
             exact: bool = False) -> Plan | None:
        """The plan for the graph that `describe` makes, or None if cuDNN refuses it (`refused` says why).

        `io` is the dtype of its tensors. exact: engines that may add up in varying order, round operands, or
        sum with fewer bits are left out; of graphs whose determinism is an option of theirs, engines say
        nothing.
        """
        key = key, self.tf32
        if key not in self._plans:
            self._plans[key] = self._built(key, describe, io, exact)
        return self._plans[key]

    def _built(self, key: Hashable, describe: Callable[[Building], None], io: str,
               exact: bool) -> Plan | None:
        cudnn = self._cudnn
        types = cudnn.data_type
        graph = cudnn.pygraph(io_data_type=getattr(types, DATA_TYPES[io]), intermediate_data_type=types.FLOAT,
                              compute_data_type=types.FLOAT, handle=self._handle)
        building = Building(cudnn, graph)
        try:
            describe(building)
            graph.validate()
            # Which lowers the graph as well: here a descriptor that cuDNN does not take is a refusal.
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            if exact:
                graph.deselect_numeric_notes(self._inexact(io))
            graph.check_support()
            graph.build_plans()
        except cudnn.cudnnGraphNotSupportedError as error:
            self.refused[key] = str(error)
            return None
        size = int(graph.get_workspace_size())
        self._reserve(size)
        return Plan(graph, tuple(building.uids), size)

    def _inexact(self, io: str) -> list[Any]:
        """Properties of engines that give other bits from run to run, or fewer right ones."""
        notes = self._cudnn.numerical_note
        found = [notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION, notes.DOWN_CONVERT_INPUTS]
        return found + ([notes.TENSOR_CORE] if io == "float32" and not self.tf32 else [])

    def _reserve(self, size: int) -> None:
        if size > self._size:
            self._size = max(size, 2 * self._size if size < 1 << 28 else 0)
            self._workspaces.append(self._device.pool.malloc(self._size))

    def run(self, plan: Plan, arrays: Sequence[Any]) -> None:
        """Execute on the current stream; `arrays` in the order in which the graph took and gave them."""
        stream = self._device.cp.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._cudnn.set_stream(self._handle, stream)
            self._stream = stream
        pack = {uid: int(x.data.ptr) for uid, x in zip(plan.uids, arrays, strict=True)}
        workspace = int(self._workspaces[-1].ptr) if plan.workspace else None
        plan.graph.execute(pack, workspace, self._handle)


def aligned(x: Any) -> bool:
    """Whether an array lies at a multiple of 16 bytes, as cuDNN takes it."""
    return int(x.data.ptr) % 16 == 0
