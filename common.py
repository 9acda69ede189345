"""What no paper disagrees about: metrics and their judges, chain diagnostics, a Gaussian mixture, pictures, and the run folder.

Shapes: `b` batch, `c h w` image, `f` features, `y` classes, `d` latent, `n` steps or samples; in chain diagnostics `c` is chains.
Images are float in [0, 1] unless stated. Nothing here trains a model of a paper: the only nets are the judges that measure.
"""
import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RunError(ValueError):
    """A mistake of the user that no traceback explains better than one line; `cli` exits with 2."""


# ---- Fréchet distance ---------------------------------------------------------------------------
def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    mu [f], cov [f f], tensors or arrays. Symmetric eigenvalue form in float64: real for rank-deficient covariances too.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).double() for a in (mu1, cov1, mu2, cov2))
    scale, basis = torch.linalg.eigh(cov1)
    root = basis * scale.clamp_min(0).sqrt()                   # root @ root.T = C1
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp_min(0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp_min(0).item()                        # a set with itself: -1e-12 by rounding


class FeatureStats:
    """Mean and unbiased covariance of features [b f] that arrive in batches, in float64 (Chan et al. 1979)."""

    def __init__(self, dim: int):
        self.n, self.mean, self.scatter = 0, torch.zeros(dim).double(), torch.zeros(dim, dim).double()

    def update(self, features: Tensor) -> None:
        features = features.detach().double()
        self.mean, self.scatter = self.mean.to(features.device), self.scatter.to(features.device)
        mean = features.mean(0)
        centred, delta = features - mean, mean - self.mean
        total = self.n + len(features)
        self.scatter = self.scatter + centred.T @ centred \
            + torch.outer(delta, delta) * (self.n * len(features) / total)
        self.mean = self.mean + delta * (len(features) / total)
        self.n = total

    def mean_cov(self) -> tuple[Tensor, Tensor]:
        """([f], [f f]) in float64; at least two rows must have been seen."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.n}")
        return self.mean, self.scatter / (self.n - 1)


# ---- Judges: one small classifier per modality --------------------------------------------------
JUDGE_VERSION = 1       # part of the cache key: raise it whenever Judge or train_judge changes


class Judge(nn.Module):
    """Classifier of one modality: x [b c h w] in [0, 1] -> (logits [b y], features [b f])."""

    def __init__(self, in_shape: tuple[int, int, int], n_classes: int, width: int = 32):
        super().__init__()
        def conv(n_in, n_out, stride=1):
            return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
        self.body = nn.Sequential(
            nn.BatchNorm2d(in_shape[0]), conv(in_shape[0], width, 2), conv(width, 2 * width), nn.MaxPool2d(2),
            conv(2 * width, 4 * width), nn.MaxPool2d(2), conv(4 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(16 * width, 128), nn.ReLU())
        self.head = nn.Linear(128, n_classes)
        self.accuracy = float("nan")                            # on the test split, set by load_judges

    def features(self, x: Tensor) -> Tensor:
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.head(features), features


def _shift(x: Tensor, reach: int) -> Tensor:
    """Each image of x [b c h w] moved by up to `reach` pixels either way, its border repeated."""
    b, _, h, w = x.shape
    dy, dx = torch.randint(-reach, reach + 1, (2, b, 1), device=x.device)
    rows = (torch.arange(h, device=x.device) + dy).clamp(0, h - 1)          # [b h]
    cols = (torch.arange(w, device=x.device) + dx).clamp(0, w - 1)          # [b w]
    item = torch.arange(b, device=x.device)[:, None, None]
    return x[item, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def train_judge(x: Tensor, y: Tensor, device, batch_size: int = 256) -> Judge:
    """A judge trained on x uint8 [n c h w], y [n] with a fixed seed; the caller's random state is left as it was."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        judge = Judge(tuple(x.shape[1:]), int(y.max()) + 1).to(device, memory_format=torch.channels_last)
        x, y = x.to(device), y.to(device)
        n_steps = max(4 * len(x), 100_000) // batch_size        # a small set is seen more often
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=n_steps)
        for _ in range(n_steps):
            index = torch.randint(len(x), (batch_size,), device=device)
            logits, _ = judge(_shift(x[index], 2).float() / 255)
            loss = F.cross_entropy(logits, y[index], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def _accuracy(judge: Judge, x: Tensor, y: Tensor, device) -> float:
    hits = [judge(a.to(device).float() / 255)[0].argmax(1).cpu() == b.cpu() for a, b in zip(x.split(500), y.split(500))]
    return torch.cat(hits).float().mean().item()


def _digest(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(repr(tuple(tensor.shape)).encode())
        sha.update(tensor.cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def load_judges(train, test, cache_dir, device, say=print) -> dict[str, Judge]:
    """{m: frozen Judge} for the image modalities of a labelled data set ({} without labels), with test accuracy.

    Trained once on the train split, then kept in cache_dir under a digest of the data; a corrupt file is trained anew.
    """
    judges = {}
    for m in [m for m in train.modalities if train.kinds[m] == "image" and train.y is not None]:
        (x, y), (x_test, y_test) = train.modality(m), test.modality(m)
        path = Path(cache_dir) / f"judge_{train.name}_{m}_v{JUDGE_VERSION}_{_digest(x, y, x_test, y_test)}.pt"
        try:
            kept = _read(path)
            judge = Judge(tuple(x.shape[1:]), int(y.max()) + 1).to(device)
            judge.load_state_dict(kept["judge"])
            judge.eval().requires_grad_(False).accuracy = kept["accuracy"]
        except (OSError, RunError, KeyError, RuntimeError):
            start = time.perf_counter()
            judge = train_judge(x, y, device)
            judge.accuracy = _accuracy(judge, x_test, y_test, device)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save({"judge": judge.state_dict(), "accuracy": judge.accuracy}, file)
            say(f"judge of {m}: test accuracy {judge.accuracy:.4f}, trained in {time.perf_counter() - start:.0f} s")
        bar = 0.90 if "svhn" in m else 0.95
        if judge.accuracy < bar:
            say(f"WARNING: the judge of {m} has a test accuracy of only {judge.accuracy:.3f} (< {bar}): "
                f"every coherence that involves {m} is measured with a weak judge")
        judges[m] = judge
    return judges


# ---- Inception: the net behind fid_* ------------------------------------------------------------
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")     # the name ends in the first digits of its sha256


def _inception() -> nn.Module:
    """Inception v3 with the pooling of the 2015 TensorFlow graph, random weights; x [b 1|3 h w] -> pool3 [b 2048]."""
    from torchvision.models import inception

    def branch_pool(block, pool):
        """The block with its own pooling in front of branch_pool; the last branch of `_forward` is overridden."""
        forward = block._forward
        block._forward = lambda x: [*forward(x)[:-1], block.branch_pool(pool(x))]

    net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    mean_pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        branch_pool(getattr(net, f"Mixed_{name}"), mean_pool)
    branch_pool(net.Mixed_7c, nn.MaxPool2d(3, 1, 1))
    net.transform_input = False

    def forward(x: Tensor) -> Tensor:
        x = x.float().mul(255).round().clamp(0, 255) / 255     # what an 8-bit picture file would hold
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear", align_corners=False)
        return type(net).forward(net, 2 * x - 1)
    net.fc = nn.Identity()
    net.forward = forward
    return net.eval().requires_grad_(False)


def load_inception(data_dir, device) -> nn.Module | None:
    """The FID net from data_dir, else downloaded there; without a network None, with a line saying why. Never untrained."""
    path = Path(data_dir) / INCEPTION_URL.rsplit("/")[-1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(INCEPTION_URL, timeout=30) as response, atomic_write(path) as file:
                shutil.copyfileobj(response, file)
        except OSError as error:
            print(f"no fid_*: {path} is missing and its download failed ({error})")
            return None
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    if not sha.startswith(path.stem.rsplit("-")[-1]):
        raise RunError(f"{path} is not the file its name promises (sha256 {sha[:8]}...); delete it to download it again")
    net = _inception()
    net.load_state_dict({k: v for k, v in _read(path).items() if not k.startswith("fc.")})
    return net.to(device)


# ---- Coherence and distances of a model ---------------------------------------------------------
@dataclass(frozen=True)
class Reference:
    """Real test images: `extract[kind, m]` maps x [b c h w] to features [b f], `stats[kind, m]` are their (mu, cov) on
    the test split, for kind "frechet_clf" (a judge's features) and "fid" (Inception); `metrics` are the real data's own."""
    extract: dict
    stats: dict
    metrics: dict[str, float]

    @torch.no_grad()
    def update(self, stats: dict, x: dict[str, Tensor]) -> None:
        """Add a batch of images to the statistics that `distances` compares; `stats` is changed, {} at the start."""
        for key, extract in self.extract.items():
            if key[1] in x:
                features = extract(x[key[1]])
                if key not in stats:
                    stats[key] = FeatureStats(features.shape[1])
                stats[key].update(features)

    def distances(self, stats: dict, prefix: str = "") -> dict[str, float]:
        """{"<kind>_<prefix><m>": Fréchet distance of the gathered statistics to the real test images'}."""
        return {f"{kind}_{prefix}{m}": frechet_distance(*s.mean_cov(), *self.stats[kind, m]) for (kind, m), s in stats.items()}


def reference(test, train, judges, inception, n: int = 10_000, batch_size: int = 500) -> Reference:
    """What n real test tuples score, and how far n real train images are from them: the floor of every distance.

    Tuples are taken evenly over each split, which may be sorted by class. metrics: judge_accuracy_<m>, coherence_ceiling
    (all judges agree on a real tuple), frechet_clf_floor_<m> and frechet_clf_floor, their mean; fid_floor_<m> likewise.
    """
    images = [m for m in test.modalities if test.kinds[m] == "image"]
    extract = {("frechet_clf", m): judge.features for m, judge in judges.items()}
    extract |= {("fid", m): inception for m in images if inception is not None}
    real = Reference(extract, {}, {f"judge_accuracy_{m}": judge.accuracy for m, judge in judges.items()})

    def statistics(split):
        stats, agree = {}, []
        for index in torch.linspace(0, len(split) - 1, min(n, len(split))).long().split(batch_size):
            x = split.take(index, _device(judges, inception), images)
            real.update(stats, x)
            agree += [_agreement(judges, x)]
        return stats, torch.cat(agree).float().mean().item()

    stats, agree = statistics(test)
    real.stats.update({key: s.mean_cov() for key, s in stats.items()})
    floor = real.distances(statistics(train)[0], "floor_")
    real.metrics.update(floor)
    if judges:
        real.metrics["coherence_ceiling"] = agree
        real.metrics["frechet_clf_floor"] = float(np.mean([d for key, d in floor.items() if key.startswith("frechet")]))
    return real


def _device(*nets):
    """Where the first parameter found among modules and dicts of modules lives."""
    modules = [m for net in nets if net is not None for m in (net.values() if isinstance(net, dict) else [net])]
    return next((p.device for m in modules for p in m.parameters()), None)


@torch.no_grad()
def _agreement(judges: dict[str, Judge], x: dict[str, Tensor]) -> Tensor:
    """[b] bool: do the judges of all modalities see the same class?"""
    classes = torch.stack([judge(x[m])[0].argmax(1) for m, judge in judges.items()]) if judges \
        else torch.zeros(1, len(next(iter(x.values()))))
    return (classes == classes[0]).all(0)


def coherence_joint(sample, judges, n: int = 10_000, batch_size: int = 500, reference: Reference | None = None) -> dict:
    """Share of n joint samples on which the judges of all modalities agree; with a reference the distances as well.

    sample(b) -> {m: [b c h w] in [0, 1]}. Keys: coherence_joint (two judges or more), frechet_clf_<m>, fid_<m>.
    """
    agree, stats = [], {}
    for start in range(0, n, batch_size):
        x = sample(min(batch_size, n - start))
        agree.append(_agreement(judges, x))
        if reference is not None:
            reference.update(stats, x)
    metrics = {"coherence_joint": torch.cat(agree).float().mean().item()} if len(judges) > 1 else {}
    return metrics | (reference.distances(stats) if reference is not None else {})


def choose_subsets(modalities: list[str], max_subsets: int = 31, seed: int = 0) -> list[tuple[str, ...]]:
    """The non-empty proper subsets of the modalities if at most max_subsets, else a fixed random choice, equal per size."""
    sizes = [list(itertools.combinations(modalities, k)) for k in range(1, len(modalities))]
    if sum(map(len, sizes)) > max_subsets:
        rng, share = random.Random(seed), max(1, max_subsets // len(sizes))
        sizes = [sorted(rng.sample(subsets, min(share, len(subsets))), key=subsets.index) for subsets in sizes]
    return [subset for subsets in sizes for subset in subsets]


def coherence_cross(generate, test, judges, batch_size: int = 500, reference: Reference | None = None, subsets=None,
                    max_subsets: int = 31, seed: int = 0) -> dict[str, float]:
    """Share of test items whose generated modality is judged to be of the item's class, over observed subsets.

    generate(x_observed {m: [b c h w]}, targets [names]) -> {target: [b c h w] in [0, 1]}, one sample an item.
    Keys: coherence_<a+b>_to_<target>; coherence_cross_<k>, the mean over subsets of size k and their targets;
    coherence_subsets, their number; with a reference frechet_clf_<a>_to_<target> and fid_... for single sources.
    """
    images = [m for m in test.modalities if test.kinds[m] == "image"]
    subsets = choose_subsets(test.modalities, max_subsets, seed) if subsets is None else subsets
    metrics, by_size = {"coherence_subsets": len(subsets)}, {}
    for subset in subsets:
        targets, hits, stats = [m for m in images if m not in subset], {}, {}
        for start in range(0, len(test), batch_size):
            rows = slice(start, start + batch_size)
            x = generate(test.take(rows, _device(judges), list(subset)), targets)
            for m in [m for m in targets if m in judges]:
                with torch.no_grad():
                    hits.setdefault(m, []).append(judges[m](x[m])[0].argmax(1).cpu() == test.y[rows].cpu())
            if reference is not None and len(subset) == 1:
                reference.update(stats, {m: x[m] for m in targets})
        for m in hits:
            share = torch.cat(hits[m]).float().mean().item()
            metrics[f"coherence_{'+'.join(subset)}_to_{m}"] = share
            by_size.setdefault(len(subset), []).append(share)
        if stats:
            metrics |= reference.distances(stats, f"{subset[0]}_to_")
    return metrics | {f"coherence_cross_{k}": float(np.mean(shares)) for k, shares in sorted(by_size.items())}


# ---- Ranking ------------------------------------------------------------------------------------
def _tallies(scores, labels) -> tuple[Tensor, Tensor]:
    """Positives and negatives at each distinct score, ascending: ties share one entry."""
    scores, labels = torch.as_tensor(scores).double().cpu(), torch.as_tensor(labels).cpu().double()
    if scores.isnan().any() or not 0 < labels.sum() < len(labels):
        raise ValueError("ranking needs scores that are numbers, and both classes among the labels")
    values, inverse = scores.unique(return_inverse=True)
    positives = torch.bincount(inverse, weights=labels, minlength=len(values))
    return positives, torch.bincount(inverse, minlength=len(values)) - positives


def average_precision(scores, labels) -> float:
    """sum_k (R_k - R_k-1) P_k over the distinct thresholds, highest first. scores [n]; labels [n], 1 = positive."""
    positives, negatives = (t.flip(0) for t in _tallies(scores, labels))
    precision = positives.cumsum(0) / (positives + negatives).cumsum(0)
    return ((positives * precision).sum() / positives.sum()).item()


def auroc(scores, labels) -> float:
    """P(score of a positive > score of a negative) + P(tie) / 2. scores [n]; labels [n], 1 = positive."""
    positives, negatives = _tallies(scores, labels)
    below = negatives.cumsum(0) - negatives / 2
    return ((positives * below).sum() / (positives.sum() * negatives.sum())).item()


# ---- Chain diagnostics --------------------------------------------------------------------------
def _autocovariance(x: Tensor) -> Tensor:
    """sum_t (x_t - mean)(x_t+k - mean) / n along dim 0, for every lag k, by FFT in float64."""
    n = len(x)
    spectrum = torch.fft.rfft(x - x.mean(0), n=2 * n, dim=0)
    return torch.fft.irfft(spectrum.abs() ** 2, n=2 * n, dim=0)[:n] / n


def autocorrelation(x) -> Tensor:
    """Autocorrelation at lags 0 .. n-1 of chains x [n c] (or [n c d]), pooled over the chains: [n] (or [n d])."""
    covariance = _autocovariance(torch.as_tensor(x).detach().double()).mean(1)
    return covariance / covariance[0]


def _halves(x: Tensor) -> Tensor:
    """[n c d] -> [n/2 2c d]: a chain that drifts disagrees with itself."""
    half = len(x) // 2
    if half < 2:
        raise ValueError(f"chain diagnostics need 4 steps or more, got {len(x)}")
    return torch.cat([x[:half], x[-half:]], 1)


def _per_coordinate(diagnostic, x):
    """[n c] -> float, [n c d] -> [d]; nan where the chains never move and agree, which says nothing."""
    x = torch.as_tensor(x).detach().double()
    if x.ndim == 2:
        return _per_coordinate(diagnostic, x[..., None]).item()
    return diagnostic(_halves(x)).masked_fill(x.amax((0, 1)) == x.amin((0, 1)), math.nan)


def split_r_hat(x):
    """Split R-hat of chains x [n c] -> float, [n c d] -> [d] (BDA3 sec. 11.4; not rank-normalised): 1 when mixed."""
    def r_hat(x):
        within, between = x.var(0).mean(0), x.mean(0).var(0)
        return ((len(x) - 1) / len(x) + between / within).sqrt()
    return _per_coordinate(r_hat, x)


def ess(x):
    """Effective sample size of the mean of all n c draws; x [n c] -> float, [n c d] -> [d].

    Multi-chain autocorrelation of the split chains, Geyer's initial monotone sequence (Vehtari et al. 2021, sec. 3.2).
    """
    def size(x):
        n, c, _ = x.shape
        covariance = _autocovariance(x).mean(1)                                     # [n d]
        within = covariance[0] * n / (n - 1)
        total = within * (n - 1) / n + x.mean(0).var(0)
        rho = 1 - (within - covariance) / total
        rho[0] = 1
        even, odd = rho[0:n - 1:2], rho[1:n:2]
        alive = ((even + odd) > 0).cumprod(0)
        paired = ((even + odd).cummin(0).values * alive).sum(0)
        length = alive.sum(0, keepdim=True).clamp_max(len(even) - 1)
        tau = 2 * paired - 1 + even.gather(0, length)[0].clamp_min(0)               # Geyer's improved tail
        return n * c / tau.clamp_min(1 / math.log10(n * c))
    return _per_coordinate(size, x)


# ---- Gaussian mixture ---------------------------------------------------------------------------
def fit_gmm(z: Tensor, k: int, seed: int = 0, n_iter: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """EM for a full-covariance mixture of z [n d], k-means++ start -> (weights [k], means [k d], Cholesky factors [k d d]).

    Each covariance has 1e-4 of the mean variance of z added to its diagonal. Own generator; float64 inside and out.
    """
    z, rng = z.detach().double(), torch.Generator().manual_seed(seed)
    n, d = z.shape
    floor = 1e-4 * z.var(0).mean() * torch.eye(d, dtype=z.dtype, device=z.device)
    means = z[torch.randint(n, (1,), generator=rng)]
    while len(means) < k:
        nearest = torch.cdist(z, means).amin(1).square().cpu()
        means = torch.cat([means, z[torch.multinomial(nearest + 1e-12, 1, generator=rng)]])
    member = F.one_hot(torch.cdist(z, means).argmin(1), k).double()                 # [n k]
    for _ in range(n_iter):
        count = member.sum(0).clamp_min(1e-8)
        weights, means = count / count.sum(), (member.T @ z) / count[:, None]
        centred = [(z - mean) * member[:, i, None].sqrt() for i, mean in enumerate(means)]
        chol = torch.linalg.cholesky(torch.stack([c.T @ c / count[i] + floor for i, c in enumerate(centred)]))
        member = _gmm_joint((weights, means, chol), z).softmax(1)
    return weights, means, chol


def _gmm_joint(gmm, z: Tensor) -> Tensor:
    """log (weight_k N(z; mean_k, chol_k chol_k^T)) -> [n k]"""
    parts = []
    for weight, mean, chol in zip(*gmm):
        white = torch.linalg.solve_triangular(chol, (z.to(mean) - mean).T, upper=False)       # [d n]
        parts.append(weight.log() - 0.5 * white.square().sum(0) - chol.diagonal().log().sum()
                     - 0.5 * len(mean) * math.log(2 * math.pi))
    return torch.stack(parts, 1)


def gmm_log_prob(gmm, z: Tensor) -> Tensor:
    """log density of a fitted mixture at z [n d] -> [n] nats, float64."""
    return _gmm_joint(gmm, z).logsumexp(1)


def sample_gmm(gmm, n: int, generator=None) -> Tensor:
    """n draws [n d] in the default dtype, on the mixture's device; the generator, if given, lives there too."""
    weights, means, chol = gmm
    i = torch.multinomial(weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, means.shape[1], 1, dtype=means.dtype, device=means.device, generator=generator)
    return (means[i] + (chol[i] @ noise)[..., 0]).to(torch.get_default_dtype())


# ---- Pictures -----------------------------------------------------------------------------------
def _tile(images: Tensor, n_cols: int, cell: int, gap: int = 2) -> np.ndarray:
    """Images [n c h w], grey or colour, enlarged to square cells and laid out row by row on white: [H W 3] in [0, 1]."""
    mode = "nearest" if cell % images.shape[-1] == 0 else "bicubic"
    images = F.interpolate(images.detach().float().cpu(), size=(cell, cell), mode=mode).clamp(0, 1)
    n_rows = -(-len(images) // n_cols)
    canvas = torch.ones(3, n_rows * (cell + gap) - gap, n_cols * (cell + gap) - gap)
    for i, image in enumerate(images):
        top, left = (i // n_cols) * (cell + gap), (i % n_cols) * (cell + gap)
        canvas[:, top:top + cell, left:left + cell] = image
    return canvas.permute(1, 2, 0).numpy()


def _cell(images: list[Tensor]) -> int:
    """Side of a cell in pixels: the largest image, enlarged by a whole factor to about 64."""
    side = max(max(x.shape[-2:]) for x in images)
    return side * max(1, round(64 / side))


def _save_blocks(path, blocks, stacked: bool = True) -> None:
    """PNG of blocks, each a row of (label, canvas [H W 3]) parts with a thin rule between; one pixel is one pixel."""
    from matplotlib.figure import Figure                        # no pyplot: nothing global, no display
    gap, strip, dpi = 12, 22, 100
    sizes = [(sum(c.shape[1] for _, c in b) + gap * (len(b) - 1), b[0][1].shape[0] + strip) for b in blocks]
    width = max(w for w, _ in sizes) if stacked else sum(w for w, _ in sizes) + 2 * gap * (len(sizes) - 1)
    height = sum(h for _, h in sizes) + gap * (len(sizes) - 1) if stacked else max(h for _, h in sizes)
    figure = Figure(figsize=((width + 2 * gap) / dpi, (height + gap) / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-gap, width + gap), ylim=(height + gap, 0))
    axes.axis("off")
    x = y = 0
    for block, (w, h) in zip(blocks, sizes):
        left = x
        for i, (label, canvas) in enumerate(block):
            right, bottom = left + canvas.shape[1], y + h
            axes.imshow(canvas, extent=(left, right, bottom, y + strip), interpolation="nearest")
            axes.text((left + right) / 2, y + strip - 5, label, ha="center", va="bottom", fontsize=9)
            if i + 1 < len(block):
                axes.plot([right + gap / 2] * 2, [y + strip, bottom], color="0.6", linewidth=0.8)
            left = right + gap
        x, y = (x, y + h + gap) if stacked else (x + w + 2 * gap, y)
    axes.set(xlim=(-gap, width + gap), ylim=(height + gap, 0))
    figure.savefig(path)


def save_grid(path, images: Tensor, n_cols: int, title: str | None = None) -> None:
    """PNG of images [n c h w] in [0, 1], n_cols a row."""
    _save_blocks(path, [[(title or "", _tile(images, n_cols, _cell([images])))]])


def save_cross_grid(path, given: dict[str, Tensor], generated: dict[str, dict[str, Tensor]]) -> None:
    """PNG with a block per source m: rows are given[m] [r c h w], columns their k samples generated[m][t] [r k c h w]."""
    cell = _cell(list(given.values()) + [x.flatten(0, 1) for m in given for x in generated[m].values()])
    blocks = [[(f"{m}, given", _tile(x, 1, cell))] + [(t, _tile(g.flatten(0, 1), g.shape[1], cell))
              for t, g in generated[m].items()] for m, x in given.items()]
    _save_blocks(path, blocks, stacked=len(blocks) != 2)


def save_joint_grid(path, samples: dict[str, Tensor]) -> None:
    """PNG of joint samples {m: [n c h w]}: a row a modality, a column a sample."""
    cell = _cell(list(samples.values()))
    _save_blocks(path, [[(m, _tile(x, len(x), cell))] for m, x in samples.items()])


def save_panels(path, rows, titles, extent=None) -> None:
    """PNG of rows of images [c h w] and density grids [a b], a title a column."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2 * len(titles), 2 * len(rows)), dpi=100, layout="constrained")
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            axes, panel = figure.add_subplot(len(rows), len(titles), i * len(titles) + j + 1), panel.detach().cpu()
            if panel.ndim == 3:
                axes.imshow(panel.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1))
                axes.axis("off")
            else:
                axes.imshow(panel, origin="lower", extent=extent)
            axes.set_title(titles[j] if i == 0 else "", fontsize=9)
    figure.savefig(path)


def _save_panels(path, panels) -> None:
    """PNG of panels (title, x label, draw(axes)), at most four a row."""
    from matplotlib.figure import Figure
    n_cols = min(4, len(panels))
    n_rows = -(-len(panels) // n_cols)
    figure = Figure(figsize=(3.4 * n_cols, 2.5 * n_rows), dpi=100, layout="constrained")
    for i, (title, x_label, draw) in enumerate(panels):
        axes = figure.add_subplot(n_rows, n_cols, i + 1)
        draw(axes)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=7, frameon=False)
    figure.savefig(path)


def plot_curves(path, metrics_jsonl_path) -> None:
    """PNG with a panel per metric of a run (the first 24), a line per stage and split; no file if nothing was logged."""
    curves: dict[str, dict[str, list]] = {}
    lines = Path(metrics_jsonl_path).read_text().splitlines() if Path(metrics_jsonl_path).exists() else []
    for row in map(json.loads, lines):
        line = " ".join(str(row[key]) for key in ("stage", "split") if key in row)
        for key, value in row.items():
            if key not in ("step", "epoch", "wall_s") and type(value) in (int, float) and "step" in row:
                curves.setdefault(key, {}).setdefault(line, []).append((row["step"], value))

    def draw(lines):
        return lambda axes: [axes.plot(*zip(*points), ".-" if len(points) < 30 else "-", label=line, linewidth=1)
                             for line, points in lines.items()]
    if curves:
        _save_panels(path, [(key, "step", draw(lines)) for key, lines in list(curves.items())[:24]])


def chain_report(chains, path, accept_rate=None, energy=None) -> dict[str, float]:
    """Diagnostics of chains [n c d], drawn to path; energy [n c] optional."""
    chains = torch.as_tensor(chains).detach().double().cpu()
    n, c, _ = chains.shape
    r_hat, share = split_r_hat(chains), ess(chains) / (n * c)

    def draw_energy(axes):
        axes.plot(energy.detach().cpu().flatten(1)[:, :8], linewidth=0.8)

    def draw_traces(axes):
        axes.plot(chains[:, :, 0], linewidth=0.8)
    panels = [("autocorrelation", "lag", lambda axes: axes.plot(autocorrelation(chains).nanmean(1))),
              ("split R-hat", "", lambda axes: axes.hist(r_hat[r_hat.isfinite()], bins=30)),
              ("first coordinate", "step", draw_traces)]
    panels += [("energy", "step", draw_energy)] if energy is not None else []
    _save_panels(path, panels)
    metrics = {"accept_rate": float(accept_rate)} if accept_rate is not None else {}
    return metrics | {"r_hat": r_hat.nanmedian().item(), "r_hat_95": r_hat.nanquantile(0.95).item(),
                      "ess_per_step": share.nanmean().item(), "autocorrelation_time": (1 / share).nanmean().item()}


# ---- Command line, seeds, ranks -----------------------------------------------------------------
def cli(main) -> None:
    """Run main(); a known failure becomes one line on stderr: exit 2 for the user's mistakes, 1 for the machine's."""
    try:
        main()
    except RunError as error:
        sys.exit(_complain(error, 2))
    except (OSError, FloatingPointError) as error:
        sys.exit(_complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _complain(error, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def number(kind, low=None, high=None, open_low: bool = False):
    """An argparse type: `kind` (int or float) within [low, high], or (low, high] with open_low; nan and inf are refused."""
    lower = [f"{'>' if open_low else '>='} {low}"] * (low is not None)
    allowed = " and ".join(lower + [f"<= {high}"] * (high is not None)) or "finite"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number ({allowed})") from None
        too_low = low is not None and (value <= low if open_low else value < low)
        if not math.isfinite(value) or too_low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value
    return parse


def run_parser(script: str, doc: str, default: str, datasets: list[str]) -> argparse.ArgumentParser:
    """A parser with the flags that every script has; the script adds its own. Underscores, no abbreviations."""
    p = argparse.ArgumentParser(script, description=doc.split("\n\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, switch = p.add_argument_group("run").add_argument, argparse.BooleanOptionalAction
    flag("--dataset", default=default, choices=datasets, help="loads the preset of that data set")
    flag("--data_dir", default="datasets", help="where data files are, or are downloaded to")
    flag("--out_dir", default="runs", help="the run folder is <out_dir>/<script>/<dataset>/<seed>")
    flag("--seed", type=number(int, 0), default=0)
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    flag("--resume", action="store_true", help="continue from the checkpoint, exactly")
    flag("--overwrite", action="store_true", help="replace what an earlier run left in the folder")
    flag("--eval_only", action="store_true", help="evaluate the checkpoint, train nothing")
    flag("--checkpoint", help="a file to resume or evaluate instead of the run folder's")
    flag("--ckpt_minutes", type=number(float, 0), default=5.0, help="between checkpoints")
    flag("--log_every", type=number(int, 1), default=50, help="optimiser steps")
    flag("--amp", action=switch, default=False, help="bf16 autocast around the networks")
    flag("--compile", action=switch, default=False, help="torch.compile")
    flag("--n_train", type=number(int, 20), help="use only so many items for train + val")
    flag("--n_test", type=number(int, 2), help="use only so many test items")
    flag("--n_modalities", type=number(int, 2, 16), default=3, help="synth_polymnist only")
    flag("--n_eval", type=number(int, 2), default=10_000, help="most items and samples to evaluate")
    flag("--eval_batch", type=number(int, 1), default=1000)
    return p


def peek(parser: argparse.ArgumentParser, argv: list[str] | None, flag: str):
    """The value that a flag will have: for presets, which must be set before the full parse."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument(f"--{flag}", default=parser.get_default(flag))
    return getattr(pre.parse_known_args(argv)[0], flag)


@contextmanager
def fixed_noise(seed: int):
    """Torch's random numbers start at seed inside the block; the caller's go on afterwards as if nothing had been."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def mean_over(metrics, batches, seed: int = 0) -> dict[str, float]:
    """Means over items of metrics(batch) = {name: mean over the batch []}; the same noise each time."""
    sums, n = {}, 0
    with fixed_noise(seed):
        for x in batches:
            b = len(next(iter(x.values())))
            n += b
            for key, value in metrics(x).items():
                sums[key] = sums.get(key, 0.0) + value * b
    return {key: float(value) / n for key, value in sums.items()}


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on all devices, and ask cuDNN for reproducible algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def distributed() -> tuple[int, int]:
    """(rank, world) from torchrun's environment, joining its process group (gloo for CPU, nccl for CUDA); else (0, 1)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def average_gradients(parameters, world: int) -> None:
    """Replace every gradient by its mean over the ranks, in one all_reduce; nothing to do for world 1."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if world == 1 or not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat / world).split([g.numel() for g in grads])):
        grad.copy_(mean.view_as(grad))


# ---- Files --------------------------------------------------------------------------------------
@contextmanager
def atomic_write(path):
    """A binary file that takes the place of `path` when the block ends well; on failure `path` is as before.

    OSError, in one line that names the file, whatever the writer raised (torch's zip writer raises RuntimeError).
    """
    tmp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        tmp.unlink(missing_ok=True)


def _read(path) -> dict:
    """A file of torch.save, on the CPU, tensors and plain values only; RunError if it is missing or broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise RunError(f"{path} is truncated or no checkpoint ({str(error).splitlines()[0][:80]})") from error


def _commit(folder) -> str | None:
    """Git commit of a folder, with "-dirty" after it if tracked files differ; None outside a repository."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=folder,
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _pick_device(name: str) -> torch.device:
    """"auto" is CUDA where there is one; under torchrun each process of a machine has its own."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RunError(f"--device {name}: this machine has no CUDA device that torch can use; try --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def _plain(value):
    """Tensor and numpy scalars as python numbers."""
    return value.item() if hasattr(value, "item") else value


# ---- The run folder -----------------------------------------------------------------------------
RUN_FILES = ("config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "result.json",
             "samples.png", "cross.png", "recon.png", "curves.png", "diagnostics.png", "posteriors.png")
RUN_FLAGS = {"data_dir", "out_dir", "device", "resume", "overwrite", "eval_only", "checkpoint", "ckpt_minutes", "log_every",
             "amp", "compile", "n_eval", "eval_batch", "n_test"}         # may differ between a checkpoint and its user


class Run:
    """The folder of a run, its log, checkpoint and signals. Made by open_run; every rank has one, rank 0 writes."""

    def __init__(self, directory: Path, script: str, args, rank: int, world: int):
        self.dir, self.script, self.args, self.rank, self.world = directory, script, args, rank, world
        self.device = _pick_device(args.device)
        self.commit, self.command = None, ""
        self.stop_requested = 0                                 # the signal's number, once one came
        self._start = self._saved = time.monotonic()
        self._lock = self._log = None
        self._shown, self._stage, self._live = -math.inf, None, False
        self._handlers = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def start(self, model: nn.Module) -> None:
        """Print the header, note parameter counts in config.json, and give every rank noise of its own."""
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in model.named_children()}
        nets = ", ".join(f"{name} {n:,}" for name, n in counts.items())
        self.say(f"{self.script} on {self.args.dataset}, seed {self.args.seed}, {_device_name(self.device)} -> {self.dir}\n"
                 f"parameters: {nets}")
        path = self.dir / "config.json"
        if self.rank == 0 and not self.args.eval_only:
            with atomic_write(path) as file:
                file.write((json.dumps(json.loads(path.read_text()) | {"parameters": counts}, indent=1) + "\n").encode())
        self._own_noise()

    def _own_noise(self) -> None:
        if self.rank:
            torch.manual_seed(torch.randint(2**62, ()).item() + self.rank)

    # -- console and log
    def say(self, text: str) -> None:
        """A line on the console (rank 0)."""
        if self.rank == 0:
            print("\r\x1b[K" * self._live + text, flush=True)
            self._live = False

    def progress(self, stage, epoch, n_epochs, step, total, batch_size, **metrics) -> None:
        """One line on where the run is: rewritten in place on a terminal, else a new line at most every 15 s."""
        now, tty = time.monotonic(), sys.stdout.isatty()
        if stage != self._stage:
            self._stage, self._first, self._shown = stage, (step, now), -math.inf
        if self.rank or now - self._shown < (0.2 if tty else 15) and step < total:
            return
        self._shown = now
        pace = (now - self._first[1]) / max(step - self._first[0], 1)     # seconds a step
        parts = [f"{stage}", f"epoch {epoch}/{n_epochs}", f"step {step}/{total}"]
        parts += [f"{key} {_plain(value):.4g}" for key, value in metrics.items()]
        parts += [f"{batch_size / pace:.0f}/s", f"ETA {_clock(pace * (total - step))}"] if pace else []
        line = "  ".join(parts)
        if tty:
            line = line[:shutil.get_terminal_size().columns - 1]
        print("\r\x1b[K" * tty + line, end="" if tty else "\n", flush=True)
        self._live = tty

    def log(self, **metrics) -> None:
        """Append one JSON object to metrics.jsonl; tensors become numbers. FloatingPointError on a non-finite value."""
        metrics = {key: _plain(value) for key, value in metrics.items()}
        for key, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{key} is {value} at step {metrics.get('step', '?')} of {self.dir}")
        if self.rank == 0:
            self._log = self._log or open(self.dir / "metrics.jsonl", "a")
            self._log.write(json.dumps(metrics | {"wall_s": round(self.wall_s(), 3)}) + "\n")
            self._log.flush()

    def wall_s(self) -> float:
        """Seconds since the run began, without the time between a stop and its --resume."""
        return time.monotonic() - self._start

    # -- checkpoints
    def checkpoint_due(self) -> bool:
        """Have --ckpt_minutes passed since the last one, or was the run asked to stop?"""
        due = time.monotonic() - self._saved >= 60 * self.args.ckpt_minutes
        return bool(due or self.stop_requested)

    def save(self, state: dict) -> None:
        """Write checkpoint.pt: `state` (tensors, state_dicts, numbers, strings) and all that an exact resume needs."""
        self._saved = time.monotonic()
        log = self.dir / "metrics.jsonl"
        name, keys, *rest = np.random.get_state()
        rng = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        payload = {"format": 1, "script": self.script, "config": vars(self.args), "state": state, "rng": rng, "wall_s": self.wall_s(),
                   "log_bytes": log.stat().st_size if log.exists() else 0}
        if self.rank == 0:
            with atomic_write(self.dir / "checkpoint.pt") as file:
                torch.save(payload, file)

    def load(self, path=None, free=()) -> dict:
        """The state of a checkpoint (this run's by default), on the CPU; random states too unless --eval_only."""
        path = Path(path or self.dir / "checkpoint.pt")
        kept = _read(path)
        if not isinstance(kept, dict) or kept.get("format") != 1 or kept.get("script") != self.script:
            raise RunError(f"{path} is not a checkpoint of {self.script}.py")
        for key in vars(self.args).keys() - RUN_FLAGS - set(free):
            if vars(self.args)[key] != kept["config"].get(key):
                raise RunError(f"--{key} is {vars(self.args)[key]}, but {path} was made with {kept['config'].get(key)}: "
                               f"give --{key} {kept['config'].get(key)}, or train anew with another --out_dir")
        if self.args.eval_only:
            return kept["state"]
        torch.set_rng_state(kept["rng"]["torch"])
        random.setstate(kept["rng"]["python"])
        np.random.set_state(kept["rng"]["numpy"])
        if self.device.type == "cuda" and "cuda" in kept["rng"]:
            torch.cuda.set_rng_state(kept["rng"]["cuda"], self.device)
        self._own_noise()
        self._start = time.monotonic() - kept["wall_s"]
        log = self.dir / "metrics.jsonl"
        if path == self.dir / "checkpoint.pt" and self.rank == 0 and log.exists():
            os.truncate(log, min(kept["log_bytes"], log.stat().st_size))
        return kept["state"]

    # -- the end
    def stop(self) -> None:
        """Leave after a signal, once the caller has saved: SystemExit 130 (Ctrl-C) or 143 (SIGTERM)."""
        self.say(f"stopped by {signal.Signals(self.stop_requested).name}; continue with --resume ({self.dir})")
        self.close()
        raise SystemExit(128 + self.stop_requested)

    def finish(self, metrics: dict, dataset_note: str, n: int, **extra) -> dict[str, float]:
        """Write result.json and print the metrics in one line; a non-finite value is written as null. Returns metrics."""
        metrics = {key: _plain(value) for key, value in metrics.items()}
        finite = {key: v if math.isfinite(v) else None for key, v in metrics.items()}
        result = {"script": self.script, "dataset": self.args.dataset, "seed": self.args.seed, "metrics": finite,
                  "note": dataset_note, "n": n, **{key: _plain(value) for key, value in extra.items()},
                  "minutes": round(self.wall_s() / 60, 3), "device": _device_name(self.device),
                  "torch": torch.__version__, "command": self.command, "commit": self.commit}
        if self.rank == 0:
            with atomic_write(self.dir / "result.json") as file:
                file.write((json.dumps(result, indent=1) + "\n").encode())
            plot_curves(self.dir / "curves.png", self.dir / "metrics.jsonl")
        self.say("  ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:8]) + f"  -> {self.dir}")
        return metrics

    def close(self) -> None:
        """Give back the signals and the folder's lock; safe to call twice."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        for file in (self._log, self._lock):
            if file is not None:
                file.close()
        self._log = self._lock = None

    def _on_signal(self, number, frame) -> None:
        self.stop_requested = number
        signal.signal(number, self._handlers[number])          # a second one aborts at once
        os.write(2, b"\nstopping after this step; once more to abort\n")


def _clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def open_run(args, script_path, argv=None) -> Run:
    """Claim the folder out_dir/<script>/<dataset>/<seed>, lock it, and describe the run in it (config.json, source.py).

    RunError if another process holds it, if it has results and none of --resume, --overwrite, --eval_only is given,
    or if there is nothing to resume. Removes nothing but RUN_FILES, and that only with --overwrite.
    """
    rank, world = distributed()
    script = Path(script_path).stem
    run = Run(Path(args.out_dir) / script / args.dataset / str(args.seed), script, args, rank, world)
    argv = list(sys.argv[1:] if argv is None else argv)
    run.commit, run.command = _commit(Path(script_path).resolve().parent), " ".join(["python", f"{script}.py", *argv])
    if args.resume and args.overwrite:
        raise RunError("--resume and --overwrite contradict each other")
    if rank == 0:
        run.dir.mkdir(parents=True, exist_ok=True)
        run._lock = open(run.dir / ".lock", "a")
        try:
            fcntl.flock(run._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run.dir} is in use by another process") from None
        _prepare(run, args)
        if not args.eval_only or not (run.dir / "config.json").exists():
            config = vars(args) | {"argv": argv, "commit": run.commit, "torch": torch.__version__,
                                   "device_name": _device_name(run.device), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            with atomic_write(run.dir / "config.json") as file:
                file.write((json.dumps(config, indent=1, default=str) + "\n").encode())
            shutil.copyfile(script_path, run.dir / "source.py")
    if threading.current_thread() is threading.main_thread():
        run._handlers = {s: signal.signal(s, run._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    return run


def _prepare(run: Run, args) -> None:
    """Empty the folder, or refuse it, as the flags say."""
    if args.overwrite:
        for name in RUN_FILES:
            (run.dir / name).unlink(missing_ok=True)
    for left in run.dir.glob(".*.tmp"):                         # of a run killed while it wrote
        left.unlink()
    if args.resume and not args.checkpoint and not (run.dir / "checkpoint.pt").exists():
        raise RunError(f"--resume: no checkpoint.pt in {run.dir}")
    used = {f.name for f in run.dir.iterdir()} - {".lock", "config.json", "source.py"}
    if used and not (args.resume or args.overwrite or args.eval_only):
        raise RunError(f"{run.dir} is not empty: give --resume, --overwrite or --eval_only, or another --seed or --out_dir")
