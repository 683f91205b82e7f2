"""What `meshtape doctor` says about one thing."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["ok", "note", "wrong"]


class Finding(NamedTuple):
    """One line of the report; `fix` says what to do, if anything."""

    verdict: Verdict
    text: str
    fix: str = ""
