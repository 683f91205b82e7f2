"""Where in the user's program an op was called: noted for every op, read only when something fails."""

from __future__ import annotations

import sys
from types import CodeType

Site = tuple[CodeType, int]

_inside: dict[CodeType, bool] = {}


def user_site() -> Site:
    """Code and instruction of the innermost caller outside meshtape."""
    frame = sys._getframe(2)
    while True:
        code = frame.f_code
        inside = _inside.get(code)
        if inside is None:
            name = frame.f_globals.get("__name__", "")
            inside = _inside[code] = name == "meshtape" or name.startswith("meshtape.")
        outer = frame.f_back
        if not inside or outer is None:
            return code, frame.f_lasti
        frame = outer


def site_text(site: Site) -> str:
    """file:line of a noted call."""
    code, at = site
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= at < end and number is not None:
            line = number
    return f"{code.co_filename}:{line}"
