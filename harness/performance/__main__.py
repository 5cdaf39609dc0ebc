"""The command: measures the cells, or publishes what was measured."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.performance", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small cell of each kind, about two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="each has cells of its own (default cpu)")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="some groups of cells")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs per cell, at least 9 (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads (default 2)")
    parser.add_argument("--output", type=Path, default=Path("performance"), help="directory for performance.json")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="write DIR/performance.md and its pictures from the output")
    options = parser.parse_args(argv)
    # Read when OpenMP starts, so before torch is imported: threads that wait must not be counted as work.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from harness.performance.running import Refused, publish, run

    try:
        if options.publish is not None:
            return publish(options.output, options.publish)
        return run(options)
    except Refused as refused:
        print(f"python -m harness.performance: {refused}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
