import math

import pytest
import torch
from nets import blobs, small_classifier
from torch.utils.data import TensorDataset

import pyro_bmrs as bmrs


def fit(train, validation=None):
    model, guide = small_classifier()
    before = guide.loc.detach().clone()
    try:
        return bmrs.fit(model, guide, train, validation, epochs=1, fine_tune_epochs=0, batch_size=10, progress=False)
    except Exception:
        assert torch.equal(guide.loc, before)  # found before training started
        raise


def changed(tensor, row, value):
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


def test_a_tensor_data_set_will_do():
    assert len(fit(TensorDataset(*blobs())).history) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named_by_row(value):
    x, y = blobs()
    with pytest.raises(ValueError, match="train has a NaN or infinite input in row 7"):
        fit((changed(x, 7, value), y))
    with pytest.raises(ValueError, match="validation has a NaN or infinite input in row 7"):
        fit((x, y), (changed(x, 7, value), y))


@pytest.mark.parametrize("label", [3, -1])
def test_labels_outside_the_classes_are_named_by_row(label):
    x, y = blobs()
    with pytest.raises(ValueError, match=f"observation {label} in row 5, outside the 3 classes 0 to 2"):
        fit((x, changed(y, 5, label)))


def test_labels_must_be_indices_one_an_example():
    x, y = blobs()
    with pytest.raises(ValueError, match=r"class indices: use y.long\(\)"):
        fit((x, y.float()))
    with pytest.raises(ValueError, match=r"observations of shape \(200, 1\)"):
        fit((x, y.unsqueeze(1)))
    with pytest.raises(ValueError, match=r"one observation per input.*\(200, 6\) and \(199,\)"):
        fit((x, y[:-1]))


def test_an_empty_data_set_is_refused():
    x, y = blobs()
    with pytest.raises(ValueError, match="train is empty"):
        fit((x[:0], y[:0]))


def test_something_else_than_tensors_is_refused():
    x, y = blobs()
    with pytest.raises(TypeError, match=r"pair of tensors.*\(a list, a Tensor"):
        fit((x.tolist(), y))
    with pytest.raises(TypeError, match="pair of tensors"):
        fit(x)


def test_a_network_is_no_data():
    for container in (torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.ModuleList([torch.nn.Linear(2, 2)])):
        with pytest.raises(TypeError, match="validation must be a pair of tensors"):
            fit(blobs(), container)
