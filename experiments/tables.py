"""The tables of the papers, and ours beside them: one command each.

    python -m experiments.tables NAME [--scale tiny|small|paper] [--plan TARGET] ...

NAME: arithmetic, commonsense, forgetting, glue, instruct, memory. Each has the options
of its module, which `NAME --help` lists. `tiny` shows in minutes on two cores that a
table can be made, `small` is for a genuine small model, `paper` has the paper's
settings and is meant for accelerators; `--plan v5p:2x2x1` reports what those would need
there. Runs are kept, so the same command again collects what it has made and goes on
where it was.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from experiments.command import run_command

TABLES = {
    "arithmetic": "experiments.arithmetic",
    "commonsense": "experiments.commonsense",
    "forgetting": "experiments.forgetting",
    "glue": "experiments.glue",
    "instruct": "experiments.instruct",
    "memory": "experiments.benchmarks.memory",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Makes one of the tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], usage="%(prog)s NAME [options]"
    )
    parser.add_argument("name", choices=TABLES)
    args = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(args[:1]).name
    importlib.import_module(TABLES[name]).main(args[1:])


if __name__ == "__main__":
    run_command(main)
