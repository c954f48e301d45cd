import pytest

from analysis.runs.reference_count import reference_compression
from models import lenet5, mlp


def test_biases_stay_and_the_posterior_counts():
    net = mlp(20, hidden=10, layers=2, classes=3)
    total = 20 * 10 + 10 + 10 * 10 + 10 + 10 * 3 + 3 + 2 * 20
    left = 20 * 4 + 10 + 4 * 5 + 10 + 5 * 3 + 3 + 2 * 9
    assert reference_compression(net, {"fc1_noise": 4, "fc2_noise": 5}) == pytest.approx(1 - left / total)
    assert reference_compression(net, {"fc1_noise": 10, "fc2_noise": 10}) == 0


def test_inputs_behind_flattened_maps_stay():
    net = lenet5(1)
    kept = {"conv1_noise": 4, "conv2_noise": 3, "fc1_noise": 17, "fc2_noise": 10}
    weights = 4 * 25 + 3 * 4 * 25 + 17 * 400 + 10 * 17 + 10 * 10
    left = weights + 6 + 16 + 120 + 84 + 10 + 2 * sum(kept.values())
    assert reference_compression(net, kept) == pytest.approx(1 - left / (61_706 + 2 * 226))
