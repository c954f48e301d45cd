import math

import torch
from nets import build

import pyro_bmrs as bmrs


def test_scores_are_the_evidence_and_the_log_odds():
    model, guide, x = build("mlp")
    context = bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, x), x, torch.arange(len(x)) % 4)
    printed, reference, substantial = (
        torch.cat(list(criterion.scores(context).values()))
        for criterion in (bmrs.BMRS_N(prior_log_odds=odds) for odds in (0.0, 0.5 * math.log(2 * math.pi), math.log(3)))
    )
    torch.testing.assert_close(printed, torch.cat(list(bmrs.evidence_changes(guide).values())))
    torch.testing.assert_close(reference - 0.5 * math.log(2 * math.pi), printed)
    torch.testing.assert_close(substantial - math.log(3), printed)
