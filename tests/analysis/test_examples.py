import warnings

import pytest
import torch

from analysis.examples import plain_loop


def test_a_plain_loop(capsys):
    small = plain_loop.main(epochs=24, warm_up=6)
    before, _, after = capsys.readouterr().out.splitlines()[0].partition(" parameters -> ")
    assert int(after.replace(",", "")) < 0.7 * int(before.replace(",", ""))
    assert small(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(("name", "needs"), [("lightning_module", "lightning"), ("hugging_face", "accelerate")])
def test_other_trainers(name, needs, capsys):
    with warnings.catch_warnings():  # of other libraries, at their pleasure
        warnings.simplefilter("ignore")
        pytest.importorskip(needs)
        from importlib import import_module

        small = import_module(f"analysis.examples.{name}").main(epochs=2)
    assert "parameters ->" in capsys.readouterr().out
    assert isinstance(small, torch.nn.Module)
