"""How long `convsurgeon --help` takes, beside the interpreter itself, in turns.

python docs/benchmarks/cli.py
"""

import shutil
import statistics
import subprocess
import sys
import time

ROUNDS = 21


def main() -> None:
    """Time both commands in turn and print medians, extremes and the ratio."""
    program = shutil.which("convsurgeon", path=str(sys.executable).rsplit("/", 1)[0])
    commands = {"convsurgeon --help": [program, "--help"], "python -c pass": [sys.executable, "-c", "pass"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        times = times[1:]  # the first fills the disk cache
        print(f"{name:20} median {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f}) of {ROUNDS}")


if __name__ == "__main__":
    main()
