"""``python -m edgeflow.cli``: the command line where the ``edgeflow`` script is not on the path."""

import sys

from edgeflow.cli import main

sys.exit(main())
