"""Batch, group and instance normalization as functions, by torch.nn.functional's names and semantics."""

from __future__ import annotations

from typing import Any

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import lookup
from meshtape.runtime.shards import REPLICATE, is_partial


def _t(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else as_tensor(x)


def _call(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return apply(op, inputs, op.pack(attrs))


def _reduced(x: Tensor) -> Tensor:
    """`x` with Partial sums finished, once for all that reads it."""
    return x.to_placements(tuple(REPLICATE if is_partial(p) else p for p in x.spec.placements))


def batch_norm(input: Any, running_mean: Tensor | None, running_var: Tensor | None,
               weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
               momentum: Any = 0.1, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, per channel of (N, C, ...).

    In training, mean and (biased) var are those of the whole batch, also where it is split over workers, and
    the running statistics, if given, move towards them in place: running = (1 - momentum) * running +
    momentum * batch, with the unbiased variance. Else the running statistics are used. Ioffe, Szegedy 2015,
    arXiv:1502.03167. Raises ShapeError.
    """
    x = _t(input)
    if x.shape == (0,):
        return x * 1.0
    if x.ndim < 2:
        raise ShapeError(f"batch_norm: needs (N, C, ...), got {x.shape}")
    if training:
        mean, var = _batch_statistics(x, running_mean, running_var, momentum)
    elif running_mean is None or running_var is None:
        raise ShapeError("batch_norm: give running_mean and running_var, or training=True")
    else:
        mean, var = running_mean.detach(), running_var.detach()
    rstd = _call("rsqrt", var + float(eps))
    out: Tensor = _call("batch_norm", x, mean, rstd, 1.0 if weight is None else weight,
                        0.0 if bias is None else bias, training=bool(training))
    return out


def _batch_statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                      momentum: Any) -> tuple[Tensor, Tensor]:
    n = x.size // max(1, x.shape[1])
    if n == 1:
        raise ShapeError(f"batch_norm: an input {x.shape} has one value per channel, which has no variance; "
                         f"train on larger batches, or call eval()")
    mean = _reduced(_call("batch_mean", x))
    var = _reduced(_call("batch_variance", x, mean))
    if n:
        for running, batch in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
            if running is not None:
                running.assign(running * (1 - momentum) + batch * momentum, "batch_norm")
    return mean, var


def group_norm(input: Any, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    """Normalization over each sample's channels in `num_groups` groups, of (N, C, ...).

    weight and bias are (C,). Wu, He 2018, arXiv:1803.08494. Raises ShapeError.
    """
    x = _t(input)
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ShapeError(f"group_norm: an input (N, C, ...) with C a multiple of {num_groups} groups is "
                         f"needed, got {x.shape}")
    samples, channels, *rest = x.shape
    width = channels // num_groups
    for n in rest:
        width *= n
    rows = x.reshape(samples, num_groups, width)
    y: Tensor = _call("normalize", rows, ndim=1, eps=float(eps))[0].reshape(x.shape)
    along = (-1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(along)
    return y if bias is None else y + bias.reshape(along)


def instance_norm(input: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                  eps: float = 1e-5) -> Tensor:
    """Normalization of every channel of every sample of (N, C, ...) (arXiv:1607.08022)."""
    x = _t(input)
    return group_norm(x, x.shape[1] if x.ndim > 1 else 1, weight, bias, eps)


__all__ = ["batch_norm", "group_norm", "instance_norm"]
