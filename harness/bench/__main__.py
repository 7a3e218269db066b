"""Command line: `python -m harness.bench NAME`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own log, which memory is read from; both before torch

from harness.api import ConfigError
from harness.bench.options import DTYPES, BenchOptions

BENCHES = {"soft-topk": "soft_topk", "inference": "inference", "training-cost": "training_cost", "injection": "injection_cost",
           "workers": "workers", "sweep": "sweep_cost", "contamination": "contamination"}
"""Name -> module of this package, imported when it is asked for."""


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, write its table to stdout and its raw numbers to --json. Returns 1 when a bar is missed."""
    args = _parser().parse_args(arguments)
    try:
        options = BenchOptions(device=args.device, dtype=args.dtype, width=args.width, rounds=args.rounds, sweep=args.sweep)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    import torch

    import methods as methods
    from harness.bench.measurements import as_json, as_table
    from harness.hardware.provenance import environment

    bench = importlib.import_module(f"harness.bench.{BENCHES[args.name]}")
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = environment(options.device, options.dtype)
    rows = []
    for row in bench.run(options):
        rows.append(row)
        sys.stderr.write(f"{row.name}: {row.value:.4g} {row.verdict}\n")  # as it comes: some rows take a minute
    sys.stdout.write(f"{args.name}: {facts['cpu_model'] if options.device == 'cpu' else facts['device']}, {facts['threads']} "
                     f"threads, torch {facts['packages'].get('torch')}, {options.dtype}\n\n{as_table(rows)}\n")
    if args.json:
        asked = {**vars(options), "sweep": str(options.sweep)}
        record = {"bench": args.name, "options": asked, "environment": facts, "rows": as_json(rows)}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(row.verdict == "FAIL" for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--width", type=int, default=768, help="width of the random SD3 blocks (default 768)")
    parser.add_argument("--rounds", type=int, help="A-B-B-A rounds; default: the benchmark's own")
    parser.add_argument("--sweep", type=Path, default=BenchOptions.sweep, metavar="FILE",
                        help=f"for sweep; default: {BenchOptions.sweep}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
