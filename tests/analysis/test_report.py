"""A run as one page that needs nothing else."""

import html.parser
import json

import pytest

from analysis.quickstart import Quickstart
from analysis.quickstart import main as quickstart
from analysis.report import Report, main, render

pytestmark = pytest.mark.slow  # one fixture for all


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {"epochs": 12, "fine_tune_epochs": 2, "kl_weight": 2.0, "posterior_lr": 0.2, "progress": False}
    return folder, quickstart(Quickstart(network="mlp", output=folder, device="cpu", **settings))


class Page(html.parser.HTMLParser):
    """Counts tags, notes what they refer to, and gathers text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_says_what_the_run_came_to(run, capsys):
    folder, results = run
    path = main(Report(folder))
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert not page.open
    for found in (
        f"{100 * results['compression']:.1f} % of the parameters removed",
        f"{results['params_pruned']:,}",
        f"{100 * results['accuracy_test']:.2f}",
        "--kl-weight 2.0",
        results["versions"]["torch"],
    ):
        assert found in text
    for layer in results["kept"]:
        assert layer.removesuffix("_noise") in text
    assert str(path) in capsys.readouterr().out


def test_it_needs_no_scripts_and_no_network(run):
    page = Page(render(run[0]))
    assert "script" not in page.tags
    assert page.tags.count("img") == 6
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)


def test_text_is_escaped_and_what_is_missing_named(run, tmp_path):
    folder, results = run
    for name in ("config.json", "metrics.jsonl", "posterior.nc"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"results\.json is missing"):
        render(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({**results, "dataset": "<b>"}))
    assert "&lt;b&gt;" in render(tmp_path)
    assert "<b>" not in render(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        render(tmp_path)
