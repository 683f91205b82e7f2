"""Optimizers and learning-rate schedules, by PyTorch's names and semantics."""

from meshtape.optim import lr_scheduler
from meshtape.optim.adam import Adam, AdamW
from meshtape.optim.adaptive import Adagrad, RMSprop
from meshtape.optim.optimizer import Optimizer
from meshtape.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSprop", "lr_scheduler"]
