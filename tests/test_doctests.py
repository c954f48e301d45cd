"""The examples in the docstrings print what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_bmrs as bmrs

MODULES = [info.name for info in pkgutil.walk_packages(bmrs.__path__, "pyro_bmrs.")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "bmrs": bmrs, "poutine": poutine}
    torch.manual_seed(0)
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_there_are_examples():
    examples = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(len(test.examples) for found in examples for test in found) > 20


def test_every_public_function_and_class_has_one():
    without = {"EnergyTracker", "FitWarning", "UnreliableEvidenceWarning"}  # codecarbon measures; warnings are raised
    assert {name for name in bmrs.__all__ if ">>>" not in (getattr(bmrs, name).__doc__ or "")} == without
