"""What no paper disagrees about: metrics, chain diagnostics, pictures, and the folder of a run.

Shapes: b batch, c h w image in [0, 1], f features, d latent; chains are [n steps, c chains, d].
No paper's net, loss, sampler or training loop is here; the judges below only measure.
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure                            # no display, no pyplot
from torch import Tensor, nn

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")        # ends in its sha256's first digits
RUN_FILES = ("config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "result.json",
             "samples.png", "cross.png", "curves.png", "diagnostics.png", "posteriors.png",
             "captions.txt")
RUN_FLAGS = ("data_dir", "out_dir", "judges", "device", "resume", "overwrite", "eval_only",
             "checkpoint", "ckpt_minutes", "log_every", "amp", "compile", "n_test", "n_eval",
             "eval_batch", "fid")


class RunError(ValueError):
    """A mistake of the user, in one line: `cli` prints it and exits with 2."""


# ---- Metrics -------------------------------------------------------------------------------------
def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2); mu [f], cov [f f], also singular; nan
    if one of them is not finite."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).double() for a in (mu1, cov1, mu2, cov2))
    if not all(a.isfinite().all() for a in (mu1, cov1, mu2, cov2)):
        return math.nan
    values, basis = torch.linalg.eigh(cov1)
    root = basis * values.clamp_min(0).sqrt()                   # root @ root.T = C1
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp_min(0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)                            # rounding: -1e-12


class FeatureStats:
    """Mean and unbiased covariance of batches of features: float64 sums about the first mean."""

    n = sum = outer = 0

    def update(self, features: Tensor) -> None:                 # [b f]
        features = features.detach().double()
        self.origin = self.origin if self.n else features.mean(0)
        centred = features - self.origin
        self.n += len(features)
        self.sum = self.sum + centred.sum(0)
        self.outer = self.outer + centred.T @ centred

    def mean_cov(self) -> tuple[Tensor, Tensor]:                # [f], [f f]
        mean = self.sum / self.n
        return self.origin + mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019); features [n f] and [m f].

    Precision is the share of fake points that lie in the ball of some real point, which reaches to
    its k-th nearest real neighbour. Recall is the same with the roles exchanged."""
    def share(points, centres):
        radius = torch.cat([torch.cdist(part, centres).kthvalue(min(k + 1, len(centres))).values
                            for part in centres.split(1000)])   # k + 1: each is its own nearest
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()
    real, fake = real.detach().double(), fake.detach().double()
    return {"precision": share(fake, real), "recall": share(real, fake)}


def f1_score(predicted: Tensor, target: Tensor) -> float:
    """Mean over items of 2 TP / (2 TP + FP + FN); [b ...], an entry above 1/2 is a one. An item
    without any ones, predicted or real, counts 0, as in scikit-learn."""
    predicted, target = predicted.flatten(1) > 0.5, target.flatten(1) > 0.5
    ones = predicted.sum(1) + target.sum(1)
    return (2 * (predicted & target).sum(1) / ones.clamp_min(1)).mean().item()


