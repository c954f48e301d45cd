"""The loader on small files of the hub's layout, made here."""

import io
import os
import shutil
import sys
import threading

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import pyro_bmrs as bmrs
from analysis.data import decoding
from analysis.data.cache import cached
from analysis.data.sets import load

LAYOUT = {  # name: (folder in the repository, column, mode, test split, format, end of the shards' names)
    "mnist": ("mnist", "image", "L", "test", "PNG", ""),
    "fashion_mnist": ("fashion_mnist", "image", "L", "test", "PNG", ""),
    "cifar10": ("plain_text", "img", "RGB", "test", "PNG", ""),
    "tiny-imagenet": ("data", "image", "RGB", "valid", "JPEG", "-1359597a978bc4fa"),
}
REPOS = ["ylecun/mnist", "zalando-datasets/fashion_mnist", "uoft-cs/cifar10", "zh-plus/tiny-imagenet"]
TRAIN = "train-00000-of-00001.parquet"
REAL_DATA = os.environ.get("BMRS_DATA")  # before the fixture below hides it


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Keep the user's data and cache out of these tests."""
    monkeypatch.delenv("BMRS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def picture(seed, mode="L", size=(8, 8)):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write(path, images, labels, column="image", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [None if image is None else {"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({column: pa.array(rows, kind), "label": labels}), path, **options)


def make_set(folder, name, n=20, shards=2):
    """Write ``n`` rows of training in ``shards`` files and 5 of testing; row i is picture i with label i modulo 10."""
    _, column, mode, test, kind, end = LAYOUT[name]
    images = [encoded(picture(i, mode), kind) for i in range(n + 5)]
    for split, rows, total in (("train", range(n), shards), (test, range(n, n + 5), 1)):
        for shard, part in enumerate(np.array_split(rows, total)):
            path = folder / f"{split}-{shard:05d}-of-{total:05d}{end}.parquet"
            write(path, [images[i] for i in part], [int(i) % 10 for i in part], column, row_group_size=4)


def make_mnist(folder, images, labels=None):
    """Write a training set of these images beside a test set of one good image."""
    write(folder / TRAIN, images, [0] * len(images) if labels is None else labels)
    write(folder / "test-00000-of-00001.parquet", [encoded(picture(0))], [0])


GOOD = [encoded(picture(i)) for i in range(5)]


@pytest.mark.parametrize("name", LAYOUT)
def test_each_set_is_loaded_as_bytes_and_split(name, tmp_path):
    make_set(tmp_path / name, name)
    split = load(name, tmp_path)
    channels = {"L": 1, "RGB": 3}[LAYOUT[name][2]]
    for (x, y), n in ((split.train, 16), (split.validation, 4), (split.test, 5)):
        assert x.shape == (n, channels, 8, 8)
        assert y.shape == (n,)
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    _, _, mode, _, kind, _ = LAYOUT[name]
    truth = [Image.open(io.BytesIO(encoded(picture(i, mode), kind))) for i in range(25)]
    truth = torch.stack([torch.tensor(np.array(image)).reshape(8, 8, -1).permute(2, 0, 1) for image in truth])
    torch.testing.assert_close(split.test[0], truth[20:])
    assert split.test[1].tolist() == [0, 1, 2, 3, 4]
    seen = torch.cat([split.validation[0], split.train[0]])
    rows = [int((truth == image).flatten(1).all(1).nonzero()) for image in seen]
    # Each row of training once, so the parts are disjoint, in the order that every run has.
    assert rows == torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.cat([split.validation[1], split.train[1]]).tolist() == [row % 10 for row in rows]


@pytest.mark.parametrize("inner", ["", "own", "data"])
@pytest.mark.parametrize("outer", ["set", "sets"])
def test_files_are_found_in_a_folder_of_sets_or_of_the_set_as_cloned_or_flat(inner, outer, tmp_path, monkeypatch):
    folder = tmp_path / "cifar10" if outer == "sets" else tmp_path
    make_set(folder / inner.replace("own", "plain_text"), "cifar10")
    expected = load("cifar10", tmp_path)
    monkeypatch.setenv("BMRS_DATA", str(tmp_path))
    for name in ("cifar10", "uoft-cs/cifar10"):
        torch.testing.assert_close(load(name).train, expected.train)


