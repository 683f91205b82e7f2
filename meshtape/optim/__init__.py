"""Optimizers and learning-rate schedules, by PyTorch's names and semantics."""

from meshtape.optim import lr_scheduler
from meshtape.optim.adam import Adam, AdamW
from meshtape.optim.optimizer import Optimizer
from meshtape.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "lr_scheduler"]
