"""Results as the study writes them, drawn around the paper's table 1."""

import numpy as np

from analysis.drawing.published import published

METHODS = ("L2", "gradient", "E[theta]", "SNR", "BMRS_N", "BMRS_U-8", "BMRS_U-4")


def result(network, dataset, method, seed, compression, accuracy, recipe="paper", pruning="continuous", **more):
    config = {
        "dataset": dataset, "network": network, "method": method, "recipe": recipe, "seed": seed, "pruning": pruning,
        "kl_weight": more.pop("kl_weight", "reference"),
    }  # fmt: skip
    return {
        "config": config,
        "compression": float(np.clip(compression, 0, 99.99)) / 100,
        "accuracy_test": float(np.clip(accuracy, 0, 100)) / 100,
        **more,
    }


def continuous(cells, seeds=(0, 1, 2)):
    """Return runs of all methods, our recipe at three weights of the KL, and baselines."""
    generator = np.random.default_rng(0)
    found = []
    for network, dataset in cells:
        rows = published(network, dataset)
        dense = rows["none"].accuracy if "none" in rows else 99.2
        best = max(point.compression for method, point in rows.items() if method not in ("L2", "SNR"))
        for seed in seeds:
            for method, point in rows.items():
                if method in ("none", *METHODS):
                    noise = generator.normal(0, (point.compression_sd, point.accuracy_sd))
                    found.append(
                        result(network, dataset, method, seed, point.compression + noise[0], point.accuracy + noise[1])
                    )
            for weight, removed, lost in ((3.0, -6, -0.1), (30.0, 0.3, 0.1), (100.0, 0.6, 0.7)):
                compression = best + removed if removed < 0 else best + removed * (100 - best)
                noise = generator.normal(0, (0.4, 0.1))
                found.append(
                    result(
                        network, dataset, "BMRS_N", seed, compression + noise[0], dense - lost + noise[1], "ours",
                        kl_weight=weight,
                    )
                )  # fmt: skip
            for method, lost in (("tp_magnitude", 2.5), ("tp_taylor", 1.5), ("tp_group_norm", 1.9), ("scratch", 1.2)):
                compression, noise = best + 0.3 * (100 - best), generator.normal(0, 0.2)
                found.append(result(network, dataset, method, seed, compression, dense - lost + noise, "baselines"))
    return found


def post_training(cells, seeds=(0, 1, 2)):
    """Return runs after training: curves with a knee, where evidence stops, and rank correlations."""
    generator = np.random.default_rng(1)
    found = []
    loadings = np.array([[0.3, 1], [0.4, 1], [1, 0.1], [1, 0.2], [1, 0], [1, 0.05], [0.95, 0.15]])
    for network, dataset in cells:
        dense = published(network, dataset)["none"].accuracy
        for method, scale in zip(METHODS, (0.45, 0.5, 0.9, 0.95, 0.97, 0.97, 0.96), strict=True):
            for seed in seeds:
                stop = None if method in ("L2", "gradient") else scale - 0.15 + generator.normal(0, 0.02)
                levels = np.array(sorted({0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95} | {stop} - {None}))
                removed = 1 - (1 - levels) ** 1.6
                accuracy = 10 + (dense - 10) / (1 + np.exp((removed - scale - generator.normal(0, 0.01)) / 0.05))
                points = loadings @ generator.normal(size=(2, 200)) + 0.15 * generator.normal(size=(7, 200))
                curve = {"level": levels, "compression": removed, "accuracy_test": accuracy / 100}
                found.append(
                    result(
                        network, dataset, method, seed, 100 * removed[-1], accuracy[-1], pruning="post-training",
                        curve={key: values.tolist() for key, values in curve.items()}, stop_level=stop,
                        rank_correlation={"methods": list(METHODS), "spearman": np.corrcoef(points).tolist()},
                    )
                )  # fmt: skip
    return found


def sweep(cells, seeds=(0, 1, 2)):
    """Return runs of BMRS_U with p1 from 22 down to 1."""
    generator = np.random.default_rng(2)
    found = []
    for network, dataset in cells:
        point = published(network, dataset)["BMRS_U-8"]
        for p1 in range(22, 0, -1):
            for seed in seeds:
                removed = point.compression + 12 / (1 + np.exp((p1 - 3) / 0.8)) + generator.normal(0, 0.6)
                accuracy = (
                    point.accuracy + 0.8 / (1 + np.exp((p1 - 6) / 1.0)) - 6 * (p1 == 1) + generator.normal(0, 0.3)
                )
                found.append(result(network, dataset, f"BMRS_U-{p1}", seed, removed, accuracy))
    return found