def test_the_split_is_the_same_in_every_call_at_every_size_and_whatever_the_seed(tmp_path):
    make_set(tmp_path, "mnist")
    first = load("mnist", tmp_path, cache=tmp_path / "a")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for other in (load("mnist", tmp_path, cache=tmp_path / "b"), load("mnist", tmp_path, size=4)):
        assert torch.equal(other.train[1], first.train[1])
        assert torch.equal(other.validation[1], first.validation[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_resized_bilinearly_with_antialiasing(tmp_path):
    make_set(tmp_path, "cifar10")
    native = load("cifar10", tmp_path)
    for size in (4, 11):
        resized = load("cifar10", tmp_path, size=size).train[0]
        expected = interpolate(native.train[0].double(), (size, size), mode="bilinear", antialias=True)
        torch.testing.assert_close(resized.double(), expected, rtol=0, atol=1.0)  # Pillow rounds after each axis


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    make_set(tmp_path, "tiny-imagenet")
    grey = picture(0, "L")
    write(tmp_path / "valid-00000-of-00001-1359597a978bc4fa.parquet", [encoded(grey)], [199])
    x, y = load("tiny-imagenet", tmp_path).test
    assert torch.equal(x[0], torch.tensor(np.array(grey)).expand(3, 8, 8))
    assert y.tolist() == [199]


def test_fit_takes_the_images_as_they_are(tmp_path):
    make_set(tmp_path, "mnist")
    split = load("mnist", tmp_path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), bmrs.MultiplicativeNoise(4),
                              torch.nn.Linear(4, 10))  # fmt: skip
    model = bmrs.NoisyNetwork(net, num_data=16)
    guide = bmrs.TruncatedLogNormalGuide(model)
    result = bmrs.fit(model, guide, split.train, split.validation, epochs=1, fine_tune_epochs=0, batch_size=8)
    assert len(result.history) == 1


def test_a_second_load_decodes_nothing_and_changed_files_are_decoded_anew(tmp_path, monkeypatch):
    make_set(tmp_path, "mnist")
    first = load("mnist", tmp_path)
    assert list((tmp_path / "xdg" / "pyro-bmrs").glob("mnist-native-*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", lambda *_, **__: pytest.fail("decoded again"))
        second = load("mnist", tmp_path)
    for part in ("train", "validation", "test"):
        torch.testing.assert_close(getattr(second, part), getattr(first, part), rtol=0, atol=0)
    second.train[0].zero_()  # the caller's tensors are the caller's: the file stays as it is
    torch.testing.assert_close(load("mnist", tmp_path).train, first.train, rtol=0, atol=0)
    test = tmp_path / "test-00000-of-00001.parquet"
    os.utime(test, ns=(0, 0))
    calls, decode = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    load("mnist", tmp_path)
    write(test, GOOD, [5, 6, 7, 8, 9])
    assert load("mnist", tmp_path).test[1].tolist() == [5, 6, 7, 8, 9]
    assert len(calls) == 4


@pytest.mark.parametrize("damage", [b"", b"rubbish", "cut"])
def test_a_corrupt_cache_is_made_again_with_a_warning(damage, tmp_path):
    make_set(tmp_path, "mnist")
    first = load("mnist", tmp_path, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] if damage == "cut" else damage)
    with pytest.warns(UserWarning, match="is corrupt and made again"):
        torch.testing.assert_close(load("mnist", tmp_path, cache=tmp_path / "cache").train, first.train)
    load("mnist", tmp_path, cache=tmp_path / "cache")  # warnings are errors: it is whole again


def test_where_the_cache_cannot_be_written_there_is_a_warning_and_the_data(tmp_path):
    make_set(tmp_path, "mnist")
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot write to the cache folder"):
        split = load("mnist", tmp_path, cache=tmp_path / "file" / "cache")
    torch.testing.assert_close(split.train, load("mnist", tmp_path).train)


def test_a_full_disk_costs_the_cache_and_not_the_data(tmp_path, monkeypatch):
    make_set(tmp_path, "mnist")

    def full(tensors, path):
        raise OSError("No space left on device")

    monkeypatch.setattr("analysis.data.cache.save_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(load("mnist", tmp_path, cache=tmp_path / "cache").test[0]) == 5
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([".lock"], [])


def test_of_two_that_lack_the_cached_file_one_makes_it(tmp_path):
    calls, results = [], []
    waiting = threading.Event()

    def make():
        calls.append(1)
        waiting.wait(0.2)  # so that the other one arrives
        return {"x": torch.arange(3)}

    threads = [threading.Thread(target=lambda: results.append(cached(tmp_path / "x.safetensors", make))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert [result["x"].tolist() for result in results] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(("name", "repo"), list(zip(LAYOUT, REPOS, strict=True)))
def test_without_a_folder_the_repository_is_downloaded(name, repo, tmp_path, monkeypatch):
    calls = []

    def download(repo_id, *, repo_type, allow_patterns):
        calls.append((repo_id, repo_type, allow_patterns))
        make_set(tmp_path / "snapshot" / LAYOUT[name][0], name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load(name).train[0]) == 16
    assert calls == [(repo, "dataset", [f"{LAYOUT[name][0]}/*.parquet"])]


def test_a_failed_download_says_what_to_do(monkeypatch):
    def download(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError, match=r"cannot download ylecun/mnist.*folder mnist.*BMRS_DATA.*no connection"):
        load("mnist")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-bmrs\[data\]'"):
        load("mnist")
    make_set(tmp_path, "mnist")
    monkeypatch.setitem(sys.modules, "analysis.data.decoding", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-bmrs\[data\]'"):
        load("mnist", tmp_path)


def test_names_and_sizes_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"no data set 'svhn'; choose one of mnist \(ylecun/mnist\)"):
        load("svhn", tmp_path)
    for size in (0, -1, 2.5):
        with pytest.raises(ValueError, match="size must be a positive integer"):
            load("mnist", tmp_path, size=size)


def test_missing_folders_files_splits_and_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data folder .*nowhere does not exist"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"no train-XXXXX-of-YYYYY.parquet of mnist in any of .*unset BMRS_DATA"
    ):
        load("mnist", tmp_path)
    make_set(tmp_path / "mnist", "mnist", shards=3)
    with pytest.raises(FileNotFoundError, match="fashion_mnist"):  # whose files look the same
        load("fashion_mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 files of the split train: train-00001-of-00003.parquet"):
        load("mnist", tmp_path)
    (tmp_path / "mnist" / "test-00000-of-00001.parquet").unlink()
    make_set(tmp_path / "mnist", "mnist", shards=3)
    shutil.copy(tmp_path / "mnist" / "train-00000-of-00003.parquet", tmp_path / "mnist" / TRAIN)
    with pytest.raises(FileNotFoundError, match="mixes files of several versions"):
        load("mnist", tmp_path)
    for file in (tmp_path / "mnist").glob("test*"):
        file.unlink()
    (tmp_path / "mnist" / TRAIN).unlink()
    with pytest.raises(FileNotFoundError, match=r"no test-XXXXX-of-YYYYY.parquet in .*mnist, though other splits"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([*GOOD[:3], GOOD[3][:60]], None, r"row 3 .*corrupt"),
        ([*GOOD[:2], b"not an image"], None, r"row 2 .*corrupt or neither PNG nor JPEG"),
        ([*GOOD[:2], b""], None, r"row 2 .*corrupt or neither"),
        ([*GOOD[:2], encoded(picture(0), "BMP")], None, r"row 2 .*neither PNG nor JPEG"),
        ([GOOD[0], None], None, r"row 1 .*no bytes"),
        ([GOOD[0], encoded(picture(0, "RGB"))], None, r"row 1 .*mode RGB, but those of mnist have L"),
        ([*GOOD[:2], encoded(picture(0, size=(9, 7)))], None, r"row 2 .*9 wide and 7 high.*8 wide and 8 high.*size"),
        (GOOD, [0, 1, 2, 3, 10], r"row 4 .*label is 10, but mnist has 0 to 9"),
        (GOOD, [0, -1, 2, 3, 4], r"row 1 .*label is -1"),
        (GOOD, [0, 1, None, 3, 4], r"row 2 .*label is None"),
        (GOOD, [0.0, 1.0, 2.0, 3.0, 4.0], r"column 'label' must have whole numbers, but is double"),
        ([], pa.array([], pa.int64()), "no rows"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_file_and_number(images, labels, message, tmp_path):
    make_mnist(tmp_path, images, labels)
    with pytest.raises(ValueError, match=rf"{TRAIN}[,:] {message}"):
        load("mnist", tmp_path)
    assert not list((tmp_path / "xdg").rglob("*.safetensors"))


def test_images_of_several_sizes_load_with_size(tmp_path):
    make_mnist(tmp_path, [*GOOD[:4], encoded(picture(0, size=(9, 7)))])
    assert load("mnist", tmp_path, size=8).train[0].shape == (4, 1, 8, 8)
    make_mnist(tmp_path, [encoded(picture(i, size=(9, 9))) for i in range(5)])
    with pytest.raises(ValueError, match=r"test-.* has images of shape \(1, 8, 8\), but .*train-.* of \(1, 9, 9\)"):
        load("mnist", tmp_path)


def test_wrong_columns_are_named_with_those_there_are(tmp_path):
    make_set(tmp_path, "mnist", shards=1)
    with pytest.raises(ValueError, match=rf"{TRAIN} has no column 'img', which cifar10 needs, but image, label"):
        load("cifar10", tmp_path)
    pq.write_table(pa.table({"image": ["a"], "label": [0]}), tmp_path / TRAIN)
    with pytest.raises(ValueError, match=rf"{TRAIN}: column 'image' must have images as .*but is string"):
        load("mnist", tmp_path)


def test_truncated_parquet_files_are_named_with_the_rows_if_the_footer_is_whole(tmp_path):
    make_mnist(tmp_path, GOOD)
    content = (tmp_path / TRAIN).read_bytes()
    for broken in (content[:-100], b""):
        (tmp_path / TRAIN).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{TRAIN} is truncated or no parquet file"):
            load("mnist", tmp_path)
    write(tmp_path / TRAIN, [GOOD[i % 5] for i in range(8)], [0] * 8, row_group_size=4, compression="none")
    first = pq.ParquetFile(tmp_path / TRAIN).metadata.row_group(1).column(0)
    start = first.dictionary_page_offset or first.data_page_offset
    content = bytearray((tmp_path / TRAIN).read_bytes())
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / TRAIN).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{TRAIN}, rows 4 to 7 .*truncated or corrupt"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_real_sets(name):
    folder = REAL_DATA and os.path.join(REAL_DATA, name)
    if not (folder and os.path.isdir(folder)):
        pytest.skip(f"needs the real {name}: set BMRS_DATA to a folder that has it in {name}/")
    n, channels, counts = {
        "mnist": (60000, 1, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        "cifar10": (50000, 3, [5000] * 10),
    }[name]
    split = load(name, REAL_DATA, size=32)
    assert [len(x) for x, _ in (split.train, split.validation, split.test)] == [n * 4 // 5, n // 5, 10000]
    assert split.train[0].shape[1:] == (channels, 32, 32)
    assert (split.train[1].bincount() + split.validation[1].bincount()).tolist() == counts
