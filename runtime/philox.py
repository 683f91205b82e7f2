"""Counter-based random bits: any element of any draw, without the ones before it.

The generator is Philox-4x64 with 10 rounds (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as
easy as 1, 2, 3"), in the stream order of numpy.random.Philox. A stream is named by (seed, draw), both taken
modulo 2**64:

    word[i] = philox4x64_10(counter=(i // 4 + 1, 0, 0, 0), key=(seed, draw))[i % 4]

(the counter's first element is its least significant; NumPy advances it before the first block, hence the +
1). Elements of a tensor are numbered in C order over the *whole* tensor, so results depend neither on the
number of workers nor on the layout. What an element takes from its stream:

    half[e]       32 bits: word[e // 2] >> (32 * (e % 2)), truncated
    float32       (half[e] >> 8) * 2**-24, in [0, 1)
    float64       (word[e] >> 11) * 2**-53, in [0, 1)
    normal        elements 2k and 2k + 1 share a = ((word[2k] >> 11) + 1) * 2**-53 and
                  b = (word[2k + 1] >> 11) * 2**-53: they are sqrt(-2 log a) * cos(2 pi b) and
                  sqrt(-2 log a) * sin(2 pi b), computed in float64 by additions, products, quotients and
                  square roots alone, in a fixed order (`_log`, `_turn`), so that all processors and GPUs
                  have the same bits
    integer       low + mulhi(word[e], high - low), the high half of the 128-bit product
    dropped       half[e] < round(p * 2**32)

One round, with 128-bit products hi:lo (on CUDA `__umul64hi` and `*`):

    (hi0, lo0) = 0xD2E7470EE14C6C93 * c0,   (hi1, lo1) = 0xCA5A826395121157 * c2
    c = (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0)

and before every round but the first k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import factorial, prod
from typing import Any

import numpy as np

from meshtape.runtime.shards import Shape

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS = 10
MASK64 = 2**64 - 1

# Polynomials of fdlibm 5.3 (Sun Microsystems 1993; e_log.c, k_sin.c, k_cos.c), lowest power first: of
# log(1 + f) in (f / (2 + f))^2, of sin and cos in the square of an angle of at most pi / 4.
LOG = (6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
       1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01)
SIN = (-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
       2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10)
COS = (4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
       -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11)
LN2 = 6.93147180369123816490e-01, 1.90821492927058770002e-10        # the first has 32 bits
ROOT = 0x3FE6A09E << 32                     # the bits of sqrt(1 / 2), rounded down
RADIANS = 2.0**-53 * 2 * np.pi

SINE = [(-1)**k / factorial(2 * k + 1) for k in range(1, 8)]         # of (sin u - u) / u, in u^2
MAX_RADIUS = 8.6                # sqrt(-2 log 2**-53)

CHUNK = 65536                   # elements made at a time, so that their passes stay in a core's cache
JUMP = 2048                     # elements that cost about as much as starting a stream elsewhere

Fill = Callable[[int, int], Any]


# --- words --------------------------------------------------------------------------------------------

def words(xp: Any, seed: int, draw: int, start: int, count: int) -> Any:
    """Words `start` to `start + count` of the stream (seed, draw), as uint64."""
    if xp is np:
        return _numpy_words(seed, draw, start, count)
    return _array_words(xp, seed, draw, start, count)


def _numpy_words(seed: int, draw: int, start: int, count: int) -> Any:
    block, skip = divmod(start, 4)
    bits = np.random.Philox(key=np.array([seed & MASK64, draw & MASK64], np.uint64),
                            counter=np.array([block & MASK64, block >> 64, 0, 0], np.uint64))
    return bits.random_raw(skip + count)[skip:]


def _array_words(xp: Any, seed: int, draw: int, start: int, count: int) -> Any:
    """The same from array operations alone: for devices, and the reference for a kernel written for one."""
    first, last = start // 4, -(-(start + count) // 4)
    zero = xp.zeros(last - first, xp.uint64)
    c = [xp.arange(first + 1, last + 1, dtype=xp.uint64), zero, zero, zero]
    key = [seed & MASK64, draw & MASK64]
    for _ in range(ROUNDS):
        (hi0, lo0), (hi1, lo1) = (wide_product(xp, c[2 * i], MULTIPLIERS[i]) for i in range(2))
        c = [hi1 ^ c[1] ^ xp.uint64(key[0]), lo1, hi0 ^ c[3] ^ xp.uint64(key[1]), lo0]
        key = [(k + w) & MASK64 for k, w in zip(key, WEYL, strict=True)]
    return xp.stack(c, axis=1).reshape(-1)[start - 4 * first:][:count]


def wide_product(xp: Any, a: Any, b: int) -> tuple[Any, Any]:
    """(high, low) halves of the 128-bit products of uint64 `a` with 0 <= b < 2**64, from 32-bit halves."""
    low32, shift = xp.uint64(0xFFFFFFFF), xp.uint64(32)
    a0, a1 = a & low32, a >> shift
    b0, b1 = xp.uint64(b & 0xFFFFFFFF), xp.uint64(b >> 32)
    middle = a1 * b0 + ((a0 * b0) >> shift)
    cross = a0 * b1 + (middle & low32)
    return a1 * b1 + (middle >> shift) + (cross >> shift), a * xp.uint64(b)


# --- values of a run of elements -------------------------------------------------------------------------

def halves(xp: Any, seed: int, draw: int, start: int, count: int) -> Any:
    """32 bits for each of the elements `start` to `start + count`, as uint32."""
    first = start // 2
    found = words(xp, seed, draw, first, -(-(start + count) // 2) - first)
    return found.astype("<u8", copy=False).view(xp.uint32)[start - 2 * first:][:count]


def uniform(xp: Any, seed: int, draw: int, start: int, count: int, dtype: Any) -> Any:
    """Uniform numbers in [0, 1): 24 bits each in float32, 53 in float64."""
    if dtype == xp.float64:
        return (words(xp, seed, draw, start, count) >> xp.uint64(11)).astype(xp.float64) * 2.0**-53
    found = (halves(xp, seed, draw, start, count) >> xp.uint32(8)).astype(xp.float32)
    found *= 2.0**-24
    return found


def normal(xp: Any, seed: int, draw: int, start: int, count: int) -> Any:
    """Standard normal numbers in float64 (Box and Muller 1958)."""
    pairs, skip = _pairs(xp, seed, draw, start, count)
    return _box_muller(xp, pairs).reshape(-1)[skip:][:count]


def _pairs(xp: Any, seed: int, draw: int, start: int, count: int) -> tuple[Any, int]:
    """The words (n, 2) from which a run of normal numbers is made, and how many of these to leave out."""
    first, last = start // 2, -(-(start + count) // 2)
    return words(xp, seed, draw, 2 * first, 2 * (last - first)).reshape(-1, 2), start - 2 * first


def _box_muller(xp: Any, pairs: Any) -> Any:
    """Normal numbers (n, 2) in float64 from words (n, 2)."""
    radius, found = _radius(xp, pairs, _log), xp.empty(pairs.shape, xp.float64)
    for k, part in enumerate(_turn(xp, pairs[:, 1])):
        xp.multiply(radius, part, out=found[:, k])
    return found


def _radius(xp: Any, pairs: Any, log: Callable[[Any, Any], Any]) -> Any:
    a = ((pairs[:, 0] >> xp.uint64(11)) + xp.uint64(1)).astype(xp.float64)
    a *= 2.0**-53
    radius = log(xp, a)
    radius *= -2
    return xp.sqrt(radius, out=radius)


def _log(xp: Any, a: Any) -> Any:
    """log a in float64 for 2**-53 <= a <= 1, with an error below 1 ulp.

    a = 2**k * (1 + f) with sqrt(1 / 2) < 1 + f < sqrt(2), and log(1 + f) = f - f^2 / 2 + s * (f^2 / 2 + R)
    where s = f / (2 + f).
    """
    bits = a.view(xp.int64) + ((1023 << 52) - ROOT)
    k = ((bits >> 52) - 1023).astype(xp.float64)
    f = ((bits & ((1 << 52) - 1)) + ROOT).view(xp.float64) - 1
    s, half = f / (f + 2), 0.5 * f * f
    square = s * s
    rest = square * _polynomial(LOG, square)
    return k * LN2[0] - ((half - (s * (half + rest) + k * LN2[1])) - f)


def _turn(xp: Any, turns: Any) -> tuple[Any, Any]:
    """cos and sin of 2 pi t in float64, with errors below 2**-51, for t = turns / 2**64 cut to 53 bits.

    t is the nearest quarter, q / 4, and a remainder of at most 1 / 8, which is exact.
    """
    whole = (turns >> xp.uint64(11)).view(xp.int64)
    q = (whole + (1 << 50)) >> 51
    u = (whole - (q << 51)).astype(xp.float64) * RADIANS
    square = u * u
    s = u + square * u * _polynomial(SIN, square)
    half = 0.5 * square
    near = 1 - half
    c = near + (((1 - near) - half) + square * (square * _polynomial(COS, square)))
    odd = (q & 1) == 1
    cosine, sine = xp.where(odd, s, c), xp.where(odd, c, s)
    return cosine * (1.0 - ((q + 1) & 2)), sine * (1.0 - (q & 2))


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    """Horner's rule, lowest power first."""
    out = coefficients[-1] * x
    for c in coefficients[-2:0:-1]:
        out += c
        out *= x
    out += coefficients[0]
    return out


