"""Random networks, noise inside or attached, random masks: compacted equals masked, or refused before training.

``python tests/campaign.py --first 0 --count 3000`` runs it at length and prints what came out.
"""

import argparse
import json
import sys
import time
import warnings
from collections import Counter

import torch
from random_networks import random_network
from torch.utils._pytree import tree_map

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call, random_like
from pyro_bmrs.structures.refusal import removable_structures
from pyro_bmrs.structures.trial import Bench

TOLERANCE = 1e-9


class FoundError(Exception):
    """Something that ends a check, by its outcome."""


def prepare(seed, noise):
    """Return a model on a random network in float64, its structures, inputs, and why it was refused, if it was.

    Raise what was found instead of all that, if so.
    """
    net, x = random_network(seed, noise)
    net = net.double()
    x = tree_map(lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t, x)
    if noise:
        model = bmrs.NoisyNetwork(net)
        try:
            return model, removable_structures(model.net, x), x, None
        except ValueError as error:
            return model, removable_structures(model.net, x, unremovable="mask"), x, str(error)
    structures = bmrs.find_structures(net, x)
    if not structures:
        raise FoundError("nothing offered", "; ".join(structures.refused.values()))
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    return model, removable_structures(model.net, x), x, None


def masks_of(model, trial, generator):
    """Return masks that keep half, most, or half with one site emptied."""
    keep = (0.5, 0.8, 0.5)[trial]
    masks = {site: torch.rand(size, generator=generator) < keep for site, size in model.sizes.items()}
    if trial == 2:
        masks[list(masks)[int(torch.randint(len(masks), (), generator=generator))]][:] = False
    return masks


def compare(model, guide, structures, masks, x, new):
    """Compact once; raise unless outputs and costs are those of the masked network, and return what was removed."""
    small = bmrs.compact(model, guide, masks, x, structures)
    bench = Bench(small, [new], 1e-4 if structures.record.low_precision else TOLERANCE)
    with torch.no_grad():
        off = bench.error(bmrs.predict(model, guide, new, masks), call(small, new), small, 0)
    if off is not None:
        raise FoundError("wrong", f"off by {off:.1e}")
    counts = bmrs.count_parameters(model.net, structures, masks), bmrs.count_parameters(small)
    flops = bmrs.count_flops(model.net, x, structures, masks), bmrs.count_flops(small, x)
    if counts[0] != counts[1] or flops[0] != flops[1]:
        raise FoundError("miscounted", f"parameters {counts}, FLOPs {flops}")
    return bmrs.count_parameters(model.net) - counts[0]


def check(seed, noise):
    """Return ``(outcome, detail)`` for one random network: ``"exact"``, ``"refused"``, or what is wrong with it."""
    try:
        model, structures, x, refused = prepare(seed, noise)
        guide = bmrs.TruncatedLogNormalGuide(model).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            guide.loc.uniform_(-2, 0, generator=generator)
        new = random_like(x, generator)
        removed = 0
        for trial in range(3):
            removed += compare(model, guide, structures, masks_of(model, trial, generator), x, new)
        if not noise:
            with torch.no_grad():
                if difference(call(model.net.detach(), x), call(prepare_plain(seed), x)) != 0:
                    raise FoundError("changed", "the network is not what it was")
    except FoundError as found:
        return found.args
    except ValueError as error:  # before training
        return "refused", str(error)
    if refused:
        return "refused", refused
    return ("exact" if removed else "nothing removed"), f"{len(model.sizes)} sites, {len(structures.refused)} refused"


def prepare_plain(seed):
    """Return the random network itself."""
    return random_network(seed)[0].double()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes = {"attached": Counter(), "inside": Counter()}
    started = time.time()
    for seed in range(arguments.first, arguments.first + arguments.count):
        noise = bool(seed % 2)
        try:
            outcome, detail = check(seed, noise)
        except Exception as error:  # whatever goes wrong is a finding
            outcome, detail = "failed", f"{type(error).__name__}: {str(error)[:300]}"
        outcomes["inside" if noise else "attached"][outcome] += 1
        if outcome not in ("exact", "refused", "nothing offered", "nothing removed"):
            print(seed, noise, outcome, detail, flush=True)
    result = {kind: dict(counts) for kind, counts in outcomes.items()} | {"seconds": round(time.time() - started)}
    print(json.dumps(result))
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result | {"first": arguments.first, "count": arguments.count}, file)


if __name__ == "__main__":
    sys.exit(main())
