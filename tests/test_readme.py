"""The README's programs run as printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(program, "README.md", "exec"), names)
    return names


def check_pruned(program, tmp_path, monkeypatch, capsys):
    names = run(program, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    removed = int(re.search(r"(\d+) % of the parameters removed", printed).group(1))
    accuracy = float(re.search(r"\naccuracy (\d\.\d+)", printed).group(1))
    assert removed >= 70
    return names, accuracy


@pytest.mark.slow
def test_pruning_your_own_network(tmp_path, monkeypatch, capsys):
    names, accuracy = check_pruned(PROGRAMS[0], tmp_path, monkeypatch, capsys)
    assert accuracy >= 0.86  # the dense network has 0.84
    assert str(names["again"]) == str(names["small"])


def test_noise_placed_by_hand(tmp_path, monkeypatch, capsys):
    names, accuracy = check_pruned(PROGRAMS[1], tmp_path, monkeypatch, capsys)
    assert accuracy >= 0.92
    assert str(names["bmrs"].load("small")) == str(names["small"])


@pytest.mark.parametrize("program", PROGRAMS[2:])
def test_other_programs(program, tmp_path, monkeypatch):
    run(program, tmp_path, monkeypatch)
