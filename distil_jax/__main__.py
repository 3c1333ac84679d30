"""`python -m distil_jax VERB`."""

import sys

from distil_jax.cli import main

sys.exit(main())
