"""The rows of the op table, by topic. Importing this package fills meshtape.runtime.op.TABLE."""

from meshtape.runtime.ops import pointwise as pointwise
from meshtape.runtime.ops import reduce as reduce
