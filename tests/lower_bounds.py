"""Print the lower bounds of the library's dependencies as a constraints file: python tests/lower_bounds.py."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("netcdf", "demo", "data")


def main():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(each for name in EXTRAS for each in project["optional-dependencies"][name])]
    for requirement in listed:
        if found := re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement):
            name, bound = found.groups()
            print(f"{name}=={bound}" if bound.count(".") >= 2 else f"{name}~={bound}.0")


if __name__ == "__main__":
    main()
