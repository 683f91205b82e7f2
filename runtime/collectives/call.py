"""One 64-bit word that says which collective a rank is in, so that peers can tell a mismatch from a delay."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from meshtape.runtime.errors import CommError

VERBS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send", "barrier")
OPS = ("", "sum", "max", "min", "prod")
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
          "float32", "float64", "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e5m2")
OTHER_DTYPE = 63

# Bits, from the top: verb 4, op 3, dtype 6, elements 35, detail 16.
_COUNT_BITS, _DETAIL_BITS = 35, 16


@lru_cache(maxsize=4096)
def encode(verb: str, op: str, dtype: np.dtype[Any], count: int, detail: tuple[int, ...] = ()) -> int:
    """The word for a call. `detail` (counts, root) enters as a 16-bit checksum: compared, never shown."""
    kind = DTYPES.index(dtype.name) if dtype.name in DTYPES else OTHER_DTYPE
    word = (VERBS.index(verb) << 3 | OPS.index(op)) << 6 | kind
    word = word << _COUNT_BITS | count & (1 << _COUNT_BITS) - 1
    checksum = zlib.crc32(repr(detail).encode()) & 0xFFFF if detail else 0
    return word << _DETAIL_BITS | checksum


def verb_of(word: int) -> str:
    code = word >> 3 + 6 + _COUNT_BITS + _DETAIL_BITS
    return VERBS[code] if code < len(VERBS) else f"unknown verb {code}"


def describe(word: int) -> str:
    """A call as its user wrote it, as far as the word says."""
    count = word >> _DETAIL_BITS & (1 << _COUNT_BITS) - 1
    kind = word >> _DETAIL_BITS + _COUNT_BITS & 63
    op = word >> _DETAIL_BITS + _COUNT_BITS + 6 & 7
    if verb_of(word) == "barrier":
        return "barrier"
    name = DTYPES[kind] if kind < len(DTYPES) else "another dtype"
    reduction = f" {OPS[op]}" if 0 < op < len(OPS) else ""
    return f"{verb_of(word)}{reduction} of {count} {name}"


def mismatch(rank: int, mine: int, peer: int, theirs: int) -> CommError:
    """The error for two ranks in different calls."""
    ours, other = describe(mine), describe(theirs)
    if ours == other:
        other += " with other counts or another root"
    return CommError(f"ranks are in different collectives: rank {rank} in {ours}, rank {peer} in {other}; "
                     "every rank must make the same calls in the same order with matching arguments")
