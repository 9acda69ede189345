"""Every data set of the five scripts, as tensors that can stay on the device.

    train = load("synth_mnist_svhn", "train")           # generated: no file, no network
    for x in batches(train, 128, generator, device):   # {"mnist": [b 1 28 28], "svhn": [b 3 32 32]}
        ...                                             # float32 in [0, 1]

generated: synth_mnist_svhn (mnist 1x28x28, svhn 3x32x32), synth_mnist, synth_svhn (one of them),
    synth_polymnist (m0, m1, .. 3x28x28), shapes (circle, square 1x32x32)
from files: mnist_svhn (mnist, svhn); polymnist, translated_polymnist (m0 .. m4), polymnist10;
    mnist, fashion_mnist, svhn, cifar10; celeba (image 3x64x64, attributes 40); celebamask_hq
    (image 3x128x128, mask 1x128x128, attributes 18); cub (image 3x64x64, caption of 32 tokens);
    your own: paired (any names and sizes), images (image)

Files <name>_<train|test>.npz in data_dir stand in for downloads: x [n h w c] uint8, y [n] and, if
any, attributes and note; "paired" has an array [n h w c] or [n h w] a modality instead of x. val
is the last 10 % of each class of the training file. Pools are uint8 and become float32 in batches.
"""
import contextlib
import gzip
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

SINGLE = {"mnist": ("MNIST", (28, 28, 1)), "fashion_mnist": ("FashionMNIST", (28, 28, 1)),
          "svhn": ("SVHN", (32, 32, 3)), "cifar10": ("CIFAR10", (32, 32, 3)),
          "celeba": ("CelebA", (64, 64, 3))}                        # torchvision's class, [h w c]
OFFICIAL = {"polymnist": "MMNIST", "polymnist10": "Upd10MMNIST",    # folders of the releases
            "translated_polymnist": "Translated_MMNIST_scale_75_translated_True"}
TWINS = {"mnist": "synth_mnist", "fashion_mnist": "synth_mnist", "mnist_svhn": "synth_mnist_svhn",
         **dict.fromkeys(("svhn", "cifar10", "celeba"), "synth_svhn"), "cub": "synth_mnist_svhn",
         **dict.fromkeys(OFFICIAL, "synth_polymnist"), "celebamask_hq": "synth_polymnist"}
OWN = {"paired": "for each modality", "images": "x"}                # any size, any classes or none
SYNTHETIC = {"synth_mnist_svhn": ("mnist", "svhn"), "synth_mnist": ("mnist",),
             "synth_svhn": ("svhn",), "shapes": ("circle", "square"),
             "synth_polymnist": tuple(f"m{i}" for i in range(16))}
