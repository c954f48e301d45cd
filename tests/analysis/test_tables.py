import json

from analysis.drawing.typeset import latex, markdown
from analysis.runs.recipes import make_config
from analysis.tables import tabulate, write_tables


def result(
    method, seed, compression, accuracy, dataset="mnist", network="lenet5", recipe="paper", device="cpu: x", **settings
):
    return {
        "config": make_config(dataset, network, method, recipe, seed, **settings).settings,
        "compression": compression,
        "accuracy_test": accuracy,
        "device": device,
        "versions": {"torch": "2.13.0"},
        "date": f"2026-01-0{seed + 1}T00:00:00+00:00",
        "command": "python -m analysis.study",
    }


def test_means_and_deviations_stand_beside_the_papers():
    results = [result("BMRS_N", seed, 0.85 + 0.01 * seed, 0.95) for seed in range(3)]
    results.append(result("none", 3, 0.0, 0.99, device="cuda: y"))
    (table,) = tabulate(results)
    assert table.title == "LeNet-5"
    assert table.head == ["recipe", "method", "MNIST", "MNIST, paper"]
    assert table.rows == [
        ["paper", "none", "0.00 / 99.00 (1)†", "0.00 / 99.07 ± 0.09"],
        ["paper", "BMRS_N", "86.00 ± 1.00 / 95.00 ± 0.00 (3)", "86.90 ± 1.15 / 95.59 ± 0.94"],
    ]


def test_devices_mixed_in_a_cell_are_marked():
    results = [result("SNR", seed, 0.5, 0.9, device=device) for seed, device in enumerate(("cpu: x", "cuda: y"))]
    assert tabulate(results)[0].rows[0][2].endswith("(2)‡")


def test_other_settings_than_the_recipes_are_rows_of_their_own():
    results = [result("BMRS_N", 0, 0.9, 0.98, recipe="ours", **changes) for changes in ({"kl_weight": 3000}, {})]
    results.append(result("BMRS_N", 0, 0.8, 0.7, recipe="ours", dataset="cifar10"))
    (table,) = tabulate(results)
    assert table.head[2:] == ["MNIST", "MNIST, paper", "CIFAR-10", "CIFAR-10, paper"]
    assert [row[1:3] for row in table.rows] == [
        ["BMRS_N", "90.00 / 98.00 (1)"],
        ["BMRS_N (kl_weight 3000)", "90.00 / 98.00 (1)"],
    ]
    assert [row[4] for row in table.rows] == ["80.00 / 70.00 (1)", ""]


def test_rows_are_in_the_order_of_their_numbers():
    methods = [f"BMRS_U-{p1}" for p1 in (12, 9)]
    results = [result(method, 0, 0.9, 0.98, recipe="ours") for method in methods]
    results += [result("SNR", 0, 0.9, 0.98, recipe="ours", kl_weight=weight) for weight in (280, 45, 7.5)]
    (table,) = tabulate(results)
    order = [f"SNR (kl_weight {weight})" for weight in (7.5, 45, 280)]
    assert [row[1] for row in table.rows] == [*order, "BMRS_U-9", "BMRS_U-12"]


def baseline(method, seed, budget, widths=(), **settings):
    return result(method, seed, 0.9, 0.98, recipe="baselines", budget=budget, widths=widths, **settings)


def test_baselines_are_rows_below_ours_by_their_budget():
    results = [baseline("scratch", seed, 0.9, (4, 3 + seed)) for seed in range(3)]
    results += [baseline("tp_taylor", 0, 0.8737), baseline("tp_taylor", 0, 0.8737, ranking="network")]
    results += [baseline("tp_magnitude", 0, 0.8737), baseline("tp_magnitude", 0, 0.5, dataset="cifar10")]
    results += [result("SNR", 0, 0.9, 0.98, recipe=recipe) for recipe in ("ours", "paper")]
    (table,) = tabulate(json.loads(json.dumps(results)))
    assert [row[:3] for row in table.rows] == [
        ["paper", "SNR", "90.00 / 98.00 (1)"],
        ["ours", "SNR", "90.00 / 98.00 (1)"],
        ["baselines", "tp_magnitude (budget 0.5)", ""],
        ["baselines", "tp_magnitude (budget 0.8737)", "90.00 / 98.00 (1)"],
        ["baselines", "tp_taylor (budget 0.8737)", "90.00 / 98.00 (1)"],
        ["baselines", "tp_taylor (budget 0.8737, ranking network)", "90.00 / 98.00 (1)"],
        ["baselines", "scratch (budget 0.9)", "90.00 ± 0.00 / 98.00 ± 0.00 (3)"],
    ]
    assert [row[3] for row in table.rows[2:]] == [""] * 5
    assert "scratch (budget 0.9)" in latex([table])


