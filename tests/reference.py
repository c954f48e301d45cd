"""Write the reference of the library from its docstrings: python tests/reference.py FOLDER."""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import models
import pyro_bmrs as bmrs


def names(package):
    """Return the modules of a package by their full names, private ones left out."""
    found = [each.name for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [package.__name__, *(name for name in found if not name.split(".")[-1].startswith("_"))]


def main(folder):
    for name in bmrs.__all__:  # the plots are imported when they are asked for
        getattr(bmrs, name)
    pdoc.render.configure(docformat="google", math=True, footer_text=f"pyro-bmrs {bmrs.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a package that brings its modules along, and one that does not
        pdoc.pdoc(*names(bmrs), *names(models), output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
