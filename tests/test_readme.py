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


def test_pruning_your_own_network(tmp_path, monkeypatch, capsys):
    names = run(PROGRAMS[0], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    removed = int(re.search(r"(\d+) % of the parameters removed", printed).group(1))
    accuracy = float(re.search(r"accuracy (\d\.\d+)", printed).group(1))
    assert removed >= 70
    assert accuracy >= 0.92
    assert str(names["bmrs"].load("small")) == str(names["small"])


@pytest.mark.parametrize("program", PROGRAMS[1:])
def test_other_programs(program, tmp_path, monkeypatch):
    run(program, tmp_path, monkeypatch)
