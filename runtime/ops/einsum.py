"""Einstein summation over any number of operands.

The row takes a superset of the usual notation, so that its derivative is the same row with the equation
turned round: an output letter that no operand has is broadcast, and a letter that the output repeats writes a
diagonal. Both need the attribute `shape`, the whole output shape; users' equations do without.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import prod
from typing import Any

from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import IO, REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops.contraction import by_blas, widen
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.ops.rules import BOOL, conjugate, promoted
from meshtape.runtime.shards import Shape

Terms = tuple[str, ...]


# --- reading an equation ----------------------------------------------------------------------------

@lru_cache(maxsize=4096)
def parse(equation: str, ndims: tuple[int, ...]) -> tuple[Terms, str]:
    """Index letters of every operand and of the output, with ellipses spelt out in letters of their own.

    Without "->" the output has the ellipsis, then the letters that occur once, in alphabetical order. An
    ellipsis that the output lacks is summed over, as in torch.einsum. Raises ShapeError.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        raise ShapeError(f"einsum: {equation!r} names {len(terms)} operands, got {len(ndims)}")
    dots = [_ellipsis_dims(equation, term, ndim) for term, ndim in zip(terms, ndims, strict=True)]
    most = max(dots)
    unused = (c for c in map(chr, itertools.count(0x100)) if c not in equation)
    spare = "".join(itertools.islice(unused, most))
    ins = tuple(t.replace("...", spare[most - d:]) for t, d in zip(terms, dots, strict=True))
    if not arrow:
        named = left.replace("...", "").replace(",", "")
        return ins, spare + "".join(sorted(c for c in set(named) if named.count(c) == 1))
    _check_letters(equation, right.replace("...", "", 1))
    return ins, right.replace("...", spare)


def _check_letters(equation: str, term: str) -> None:
    for c in term:
        if not c.isalpha():
            raise ShapeError(f"einsum: {c!r} in {equation!r} is not an index; use letters, '...', ',' and "
                             f"'->'")


def _ellipsis_dims(equation: str, term: str, ndim: int) -> int:
    named = term.replace("...", "", 1)
    _check_letters(equation, named)
    if len(named) > ndim or ("..." not in term and len(named) < ndim):
        raise ShapeError(f"einsum: {term!r} in {equation!r} does not fit an operand of {ndim} dimensions; "
                         "name each dimension once, or put '...' for the rest")
    return ndim - len(named)


def extents_of(equation: str, ins: Terms, shapes: tuple[Shape, ...], out: str, shape: Shape | None,
               ) -> dict[str, int]:
    """The extent of every letter, also of those that only an output of known shape has. A dimension of 1 is
    stretched. Raises ShapeError."""
    found: dict[str, int] = {}
    known = [*zip(ins, shapes, strict=True), *([] if shape is None else [(out, shape)])]
    for term, extents in known:
        for c, n in zip(term, extents, strict=True):
            if found.get(c, 1) not in (1, n) and n != 1:
                raise ShapeError(f"einsum: {equation!r} gives the index {c!r} the extents {found[c]} and "
                                 f"{n}, in {', '.join(map(str, shapes))}; give it one extent (or 1)")
            if n != 1 or c not in found:
                found[c] = n
    return found


# --- the row's rules --------------------------------------------------------------------------------

def _einsum_shape(*shapes: Shape, equation: str, shape: Shape | None) -> list[Shape]:
    ins, out = parse(equation, tuple(map(len, shapes)))
    extents = extents_of(equation, ins, shapes, out, shape)
    if shape is not None:
        return [tuple(shape)]
    for c in out:
        if c not in extents:
            raise ShapeError(f"einsum: the output of {equation!r} has the index {c!r}, which no operand has")
        if out.count(c) > 1:
            raise ShapeError(f"einsum: the output of {equation!r} has the index {c!r} twice")
    return [tuple(extents[c] for c in out)]


def _einsum_axes(*shapes: Shape, equation: str, shape: Shape | None) -> Axes:
    """Each index is a letter, but for the indices of diagonals: those are never split."""
    ins, out = parse(equation, tuple(map(len, shapes)))
    extents = extents_of(equation, ins, shapes, out, shape)
    whole = {c for term in (*ins, out) for c in term if term.count(c) > 1}
    named = lambda term, s: "".join("." if c in whole or n != extents[c] else c
                                    for c, n in zip(term, s, strict=True))
    return Axes(tuple(map(named, ins, shapes)), ("".join("." if c in whole else c for c in out),))


def _einsum_local(attrs: dict[str, Any], io: IO) -> dict[str, Any]:
    return attrs if attrs["shape"] is None else {**attrs, "shape": io.outs[0].shape}


