"""Feeding data in memory to a model."""

from meshtape.data.loader import DataLoader, random_split

__all__ = ["DataLoader", "random_split"]
