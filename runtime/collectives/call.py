"""One 64-bit word that says which collective a rank is in, so that peers can tell a mismatch from a delay."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from meshtape.runtime.errors import CommError, DTypeError

VERBS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send", "barrier",
         "all_reduce_many", "reduce_scatter_many", "all_gather_many")
OPS = ("", "sum", "max", "min", "prod")
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
          "float32", "float64", "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e5m2")

# Bits, from the top: verb 4, op 3, dtype 6, elements 35, detail 16.
_COUNT_BITS, _DETAIL_BITS = 35, 16


@lru_cache(maxsize=4096)
def encode(verb: str, op: str, dtype: np.dtype[Any], count: int, detail: tuple[int, ...] = ()) -> int:
    """The word for a call. `detail` (counts, root) enters as a 16-bit checksum: compared, never shown."""
    if dtype.name not in DTYPES or not dtype.isnative:
        raise DTypeError(f"{verb}: arrays of {dtype} do not travel; use one of {', '.join(DTYPES)}, in the "
                         "machine's byte order")
    word = (VERBS.index(verb) << 3 | OPS.index(op)) << 6 | DTYPES.index(dtype.name)
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
    name = DTYPES[kind] if kind < len(DTYPES) else f"unknown dtype {kind}"
    reduction = f" {OPS[op]}" if 0 < op < len(OPS) else ""
    return f"{verb_of(word)}{reduction} of {count} {name}"


def uneven(rank: int, expected: int, peer: int, sent: int, unit: str = "elements") -> CommError:
    """The error for counts that differ between two ranks of an all_to_all."""
    return CommError(f"all_to_all: rank {peer} sends {sent} {unit} to rank {rank}, which expects {expected}; "
                     "make send_counts and recv_counts agree")


def mismatch(rank: int, mine: int, peer: int, theirs: int) -> CommError:
    """The error for two ranks in different calls."""
    ours, other = describe(mine), describe(theirs)
    if ours == other:
        other += " with other counts, shapes, places or another root"
    return CommError(f"ranks are in different collectives: rank {rank} in {ours}, rank {peer} in {other}; "
                     "every rank must make the same calls in the same order with matching arguments")
