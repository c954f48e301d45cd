"""The README's programs run as printed."""

import re
from pathlib import Path

import pytest

import pyro_bmrs as bmrs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(program, "README.md", "exec"), names)
    return names


@pytest.mark.slow
def test_pruning_your_own_network(tmp_path, monkeypatch, capsys):
    names = run(PROGRAMS[0], tmp_path, monkeypatch)
    pruned = names["pruned"]
    assert pruned.result.compression > 0.8
    assert pruned.comparison.evaluations[1].accuracy > 0.9
    assert str(names["again"]) == str(pruned.network)
    assert "validation accuracy %" in capsys.readouterr().out


@pytest.mark.slow
def test_other_likelihoods(tmp_path, monkeypatch, capsys):
    names = run(PROGRAMS[1], tmp_path, monkeypatch)
    tables = capsys.readouterr().out
    assert tables.count("kept %") == 3
    assert "training RMSE" in tables
    assert tables.count("training accuracy %") == 2
    assert bmrs.count_parameters(names["nets"][0]) == 193  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS[2:])
def test_other_programs(program, tmp_path, monkeypatch):
    run(program, tmp_path, monkeypatch)


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 180
    for page in (ROOT / "README.md", ROOT / "analysis" / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == []
