"""A compiled body as one straight Python function: no interpretation per step, operands in local variables.

The source is made from slot numbers only; kernels and attribute values are bound as globals by position, so
no text of a message ever becomes code. When a kernel raises, the failing step is known from the line number,
and the values so far from the frame; the interpreter then carries on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from meshtape.runtime.program import Compiled, Step

NAME = "<meshtape program>"


class Code(NamedTuple):
    """`run(blocks, ids, scalars, feeds)` does a whole batch; `lines` tells the step of every source line."""

    run: Callable[..., None]
    lines: dict[int, int]


def generate(program: Compiled, xp: Any, convert: Sequence[bool], device: Any = None) -> Code:
    """The function of a body. `convert[at]`: a step's results need conversion to arrays of their dtype. On a
    CUDA device its feeds are arrays there.
    """
    scope: dict[str, Any] = {"xp": xp, "device": device, "asarray": xp.asarray, "array": xp.array}
    text = ["def run(blocks, ids, scalars, feeds):"]
    lines: dict[int, int] = {}
    for slot in program.external:
        take = "blocks.pop" if slot in program.taken else "blocks.__getitem__"
        text.append(f" s{slot} = {take}(ids[{slot}])")
    fed = 0
    for at, step in enumerate(program.steps):
        first = len(text) + 1
        if step.call.kind == "feed":
            fed_array = f"asarray(feeds[{fed}])" if device is None else f"feeds[{fed}]"
            text.append(f" s{step.outs[0]} = {fed_array}")
            fed += 1
        else:
            text += _call(at, step, scope, convert[at])
        gone = [f"s{slot}" for slot in step.release]
        if gone:
            text.append(" del " + ", ".join(gone))
        lines.update(dict.fromkeys(range(first, len(text) + 1), at))
    for slot in program.kept:
        value = f"s{slot}"
        if slot in program.sharing.feeds:
            value = f"array(s{slot})"
        elif slot in program.sharing.views:
            value = f"s{slot} if s{slot}.base is None else array(s{slot})"
        text.append(f" blocks[ids[{slot}]] = {value}")
    if len(text) == 1:
        text.append(" pass")
    exec(compile("\n".join(text), NAME, "exec"), scope)
    return Code(scope["run"], lines)


def _call(at: int, step: Step, scope: dict[str, Any], convert: bool) -> list[str]:
    """The lines of one step."""
    call, outs = step.call, [f"s{slot}" for slot in step.outs]
    scope[f"k{at}"] = call.function
    words = ["device"] if call.on_device else [] if call.op is None else ["xp"]
    operands = [f"s{slot}" if slot >= 0 else f"scalars[{-1 - slot}]" for slot in step.ins]
    for i, array in step.given:
        scope[f"n{at}_{i}"] = array
        operands[i] = f"n{at}_{i}"
    words += operands
    for i, (name, value) in enumerate(call.attrs.items()):
        scope[f"a{at}_{i}"] = value
        words.append(f"{name}=a{at}_{i}")
    if step.reuse or step.places:
        over = {k: f"s{step.ins[i]}" for k, i in step.reuse}
        for k, array in step.places:
            scope[f"p{at}_{k}"] = array
            over[k] = f"p{at}_{k}"
        where = [over.get(k, "None") for k in range(len(outs))]
        words.append(f"out=({', '.join(where)},)" if call.many else f"out={where[0]}")
    target = ", ".join(outs) + ("," if call.many and len(outs) == 1 else "")
    text = [f" {target} = k{at}({', '.join(words)})"]
    if convert:
        for k, name in enumerate(outs):
            scope[f"d{at}_{k}"] = call.dtypes[k]
            text.append(f" {name} = asarray({name}, d{at}_{k})")
    return text


def ran(trace: TracebackType | None) -> bool:
    """Whether an exception comes from a generated function."""
    while trace is not None and trace.tb_frame.f_code.co_filename != NAME:
        trace = trace.tb_next
    return trace is not None


def failed_step(code: Code, trace: TracebackType | None) -> tuple[int, dict[int, Any]]:
    """The step at which a generated function stopped, and the slots that hold values there."""
    while trace is not None and trace.tb_frame.f_code.co_filename != NAME:
        trace = trace.tb_next
    assert trace is not None
    values = {int(name[1:]): value for name, value in trace.tb_frame.f_locals.items()
              if name[0] == "s" and name[1:].isdigit()}
    return code.lines[trace.tb_lineno], values
