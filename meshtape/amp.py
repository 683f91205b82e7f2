"""Loss scaling, by torch.amp's names. autocast() is here as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from meshtape.autograd import Tensor, apply
from meshtape.autograd.autocast import autocast, resumed
from meshtape.creation import full
from meshtape.gradmode import no_grad
from meshtape.optim.optimizer import Optimizer
from meshtape.runtime.errors import GradError, StateError
from meshtape.runtime.op import lookup
from meshtape.scheduler import current

NONFINITE, UPDATE_SCALE = lookup("nonfinite"), lookup("update_scale")


class Checked(NamedTuple):
    """What a GradScaler did with an optimizer since the last update()."""

    found: Tensor           # above 0 if a gradient is infinite or NaN
    stepped: bool


class GradScaler:
    """Multiplies losses by a scale, so that small gradients do not vanish in float16, and steps by gradients
    that are divided by it again; a step whose gradients overflowed is left out.

    The scale shrinks by `backoff_factor` after such a step, and grows by `growth_factor` after
    `growth_interval` steps in a row without one. Semantics of torch.amp.GradScaler. Nothing waits: whether a
    step is taken, the workers decide (docs/decisions/0024-loss-scaling.md).
    """

    def __init__(self, init_scale: float = 65536.0, growth_factor: float = 2.0, backoff_factor: float = 0.5,
                 growth_interval: int = 2000, enabled: bool = True) -> None:
        if growth_factor <= 1.0 or not 0.0 < backoff_factor < 1.0:
            raise ValueError(f"GradScaler: growth_factor is {growth_factor} and backoff_factor "
                             f"{backoff_factor}; use one above 1, and one between 0 and 1")
        self.growth_factor = float(growth_factor)
        self.backoff_factor = float(backoff_factor)
        self.growth_interval = int(growth_interval)
        self._enabled = bool(enabled)
        self._given = float(init_scale), 0          # scale and streak, before there are tensors of them
        self._scale: Tensor | None = None
        self._streak: Tensor | None = None          # steps in a row that were taken
        self._checked: dict[Optimizer, Checked] = {}

    def is_enabled(self) -> bool:
        """Whether this does anything at all."""
        return self._enabled

    def _state(self) -> tuple[Tensor, Tensor]:
        if self._scale is None or self._streak is None:
            scale, streak = self._given
            self._scale, self._streak = full((), scale, dtype="float32"), full((), streak, dtype="int32")
        return self._scale, self._streak

    def scale(self, outputs: Any) -> Any:
        """`outputs`, a tensor or a (nested) list or tuple of tensors, times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, list | tuple):
            return type(outputs)([self.scale(x) for x in outputs])
        if not isinstance(outputs, Tensor):
            raise TypeError(f"scale: a {type(outputs).__name__} given; give a tensor, or tensors in a list "
                            f"or tuple")
        scaled = outputs * self._state()[0]
        return scaled.astype(outputs.dtype) if outputs.ndim else scaled     # as torch: numbers are float32

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of the optimizer's parameters by the scale, to clip them before step().

        Raises GradError if that was done since the last update().
        """
        if not self._enabled:
            return
        before = self._checked.get(optimizer)
        if before is not None:
            raise GradError("unscale_(): step() was called since the last update()" if before.stepped else
                            "unscale_(): called on this optimizer before, since the last update()")
        self._unscale(optimizer, whole=True)

    def _unscale(self, optimizer: Optimizer, whole: bool) -> None:
        """Unscale and look. If the gradients are to be `whole`, they are reduced as the user reads them, else
        as the optimizer does.
        """
        session = current.session()
        with no_grad(), resumed(session, None):
            inverse = self._state()[0].reciprocal()
            every = [p for group in optimizer.param_groups for p in group["params"]]
            params = [p for p in every if p.raw_grad is not None]
            if not params:
                raise GradError("GradScaler: the optimizer's parameters have no gradients; call backward() "
                                "on a scaled loss first")
            for p in params:
                grad: Any = p.grad if whole else p.raw_grad
                if grad.dtype.name == "float16" and not optimizer.master_weights:
                    raise GradError("GradScaler: a gradient is float16, and may vanish when it is unscaled; "
                                    "keep parameters in float32 (autocast casts them), or use "
                                    "master_weights=True")
                made = grad * inverse
                p.grad = made if optimizer.master_weights else made.astype(grad.dtype)
            found = _nonfinite([p.grad for p in params] if whole else optimizer.reduced())
        self._checked[optimizer] = Checked(found, False)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """optimizer.step(), by unscaled gradients; changes nothing if one of them is infinite or NaN.

        Does not wait. Raises GradError if the optimizer stepped since the last update().
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if args or kwargs:
            raise TypeError("GradScaler.step: closures are not supported; call backward() before it")
        checked = self._checked.get(optimizer)
        if checked is not None and checked.stepped:
            raise GradError("GradScaler.step: called before with this optimizer, since the last update()")
        if checked is None:
            self._unscale(optimizer, whole=False)
        found = self._checked[optimizer].found
        try:
            optimizer.skip = found
            out = optimizer.step()
        finally:
            optimizer.skip = None
        self._checked[optimizer] = Checked(found, True)
        return out

    def update(self, new_scale: float | None = None) -> None:
        """Set the scale for the next step: to `new_scale`, or by what was found in this one. Does not wait.

        Raises GradError if no optimizer stepped since the last update().
        """
        if not self._enabled:
            return
        scale, streak = self._state()
        if new_scale is not None:
            self._scale = full((), float(new_scale), dtype="float32")
            self._checked.clear()
            return
        if not self._checked:
            raise GradError("GradScaler.update: nothing was looked at since the last update(); call step() "
                            "or unscale_() first")
        with no_grad(), resumed(current.session(), None):
            found: Any = None
            for checked in self._checked.values():
                found = checked.found if found is None else found + checked.found
            self._scale, self._streak = apply(UPDATE_SCALE, (
                found, scale, streak, self.growth_factor, self.backoff_factor, self.growth_interval))
        self._checked.clear()

    def get_scale(self) -> float:
        """The scale; 1.0 if not enabled. Waits."""
        if not self._enabled:
            return 1.0
        return self._given[0] if self._scale is None else float(self._scale.item())

    def get_growth_factor(self) -> float:
        """What the scale is multiplied by when it grows."""
        return self.growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Let the scale grow by this factor from now on."""
        self.growth_factor = float(new_factor)

    def get_backoff_factor(self) -> float:
        """What the scale is multiplied by when it shrinks."""
        return self.backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Let the scale shrink by this factor from now on."""
        self.backoff_factor = float(new_factor)

    def get_growth_interval(self) -> int:
        """The number of steps in a row after which the scale grows."""
        return self.growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Let the scale grow after so many steps in a row from now on."""
        self.growth_interval = int(new_interval)

    def state_dict(self) -> dict[str, Any]:
        """Scale, factors, interval and streak, by torch's names; empty if not enabled. Waits."""
        if not self._enabled:
            return {}
        streak = self._given[1] if self._streak is None else int(self._streak.item())
        return {"scale": self.get_scale(), "growth_factor": self.growth_factor,
                "backoff_factor": self.backoff_factor, "growth_interval": self.growth_interval,
                "_growth_tracker": streak}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what state_dict() gave. Raises StateError."""
        if not self._enabled:
            return
        try:
            scale, streak = float(state_dict["scale"]), int(state_dict["_growth_tracker"])
            factors = float(state_dict["growth_factor"]), float(state_dict["backoff_factor"])
            interval = int(state_dict["growth_interval"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"GradScaler.load_state_dict: not the state of an enabled GradScaler "
                             f"({error!r})") from error
        self.growth_factor, self.backoff_factor = factors
        self.growth_interval = interval
        self._given, self._scale, self._streak = (scale, streak), None, None


def _nonfinite(grads: list[Tensor]) -> Tensor:
    """Above 0 if an element of the gradients is infinite or NaN: a number that all workers have."""
    whole = [g for g in grads if g.spec.placements == g.spec.owner.axes.replicated]
    parts: list[Any] = [apply(NONFINITE, (g,)) for g in grads
                        if g.spec.placements != g.spec.owner.axes.replicated]
    if whole:
        parts.append(apply(NONFINITE, tuple(whole)))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to_placements(total.spec.owner.axes.replicated)  # type: ignore[no-any-return]


__all__ = ["GradScaler", "autocast"]