def normal_single(seed: int, draw: int, start: int, count: int, mean: float, std: float) -> Any:
    """mean + std * normal(...), rounded to float32: the very same bits as by way of float64, in NumPy.

    So many steps in float64 take long. So sine and cosine come from shorter polynomials at first, with an
    error below 2**-46, and the logarithm from NumPy; a number whose rounding would be another within 2**-43
    is made again from `_box_muller`: about one in 5000.
    """
    pairs, skip = _pairs(np, seed, draw, start, count)
    radius = _radius(np, pairs, lambda xp, a: xp.log(a, out=a))
    z = np.empty(pairs.shape)
    for k, part in enumerate(_cos_sin(pairs[:, 1])):
        np.multiply(part, radius, out=z[:, k])
    if (mean, std) != (0, 1):
        z *= std
        z += mean
    slack = abs(std) * MAX_RADIUS * 2.0**-43 + abs(mean) * 2.0**-50
    z -= slack
    found = z.astype(np.float32)
    z += 2 * slack
    unsure = np.flatnonzero(found != z.astype(np.float32)) // 2
    if len(unsure):
        exact = _box_muller(np, pairs[unsure])
        exact *= std
        exact += mean
        found[unsure] = exact
    return found.reshape(-1)[skip:][:count]


def _cos_sin(turns: Any) -> tuple[Any, Any]:
    """cos and sin of 2 pi t in float64, to 2**-46, for t = turns / 2**64.

    Taylor's polynomial of degree 15 gives the sine of a quarter of the angle, at most pi / 4. The cosine
    follows without cancellation, and two doublings lead to the whole.
    """
    u = turns.view(np.int64).astype(np.float64)             # t or t - 1, the same angle
    u *= 2 * np.pi / 4 * 2.0**-64
    square = u * u
    s = square * SINE[-1]
    for term in SINE[-2::-1]:
        s += term
        s *= square
    s += 1
    s *= u                                                  # sin u
    np.multiply(s, s, out=square)
    np.subtract(1, square, out=u)
    s *= np.sqrt(u, out=u)                                  # sin u cos u = sin(2 u) / 2
    square *= -8
    square += 4                                             # 4 cos(2 u)
    square *= s
    s *= s
    s *= -8
    s += 1
    return s, square


