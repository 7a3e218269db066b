"""`python -m harness.tracking`: results in MLflow, looked at (`--ui`) or written again (`--sync`)."""

import sys

from harness.tracking.ui import main

if __name__ == "__main__":
    sys.exit(main())
