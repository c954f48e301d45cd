"""Damage saved files and load them: python tests/damage.py --first SEED --count N.

A file is a network, model, guide or checkpoint. In it a bit is flipped, a byte changed, a stretch zeroed, repeated or
left out, the end cut off, or the whole is replaced by that of another. Loading it must be refused with a ``ValueError``
of the library's own, and leave what it was loaded onto as it was. Prints every other outcome.
"""

import argparse
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from nets import blobs, small_classifier
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.checkpoint import read_checkpoint

LIBRARY = str(Path(bmrs.__file__).parent)


def plain(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1 + 0.01 * seed), nn.BatchNorm1d(4), nn.Linear(4, 2))


def write_all(folder):
    """Write two files of each kind and return, by kind, those of one and of another."""
    written = {}
    for seed in (0, 1):
        model, guide = small_classifier(seed=seed, hidden=6)
        with torch.no_grad():
            guide.loc.normal_()
        for kind, module in (("network", plain(seed)), ("model", model), ("guide", guide)):
            bmrs.save(module, folder / f"{kind}{seed}")
            for suffix in ("json", "safetensors"):
                written.setdefault((kind, suffix), []).append(folder / f"{kind}{seed}.{suffix}")
        run, settings = folder / f"run{seed}", {"epochs": 1, "fine_tune_epochs": 1, "progress": False}
        bmrs.fit(model, guide, blobs(30), seed=seed, folder=run, **settings)
        written.setdefault(("checkpoint", ""), []).append(run / "checkpoint" / "fit.safetensors")
    return written


def damaged(content, other, chance):
    """Return other bytes than ``content``."""
    at, length = chance.randrange(len(content)), chance.randrange(1, 40)
    kind = chance.choice(("flip", "flip", "flip", "byte", "zeros", "repeat", "cut out", "cut off", "swap"))
    changed = {
        "flip": lambda: content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
        "byte": lambda: content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
        "zeros": lambda: content[:at] + bytes(len(content[at : at + length])) + content[at + length :],
        "repeat": lambda: content[: at + length] + content[at:],
        "cut out": lambda: content[:at] + content[at + length :],
        "cut off": lambda: content[:at],
        "swap": lambda: other,
    }[kind]()
    return kind, changed


def read(kind, path):
    """Load a file of this kind onto what it is for, and return that with its state before."""
    if kind == "checkpoint":
        read_checkpoint(path)
        return
    given = None if kind == "network" else small_classifier(seed=5, hidden=6)[kind == "guide"]
    before = {} if given is None else {name: each.clone() for name, each in given.state_dict().items()}
    try:
        bmrs.load(path.with_suffix(""), given)
    finally:
        after = {} if given is None else given.state_dict()
        if any(not torch.equal(before[name], after[name]) for name in before):
            raise AssertionError("a load that was refused has changed the module")


def campaign(first, count):
    """Return counts by kind of file and of damage, and the files that were not refused."""
    counts, wrong = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        files = write_all(Path(folder))
        for seed in range(first, first + count):
            chance = random.Random(seed)
            (kind, suffix), (one, other) = chance.choice(sorted(files.items()))
            content = one.read_bytes()
            damage, changed = damaged(content, other.read_bytes(), chance)
            if changed == content or (kind == "checkpoint" and damage == "swap"):
                continue  # a whole checkpoint of another fit is for the fit that resumes to refuse
            one.write_bytes(changed)
            try:
                read(kind, one)
                wrong.append((seed, kind, suffix, damage, "loaded"))
            except ValueError as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                if not frame.filename.startswith(LIBRARY):
                    wrong.append((seed, kind, suffix, damage, f"another's {error}"))
            except Exception as error:  # everything else is a surprise
                wrong.append((seed, kind, suffix, damage, f"{type(error).__name__}: {error}"))
            finally:
                one.write_bytes(content)
            counts[f"{kind} {suffix}".strip(), damage] += 1
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    chosen = parser.parse_args()
    counted, unexpected = campaign(chosen.first, chosen.count)
    for case in unexpected:
        print(case)
    for (name, damage), number in sorted(counted.items()):
        print(f"{name:24} {damage:8} {number}")
    print(f"{sum(counted.values())} damaged files, {len(unexpected)} not refused")
    sys.exit(bool(unexpected))
