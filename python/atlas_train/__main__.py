"""``python -m atlas_train`` is ``atlas``."""

from __future__ import annotations

import sys

from .cli import main
from .processes import leave

if __name__ == "__main__":
    status = main()
    leave(status)
    sys.exit(status)
