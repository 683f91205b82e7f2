"""The rows of the op table, by topic. Importing this package fills meshtape.runtime.op.TABLE."""

from meshtape.runtime.ops import activation as activation
from meshtape.runtime.ops import attention as attention
from meshtape.runtime.ops import batch_norm as batch_norm
from meshtape.runtime.ops import contraction as contraction
from meshtape.runtime.ops import conv as conv
from meshtape.runtime.ops import create as create
from meshtape.runtime.ops import einsum as einsum
from meshtape.runtime.ops import embedding as embedding
from meshtape.runtime.ops import gather as gather
from meshtape.runtime.ops import gru as gru
from meshtape.runtime.ops import index as index
from meshtape.runtime.ops import join as join
from meshtape.runtime.ops import lstm as lstm
from meshtape.runtime.ops import nn as nn
from meshtape.runtime.ops import norm as norm
from meshtape.runtime.ops import optim as optim
from meshtape.runtime.ops import pad as pad
from meshtape.runtime.ops import pointwise as pointwise
from meshtape.runtime.ops import pool as pool
from meshtape.runtime.ops import random as random
from meshtape.runtime.ops import recurrent as recurrent
from meshtape.runtime.ops import reduce as reduce
from meshtape.runtime.ops import scan as scan
from meshtape.runtime.ops import shape as shape
from meshtape.runtime.ops import slices as slices
from meshtape.runtime.ops import sort as sort
