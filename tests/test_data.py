"""Data sets: what is paired, what is pure, what is refused. No network; files are made up here."""
import gzip
import importlib
import struct
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
from data import DataError, Dataset, batches, load, redraw

FILE_SETS = [name for name in data.NAMES if name not in data.SYNTHETIC]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network in tests")
    for name in ("MNIST", "SVHN", "CIFAR10", "CelebA"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", refuse)


def images(n, h, w, c, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def write_mnist(folder, n_train=60, n_test=20, cut=None):
    """Labels 0 1 .. 9 0 1 ..; each image is random, so it is its own name."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        x, y = images(n, 28, 28, 1, seed=n), np.arange(n, dtype=np.uint8) % 10
        for kind, head, body in (("images-idx3", struct.pack(">IIII", 2051, n, 28, 28), x),
                                 ("labels-idx1", struct.pack(">II", 2049, n), y)):
            packed = gzip.compress(head + body.tobytes())
            name = f"{prefix}-{kind}-ubyte.gz"
            (raw / name).write_bytes(packed[:-20] if name == cut else packed)


def write_svhn(folder, n_train=100, n_test=30):
    for part, n in (("train", n_train), ("test", n_test)):
        np.savez(folder / f"svhn_{part}.npz", x=images(n, 32, 32, 3), y=np.arange(n) % 10)


def keys(x):
    """The images of a pool as a set of byte strings."""
    return {image.numpy().tobytes() for image in x}


def pooled():
    """Six tuples over pools of 4 and 9 rows whose pixels are their row numbers."""
    x = {"a": torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1),
         "b": torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1)}
    pool_y = {"a": torch.arange(4) % 2, "b": torch.arange(9) % 2}
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    rows = {"a": torch.tensor([0, 1, 2, 3, 0, 1]), "b": torch.tensor([0, 1, 2, 3, 4, 5])}
    return Dataset(x, y, {"a": "image", "b": "image"}, "made up", "train", "", rows, pool_y)


def numbered(n):
    x = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)
    return Dataset({"a": x}, None, {"a": "image"}, "made up", "train")


def pixels(stream):
    return [(255 * x["a"]).round().int().flatten().tolist() for x in stream]


# ---- Generated sets ----------------------------------------------------------------------------
@pytest.mark.parametrize("name, shapes", [
    ("synth_mnist_svhn", {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}),
    ("synth_polymnist", {f"m{i}": (3, 28, 28) for i in range(5)}),
    ("synth_mnist", {"mnist": (1, 28, 28)}), ("synth_svhn", {"svhn": (3, 32, 32)}),
    ("shapes", {"circle": (1, 32, 32), "square": (1, 32, 32)})])
def test_generated_sets_are_what_they_say(name, shapes, tmp_path):
    n = {"train": 90, "val": 10, "test": 100}
    sets = {split: load(name, split, tmp_path, n=100) for split in n}
    for split, d in sets.items():
        assert len(d) == n[split] and d.shapes == shapes and d.modalities == list(shapes)
        assert all(x.dtype == torch.uint8 and len(x) == n[split] for x in d.x.values())
        assert d.y.dtype == torch.int64 and d.y.bincount().max() - d.y.bincount().min() <= 1
        batch = d.take(slice(0, 7))
        assert all(x.dtype == torch.float32 and 0 <= x.min() and 0.5 < x.max() <= 1
                   for x in batch.values())
    if name != "shapes":                        # few distinct shapes exist
        for m in shapes:
            found = [keys(d.x[m]) for d in sets.values()]
            assert sum(map(len, found)) == len(set().union(*found)) == 200


def test_generated_sets_are_pure_in_name_split_n_and_seed(tmp_path):
    def same(a, b):
        return torch.equal(a.y, b.y) and all(torch.equal(a.x[m], b.x[m]) for m in a.x)
    first = load("synth_mnist_svhn", "val", tmp_path / "a", n=100)
    torch.manual_seed(5)
    torch.rand(3)
    assert same(first, load("synth_mnist_svhn", "val", tmp_path / "b", n=100))      # made again
    assert same(first, load("synth_mnist_svhn", "val", tmp_path / "a", n=100))      # from the cache
    for other in (dict(n=101), dict(n=100, seed=1)):
        assert not same(first, load("synth_mnist_svhn", "val", tmp_path / "a", **other))
    train, val = (load("synth_mnist", split, tmp_path, n=2) for split in ("train", "val"))
    assert not torch.equal(train.x["mnist"], val.x["mnist"])
    two, three = (load("synth_polymnist", "test", tmp_path, n=20, n_modalities=k) for k in (2, 3))
    assert len(three.x) == 3 and same(two, three)       # more modalities change none of the others


def test_cache_damaged_or_unwritable(tmp_path):
    first = load("synth_mnist", "test", tmp_path, n=50, n_modalities=1)     # not an option of it
    (cached,) = (tmp_path / "synthetic").iterdir()      # and no temporary file beside it
    whole = cached.read_bytes()
    at = whole.index(b"PK\1\2")
    for damaged in (whole[:500], whole[:at + 6] + b"\x6d" + whole[at + 7:]):   # zip version 10.9
        cached.write_bytes(damaged)
        again = load("synth_mnist", "test", tmp_path, n=50)
        assert torch.equal(first.x["mnist"], again.x["mnist"]) and torch.equal(first.y, again.y)
        assert zipfile.is_zipfile(cached)
    (tmp_path / "file").write_text("in the way")
    blocked = load("synth_mnist", "test", tmp_path / "file", n=50)
    assert torch.equal(first.x["mnist"], blocked.x["mnist"])


def ridge_accuracy(x, y, x_test, y_test):
    """Ridge regression of pixels on one-hot labels, regularised by the best of three weights."""
    mean = x.mean(0)
    x, x_test, target = x - mean, x_test - mean, F.one_hot(y, 10).float() - 0.1
    gram = x.T @ x
    def accuracy(weight):
        w = torch.linalg.solve(gram + weight * torch.eye(len(gram)), x.T @ target)
        return ((x_test @ w).argmax(1) == y_test).float().mean().item()
    return max(accuracy(weight) for weight in (10.0, 100.0, 1000.0))


def test_pixels_of_colour_modalities_are_not_linearly_separable(tmp_path):
    for name in ("synth_mnist_svhn", "synth_polymnist"):
        train = load(name, "train", tmp_path, n=3300, n_modalities=2)
        test = load(name, "test", tmp_path, n=500, n_modalities=2)
        x, x_test = train.take(slice(None)), test.take(slice(None))
        for m in x:
            accuracy = ridge_accuracy(x[m].flatten(1), train.y, x_test[m].flatten(1), test.y)
            assert accuracy > 0.95 if m == "mnist" else accuracy < 0.75, (m, accuracy)


def test_every_modality_shows_the_label(tmp_path):
    """A small net on 2000 images gets far above chance: digit and label go together."""
    torch.manual_seed(0)
    for name, m in (("synth_svhn", "svhn"), ("synth_polymnist", "m1")):
        train = load(name, "train", tmp_path, n=2200, n_modalities=2)
        test = load(name, "test", tmp_path, n=500, n_modalities=2)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 5, 2, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 48, 5, 2, 2),
            torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(10))
        x, x_test = train.take(slice(None))[m], test.take(slice(None))[m]
        net(x[:1])
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for rows in torch.cat([torch.randperm(len(x)) for _ in range(5)]).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), train.y[rows]).backward()
            optimiser.step()
        accuracy = (net(x_test).argmax(1) == test.y).float().mean()
        assert accuracy > 0.8, (m, accuracy)


def test_shapes_share_full_or_hollow_and_nothing_else(tmp_path):
    d = load("shapes", "test", tmp_path, n=2000)
    for x in d.x.values():
        assert torch.equal(x[:, 0, 15:17, 15:17].float().mean((1, 2)), 255.0 * (d.y == 0))
    top = [(x[:, 0].amax(2) > 0).int().argmax(1).float() for x in d.x.values()]     # outer radius
    assert abs(torch.corrcoef(torch.stack(top))[0, 1]) < 0.1
    for t in top:
        assert abs(t[d.y == 0].mean() - t[d.y == 1].mean()) < 0.6                   # pixels


@pytest.mark.parametrize("options", [dict(n_modalities=k) for k in (0, 1, 17)] + [dict(n=1)])
def test_bad_options_are_refused(options, tmp_path):
    with pytest.raises(DataError, match="must"):
        load("synth_polymnist", "test", tmp_path, **options)


# ---- Batches and pools -------------------------------------------------------------------------
def test_epoch_covers_everything_once_and_resumes_exactly():
    d, g = numbered(23), torch.Generator()
    epoch = pixels(batches(d, 5, g.manual_seed(1)))
    assert [len(x) for x in epoch] == [5] * 4                   # the last partial batch is dropped
    assert len({i for x in epoch for i in x}) == 20 and sum(epoch, []) != sorted(sum(epoch, []))
    for start in range(5):
        assert pixels(batches(d, 5, g.manual_seed(1), start=start)) == epoch[start:]
    again = pixels(batches(d, 5, g))                            # the generator has moved on
    assert again != epoch


def test_ranks_tile_the_global_batch():
    d, g = numbered(20), torch.Generator()
    whole = pixels(batches(d, 6, g.manual_seed(2)))
    parts = [pixels(batches(d, 6, g.manual_seed(2), rank=r, world=3)) for r in range(3)]
    assert [sorted(sum(shards, [])) for shards in zip(*parts)] == [sorted(x) for x in whole]
    assert all(len(shard) == 2 for shards in parts for shard in shards)


def test_batches_without_generator_and_small_sets():
    assert pixels(batches(numbered(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert pixels(batches(numbered(7), 3, start=1)) == [[3, 4, 5], [6]]
    (only,) = pixels(batches(numbered(3), 8, torch.Generator().manual_seed(0)))
    assert sorted(only) == [0, 1, 2]


def test_redraw_keeps_classes_and_changes_pairs():
    d = pooled()
    g = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        new = redraw(d, g)
        for m in d.rows:
            assert torch.equal(d.pool_y[m][new.rows[m]], d.y)
        assert len(new.rows["b"].unique()) == 6                 # no repeats: the pool is larger
        seen.add(tuple(zip(new.rows["a"].tolist(), new.rows["b"].tolist())))
    assert len(seen) > 10
    epochs = [[x["b"] for x in batches(d, 6, g)] for _ in range(2)]
    assert {v.item() for v in epochs[0][0]} != {v.item() for v in epochs[1][0]}     # pairs anew
    for split in ("val", "test"):
        fixed = Dataset(**{**vars(d), "split": split})
        assert redraw(fixed, g) is fixed


def test_attached_features_follow_their_modality():
    d = pooled().attach("code", {"b": torch.arange(9.0)[:, None] * 10})
    assert d.kinds["code_b"] == "feature" and set(d.shapes) == {"a", "b"} == set(d.modalities)
    for x in batches(d, 2, torch.Generator().manual_seed(3)):
        assert torch.equal(x["code_b"], (x["b"].flatten(1) * 2550).round())
    assert set(d.take(slice(0, 2), names=["code_b"])) == {"code_b"}
    assert len(d.head(3)) == 3 and len(d.head(3).x["b"]) == 9 and len(d.head(99)) == 6
    with pytest.raises(ValueError, match="4 rows of a"):
        d.attach("code", {"a": torch.zeros(6, 1)})


def test_kinds_decide_the_type_of_a_batch():
    x = {"i": torch.full((2, 1, 1, 1), 255, dtype=torch.uint8), "t": torch.tensor([[7], [8]]),
         "b": torch.tensor([[0], [1]], dtype=torch.uint8), "f": torch.tensor([[2.5], [3.5]])}
    kinds = {"i": "image", "t": "text", "b": "binary", "f": "feature"}
    batch = Dataset(x, None, kinds, "made up", "test").take(torch.tensor([1]))
    assert {m: (v.dtype, v.item()) for m, v in batch.items()} == {
        "i": (torch.float32, 1), "t": (torch.int64, 8), "b": (torch.float32, 1),
        "f": (torch.float32, 3.5)}


# ---- Sets from files ---------------------------------------------------------------------------
def test_splits_of_a_file_are_disjoint_and_balanced(tmp_path):
    write_mnist(tmp_path, n_train=200)
    train, val, test = (load("mnist", split, tmp_path) for split in ("train", "val", "test"))
    assert val.y.bincount().tolist() == [2] * 10 and train.y.bincount().tolist() == [18] * 10
    assert len(keys(train.x["mnist"]) | keys(val.x["mnist"]) | keys(test.x["mnist"])) == 220
    whole = torch.from_numpy(images(200, 28, 28, 1, seed=200)).permute(0, 3, 1, 2)
    assert torch.equal(train.x["mnist"], whole[:180]) and torch.equal(val.x["mnist"], whole[180:])
    assert len(load("mnist", "train", tmp_path, n=100)) == 90


def test_mnist_svhn_never_leaks_and_pairs_by_class(tmp_path):
    write_mnist(tmp_path)
    write_svhn(tmp_path)
    train, val, test = (load("mnist_svhn", split, tmp_path, pairings=3)
                        for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (150, 10, 20)
    for d in (train, redraw(train, torch.Generator().manual_seed(0)), val, test):
        for m in d.rows:
            assert torch.equal(d.pool_y[m][d.rows[m]], d.y)
    assert train.rows["mnist"].bincount().tolist() == [3] * 50      # each image in every pairing
    assert set(train.rows["svhn"].bincount().tolist()) <= {1, 2}    # 90 images for 150 places
    for m in train.x:
        assert not keys(train.x[m]) & keys(val.x[m])
        assert torch.equal(train.modality(m)[1], train.pool_y[m])
    np.savez(tmp_path / "svhn_test.npz", x=images(30, 32, 32, 3), y=np.arange(30) % 10, note="ours")
    assert load("mnist_svhn", "test", tmp_path).note == "ours" and train.note == ""
    for seed in (1, 2):
        again = load("mnist_svhn", "test", tmp_path, seed=seed)
        assert all(torch.equal(again.rows[m], test.rows[m]) for m in test.rows)
        other = load("mnist_svhn", "train", tmp_path, seed=seed, pairings=3)
        assert not torch.equal(other.rows["svhn"], train.rows["svhn"])


def test_drop_in_files(tmp_path):
    a = np.random.default_rng(0).integers(0, 2, (20, 40), dtype=np.uint8)
    np.savez(tmp_path / "celeba_test.npz", x=images(20, 64, 64, 3), attributes=a, note="made up")
    d = load("celeba", "test", tmp_path)
    assert d.kinds == {"image": "image", "attributes": "binary"} and d.note == "made up"
    assert d.y is None and d.shapes == {"image": (3, 64, 64), "attributes": (40,)}
    assert torch.equal(d.take(slice(0, 5))["attributes"], torch.from_numpy(a[:5]).float())
    left, right = images(40, 8, 6, 3), images(40, 5, 5, 1)[..., 0]
    left[:, 0, 0, 1] = np.arange(40)
    np.savez(tmp_path / "paired_train.npz", left=left, right=right, y=np.arange(40) // 20)
    d = load("paired", "train", tmp_path)
    assert d.shapes == {"left": (3, 8, 6), "right": (1, 5, 5)} and len(d) == 36
    row = d.x["left"][:, 1, 0, 0].long()                    # of the file, in which val is last
    assert row.sort().values.tolist() == [*range(18), *range(20, 38)]
    assert torch.equal(d.y, row // 20)
    assert 2 < d.head(12).y.sum() < 10                      # though the file is sorted by class
    assert torch.equal(d.x["left"][:, 1], torch.from_numpy(left[..., 1])[row])
    assert torch.equal(d.x["right"][:, 0], torch.from_numpy(right)[row])
    assert torch.equal(load("paired", "train", tmp_path).y, d.y)
    ten = [load("paired", split, tmp_path, n=20) for split in ("train", "val")]
    assert [len(s) for s in ten] == [18, 2] and 4 < ten[0].y.sum() < 14    # though it is sorted
    assert not keys(ten[0].x["left"]) & keys(ten[1].x["left"])


def test_own_images_have_any_size_and_any_classes_or_none(tmp_path):
    x = images(40, 22, 18, 1)[..., 0]
    np.savez(tmp_path / "images_train.npz", x=x, y=np.arange(40) // 2)
    np.savez(tmp_path / "images_test.npz", x=x[:9], note="mine")
    train, test = load("images", "train", tmp_path), load("images", "test", tmp_path, n=7)
    assert train.shapes == {"image": (1, 22, 18)} and set(train.y.tolist()) == {*range(20)}
    assert test.y is None and len(test) == 7 and test.note == "mine"
    assert keys(test.x["image"]) <= keys(torch.from_numpy(x[:9, None]))
    np.savez(tmp_path / "images_test.npz", left=x)
    with pytest.raises(DataError, match=r"keys \['x'\].* not \['left'\]; .*1\|3\] x and integer"):
        load("images", "test", tmp_path)


@pytest.mark.parametrize("name", ["type", "training", "_modules", "head_a", "code_b", "two words"])
def test_names_that_modules_or_scripts_need_are_refused(name, tmp_path):
    np.savez(tmp_path / "paired_test.npz", left=images(5, 4, 4, 1), **{name: images(5, 4, 4, 1)})
    with pytest.raises(DataError, match=f"'{name}' cannot name a modality"):
        load("paired", "test", tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(right=images(30, 3, 8, 8)), "1|3], not uint8 (30, 3, 8, 8)"),     # channels first
    (dict(right=images(30, 8, 8, 2)), "(30, 8, 8, 2)"), (dict(right=None), "two modalities"),
    (dict(right=images(29, 8, 8, 1)), "unequal lengths, {'left': 30, 'right': 29}"),
    (dict(y=np.arange(30) - 3), "from -3 to 26"), (dict(labels=np.arange(30)), "labels y")])
def test_wrong_pairs_are_named_with_the_layout(change, words, tmp_path):
    arrays = dict(left=images(30, 8, 8, 3), right=images(30, 8, 8, 1)) | change
    np.savez(tmp_path / "paired_test.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError) as error:
        load("paired", "test", tmp_path)
    assert words in str(error.value) and "[n h w] or [n h w 1|3] for each" in str(error.value)


def test_attributes_of_pairs_are_a_modality(tmp_path):
    np.savez(tmp_path / "paired_test.npz", left=images(5, 4, 4, 3), attributes=images(5, 4, 4, 1))
    d = load("paired", "test", tmp_path)
    assert d.kinds == {"left": "image", "attributes": "image"}


@pytest.mark.parametrize("change, words", [
    ({}, None), (dict(left=None, other=images(20, 8, 8, 3)), "modalities"),
    (dict(right=images(20, 8, 9, 1)), "shapes"), (dict(y=None), "labels y of train and test")])
def test_splits_that_do_not_fit_each_other_are_refused(change, words, tmp_path):
    arrays = dict(left=images(20, 8, 8, 3), right=images(20, 8, 8, 1), y=np.arange(20) % 2)
    for part, more in (("train", {}), ("test", change)):
        np.savez(tmp_path / f"paired_{part}.npz",
                 **{k: v for k, v in (arrays | more).items() if v is not None})
    sizes = {"train": None, "val": None, "test": 10}
    if words is None:
        sets = data.load_splits("paired", sizes, tmp_path)
        assert {split: len(d) for split, d in sets.items()} == {"train": 18, "val": 2, "test": 10}
    else:
        with pytest.raises(DataError, match=words):
            data.load_splits("paired", sizes, tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(x=images(30, 28, 28, 3)), "(30, 28, 28, 3)"),
    (dict(x=images(30, 32, 32, 3) / 255), "float64"),
    (dict(x=None), "keys"), (dict(y=None), "keys"),
    (dict(y=np.arange(29) % 10), "integers [30]"),
    (dict(y=np.arange(30) % 10 + 1), "0..9"), (dict(y=np.arange(30) / 9), "integers"),
    (dict(x=images(0, 32, 32, 3), y=np.arange(0)), "uint8")])
def test_wrong_npz_is_named(change, words, tmp_path):
    arrays = dict(x=images(30, 32, 32, 3), y=np.arange(30) % 10) | change
    path = tmp_path / "svhn_test.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError) as error:
        load("svhn", "test", tmp_path)
    assert str(path) in str(error.value) and words in str(error.value)
    assert "synth_svhn" in str(error.value)


def test_damaged_files_are_named(tmp_path):
    write_svhn(tmp_path)
    path = tmp_path / "svhn_test.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damage in (whole[:len(whole) // 2], bytes(flipped), b""):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="svhn_test.npz"):
            load("svhn", "test", tmp_path)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        write_mnist(tmp_path / name, cut=name)
        with pytest.raises(DataError, match=name):
            load("mnist", "test", tmp_path / name)
        raw = tmp_path / name / "MNIST" / "raw" / name
        raw.write_bytes(gzip.compress(struct.pack(">IIII", 2051, 20, 28, 28) + bytes(100)))
        with pytest.raises(DataError, match=name):              # whole archive, short content
            load("mnist", "test", tmp_path / name)


@pytest.mark.parametrize("name", FILE_SETS)
def test_missing_files_name_the_synthetic_twin_and_leave_nothing(name, tmp_path):
    with pytest.raises(DataError) as error:
        load(name, "train", tmp_path)
    message = str(error.value)
    remedy = data.TWINS.get(name, "integer labels y")
    assert remedy in message and str(tmp_path) in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_unknown_name_lists_the_names():
    with pytest.raises(DataError, match="synth_mnist_svhn, .*celeba"):
        load("mnist_svnh", "train")


def test_download_is_kept_once_it_is_whole(tmp_path, monkeypatch):
    calls = []

    class Fake:
        def __init__(self, root, split, download):
            calls.append(download)
            if not download:
                raise RuntimeError("not found or corrupted")
            (tmp_path / root / "half.mat").write_bytes(b"1")
            if len(calls) == 2:
                raise OSError("connection lost")
            self.data, self.labels = images(20, 3, 32, 32), np.arange(20) % 10

    monkeypatch.setattr(torchvision.datasets, "SVHN", Fake)
    with pytest.raises(DataError, match="connection lost"):
        load("svhn", "test", tmp_path)
    assert not list(tmp_path.iterdir())
    first, second = load("svhn", "test", tmp_path), load("svhn", "test", tmp_path)
    assert calls == [False, True, False, True] and torch.equal(first.x["svhn"], second.x["svhn"])
    assert torch.equal(first.x["svhn"], torch.from_numpy(images(20, 3, 32, 32)))       # upright
    assert first.y.tolist() == [*range(10)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["svhn_test.npz"]


def test_torchvisions_sets_keep_images_and_labels_together(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data = images(30, 32, 32, 3)
            self.targets = self.data[:, 0, 0, 0] % 10

    class Faces:
        attr = torch.tensor([[1] + 39 * [0], 39 * [0] + [1]])

        def __init__(self, root, part, download):
            pass

        def __iter__(self):                                     # white in the crop, black outside
            for grey in (255, 128):
                picture = np.zeros((218, 178, 3), np.uint8)
                picture[40:188, 15:163] = grey
                yield Image.fromarray(picture), None

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    monkeypatch.setattr(torchvision.datasets, "CelebA", Faces)
    d = load("cifar10", "test", tmp_path)
    assert torch.equal(d.x["cifar10"][:, 0, 0, 0] % 10, d.y)
    assert torch.equal(d.x["cifar10"].permute(0, 2, 3, 1), torch.from_numpy(images(30, 32, 32, 3)))
    d = load("celeba", "test", tmp_path)
    assert [v.unique().tolist() for v in d.x["image"]] == [[255], [128]]
    assert torch.equal(d.x["attributes"], Faces.attr.byte())


# ---- PolyMNIST ---------------------------------------------------------------------------------
def write_backgrounds(folder, n, size=33, value=None):
    """Names that sort wrongly as text. Returns the pictures as decoded, [n size size 3]."""
    (folder / "backgrounds").mkdir()
    pictures = []
    for i in range(n):
        path = folder / "backgrounds" / f"{i + 8}_{'zyxwvutsrqp'[i]}.jpg"
        picture = images(1, size, size, 3, seed=i)[0]
        picture = picture if value is None else np.full_like(picture, value)
        Image.fromarray(picture).save(path)
        pictures.append(np.array(Image.open(path)))
    return np.stack(pictures)


def test_polymnist_inverts_a_crop_under_another_digit_of_the_class(tmp_path):
    write_mnist(tmp_path, n_test=30)
    pictures = write_backgrounds(tmp_path, 5)
    d = load("polymnist", "test", tmp_path)
    assert d.modalities == ["m0", "m1", "m2", "m3", "m4"] and "not the official" in d.note
    digits = images(30, 28, 28, 1, seed=30) > 128
    partner = np.full((30, 5), -1)
    for m, picture in enumerate(pictures):
        crops = [picture[i:i + 28, j:j + 28] for i in range(5) for j in range(5)]
        for i in range(30):
            x = d.x[f"m{m}"][i].permute(1, 2, 0).numpy()
            for k in range(int(d.y[i]), 30, 10):                # images of the class
                if any(np.array_equal(x, np.where(digits[k], 255 - crop, crop)) for crop in crops):
                    partner[i, m] = k
        assert sorted(partner[:, m]) == list(range(30))         # a permutation within each class
    assert len({tuple(column) for column in partner.T}) == 5    # of its own in each modality
    again = load("polymnist", "test", tmp_path, seed=3, n_modalities=2)     # five all the same
    assert all(torch.equal(d.x[m], again.x[m]) for m in d.x)


def test_polymnist10_has_as_many_modalities_as_asked_for_the_same_ones(tmp_path):
    write_mnist(tmp_path, n_test=30)
    write_backgrounds(tmp_path, 10)
    all_ten, two = (load("polymnist10", "test", tmp_path, n_modalities=k) for k in (None, 2))
    assert len(all_ten.x) == 10 and list(two.x) == ["m0", "m1"]
    assert all(torch.equal(two.x[m], all_ten.x[m]) for m in two.x)


@pytest.mark.parametrize("script", ["jnf", "sbm_vae", "latent_ebm_prior", "ebm_revision"])
def test_every_multimodal_script_takes_any_number_of_polymnist10s_modalities(script):
    parse_args, name = importlib.import_module(script).parse_args, ["--dataset", "polymnist10"]
    assert parse_args(name).n_modalities == 10
    assert parse_args([*name, "--n_modalities", "3"]).n_modalities == 3


def test_polymnist_tells_what_it_is_built_from_and_refuses_a_small_picture(tmp_path):
    y = np.arange(30) % 10
    np.savez(tmp_path / "mnist_test.npz", x=images(30, 28, 28, 1), y=y, note="mine")
    pictures = write_backgrounds(tmp_path, 5)
    assert load("polymnist", "test", tmp_path).note.endswith("not the official files; mine")
    (path, *_) = (tmp_path / "backgrounds").glob("*_x.jpg")
    Image.fromarray(pictures[2][:, :27]).save(path)
    with pytest.raises(DataError, match=f"{path.name} must have 28x28 pixels"):
        load("polymnist", "test", tmp_path)


def test_translated_polymnist_shrinks_and_moves(tmp_path):
    write_mnist(tmp_path, n_test=10)
    write_backgrounds(tmp_path, 5, value=0)
    d = load("translated_polymnist", "test", tmp_path)
    x = torch.from_numpy(images(10, 28, 28, 1, seed=10)).permute(0, 3, 1, 2).float()
    small = F.interpolate(x, size=(21, 21), mode="bilinear").to(torch.uint8) > 128
    offsets = set()
    for m in d.x:
        for i in range(10):
            found = [(a, b) for a in range(7) for b in range(7) if torch.equal(
                d.x[m][i, 0] > 0, F.pad(small[i, 0], (b, 7 - b, a, 7 - a)))]
            assert len(found) == 1
            offsets.update(found)
    assert len(offsets) > 20 and [max(o) for o in zip(*offsets)] == [6, 6]


@pytest.mark.parametrize("layout", ["pt", "png"])
def test_official_polymnist_layouts(layout, tmp_path):
    pools = {f"m{m}": images(40, 28, 28, 3, seed=m) for m in range(5)}
    folder, y = tmp_path / "MMNIST" / "train", np.arange(40) // 4
    folder.mkdir(parents=True)
    for m, x in pools.items():
        if layout == "pt":
            torch.save(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, folder / f"{m}.pt")
        else:
            (folder / m).mkdir()
            for i in range(40):
                Image.fromarray(x[i]).save(folder / m / f"{i % 4}.{y[i]}.png")
    torch.save(torch.from_numpy(y), folder / "labels.pt") if layout == "pt" else None
    train, val = (load("polymnist", split, tmp_path) for split in ("train", "val"))
    assert train.y.bincount().tolist() == [3] * 10 and val.y.tolist() == list(range(10))
    for i in (0, 7, 29):                        # the tuple is the same row of every pool
        rows = [np.flatnonzero((x == train.x[m][i].permute(1, 2, 0).numpy()).all((1, 2, 3)))
                for m, x in pools.items()]
        assert len({tuple(r) for r in rows}) == 1 and y[rows[0]] == train.y[i]
    assert load("polymnist", "train", tmp_path, n=20).y.unique().tolist() == list(range(10))
    next(folder.glob("m3.pt") if layout == "pt" else (folder / "m3").glob("*.png")).unlink()
    with pytest.raises(DataError, match="MMNIST/train"):
        load("polymnist", "train", tmp_path)


# ---- Faces with masks, birds with captions -------------------------------------------------------
def test_celebamask_from_a_folder_and_from_npz(tmp_path):
    folder = tmp_path / "CelebAMask-HQ"
    signs = np.where(np.random.default_rng(0).integers(0, 2, (12, 40)), 1, -1)
    rows = [f"{i}.jpg  " + " ".join(map(str, row)) for i, row in enumerate(signs)]
    for split in ("train", "val"):
        for kind in ("img", "mask"):
            (folder / f"{split}_{kind}").mkdir(parents=True)
    for i in range(12):
        split = "val" if i == 11 else "train"
        Image.fromarray(np.full((256, 256, 3), 20 * i, np.uint8)).save(
            folder / f"{split}_img" / f"{i}.jpg", quality=100)
        half = np.zeros((512, 512), np.uint8)
        half[:, :20 * i] = 255
        Image.fromarray(half).save(folder / f"{split}_mask" / f"{i}.png")
    with pytest.raises(DataError, match="attribute-anno.txt"):
        load("celebamask_hq", "train", tmp_path)
    (folder / "CelebAMask-HQ-attribute-anno.txt").write_text("12\nnames\n" + "\n".join(rows))
    d = load("celebamask_hq", "train", tmp_path)
    assert d.shapes == {"image": (3, 128, 128), "mask": (1, 128, 128), "attributes": (18,)}
    assert len(d) == 11 and len(load("celebamask_hq", "val", tmp_path)) == 1 and d.y is None
    assert d.x["image"][:, 0, 5, 5].tolist() == [20 * i for i in range(11)]      # 10 after 9
    assert torch.equal(d.x["mask"][:, 0, 9].float().mean(1), torch.arange(11) * 5 * 255 / 128)
    columns = [4, 5, 8, 9, 11, 12, 15, 17, 18, 20, 21, 22, 26, 28, 31, 32, 33, 35]
    assert (d.x["attributes"].numpy() == (signs[:11][:, columns] == 1)).all()
    (folder / "train_mask" / "3.png").unlink()
    with pytest.raises(DataError, match="3.png"):
        load("celebamask_hq", "train", tmp_path)
    index = np.arange(20 * 128 * 128, dtype=np.int64).reshape(20, 128, 128) % 19
    np.savez(tmp_path / "celebamask_train.npz", x=images(20, 128, 128, 3), mask=index.astype("u1"))
    d = load("celebamask_hq", "train", tmp_path)
    assert d.shapes == {"image": (3, 128, 128), "mask": (1, 128, 128)} and len(d) == 18
    assert torch.equal(d.take(slice(2))["mask"][:, 0], torch.from_numpy(index[:2] > 1).float())


def test_cub_pairs_each_caption_with_its_image(tmp_path):
    cub = tmp_path / "cub"
    for part, text in (("train", "trainval"), ("test", "test")):
        lines = []
        for i in range(20):
            folder = cub / part / f"{i // 10}.bird"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((80, 90, 3), 10 * i, np.uint8)).save(folder / f"{i:02}.jpg")
            lines += [f"bird n{i} , word{k} {'long ' * 40 * (k == 9)}" for k in range(10)]
        (cub / f"text_{text}classes.txt").write_text("\n".join(lines))
    train, val, test = (load("cub", split, tmp_path) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (180, 20, 200) and train.y is None
    assert train.shapes == {"image": (3, 64, 64), "caption": (32,)} and train.words == test.words
    assert train.kinds["caption"] == "text" and train.words[:5] == (
        "<exc>", "<pad>", "<eos>", "bird", "n0")
    for x in batches(train, 50, torch.Generator().manual_seed(0)):
        assert x["caption"].dtype == torch.int64
        for image, tokens in zip(x["image"], x["caption"]):
            said = [train.words[i] for i in tokens]
            assert said[1] == f"n{round(255 * image.mean().item() / 10)}"
            assert said[4:] == ["<eos>"] + ["<pad>"] * 27 or said[4:] == ["long"] * 27 + ["<eos>"]
    assert not set(train.x["image"].flatten().tolist()) & set(val.x["image"].flatten().tolist())
    assert len({image.mean().item() for image in test.take(slice(20))["image"]}) > 10
    assert redraw(train, torch.Generator()) is train
    assert len(load("cub", "train", tmp_path, n=10)) == 90
    other = cub / "text_testclasses.txt"                        # words of the test birds: <exc>
    other.write_text(other.read_text().replace("word1 ", "unheard "))
    assert "unheard" not in load("cub", "test", tmp_path).words
    rare = cub / "text_trainvalclasses.txt"
    rare.write_text(rare.read_text().replace("n7", "seldom", 3))
    assert "seldom" not in load("cub", "test", tmp_path).words
    rare.write_text("one line")
    with pytest.raises(DataError, match="ten captions"):
        load("cub", "train", tmp_path)
