"""Seeing what happens: the last batch as a table, and who holds which slice."""

from __future__ import annotations


def explain() -> str:
    return ""


def visualize() -> str:
    return ""