def _einsum_vjp(g: Any, out: Any, *xs: Any, equation: str, shape: Shape | None) -> tuple[Any, ...]:
    ins, result = parse(equation, tuple(x.ndim for x in xs))
    extents = extents_of(equation, ins, tuple(x.shape for x in xs), result, shape)
    grads = []
    for k, x in enumerate(xs):
        others = [i for i in range(len(xs)) if i != k]
        target = _unstretched(ins, result, ins[k], x.shape, extents)
        turned = ",".join([result, *(ins[i] for i in others)]) + "->" + target
        grads.append(einsum(g, *(conjugate(xs[i]) for i in others), equation=turned, shape=tuple(x.shape)))
    return tuple(grads)


def _unstretched(ins: Terms, result: str, term: str, shape: Shape, extents: dict[str, int]) -> str:
    """`term` with a new letter for each stretched dimension, whose gradient is summed and has extent 1."""
    used = set("".join((*ins, result)))
    fresh = (c for c in map(chr, itertools.count(0x400)) if c not in used)
    return "".join(c if n == extents[c] else next(fresh) for c, n in zip(term, shape, strict=True))


# --- the kernel: pairs of operands become matrix products -----------------------------------------------

def _einsum(xp: Any, *xs: Any, equation: str, shape: Shape | None = None) -> Any:
    """16-bit floats in float32 throughout."""
    return _contract(xp, xp.matmul, *map(widen, xs), equation=equation, shape=shape).astype(
        xs[0].dtype, copy=False)


def _einsum_on_device(dev: Any, *xs: Any, equation: str, shape: Shape | None = None) -> Any:
    """16-bit floats as they are; products and sums add up in float32, and are rounded."""
    return _contract(dev.cp, dev.blas.matmul, *xs, equation=equation, shape=shape)


def _contract(xp: Any, matmul: Any, *xs: Any, equation: str, shape: Shape | None) -> Any:
    ins, out = parse(equation, tuple(x.ndim for x in xs))
    extents = extents_of(equation, ins, tuple(x.shape for x in xs), out, shape)
    terms = [_squeezed(xp, x, term, extents) for x, term in zip(xs, ins, strict=True)]
    terms = [_alone(x, term, set(out).union(*(t for i, (_, t) in enumerate(terms) if i != k)))
             for k, (x, term) in enumerate(terms)]
    while len(terms) > 1:
        i, j = _cheapest_pair(terms, out, extents)
        (b, tb), (a, ta) = terms.pop(j), terms.pop(i)
        terms.append(_product(matmul, a, ta, b, tb, set(out).union(*(t for _, t in terms))))
    x, term = terms[0]
    core = "".join(c for c in dict.fromkeys(out) if c in term)
    x = x.transpose([term.index(c) for c in core])
    return x if core == out else _place(xp, x, core, out, shape)


def _squeezed(xp: Any, x: Any, term: str, extents: dict[str, int]) -> tuple[Any, str]:
    """One operand without repeated letters and without the dimensions of 1 that would be stretched."""
    keep = "".join(dict.fromkeys(term))
    if keep != term:
        x = _diagonal(xp, x, term, keep)
    stretched = tuple(d for d, c in enumerate(keep) if x.shape[d] != extents[c])
    if not stretched:
        return x, keep
    return xp.squeeze(x, stretched), "".join(c for d, c in enumerate(keep) if d not in stretched)


def _alone(x: Any, term: str, elsewhere: set[str]) -> tuple[Any, str]:
    """One operand summed over the letters that nothing else has."""
    summed = tuple(d for d, c in enumerate(term) if c not in elsewhere)
    if not summed:
        return x, term
    total = widen(x).sum(axis=summed, dtype=accumulator(x.dtype)).astype(x.dtype, copy=False)
    return total, "".join(c for d, c in enumerate(term) if d not in summed)


def _diagonal(xp: Any, x: Any, term: str, keep: str) -> Any:
    """A view in which the dimensions of one letter are stepped through together; those of 1 stand still."""
    shape, strides = [], []
    for c in keep:
        dims = [d for d, e in enumerate(term) if e == c and x.shape[d] != 1]
        shape.append(x.shape[dims[0]] if dims else 1)
        strides.append(sum(x.strides[d] for d in dims))
    return xp.lib.stride_tricks.as_strided(x, shape, strides)


def _cheapest_pair(terms: list[tuple[Any, str]], out: str, extents: dict[str, int]) -> tuple[int, int]:
    """The two operands whose product is smallest."""
    def size(pair: tuple[int, int]) -> int:
        rest = set(out).union(*(t for k, (_, t) in enumerate(terms) if k not in pair))
        return prod(extents[c] for c in set(terms[pair[0]][1] + terms[pair[1]][1]) & rest)
    return min(itertools.combinations(range(len(terms)), 2), key=size)


