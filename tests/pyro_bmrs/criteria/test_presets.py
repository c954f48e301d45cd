import math

import torch
from nets import build
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs


def test_presets_differ_by_their_odds_alone():
    model, guide, x = build("mlp")
    context = bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, x), x, torch.arange(len(x)) % 4)
    printed, reference, substantial = (
        torch.cat(list(criterion.scores(context).values()))
        for criterion in (bmrs.bmrs_n, bmrs.bmrs_n_reference, bmrs.bmrs_n_substantial)
    )
    torch.testing.assert_close(printed, torch.cat(list(bmrs.evidence_changes(guide).values())))
    torch.testing.assert_close(reference - 0.5 * math.log(2 * math.pi), printed)
    torch.testing.assert_close(substantial - math.log(3), printed)


def test_the_references_loss_averages_over_structures_and_layers():
    model, guide, _ = build("lenet5", dtype=torch.float64)
    plain = {site: kl_divergence(q, guide.prior()[site]) for site, q in guide.posterior().items()}
    weighted = bmrs.NoisyNetwork(model.net, num_data=500, kl_weight=bmrs.reference_kl_weights(model.net, 500))
    again = bmrs.TruncatedLogNormalGuide(weighted).double()
    again.load_state_dict(guide.state_dict())
    torch.testing.assert_close(again.kl() / 500, torch.stack([kl.mean() for kl in plain.values()]).mean())
