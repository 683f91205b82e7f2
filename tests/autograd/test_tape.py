"""The tape's rules: accumulation, second backward, detach, hooks, in place, grad, checkpoint, what stays
alive.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from meshes import on

import meshtape as mt
from meshtape.runtime.errors import GradError, ShapeError
from meshtape.scheduler import current


@pytest.fixture(autouse=True, params=[1, 3])
def session(request: pytest.FixtureRequest) -> Any:
    with on(request.param) as found:
        yield found


def leaf(values: Any) -> mt.Tensor:
    return mt.tensor(np.asarray(values, np.float64), requires_grad=True)


def test_gradients_accumulate_over_backwards_and_uses() -> None:
    x = leaf([1.0, 2.0])
    for _ in range(3):
        (x * x + x).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 3 * (2 * np.array([1.0, 2.0]) + 1))


def test_a_square_is_not_a_product_after_replay() -> None:
    """Both record the same plan; only which block stands where differs."""
    x, y = leaf([3.0]), leaf([5.0])
    for _ in range(3):
        x.grad = y.grad = None
        (x * x).sum().backward()
        assert x.grad.item() == 6.0
        x.grad = None
        (x * y).sum().backward()
        assert (x.grad.item(), y.grad.item()) == (5.0, 3.0)
        x.grad = y.grad = None
        (y * x).sum().backward()
        assert (x.grad.item(), y.grad.item()) == (5.0, 3.0)


def test_replay_follows_detach_and_frozen_leaves() -> None:
    """The same recorded instructions with another tape above them give other gradients."""
    w, v = leaf([2.0]), leaf([7.0])
    for _ in range(3):
        for build, want in ((lambda: (w * v) * w, (28.0, 4.0)), (lambda: (w * v).detach() * w, (14.0, None)),
                            (lambda: (w * v.detach()) * w, (28.0, None))):
            w.grad = v.grad = None
            build().sum().backward()
            got = (w.grad.item(), None if v.grad is None else v.grad.item())
            assert got == want


def test_replay_depends_on_scalars_and_old_gradients() -> None:
    x = leaf([1.0, 3.0])
    for power in (2, 3, 2, 3.5):
        x.grad = None
        (x ** power).sum().backward()
        np.testing.assert_allclose(x.grad.numpy(), power * np.array([1.0, 3.0]) ** (power - 1))
    (x * 2.0).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 3.5 * np.array([1.0, 3.0]) ** 2.5 + 2)


def test_leaves_that_share_one_gradient_keep_it_apart_after_replay() -> None:
    p, q = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    for _ in range(3):
        p.grad = q.grad = None
        (p + q).sum().backward()
        p.grad = None
        mt.synchronize()
        np.testing.assert_array_equal(q.grad.numpy(), [1.0, 1.0])


def test_backward_twice_needs_retain_graph() -> None:
    x = leaf([2.0])
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 8.0
    with pytest.raises(GradError, match=r"second time.*retain_graph"):
        y.backward()


def test_backward_starts_from_one_number_or_a_gradient_of_the_shape() -> None:
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(GradError, match=r"\(2, 2\)"):
        (x * 2).backward()
    with pytest.raises(ShapeError, match="gradient has shape"):
        (x * 2).backward(mt.ones(3))
    (x * 2).backward(mt.tensor(np.arange(4.0).reshape(2, 2)))
    np.testing.assert_array_equal(x.grad.numpy(), 2 * np.arange(4.0).reshape(2, 2))


def test_no_grad_and_detach_stay_off_the_tape() -> None:
    x = leaf([1.0])
    with mt.no_grad():
        assert not (x * 2).requires_grad
        with mt.enable_grad():
            assert (x * 2).requires_grad
    assert not x.detach().requires_grad and x.requires_grad

    @mt.no_grad()
    def off() -> mt.Tensor:
        return x * 2

    assert not off().requires_grad
    with pytest.raises(GradError, match="does not require grad"):
        x.detach().sum().backward()


def test_grad_touches_no_dot_grad() -> None:
    x, y, unused = leaf([2.0]), leaf([3.0]), leaf([1.0])
    out = (x * x * y).sum()
    dx, dy = mt.grad(out, (x, y), retain_graph=True)
    assert (dx.item(), dy.item()) == (12.0, 4.0) and x.grad is None and y.grad is None
    with pytest.raises(GradError, match="allow_unused"):
        mt.grad(out, (x, unused), retain_graph=True)
    assert mt.grad(out, (unused,), allow_unused=True) == (None,)


def test_grad_with_respect_to_a_computed_tensor() -> None:
    x = leaf([2.0])
    h = x * x
    (g,) = mt.grad((h * h * h).sum(), h)
    assert g.item() == 3 * 16.0


def test_second_derivatives_by_create_graph() -> None:
    x = leaf([0.5, -1.5])
    y = (x.tanh() * x).sum()
    y.backward(create_graph=True)
    first = x.grad
    x.grad = None
    (first * first).sum().backward()
    t, v = np.tanh(x.numpy()), x.numpy()
    s = 1 - t * t
    want = 2 * (t + v * s) * (2 * s - 2 * v * t * s)
    np.testing.assert_allclose(x.grad.numpy(), want, rtol=1e-12)


def test_hooks_see_and_replace_gradients() -> None:
    x = leaf([1.0, 2.0])
    seen = []
    h = x * 3
    h.register_hook(lambda g: seen.append(g.numpy()))
    remove = x.register_hook(lambda g: g * 10)
    h.retain_grad()
    h.sum().backward()
    np.testing.assert_array_equal(seen[0], [1.0, 1.0])
    np.testing.assert_array_equal(h.grad.numpy(), [1.0, 1.0])
    np.testing.assert_array_equal(x.grad.numpy(), [30.0, 30.0])
    remove()
    x.grad = None
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [3.0, 3.0])


def test_in_place_on_a_leaf_is_refused_while_the_tape_records() -> None:
    x = leaf([1.0])
    with pytest.raises(GradError, match="leaf that requires grad"):
        x += 1.0
    with pytest.raises(GradError, match="leaf that requires grad"):
        x[0] = 5.0
    with mt.no_grad():
        x += 1.0
    assert x.item() == 2.0 and x.is_leaf and x.requires_grad
    (x * x).sum().backward()
    assert x.grad.item() == 4.0


def test_in_place_on_a_computed_tensor_keeps_the_right_gradient() -> None:
    """What was kept for backward before the change keeps its values."""
    x = leaf([1.0, 2.0])
    y = x * x
    z = y * y
    y *= 100.0
    y[0] = 7.0
    (z.sum() + y.sum()).backward()
    np.testing.assert_allclose(x.grad.numpy(), 4 * np.array([1.0, 8.0]) + np.array([0.0, 400.0]))


def test_in_place_keeps_shape_and_dtype() -> None:
    x = mt.tensor(np.ones(3, np.float32))
    x += np.ones(3)
    assert x.dtype == mt.float32
    with pytest.raises(ShapeError, match="in-place operations keep the shape"):
        x += mt.ones((2, 3))


def test_checkpoint_gives_the_same_gradients_and_random_draws() -> None:
    from meshtape.nn import functional as F
    mt.manual_seed(3)
    x, w = leaf(np.linspace(-1, 1, 12).reshape(3, 4)), leaf(np.linspace(0, 1, 8).reshape(4, 2))

    def block(x: mt.Tensor) -> mt.Tensor:
        return F.dropout((x @ w).tanh(), 0.5)

    mt.manual_seed(3)
    plain = block(x)
    plain.sum().backward()
    want = x.grad.numpy(), w.grad.numpy()
    x.grad = w.grad = None
    mt.manual_seed(3)
    again = mt.checkpoint(block, x)
    np.testing.assert_array_equal(again.numpy(), plain.numpy())
    draws = current.session().draws
    again.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), want[0])
    np.testing.assert_allclose(w.grad.numpy(), want[1])
    assert current.session().draws == draws


def test_only_what_a_derivative_reads_stays_alive(session: Any) -> None:
    """exp keeps its output, addition nothing: of the chain's blocks two live on."""
    x = leaf(np.ones(4))
    h = x + 1.0
    e = h.exp()
    y = e + 1.0
    z = y.sum()
    blocks = [weakref.ref(t) for t in (h, y)]
    kept = +e.block
    del h, e, y
    gc.collect()
    assert all(b() is None for b in blocks)
    session.wait()
    alive = session.mesh._worker.blocks if session.mesh.kind == "inline" else None
    if alive is not None:
        assert kept in alive and len(alive) == 3        # x, e, z
    z.backward()
    np.testing.assert_allclose(x.grad.numpy(), np.exp(2.0) * np.ones(4))


def test_gradients_have_the_parameters_layout() -> None:
    size = current.session().axes.size
    data = mt.tensor(np.arange(21.0).reshape(7, 3), layout=mt.Shard(0))
    w = leaf(np.ones((3, 2)))
    (data @ w).sum().backward()
    assert w.grad.layout == w.layout
    sharded = mt.tensor(np.ones((3, 2)), layout=mt.Shard(0), requires_grad=True)
    (data @ sharded).sum().backward()
    assert sharded.grad.layout == sharded.layout
    if size > 1:
        assert sharded.grad.layout == mt.Shard(0)
    np.testing.assert_array_equal(sharded.grad.numpy(), w.grad.numpy())
