"""What was saved comes back, from any mesh to any mesh; what is no checkpoint is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import meshtape as mt
from meshtape import nn, optim


def model() -> Any:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def train(net: Any, optimizer: Any, steps: int) -> None:
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(mt.tensor(x, layout=mt.Shard(0))), mt.zeros((7, 3))).backward()
        optimizer.step()


def test_training_goes_on_from_a_file_on_another_mesh(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    mt.init(workers=2, backend="local")
    net = nn.parallelize(model(), {"0.weight": mt.Shard(0), "3.weight": mt.Shard(1)})
    optimizer = optim.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, 3)
    mt.save({"model": net, "optimizer": optimizer, "epoch": 3}, path)
    train(net, optimizer, 3)
    wanted = {k: v.numpy() for k, v in net.state_dict().items()}
    mt.shutdown()
    mt.init(workers=3, backend="local")
    again, found = model(), mt.load(path)
    optimizer = optim.AdamW(again.parameters(), lr=1.0)
    again.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    assert found["epoch"] == 3 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    train(again, optimizer, 3)
    for name, value in again.state_dict().items():
        np.testing.assert_allclose(value.numpy(), wanted[name], rtol=2e-4, atol=1e-6)


def test_nested_structure_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "c"
    obj = {"a": {"b": [1, 2.5, None, True, "text"], "t": (1, (2,))}, "a.b": np.arange(3),
           7: {"x": np.float32(2)}, "inf": float("inf"), "empty": {}, "none": np.zeros((0, 3)),
           "tensor": mt.tensor([[1.0, 2.0]]), "a.b.0": mt.tensor(3), "again": {"": np.ones(2)}}
    mt.save(obj, path, {"note": "hello"})
    found = mt.load(path)
    assert list(found) == list(obj)
    assert found["a"] == obj["a"] and found["inf"] == float("inf") and found["empty"] == {}
    assert found["a.b"].tolist() == [0, 1, 2] and found["a.b"].dtype == np.int64
    assert found[7]["x"].shape == () and found[7]["x"] == 2 and found["a.b.0"] == 3
    assert found["none"].shape == (0, 3) and found["tensor"].tolist() == [[1.0, 2.0]]
    assert mt.load_metadata(path) == {"note": "hello"}


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    path = tmp_path / "c"
    names = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
             "float32", "float64", "complex64", "complex128", mt.bfloat16.name]
    rng = np.random.default_rng(0)
    arrays = {n: (rng.normal(size=(3, 4)) * 10 + (1j if "complex" in n else 0)).astype(
        mt.bfloat16 if n == "bfloat16" else n, copy=False) for n in names if n[0] != "u"}
    arrays.update({n: rng.integers(0, 200, (3, 4)).astype(n) for n in names if n[0] == "u"})
    arrays.update({"scalar": np.array(2 + 1j), "transposed": arrays["float64"].T,
                   "big": np.arange(3, dtype=">f4")})
    tensors = {n: mt.tensor(a) for n, a in arrays.items()}
    for obj in (arrays, tensors):
        mt.save(obj, path)
        found = mt.load(path)
        for n, a in arrays.items():
            assert found[n].dtype == a.dtype.newbyteorder("=") and found[n].shape == a.shape, n
            np.testing.assert_array_equal(found[n], a)


def test_bfloat16_can_be_read_first_thing(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    mt.save({"w": mt.ones(3, dtype="bfloat16")}, tmp_path / "c")
    code = f"import meshtape as mt; print(mt.load({str(tmp_path / 'c')!r})['w'].dtype)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "bfloat16\n"


def test_files_of_and_for_others(tmp_path: Path) -> None:
    net = model()
    mt.save(net, tmp_path / "ours")
    plain = load_file(tmp_path / "ours")
    assert set(plain) == set(net.state_dict())
    save_file(plain, tmp_path / "theirs")
    other = model()
    other.load_state_dict(mt.load(tmp_path / "theirs"))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    mt.save({"w": np.ones(3)}, path)

    def broken(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        mt.save({"w": np.zeros(3)}, path)
    assert mt.load(path)["w"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["c"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    mt.save({"w": np.arange(1000.0)}, path)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[:200], whole[:-8], b"\xff" * 50, whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(mt.StateError, match="no checkpoint, or a damaged one"):
            mt.load(path)
    for entry in ("[", "{}", '{"format": 1, "tree": {"array": "v"}}', '{"format": 1, "tree": {"what": 1}}',
                  "3"):
        save_file({"w": np.ones(2)}, path, metadata={"meshtape": entry})
        with pytest.raises(mt.StateError, match="damaged structure"):
            mt.load(path)
    save_file({"w": np.ones(2)}, path, metadata={"meshtape": '{"format": 2}'})
    with pytest.raises(mt.StateError, match="format 2"):
        mt.load(path)
    with pytest.raises(mt.StateError, match="no checkpoint"):
        mt.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        mt.load(tmp_path / "missing")


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    wrong: list[tuple[Any, str]] = [({"f": {"g": len}}, "f.g is a builtin"),
                                    ({"s": np.array(["x"])}, "dtype <U1"),
                                    ([1, 2], "a checkpoint is a dict"), ({(1, 2): 3}, "key"),
                                    (mt.ones(2), "dict")]
    for obj, text in wrong:
        with pytest.raises(mt.StateError, match=text):
            mt.save(obj, path)
    with pytest.raises(mt.StateError, match="metadata"):
        mt.save({}, path, {"epoch": 3})
    assert not path.exists()
    mt.save({}, path)
    assert mt.load(path) == {}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    mt.save(nn.Linear(6, 5), tmp_path / "c")
    net = model()
    before = net[0].weight.numpy()
    with pytest.raises(mt.StateError, match=r"missing: 0\.weight.*unexpected: weight, bias.*nothing was "
                                            r"loaded"):
        net.load_state_dict(mt.load(tmp_path / "c"))
    np.testing.assert_array_equal(net[0].weight.numpy(), before)
