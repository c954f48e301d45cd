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

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call, random_like
from pyro_bmrs.structures.refusal import removable_structures

TOLERANCE = 1e-9


def check(seed, noise):
    """Return ``(outcome, detail)`` for one random network: ``"exact"``, ``"refused"``, or what is wrong with it."""
    net, x = random_network(seed, noise)
    net = net.double()
    x = torch.utils._pytree.tree_map(lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t, x)
    with torch.no_grad():
        outputs = call(net, x)
    refused = 0
    structures = None
    if not noise:
        structures = bmrs.find_structures(net, x)
        refused = len(structures.refused)
        if not structures:
            return "nothing offered", "; ".join(structures.refused.values())
        net = bmrs.attach_noise(net, structures)
    try:
        model = bmrs.NoisyNetwork(net)
    except ValueError as error:
        return "refused", str(error)
    try:
        structures = removable_structures(model.net, x)
    except ValueError as error:
        refused, reason = 1, str(error)
        structures = removable_structures(model.net, x, unremovable="mask")
    guide = bmrs.TruncatedLogNormalGuide(model).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        guide.loc.uniform_(-2, 0, generator=generator)
    new = random_like(x, generator)
    removed = 0
    for trial in range(3):
        keep = (0.5, 0.8, 0.5)[trial]
        masks = {site: torch.rand(size, generator=generator) < keep for site, size in model.sizes.items()}
        if trial == 2:
            site = list(masks)[int(torch.randint(len(masks), (), generator=generator))]
            masks[site][:] = False
        small = bmrs.compact(model, guide, masks, x, structures)
        with torch.no_grad():
            found, expected = call(small, new), bmrs.predict(model, guide, new, masks)
            off = difference(found, expected)
            if not off <= (1e-4 if structures.record.low_precision else TOLERANCE):
                finite = all(bool(torch.isfinite(t).all()) for t in torch.utils._pytree.tree_leaves(expected))
                return ("wrong" if finite else "not finite"), f"off by {off:.1e}, trial {trial}"
        counted = bmrs.count_parameters(model.net, structures, masks)
        if counted != bmrs.count_parameters(small):
            return "miscounted", f"{counted} for {bmrs.count_parameters(small)}"
        if bmrs.count_flops(model.net, x, structures, masks) != bmrs.count_flops(small, x):
            return "miscounted", "flops"
        removed += bmrs.count_parameters(model.net) - counted
    if not noise:
        same = net.detach()
        with torch.no_grad():
            if difference(call(same, x), outputs) != 0:
                return "changed", "the network is not what it was"
    if refused and noise:
        return "refused", reason
    return ("exact" if removed else "nothing removed"), f"{len(model.sizes)} sites, {refused} refused"


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
