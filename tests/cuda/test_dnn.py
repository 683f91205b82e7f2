"""cuDNN: graphs as the frontend takes them, convolutions and attention beside their plain kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import meshtape.runtime.ops  # noqa: F401  (fills the table)
from meshtape.runtime.cuda.dnn import convolution
from meshtape.runtime.cuda.dnn.graphs import Building, Operand
from meshtape.runtime.cuda.kernels import convolution as own
from meshtape.runtime.op import TABLE

CONVOLUTIONS = ("conv", "conv_bias", "conv_input_grad", "conv_weight_grad")
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
CLOSE = {"float64": 1e-13, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def attrs_of(stride: Any = (1, 1), padding: Any = ((0, 0), (0, 0)), dilation: Any = (1, 1),
             groups: int = 1) -> dict[str, Any]:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": ((2, 8, 6, 5), (16, 8, 3, 3), attrs_of()),
    "padded": ((3, 3, 7, 6), (5, 3, 3, 3), attrs_of(padding=((1, 1), (1, 1)))),
    "uneven padding": ((2, 4, 6, 7), (3, 4, 2, 4), attrs_of(padding=((0, 1), (2, 1)))),
    "strided": ((2, 4, 9, 8), (6, 4, 3, 3), attrs_of((2, 3), ((1, 1), (1, 1)))),
    "dilated": ((1, 2, 9, 8), (3, 2, 3, 2), attrs_of(dilation=(2, 3))),
    "grouped": ((2, 8, 5, 5), (4, 4, 3, 3), attrs_of(padding=((1, 1), (1, 1)), groups=2)),
    "depthwise": ((2, 6, 5, 5), (6, 1, 3, 3), attrs_of((2, 2), ((1, 1), (1, 1)), groups=6)),
    "pointwise": ((2, 8, 4, 4), (3, 8, 1, 1), attrs_of()),
    "one number": ((1, 1, 1, 1), (1, 1, 1, 1), attrs_of()),
    "line": ((3, 4, 11), (8, 4, 5), attrs_of((2,), ((2, 1),), (1,))),
    "room": ((2, 2, 4, 3, 5), (3, 2, 2, 2, 3), attrs_of((1, 1, 2), ((0, 0), (1, 0), (1, 1)), (1, 1, 1))),
}


def given(name: str, x: Any, w: Any, attrs: dict[str, Any], dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arrays on the host and attrs for a row."""
    rng = np.random.default_rng(7)
    y = TABLE["conv"].shape(x, w, **attrs)[0]
    shapes, more = {"conv": ((x, w), {}), "conv_bias": ((x, w, w[:1]), {}),
                    "conv_input_grad": ((y, w), {"size": x[2:]}),
                    "conv_weight_grad": ((y, x), {"kernel": w[2:]})}[name]
    return [rng.normal(size=s).astype(dtype) for s in shapes], {**more, **attrs}


def check(device: Any, name: str, arrays: list[Any], attrs: dict[str, Any],
          on_device: list[Any] | None = None, **options: Any) -> Any:
    """The row's device kernel gives what its plain kernel gives in float64; returns what it gives."""
    row = TABLE[name]
    dtype = arrays[0].dtype
    assert row.device is not None
    assert row.device.supports(tuple(a.shape for a in arrays), tuple(a.dtype for a in arrays), attrs)
    held = on_device or [device.cp.asarray(a) for a in arrays]
    found = row.device.run(device, *held, **attrs, **options)
    wanted = row.kernel(np, *(a.astype(np.float64) for a in arrays), **attrs)
    assert found.shape == wanted.shape and found.dtype == dtype
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(found.get().astype(np.float64) / scale, wanted / scale, atol=CLOSE[dtype.name])
    return found


# --- the frontend's names -------------------------------------------------------------------------------

def test_every_name_and_keyword_is_the_frontends() -> None:
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    x, w, y, bias = (Operand(s, convolution.in_order(s), "float16") for s in (
        (2, 8, 5, 5), (4, 8, 3, 3), (2, 4, 3, 3), (1, 4, 1, 1)))
    geometry = (1, 1), ((0, 0), (0, 0)), (1, 1)
    for describe, operands in ((convolution._fprop, (x, w, y)), (convolution._dgrad, (y, w, x)),
                               (convolution._wgrad, (y, x, w)), (convolution._fprop_bias, (x, w, bias, y))):
        graph = cudnn.pygraph(io_data_type=cudnn.data_type.HALF, intermediate_data_type=cudnn.data_type.FLOAT,
                              compute_data_type=cudnn.data_type.FLOAT, handle=None)
        building = Building(cudnn, graph)
        describe(building, *operands, geometry)
        assert [t.uid for t in graph.get_inputs() + graph.get_outputs()] == building.uids
    documented = str(cudnn._pybind_module.backend_graph.sdpa.__doc__)
    for name in ("q", "k", "v", "attn_scale", "generate_stats", "diagonal_alignment",
                 "diagonal_band_right_bound"):
        assert f" {name}: " in documented
    documented = str(cudnn._pybind_module.backend_graph.sdpa_backward.__doc__)
    for name in ("o", "dO", "stats", "attn_scale", "use_deterministic_algorithm", "diagonal_alignment",
                 "diagonal_band_right_bound"):
        assert f" {name}: " in documented
    assert hasattr(cudnn.diagonal_alignment, "TOP_LEFT")
    for name in ("validate", "create_execution_plans", "deselect_numeric_notes", "check_support",
                 "build_plans", "get_workspace_size", "execute"):
        assert callable(getattr(cudnn.pygraph, name))
    for name in ("A", "FALLBACK"):
        assert hasattr(cudnn.heur_mode, name)
    for name in ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS", "TENSOR_CORE"):
        assert hasattr(cudnn.numerical_note, name)
    for name in ("create_handle", "set_stream", "destroy_handle", "backend_version",
                 "cudnnGraphNotSupportedError"):
        assert hasattr(cudnn, name)


