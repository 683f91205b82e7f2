"""Modules keep their parameters, state and modes as PyTorch's do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from beside_torch import torch

import meshtape as mt
from meshtape import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.register_buffer("count", mt.zeros((), dtype="int64"))
        self.register_buffer("scratch", mt.ones(2), persistent=False)
        self.scale = nn.Parameter(mt.ones(3))
        self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.ReLU()])
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": self.first})

    def forward(self, x: Any) -> Any:
        x = self.first(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.heads["a"](x)


class TorchBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False), torch.nn.ReLU()])
        self.heads = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 1), "b": self.first})


def test_names_and_order_are_torch_s() -> None:
    ours, theirs = Block(), TorchBlock()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for method in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        assert [n for n, _ in getattr(ours, method)()] == [n for n, _ in getattr(theirs, method)()], method
    assert [n for n, _ in ours.named_parameters("p", recurse=False)] == ["p.scale"]
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert ours.get_submodule("layers.0") is ours.layers[0] and ours.get_submodule("") is ours


def test_repr_is_torch_s() -> None:
    t = torch.nn
    ours = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Sequential(nn.Linear(3, 4), nn.GELU()),
                         nn.LayerNorm(4), nn.RMSNorm(4), nn.Flatten(), nn.Dropout(0.1), nn.LeakyReLU(),
                         nn.Softmax(dim=1), nn.ELU(), nn.Identity(), nn.ModuleList(), nn.CrossEntropyLoss())
    theirs = t.Sequential(t.Embedding(5, 3, padding_idx=1), t.Sequential(t.Linear(3, 4), t.GELU()),
                          t.LayerNorm(4), t.RMSNorm(4), t.Flatten(), t.Dropout(0.1), t.LeakyReLU(),
                          t.Softmax(dim=1), t.ELU(), t.Identity(), t.ModuleList(), t.CrossEntropyLoss())
    plain = repr(theirs).replace(", inplace=False", "").replace(", bias=True)\n  (3)", ")\n  (3)")
    assert repr(ours) == plain
    assert repr(nn.Parameter(mt.ones(2))).startswith("Parameter containing:\ntensor([1., 1.]")


def test_state_goes_into_another_model_of_any_layout(workers: int) -> None:
    source = Block()
    target = nn.parallelize(Block(), {"*.weight": mt.Shard(0)})
    layouts = {n: p.layout for n, p in target.named_parameters()}
    for state in (source.state_dict(), {k: v.numpy() for k, v in source.state_dict().items()}):
        assert target.load_state_dict(state) == ([], [])
        for (name, a), b in zip(source.named_parameters(), target.parameters(), strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
            assert b.layout == layouts[name] and b.requires_grad and b.is_leaf
    assert target.heads["b"].weight is target.first.weight


def test_a_state_dict_is_a_snapshot() -> None:
    net = nn.Linear(2, 2)
    state = net.state_dict()
    before = net.weight.numpy()
    with mt.no_grad():
        net.weight.fill_(7)
    np.testing.assert_array_equal(state["weight"].numpy(), before)
    assert not state["weight"].requires_grad


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {k: v.numpy() for k, v in net.state_dict().items()}
    good = {k: np.zeros(v.shape) for k, v in before.items()}
    wrong = [({**good, "1.bias": np.zeros(3)}, r"1\.bias has shape \(3,\), the model needs \(2,\)"),
             ({k: v for k, v in good.items() if k != "0.bias"}, r"missing: 0\.bias"),
             ({**good, "2.weight": np.zeros(3), "x": np.zeros(1)}, r"unexpected: 2\.weight, x"),
             ({**good, "0.bias": np.array(["a", "b", "c"])}, "not numeric"), ([1], "dict")]
    for state, text in wrong:
        with pytest.raises(mt.StateError, match=text):
            net.load_state_dict(state)
    with pytest.raises(mt.StateError, match="shape"):
        net.load_state_dict({"0.bias": np.zeros(5)}, strict=False)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    found = net.load_state_dict({"0.bias": np.zeros(3), "y": np.zeros(3)}, strict=False)
    assert found.missing_keys == ["0.weight", "1.weight", "1.bias"] and found.unexpected_keys == ["y"]
    assert net[0].bias.numpy().tolist() == [0, 0, 0] and net[0].bias.dtype == np.float32


def attributes_are_their_groups(module: nn.Module) -> bool:
    return all(getattr(module, name) is value and module.__dict__[name] is value
               for group in (module._parameters, module._buffers, module._modules)
               for name, value in group.items())


def test_attributes_and_groups_hold_the_same() -> None:
    net = Block()
    assert all(attributes_are_their_groups(m) for m in net.modules())
    net.first = nn.Linear(4, 3)
    net.scale = None
    net.count = mt.ones((), dtype="int64")
    net.layers[1] = nn.GELU()
    del net.heads["b"], net.scratch
    net.register_parameter("bias", nn.Parameter(mt.ones(2)))
    assert all(attributes_are_their_groups(m) for m in net.modules())
    assert net.scale is None and not hasattr(net, "scratch") and not hasattr(net.heads, "b")
    assert list(net.state_dict()) == ["bias", "count", "first.weight", "first.bias", "layers.0.weight",
                                      "heads.a.weight", "heads.a.bias"]
    net.bias = nn.ReLU()
    assert "bias" not in net._parameters and attributes_are_their_groups(net)


def test_a_copy_shares_parameters_and_not_attributes() -> None:
    net = Block()
    other = copy.copy(net)
    assert other.first is net.first and list(other.parameters()) == list(net.parameters())
    other.first = nn.Linear(4, 3)
    del other.scale
    assert net.first is not other.first and "scale" in dict(net.named_parameters())
    deep = copy.deepcopy(net)
    assert deep.scale is not net.scale and deep.heads["b"] is deep.first
    assert all(attributes_are_their_groups(m) for n in (net, other, deep) for m in n.modules())


def test_modes_and_gradients() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)))
    assert net.eval() is net and not any(m.training for m in net.modules())
    assert net.train() is net and all(m.training for m in net.modules())
    net(mt.ones((3, 2))).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad(set_to_none=False)
    assert not any(p.grad.numpy().any() for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters()) and not net(mt.ones((3, 2))).requires_grad
    names: list[str] = []
    net.apply(lambda m: names.append(type(m).__name__))
    assert names == ["Linear", "Dropout", "Sequential", "Sequential"]


def test_conversion_keeps_parameters_and_their_gradients() -> None:
    net = Block()
    net(mt.ones((2, 4))).sum().backward()
    ids = [id(p) for p in net.parameters()]
    assert net.double() is net
    assert [id(p) for p in net.parameters()] == ids
    assert all(p.dtype == np.float64 and p.is_leaf for p in net.parameters())
    assert net.first.weight.grad.dtype == net.scratch.dtype == np.float64 and net.count.dtype == np.int64
    assert net.float().to("float16").scale.dtype == np.float16
    with pytest.raises(mt.DTypeError, match="int32"):
        net.to("int32")


def test_attributes() -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"Linear.weight is a parameter .* wrap it in nn\.Parameter"):
        net.weight = mt.ones((3, 2))
    net.bias = None
    assert list(dict(net.named_parameters())) == ["weight"] and net(mt.ones(2)).shape == (3,)
    net.weight = nn.Parameter(mt.ones((3, 2)))
    net.bias = nn.Parameter(mt.ones(3))
    assert list(net.state_dict()) == ["weight", "bias"]
    net.extra = nn.Parameter(mt.ones(1))
    assert "extra" in dict(net.named_parameters()) and "extra" in dir(net)
    del net.extra
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'extra'"):
        _ = net.extra
    with pytest.raises(KeyError, match="dots"):
        net.register_buffer("a.b", mt.ones(1))
    with pytest.raises(KeyError, match="forward"):
        net.add_module("forward", nn.Identity())

    class Early(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(1, 1)

    with pytest.raises(AttributeError, match=r"super\(\).__init__\(\)"):
        Early()
    with pytest.raises(NotImplementedError, match="forward"):
        nn.Module()(1)


def test_containers() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert len(net) == 3 and isinstance(net[1], nn.ReLU) and net[-1] is net[2] and len(net[:2]) == 2
    assert [type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear]
    net.append(nn.Tanh())
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    named = nn.Sequential({"a": nn.Linear(2, 2), "b": nn.ReLU()})
    assert list(named.state_dict()) == ["a.weight", "a.bias"] and isinstance(named.b, nn.ReLU)
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(12))
    assert list(dict(many.named_children())) == [str(i) for i in range(12)] and len(many[3:5]) == 2
    many[2] = nn.Identity()
    assert isinstance(many[2], nn.Identity)
    table = nn.ModuleDict({"x": nn.Identity()})
    table["y"] = nn.ReLU()
    del table["x"]
    assert list(table) == list(table.keys()) == ["y"] and "y" in table and len(table) == 1
    assert [n for n, _ in table.items()] == ["y"] and isinstance(next(iter(table.values())), nn.ReLU)
    with pytest.raises(TypeError, match="Sequential holds modules"):
        nn.Sequential(3)


def test_a_copied_model_is_another_model() -> None:
    net = Block()
    twin = copy.deepcopy(net)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in twin.parameters()}
    assert twin.heads["b"] is twin.first and all(isinstance(p, nn.Parameter) for p in twin.parameters())
    with mt.no_grad():
        twin.scale.fill_(5)
    assert net.scale.numpy().tolist() == [1, 1, 1]


# --- layouts ----------------------------------------------------------------------------------------------

def test_parallelize_lays_out_by_pattern_and_changes_no_result() -> None:
    x = np.random.default_rng(0).normal(size=(5, 4))
    mt.manual_seed(3)
    dense = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).double()
    out = dense(mt.tensor(x))
    out.sum().backward()
    wanted = [out.numpy()] + [p.grad.numpy() for p in dense.parameters()]
    mt.shutdown()
    mt.init(workers=4, backend="local", mesh={"data": 2, "model": 2})
    mt.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).double()
    plan = {"*": mt.Replicate(), "0.*": {"model": mt.Shard(0)}, "2.weight": {"model": mt.Shard(1)}}
    assert nn.parallelize(net, plan) is net
    assert net[0].weight.layout == {"data": mt.Replicate(), "model": mt.Shard(0)} and net[0].weight.is_leaf
    assert net[2].weight.layout["model"] == mt.Shard(1) and net[2].bias.layout["model"] == mt.Replicate()
    out = net(mt.tensor(x, layout=mt.Shard(0)))
    out.sum().backward()
    for got, w in zip([out, *(p.grad for p in net.parameters())], wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), w, rtol=1e-12, atol=1e-14)
    nn.parallelize(net, {"0.weight": mt.Shard(1)})
    assert net[0].weight.grad.layout == net[0].weight.layout
    np.testing.assert_allclose(net[0].weight.grad.numpy(), wanted[1], rtol=1e-12, atol=1e-14)


def test_parallelize_refuses_what_matches_nothing_or_does_not_fit() -> None:
    net = nn.Linear(4, 6)
    with pytest.raises(mt.LayoutError, match=r"'1\.weight' matches no .* this model has weight, bias"):
        nn.parallelize(net, {"weight": mt.Shard(0), "1.weight": mt.Shard(0)})
    with pytest.raises(mt.LayoutError, match=r"bias of shape \(6,\)"):
        nn.parallelize(net, {"*": mt.Shard(1)})
    with pytest.raises(mt.LayoutError, match="axis 'model'"):
        nn.parallelize(net, {"*": {"model": mt.Shard(0)}})
