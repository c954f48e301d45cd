"""Networks trained before they are pruned: their weights, where noise stands, and what the study makes of them."""

import pytest
import torch

from analysis.benchmarks import pruned_latency
from analysis.data.sets import Split, digits
from analysis.runs.execution import Execution
from analysis.runs.experiment import execute
from analysis.runs.pretrained import architecture, trained, with_noise
from analysis.runs.recipes import make_config
from analysis.study import Study, configurations
from analysis.tables import tabulate

pytest.importorskip("transformers")

FEW = {"epochs": 2, "fine_tune_epochs": 1, "pretrain_epochs": 1}


def few_digits():
    split = digits(32)
    parts = ((x[:96], y[:96]) for x, y in (split.train, split.validation, split.test))
    return Split(*parts)


@pytest.mark.parametrize(
    ("network", "parameters"), [("resnet18", 11.2e6), ("resnet50", 23.5e6), ("vit_s", 21.7e6), ("vit_b16", 85.8e6)]
)
def test_whole_networks_have_the_sizes_that_are_known(network, parameters):
    dataset = "cifar10" if network in ("resnet50", "vit_b16") else "digits"
    config = make_config(dataset, network, "none", "ours", 0, image_size=224, hidden=None, layers=None)
    with torch.device("meta"):
        net = architecture(config.net, config.image_size, classes=10)
    assert sum(each.numel() for each in net.parameters()) == pytest.approx(parameters, rel=0.01)


def test_all_seeds_and_methods_start_from_the_same_weights(tmp_path):
    split = few_digits()
    nets = [
        trained(make_config("digits", "vit_s", method, "ours", seed, **FEW), Execution(tmp_path), split, 10)
        for method, seed in (("BMRS_N", 0), ("SNR", 1))
    ]
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_come_from_a_folder_where_there_is_one(tmp_path):
    config = make_config("digits", "resnet18", "BMRS_N", "ours", 0, pretrain_epochs=0, image_size=64)
    with pytest.raises(FileNotFoundError, match=r"pretrained weights of resnet18 should be in .*--weights-dir"):
        trained(config, Execution(tmp_path), few_digits(), 10)
    known = architecture(config.net, config.image_size, classes=7)
    known.model.save_pretrained(tmp_path / "weights" / "resnet18")
    net = trained(config, Execution(tmp_path, weights=tmp_path / "weights"), few_digits(), 10)
    name = "model.resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    assert torch.equal(net.get_parameter(name), known.get_parameter(name))
    assert net.model.classifier[1].out_features == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "sites"), [("resnet18", "normalization"), ("vit_s", ("attention.o_proj", "mlp.fc2"))]
)
def test_the_papers_placement_is_behind_norms_and_output_projections(network, sites):
    config = make_config("digits", network, "BMRS_N", "ours", 0, placement="outputs")
    net = architecture(config.net, config.image_size, 10)
    net = with_noise(net, config.placement, config.log_high, few_digits().train[0])
    assert len(net.structures) == (20 if network == "resnet18" else 4)
    assert all(name.endswith(sites) for name in net.structures)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has lost all its structures:RuntimeWarning")
@pytest.mark.parametrize("placement", ["readers", "outputs"])
def test_a_run_has_both_counts(placement, tmp_path):
    settings = {
        **FEW,
        "epochs": 8,
        "placement": placement,
        "kl_weight": 100.0,
        "posterior_lr": 1.0,
        "train_images": 300,
    }
    config = make_config("digits", "vit_s", "BMRS_N", "ours", 0, **settings)
    results = execute(config, Execution(tmp_path))
    assert 0 < results["compression_reference"] <= results["compression"] + 0.02  # where all goes, one really stays
    assert results["surgery_max_abs_error"] < 1e-4
    assert results["accuracy_test"] == pytest.approx(results["accuracy_test_masked"], abs=0.01)
    results["config"] = config.settings
    titles = [table.title for table in tabulate([results])]
    assert titles == ["ViT, small", "ViT, small, digits: what is removed, and what it saves"]


def test_the_grid_has_what_the_papers_table_has_and_random():
    methods = {config.method for config in configurations(Study(grid="table2"))}
    assert methods == {"none", "L2", "E[theta]", "SNR", "BMRS_N", "BMRS_U-8", "BMRS_U-4", "random"}


@pytest.mark.slow
def test_pruned_networks_are_timed(tmp_path, capsys):
    config = pruned_latency.PrunedLatency(
        networks=("resnet18",), dataset="digits", remove=(0.5,), batch=2, rounds=2, output=tmp_path / "latency.json"
    )
    (row,) = pruned_latency.main(config)
    assert row["params"][1] < 0.4 * row["params"][0]
    assert row["flops"][1] < row["flops"][0]
    assert "times faster" in capsys.readouterr().out
    assert (tmp_path / "latency.json").exists()
