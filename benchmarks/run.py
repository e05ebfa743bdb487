"""Run the benchmarks, each in a process of its own: `make bench`, or `python benchmarks/run.py walk text:memory`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL = ["walk", "text:speed", "text:overhead", "text:first", "text:memory"]


def main() -> None:
    machine = "from benchmarks.timing import machine; print(machine())"
    subprocess.run([sys.executable, "-c", machine], cwd=ROOT, check=True)
    for name in sys.argv[1:] or ALL:
        module, _, command = name.partition(":")
        print(f"\n## {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *filter(None, [command])], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