def below(xp: Any, seed: int, draw: int, start: int, count: int, extent: int) -> Any:
    """Integers in [0, extent) as uint64; 1 <= extent <= 2**64. Each is likelier than another by at most
    2**-64."""
    found = words(xp, seed, draw, start, count)
    return found if extent == 2**64 else wide_product(xp, found, extent)[0]


def chosen(xp: Any, seed: int, draw: int, start: int, count: int, p: float) -> Any:
    """Bools that are True with probability p (to 2**-32)."""
    threshold = round(p * 2**32)
    if not 0 < threshold < 2**32:
        return xp.full(count, threshold > 0)
    return halves(xp, seed, draw, start, count) < xp.uint32(threshold)


# --- values of a piece ---------------------------------------------------------------------------------

def fill(xp: Any, values: Fill, out: Any, offset: Shape, whole: Shape) -> Any:
    """Write `values(start, count)` of a piece's elements into the contiguous array `out`, and return it.

    `values` gives a run of elements by their number in the whole tensor. Where a piece lies in many short
    runs (a split of the last dimension), the gaps between neighbours are made too and left out.
    """
    if out.size:
        _fill(xp, values, out, offset, whole, 0)
    return out


def _fill(xp: Any, values: Fill, out: Any, offset: Shape, whole: Shape, start: int) -> None:
    """`start` is the number of the element where the subarray `whole` begins."""
    if out.shape[1:] == whole[1:]:
        stride = prod(whole[1:])
        flat, first = out.reshape(-1), start + (offset[0] * stride if offset else 0)
        for run in _chunks(xp, flat.size, 1):
            flat[run] = values(first + run.start, run.stop - run.start)
        return
    stride, held = prod(whole[1:]), prod(out.shape[1:])
    first = start + offset[0] * stride
    if stride - held > JUMP:
        for i in range(len(out)):
            _fill(xp, values, out[i], offset[1:], whole[1:], first + i * stride)
        return
    inside = tuple(slice(o, o + n) for o, n in zip(offset[1:], out.shape[1:], strict=True))
    for rows in _chunks(xp, len(out), stride):
        count = rows.stop - rows.start
        covering = values(first + rows.start * stride, count * stride).reshape(count, *whole[1:])
        out[rows] = covering[(slice(None), *inside)]


def _chunks(xp: Any, count: int, size: int) -> Iterator[slice]:
    """Runs of items of `size` elements; on a device all of them at once."""
    step = max(1, CHUNK // size) if xp is np else count
    return (slice(at, min(at + step, count)) for at in range(0, count, step))
