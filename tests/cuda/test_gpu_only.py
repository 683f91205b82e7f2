"""What takes a real GPU to know: large sizes, whether libraries do what they are asked for, programs as users
start them. The same programs run, small, on the emulation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import digits
import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim
from meshtape.cluster import launch
from meshtape.nn import functional as F
from meshtape.runtime.collectives.choice import SHARING_NCCL, SHARING_VARIABLE, version_text
from meshtape.runtime.gpu import gpu_here
from meshtape.scheduler import current

no_gpu = pytest.mark.skipif(bool(gpu_here()[1]), reason=f"no GPU: {gpu_here()[1]}")


@pytest.fixture(autouse=True)
def no_session() -> Iterator[None]:
    yield
    mt.shutdown()


class Start:
    """start(**options) is mt.init(devices="gpu", **options); `real`: on a real GPU. `total`: its bytes."""

    def __init__(self, real: bool, total: int) -> None:
        self.real, self.total = real, total

    def __call__(self, **options: Any) -> Any:
        mt.shutdown()
        return mt.init(devices="gpu", **options)


@pytest.fixture
def start(opens: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    real = request.node.callspec.params["opens"] == "cuda"
    if not real:
        monkeypatch.setattr(launch, "gpu_here", lambda: ("Emulated", ""))
        monkeypatch.setattr(launch, "device_count", lambda: 1)
        monkeypatch.setattr(launch, "open_device", opens)
    device = opens()
    total = device.cp.cuda.runtime.memGetInfo()[1]
    device.close()
    yield Start(real, total)
    mt.shutdown()


# --- programs ---------------------------------------------------------------------------------------------

def test_digits_are_learned_as_torch_learned_them(start: Start) -> None:
    start()
    steps = digits.STEPS if start.real else 8
    np.testing.assert_allclose(digits.train(steps), digits.LOSSES[:steps], rtol=1e-8)
    assert mt.stats()["graphs"][0]["replays"] >= steps - 4


def test_threads_that_share_a_gpu_learn_the_same(start: Start) -> None:
    steps = digits.STEPS if start.real else 6
    with start(workers=2, backend="local") as mesh:
        assert mesh.devices == ["gpu0", "gpu0"]
        np.testing.assert_allclose(digits.train(steps), digits.LOSSES[:steps], rtol=1e-8)
        assert mt.stats()["links"]["data"]["kind"] == "staged+threads"


def everything(steps: int) -> list[np.ndarray]:
    """Losses and parameters of a network with an op of every kind whose sums could come in varying order."""
    mt.manual_seed(5)
    rng = np.random.default_rng(5)
    words, length, width = 50, 12, 16
    token = nn.Embedding(words, width)
    body = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
    look = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    walk, out = nn.LSTM(width, width, batch_first=True), nn.Linear(width, words)
    params = [p for part in (token, body, look, walk, out) for p in part.parameters()]
    opt = optim.AdamW(params, lr=1e-3)
    losses = []
    for _ in range(steps):
        ids = mt.tensor(rng.integers(0, words, (4, length)))
        x = body(token(ids))
        seen = look(x.reshape(4, 1, length, width)).mean()
        hidden, _ = walk(x)
        loss = F.cross_entropy(out(hidden).reshape(-1, words), ids.reshape(-1)) + seen
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        losses.append(loss)
    return [t.numpy() for t in (*losses, *params)]


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_the_same_program_gives_the_same_bits(start: Start, low: bool) -> None:
    """No atomics among the sums, and no algorithm that varies."""
    steps = 20 if start.real else 4
    found = []
    for _ in range(3 if start.real else 2):
        start()
        with mt.autocast(mt.bfloat16, enabled=low):
            found.append(everything(steps))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_without_memory_the_error_says_who_holds_it_and_the_session_goes_on(start: Start) -> None:
    start(memory_fraction=0.02)
    n = int(start.total * 0.03) // 4
    small = mt.ones((1000,))
    huge = mt.zeros((n,)) if start.real else mt.zeros((n // 1000, 1000))
    with pytest.raises(mt.WorkerError, match=r"no memory for its result.*float32 \(1000,\)"):
        huge.numpy()
    assert small.sum().item() == 1000


def test_an_index_out_of_range_does_not_end_the_session(start: Start) -> None:
    """It is not reported either, since that would mean to wait for the device."""
    start()
    weight, logits = mt.ones((5, 4)), mt.ones((3, 4))
    F.embedding(mt.tensor([0, 7, -1]), weight).sum().item()
    F.cross_entropy(logits, mt.tensor([0, 9, 1])).item()
    assert (weight * 2.0).sum().item() == 40.0


# --- sizes: (on a GPU, emulated) --------------------------------------------------------------------------

def rand(*shape: int, seed: int = 0) -> Any:
    return mt.tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32), requires_grad=True)


def forward_and_back(function: Callable[..., Any], *inputs: Any) -> list[np.ndarray]:
    out = function(*inputs)
    grads = mt.grad((out * mt.cos(mt.arange(out.shape[-1], dtype=mt.float32))).sum(), [
        x for x in inputs if x.requires_grad])
    return [out.numpy(), *(g.numpy() for g in grads)]


def wide_rows(big: bool) -> list[np.ndarray]:
    x = rand(48, 128256 if big else 700)
    return [*forward_and_back(lambda x: F.softmax(x, -1), x),
            *forward_and_back(lambda x: F.log_softmax(x, -1), x)]


def many_rows(big: bool) -> list[np.ndarray]:
    n = 1 << 18 if big else 300
    x, w, b = rand(n, 48), rand(48, seed=1), rand(48, seed=2)
    return forward_and_back(lambda x, w, b: F.layer_norm(x, (48,), w, b), x, w, b)


def losses_of_words(big: bool) -> list[np.ndarray]:
    n, words = (2048, 50257) if big else (20, 130)
    x = rand(n, words)
    y = mt.tensor(np.random.default_rng(3).integers(0, words, n))
    return forward_and_back(lambda x: F.cross_entropy(x, y, reduction="none"), x)


def gathered_words(big: bool) -> list[np.ndarray]:
    n, words, width = (1 << 17, 5000, 96) if big else (60, 9, 12)
    ids = mt.tensor(np.random.default_rng(3).integers(0, words, n))
    return forward_and_back(lambda w: F.embedding(ids, w), rand(words, width))


def sums_over_each_dimension(big: bool) -> list[np.ndarray]:
    x = rand(*((257, 515, 129) if big else (7, 11, 9)))
    return [t.numpy() for axis in (0, 1, 2, (0, 2), None)
            for t in (x.sum(axis=axis), x.max(axis=axis), (x * x + 1.0).mean(axis=axis))]


def attended(big: bool) -> list[np.ndarray]:
    q, k, v = (rand(*((2, 4, 512, 64) if big else (1, 2, 9, 8)), seed=s) for s in range(3))
    return forward_and_back(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)


def convolved(big: bool) -> list[np.ndarray]:
    x, w = rand(*((8, 32, 28, 28) if big else (2, 3, 7, 6))), rand(*((64, 32, 3, 3) if big else (4, 3, 3, 3)))
    return forward_and_back(lambda x, w: F.conv2d(x, w, stride=2, padding=1), x, w)


def pooled(big: bool) -> list[np.ndarray]:
    x = rand(*((16, 64, 56, 56) if big else (2, 3, 8, 8)))
    return [*forward_and_back(lambda x: F.max_pool2d(x, 3, 2, 1), x),
            *forward_and_back(lambda x: F.avg_pool2d(x, 2), x)]


def sorted_rows(big: bool) -> list[np.ndarray]:
    x = rand(*((300, 20000) if big else (5, 40)))
    return [t.numpy() for t in (mt.sort(x), mt.argsort(x), *mt.topk(x, 7), mt.argmax(x, axis=-1))]


def stepped(big: bool) -> list[np.ndarray]:
    """More parameters than one launch takes."""
    params = [nn.Parameter(rand(*shape, seed=k)) for k, shape in enumerate(
        ((1000, 777), (3,), ()) if big else ((9, 7), (3,), ())) for _ in range(60 if big else 5)]
    for made in (optim.AdamW(params, lr=1e-2), optim.SGD(params, lr=1e-2, momentum=0.9)):
        for _ in range(3):
            made.zero_grad()
            sum((p * p).sum() for p in params).backward()
            made.step()
    return [p.numpy() for p in params[::7]]


PROGRAMS = (wide_rows, many_rows, losses_of_words, gathered_words, sums_over_each_dimension, attended,
            convolved, pooled, sorted_rows, stepped)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_large_arrays_come_out_as_on_a_cpu(start: Start, program: Callable[[bool], Any]) -> None:
    mt.shutdown()
    wanted = program(start.real)
    start()
    for got, want in zip(program(start.real), wanted, strict=True):
        if want.dtype.kind in "iu":
            np.testing.assert_array_equal(got, want)
        else:
            scale = max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(got / scale, want / scale, rtol=1e-4, atol=2e-5)


def drawn(big: bool) -> list[np.ndarray]:
    mt.manual_seed(17)
    n = 1 << 22 if big else 2000
    return [t.numpy() for t in (
        mt.random.normal(shape=(n,)), mt.random.normal(shape=(n // 4,), dtype=mt.float64),
        mt.random.uniform(shape=(n,)), mt.random.randint(-5, 1 << 40, shape=(n,)),
        F.dropout(mt.ones((n // 7, 7)), 0.3))]


def test_many_random_numbers_have_the_bits_of_a_cpu(start: Start) -> None:
    mt.shutdown()
    wanted = drawn(start.real)
    start()
    for got, want in zip(drawn(start.real), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_more_elements_than_32_bits_count(start: Start) -> None:
    """Every 2**20th element is looked at, and the sum of all."""
    if start.total < 40 << 30:
        pytest.skip("the GPU has less than 40 GiB")
    start()
    n, step = ((1 << 31) + 4096, 1 << 20) if start.real else (5000, 100)
    x = mt.ones((n,), dtype=mt.int8)
    x = mt.concat([x[:-1], mt.zeros((1,), dtype=mt.int8)])
    y = x * 3 - 1                                               # one kernel
    assert y[::step].numpy().tolist() == [2] * len(range(0, n, step)) and y[-1].item() == -1
    assert y.sum().item() == 2 * (n - 1) - 1
    assert x.astype(mt.float32).sum().item() == pytest.approx(n - 1, rel=1e-6)


# --- libraries --------------------------------------------------------------------------------------------

def device_here() -> Any:
    """The device of the worker in this process."""
    return current.session().mesh._worker.device            # type: ignore[attr-defined]


def test_cudnn_takes_convolutions_and_attention_of_ordinary_networks(start: Start) -> None:
    """What it refuses is computed another way, right and slowly, so nobody would know."""
    start()
    dnn = device_here().dnn
    if dnn is None:
        pytest.skip("cuDNN, or its frontend, is not installed")
    with mt.autocast(mt.bfloat16):
        convolved(start.real)
        forward_and_back(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
                         rand(*((2, 4, 256, 64) if start.real else (1, 2, 16, 8))))
    assert dnn.refused == {} and len(dnn._plans) >= 5       # two forward, three back


def test_cublaslt_takes_layers_with_activations(start: Start) -> None:
    start()
    lt = device_here().blas.lt
    if lt is None:
        pytest.skip("nvmath-python is not installed")
    n = 256 if start.real else 16
    for activation in (nn.ReLU(), nn.GELU(approximate="tanh")):
        net = nn.Sequential(nn.Linear(n, 2 * n), activation, nn.Linear(2 * n, n))
        with mt.autocast(mt.bfloat16):
            net(rand(n, n)).sum().backward()
        mt.synchronize()
    refused = [problem for problem, algorithm in lt._found.items() if algorithm is None]
    assert refused == [] and len(lt._found) >= 4


# --- GPUs alone -------------------------------------------------------------------------------------------

@no_gpu
@pytest.mark.gpu
def test_torch_and_meshtape_share_device_memory() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    mt.init(devices="gpu")
    x = mt.tensor(np.arange(12, dtype=np.float32).reshape(3, 4)) * 2.0
    there = torch.from_dlpack(x)
    assert there.is_cuda and there.data_ptr() == mt.as_cupy(x).data.ptr
    assert torch.equal(there.cpu(), torch.arange(12.0).reshape(3, 4) * 2)
    for given in (torch.randn(5, 6, device="cuda"), torch.randn(6, 5, device="cuda").T.bfloat16()):
        for made in (mt.from_dlpack(given), mt.tensor(given)):
            assert made.device == "gpu0" and str(given.dtype) == f"torch.{made.dtype}"
            np.testing.assert_array_equal(made.numpy().astype(np.float32), given.float().cpu().numpy())
    # A kernel of torch's that is still under way when its result is handed over, and the other way round.
    big = torch.randn(4096, 4096, device="cuda")
    product = big @ big
    np.testing.assert_array_equal((mt.from_dlpack(product) * 1.0).numpy(), product.cpu().numpy())
    y = mt.from_dlpack(big) @ mt.from_dlpack(big)
    np.testing.assert_array_equal(torch.from_dlpack(y).cpu().numpy(), y.numpy())


@no_gpu
@pytest.mark.gpu
def test_what_is_said_about_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    import cupy
    assert mt.device_count() == cupy.cuda.runtime.getDeviceCount() >= 1
    mt.doctor()
    text = capsys.readouterr().out
    assert "GPU 0: " in text and "compute capability" in text and "NVIDIA driver" in text
    with mt.init(devices="gpu") as mesh:
        assert mesh.devices == ["gpu0"] and mt.ones(3).device == "gpu0"


@no_gpu
@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_two_processes_on_one_gpu_exchange_by_nccl() -> None:
    """Every verb and dtype, in the order that random cases bring. It says nothing about speed."""
    from cupy.cuda import nccl
    if not nccl.available:
        pytest.skip("NCCL is not installed")
    if nccl.get_version() < SHARING_NCCL:
        pytest.skip(f"NCCL {version_text(nccl.get_version())}: ranks can share a GPU from "
                    f"{version_text(SHARING_NCCL)} on")
    program, pipe = str(Path(__file__).with_name("nccl_rank.py")), subprocess.PIPE
    ranks: list[Any] = [subprocess.Popen(
        [sys.executable, program, str(rank), "2"], stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        env={**os.environ, SHARING_VARIABLE: "1"}) for rank in range(2)]
    try:
        addresses = ", ".join(process.stdout.readline().strip() for process in ranks)
        for process in ranks:                   # all at once: they wait for each other
            process.stdin.write(f"[{addresses}]\n")
            process.stdin.flush()
        done = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for out, err in done:
        assert out.strip() == "100 cases", err
