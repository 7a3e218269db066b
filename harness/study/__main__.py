"""Command line: python -m harness.study NAME [--out DIR] [--seeds ...] [--store DIR]."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness.api import ConfigError, did_you_mean, require

STUDIES = ("synthetic", "stratified", "estimators", "table1", "intervals")
"""Modules of this package, each imported when it is asked for."""
DEFAULT_SEEDS = {"synthetic": (0, 1, 2, 3, 4), "stratified": (0,), "estimators": (0, 1, 2, 3, 4, 5), "table1": (0,),
                 "intervals": (0,)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one study and write its report; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m harness.study", description="Put a claim of the paper to the test.")
    parser.add_argument("name", help=", ".join(STUDIES))
    parser.add_argument("--out", type=Path, help="folder of the report; default results/published/NAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run, or one batch of samples, per seed")
    parser.add_argument("--store", type=Path, help="estimators: also study a trained router, kept in this store")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        require(options.name in STUDIES, f"study: unknown study '{options.name}'.{did_you_mean(options.name, STUDIES)} "
                                         f"Known: {', '.join(STUDIES)}.")
        require(options.store is None or options.name == "estimators", f"--store: study '{options.name}' trains nothing; "
                                                                       "leave it out")
        seeds = options.seeds or DEFAULT_SEEDS[options.name]
        require(len(set(seeds)) == len(seeds) and min(seeds) >= 0, f"--seeds must be different and at least 0, got {seeds}")
        from harness.study.writing import write

        study = importlib.import_module(f"harness.study.{options.name}")
        folder = options.out or Path("results/published") / options.name
        started = time.perf_counter()
        data = study.measure(seeds, options.store)
        data["seconds"] = time.perf_counter() - started
        logging.info("%s", write(options.name, study, data, folder))
    except ConfigError as error:
        logging.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
