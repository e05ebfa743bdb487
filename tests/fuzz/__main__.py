"""Try random programs, patterns, schemas and files for a given time: `make fuzz`.

python -m tests.fuzz --seconds 300 --seed 0
"""

import argparse
import time

from tests.fuzz import constraints, files, programs


def main() -> None:
    """Give each kind its share of the time; the first failure ends the run with what reproduces it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all kinds together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="by default another one each time")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    kinds = {"programs": programs.run, "constraints": constraints.run, "files": files.run}
    for name, run in kinds.items():
        count = run(arguments.seconds / len(kinds), arguments.seed, None)
        print(f"{name}: {count} cases", flush=True)


if __name__ == "__main__":
    main()