def _product(matmul: Any, a: Any, ta: str, b: Any, tb: str, keep: set[str]) -> tuple[Any, str]:
    """Multiply two operands and sum over the shared letters that are not in `keep`."""
    batch = "".join(c for c in ta if c in tb and c in keep)
    summed = "".join(c for c in ta if c in tb and c not in keep)
    left = "".join(c for c in ta if c not in tb)
    right = "".join(c for c in tb if c not in ta)
    size = {**dict(zip(ta, a.shape, strict=True)), **dict(zip(tb, b.shape, strict=True))}
    shape = tuple(size[c] for c in batch + left + right)
    if not summed:
        a = a.transpose([ta.index(c) for c in batch + left])
        b = b.transpose([tb.index(c) for c in batch + right])
        a = a.reshape(a.shape + (1,) * len(right))
        b = b.reshape(b.shape[:len(batch)] + (1,) * len(left) + b.shape[len(batch):])
        return a * b, batch + left + right
    rows = _matrices(a, ta, batch, left, summed, size)
    columns = _matrices(b, tb, batch, right, summed, size)
    return matmul(rows, columns.swapaxes(-1, -2)).reshape(shape), batch + left + right


def _matrices(x: Any, term: str, batch: str, free: str, summed: str, size: dict[str, int]) -> Any:
    """`x` as (batch, free, summed); where it is stored the other way round, a transposed view."""
    counts = [prod(size[c] for c in group) for group in (batch, free, summed)]
    lead = counts[:1] if batch else []
    straight = not term or term[-1] in summed
    x = x.transpose([term.index(c) for c in batch + (free + summed if straight else summed + free)])
    if straight:
        return x.reshape(*lead, counts[1], counts[2])
    return x.reshape(*lead, counts[2], counts[1]).swapaxes(-1, -2)


def _place(xp: Any, x: Any, core: str, out: str, shape: Shape | None) -> Any:
    """Broadcast along output letters that `x` lacks, and write diagonals for repeated ones."""
    assert shape is not None
    unique = "".join(dict.fromkeys(out))
    x = x.reshape([x.shape[core.index(c)] if c in core else 1 for c in unique])
    if unique == out:
        return xp.broadcast_to(x, shape)
    placed = xp.zeros(shape, x.dtype)
    _diagonal(xp, placed, out, unique)[...] = x
    return placed


def _einsum_samples() -> list[Sample]:
    plain = [
        ("i->", (3,)), ("i,j->ij", (3,), (4,)), ("ij->i", (2, 3)), ("ij,kj->ik", (2, 3), (1, 3)),
        ("ij,Ab->ijAb", (2, 3), (4, 4)), ("aij,ajk->aik", (2, 5, 3), (2, 3, 4)), ("ij,jk", (4, 5), (5, 3)),
        ("ijk,ik->j", (1, 2, 3), (1, 3)), ("iji->j", (3, 4, 3)), ("i...->...", (3, 3)), ("ba", (2, 3)),
        ("...ik, ...j -> ij", (5, 2, 3), (3,)), ("bij,bij->b", (3, 2, 4), (3, 2, 4)), ("ii", (3, 3)),
        ("ij,ij->ij", (5, 3), (5, 3)), ("ij,jk,kl->il", (4, 3), (3, 5), (5, 2)), (",i->i", (), (3,)),
        ("i,i,i->i", (7,), (7,), (7,)), ("...ij,...jk->...ik", (2, 4, 3), (3, 5)), ("ij,j->i", (4, 1), (5,)),
        ("ij,jk->ik", (0, 3), (3, 2)), ("ij,jk->ik", (4, 0), (0, 2)), ("iij,jk->ik", (3, 3, 4), (4, 2)),
        ("b h q d, b h k d -> b h q k", (2, 2, 3, 4), (2, 2, 5, 4)),
        ("ij,kj,lj->ikl", (3, 4), (2, 4), (5, 4))]
    turned = [("i->ij", (5, 3), (5,)), ("j->iji", (3, 4, 3), (4,)), ("i->ii", (3, 3), (3,)),
              ("->ab", (2, 3), ()), ("ij,jk->ikl", (4, 5, 2), (4, 3), (3, 5))]
    found = [Sample(tuple(shapes), {"equation": equation}) for equation, *shapes in plain]
    return found + [Sample(tuple(shapes), {"equation": equation, "shape": shape})
                    for equation, shape, *shapes in turned]


einsum: Op = register(Op(
    "einsum", kernel=_einsum, attrs={"equation": REQUIRED, "shape": None}, shape=_einsum_shape,
    dtype=promoted(BOOL)("einsum"), axes=_einsum_axes, linear=tuple((i,) for i in range(16)),
    local=_einsum_local, vjp=_einsum_vjp, keeps="xs", samples=_einsum_samples,
    autocast="low",
    device=by_blas(_einsum_on_device)))
