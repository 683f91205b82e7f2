"""The losses of a training run are torch's to 1e-9, on any mesh and in any layout of the parameters."""

from __future__ import annotations

from typing import Any

import digits
import numpy as np
import pytest
from meshes import on
from spy import Spy

import meshtape as mt
from meshtape import nn, optim

S, R = mt.Shard, mt.Replicate
TWO_BY_TWO = {"data": 2, "model": 2}
# Megatron's pair: the first layer's outputs and the second layer's inputs are split alike, so that only the
# second layer's result is reduced.
MEGATRON = {"0.weight": {"model": S(0)}, "0.bias": {"model": S(0)}, "2.weight": {"model": S(1)}}
FSDP = {"*": {"data": S(0)}}
BOTH = {**FSDP, "0.weight": {"model": S(0), "data": S(1)}, "0.bias": {"model": S(0)},
        "2.weight": {"model": S(1), "data": S(0)}}
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]


def agree(losses: list[float]) -> None:
    np.testing.assert_allclose(losses, digits.LOSSES, rtol=1e-9, atol=0)


def lay_out(plan: dict[str, Any]) -> Any:
    return lambda net: nn.parallelize(net, plan)


def test_the_stored_losses_are_torchs() -> None:
    pytest.importorskip("torch")
    agree(digits.torch_losses())


@pytest.mark.parametrize("workers", [1, 2, 3, 4, TWO_BY_TWO, {"data": 3, "model": 2}], ids=str)
def test_losses_are_torchs_with_replicated_parameters(workers: Any) -> None:
    with on(workers):
        agree(digits.train())


@pytest.mark.parametrize(("axes", "plan"), [
    (TWO_BY_TWO, MEGATRON), ({"data": 1, "model": 3}, MEGATRON), ({"data": 2}, FSDP), ({"data": 3}, FSDP),
    (TWO_BY_TWO, BOTH)], ids=["Megatron 2x2", "Megatron 1x3", "FSDP 2", "FSDP 3", "FSDP and Megatron 2x2"])
def test_losses_are_torchs_with_split_parameters_and_everything_lies_as_asked(axes: Any, plan: Any) -> None:
    wanted = {name: {axis: R() for axis in axes} | plan.get(name, plan.get("*", {})) for name in NAMES}
    wanted = {n: {a: p if axes[a] > 1 else R() for a, p in w.items()} for n, w in wanted.items()}

    def look(net: nn.Module, opt: optim.Optimizer) -> None:
        for name, p in net.named_parameters():
            for tensor in (p, p.grad, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]):
                assert tensor.layout == wanted[name], name

    with on(axes):
        agree(digits.train(prepare=lay_out(plan), look=look))


def test_a_replicated_models_step_reduces_all_gradients_in_one_go() -> None:
    with on(2) as session:
        spy = Spy(session)
        digits.train(4)
        for moves in [b.moves for b in spy.take()][-2:]:
            # The other one is the count of the rows.
            assert moves.count(("sum", 0)) == 1 and len(moves) <= 2, moves


def test_a_sharded_models_step_gathers_weights_and_scatters_gradients() -> None:
    """With enough rows; for a hundred the planner would rather move activations than weights."""
    gather, scatter, count = ((0,), (-1,)), ("sum", 0), (("sum",), (-1,))
    with on(2) as session:
        spy = Spy(session)
        digits.train(4, batch=4000, prepare=lay_out(FSDP))
        moves = spy.take()[-1].moves
        assert moves.count(scatter) == 1, moves         # all gradients in one bucket
        # Backward needs two of the weights, which may be gathered again.
        assert len(NAMES) <= moves.count(gather) <= len(NAMES) + 2, moves
        assert set(moves) <= {gather, scatter, count}, moves


def test_a_megatron_pair_communicates_once() -> None:
    with on({"model": 2}) as session:
        net = nn.parallelize(digits.model(), MEGATRON)
        mt.synchronize()
        spy = Spy(session)
        with mt.no_grad():
            net(mt.tensor(digits.data()[0][:32]))
        mt.synchronize()
        moves = [m for b in spy.take() for m in b.moves if m[0] != (-1,)]       # cutting is no communication
        assert len(moves) == 1 and moves[0][0] == ("sum",), moves


def test_parameters_may_be_laid_out_anew_in_the_middle_of_training() -> None:
    """Optimizer states follow their parameters; the losses do not notice."""
    plans = iter([MEGATRON, FSDP, BOTH, {"*": {"data": R()}}])

    def look(net: nn.Module, opt: optim.Optimizer) -> None:
        if opt.state[next(iter(net.parameters()))]["step"] % 12 == 0:
            nn.parallelize(net, next(plans))

    with on(TWO_BY_TWO):
        agree(digits.train(look=look))