# --- convolution ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_agrees_with_the_plain_kernel(device: Any, name: str, case: str, dtype: str) -> None:
    arrays, attrs = given(name, *CASES[case], DTYPES[dtype])
    check(device, name, arrays, attrs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_without_cudnn(device: Any, name: str, dtype: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "dnn", None)
    for gathered in (own.GATHERED, 200):
        monkeypatch.setattr(own, "GATHERED", gathered)
        for case in CASES.values():
            arrays, attrs = given(name, *case, DTYPES[dtype])
            check(device, name, arrays, attrs)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operands_in_any_order_and_out(device: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cp = device.cp
    for case in ("grouped", "padded", "depthwise"):
        for dnn in (device.dnn, None):
            monkeypatch.setattr(device, "dnn", dnn)
            arrays, attrs = given(name, *CASES[case], np.float16)
            last = [cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(cp.asarray(a), 1, -1)), -1, 1) if a.ndim > 1
                    else cp.asarray(a) for a in arrays]
            check(device, name, arrays, attrs, last)
            apart = []
            for a in arrays:
                room = cp.zeros((*a.shape[:-1], 2 * a.shape[-1] + 1), a.dtype)
                room[..., 1::2] = cp.asarray(a)
                apart.append(room[..., 1::2])
            found = check(device, name, arrays, attrs, apart)
            out = cp.empty(found.shape, found.dtype)
            assert check(device, name, arrays, attrs, apart, out=out) is out


def test_results_of_16_bits_have_channels_innermost(device: Any) -> None:
    if device.dnn is None:
        pytest.skip("no cuDNN here")
    for name, axis in (("conv", 1), ("conv_bias", 1), ("conv_input_grad", 1), ("conv_weight_grad", 3)):
        arrays, attrs = given(name, *CASES["padded"], bfloat16)
        found = check(device, name, arrays, attrs)
        assert found.strides[axis] == found.itemsize
    arrays, attrs = given("conv", *CASES["padded"], np.float32)
    assert check(device, "conv", arrays, attrs).flags.c_contiguous


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_graph_repeats_it(device: Any, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dnn in (device.dnn, None):
        monkeypatch.setattr(device, "dnn", dnn)
        arrays, attrs = given(name, *CASES["padded"], DTYPES[dtype])
        held = [device.cp.asarray(a) for a in arrays]
        run = TABLE[name].device.run
        run(device, *held, **attrs)
        device.stream.begin_capture()
        found = run(device, *held, **attrs)
        graph = device.stream.end_capture()
        held[0] *= 2
        graph.launch(device.stream)
        wanted = 2 * TABLE[name].kernel(np, *(a.astype(np.float64) for a in arrays), **attrs)
        if name == "conv_bias":
            wanted = wanted - arrays[2].astype(np.float64).reshape(-1, 1, 1)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found.get().astype(np.float64) / scale, wanted / scale, atol=CLOSE[dtype])


def emulated(device: Any) -> Any:
    """The emulation of cuDNN, if the device has it."""
    if not hasattr(device.libraries.cudnn, "REFUSED"):
        pytest.skip("the real cuDNN does not tell, and does not refuse on command")
    return device.libraries.cudnn


def test_a_graph_is_built_once_for_each_geometry_and_precision(device: Any) -> None:
    fake = emulated(device)
    arrays, attrs = given("conv", *CASES["padded"], np.float32)
    before = len(fake.MADE)
    check(device, "conv", arrays, attrs)
    check(device, "conv", arrays, attrs)
    assert len(fake.MADE) == before + 1
    assert {n.name for n in fake.MADE[-1].notes} == {
        "NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS", "TENSOR_CORE"}
    device.blas.tf32 = True
    check(device, "conv", arrays, attrs)
    assert len(fake.MADE) == before + 2
    assert "TENSOR_CORE" not in {n.name for n in fake.MADE[-1].notes}


def test_a_refused_graph_is_remembered_with_its_reason(device: Any) -> None:
    fake = emulated(device)
    before = len(fake.MADE)
    arrays, attrs = given("conv", *CASES["padded"], np.float32)
    fake.REFUSED.add("conv_fprop")
    try:
        check(device, "conv", arrays, attrs)
        check(device, "conv", arrays, attrs)
    finally:
        fake.REFUSED.clear()
    assert len(fake.MADE) == before + 1
    (key, reason), = device.dnn.refused.items()
    assert "conv_fprop" in reason and "fprop" in str(key)


def test_workspaces_grow_and_old_ones_stay(device: Any) -> None:
    dnn = device.dnn
    if dnn is None:
        pytest.skip("no cuDNN here")
    dnn._reserve(1000)
    first = dnn._workspaces[-1]
    dnn._reserve(10)
    assert dnn._workspaces[-1] is first
    dnn._reserve(5000)
    assert dnn._workspaces[-1] is not first and first in dnn._workspaces and dnn.workspace >= 6000
    dnn.close()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_of_every_sample(device: Any, name: str) -> None:
    row = TABLE[name]
    for sample in row.samples():
        rng = np.random.default_rng(3)
        arrays = [rng.normal(size=s).astype(np.float32) for s in sample.inputs]
        shapes, types = tuple(a.shape for a in arrays), tuple(a.dtype for a in arrays)
        if row.device.supports(shapes, types, sample.attrs):
            check(device, name, arrays, sample.attrs)
        else:
            assert not all(a.size for a in arrays)
