"""`python -m harness.tracking`: mirror results to MLflow again (`--sync`), or look at them (`--ui`)."""

import sys

from harness.tracking.client import main

if __name__ == "__main__":
    sys.exit(main())