FACE = (4, 5, 8, 9, 11, 12, 15, 17, 18, 20, 21, 22, 26, 28, 31, 32, 33, 35)    # of 40 attributes
SHARE = {"train": lambda n: n - max(n // 10, 1), "val": lambda n: max(n // 10, 1),
         "test": lambda n: n}               # of n tuples; val takes its share from train
SYNTHETIC_VERSION = 10                      # raise it when the same seed gives other images
NAMES = (*SYNTHETIC, *TWINS, *OWN)


class DataError(OSError):
    """A file is missing, truncated or wrong, in one line: which, looked for where, from where."""


@dataclass(frozen=True)
class Dataset:
    """n tuples over pools: tuple i is {m: x[m][i]}, or {m: x[m][rows[m][i]]} with rows."""
    x: dict[str, Tensor]            # uint8 images [p c h w], uint8 attributes [p a], tokens [p l]
    y: Tensor | None                # [n] int64, label of tuple i
    kinds: dict[str, str]           # image | binary | text | feature
    name: str
    split: str
    note: str = ""                  # what is not standard about these bytes
    rows: dict[str, Tensor] | None = None       # {m: [n]}: pools of unequal size
    pool_y: dict[str, Tensor] | None = None     # {m: [p]}, of rows that are paired by class
    words: tuple[str, ...] = ()     # text: the word of each token
    source: dict[str, str] = field(default_factory=dict)    # feature: the modality it belongs to

    def __len__(self) -> int:
        return len(next(iter((self.rows or self.x).values())))

    @property
    def modalities(self) -> list[str]:
        return [m for m in self.x if self.kinds[m] != "feature"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {m: tuple(self.x[m].shape[1:]) for m in self.modalities}

    @property
    def net_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a net draws: images (c, h, w), attributes (a,), logits of text (l, words)."""
        return {m: shape + (len(self.words),) * (self.kinds[m] == "text")
                for m, shape in self.shapes.items()}

    def to(self, device) -> "Dataset":
        x, rows, pool_y = (pools and {m: pool.to(device) for m, pool in pools.items()}
                           for pools in (self.x, self.rows, self.pool_y))
        y = None if self.y is None else self.y.to(device)
        return replace(self, x=x, y=y, rows=rows, pool_y=pool_y)

    def take(self, index: Tensor | slice, device=None, names=None) -> dict[str, Tensor]:
        """Tuples index (LongTensor [b] or slice) as float32: images [b c h w] in [0, 1], attributes
        0. or 1.; tokens and features as stored. device: where to, default where the pools are."""
        if isinstance(index, Tensor):
            index = index.to(next(iter(self.x.values())).device)
        batch = {}
        for m in self.x if names is None else names:
            row = index if self.rows is None else self.rows[self.source.get(m, m)][index]
            x = self.x[m][row].to(device)                               # still a byte a pixel
            x = x.float() if self.kinds[m] in ("image", "binary") else x
            batch[m] = x / 255 if self.kinds[m] == "image" else x
        return batch

    def select(self, index: Tensor | slice) -> "Dataset":
        """The tuples index (numbers, a mask or a slice); pools that have rows stay whole."""
        y = None if self.y is None else self.y[index]
        if self.rows is None:
            return replace(self, x={m: x[index] for m, x in self.x.items()}, y=y)
        return replace(self, y=y, rows={m: row[index] for m, row in self.rows.items()})

    def head(self, n: int) -> "Dataset":
        """The first n tuples."""
        return self.select(slice(n))

    def modality(self, m: str) -> tuple[Tensor, Tensor | None]:
        """Every image of m once, with its labels: what a classifier of m trains on."""
        return self.x[m], self.pool_y[m] if self.pool_y else self.y

    def attach(self, prefix: str, features: dict[str, Tensor]) -> "Dataset":
        """With entries <prefix>_<m>: features[m] [p f], one for each row of the pool of m."""
        for m, feature in features.items():
            if len(feature) != len(self.x[m]):
                raise ValueError(f"{len(feature)} features for the {len(self.x[m])} rows of {m}")
        source = {f"{prefix}_{m}": m for m in features}
        x = self.x | {k: features[m].to(self.x[m].device) for k, m in source.items()}
        kinds = self.kinds | dict.fromkeys(source, "feature")
        return replace(self, x=x, kinds=kinds, source=self.source | source)


def redraw(dataset: Dataset, generator: torch.Generator) -> Dataset:
    """A new same-class pairing of a training set with pool_y; any other data set as it is."""
    if dataset.pool_y is None or dataset.split != "train":
        return dataset
    rows = {m: _draw(dataset.y.cpu(), dataset.pool_y[m].cpu(), generator).to(dataset.y.device)
            for m in dataset.rows}
    return replace(dataset, rows=rows)


def batches(dataset: Dataset, batch_size: int, generator: torch.Generator | None = None,
            device=None, start: int = 0, rank: int = 0, world: int = 1,
            names=None) -> Iterator[dict[str, Tensor]]:
    """One epoch of dicts as from Dataset.take; without a generator all tuples once, in order.

    With a (CPU) generator pairs are redrawn, tuples permuted, and the last partial batch dropped,
    unless it is the only one. The first start batches are skipped without touching the data: the
    generator's state before the epoch and start resume an epoch exactly. batch_size is global;
    rank r of world gets the slice [r::world] of each batch.
    """
    n, order = len(dataset), None
    n_batches = math.ceil(n / batch_size)
    if generator is not None:
        dataset = redraw(dataset, generator)
        order = torch.randperm(n, generator=generator).to(next(iter(dataset.x.values())).device)
        n_batches = max(1, n // batch_size)
    for i in range(start, n_batches):
        index = slice(i * batch_size + rank, min((i + 1) * batch_size, n), world)
        yield dataset.take(index if order is None else order[index], device, names)


@torch.no_grad()
def encode(net, images: Tensor, batch_size: int = 1000) -> Tensor:
    """net over uint8 images [p c h w], as floats in [0, 1], or tokens [p l], batch by batch:
    features [p f]."""
    return torch.cat([net(x.float() / 255 if x.dtype == torch.uint8 else x)
                      for x in images.split(batch_size)])


def load(name: str, split: str, data_dir="datasets", n: int | None = None,
         n_modalities: int | None = None, seed: int = 0, pairings: int = 1) -> Dataset:
    """The data set name, split train | val | test, on the CPU.

    n             tuples of train and val together, or of test. Generated sets: 30,000 and 5,000;
                  sets from files: the first n images of each file, default all.
    n_modalities  of synth_polymnist, 2 .. 16, default 5; of polymnist10 the first, default 10.
    seed          of generated sets and of mnist_svhn's first training pairing, nothing else.
    pairings      of mnist_svhn: how often an epoch of train holds each mnist image.
    Options that a set does not have are ignored. DataError for every missing or wrong file.
    """
    _require(name in NAMES, f"no data set {name!r}; there are {', '.join(NAMES)}")
    _require(split in ("train", "val", "test"), f"split must be train, val or test, not {split!r}")
    _require(n is None or n >= 2, f"{name}: n must be 2 or more, not {n}")
    data_dir = Path(data_dir).expanduser().absolute()
    if name in SYNTHETIC:
        return _synthetic(name, split, data_dir, n, 5 if n_modalities is None else n_modalities,
                          seed)
    try:
        if name == "mnist_svhn":
            return _mnist_svhn(split, data_dir, n, seed, pairings)
        if name in OFFICIAL:
            return _polymnist(name, split, data_dir, n, n_modalities)
        if name == "celebamask_hq":
            return _celebamask_hq(split, data_dir, n)
        if name == "cub":
            return _cub(split, data_dir, n)
        return _from_files(name, split, data_dir, n)
    except DataError as error:
        remedy = f"{TWINS[name]} needs no files" if name not in OWN else \
            f"it takes a uint8 array [n h w] or [n h w 1|3] {OWN[name]} and integer labels y"
        raise DataError(f"{name}: {error}; {remedy}") from error


def load_splits(name: str, sizes: dict[str, int | None], data_dir="datasets", device="cpu",
                **options) -> dict[str, Dataset]:
    """{split: load(name, split, ..)} on the device for sizes {split: n}; DataError also for files
    that do not fit each other."""
    sets = {split: load(name, split, data_dir, n, **options).to(device)
            for split, n in sizes.items()}
    for what, of in (("modalities", lambda s: s.modalities), ("shapes", lambda s: s.shapes),
                     ("labels y", lambda s: "none" if s.y is None else "some")):
        (first, one), *others = ((split, of(found)) for split, found in sets.items())
        for split, other in others:
            _require(other == one, f"{name} in {data_dir}: {what} of {first} and {split} differ, "
                     f"{one} and {other}")
    return sets


# ---- Splits and pairs --------------------------------------------------------------------------
def _generator(*key) -> torch.Generator:
    """A CPU generator that is a pure function of key."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def _split(dataset: Dataset, n: int | None) -> Dataset:
    """The train or val rows of the first n tuples of a training file: val is the last 10 % (at
    least one of two) of each class in file order, so that most neighbours there (digits of one
    house) stay on one side. No seed: the same for all runs. Of a test file the first n."""
    dataset = dataset if n is None else dataset.head(n)
    if dataset.split == "test":
        return dataset
    y = torch.zeros(len(dataset), dtype=torch.long) if dataset.y is None else dataset.y
    order, count = torch.argsort(y, stable=True), torch.bincount(y)
    place = torch.arange(len(y)) - (count.cumsum(0) - count)[y[order]]      # within the class
    n_val = torch.where(count > 1, (count / 10).round().clamp(min=1), 0)
    in_val = place >= (count - n_val)[y[order]]
    rows = order[in_val == (dataset.split == "val")].sort().values
    _require(len(rows) > 0, f"{len(y)} tuples are too few for a split {dataset.split}")
    return dataset.select(rows)


def _shuffled(dataset: Dataset) -> Dataset:
    """The same tuples in a fixed random order: files are sorted by class as often as not, and
    evaluations look at the first n."""
    generator = _generator(dataset.name, dataset.split)
    return dataset.select(torch.randperm(len(dataset), generator=generator))


def _draw(y: Tensor, pool_y: Tensor, generator: torch.Generator) -> Tensor:
    """A random row of the pool with the same label for each of y [n]: without replacement until
    the class is used up, then again from all of it. Returns [n] int64."""
    rows = torch.empty_like(y)
    for c in y.unique():
        wanted, pool = (y == c).nonzero().flatten(), (pool_y == c).nonzero().flatten()
        _require(len(pool) > 0, f"no class {int(c)} to pair with (small --n_train, --n_test?)")
        rounds = [pool[torch.randperm(len(pool), generator=generator)]
                  for _ in range(math.ceil(len(wanted) / len(pool)))]
        rows[wanted] = torch.cat(rounds)[:len(wanted)]
    return rows


# ---- Files -------------------------------------------------------------------------------------
def _require(ok: bool, message: str) -> None:
    if not ok:
        raise DataError(message)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    _require(path.exists(), f"{path} is missing")
    _require(zipfile.is_zipfile(path), f"{path} is truncated or no .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error})") from error


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Atomic: a temporary file in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp_") as folder:
        np.savez(f"{folder}/new.npz", **arrays)
        os.replace(f"{folder}/new.npz", path)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped MNIST file, uint8 [n *shape], of exactly the length that its header promises."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error})") from error
    n = int.from_bytes(data[4:8], "big")
    header = bytes([0, 0, 8, 1 + len(shape)]) + np.array([n, *shape], ">u4").tobytes()
    _require(data.startswith(header) and len(data) == len(header) + n * int(np.prod(shape)),
             f"{path} is no MNIST file of uint8 [n {shape}], or not as long as its header says")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(n, *shape).copy()


def _torchvision(name: str, part: str, path: Path) -> dict[str, np.ndarray]:
    """torchvision's copy in the folder of path; else its download (md5 checked) to a temporary
    folder, kept as the .npz path. SVHN 73,257 + 26,032 (225 + 80 MB), label 0 for digit 0; CIFAR-10
    50,000 + 10,000 (154 + 31 MB); CelebA 162,770 + 19,962 (2.0 + 0.25 GB), minutes to decode."""
    import torchvision.datasets                                 # takes seconds: not for --help
    def arrays(root, download):
        make = getattr(torchvision.datasets, SINGLE[name][0])
        data = make(root, part if name in ("svhn", "celeba") else part == "train",
                    download=download)
        if name == "svhn":
            return {"x": data.data.transpose(0, 2, 3, 1), "y": data.labels}
        if name != "celeba":
            return {"x": np.asarray(data.data), "y": np.asarray(data.targets)}
        box = (15, 40, 163, 188)                # the crop of the EBM papers
        faces = [image.crop(box).resize((64, 64), Image.BILINEAR) for image, _ in data]
        return {"x": np.stack(faces), "attributes": data.attr.numpy().astype(np.uint8)}
    with contextlib.suppress(RuntimeError, OSError):            # not there, or a wrong md5 sum
        return arrays(path.parent, False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download_") as folder:
            fetched = arrays(folder, True)
        _write_npz(path, fetched)
    except (RuntimeError, OSError, ImportError) as error:       # ImportError: gdown, for celeba
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"neither {path} nor torchvision's files beside it found, and the download "
                        f"by torchvision failed ({reason})") from error
    return fetched


def _from_files(name: str, split: str, data_dir: Path, n: int | None) -> Dataset:
    """One image modality (celeba: and attributes), or the user's paired_*.npz or images_*.npz."""
    part, prefix = ("test", "t10k") if split == "test" else ("train", "train")
    path = data_dir / f"{name}_{part}.npz"
    images = data_dir / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte.gz"
    if path.exists() or name in OWN:
        arrays = _read_npz(path)
    elif name == "mnist" and images.exists():
        path, labels = images, images.with_name(f"{prefix}-labels-idx1-ubyte.gz")
        arrays = {"x": _read_idx(path, (28, 28)), "y": _read_idx(labels, ())}
    else:
        arrays = _torchvision(name, part, path)
    note = str(arrays.pop("note", ""))
    x, y = _checked(name, path, arrays)
    kinds = dict.fromkeys(x, "image") | ({"attributes": "binary"} if name == "celeba" else {})
    found = Dataset(x, y, kinds, name, split, note)
    if name not in OWN:
        return _split(found, n)
    found = _shuffled(_split(found, None))                      # before n: all classes are in it
    return found.head(n and SHARE[split](n))


def _checked(name: str, path: Path,
             arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], Tensor | None]:
    """x and y of a Dataset from the arrays of a file, or a DataError that says what is wrong."""
    y, top = arrays.pop("y", None), np.inf if name in OWN else 9
    need = {"celeba": {"x", "attributes"}, "paired": set(arrays)}.get(name, {"x"})
    wanted = "two modalities or more" if name == "paired" else f"keys {sorted(need)}, y"
    _require(len(need) > (name == "paired") and need <= set(arrays)
             and (y is not None or name in ("celeba", *OWN)),
             f"{path} must have {wanted}, not {sorted(arrays)}")
    x, shape = {}, SINGLE[name][1] if name in SINGLE else None
    for key in sorted(need if name == "paired" else {"x"}, key=list(arrays).index):
        v = arrays[key] if arrays[key].ndim != 3 else arrays[key][..., None]
        ok = v.dtype == np.uint8 and v.ndim == 4 and len(v) > 0 and v.shape[3] in (1, 3)
        _require(ok and shape in (None, v.shape[1:]), f"{path}: {key} must be uint8 "
                 f"[n {shape or 'h w'}] or [n h w 1|3], not {v.dtype} {v.shape}")
        m = key if name == "paired" else "image" if name in ("celeba", "images") else name
        _require(m.isidentifier() and not hasattr(torch.nn.ModuleDict(), m)
                 and not m.startswith(("head_", "code_", "q_")),            # names of jnf.py's
                 f"{path}: {m!r} cannot name a modality: take another word")
        x[m] = torch.from_numpy(np.ascontiguousarray(v.transpose(0, 3, 1, 2)))
    lengths = {m: len(v) for m, v in x.items()}
    n = next(iter(lengths.values()))
    _require(set(lengths.values()) == {n}, f"{path}: unequal lengths, {lengths}")
    if name == "celeba":
        a = x["attributes"] = torch.from_numpy(arrays["attributes"])
        _require(a.dtype == torch.uint8 and a.shape == (n, 40) and a.max() < 2,
                 f"{path}: attributes must be uint8 [{n} 40] of 0 and 1")
    if y is not None:
        _require(y.dtype.kind in "iu" and y.shape == (n,) and y.min() >= 0 and y.max() <= top,
                 f"{path}: y must be integers [{n}] in 0..{top}, not {y.dtype} {y.shape}"
                 + f" from {y.min()} to {y.max()}" * (y.dtype.kind in "iu" and y.size > 0))
        y = torch.from_numpy(y.astype(np.int64))
    return x, y


