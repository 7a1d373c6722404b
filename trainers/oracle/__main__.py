"""`python -m fewstep.trainers.oracle`."""

import sys

from .suite import main

sys.exit(main())
