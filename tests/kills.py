"""Kill fits at random moments and resume them: python tests/kills.py --first SEED --count N.

Each case is one fit in a process of its own (or two, by gloo), which is killed by SIGKILL, SIGTERM or SIGINT at a
random moment and started again, until it has come through. Its end must be, to the bit, that of a fit that was never
killed. Prints the number of kills, and every case that ended otherwise.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

PROCESSES = Path(__file__).with_name("processes.py")
CASES = ("plain", "shrink", "post_training", "two_processes")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(case, folder):
    """Start the fit called ``case`` in a process group of its own, going on from what is in ``folder``."""
    command = [sys.executable, str(PROCESSES), f"resumed_{case}", str(folder)]
    if case == "two_processes":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command[1:]]
    return subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROCESSES.parents[1]), "OMP_NUM_THREADS": "1"},
    )


def wait(process, seconds):
    """Return the errors of a process that ends within some seconds, or None."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        return None


def run(case, folder):
    """Run a fit to its end and return how many seconds that took."""
    started = time.perf_counter()
    process = start(case, folder)
    errors = wait(process, 300)
    if process.returncode != 0:
        raise RuntimeError(f"{case} ended with {process.returncode}: {(errors or '')[-2000:]}")
    return time.perf_counter() - started


def kill_and_resume(case, folder, lasts, chance, kills):
    """Kill a fit ``kills`` times at random moments of the ``lasts`` seconds that it takes, and return the signals."""
    sent = []
    begun = folder / "begun"
    while len(sent) < kills:
        begun.unlink(missing_ok=True)
        process = start(case, folder)
        while not begun.exists() and process.poll() is None:
            time.sleep(0.005)  # imports are not what is tried
        if wait(process, chance.uniform(0, lasts)) is None and process.poll() is None:
            sent.append(chance.choice(SIGNALS))
            os.killpg(process.pid, sent[-1])
            if wait(process, 60) is None:
                raise RuntimeError(f"{case} does not end after {sent[-1].name}")
        elif process.returncode != 0:
            raise RuntimeError(f"{case} ended with {process.returncode}")
        else:  # it came through: once more from the start
            shutil.rmtree(folder)
            folder.mkdir()
    run(case, folder)
    return sent


def differences(one, other):
    """Return in what two ends differ."""
    expected, found = (load_file(folder / "end.safetensors") for folder in (one, other))
    wrong = [name for name in expected.keys() | found.keys() if name not in expected or name not in found]
    wrong += [name for name in expected.keys() & found.keys() if not torch.equal(expected[name], found[name])]
    left = [str(file.name) for file in other.rglob("*.partial")]
    lines = (other / "metrics.jsonl").read_text().splitlines()
    return wrong + left + ([] if len(lines) == 30 else [f"{len(lines)} lines of metrics"])


def campaign(first, count, per_case=5, cases=CASES):
    """Return counts of kills by case and signal, and the cases that ended otherwise."""
    counts, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        whole, lasts = {}, {}
        for case in cases:
            whole[case] = Path(folder) / case
            whole[case].mkdir()
            run(case, whole[case])
            lasts[case] = float((whole[case] / "seconds").read_text())
        seed = first
        while sum(counts.values()) < count:
            case, chance = cases[seed % len(cases)], random.Random(seed)
            killed = Path(folder) / f"killed{seed}"
            killed.mkdir()
            try:
                counts.update(
                    (case, each.name) for each in kill_and_resume(case, killed, lasts[case], chance, per_case)
                )
                found = differences(whole[case], killed)
            except RuntimeError as error:
                found = [str(error)]
                counts[case, "failed"] += 1
            if found:
                wrong.append((seed, case, found))
                print(f"seed {seed}, {case}: {found}", flush=True)
            seed += 1
            print(f"{sum(counts.values())} kills", flush=True)
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    counted, otherwise = campaign(arguments.first, arguments.count)
    for (name, by), number in sorted(counted.items()):
        print(f"{name:16} {by:8} {number}")
    print(f"{sum(counted.values())} kills, {len(otherwise)} fits that did not end to the bit as uninterrupted ones")
    sys.exit(bool(otherwise))
