"""Networks of transformers: pruned, written into folders, and read in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import HF, make
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.integrations import huggingface
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call

pytest.importorskip("transformers")

# Those of the collection that are themselves classes of transformers and have something to remove.
NAMES = [name for name in HF if name not in ("hf_resnet", "hf_convnext_v2")]

READ = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file
from pyro_bmrs.integrations import huggingface
from pyro_bmrs.structures.inputs import call, output_tensors
for folder in json.loads(sys.argv[1]):
    inputs, by_name = load_file(f"{folder}/inputs"), json.load(open(f"{folder}/names"))
    net = huggingface.from_pretrained(folder)
    x = inputs if by_name == 2 else tuple(inputs.values()) if by_name == 1 else next(iter(inputs.values()))
    with torch.no_grad():
        found = output_tensors(call(net, x))
    expected = load_file(f"{folder}/outputs")
    for i, each in enumerate(found):
        torch.testing.assert_close(each, expected[str(i)], rtol=1e-4, atol=1e-5)
    print(folder, type(net).__name__, sum(p.numel() for p in net.parameters()))
"""


def pruned(name, width=False):
    """Return a smaller network of the collection, and inputs."""
    net, x = make(name)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x, width=width)))
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-0.3)
    generator = torch.Generator().manual_seed(0)
    masks = {site: torch.rand(size, generator=generator) < 0.6 for site, size in model.sizes.items()}
    return bmrs.compact(model, guide, masks, x), x


def write(name, folder):
    """Prune a network, and write it beside its inputs and outputs."""
    from safetensors.torch import save_file

    from pyro_bmrs.structures.inputs import output_tensors

    small, x = pruned(name, width=name in ("hf_vit", "hf_llama"))
    huggingface.save_pretrained(small, folder)
    with torch.no_grad():
        outputs = output_tensors(call(small, x))
    named = (
        x if isinstance(x, dict) else {f"{i:02d}": each for i, each in enumerate(x if isinstance(x, tuple) else [x])}
    )
    save_file({key: each.clone().contiguous() for key, each in named.items()}, folder / "inputs")
    save_file({str(i): each.clone().contiguous() for i, each in enumerate(outputs)}, folder / "outputs")
    (folder / "names").write_text(json.dumps(2 if isinstance(x, dict) else 1 if isinstance(x, tuple) else 0))
    return bmrs.count_parameters(small)


@pytest.mark.exhaustive
def test_all_are_read_by_a_fresh_process(tmp_path):
    counts = {}
    for name in NAMES:
        counts[str(tmp_path / name)] = write(name, tmp_path / name)
    ran = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(list(counts))], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [line.split() for line in ran.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert {folder: int(count) for folder, _, count in lines} == counts


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_network_of_one_kind_of_attention_is_read_as_another(attention, tmp_path):
    import transformers

    small, x = pruned("hf_vit")
    huggingface.save_pretrained(small, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation=attention)
    again = huggingface.from_pretrained(tmp_path, transformers.ViTForImageClassification(config))
    assert again.config._attn_implementation == attention
    with torch.no_grad():
        assert difference(call(again, x), call(small, x)) < 1e-5


def test_a_network_of_no_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a network of transformers, with its config, but is a Linear"):
        huggingface.save_pretrained(nn.Linear(2, 2), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        huggingface.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere', nor can that be a repository"):
        huggingface.from_pretrained(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_class_that_transformers_lacks_is_asked_for(tmp_path):
    small, _ = pruned("hf_vit")
    huggingface.save_pretrained(small, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["Mine"]}))
    with pytest.raises(ValueError, match="transformers has no class 'Mine': make a whole network and pass it as model"):
        huggingface.from_pretrained(tmp_path)


class Hub:
    """Stands for the hub: a folder for each repository."""

    def __init__(self, root):
        self.root, self.made = root, []

    def create_repo(self, repo_id, private, exist_ok, token):
        self.made.append((repo_id, private, exist_ok, token))

    def upload_folder(self, repo_id, folder_path, allow_patterns, **settings):
        import shutil

        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        assert set(allow_patterns) == {path.name for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}"


@pytest.mark.slow
def test_a_network_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns, **_: str(tmp_path / repo))
    small, x = pruned("hf_vit", width=True)
    assert huggingface.push_to_hub(small, "me/small-vit", private=True) == "https://hub/me/small-vit"
    assert hub.made == [("me/small-vit", True, True, None)]
    again = huggingface.from_pretrained("me/small-vit")
    with torch.no_grad():
        assert difference(call(again, x), call(small, x)) < 1e-5
