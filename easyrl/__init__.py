"""easyrl: align language models from human preferences with JAX."""

import itertools
import sys

# `python -m easyrl.SCRIPT` comes by here before the script itself, whose imports take seconds.
if sys.argv[:1] == ["-m"] and any(m == "-m" and x.startswith("easyrl.") for m, x in itertools.pairwise(sys.orig_argv)):
    from easyrl.core.errors import leave_at_sigint

    leave_at_sigint()
