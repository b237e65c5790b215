"""`python -m perceiver_kernels` is the `perceiver-kernels` command."""

import sys

from perceiver_kernels.cli import main

sys.exit(main())
