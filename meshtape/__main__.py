"""`python -m meshtape`: the command line of meshtape.cluster.cli."""

import sys

from meshtape.cluster.cli import main

sys.exit(main())
