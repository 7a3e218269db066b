"""`python -m harness.run SWEEP.yaml`: run what is missing of a sweep, then report."""

import sys

from harness.execution.driver import main

if __name__ == "__main__":
    sys.exit(main())
