import dataclasses
import json

import arviz
import pytest
import torch
from marks import thinned

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from analysis.quickstart import Quickstart, main

QUICK = Quickstart(epochs=12, fine_tune_epochs=2, kl_weight=2.0, posterior_lr=0.2, progress=False, device="cpu")


def test_digits_are_split_into_disjoint_parts():
    split = digits()
    parts = [x for x, _ in (split.train, split.validation, split.test)]
    assert [len(x) for x in parts] == [1151, 287, 359]
    assert parts[0].shape[1:] == (1, 32, 32)
    assert 0 <= min(float(x.min()) for x in parts) <= max(float(x.max()) for x in parts) <= 1
    rows = [{row.numpy().tobytes() for row in x} for x in parts]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


@pytest.mark.slow
@pytest.mark.parametrize("network", thinned(["lenet5", "mlp"], keep=["mlp"]))
def test_a_run_folder_holds_everything(network, tmp_path, capsys):
    results = main(dataclasses.replace(QUICK, network=network, output=tmp_path / "run"))
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text()) == results
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 14
    assert json.loads((folder / "config.json").read_text())["network"] == network
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == [
        "evidence", "evidence_snr", "forest", "history", "network", "reduction",
    ]  # fmt: skip
    assert results["surgery_max_abs_error"] < 1e-5
    assert results["accuracy_test"] == results["accuracy_test_masked"]
    pruned = bmrs.load(folder / "pruned")
    assert bmrs.count_parameters(pruned) == results["params_pruned"] < results["params_dense"]
    x, y = digits().test
    assert (pruned(x).argmax(-1) == y).double().mean().item() == results["accuracy_test"]
    assert len(arviz.from_netcdf(folder / "posterior.nc", engine="h5netcdf").posterior) == 2 * len(results["kept"])
    assert (folder / "checkpoint" / "model.safetensors").exists()
    table = capsys.readouterr().out
    for word in ("structures", "kept", "parameters", "FLOPs", "test accuracy", "dense", "pruned"):
        assert word in table


@pytest.mark.slow
def test_the_checkpoint_restores_model_and_guide(tmp_path):
    main(dataclasses.replace(QUICK, network="mlp", output=tmp_path / "run"))
    from models import mlp

    model = bmrs.NoisyNetwork(mlp(1024, hidden=100, layers=3))
    guide = bmrs.TruncatedLogNormalGuide(model)
    bmrs.load(tmp_path / "run" / "checkpoint" / "model", model)
    bmrs.load(tmp_path / "run" / "checkpoint" / "guide", guide)
    x, _ = digits().test
    torch.testing.assert_close(
        bmrs.predict(model, guide, x), bmrs.load(tmp_path / "run" / "pruned")(x), rtol=0, atol=1e-5
    )


def test_results_are_kept_and_unwritable_folders_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(bmrs, "fit", lambda *_, **__: pytest.fail("training started"))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="it is kept"):
        main(dataclasses.replace(QUICK, output=tmp_path))
    with pytest.raises(OSError, match="cannot write"):
        main(dataclasses.replace(QUICK, output=tmp_path / "results.json" / "run"))


@pytest.mark.slow
def test_resuming_goes_on_or_does_nothing(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(QUICK, network="mlp", output=tmp_path, shrink=True)
    whole = main(config)
    again = dataclasses.replace(config, resume=True)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(bmrs, "fit", lambda *_, **__: pytest.fail("training started"))
        assert main(again) == whole
        assert "is finished, nothing to do" in capsys.readouterr().out
    (tmp_path / "results.json").unlink()  # as if killed after the fit
    repeated = main(again)
    for key in ("kept", "compression", "accuracy_test", "accuracy_test_dense", "params_pruned"):
        assert repeated[key] == whole[key]
    overwritten = main(dataclasses.replace(config, overwrite=True))
    assert overwritten["kept"] == whole["kept"]
