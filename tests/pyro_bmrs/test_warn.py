import inspect
import warnings

import torch
from nets import blobs
from torch import nn

import pyro_bmrs as bmrs


def warned(call, *args, **settings):
    """Return the warnings of a call, as pairs of category and text, and whether all name the line of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        call(*args, progress=False, **settings)
    here = all((each.filename, each.lineno) == (__file__, line) for each in caught)
    return [(each.category, str(each.message)) for each in caught], here


def test_warnings_name_the_line_that_called_the_library():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    found, here = warned(bmrs.prune, net, blobs(60), epochs=2)
    assert [category for category, _ in found] == [bmrs.FitWarning]
    assert here


def test_warnings_out_of_an_epoch_do_too():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 3))
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model)
    found, here = warned(bmrs.fit, model, guide, blobs(60), criterion=bmrs.PosteriorMean(100.0), epochs=2)
    assert "'2.theta' has lost all its structures" in found[0][1]
    assert found[-1][0] is bmrs.FitWarning
    assert here
