"""`python -m harness.report results/SWEEP`: write the report of a results folder, or one report of several."""

import sys

from harness.reporting.report import main

if __name__ == "__main__":
    sys.exit(main())
