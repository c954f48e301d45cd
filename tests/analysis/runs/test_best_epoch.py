import pytest
import torch
from torch import nn

from analysis.runs.best_epoch import BestEpoch

ACCURACIES = [0.9, 0.5, 0.7, 0.7, 0.6]


def train(callback, net, history, stop=5):
    callback.on_start(5, history)
    for epoch in range(len(history) + 1, stop + 1):
        with torch.no_grad():
            net.weight.fill_(epoch)
        record = {"epoch": epoch, "accuracy_validation": ACCURACIES[epoch - 1]}
        history.append(record)
        callback.on_epoch_end(record)


@pytest.mark.parametrize(("last", "best"), [(5, 1), (4, 3), (2, 4), (1, 5), (0, 5)])
def test_the_first_of_the_best_of_the_last_epochs_comes_back(tmp_path, last, best):
    net = nn.Linear(2, 1)
    callback = BestEpoch({"net": net}, last, tmp_path)
    train(callback, net, [])
    callback.restore()
    assert bool((net.weight == best).all())


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_training_that_is_interrupted_remembers(tmp_path, stop):
    net, history = nn.Linear(2, 1), []
    train(BestEpoch({"net": net}, 4, tmp_path), net, history, stop)
    callback = BestEpoch({"net": net}, 4, tmp_path)
    train(callback, net, history)
    callback.restore()
    assert bool((net.weight == 3).all())