# ---- Multimodal sets from files ----------------------------------------------------------------
def _mnist_svhn(split: str, data_dir: Path, n: int | None, seed: int, pairings: int) -> Dataset:
    """Each mnist image with an svhn image of its class, drawn anew each epoch (redraw).

    The official index file stores 30 pairings of the first min(mnist, svhn) images of a class,
    1.7 M pairs. Here all images take part, an epoch is one pairing (or pairings), and each set is
    split before it is paired: no image of train is in val. Pairs of val and test are fixed. 270 MB.
    """
    parts = {m: _from_files(m, split, data_dir, n) for m in ("mnist", "svhn")}
    pool_y = {m: part.y for m, part in parts.items()}
    train = split == "train"
    y = pool_y["mnist"].repeat(pairings if train else 1)
    generator = _generator("mnist_svhn", split, seed if train else 0)
    return Dataset(x={m: part.x[m] for m, part in parts.items()}, y=y,
                   kinds=dict.fromkeys(parts, "image"), name="mnist_svhn", split=split,
                   note="; ".join(part.note for part in parts.values() if part.note),
                   rows={m: _draw(y, pool_y[m], generator) for m in parts}, pool_y=pool_y)


def _polymnist(name: str, split: str, data_dir: Path, n: int | None, n_modalities) -> Dataset:
    """PolyMNIST and its kin: the official files, else built as the papers did, the same for every
    seed, from MNIST and the pictures <data_dir>/backgrounds/<number>_*.jpg.

    Built: for each class and modality an independent permutation of the MNIST images, so that a
    tuple is one digit in several hands; on digit pixels (> 128) the colours of a random 28x28 crop
    of the modality's picture are inverted. Translated: digits shrunk to 21x21, at offsets 0 .. 6.
    70,000 tuples: 0.8 GB, 5 s (polymnist10 twice that); official PNGs take a minute to decode.
    """
    names = [f"m{i}" for i in range(min(n_modalities or 10, 10) if name == "polymnist10" else 5)]
    folder, pictures = data_dir / OFFICIAL[name], data_dir / "backgrounds"
    if folder.is_dir():
        part = "train" if split == "val" and not (folder / "val").is_dir() else split
        x, y = _official_polymnist(folder / part, names)
        dataset = Dataset(x, y, dict.fromkeys(x, "image"), name, split)
        return dataset.head(n or len(y)) if (folder / "val").is_dir() else _split(dataset, n)
    paths = sorted((path for path in pictures.glob("*.jpg") if path.name.split("_")[0].isdigit()),
                   key=lambda path: int(path.name.split("_")[0]))[:len(names)]
    _require(len(paths) == len(names), f"neither the official files (zenodo.org/record/4899160) in "
             f"{folder} nor {len(names)} pictures <number>_*.jpg in {pictures} found")
    mnist = _from_files("mnist", split, data_dir, n)
    x = {}
    for m, path in zip(names, paths):
        generator = _generator(name, split, m)
        digits = mnist.x["mnist"][_draw(mnist.y, mnist.y, generator)]       # [n 1 28 28]
        if name == "translated_polymnist":
            digits = _translate(digits, generator)
        picture = _picture(path)
        _require(min(picture.shape[1:]) >= 28, f"{path} must have 28x28 pixels or more")
        x[m] = _on_crops(digits > 128, picture, generator)
    note = f"built from MNIST and {', '.join(path.name for path in paths)}: not the official files"
    note += f"; {mnist.note}" * bool(mnist.note)
    return Dataset(x, mnist.y, dict.fromkeys(x, "image"), name, split, note)