def test_accuracies_are_compared_with_the_dense_networks_of_their_recipe_seed_and_length():
    results = [result("none", seed, 0.0, 0.90 + 0.01 * seed, dataset="cifar10") for seed in range(3)]
    snr = [result("SNR", seed, 0.9, 0.88 + 0.02 * seed, dataset="cifar10") for seed in range(4)]
    results += [{**each, "compression_reference": 0.8} for each in snr]
    results += [result("gradient", 0, 0.8, 0.91, dataset="cifar10")]
    results += [result("BMRS_N", 0, 0.8, 0.7, dataset="cifar10", recipe="ours", kl_weight=3.0)]
    results += [result("none", 0, 0.0, 0.9, recipe="ours"), result("BMRS_N", 0, 0.8, 0.89, recipe="ours", kl_weight=3)]
    results += [result("none", 0, 0.0, 0.5, recipe="ours", epochs=7), baseline("tp_taylor", 0, 0.8)]
    first, second, counted, third = tabulate(results)
    assert first.title == "LeNet-5"
    assert second.title == "LeNet-5, accuracy against none"
    assert second.head == first.head == ["recipe", "method", "MNIST", "MNIST, paper", "CIFAR-10", "CIFAR-10, paper"]
    assert second.rows == [
        ["paper", "SNR", "", "", "-1.00 ± 1.00 (3)", "+0.06"],
        ["paper", "gradient", "", "", "+1.00 (1)", ""],
        ["ours", "BMRS_N (kl_weight 3)", "-1.00 (1)", "-3.48", "", ""],
    ]
    assert "SNR &  &  & $-$1.00 $\\pm$ 1.00 (3) & +0.06" in latex([second])
    assert "| SNR |  |  | -1.00 ± 1.00 (3) | +0.06 |" in markdown([second])
    assert counted.title == "LeNet-5, removed as the paper counts"
    assert counted.rows == [["paper", "SNR", "80.00 ± 0.00 (4)", "70.29 ± 2.02"]]
    assert third.title == "LeNet-5, the paper's recipe less the paper"
    assert third.head == ["recipe", "method", "CIFAR-10"]
    assert third.rows == [["paper", "SNR", "+9.71 / -1.06 (3)"]]


def test_networks_and_ways_of_pruning_have_tables_of_their_own():
    curve = {"level": [0.1, 0.24, 0.5], "compression": [0.2, 0.4, 0.6], "accuracy_test": [0.9, 0.8, 0.7]}
    after = {**result("SNR", 0, 0.6, 0.7, pruning="post-training"), "curve": curve, "stop_level": 0.24}
    never = {**result("L2", 0, 0.6, 0.7, pruning="post-training"), "curve": curve, "stop_level": None}
    tables = tabulate([after, never, result("SNR", 0, 0.5, 0.9, network="mlp_inputs")])
    assert [table.title for table in tables] == ["MLP with noise on its inputs too", "LeNet-5, pruned after training"]
    assert tables[1].head == ["recipe", "method", "MNIST"]
    assert [row[1:] for row in tables[1].rows] == [["SNR", "40.00 / 80.00 (1)"]]
    assert tabulate([never]) == []  # which stops nowhere


def test_markdown_and_latex(tmp_path):
    results = [result("E[theta]", seed, 0.5, 0.9) for seed in range(2)]
    tables = tabulate(results)
    assert "| paper | E[theta] | 50.00 ± 0.00 / 90.00 ± 0.00 (2) | 88.29 ± 1.00 / 51.30 ± 41.12 |" in markdown(tables)
    assert r"paper & $\mathrm{E}[\theta]$ & 50.00 $\pm$ 0.00 / 90.00" in latex(tables)
    text = write_tables(results, tmp_path / "results", "table1")
    assert (tmp_path / "results" / "table1.md").read_text() == text
    about = ("2 runs, 2026-01-01 to 2026-01-02", "Machines: cpu: x", "torch 2.13.0", "\n- `python -m analysis.study`\n")
    for words in about:
        assert words in text
    source = (tmp_path / "results" / "table1.tex").read_text()
    assert source.count("{") == source.count("}")
    assert source.isascii()


def test_no_results_are_said_to_be_none(tmp_path):
    assert "No results yet." in write_tables([], tmp_path, "table1")
