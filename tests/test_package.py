"""What is published: a wheel of the library alone, and a source archive from which everything can be built."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_and_source_archive_contain_what_they_should(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    in_wheel = zipfile.ZipFile(wheel).namelist()
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_bmrs").rglob("*.py")}
    assert {name for name in in_wheel if ".dist-info/" not in name} == {*library, "pyro_bmrs/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {*library, "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert {"analysis/quickstart.py", "models/lenet.py", "tests/conftest.py"} <= names