def _picture(path: Path) -> Tensor:
    """[3 h w] uint8."""
    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError) as error:                     # a broken PNG: SyntaxError
        raise DataError(f"{path} is no picture, or truncated ({error})") from error


def _on_crops(mask: Tensor, picture: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops [n 3 h w] of picture [3 H W] uint8, inverted where mask [n 1 h w] is True."""
    n, _, h, w = mask.shape
    windows = rearrange(picture.unfold(1, h, 1).unfold(2, w, 1), "c y x h w -> y x c h w")  # a view
    room = torch.tensor(windows.shape[:2]) - 1                  # exclusive, as in the papers
    top, left = (torch.rand(n, 2, generator=generator) * room).long().T
    crop = windows[top, left]                                   # [n 3 h w]
    return torch.where(mask, 255 - crop, crop)


def _translate(digits: Tensor, generator: torch.Generator) -> Tensor:
    """digits [n 1 28 28] uint8 at 3/4 of their size, each at random offsets 0 .. 6 on black."""
    small = F.interpolate(digits.float(), size=(21, 21), mode="bilinear").to(torch.uint8)
    windows = F.pad(small, (6, 7, 6, 7)).unfold(2, 28, 1).unfold(3, 28, 1)  # [n 1 7 7 28 28]
    top, left = 6 - torch.randint(0, 7, (2, len(digits)), generator=generator)
    return windows[torch.arange(len(digits)), :, top, left]


def _official_polymnist(folder: Path, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """m<i>.pt and labels.pt, or m<i>/<k>.<digit>.png, as released. The classes are interleaved, so
    that the first n tuples are a mixture."""
    try:
        if (folder / "labels.pt").exists():
            y = torch.load(folder / "labels.pt", weights_only=True).long()
            x = {m: torch.load(folder / f"{m}.pt", weights_only=True) for m in names}
            x = {m: _to_bytes(v) if v.is_floating_point() else v for m, v in x.items()}
        else:
            files = sorted(path.name for path in (folder / names[0]).glob("*.png"))
            y = torch.tensor([int(file.split(".")[-2]) for file in files])
            x = {m: torch.stack([_picture(folder / m / f) for f in files]) for m in names}
    except (RuntimeError, ValueError, LookupError, OSError, EOFError, UnpicklingError) as error:
        raise DataError(f"{folder} is incomplete or damaged ({error})") from error
    for m, v in x.items():
        _require(v.dtype == torch.uint8 and v.shape == (len(y), 3, 28, 28),
                 f"{folder}: {m} must hold [{len(y)} 3 28 28], not {v.dtype} {list(v.shape)}")
    _require(0 <= int(y.min()) and int(y.max()) < 10, f"{folder}: labels must lie in 0..9")
    place = F.one_hot(y, 10).cumsum(0)[torch.arange(len(y)), y]             # 1, 2, .. of its class
    order = torch.argsort(10 * place + y)
    return {m: v[order] for m, v in x.items()}, y[order]


def _resized(paths: list[Path], size: int, antialias: bool) -> Tensor:
    """Pictures as [n 3 size size] uint8, bilinear."""
    x = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for row, path in zip(x, paths):
        small = F.interpolate(_picture(path)[None].float(), (size, size), mode="bilinear",
                              antialias=antialias)
        row[:] = small[0].round()
    return x


def _celebamask_hq(split: str, data_dir: Path, n: int | None) -> Dataset:
    """From <data_dir>/CelebAMask-HQ, as the paper's code lays it out: <train|val|test>_img/<k>.jpg,
    <train|val|test>_mask/<k>.png (white: any part but the skin) and the official attribute file;
    resized without antialiasing, so that the masks' edges are grey. 64 kB an item.

    celebamask_<train|test>.npz (x, mask: 19 classes, 0 the ground, 1 the skin) has no attributes.
    """
    part, folder = "test" if split == "test" else "train", data_dir / "CelebAMask-HQ"
    path, names = data_dir / f"celebamask_{part}.npz", folder / "CelebAMask-HQ-attribute-anno.txt"
    kinds = {"image": "image", "mask": "image", "attributes": "binary"}
    if path.exists():
        arrays = _read_npz(path)
        image, mask = arrays.get("x", np.empty(0)), arrays.get("mask", np.empty(0))
        _require(image.dtype == mask.dtype == np.uint8 and len(image) > 0
                 and image.shape == (*mask.shape, 3) and mask.shape[1:] == (128, 128),
                 f"{path} must hold uint8 x [n 128 128 3] and mask [n 128 128]")
        x = {"image": torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(),
             "mask": torch.from_numpy(255 * (mask > 1).astype(np.uint8)[:, None])}
        note = str(arrays.get("note", ""))
        return _split(Dataset(x, None, {m: kinds[m] for m in x}, "celebamask_hq", split, note), n)
    files = [file for file in (folder / f"{split}_img").glob("*.jpg") if file.stem.isdigit()]
    files = sorted(files, key=lambda file: int(file.stem))[:n]
    _require(len(files) > 0 and names.exists(),
             f"found neither {path} nor, in {folder}, {split}_img/*.jpg and {names.name} "
             "(github.com/switchablenorms/CelebAMask-HQ)")
    lines = names.read_text().splitlines()          # count, names, then a line for each image
    _require(max(int(file.stem) for file in files) + 2 < len(lines), f"{names} is truncated")
    rows = [lines[int(file.stem) + 2].split()[1:] for file in files]
    _require(all(len(row) == 40 for row in rows), f"{names} must have 40 values a line")
    masks = [folder / f"{split}_mask" / f"{file.stem}.png" for file in files]
    x = {"image": _resized(files, 128, False), "mask": _resized(masks, 128, False)[:, :1].clone(),
         "attributes": torch.tensor([[row[i] == "1" for i in FACE] for row in rows]).byte()}
    return Dataset(x, None, kinds, "celebamask_hq", split)


def _cub(split: str, data_dir: Path, n: int | None) -> Dataset:
    """CUB with captions in the layout of the MMVAE release: in <data_dir>/cub, pictures
    <train|test>/<class>/*.jpg and text_<trainval|test>classes.txt, ten lines for each picture in
    the order of the paths.

    A tuple is a caption and its image. Captions are cut or padded to 32 tokens with <eos> among
    them; words that occur up to three times in the training captions are <exc>. The test birds are
    of other classes. n counts images. 12 kB an image, minutes to decode.
    """
    part, folder = "test" if split == "test" else "train", data_dir / "cub"
    texts = {"train": folder / "text_trainvalclasses.txt", "test": folder / "text_testclasses.txt"}
    for path in (folder / part, *texts.values()):
        _require(path.exists(), f"{path} is missing (github.com/iffsid/mmvae)")
    captions = {key: [re.findall(r"\w+|[^\w\s]", line) for line in path.read_text().splitlines()
                      if line.strip()] for key, path in texts.items()}
    files = sorted((folder / part).glob("*/*.jpg"))
    _require(len(files) > 0 and len(captions[part]) == 10 * len(files),
             f"{texts[part]} must hold ten captions for each of the {len(files)} images")
    count = Counter(word for caption in captions["train"] for word in caption)
    words = ("<exc>", "<pad>", "<eos>", *(word for word, times in count.items() if times > 3))
    token = {word: i for i, word in enumerate(words)}
    tokens = torch.ones(len(captions[part]), 32, dtype=torch.long)
    for row, caption in zip(tokens, captions[part]):
        ids = [token.get(word, 0) for word in caption[:31]] + [2]
        row[:len(ids)] = torch.tensor(ids)
    classes = sorted({file.parent for file in files})
    y = torch.tensor([classes.index(file.parent) for file in files])        # for the split only
    x = {"image": _resized(files, 64, True), "caption": tokens.reshape(-1, 10, 32)}
    found = _split(Dataset(x, y, {"image": "image", "caption": "text"}, "cub", split), n)
    rows = torch.arange(10 * len(found))
    return _shuffled(replace(
        found, x=found.x | {"caption": found.x["caption"].flatten(0, 1)}, y=None,
        rows={"image": rows // 10, "caption": rows}, words=words))


# ---- Generated sets ----------------------------------------------------------------------------
def _synthetic(name: str, split: str, data_dir: Path, n: int | None, n_modalities: int,
               seed: int) -> Dataset:
    """A pure function of (name, split, n, seed), kept in <data_dir>/synthetic if that can be
    written. 30,000 tuples on one core: synth_mnist_svhn about 10 s, 115 MB; synth_polymnist about
    16 s, 350 MB."""
    names = SYNTHETIC[name]
    if name == "synth_polymnist":
        _require(2 <= n_modalities <= 16, f"n_modalities must lie in 2..16, not {n_modalities}")
        names = names[:n_modalities]
    n = n or (5_000 if split == "test" else 30_000)
    n_split = SHARE[split](n)
    key = (name, split, n, seed)
    y = torch.randperm(n_split, generator=_generator(*key)) % (2 if name == "shapes" else 10)
    file = f"{name}_{len(names)}_{split}_{n}_{seed}_v{SYNTHETIC_VERSION}.npz"
    path = data_dir / "synthetic" / file
    try:
        x = {m: torch.from_numpy(array) for m, array in _read_npz(path).items()}
        y = x.pop("y")
    except (DataError, KeyError):               # not made yet, or damaged
        x = {m: _render(m, y, _generator(*key, m)) for m in names}
        with contextlib.suppress(OSError):      # a folder that cannot be written: made anew
            _write_npz(path, {m: v.numpy() for m, v in (x | {"y": y}).items()})
    note = "generated, not a standard data set"
    return Dataset(x, y, dict.fromkeys(x, "image"), name, split, note)


def _render(m: str, y: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n c h w] uint8 of modality m with labels y [n], a thousand at a time."""
    def draw(y):
        if m == "svhn":
            return _house_numbers(y, generator)
        if m in ("circle", "square"):
            return _outlines(y, {"circle": 2, "square": 1}[m], generator)
        cover = _digits(y[:, None], 28, 0.96, generator)
        return _to_bytes(cover) if m == "mnist" else _on_crops(cover > 0.5, picture, generator)
    picture = _texture(int(m[1:])) if m[1:].isdigit() else None
    return torch.cat([draw(part) for part in y.split(1024)])


def _to_bytes(x: Tensor) -> Tensor:
    return (255 * x).round().clamp(0, 255).to(torch.uint8)


def _outlines(y: Tensor, norm: int, generator: torch.Generator) -> Tensor:
    """The toy of the JNF code on 32x32 pixels over [-1, 1]^2: y = 1 is a ring of thickness 0.25 at
    radius r ~ U(0.3, 0.9) in the 2-norm (circle) or 1-norm (square on its tip), y = 0 full."""
    r = 0.3 + 0.6 * torch.rand(len(y), 1, 1, generator=generator)
    axis = torch.linspace(-1, 1, 32)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    rho = torch.linalg.vector_norm(points, norm, dim=0)                     # [h w]
    inside = (rho <= r + 0.125) & ((rho >= r - 0.125) | (y == 0)[:, None, None])
    return 255 * inside.unsqueeze(1).to(torch.uint8)


def _glyphs() -> Tensor:
    """[font 10 64 48]: signed distance to the outline of each digit, positive inside, 32 pixels 1.
    Digits are 47 high. Two bold fonts: of many or thin ones small decoders draw a mean digit."""
    bank = []
    for font in ("DejaVuSans-Bold", "DejaVuSerif-Bold"):
        face = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf", 64)
        for digit in "0123456789":
            canvas = Image.new("L", (48, 64))
            ImageDraw.Draw(canvas).text((24, 56), digit, fill=255, font=face, anchor="ms")
            ink = np.asarray(canvas) > 127
            bank.append((distance_transform_edt(ink) - distance_transform_edt(~ink)) / 32)
    bank = torch.from_numpy(np.stack(bank)).float()
    return rearrange(bank, "(font digit) h w -> font digit h w", digit=10)


def _digits(y: Tensor, size: int, zoom: float, generator: torch.Generator) -> Tensor:
    """Coverage [n 1 size size] in [0, 1] by rows of digits y [n k], the middle one centred. One
    font, weight, affine map and smooth elastic field a row; digits are 3/4 zoom of the height."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(len(y), *shape, generator=generator)
    bank = _glyphs()
    font = torch.randint(len(bank), (len(y), 1), generator=generator)
    row = rearrange(bank[font, y], "n k h w -> n 1 h (k w)")
    angle, shear = uniform(-0.1, 0.1), uniform(-0.1, 0.1)                   # radians
    height, width = zoom * uniform(0.92, 1.08), zoom * uniform(0.88, 1.12)
    affine = torch.stack(                       # from image to glyph; half an image = 1
        [angle.cos() / width, (shear - angle.sin()) / width, uniform(-0.05, 0.05),
         angle.sin() / height, angle.cos() / height, uniform(-0.05, 0.05)], 1)
    grid = F.affine_grid(affine.reshape(-1, 2, 3), [len(y), 1, size, size], align_corners=False)
    bend = F.interpolate(uniform(-0.06, 0.06, 2, 4, 4), size=(size, size), mode="bicubic",
                         align_corners=True)
    grid = grid + rearrange(bend, "n c h w -> n h w c")
    grid = grid / torch.tensor([48 / 64 * y.shape[1], 1.0])     # grid_sample's x spans the row
    distance = F.grid_sample(row, grid, padding_mode="border", align_corners=False)
    distance = distance + uniform(0.0, 0.06, 1, 1, 1)           # bolder
    return (distance * zoom * size / 2 + 0.5).clamp(0, 1)       # distance in pixels: soft edge


def _house_numbers(y: Tensor, generator: torch.Generator) -> Tensor:
    """[n 3 32 32] uint8: y between two cut-off random digits, cream on night blue or, one in three,
    the reverse, with a linear shade and a little noise. Two polarities keep a linear classifier of
    the pixels from seeing the digit; of a continuum of colours VAEs draw the grey mean."""
    n = len(y)
    beside = torch.randint(10, (n, 2), generator=generator)
    cover = _digits(torch.stack([beside[:, 0], y, beside[:, 1]], 1), 32, 1.0, generator)
    light = torch.rand(n, 1, 1, 1, generator=generator) < 1 / 3
    cover = torch.where(light, 1 - cover, cover)                            # light ground, dark ink
    blue, cream = torch.tensor([[0.12, 0.16, 0.42], [0.95, 0.88, 0.75]])[:, :, None, None]
    axis = torch.linspace(-1, 1, 32)
    slope = 0.2 * torch.rand(2, n, 1, 1, 1, generator=generator) - 0.1
    shade = slope[0] * axis + slope[1] * axis[:, None]                      # [n 1 h w]
    noise = 0.02 * torch.randn(n, 3, 32, 32, generator=generator)
    return _to_bytes(torch.lerp(blue, cream, cover) + shade + noise)


def _texture(m: int) -> Tensor:
    """The background of modality m, [3 256 256] uint8: wide bent bands of a dark colour and, a
    third of the way, its inverse, with a faint ripple. Most crops lie in one band. With colours
    that are not inverse to each other a linear classifier of the pixels would see every digit."""
    direction, hue = 2.4 * m, 0.62 * m                          # radians, turns; spread over m
    axis = torch.arange(256.0)
    along = axis * math.cos(direction) + axis[:, None] * math.sin(direction)
    across = axis[:, None] * math.cos(direction) - axis * math.sin(direction)
    bands = torch.cos(2 * torch.pi * (along + 12 * torch.sin(across / 24)) / 128) - 0.5
    ripple = 0.05 * torch.cos(2 * torch.pi * across / 14)
    wheel = torch.cos(2 * torch.pi * (hue + torch.arange(3) / 3))[:, None, None]
    dark = 0.22 + 0.14 * wheel
    return _to_bytes(torch.lerp(dark, 1 - dark, torch.sigmoid(6 * bands)) + ripple)