def linear_accuracy(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of a logistic regression on latents [n d], by L-BFGS on the training ones."""
    w = torch.zeros(z.shape[1] + 1, int(y.max()) + 1, device=z.device, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")
    z, z_test = (F.pad((v - z.mean(0)) / (z.std(0) + 1e-6), (0, 1), value=1.0) for v in (z, z_test))

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(z @ w, y) + 1e-4 * w.square().sum()
        loss.backward()
        return loss
    opt.step(closure)
    return ((z_test @ w).argmax(1) == y_test).float().mean().item()


def _tallies(scores, labels) -> tuple[Tensor, Tensor]:
    """Positives and negatives at each distinct score, in ascending order: ties share an entry."""
    scores, labels = (torch.as_tensor(a).double().cpu() for a in (scores, labels))
    if scores.isnan().any() or labels.unique().tolist() != [0, 1]:
        raise ValueError("ranking needs scores without nan, and labels 0 and 1, both present")
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    positives = torch.bincount(place, weights=labels)
    return positives, count - positives


def average_precision(scores, labels) -> float:
    """sum_k (recall_k - recall_k-1) precision_k over the distinct scores [n]; labels [n] 0 or 1."""
    positives, negatives = (t.flip(0) for t in _tallies(scores, labels))
    precision = positives.cumsum(0) / (positives + negatives).cumsum(0)
    return ((positives * precision).sum() / positives.sum()).item()


def auroc(scores, labels) -> float:
    """P(a positive scores above a negative) + P(they tie) / 2; scores [n], labels [n] 0 or 1."""
    positives, negatives = _tallies(scores, labels)
    below = negatives.cumsum(0) - negatives / 2
    return ((positives * below).sum() / (positives.sum() * negatives.sum())).item()


# ---- Judges: a small classifier per modality -----------------------------------------------------
class Judge(nn.Module):
    """x [b c h w] in [0, 1] -> (logits [b y], features [b f]); `accuracy` is on the test split."""
    VERSION = 1                             # part of the cache's key: raise it when judges change

    def __init__(self, in_shape: tuple[int, int, int], n_classes: int):
        super().__init__()
        layers = [nn.BatchNorm2d(in_shape[0])]
        for n_in, n_out, stride in ((in_shape[0], 32, 2), (32, 48, 1), (48, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(n_in, n_out, 3, stride, 1), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Dropout(0.2),
                                  nn.Linear(96 * 16, 128), nn.ReLU())
        self.head, self.accuracy, self.seen = nn.Linear(128, n_classes), math.nan, None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep, last = not (self.training or torch.is_grad_enabled()), self.seen
        if not keep or not last or last[0] is not x or last[1] != x._version:   # not seen just now
            last = x, x._version, (self.head(features := self.body(x)), features)
            self.seen = last if keep else None
        return last[2]


def _train_judge(judge: Judge, x: Tensor, y: Tensor, batch_size: int = 128) -> None:
    """x uint8 [n c h w], y [n]: until 99 % of recent images were right, at most 20 epochs."""
    n_steps, right, (h, w) = min(20 * len(x), 400_000) // batch_size + 1, 0.0, x.shape[2:]
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=n_steps)
    for _ in range(n_steps):
        index = torch.randint(len(x), (batch_size,), device=x.device)
        top, left = torch.randint(5, (2,)).tolist()             # moves up to 2 pixels
        image = F.pad(x[index].float() / 255, (2, 2, 2, 2), mode="replicate")
        logits, _ = judge(image[:, :, top:top + h, left:left + w])
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, y[index], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
        right += 0.05 * ((logits.argmax(1) == y[index]).float().mean().item() - right)
        if right > 0.99:
            break


def load_judges(train, test, cache_dir, device, say=print) -> dict[str, Judge]:
    """{m: frozen judge} for the image modalities of a labelled data set, {} for an unlabelled one.

    Trained once, on random numbers of its own, and kept in cache_dir by a digest of the data."""
    judges = {}
    for m in [m for m in train.modalities if train.kinds[m] == "image" and train.y is not None]:
        (x, y), (x_test, y_test) = train.modality(m), test.modality(m)
        key = hashlib.sha256(x.cpu().contiguous().numpy())
        key.update(y.cpu().contiguous().numpy())
        path = Path(cache_dir) / f"{train.name}_{m}_{Judge.VERSION}_{key.hexdigest()[:16]}.pt"
        with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
            def fresh(shape=x.shape[1:], n_classes=int(y.max()) + 1):
                torch.manual_seed(0)
                return Judge(shape, n_classes).to(device, memory_format=torch.channels_last)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)                # one trains, others read its file
                try:
                    (judge := fresh()).load_state_dict(_read(path))
                except (RunError, RuntimeError, TypeError):     # not there, broken, or half fits
                    say(f"judge of {m}: is trained now, once, for {path}")
                    _train_judge(judge := fresh(), x.to(device), y.to(device))
                    with atomic_write(path) as file:
                        torch.save(judge.state_dict(), file)
        judges[m] = judge.eval().requires_grad_(False)
        images = ({m: part.to(device).float() / 255} for part in x_test.split(500))
        seen = _measure(images, {m: judge}, {})[0][m]
        judge.accuracy = (seen == y_test.cpu()).float().mean().item()
        weak = judge.accuracy < (0.90 if "svhn" in m else 0.95)
        say(f"judge of {m}: test accuracy {judge.accuracy:.4f}"
            + weak * f"\nWARNING: that is weak; so is every coherence measured with {m}")
    return judges


# ---- Inception: the net behind fid_* -------------------------------------------------------------
def _inception() -> nn.Module:
    """x [b 1|3 h w] in [0, 1] -> pool3 [b 2048] as TensorFlow's graph of 2015; random weights. Its
    means leave out the padding and its last block takes the maximum, unlike torchvision's."""
    from torchvision.models.inception import Inception3         # takes seconds: not for --help
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.fc = nn.Identity()
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        block = getattr(net, f"Mixed_{name}")
        mean = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        pool = nn.MaxPool2d(3, 1, 1) if name == "7c" else mean
        block._forward = lambda x, block=block, branches=block._forward, pool=pool: [
            *branches(x)[:-1], block.branch_pool(pool(x))]

    def forward(x: Tensor) -> Tensor:
        x = x.float().mul(255).round().clamp(0, 255) / 255      # as in an 8-bit file
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear")
        return torch.cat([Inception3.forward(net, 2 * part - 1) for part in x.split(100)])
    net.forward = forward
    return net.eval().requires_grad_(False)


def _inception_weights(data_dir) -> Path:
    """The FID net's weights in data_dir, else downloaded there; RunError if that fails."""
    path = Path(data_dir) / INCEPTION_URL.rsplit("/")[-1]
    sha = path.stem.rsplit("-")[-1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=sha)
    except (OSError, RuntimeError) as error:
        raise RunError(f"--fid: {path} is missing and its download failed ({error}): put it there, "
                       "or leave --fid out") from None
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha):
        raise RunError(f"{path} is damaged: its sha256 is not {sha}...; delete it")
    return path


def load_inception(args, device) -> nn.Module | None:
    """With --fid the FID net, its weights from --data_dir or downloaded there; else None."""
    if not args.fid:
        return None
    net, weights = _inception(), _read(_inception_weights(args.data_dir))
    net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
    return net.to(device)


# ---- Coherence, and distances to real test images ------------------------------------------------
@torch.no_grad()
def _measure(batches, judges: dict, extract: dict) -> tuple[dict, dict]:
    """Classes {m: [n]} that judges see in batches {m: images}, -1 in an image that is not finite;
    {key: (mu, cov)} of the features."""
    classes, stats = {}, {}
    for x in batches:
        for m in [m for m in judges if m in x]:
            seen, finite = judges[m](x[m])[0].argmax(1), x[m].flatten(1).isfinite().all(1)
            classes.setdefault(m, []).append(torch.where(finite, seen, -1).cpu())
        for key in [key for key in extract if key[1] in x]:
            stats.setdefault(key, FeatureStats()).update(extract[key](x[key[1]]))
    return ({m: torch.cat(c) for m, c in classes.items()},
            {key: s.mean_cov() for key, s in stats.items()})


def _agreement(classes: dict[str, Tensor]) -> float:
    classes = torch.stack(list(classes.values()))
    return ((classes == classes[0]) & (classes >= 0)).all(0).float().mean().item()


def _distances(stats: dict, real, prefix: str = "") -> dict[str, float]:
    """{<kind>_<prefix><m>: Fréchet distance of the features to real test images'}."""
    return {f"{kind}_{prefix}{m}": frechet_distance(*gaussian, *real.stats[kind, m])
            for (kind, m), gaussian in stats.items()}


