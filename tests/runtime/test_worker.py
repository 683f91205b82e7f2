"""The worker: generated programs equal interpreted ones to the bit, reuse is invisible, failures are values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from table import make_inputs, samples

import meshtape as mt
from meshtape.autograd import apply
from meshtape.runtime.errors import WorkerError
from meshtape.runtime.op import TABLE
from meshtape.scheduler import current


@pytest.fixture(autouse=True)
def fresh() -> Any:
    mt.shutdown()
    yield
    mt.shutdown()


def worker() -> Any:
    return current.session().mesh._worker  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n, op in TABLE.items() if samples(op)])
def test_generated_programs_give_the_interpreters_bits(name: str) -> None:
    """Three runs of one batch: the first is interpreted, the others are generated functions."""
    op, rng = TABLE[name], np.random.default_rng(0)
    for sample in samples(op)[:8]:
        arrays = make_inputs(sample, rng)

        def batch(arrays: list[Any] = arrays, sample: Any = sample) -> list[Any]:
            inputs = [mt.tensor(x) if isinstance(x, np.ndarray) else x for x in arrays]
            # Two readers and a view of every result: reuse must not be seen through any of them.
            outs = apply(op, tuple(inputs), op.pack(sample.attrs))
            outs = list(outs) if isinstance(outs, tuple) else [outs]
            views = [o.reshape(-1) for o in outs]
            more = [o * 2 if o.dtype.kind != "b" else o.astype("int64") for o in outs]
            del inputs
            mt.flush()
            return [t.numpy() for t in (*outs, *views, *more)]

        first, *later = [batch() for _ in range(3)]
        for run in later:
            for got, want in zip(run, first, strict=True):
                assert got.dtype == want.dtype
                np.testing.assert_array_equal(got, want, err_msg=f"{name} {sample}")
    assert any(b.code is not None for b in worker().programs.values())


def test_a_long_chain_is_computed_over_one_buffer() -> None:
    """Temporaries that nobody else reads are overwritten: the chain's arrays do not add up."""
    import tracemalloc
    x = mt.ones(1 << 18, dtype=mt.float32)
    peak = 0
    for _ in range(3):
        y = x
        for _ in range(20):
            y = (y * 1.5).tanh()
        mt.synchronize()
        tracemalloc.start()
        y = x
        for _ in range(20):
            y = (y * 1.5).tanh()
        mt.synchronize()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 * (1 << 20) + (1 << 18)


def test_overwriting_is_not_seen_by_other_holders() -> None:
    base = np.arange(12.0).reshape(3, 4)
    for _ in range(4):
        x = mt.tensor(base)
        view, alias = x.reshape(4, 3), x.detach()
        mt.flush()                                  # all three are in the block table now
        y = x * 2
        del x
        z = y + 1
        del y
        mt.flush()
        np.testing.assert_array_equal(view.numpy(), base.reshape(4, 3))
        np.testing.assert_array_equal(alias.numpy(), base)
        np.testing.assert_array_equal(z.numpy(), base * 2 + 1)


def test_a_fed_array_is_the_users_own() -> None:
    given = np.ones(5)
    for _ in range(3):
        x = mt.tensor(given)
        mt.flush()
        x += 1.0
        mt.flush()
        given[0] = 7.0
        np.testing.assert_array_equal(x.numpy(), 2 * np.ones(5))
        given[0] = 1.0


def test_fetched_values_are_copies() -> None:
    x = mt.ones(4)
    first = x.numpy()
    first[:] = 9
    np.testing.assert_array_equal(x.numpy(), np.ones(4))


def test_a_failing_kernel_in_a_generated_program_is_reported_where_it_was_called() -> None:
    table = mt.tensor(np.arange(4.0))
    other = mt.ones(3)
    for bad in (False, False, False, True):
        indices = mt.tensor(np.array([0, 9 if bad else 1]))
        before = other + 1
        taken = mt.take(table, indices, axis=0)     # line of the call
        after = taken * 2
        mt.flush()
        if not bad:
            np.testing.assert_array_equal(after.numpy(), [0.0, 2.0])
            continue
        with pytest.raises(
            WorkerError, match=r"take.*\(4,\).*rank 0.*IndexError.*9.*test_worker.py"
        ) as caught:
            after.numpy()
        assert "test_worker.py" in str(caught.value)
        np.testing.assert_array_equal(before.numpy(), [2.0, 2.0, 2.0])
        with pytest.raises(WorkerError, match="take"):
            (after + 1).numpy()
        np.testing.assert_array_equal((other * 3).numpy(), [3.0, 3.0, 3.0])


def test_optimizer_states_are_updated_where_they_lie() -> None:
    from meshtape import nn, optim
    net = nn.Linear(256, 256)
    opt = optim.AdamW(net.parameters(), lr=1e-3)
    x = mt.ones((8, 256))
    addresses = []
    for _ in range(5):
        opt.zero_grad()
        net(x).sum().backward()
        opt.step()
        mt.synchronize()
        array = worker().blocks[+net.weight.block]
        addresses.append(array.__array_interface__["data"][0])
    assert len(set(addresses[2:])) == 1
