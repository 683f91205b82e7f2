"""Products with what follows them in one call: what they compute, and where programs have them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.runtime.cuda import epilogues, lt
from meshtape.runtime.cuda.epilogues import epilogue_pattern
from meshtape.runtime.op import lookup
from meshtape.runtime.overlap import Placed
from meshtape.runtime.program import Call

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 4e-6, "float64": 1e-13}
SIZES = [((6,), 5, 8), ((2, 3), 7, 16), ((1,), 4, 8), ((3,), 8, 3), ((4,), 9, 136), ((0,), 4, 8)]


def draw(shape, dtype, seed):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


@pytest.fixture(params=["cublasLt", "no algorithm", "no cublasLt"])
def way(request, device) -> Iterator[Any]:
    """The device, where cublasLt does what it is asked for, says that it cannot, or is not there."""
    from importlib import import_module
    if device.libraries.cublaslt is None and request.param != "no cublasLt":
        pytest.skip("nvmath-python is not installed")
    before = device.blas.lt
    if request.param == "no cublasLt":
        device.blas.lt = None
    unsupported = getattr(device.libraries.cublaslt, "UNSUPPORTED", None)
    if request.param == "no algorithm":
        if unsupported is None:
            pytest.skip("only the emulation can be told to have no algorithm")
        unsupported.update(getattr(import_module("meshtape.runtime.cuda.lt"), name) for name in dir(lt)
                           if name.isupper() and isinstance(getattr(lt, name), int))
        unsupported.discard(1)
    yield device
    device.blas.lt = before
    if unsupported is not None:
        unsupported.clear()


def near(found, want, dtype):
    name = np.dtype(dtype).name
    assert found.dtype == dtype and found.shape == want.shape
    tolerance = TOLERANCE[name]
    np.testing.assert_allclose(found.get().astype(float), want, rtol=tolerance, atol=5 * tolerance)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def slope(x, step=1e-6):
    return (gelu(x + step) - gelu(x - step)) / (2 * step)


@pytest.mark.parametrize("dtype", ["float32", "float16", BF16, "float64"], ids=str)
@pytest.mark.parametrize("lead, k, n", SIZES, ids=str)
def test_layers_and_their_gradients(way, lead, k, n, dtype):
    dev, cp = way, way.cp
    x, w, b = draw((*lead, k), dtype, 0), draw((n, k), dtype, 1), draw((n,), dtype, 2)
    g, w2 = draw((*lead, 4), dtype, 3), draw((4, n), dtype, 4)
    dx, dw, db, dg, dw2 = map(cp.asarray, (x, w, b, g, w2))
    x, w, b, g, w2 = (v.astype(float) for v in (x, w, b, g, w2))
    before = x @ w.T + b
    near(epilogues.linear_relu(dev, dx, dw, db), np.maximum(before, 0), dtype)
    y, mask = epilogues.linear_relu_mask(dev, dx, dw, db)
    near(y, np.maximum(before, 0), dtype)
    positive = y.get().astype(float) > 0
    back = np.where(positive, g @ w2, 0)
    total = back.reshape(-1, n).sum(0)
    near(epilogues.matmul_relu_grad(dev, dg, dw2, y, mask), back, dtype)
    for found, want in zip(epilogues.matmul_relu_grad_sum(dev, dg, dw2, y, mask), (back, total), strict=True):
        near(found, want, dtype)
    pre, y = epilogues.linear_gelu_both(dev, dx, dw, db)
    near(pre, before, dtype)
    near(y, gelu(before), dtype)
    near(epilogues.linear_gelu(dev, dx, dw, db), gelu(before), dtype)
    for found, want in zip(epilogues.weight_and_bias_grad(dev, dg, dx), (
            g.reshape(-1, 4).T @ x.reshape(-1, k), g.reshape(-1, 4).sum(0)), strict=True):
        near(found, want, dtype)


@pytest.mark.parametrize("dtype", ["float16", BF16], ids=str)
def test_gradients_of_gelu_with_their_sum(way, dtype):
    pre, g, w = draw((5, 16), dtype, 0), draw((5, 3), dtype, 1), draw((3, 16), dtype, 2)
    back = (g.astype(float) @ w.astype(float)) * slope(pre.astype(float))
    given = tuple(map(way.cp.asarray, (g, w, pre)))
    near(epilogues.matmul_gelu_grad(way, *given), back, dtype)
    for found, want in zip(epilogues.matmul_gelu_grad_sum(way, *given), (back, back.sum(0)), strict=True):
        near(found, want, dtype)


def test_results_are_written_where_they_are_asked_for(way):
    cp = way.cp
    x, w, b = (cp.asarray(draw(s, "float32", 0)) for s in ((4, 8), (16, 8), (16,)))
    room = cp.empty((4, 16), np.float32)
    assert epilogues.linear_relu(way, x, w, b, out=room) is room
    room = cp.empty((16, 8), np.float32)
    g = cp.asarray(draw((4, 16), "float32", 1))
    by_weight, by_bias = epilogues.weight_and_bias_grad(way, g, x, out=(room, None))
    assert by_weight is room and by_bias.shape == (16,)


def test_relu_passes_nan_on(way):
    """As the row does; a maximum that prefers numbers would hide a diverged run."""
    cp = way.cp
    x, w, b = (draw(s, "float32", 0) for s in ((4, 8), (16, 8), (16,)))
    x[1] = np.nan
    given = [cp.asarray(v) for v in (x, w, b)]
    for y in (epilogues.linear_relu(way, *given), epilogues.linear_relu_mask(way, *given)[0]):
        assert (np.isnan(y.get()).any(1) == [False, True, False, False]).all()


def test_every_epilogue_is_used(device):
    """In the emulation: no call above went step by step."""
    calls = getattr(device.libraries.cublaslt, "CALLS", None)
    if calls is None:
        pytest.skip("only the emulation counts")
    calls.clear()
    cp = device.cp
    x, w, b = (cp.asarray(draw(s, "float16", 0)) for s in ((4, 8), (16, 8), (16,)))
    g, w2 = cp.asarray(draw((4, 8), "float16", 1)), cp.asarray(draw((8, 16), "float16", 1))
    device.blas.linear(x, w, b)
    epilogues.linear_relu(device, x, w, b)
    y, mask = epilogues.linear_relu_mask(device, x, w, b)
    epilogues.linear_gelu(device, x, w, b)
    pre, _ = epilogues.linear_gelu_both(device, x, w, b)
    epilogues.matmul_relu_grad(device, g, w2, y, mask)
    epilogues.matmul_relu_grad_sum(device, g, w2, y, mask)
    epilogues.matmul_gelu_grad(device, g, w2, pre)
    epilogues.matmul_gelu_grad_sum(device, g, w2, pre)
    epilogues.weight_and_bias_grad(device, g, x)
    assert calls == [lt.BIAS, lt.RELU_BIAS, lt.RELU_AUX_BIAS, lt.GELU_BIAS, lt.GELU_AUX_BIAS, lt.DRELU,
                     lt.DRELU_BGRAD, lt.DGELU, lt.DGELU_BGRAD, lt.BGRADB]


def test_a_captured_layer_reads_what_is_there_when_it_is_replayed(way):
    cp = way.cp
    x, w, b = (cp.asarray(draw(s, "float16", 0)) for s in ((4, 8), (16, 8), (16,)))
    want = epilogues.linear_relu(way, x, w, b).get()
    out = cp.empty((4, 16), np.float16)
    way.stream.begin_capture()
    epilogues.linear_relu(way, x, w, b, out=out)
    other = epilogues.linear_relu(way, x, w, b + 1)
    graph = way.stream.end_capture()
    graph.launch(way.stream)
    np.testing.assert_array_equal(out.get(), want)
    x[...] = x * 2
    graph.launch(way.stream)
    np.testing.assert_array_equal(out.get(), epilogues.linear_relu(way, x, w, b).get())
    np.testing.assert_array_equal(other.get(), epilogues.linear_relu(way, x, w, b + 1).get())


# --- programs -----------------------------------------------------------------------------------------------

class Steps:
    """A program written down: each call gives the slot of its result."""

    def __init__(self, dtype, **inputs):
        self.types, self.steps, self.slots = {}, [], 0
        self.dtype = np.dtype(dtype)
        self.inputs = {name: self._slot((shape, self.dtype)) for name, shape in inputs.items()}

    def _slot(self, kind):
        self.slots += 1
        self.types[self.slots - 1] = kind
        return self.slots - 1

    def __call__(self, name, *ins, **attrs):
        op = lookup(name)
        attrs = {**op.attrs, **attrs}
        shape, = op.shape(*(self.types[s][0] for s in ins), **attrs)
        slot = self._slot((shape, self.dtype))
        call = Call("op", name, op.kernel, attrs, op, False, (self.dtype,), (shape,))
        self.steps.append(Placed(call, ins, (slot,), len(self.steps)))
        return slot

    def rewritten(self, *kept):
        """The steps afterwards, checked to read only what was made before, and to make all that is kept."""
        dead = set(range(self.slots)) - set(kept)
        external = {s: self.types[s] for s in self.inputs.values()}
        steps, slots = epilogue_pattern(self.steps, external, dead, self.slots)
        there = set(external)
        for step in steps:
            assert there.issuperset(step.ins)
            assert there.isdisjoint(step.outs)
            assert len(step.outs) == len(step.call.shapes) == len(step.call.dtypes)
            there.update(step.outs)
        assert there.issuperset(kept) and max(there) < slots
        return steps

    def names(self, *kept):
        return [step.call.name for step in self.rewritten(*kept)]

    def run(self, device, steps, values):
        """All slots after the steps."""
        slots = dict(values)
        for step in steps:
            args = [slots[s] for s in step.ins]
            call = step.call
            found = (call.function(device, *args) if call.on_device else
                     call.function(device.xp, *args, **call.attrs))
            slots.update(zip(step.outs, found if call.many else (found,), strict=True))
        return slots


def network(activation, dtype="float16", **attrs):
    """Two layers with an activation between, and all gradients; gives the kept slots too."""
    p = Steps(dtype, x=(6, 8), w=(16, 8), b=(16,), w2=(8, 16), b2=(8,), g=(6, 8))
    x, w, b, w2, b2, g = p.inputs.values()
    pre = p("linear", x, w, b)
    y = p(activation, pre, **attrs)
    out = p("linear", y, w2, b2)
    grad = p("matmul", g, w2)
    grad = p(f"{activation}_grad", grad, y if activation == "relu" else pre, **attrs)
    kept = [out, p("linear_weight_grad", g, y), p("sum", g, axis=(0,)), p("linear_weight_grad", grad, x),
            p("sum", grad, axis=(0,)), p("matmul", grad, w)]
    return p, kept


def test_relu_and_its_gradient_share_a_bit_mask():
    p, kept = network("relu")
    steps = p.rewritten(*kept)
    assert [s.call.name for s in steps] == ["linear relu", "linear", "matmul relu_grad sum",
                                            "linear_weight_grad sum", "linear_weight_grad", "matmul"]
    assert steps[0].outs[1] == p.slots == steps[2].ins[-1]
    assert steps[0].call.shapes[1] == (6, 16)


def test_gelu_keeps_what_was_before_it():
    p, kept = network("gelu", approximate="tanh")
    steps = p.rewritten(*kept)
    assert [s.call.name for s in steps] == ["linear gelu", "linear", "matmul gelu_grad sum",
                                            "linear_weight_grad sum", "linear_weight_grad", "matmul"]
    assert len(steps[0].outs) == 2


@pytest.mark.parametrize("activation, attrs", [("relu", {}), ("gelu", {"approximate": "tanh"})])
@pytest.mark.parametrize("dtype", ["float32", "float16", BF16], ids=str)
def test_a_program_computes_the_same_afterwards(way, activation, attrs, dtype):
    p, kept = network(activation, dtype, **attrs)
    values = {slot: draw(p.types[slot][0], dtype, slot) for slot in p.inputs.values()}
    plain = p.run(SimpleNamespace(xp=np), p.steps, values)
    found = p.run(way, p.rewritten(*kept), {slot: way.cp.asarray(v) for slot, v in values.items()})
    for slot in kept:
        near(found[slot], plain[slot].astype(float), dtype)


def test_what_is_read_elsewhere_or_kept_stays():
    p = Steps("float32", x=(6, 8), w=(16, 8), b=(16,))
    pre = p("linear", *p.inputs.values())
    y = p("relu", pre)
    assert p.names(y) == ["linear relu"]
    assert p.names(pre, y) == ["linear", "relu"]
    p("sum", pre, axis=(0,))
    assert p.names(y) == ["linear", "relu", "sum"]


def test_what_cublaslt_would_compute_otherwise_stays():
    assert network("gelu", approximate="none")[0].names()[:2] == ["linear", "gelu"]
    assert network("gelu", "float32", approximate="tanh")[0].names()[:2] == ["linear", "gelu"]
    assert network("relu", "float64")[0].names() == [s.call.name for s in network("relu")[0].steps]


def test_a_sum_that_is_needed_before_its_product_stays():
    p = Steps("float32", g=(6, 8), x=(6, 4))
    g, x = p.inputs.values()
    total = p("sum", g, axis=(0,))
    grad = p("linear_weight_grad", g, x)
    assert p.names(total, grad) == ["sum", "linear_weight_grad"]
    p = Steps("float32", g=(6, 8), x=(6, 4))
    grad = p("linear_weight_grad", g, x)
    sums = [p("sum", g, axis=(0,), keepdims=True), p("sum", g, axis=(1,)), p("sum", g)]
    assert p.names(grad, *sums) == ["linear_weight_grad", "sum", "sum", "sum"]


def test_the_emulation_has_the_arguments_of_the_real_binding():
    real = pytest.importorskip("nvmath.bindings.cublasLt", reason="nvmath-python is not installed")
    import inspect

    from emulator import cublaslt
    for name, function in inspect.getmembers(cublaslt, inspect.isfunction):
        if name.startswith("_") or function.__module__ != cublaslt.__name__:
            continue
        signature = getattr(real, name).__doc__.splitlines()[0]
        between = signature.partition("(")[2].partition(")")[0]
        arguments = [part.split()[-1] for part in between.split(",") if part]
        assert arguments == list(inspect.signature(function).parameters), signature
    assert real.matmul_heuristic_result_dtype == cublaslt.matmul_heuristic_result_dtype
    for widths, dtype_of in ((cublaslt.WIDTHS, real.get_matmul_desc_attribute_dtype),
                             (cublaslt.PREFERENCE_WIDTHS, real.get_matmul_preference_attribute_dtype)):
        for attribute, width in widths.items():
            assert np.dtype(dtype_of(attribute)).itemsize == np.dtype(width).itemsize
    for enum, names in ((real.Epilogue, ("BIAS", "RELU_BIAS", "RELU_AUX_BIAS", "GELU_BIAS", "GELU_AUX_BIAS",
                                         "DRELU", "DRELU_BGRAD", "DGELU", "DGELU_BGRAD", "BGRADB")),
                        (real.MatmulDescAttribute, ("TRANSA", "TRANSB", "EPILOGUE", "BIAS_POINTER")),
                        (real.MatmulPreferenceAttribute, ("MAX_WORKSPACE_BYTES", "REDUCTION_SCHEME_MASK"))):
        assert [getattr(enum, name) for name in names] == [getattr(lt, name) for name in names]
    assert real.MatmulDescAttribute.EPILOGUE_AUX_POINTER == lt.AUX_POINTER
    assert real.MatmulDescAttribute.EPILOGUE_AUX_LD == lt.AUX_LD