def reference(test, train, judges, inception, n: int = 10_000, batch_size: int = 500):
    """What `coherence_*` compare with: n real test tuples, and n of train as the distances' floor.

    .metrics: judge_accuracy_<m>, coherence_ceiling (judges agree on a real tuple), fid_floor_<m>,
    frechet_clf_floor_<m>, frechet_clf_floor (their mean). .extract and .stats: the features and
    their (mu, cov) by (kind, m), kind "frechet_clf" (of a judge) or "fid"."""
    images = [m for m in test.modalities if test.kinds[m] == "image"]
    extract = {("frechet_clf", m): lambda x, j=judge: j(x)[1] for m, judge in judges.items()}
    extract |= {("fid", m): inception for m in images if inception is not None}

    def measure(dataset):                              # evenly spread: a set may be sorted by class
        index = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long()
        take = (dataset.take(i, names=images) for i in index.split(batch_size))
        return _measure(take, judges, extract)

    classes, stats = measure(test)
    metrics = {f"judge_accuracy_{m}": judge.accuracy for m, judge in judges.items()}
    real = SimpleNamespace(extract=extract, stats=stats, metrics=metrics)
    metrics |= _distances(measure(train)[1], real, "floor_")
    if judges:
        floor = [metrics[f"frechet_clf_floor_{m}"] for m in judges]
        metrics["frechet_clf_floor"] = sum(floor) / len(floor)
    if len(judges) > 1:
        metrics["coherence_ceiling"] = _agreement(classes)
    return real


def coherence_joint(sample, judges, n: int = 10_000, batch_size: int = 500, reference=None) -> dict:
    """Share of n joint samples in which the judges of all modalities see the same class.

    sample(b) -> {m: [b c h w] in [0, 1]}. Keys: coherence_joint if there are two judges or more;
    classes_joint: e to the entropy of all classes seen, 10 if each of ten is as frequent, 1 for a
    (coherent) collapse; with a reference also frechet_clf_<m> and fid_<m>."""
    batches = (sample(min(batch_size, n - i)) for i in range(0, n, batch_size))
    classes, stats = _measure(batches, judges, reference.extract if reference else {})
    joint = {"coherence_joint": _agreement(classes)} if len(judges) > 1 else {}
    if judges:
        seen = torch.cat(list(classes.values()))
        seen = seen[seen >= 0]
        joint["classes_joint"] = torch.special.entr(seen.bincount() / len(seen)).sum().exp().item()
    return joint | _distances(stats, reference)


def coherence_cross(generate, test, judges, batch_size=500, reference=None,
                    progress=lambda *_: None, subsets=None) -> dict:        # Run.progress
    """Share of test items of which a generated modality is judged to have the item's label.

    generate(x_observed {m: images}, targets [names]) -> {target: images}, one sample an item.
    Observed: `subsets`, else all non-empty proper ones, or, of M > 5 modalities, M of each size in
    a random cycle: each is as often a target. Keys: coherence_<a+b>_to_<target>, their means given
    k coherence_cross_<k>, coherence_subsets; with a reference frechet_clf_<a>_to_<t>."""
    if not (judges or reference and reference.extract):
        return {}                                               # nobody to look at the samples
    if subsets is None:
        names, draw, subsets = test.modalities, random.Random(0), []
        for k in range(1, len(names)):
            cycle = 2 * draw.sample(names, len(names))
            windows = (sorted(cycle[i:i + k], key=names.index) for i in range(len(names)))
            subsets += windows if len(names) > 5 else combinations(names, k)
    metrics, by_size = {"coherence_subsets": len(subsets)}, {}
    for i, subset in enumerate(subsets):
        progress("evaluation", 0, 1, i, len(subsets), len(test))
        if not judges and len(subset) > 1:                      # distances are given one only
            continue
        targets = [m for m in test.modalities if m not in subset and test.kinds[m] == "image"]
        batches = (generate(test.take(slice(i, i + batch_size), names=subset), targets)
                   for i in range(0, len(test), batch_size))
        single = reference is not None and len(subset) == 1
        classes, stats = _measure(batches, judges, reference.extract if single else {})
        for m in [m for m in targets if m in classes]:
            share = (classes[m] == test.y.cpu()).float().mean().item()
            metrics[f"coherence_{'+'.join(subset)}_to_{m}"] = share
            by_size.setdefault(len(subset), []).append(share)
        metrics |= _distances(stats, reference, f"{subset[0]}_to_")
    return metrics | {f"coherence_cross_{k}": sum(s) / len(s) for k, s in by_size.items()}


# ---- Chain diagnostics ---------------------------------------------------------------------------
def _autocovariance(x: Tensor) -> Tensor:
    """Chains [n c d] -> sum_t (x_t - mean)(x_t+k - mean) / n, meaned over chains: [n lags, d]."""
    spectrum = torch.fft.rfft(x - x.mean(0), n=2 * len(x), dim=0)           # padded: no wrapping
    return torch.fft.irfft(spectrum.abs() ** 2, dim=0)[:len(x)].mean(1) / len(x)


def autocorrelation(x) -> Tensor:
    """Autocorrelation of chains [n c (d)] at lags 0 .. n-1, pooled over the chains: [n (d)]."""
    covariance = _autocovariance(torch.as_tensor(x).detach().double())
    return covariance / covariance[0]


def _split(x) -> tuple[Tensor, Tensor, Tensor]:
    """[n c d] -> halves [n/2 2c d] (a drifting chain disagrees with itself), W [d], var+ [d]."""
    x, half = torch.as_tensor(x).detach().double(), len(x) // 2
    if half < 2:
        raise ValueError(f"chain diagnostics need 4 steps or more, got {len(x)}")
    x = torch.cat([x[:half], x[-half:]], 1)
    still = x.amax((0, 1)) == x.amin((0, 1))                    # says nothing: nan
    within = x.var(0).mean(0).masked_fill(still, math.nan)
    return x, within, within * (half - 1) / half + x.mean(0).var(0)


def split_r_hat(x):
    """Split R-hat (BDA3 sec. 11.4; no ranks) of chains [n c] -> float or [n c d] -> [d]: 1 once
    mixed, nan if no chain ever moves, very large if they stick at different places."""
    if x.ndim == 2:
        return split_r_hat(x[..., None]).item()
    _, within, total = _split(x)
    return (total / within).sqrt()


