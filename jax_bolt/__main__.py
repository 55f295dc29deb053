# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt``."""

import sys

from ._src.cli import main

if __name__ == "__main__":
    sys.exit(main())
