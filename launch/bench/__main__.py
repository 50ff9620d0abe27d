"""`python -m moeweave.launch.bench`."""

import sys

from moeweave.launch.bench.program import main

sys.exit(main())
