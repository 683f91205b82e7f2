"""Neural network layers, by PyTorch's names and semantics."""

from meshtape.nn import functional, init, utils
from meshtape.nn.activations import (
    ELU,
    GELU,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from meshtape.nn.containers import ModuleDict, ModuleList, Sequential
from meshtape.nn.layers import Dropout, Embedding, Flatten, Identity, LayerNorm, Linear, RMSNorm
from meshtape.nn.losses import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    HuberLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    SmoothL1Loss,
)
from meshtape.nn.module import Module
from meshtape.nn.parallel import parallelize
from meshtape.nn.parameter import Parameter

__all__ = [
    "ELU", "GELU", "BCEWithLogitsLoss", "CrossEntropyLoss", "Dropout", "Embedding", "Flatten", "HuberLoss",
    "Identity", "L1Loss", "LayerNorm", "LeakyReLU", "Linear", "LogSoftmax", "MSELoss", "Module",
    "ModuleDict", "ModuleList", "NLLLoss", "Parameter", "RMSNorm", "ReLU", "Sequential", "SiLU", "Sigmoid",
    "SmoothL1Loss", "Softmax", "Softplus", "Tanh", "functional", "init", "parallelize", "utils",
]
