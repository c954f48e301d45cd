"""Break the library in one place after the other, and see that its tests notice: python tests/mutations.py [PATH ...].

Each mutation changes one expression in a copy of the checkout, and runs the tests of the file that it is in. Prints
which were caught, and exits with 1 unless all were. With paths, such as svi/run.py, only those in these files.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("pyro_bmrs", "models", "analysis", "tests", "pyproject.toml", "README.md", "CONTRIBUTING.md")


@dataclass(frozen=True)
class Mutation:
    """One expression, what it becomes, and the tests that have to notice."""

    path: str
    before: str
    after: str
    tests: str


MUTATIONS = [
    Mutation(
        "bmr/truncated_log_normal.py",
        "log_mass - energy - q.log_mass - (r.log_mass - p.log_mass)",
        "log_mass - energy - q.log_mass + (r.log_mass - p.log_mass)",
        "bmr/test_truncated_log_normal.py",
    ),
    Mutation(
        "distributions/truncated_log_normal.py",
        "log_prob = -log_theta - numerics",
        "log_prob = -numerics",
        "distributions/test_truncated_log_normal.py",
    ),
    Mutation(
        "criteria/evidence.py",
        "delta_f + torch.as_tensor(self.log_odds",
        "delta_f - torch.as_tensor(self.log_odds",
        "criteria",
    ),
    Mutation("criteria/base.py", "(score >= 0) & score.isfinite()", "(score > 0) & score.isfinite()", "criteria"),
    Mutation(
        "model/guides/flat.py",
        "counted = self.keep * self._site_weights()",
        "counted = self._site_weights()",
        "model svi/test_elbo.py",
    ),
    Mutation(
        "model/noise.py",
        "theta * self.keep if masks else theta",
        "theta",
        "model/test_noise.py model/test_network.py structures/test_compact.py",
    ),
    Mutation(
        "svi/objective.py",
        "(kl_weight * kl - batch_weight * log_likelihood)",
        "(kl - batch_weight * log_likelihood)",
        "svi/test_objective.py svi/test_svi.py",
    ),
    Mutation("svi/schedule.py", "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(", "svi/test_svi.py"),
    Mutation(
        "svi/schedule.py",
        "(step + 1) / (self.kl_warmup_epochs * steps_per_epoch + 1)",
        "1.0",
        "svi/test_svi.py svi/test_steering.py",
    ),
    Mutation("svi/run.py", "each.pruner.restore_removed()", "pass", "svi/test_svi.py svi/test_ensemble.py"),
    Mutation(
        "svi/trained_model.py",
        "torch.set_rng_state(state.tensors",
        "torch.get_rng_state() if True else torch.set_rng_state(state.tensors",
        "svi/test_resume.py svi/test_checkpoint.py",
    ),
    Mutation(
        "structures/compact.py",
        "points.pop(site) * masks[site] for site in masks",
        "points.pop(site) for site in masks",
        "structures/test_compact.py",
    ),
    Mutation("io/networks.py", 'saved.get("tensors") != _digest(tensors)', "False", "io"),
]


def survives(mutation):
    """Return whether the tests pass although the library is broken."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        path = Path(folder) / "pyro_bmrs" / mutation.path
        text = path.read_text(encoding="utf-8")
        assert text.count(mutation.before) == 1, f"{mutation.path} no longer has {mutation.before!r} once"
        path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
        tests = [f"tests/pyro_bmrs/{each}" for each in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "2", *tests]
        environment = {**os.environ, "PYTHONPATH": folder}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode == 0


def main(paths):
    survived, chosen = 0, [each for each in MUTATIONS if not paths or each.path in paths]
    for mutation in chosen:
        alive = survives(mutation)
        survived += alive
        print(f"{'SURVIVED' if alive else 'caught'}: {mutation.path}: {mutation.after}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return survived


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