def ess(x):
    """Effective number of draws in chains [n c] -> float, [n c d] -> [d]; nan if none moves. Split
    chains, Geyer's initial monotone sequence (Vehtari et al. 2021, sec. 3.2)."""
    if x.ndim == 2:
        return ess(x[..., None]).item()
    x, within, total = _split(x)
    n, n_draws = len(x), len(x) * x.shape[1]
    rho = 1 - (within - _autocovariance(x)) / total             # [n d]
    rho[0] = 1
    even, odd = rho[0:n - 1:2], rho[1:n:2]
    alive = (even + odd > 0).cumprod(0)                         # until a pair is < 0
    tau = 2 * ((even + odd).cummin(0).values * alive).sum(0) - 1
    end = alive.sum(0, keepdim=True)                            # [1 d] first dead pair
    tau = tau + F.pad(even, (0, 0, 0, 1)).gather(0, end)[0].clamp_min(0)    # antithetic chains
    return n_draws / tau.clamp_min(1 / math.log10(n_draws))


def chain_report(chains: Tensor, path, accept_rate=None, energy: Tensor | None = None) -> dict:
    """Metrics of chains [n c d], c chains a coordinate, and their picture at path.

    r_hat, r_hat_95: median and 95 % quantile over coordinates, 1e6 for chains that stick at
    different places; ess_per_step: mean, a share of the draws; autocorrelation_time: mean, in
    steps. accept_rate and energy [n c] are only drawn."""
    chains = chains.detach().cpu()
    r_hat, rho = split_r_hat(chains).clamp_max(1e6), autocorrelation(chains).nanmean(1)
    size = ess(chains) / math.prod(chains.shape[:2])
    title = "first coordinate by step"
    title += "" if accept_rate is None else f", accept rate {float(accept_rate):.2f}"
    lines = {"autocorrelation by lag, mean": rho[:len(rho) // 2], title: chains[:, :, 0]}
    if energy is not None:
        lines["energy by step"] = energy.detach().cpu()
    panels = [("split R-hat", lambda axes: axes.hist(r_hat[r_hat < 1e6].numpy(), 40))]
    panels += [(title, lambda axes, y=y: axes.plot(y.numpy(), linewidth=0.6))
               for title, y in lines.items()]
    _save_rows(path, [panels])
    return {"r_hat": r_hat.nanmedian().item(), "r_hat_95": r_hat.nanquantile(0.95).item(),
            "ess_per_step": size.nanmean().item(),
            "autocorrelation_time": (1 / size).nanmean().item()}


# ---- Gaussian mixture: weights [k], means [k d], Cholesky factors [k d d] ------------------------
def fit_gmm(z: Tensor, k: int, seed: int = 0, n_iter: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """EM on z [n d] from k-means++, float64, 1e-4 of z's variance on diagonals; n k d floats."""
    z, rng = z.detach().double(), torch.Generator().manual_seed(seed)
    floor = 1e-4 * z.var(0).mean() * torch.eye(z.shape[1]).to(z)
    means = z[torch.randint(len(z), (1,), generator=rng)]
    while len(means) < k:                                       # prefer far points
        distance = torch.cdist(z, means).amin(1).cpu()
        means = torch.cat([means, z[torch.multinomial(distance**2 + 1e-9, 1, generator=rng)]])
    member = F.one_hot(torch.cdist(z, means).argmin(1), k).double()         # [n k]
    for _ in range(n_iter):
        count = member.sum(0).clamp_min(1e-9)
        means = member.T @ z / count[:, None]
        cov = [(z - mu).T @ ((z - mu) * r[:, None]) for mu, r in zip(means, member.T)]
        gmm = count / len(z), means, torch.linalg.cholesky(
            torch.stack(cov) / count[:, None, None] + floor)
        member = _log_joint(gmm, z).softmax(1)
    return gmm


def _log_joint(gmm, z: Tensor) -> Tensor:
    """log weight_k + log N(z; mean_k, chol_k chol_k^T): [n k]"""
    weights, means, chol = gmm
    normal = torch.distributions.MultivariateNormal(means, scale_tril=chol)
    return weights.log() + normal.log_prob(z.to(means)[:, None])


def sample_gmm(gmm, n: int, generator: torch.Generator | None = None) -> Tensor:
    """n draws [n d], float32, on the mixture's device; a generator must live there too."""
    weights, means, chol = gmm
    k = torch.multinomial(weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, means.shape[1], 1, generator=generator, device=means.device).to(means)
    return (means[k] + (chol[k] @ noise)[..., 0]).float()


# ---- Pictures, of rank 0 -------------------------------------------------------------------------
def _other_rank() -> bool:
    return dist.is_initialized() and dist.get_rank() > 0


def _save_rows(path, rows: list[list[tuple]], reach: float = 1.0) -> None:
    """PNG of rows of (title, content), all to one scale; content: an image [3 h w], a density [y x]
    on [-reach, reach]^2, or draw(axes)."""
    if _other_rank():
        return
    sizes = [[(220, 330) if callable(c) else c.shape[-2:] for _, c in row] for row in rows]
    heights = [30 + max(h for h, _ in row) for row in sizes]    # 30: the title
    width = max(sum(w for _, w in row) for row in sizes)
    figure = Figure((width / 100, sum(heights) / 100), dpi=150, layout="constrained")
    blocks = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for block, row, size in zip(blocks, rows, sizes):
        all_axes = block.subplots(1, len(row), width_ratios=[w for _, w in size], squeeze=False)
        for axes, (title, content) in zip(all_axes[0], row):
            axes.set_title(title, fontsize=8)
            if callable(content):
                content(axes)
                if len(axes.get_legend_handles_labels()[1]) > 1:
                    axes.legend(fontsize=7, frameon=False)
            elif content.ndim == 2:
                axes.imshow(content.cpu().numpy(), origin="lower", extent=[-reach, reach] * 2)
            else:
                axes.imshow(content.permute(1, 2, 0).numpy())
                axes.axis("off")
    figure.savefig(path)


def _tile(images: Tensor, n_cols: int, side: int = 64) -> Tensor:
    """Images [n c h w], grey or colour, in rows of n_cols square cells on white: [3 H W]."""
    from torchvision.utils import make_grid
    images = F.interpolate(images.detach().float().cpu(), (side, side), mode="nearest-exact")
    return make_grid(images.clamp(0, 1), n_cols, padding=2, pad_value=1)


def save_grid(path, blocks: dict[str, Tensor], n_cols: int | None = None) -> None:
    """PNG with a block of pictures per title, images [n c h w] in [0, 1], n_cols a row; by default
    a row each: modalities below one another, a column a joint sample."""
    _save_rows(path, [[(title, _tile(x, n_cols or len(x)))] for title, x in blocks.items()])


def save_cross_grid(path, given: dict[str, Tensor], generated: dict[str, dict[str, Tensor]]):
    """PNG with a row of pictures per source m: given[m] [r c h w] as a column, and beside each item
    its k samples generated[m][t] [r*k c h w] of every target t."""
    _save_rows(path, [[(f"{m}, given", _tile(x, 1)),
                       *((t, _tile(v, len(v) // len(x))) for t, v in generated[m].items())]
                      for m, x in given.items()])


def draw_samples(folder, sample, generate, given: dict[str, Tensor], k: int = 4) -> None:
    """samples.png: 16 joint samples; cross.png: k draws of all modalities given each single one.
    sample and generate as for coherence_joint and coherence_cross; given {m: [r c h w]}."""
    save_grid(Path(folder) / "samples.png", sample(16))
    save_cross_grid(Path(folder) / "cross.png", given, {
        m: generate({m: x.repeat_interleave(k, 0)}, list(given)) for m, x in given.items()})


def save_captions(path, tokens: Tensor, words: tuple[str, ...]) -> None:
    """A line of words for each row of tokens [n l]."""
    if _other_rank():
        return
    lines = (" ".join(words[i] for i in row) + "\n" for row in tokens.tolist())
    Path(path).write_text("".join(lines))


def save_densities(path, rows: list[list[Tensor]], titles: list[str], reach: float) -> None:
    """PNG of rows that begin with an image [c h w]; then densities [y x] on [-reach, reach]^2."""
    rows = [[cell if cell.ndim == 2 else _tile(cell[None], 1, 200) for cell in row] for row in rows]
    _save_rows(path, [list(zip(titles, row)) for row in rows], reach)


def plot_curves(path, metrics_jsonl_path) -> None:
    """PNG with a panel per metric logged with a step, the first 24; a line per stage and split."""
    curves, log = {}, Path(metrics_jsonl_path)
    whole = log.read_text().split("\n")[:-1] if log.exists() else []       # no torn last line
    for row in map(json.loads, whole):
        line = " ".join(str(row[key]) for key in ("stage", "split") if key in row)
        for key in row.keys() - {"step", "epoch", "stage", "split", "wall_s"}:
            if "step" in row and not isinstance(row[key], str):
                curves.setdefault(key, {}).setdefault(line, {})[row["step"]] = row[key]

    def draw(lines):
        return lambda axes: [axes.plot(*zip(*sorted(points.items())), label=name)
                             for name, points in lines.items()]
    panels = [(f"{key} by step", draw(curves[key])) for key in sorted(curves)[:24]]
    panels += [("", lambda axes: axes.axis("off"))] * (-len(panels) % 4)
    if panels:
        _save_rows(path, [panels[i:i + 4] for i in range(0, len(panels), 4)])


# ---- Command line, seed, ranks -------------------------------------------------------------------
def cli(main) -> None:
    """main(), with known failures as one line on stderr: exit 2 for the user's, 1 for the rest."""
    try:
        main()
    except (RunError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        clear = "\r\x1b[K" * sys.stderr.isatty()                # a live line
        print(f"{clear}error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit({RunError: 2, KeyboardInterrupt: 130}.get(type(error), 1))


def number(kind, low=-math.inf, high=math.inf, open_low: bool = False):
    """argparse type: a finite int or float in [low, high], or in (low, high]."""
    left, right = "(" if open_low or low == -math.inf else "[", ")" if high == math.inf else "]"

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or abs(value) == math.inf or open_low and value == low:
            raise argparse.ArgumentTypeError(f"{text} is outside {left}{low}, {high}{right}")
        return value
    parse.__name__ = kind.__name__                              # "invalid int value"
    return parse


def run_parser(script: str, doc: str, default: str, datasets: list) -> argparse.ArgumentParser:
    """A parser with the flags of all scripts; RUN_FLAGS leave a trained model as it is."""
    class Parser(argparse.ArgumentParser):
        def format_help(self) -> str:                           # every default, also without help
            for action in self._actions:
                action.help = action.help or "(default: %(default)s)"
            return super().format_help()

    p = Parser(script, description=doc.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, switch = p.add_argument_group("run").add_argument, argparse.BooleanOptionalAction
    flag("--dataset", default=default, choices=datasets, help="loads that data set's preset")
    flag("--data_dir", default="datasets", help="where files are, or are downloaded to")
    flag("--out_dir", default="runs", help="run folder: <out_dir>/<script>/<dataset>/<seed>")
    flag("--judges", help="folder of the classifiers that judge, default <out_dir>/judges")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0)
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    flag("--resume", action="store_true", help="continue from the checkpoint; one process: exactly")
    flag("--overwrite", action="store_true", help="replace what an earlier run left in the folder")
    flag("--eval_only", action="store_true", help="evaluate the checkpoint, train nothing")
    flag("--checkpoint", help="file to resume or evaluate instead of the run folder's own")
    flag("--ckpt_minutes", type=number(float, 0), default=5.0, help="between checkpoints")
    flag("--log_every", type=number(int, 1), default=50, help="optimiser steps")
    flag("--amp", action=switch, default=False, help="bf16 autocast around the networks")
    flag("--compile", action=switch, default=False, help="torch.compile")
    flag("--n_train", type=number(int, 20), help="use so many items for train + val, default all")
    flag("--n_test", type=number(int, 2), help="use so many test items, default all")
    flag("--n_modalities", type=number(int, 2, 16), default=3, help="synth_polymnist, polymnist10")
    flag("--n_eval", type=number(int, 2), default=10_000, help="items and samples evaluated")
    flag("--eval_batch", type=number(int, 1), default=1000)
    flag("--fid", action=switch, default=False, help="Inception FID too (weights are downloaded "
         "into data_dir); needs a GPU, or hours")
    return p


def peek(parser: argparse.ArgumentParser, argv: list[str] | None, flag: str, default=None):
    """A flag's value before the full parse, for presets; not given: default, or the parser's."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = parser.get_default(flag) if default is None else default
    pre.add_argument(f"--{flag}", nargs="?", default=default)
    return getattr(pre.parse_known_args(argv)[0], flag)


@torch.no_grad()
def mean_over(metrics, batches, device: torch.device, seed: int = 0) -> dict[str, float]:
    """Means over items of metrics(batch) -> {name: mean over the batch []}, batches of dicts. The
    noise is the same each time and does not touch the caller's random state."""
    sums, n = {}, 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for x in batches:
            b = len(next(iter(x.values())))
            n += b
            for key, value in metrics(x).items():
                sums[key] = sums.get(key, 0.0) + value.double() * b
    return {key: value.item() / n for key, value in sums.items()}


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device; cuDNN keeps to reproducible algorithms. Numbers
    below 1e-38, as Adam's moments of dead units become, count as 0: a CPU is slow with them."""
    random.seed(seed)
    torch.set_flush_denormal(True)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False                     # as for matrix products


def distributed() -> tuple[int, int]:
    """(rank, world) under torchrun, whose process group is joined; (0, 1) without."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def max_over_ranks(values: Tensor, world: int) -> Tensor:
    """The largest value on any rank, of each entry, as float; of flags: is it set on any?"""
    values = values.float()
    if world > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def average_gradients(parameters, world: int) -> None:
    """Replace the gradients by their means over the ranks, in one all_reduce."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if world > 1 and grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(total.view_as(grad) / world)


# ---- Files ---------------------------------------------------------------------------------------
@contextmanager
def atomic_write(path):
    """A binary file that becomes `path` if all goes well; else OSError, and path is as it was."""
    tmp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:                    # torch's zip writer: RuntimeError
        raise OSError(f"cannot write {path}: {str(error).partition(chr(10))[0]}") from error
    finally:
        tmp.unlink(missing_ok=True)


def _write_json(path, value) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, default=str).encode())


def _read(path) -> dict:
    """What torch.save wrote: tensors and plain values, on the CPU. RunError: missing or broken."""
    try:
        if zipfile.is_zipfile(path):                            # torch does not look at checksums
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise RuntimeError(f"wrong checksum of {bad}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError,
            TypeError, AttributeError, struct.error, zipfile.BadZipFile) as error:
        raise RunError(f"cannot read {path}, missing or damaged: {str(error)[:80]!r}") from error


def _plain(value):
    """A tensor or numpy scalar as a python number."""
    return value.item() if hasattr(value, "item") else value


# ---- The folder of a run -------------------------------------------------------------------------
class Run(ExitStack):
    """Log, checkpoint and signals of a run, from `open_run`. Every rank has one, rank 0 writes."""

    def __init__(self, args, source: Path, argv: list, device, rank: int, world: int):
        super().__init__()                                                  # of files, signals
        self.args, self.source, self.argv, self.device = args, source, argv, device
        self.script, self.rank, self.world = source.stem, rank, world
        self.dir = Path(args.out_dir) / self.script / args.dataset / str(args.seed)
        self.judges = Path(args.judges or Path(args.out_dir) / "judges")
        self.stop_requested = self._signal = self.rollbacks = 0             # the signal's number
        self._start = self._saved = self._synced = time.monotonic()
        self._calls, self._sync_every = 0, 1                                # of checkpoint_due
        self._stage, self._log, self._about, self._sizes = None, None, {}, {}
        self._flags = {k: v for k, v in vars(args).items() if k not in RUN_FLAGS}   # as given
        self._signals = self.enter_context(ExitStack())

    def say(self, text: str) -> None:
        if self.rank == 0:
            print("\r\x1b[K" * sys.stdout.isatty() + text, flush=True)     # over a live line

    def start(self, model: nn.Module) -> None:
        """Once data and model are there, before training: say what runs and how large its parts
        are; --overwrite removes the old run now. Each rank has its own random numbers from here on.
        """
        self._part_noise()
        self._sizes = {name: sum(p.numel() for p in part.parameters())
                       for name, part in model.named_children()}
        parts = "  ".join(f"{name} {size:,}" for name, size in self._sizes.items() if size)
        self.say(f"{self.script}  {self.args.dataset}  seed {self.args.seed}  "
                 f"{self._about['device']}  {self.dir}\nparameters: {parts}")
        made = [*map(self.dir.joinpath, RUN_FILES), *self.dir.glob("layer_*.png")]
        for old in made if self.args.overwrite and self.rank == 0 else []:
            old.unlink(missing_ok=True)
        if not (self.args.resume or self.args.eval_only):                   # these: in load
            self._describe()

    def _describe(self) -> None:
        """config.json and source.py, by rank 0, once nothing of the run can be refused any more."""
        path, args = self.dir / "config.json", self.args
        if self.rank == 0 and not (args.eval_only and path.exists()):
            _write_json(path, vars(args) | {
                "argv": self.argv, "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                "run": self._about, "parameters": self._sizes})
            shutil.copyfile(self.source, self.dir / "source.py")

    def _part_noise(self) -> None:
        """Reseed all ranks but 0, whose stream stays as it is."""
        if self.rank:
            torch.manual_seed(torch.randint(2**40, ()).item() + self.rank)

    def progress(self, stage, epoch, n_epochs, step, total, batch_size, **metrics) -> None:
        """Where the run is, epoch counted from 0: a live line on a terminal, else one in 15 s."""
        now, tty = time.monotonic(), sys.stdout.isatty()
        if stage != self._stage or step <= self._first[0]:
            self._stage, self._first, self._shown = stage, (step, now), -math.inf
        if self.rank or now - self._shown < (0.2 if tty else 15):
            return
        self._shown, (first, start) = now, self._first
        parts = [stage, f"epoch {epoch + 1}/{n_epochs}", f"step {step}/{total}"]
        parts += [f"{key} {_plain(value):.4g}" for key, value in metrics.items()]
        if step > first:
            pace = (now - start) / (step - first)                           # seconds a step
            parts += [f"{batch_size / pace:.0f}/s", f"ETA {pace * (total - step) / 60:.1f} min"]
        line, width = "  ".join(parts), shutil.get_terminal_size().columns - 1
        print("\r\x1b[K" + line[:width] if tty else line, end="" if tty else "\n", flush=True)

    def log(self, **metrics) -> None:
        """A line of metrics.jsonl, with wall_s; FloatingPointError if a value is not finite."""
        metrics = {key: _plain(value) for key, value in metrics.items()}
        for key, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{key} is {value} at step {metrics.get('step', '?')}: "
                                         "give a smaller learning rate (--lr, --lr_...)")
        if self.rank == 0:
            self._log = self._log or self.enter_context(open(self.dir / "metrics.jsonl", "a"))
            self._log.write(json.dumps(metrics | {"wall_s": round(self.wall_s(), 3)}) + "\n")
            self._log.flush()

    def wall_s(self) -> float:
        """Seconds that the run has taken, resumes included."""
        return time.monotonic() - self._start

    def checkpoint_due(self) -> bool:
        """Is --ckpt_minutes over, or the run to stop (then stop_requested, once saved)? Call it in
        each step, on every rank. Ranks agree once a second or every tenth call, whatever is first.
        """
        now = time.monotonic()
        due, self._calls = now - self._saved >= 60 * self.args.ckpt_minutes, self._calls + 1
        if self.world > 1:
            if self._calls < self._sync_every:
                return False
            pace = (now - self._synced) / self._calls                       # seconds a call
            flags = max_over_ranks(                                         # the slowest rank's
                torch.tensor([due, self._signal, pace], device=self.device), self.world)
            due, self.stop_requested, pace = flags[0].item(), int(flags[1]), flags[2].item()
            self._calls, self._synced = 0, now
            self._sync_every = max(1, min(10, int(1 / max(pace, 0.1))))
        else:
            self.stop_requested = self._signal
        return bool(due or self.stop_requested)

    def save(self, state: dict) -> None:
        """checkpoint.pt: state (tensors, state_dicts, numbers, strings) and what a resume needs. If
        it cannot be written, OSError, and the earlier one is still there."""
        self._saved, log = time.monotonic(), self.dir / "metrics.jsonl"
        name, keys, *rest = np.random.get_state()
        rng = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
               "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.rank == 0:
            with atomic_write(self.dir / "checkpoint.pt") as file:
                torch.save({"script": self.script, "format": 1, "state": state, "rng": rng,
                            "flags": json.dumps(vars(self.args), default=str),
                            "log_bytes": log.stat().st_size if log.exists() else 0,
                            "rollbacks": self.rollbacks, "wall_s": self.wall_s()}, file)

    def load(self, path=None, free: tuple[str, ...] = (), stages: int = 0) -> dict:
        """The state in a checkpoint, this run's own by default, on the CPU; RunError if it is none,
        or has other flags (RUN_FLAGS and `free` may differ), or --eval_only and fewer stages done.
        Unless --eval_only the run goes on from there: random states, log, wall clock are set back.
        """
        own = self.dir / "checkpoint.pt"
        path, log = Path(path or own), self.dir / "metrics.jsonl"
        kept = _read(path)
        if not isinstance(kept, dict) or kept.get("script") != self.script or kept["format"] != 1:
            raise RunError(f"{path} is not a checkpoint of this version of {self.script}.py")
        then, now = json.loads(kept["flags"]), json.loads(json.dumps(vars(self.args), default=str))
        then = {flag: then.get(flag, "(no such flag then)") for flag in then | now}
        other = [f"--{flag} {value}, not {now.get(flag)}" for flag, value in then.items()
                 if flag not in (*RUN_FLAGS, *free) and now.get(flag) != value]
        if other:
            raise RunError(f"{path} was made with {'; '.join(other)}: give the same flags, or "
                           "train anew with another --out_dir")
        if self.args.eval_only and kept["state"].get("stage", stages) < stages:
            raise RunError(f"{path}: its training is not finished, give --resume")
        self._describe()
        if mine := path.resolve() == own.resolve():
            self._start = time.monotonic() - kept["wall_s"]
        if self.args.eval_only:
            return kept["state"]
        self.rollbacks, rng = kept.get("rollbacks", 0), kept["rng"]
        random.setstate(rng["python"])
        np.random.set_state(rng["numpy"])
        torch.set_rng_state(rng["torch"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self._part_noise()
        if mine and self.rank == 0 and log.exists():
            os.truncate(log, min(kept["log_bytes"], log.stat().st_size))
        return kept["state"]

    def rollback(self, reason: str) -> dict:
        """The last checkpoint's state, with fresh noise, after chains diverged: a line of
        metrics.jsonl. At the fourth time, or with nothing saved, FloatingPointError. All ranks call
        it together; the caller loads the state and lowers a learning rate."""
        self.rollbacks, path = self.rollbacks + 1, self.dir / "checkpoint.pt"
        if self.rollbacks > 3 or not path.exists():
            raise FloatingPointError(f"{reason}, after {self.rollbacks - 1} rollbacks: give a "
                                     "smaller --lr_ebm")
        self.log(event="rollback", reason=reason, count=self.rollbacks)
        self.say(f"{reason}: back to the last checkpoint, time {self.rollbacks} of 3")
        torch.manual_seed(self.args.seed + 10**6 * self.rollbacks + self.rank)
        return _read(path)["state"]

    def begin_evaluation(self) -> None:
        """Training is over and saved: a signal ends the run at once from here on. Seeds torch."""
        self._signals.close()
        number = torch.tensor(self._signal, device=self.device)             # after the last step
        self.stop_requested = int(max_over_ranks(number, self.world))
        if self.stop_requested:
            self.stop()
        self.say(f"evaluation begins after {self.wall_s() / 60:.1f} minutes")
        torch.manual_seed(self.args.seed)

    def time_samples(self, sample) -> None:
        """result.json's seconds_per_1000: wall seconds of sample(1000), decoded, once warm."""
        for n in (10, 1000):
            start = time.monotonic()
            next(iter(sample(n).values())).sum().item()                     # waits for the device
        self._about["seconds_per_1000"] = time.monotonic() - start

    def stop(self) -> None:
        """Leave after a signal, once saved: SystemExit 130 (Ctrl-C) or 143 (SIGTERM)."""
        if self.world > 1:
            dist.barrier()                                                  # rank 0 has saved
        flags = [a for a in self.argv if a not in ("--overwrite", "--resume")] + ["--resume"]
        flags += ["--checkpoint", str(self.dir / "checkpoint.pt")] * bool(self.args.checkpoint)
        start = f"torchrun --nproc_per_node {self.world}" if self.world > 1 else "python"
        self.say(f"stopped by {signal.Signals(self.stop_requested).name}, saved in {self.dir}; to "
                 f"continue: {start} {self.source.name} {shlex.join(flags)}")
        raise SystemExit(128 + self.stop_requested)

    def finish(self, metrics: dict, dataset_note: str, n: int) -> dict[str, float]:
        """Write result.json, in which null is a metric that is not finite. Returns the metrics."""
        metrics = {key: _plain(value) for key, value in metrics.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        result = {"script": self.script, "dataset": self.args.dataset, "seed": self.args.seed,
                  "metrics": finite, "note": dataset_note, "n": n, "rollbacks": self.rollbacks,
                  "epochs": {k: v for k, v in vars(self.args).items() if k.startswith("epochs")},
                  "flags": self._flags, "minutes": round(self.wall_s() / 60, 2), **self._about}
        if self.rank == 0:
            _write_json(self.dir / "result.json", result)
            plot_curves(self.dir / "curves.png", self.dir / "metrics.jsonl")
        main = [key for key in metrics if re.match(
            r"coherence_(joint|cross|[^+]+_to)|judge_|auprc_mean$|frechet_clf(_k\d+)?$", key)]
        self.say(f"{self.wall_s() / 60:.1f} minutes; all metrics are in {self.dir}/result.json")
        self.say("  ".join(f"{key} {metrics[key]:.3f}" for key in main or metrics))
        return metrics

    def _on_signal(self, number: int, _) -> None:
        self._signal = number                                               # for checkpoint_due
        if self.world == 1 or number == signal.SIGINT:                      # a second one aborts;
            self._signals.close()                                           # torchrun sends TERM on
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")


def _pick_device(name: str) -> torch.device:
    """The device of --device; under torchrun each process has a GPU of its own."""
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError                                  # mps has no float64
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):                      # no such name, or no such GPU
        n = torch.cuda.device_count()
        raise RunError(f"--device {name} is not to be had: give auto or cpu"
                       + f", or cuda, or cuda:<number> below {n}" * (n > 0)) from None
    return device


def open_run(args, script_path, argv: list[str] | None = None) -> Run:
    """Claim and lock out_dir/<script>/<dataset>/<seed>. RunError if it is in use, or the flags do
    not fit what it holds. Nothing there changes before Run.start and Run.load."""
    script, argv = Path(script_path).resolve(), sys.argv[1:] if argv is None else argv
    run = Run(args, script, argv, _pick_device(args.device), *distributed())
    for flag in [f for f in vars(args) if "batch" in f and f != "eval_batch"]:
        if vars(args)[flag] % run.world:
            raise RunError(f"--{flag}: give a multiple of the {run.world} processes")
    git = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    found = shutil.which("git") and subprocess.run(git, cwd=script.parent, capture_output=True,
                                                   text=True).stdout.strip()
    if getattr(args, "fid", False) and run.rank == 0:
        _inception_weights(args.data_dir)                       # now, not after the training
    gpu = run.device.type == "cuda"
    run._about = {"device": torch.cuda.get_device_name(run.device) if gpu else "cpu",
                  "processes": run.world, "torch": torch.__version__, "commit": found or None,
                  "command": shlex.join(["python", script.name, *argv])}
    if run.rank == 0:
        try:
            _claim(run)
        except RunError:
            run.close()
            raise
    for number in (signal.SIGINT, signal.SIGTERM):
        run._signals.callback(signal.signal, number, signal.signal(number, run._on_signal))
    return run


def _claim(run: Run) -> None:
    """Lock the folder, then refuse it if it holds another run than the flags ask for."""
    run.dir.mkdir(parents=True, exist_ok=True)
    lock = run.enter_context(open(run.dir / ".lock", "a"))      # freed even by kill -9
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{run.dir} is in use by another process") from None
    args = run.args
    if args.overwrite and (args.resume or args.eval_only):
        raise RunError("--overwrite would delete what --resume and --eval_only need: give one")
    if args.checkpoint and not (args.resume or args.eval_only):
        raise RunError("--checkpoint needs --resume or --eval_only")
    for left in run.dir.glob(".*.tmp"):                         # by a kill -9
        left.unlink(missing_ok=True)
    used = {file.name for file in run.dir.iterdir()} - {".lock", "config.json", "source.py"}
    if args.resume or args.eval_only:
        path = Path(args.checkpoint or run.dir / "checkpoint.pt")
        if not path.exists():
            raise RunError(f"--{'resume' if args.resume else 'eval_only'}: there is no {path}")
    own = str((run.dir / "checkpoint.pt").resolve())
    resume = args.resume and own == str(Path(args.checkpoint or own).resolve())
    if used and not (resume or args.overwrite or args.eval_only):
        choice = "--resume, --eval_only or " * ("checkpoint.pt" in used) + "--overwrite"
        raise RunError(f"{run.dir} holds a run: give {choice}, or another --seed or --out_dir")
