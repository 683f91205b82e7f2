"""Where in the user's program an op was called: noted for every op, read only when something fails."""

from __future__ import annotations

import sys
from types import CodeType

Site = tuple[CodeType, int]

_inside: set[str] = set()       # names of meshtape's modules, as they are met


def user_site() -> Site:
    """Code and instruction of the innermost caller outside meshtape.

    Frames are told by their module's name, whose hash is known: a code object's is computed each time.
    """
    frame = sys._getframe(2)
    while True:
        name = frame.f_globals.get("__name__", "")
        if name not in _inside:
            if name != "meshtape" and not name.startswith("meshtape."):
                return frame.f_code, frame.f_lasti
            _inside.add(name)
        outer = frame.f_back
        if outer is None:
            return frame.f_code, frame.f_lasti
        frame = outer


def site_text(site: Site) -> str:
    """file:line of a noted call."""
    code, at = site
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= at < end and number is not None:
            line = number
    return f"{code.co_filename}:{line}"
