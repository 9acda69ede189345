"""Multimodal energy-based model with a multimodal VAE via MCMC revision
(Cui, Lao, Yu, TMLR 2026, arXiv 2605.00644).

Three models learn from each other. A generator proposes all modalities from one latent, Langevin
steps under a joint energy-based model (EBM) revise them; an inference model proposes latents of
data, Langevin steps under the generator's posterior revise these. Generator and inference model
regress on the revised samples, so that the next proposals need less revision.

Model       generator  p_w(X,z) = p(z) prod_m p_w(x_m|z)     Normal, Laplace or categorical p_w;
                       p(z) = N(0, I), or Laplace(0, 1): --base laplace
            inference  q(z|X)   = 1/M sum_m N(z; mu_m(x_m), diag var_m(x_m))    mixture of experts
            EBM        pi(X)    = exp f(X) / Z,  f = ebm: the NEGATIVE energy, high = likely
Symbols     x {m: [b c h w] in [0, 1] | [b l] tokens}; state {m: images in [-1, 1] | logits
            [b l v]}; z [b d]; x_rev, z_rev revised samples (X~, z~); s step size, n noise_std

Algorithm, for each batch X
  1 z ~ p(z), X_0 = g(z);  X~: k_x steps  X <- X + s^2/2 d f/dX + n eps   from X_0, all jointly
  2 z_0 ~ q(z|X), or q* (D5);  z~: k_z steps  z <- z + s^2/2 d[log p(z) + log p_w(X|z)]/dz + n eps
  3 generator  ascends  l_rec log p_w(X|z~) + l_syn log p_w(X~|z)
  4 inference  ascends  log q(z~|X) + l_inf log q(z|X~)
  5 EBM        ascends  f(X) - f(X~)
Nothing is differentiated through a chain. Stationary law of a chain with n < s: density^(1/T),
temperature T = (n/s)^2 (as s -> 0); only n = s samples the density itself. The x chain has n << s,
close to ascent on f: its short run is part of the model. Spectral norm keeps |df/dx| <= 1 (mlp,
late fusion), so x moves by k_x s^2/2 at most: s must suit the distance of a wrong from a right
picture.

Usage
  python ebm_revision.py     synthetic digits, 10 CPU minutes: joint 0.72, unrevised 0.67
  python ebm_revision.py --dataset polymnist --data_dir DIR
  python results/ablation.py                             a table of variants (results/README.md)

Deviations. The paper's body was not at hand: values are of the authors' unimodal code or ours.
  D1 text is revised on its logits; the energy sees softmax(logits) times an embedding
  D2 chains use fixed spectral norms, normalised weights computed once a chain; no BatchNorm
  D3 a chain started at noise has no latent: its terms of steps 3 and 4 are left out
  D4 the z chain has 1 / (2 sigma^2) (theirs 1 / sigma^2); X~ of step 1 is reused in 5 (theirs runs
     the chain again: --rerun_chain); --weights paper (1, 1, 1) or ancestor (1, 50, 0.1)
  D5 --warmup epochs train a multimodal VAE: ELBO under the experts' product q* (`product`), each
     expert by -log q_m(z|x_m) on its z. Training's z chains start from q*, too; from the mixture
     (--z_init random), as all do at test, they have to be longer: at 5 steps training collapsed.
     --product faded: else wide experts can chase q* to infinity (synthetic pairs: they did not, and
     the preset is what was measured). Wide sigma: q* fills the prior; Adam with momentum
  D6 --mixed: last epochs (synthetic pairs: one) for the EBM alone, half its chains from tuples of
     data with shuffled modalities; without (0), it does not tell matched from mixed tuples
  D7 --w_dim: private latents, as in MMVAE+. All latents stand in one row (z, w_1 .. w_M); p(x_m|z)
     sees z and w_m, expert m infers z and w_m from x_m. In q every expert for z comes with all
     q_j(w_j|x_j), and with p(w_j) for a modality that is not observed (a Normal of its variance
     under --base laplace). The paper's z is shared only
  D8 --ema: chains start at an average of the generator's weights, training's and the test's
"""
import argparse
import copy
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn
from torch.distributions import Laplace, Normal
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import common
import data

# ---- Config --------------------------------------------------------------------------------------
FULL = dict(z_dim=64, width=64, net="resnet", sigma=0.3, batch_size=100, epochs=100, warmup=0,
            x_steps=30, x_step_size=0.5, z_steps=10, lr_ebm=1e-4, lr_gen=3e-4, lr_enc=1e-4,
            gamma=0.998, weight_decay=5e-4, z_init="random")                # steps, rates: theirs
PRESETS = {"synth_mnist_svhn": dict(epochs=21, mixed=1, x_steps_test=60, product="clamped"),
           "synth_polymnist": {}, "mnist_svhn": FULL, "cub": FULL, "polymnist": FULL,
           "polymnist10": dict(FULL, n_modalities=10)}
WEIGHTS = {"paper": dict(l_rec=1.0, l_syn=1.0, l_inf=1.0),
           "ancestor": dict(l_rec=1.0, l_syn=50.0, l_inf=0.1)}
INFERENCE_FLAGS = ("x_steps_test", "cond_z_steps")                          # not for training
MAX_LOSS = 1e8                                              # nats; a loss beyond it has diverged


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Explicit flag > preset of --dataset, --weights > default, as --help shows."""
    number, switch = common.number, argparse.BooleanOptionalAction
    p = common.run_parser("ebm_revision.py", __doc__, "synth_mnist_svhn", [*PRESETS, "paired"])
    flag = p.add_argument_group("model").add_argument
    flag("--z_dim", type=number(int, 1), default=16, help="shared by all modalities")
    flag("--w_dim", type=number(int, 0), default=0, help="private to each (D7)")
    flag("--base", default="gaussian", choices=["gaussian", "laplace"], help="p(z), p(w_m)")
    flag("--width", type=number(int, 4), default=8, help="channels; MLP: 32 times that")
    flag("--net", default="mlp", choices=["mlp", "resnet"], help="of images")
    flag("--fusion", default="late", choices=["late", "early", "additive"], help="of the energy")
    flag("--decoder_dist", default="normal", choices=["normal", "laplace"])
    flag("--sigma", type=number(float, 0, open_low=True), default=2.0, help="scale of p(x|z)")
    flag = p.add_argument_group("training").add_argument
    flag("--epochs", type=number(int, 0), default=20)
    flag("--warmup", type=number(int, 0), default=16, help="first epochs: the VAE alone")
    flag("--mixed", type=number(int, 0), default=0, help="last epochs: EBM, mixed starts (D6)")
    flag("--staged", action=switch, default=False, help="after warmup the EBM learns alone")
    flag("--max_steps", type=number(int, 0), default=0, help="0: epochs decide")
    flag("--batch_size", type=number(int, 1), default=64, help="over all processes")
    flag("--weights", default="paper", choices=list(WEIGHTS), help="sets the next three")
    flag("--l_rec", type=number(float, 0), default=1.0, help="of log p(X|z_rev)")
    flag("--l_syn", type=number(float, 0), default=1.0, help="of log p(X_rev|z)")
    flag("--l_inf", type=number(float, 0), default=1.0, help="of log q(z|X_rev)")
    flag("--nll", default="per_expert", choices=["per_expert", "mixture"], help="-log q(z|X)")
    flag("--rerun_chain", action=switch, default=False, help="a second x chain, for the EBM")
    flag("--lr_ebm", type=number(float, 0, open_low=True), default=5e-4)
    flag("--lr_mixed", type=number(float, 0, open_low=True), default=1e-3, help="EBM, --mixed")
    flag("--lr_gen", type=number(float, 0, open_low=True), default=1e-3)
    flag("--lr_enc", type=number(float, 0, open_low=True), default=1e-3)
    flag("--weight_decay", type=number(float, 0), default=0.0, help="generator and inference")
    flag("--gamma", type=number(float, 0, 1, open_low=True), default=0.9, help="lr, an epoch")
    flag("--max_gap", type=number(float, 0, open_low=True), default=1e4, help="|f(X)-f(X_rev)|")
    flag("--ema", type=number(float, 0, 0.9999), default=0.0, help="chain starts (D8)")
    flag("--ebm_reg", type=number(float, 0), default=0.0, help="times mean f^2 of data and revised")
    flag = p.add_argument_group("sampler").add_argument
    flag("--x_init", default="generator", choices=["generator", "noise"])
    flag("--z_init", default="product", choices=["product", "random", "stratified", "noise"],
         help="q*, a random expert an item, every expert, p(z)")
    flag("--product", default="faded", choices=["faded", "clamped"], help="pull of a vague expert")
    flag("--x_steps", type=number(int, 0), default=10, help="k_x")
    flag("--x_steps_test", type=number(int, 0), default=30)
    flag("--x_step_size", type=number(float, 0, open_low=True), default=1.4)
    flag("--x_noise", type=number(float, 0), default=1e-3, help="temperature (x_noise / step)^2")
    flag("--z_steps", type=number(int, 0), default=5, help="k_z")
    flag("--cond_z_steps", type=number(int, 0), default=10, help="given some modalities")
    flag("--z_step_size", type=number(float, 0, open_low=True), default=0.1)
    flag("--z_noise", type=number(float, 0), default=0.1)
    flag("--clip", type=number(float, 0), default=0.0, help="chains' largest gradient; 0: any")
    p.set_defaults(**PRESETS.get(common.peek(p, argv, "dataset"), {}),
                   **WEIGHTS.get(common.peek(p, argv, "weights"), {}))
    args = p.parse_args(argv)
    if args.epochs and args.warmup + max(args.mixed, 1) > args.epochs:
        p.error("--warmup and --mixed leave no epoch of --epochs for the EBM")
    if args.mixed and args.batch_size < 2:
        p.error("--mixed needs --batch_size 2 or more: half of the chains start at shuffled data")
    if args.staged and not args.warmup:
        p.error("--staged needs --warmup: nothing else trains the generator")
    return args


# ---- Networks ------------------------------------------------------------------------------------
def mlp(*sizes: int) -> list[nn.Module]:
    """Linear layers of these sizes, LeakyReLU between them."""
    layers = [(nn.Linear(a, b), nn.LeakyReLU(0.2)) for a, b in zip(sizes, sizes[1:])]
    return sum(map(list, layers), [])[:-1]


class ResBlock(nn.Module):
    """[b a h w] -> [b out h' w']: shortcut plus two convolutions; half the size, or up: twice."""

    def __init__(self, a: int, out: int, up: bool = False):
        super().__init__()
        self.up, self.skip = up, nn.Conv2d(a, out, 1)
        self.body = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(a, out, 3, 1, 1), nn.LeakyReLU(0.2),
                                  nn.Conv2d(out, out, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2) if self.up else x
        x = self.skip(x) + self.body(x)
        return x if self.up else F.avg_pool2d(x, 2)


def trunk(shape: tuple[int, ...], width: int, net: str) -> tuple[nn.Module, int]:
    """State of shape (c, h, w) or (l, v) -> features [b f], and f. Images: 2 linear layers (mlp) or
    2 residual blocks. Text: embedded, two 1-D convolutions, mean."""
    if len(shape) == 2:
        return nn.Sequential(
            nn.Softmax(-1), nn.Linear(shape[1], 128, bias=False), Rearrange("b l e -> b e l"),
            nn.Conv1d(128, 128, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv1d(128, 128, 3, 1, 1),
            nn.LeakyReLU(0.2), Reduce("b e l -> b e", "mean")), 128
    if net == "mlp":
        f = 32 * width
        return nn.Sequential(nn.Flatten(), *mlp(math.prod(shape), f, f), nn.LeakyReLU(0.2)), f
    a, b, c = width, 2 * width, 4 * width
    return nn.Sequential(nn.Conv2d(shape[0], a, 3, 1, 1), ResBlock(a, b), ResBlock(b, c),
                         nn.LeakyReLU(0.2), nn.Flatten()), c * (shape[1] // 4) * (shape[2] // 4)


class Encoder(nn.Module):
    """State of one modality -> (mu, log_var), both [b dim]."""

    def __init__(self, shape: tuple[int, ...], width: int, dim: int, net: str):
        super().__init__()
        self.body, f = trunk(shape, width, net)
        self.head = nn.Linear(f, 2 * dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.head(self.body(x)).float().chunk(2, 1)
        return mu, log_var.clamp(-10, 4)                    # variance in [5e-5, 55]


def decoder(shape: tuple[int, ...], width: int, dim: int, net: str) -> nn.Sequential:
    """latents [b dim] -> state: image in (-1, 1) by linear layers or residual blocks, or logits."""
    if len(shape) == 2:
        return nn.Sequential(*mlp(dim, 512, shape[0] * shape[1]), nn.Unflatten(1, shape))
    if net == "mlp":
        f = 32 * width
        return nn.Sequential(*mlp(dim, f, f, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape))
    if any(side % 4 for side in shape[1:]):
        raise ValueError(f"--net resnet needs sides that are multiples of 4, not {shape}")
    c, h, w = 4 * width, shape[1] // 4, shape[2] // 4
    return nn.Sequential(nn.Linear(dim, c * h * w), nn.Unflatten(1, (c, h, w)),
                         ResBlock(c, c // 2, up=True), ResBlock(c // 2, width, up=True),
                         nn.LeakyReLU(0.2), nn.Conv2d(width, shape[0], 3, 1, 1), nn.Tanh())


class Energy(nn.Module):
    """f(state) [b], the NEGATIVE energy of all modalities together; spectral norm in every layer.

    late: a trunk a modality, then an MLP on all their features. early: images of one size stacked
    by channel. additive: sum_m f_m(x_m), which cannot tell a coherent tuple from a mixed one.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], width: int, fusion: str, net: str):
        super().__init__()
        self.fusion, self.trunks = fusion, nn.ModuleDict()
        if fusion == "early":
            first = next(iter(shapes.values()))
            if len({s[1:] for s in shapes.values()}) > 1 or len(first) < 3:
                raise ValueError("--fusion early needs images of one size in every modality")
            shapes = {"all": (sum(s[0] for s in shapes.values()), *first[1:])}
        n = 0
        for m, shape in shapes.items():
            body, f = trunk(shape, width, net)
            out = 1 if fusion == "additive" else 128
            self.trunks[m], n = nn.Sequential(body, nn.Linear(f, out)), n + out
        self.head = nn.Identity() if fusion == "additive" else nn.Sequential(
            nn.LeakyReLU(0.2), *mlp(n, 256, 128, 1))
        for layer in list(self.modules()):
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv1d)):
                spectral_norm(layer)

    def forward(self, state: dict[str, Tensor]) -> Tensor:
        if self.fusion == "early":
            state = {"all": torch.cat(list(state.values()), 1)}
        return self.head(torch.cat([net(state[m]) for m, net in self.trunks.items()], 1)).sum(1)


class Revision(nn.Module):
    """All nets for states of shapes {m: (c, h, w) | (l, v)}: ebm, decoders, encoders. Latents are
    rows (z, w_1 .. w_M), [b d], the w empty without --w_dim (D7)."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], args: argparse.Namespace):
        super().__init__()
        self.shapes, self.z_dim, self.w_dim, self.base = shapes, args.z_dim, args.w_dim, args.base
        self.faded = args.product == "faded"
        self.ebm = Energy(shapes, args.width, args.fusion, args.net)
        sizes = args.width, args.z_dim + args.w_dim, args.net
        self.decoders = nn.ModuleDict({m: decoder(s, *sizes) for m, s in shapes.items()})
        self.encoders = nn.ModuleDict({m: Encoder(s, *sizes) for m, s in shapes.items()})
        self.ema = args.ema                                 # of starts, the generator's average
        self.starts = copy.deepcopy(self.decoders).requires_grad_(False) if args.ema else None

    def prior(self, n: int, device: torch.device | str) -> Tensor:
        """n latents of p(z) and every p(w_m): [n d]."""
        shape = n, self.z_dim + len(self.decoders) * self.w_dim
        if self.base == "laplace":
            return Laplace(torch.zeros(shape, device=device), 1.0).sample()
        return torch.randn(shape, device=device)

    def experts(self, state: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(mu, log_var) [b d] of each modality in state: its q_m(z|x_m), all q_j(w_j|x_j); a w_j
        that nobody observed has the mean and variance of p(w_j)."""
        found = {m: self.encoders[m](v) for m, v in state.items()}
        (first, _), d = next(iter(found.values())), self.z_dim
        mean = first.new_zeros(len(first), self.w_dim)
        unseen = mean, mean + math.log(prior_var(self.base))
        w = [torch.cat([found[m][i][:, d:] if m in found else unseen[i] for m in self.encoders], 1)
             for i in (0, 1)]
        return [tuple(torch.cat([part[:, :d], rest], 1) for part, rest in zip(expert, w))
                for expert in found.values()]

    def generate(self, z: Tensor, names=None, start: bool = False) -> dict[str, Tensor]:
        """g(z), latents [b d] -> the mean state of every modality, or of names; start: of chains,
        by the averaged weights if there are any."""
        nets, d = self.starts if start and self.ema else self.decoders, self.z_dim
        w = {m: z[:, d + i * self.w_dim:][:, :self.w_dim] for i, m in enumerate(nets)}
        return {m: net(torch.cat([z[:, :d], w[m]], 1)).float()              # float: under --amp
                for m, net in nets.items() if names is None or m in names}

    @torch.no_grad()
    def follow(self) -> None:
        """starts <- ema starts + (1 - ema) decoders."""
        for average, p in zip(self.starts.parameters(), self.decoders.parameters()):
            average.lerp_(p, 1 - self.ema)

    def to_state(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images [0, 1] -> [-1, 1]; tokens -> log probabilities, a one-hot smoothed by 0.05."""
        return {m: 2 * v - 1 if v.is_floating_point() else
                (0.95 * F.one_hot(v, self.shapes[m][1]) + 0.05 / self.shapes[m][1]).log()
                for m, v in x.items()}

    def to_data(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: images clamped to [0, 1], tokens by argmax."""
        return {m: v.argmax(-1) if v.ndim == 3 else ((v + 1) / 2).clamp(0, 1)
                for m, v in state.items()}


# ---- Densities and losses ------------------------------------------------------------------------
def prior_var(base: str) -> float:
    """Variance of p(z)."""
    return {"gaussian": 1.0, "laplace": 2.0}[base]


def log_prior(z: Tensor, base: str) -> Tensor:
    """log p(z) [b] up to a constant, z [b d]."""
    return -(z.abs() if base == "laplace" else 0.5 * z.square()).sum(1)


def kl_to_prior(mu: Tensor, log_var: Tensor, base: str) -> Tensor:
    """KL(N(mu, diag exp log_var) || p(z)) [b] in closed form; for Laplace by the mean of |z|."""
    if base == "gaussian":
        return 0.5 * (mu**2 + log_var.exp() - log_var - 1).sum(1)
    ratio = mu * (-0.5 * log_var).exp() / math.sqrt(2)
    folded = math.sqrt(2 / math.pi) * (0.5 * log_var - ratio**2).exp() + mu * torch.erf(ratio)
    return (folded + math.log(2) - 0.5 * (log_var + math.log(2 * math.pi) + 1)).sum(1)


def log_lik(state: dict[str, Tensor], mean: dict[str, Tensor], sigma: float, dist: str) -> Tensor:
    """log p(X|z) [b] up to a constant, sum over the modalities in state.

    Images: -|x - g|^2 / (2 sigma^2), or -|x - g|_1 / sigma (laplace). Text: cross-entropy between
    the state's distribution over words and the decoder's.
    """
    log_p = 0.0
    for m, x in state.items():
        if x.ndim == 3:
            log_p = log_p + reduce(x.softmax(-1) * mean[m].log_softmax(-1), "b l v -> b", "sum")
        elif dist == "laplace":
            log_p = log_p - reduce((x - mean[m]).abs(), "b ... -> b", "sum") / sigma
        else:
            log_p = log_p - reduce((x - mean[m]) ** 2, "b ... -> b", "sum") / (2 * sigma**2)
    return log_p


def nll_q(z: Tensor, experts: list[tuple[Tensor, Tensor]], mode: str) -> Tensor:
    """-log q(z|X) [b] of the experts' (mu, log_var); z [b d], or [k b d] with row m from expert m.

    mixture: exact, -logsumexp_m log q_m(z) + log k. per_expert: mean_m -log q_m(z), each expert
    on its own row if there are rows; it teaches every expert to cover the posterior.
    """
    rows = z if z.ndim == 3 else z[None]
    log_q = torch.stack([Normal(mu, (lv / 2).exp(), validate_args=False).log_prob(rows).sum(-1)
                         for mu, lv in experts], 1)                         # [rows k b]
    if mode == "mixture":
        return (math.log(len(experts)) - log_q.logsumexp(1)).mean(0)
    return -(log_q[0].mean(0) if z.ndim == 2 else log_q.diagonal().mean(1))


def product(experts: list[tuple[Tensor, Tensor]], z_dim: int, var: float = 1.0,
            faded: bool = True) -> tuple[Tensor, Tensor]:
    """(mu, log_var) [b d] of q*(z|X) ~ p(z)^(1-M) prod_m q_m(z|x_m), p = N(0, var): the posterior
    if q_m is p(z|x_m). A variance above the prior's counts as the prior's, so that q* is a density;
    faded: not in the pull mu_m / var_m, else M agreeing wide experts pull q* to M times their mean,
    and those that regress on it follow. From column z_dim on all say the same, q_j(w_j|x_j)."""
    own = torch.stack([(-log_var[:, :z_dim]).exp() for _, log_var in experts])
    precision = own.clamp(min=1 / var)
    total = precision.sum(0) - (len(experts) - 1) / var
    mu = torch.stack([mu[:, :z_dim] for mu, _ in experts])
    mu = ((own if faded else precision) * mu).sum(0) / total
    w_mu, w_log_var = (part[:, z_dim:] for part in experts[0])
    return torch.cat([mu, w_mu], 1), torch.cat([-total.log(), w_log_var], 1)


def loss_warmup(model: nn.Module, state, args) -> Tensor:
    """-log p(X|z) + KL(q*(z|X) || p(z)) - log q(z|X), z ~ q*: the ELBO with gradients through z
    and q*, and the experts' fit to z held fixed; mean over the batch."""
    experts = model.experts(state)
    mu, log_var = product(experts, model.z_dim, prior_var(args.base), model.faded)
    z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
    kl = kl_to_prior(mu, log_var, args.base)
    log_px_z = log_lik(state, model.generate(z), args.sigma, args.decoder_dist)
    return (kl - log_px_z + nll_q(z.detach(), experts, args.nll)).mean()


def loss_generator(model: Revision, state, z_rev, z, x_rev, args) -> Tensor:
    """-l_rec log p(X|z_rev) - l_syn log p(X_rev|z), means over the batch: of z_rev
    and the state it is of, which may be k b items, and of z."""
    rec = log_lik(state, model.generate(z_rev), args.sigma, args.decoder_dist).mean()
    syn = 0.0 if x_rev is None else log_lik(x_rev, model.generate(z), args.sigma,
                                            args.decoder_dist).mean()
    return -args.l_rec * rec - args.l_syn * syn


def loss_inference(model: Revision, state, z_rev, z, x_rev, args) -> Tensor:
    """-log q(z_rev|X) - l_inf log q(z|X_rev), means over the batch."""
    loss = nll_q(z_rev, model.experts(state), args.nll).mean()
    if x_rev is not None:
        loss = loss + args.l_inf * nll_q(z, model.experts(x_rev), args.nll).mean()
    return loss


def loss_energy(ebm: nn.Module, state, x_rev, reg: float = 0.0) -> tuple[Tensor, Tensor]:
    """mean f(X_rev) - mean f(X) + reg (mean f(X)^2 + mean f(X_rev)^2), and f(X) - f(X_rev)."""
    f = ebm({m: torch.cat([v, x_rev[m]]) for m, v in state.items()}).float()
    f_data, f_rev = f.chunk(2)
    gap = f_data.mean() - f_rev.mean()
    return -gap + reg * (f_data.square().mean() + f_rev.square().mean()), gap.detach()


# ---- Sampler -------------------------------------------------------------------------------------
def langevin(log_prob, z: Tensor, n_steps: int, step_size: float, noise_std: float | None = None,
             trace: list | None = None, clip: float = 0.0) -> Tensor:
    """z <- z + s^2/2 d log p(z)/dz + n eps, eps ~ N(0, I): n_steps of it, [b d] -> [b d] detached.

    log_prob [b d] -> [b]; noise_std n, default s. With n = s the law tends to p as s -> 0 (variance
    v / (1 - s^2 / 4v) on N(0, v)); with n != s to p^(1/T), T = (n/s)^2. trace gets every state.
    clip: gradients that are longer, row by row, are cut to it; the law then is another one.
    """
    noise_std, z = step_size if noise_std is None else noise_std, z.detach()
    for _ in range(n_steps):
        z = z.detach().requires_grad_(True)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(log_prob(z).sum(), z)             # sum: no 1/b factor
        if clip:
            grad = grad * (clip / grad.norm(dim=1, keepdim=True)).clamp(max=1)
        z = z.detach() + 0.5 * step_size**2 * grad + noise_std * torch.randn_like(z)
        if trace is not None:
            trace.append(z)
    return z.detach()


@contextmanager
def frozen(net: nn.Module):
    """Parameters of a net without gradient, eval mode, weights normalised once."""
    mode, grads = net.training, [p.requires_grad for p in net.parameters()]
    net.eval().requires_grad_(False)
    try:
        with parametrize.cached():
            yield
    finally:
        net.train(mode)
        for p, grad in zip(net.parameters(), grads):
            p.requires_grad_(grad)


def unpack(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """[b n] -> tensors of like's shapes, which stood side by side in it."""
    parts = flat.split([v[0].numel() for v in like.values()], 1)
    return {m: part.reshape(v.shape) for (m, v), part in zip(like.items(), parts)}


def revise_x(ebm: nn.Module, state: dict[str, Tensor], n_steps: int, args, observed=(),
             trace: list | None = None) -> dict[str, Tensor]:
    """n_steps of Langevin on exp f from state, jointly in all modalities but the observed ones,
    whose tensors are returned as they came. trace gets the flat free state [b n] of each step."""
    state = {m: v.detach() for m, v in state.items()}
    free = {m: v for m, v in state.items() if m not in observed}
    if not free or n_steps == 0:
        return state
    x = torch.cat([v.flatten(1) for v in free.values()], 1)
    with frozen(ebm):
        x = langevin(lambda flat: ebm(state | unpack(flat, free)), x, n_steps, args.x_step_size,
                     args.x_noise, trace, args.clip)
    return state | unpack(x, free)


def revise_z(model: Revision, z: Tensor, state: dict[str, Tensor], n_steps: int, args) -> Tensor:
    """n_steps of Langevin on p(z) prod_m p(x_m|z), over the modalities in state: [b d]."""
    def log_joint(z):
        log_px_z = log_lik(state, model.generate(z, state), args.sigma, args.decoder_dist)
        return log_px_z + log_prior(z, args.base)
    with frozen(model.decoders):
        return langevin(log_joint, z, n_steps, args.z_step_size, args.z_noise, clip=args.clip)


@torch.no_grad()
def sample_q(model: Revision, state: dict[str, Tensor], moe: str = "random") -> Tensor:
    """z ~ q(z|x): [b d], a random expert an item; stratified: a row each, [k b d]; product: q*."""
    experts = model.experts(state)
    if moe == "product":
        experts = [product(experts, model.z_dim, prior_var(model.base), model.faded)]
    z = torch.stack([mu + (0.5 * lv).exp() * torch.randn_like(mu) for mu, lv in experts])
    b = torch.arange(z.shape[1], device=z.device)
    return z if moe == "stratified" else z[torch.randint(len(z), b.shape, device=z.device), b]


@torch.no_grad()
def sample_joint(model: Revision, z: Tensor, init: str, n_steps: int, args,
                 mixed: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """n_steps of revision from the generator's states for z [b d], or from normal noise; the first
    rows start at mixed, if given."""
    start = model.generate(z, start=True) if init == "generator" else {
        m: torch.randn(len(z), *shape, device=z.device) for m, shape in model.shapes.items()}
    for m, v in (mixed or {}).items():
        start[m] = torch.cat([v, start[m][len(v):]])
    return revise_x(model.ebm, start, n_steps, args)


def recombine(state: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """n tuples [n ...] of which modality j is that of data item i + j: real, but incoherent."""
    return {m: v.roll(-j, 0)[:n] for j, (m, v) in enumerate(state.items())}


@torch.no_grad()
def sample_given(model: Revision, state: dict[str, Tensor], n_steps: int, args) -> dict:
    """All modalities given those in state, which stay bit for bit: z from a random expert, z steps
    with the observed likelihood, the generator's rest, n_steps of revision."""
    z = revise_z(model, sample_q(model, state), state, args.cond_z_steps, args)
    return revise_x(model.ebm, model.generate(z, start=True) | state, n_steps, args, tuple(state))


# ---- Training ------------------------------------------------------------------------------------
def train_step(model: Revision, x: dict[str, Tensor], opts: dict, args, phase="full") -> dict:
    """Steps 1 to 5 of the docstring on a batch. phase: full; warmup of the VAE; ebm
    alone; mixed: ebm alone, the first half of the chains from shuffled data (D6)."""
    state = model.to_state(x)
    first = next(iter(state.values()))
    z, metrics = model.prior(len(first), first.device), {}

    def step(key, loss, *names):
        names = names or (key,)
        for name in names:
            opts[name].zero_grad(set_to_none=True)
        loss.backward()
        for name in names:
            opts[name].step()
        if model.ema and "gen" in names:
            model.follow()
        metrics[f"loss_{key}"] = loss.detach()

    with torch.autocast(z.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        if phase == "warmup":
            step("warmup", loss_warmup(model, state, args), "gen", "enc")
            return metrics
        mixed = recombine(state, len(z) // 2) if phase == "mixed" else None
        x_rev = sample_joint(model, z, args.x_init, args.x_steps, args, mixed)
        if phase == "full":
            z_0 = model.prior(len(z), z.device) if args.z_init == "noise" else \
                sample_q(model, state, args.z_init)
            flat, given = z_0.reshape(-1, z.shape[1]), state                # [(k b) d]
            if args.z_init == "stratified":
                given = {m: repeat(v, "b ... -> (k b) ...", k=len(z_0)) for m, v in state.items()}
            z_rev = revise_z(model, flat, given, args.z_steps, args)
            paired = None if args.x_init == "noise" else x_rev              # D3
            step("gen", loss_generator(model, given, z_rev, z, paired, args))
            z_rev = z_rev.reshape(z_0.shape)
            step("enc", loss_inference(model, state, z_rev, z, paired, args))
        if args.rerun_chain and phase == "full":                            # else nets are the same
            x_rev = sample_joint(model, z, args.x_init, args.x_steps, args, mixed)
        loss, metrics["gap"] = loss_energy(model.ebm, state, x_rev, args.ebm_reg)
        step("ebm", loss)
    return metrics


def make_optimizers(model: Revision, args, world: int) -> dict:
    """Adam for each net; gradients averaged over the ranks before a step."""
    opts = {}
    for name, net, lr in (("gen", model.decoders, args.lr_gen),
                          ("enc", model.encoders, args.lr_enc), ("ebm", model.ebm, args.lr_ebm)):
        params = list(net.parameters())
        betas, decay = ((0.0, 0.9), 0.0) if name == "ebm" else ((0.9, 0.999), args.weight_decay)
        opts[name] = torch.optim.Adam(params, lr, betas, weight_decay=decay, fused=True)
        opts[name].register_step_pre_hook(
            lambda *_, params=params: common.average_gradients(params, world))
    return opts


def train(model: Revision, train_set: data.Dataset, args, run) -> None:
    """Epochs of train_step; resumes exactly; goes back to a checkpoint when chains diverge."""
    opts = make_optimizers(model, args, run.world)
    parts = {"model": model, **opts}
    per_epoch = max(len(train_set) // args.batch_size, 1)
    total = min(args.epochs * per_epoch, args.max_steps or args.epochs * per_epoch)

    def restore(state):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save():
        run.save({"step": step, "stage": int(step >= total)}
                 | {name: part.state_dict() for name, part in parts.items()})

    step = restore(run.load(args.checkpoint, free=INFERENCE_FLAGS)) if args.resume else 0
    save()
    model.train()
    worst = torch.zeros((), device=run.device)
    while step < total:
        epoch = step // per_epoch
        phase = "warmup" if epoch < args.warmup else "mixed" if epoch >= args.epochs - args.mixed \
            else "ebm" if args.staged else "full"
        for name, opt in opts.items():
            age = max(epoch - args.warmup, 0) if name == "ebm" else epoch
            lr = args.lr_mixed if phase == "mixed" else vars(args)[f"lr_{name}"] * args.gamma**age
            opt.param_groups[0]["lr"] = lr * (0.5**run.rollbacks if name == "ebm" else 1)
        order = torch.Generator().manual_seed(args.seed * 10**6 + epoch)
        for x in data.batches(train_set, args.batch_size, order, run.device, step % per_epoch,
                              run.rank, run.world):
            metrics = train_step(model, x, opts, args, phase)
            step += 1
            sane = torch.stack([v.abs() < MAX_LOSS for v in metrics.values()]).all()
            gap = metrics.get("gap", worst * 0).abs().float()
            worst = torch.maximum(worst, torch.where(sane, gap, math.nan))
            due, shown = run.checkpoint_due(), step % args.log_every == 0 or step == total
            if (due or shown) and common.max_over_ranks(~(worst < args.max_gap), run.world):
                values = ", ".join(f"{k} {v:.3g}" for k, v in metrics.items())
                step = restore(run.rollback(
                    f"f(X) - f(X_rev) or a loss diverged by step {step} ({values}; if not f: lower "
                    "--x_step_size or --z_step_size, --product faded, more --z_steps)"))
                worst = torch.zeros_like(worst)
                break                                                       # order from its epoch
            if shown:
                run.log(stage=phase, step=step, epoch=epoch, split="train", **metrics)
                run.progress(phase, epoch, args.epochs, step, total, args.batch_size, **metrics)
            if due:
                save()
            if run.stop_requested:
                run.stop()
            if step == total:
                break
    save()


# ---- Evaluation ----------------------------------------------------------------------------------
def evaluate(model: Revision, train_set: data.Dataset, test: data.Dataset, args, run) -> dict:
    """Every figure twice: revised by the EBM, and with _initial of the generator alone; _noise:
    chains from noise."""
    run.begin_evaluation()
    model.requires_grad_(False).eval()
    device, k = run.device, args.x_steps_test
    judges = common.load_judges(train_set, test, run.judges, device, run.say)
    inception = common.load_inception(args, device)
    real = common.reference(test, train_set, judges, inception, args.n_eval)
    metrics = dict(real.metrics)

    def joint(init, n_steps):
        return lambda b: model.to_data(sample_joint(
            model, model.prior(b, device), init, n_steps, args))

    def given(n_steps):
        def generate(x, targets):
            if not targets:
                return {}
            made = sample_given(model, model.to_state(x), n_steps, args)
            return {m: v for m, v in model.to_data(made).items() if m in targets}
        return generate

    for suffix, init, n_steps in (("", "generator", k), ("_initial", "generator", 0),
                                  ("_noise", "noise", k)) if real.extract else ():
        found = common.coherence_joint(joint(init, n_steps), judges, args.n_eval, args.eval_batch,
                                       real)
        if init == "generator":
            found |= common.coherence_cross(given(n_steps), test, judges, args.eval_batch, real,
                                            run.progress)
        metrics |= {key + suffix: value for key, value in found.items()}
    state = model.to_state(test.take(slice(1000), device))
    matched = model.ebm(state) > model.ebm(recombine(state, 1000))          # D6
    metrics["f_prefers_matched"] = matched.float().mean().item()
    metrics |= latent_metrics(model, train_set, test, args, device)
    metrics |= diagnose_chains(model, args, run)
    images = [m for m in test.modalities if test.kinds[m] == "image"]
    torch.manual_seed(args.seed)
    rows = {f"{m}, initial": v for m, v in joint("generator", 0)(16).items() if m in images}
    torch.manual_seed(args.seed)
    rows |= {f"{m}, revised": v for m, v in joint("generator", k)(16).items() if m in images}
    common.draw_samples(run.dir, lambda _: rows, given(k), test.take(slice(8), device, images))
    if texts := [m for m in test.modalities if test.kinds[m] == "text"]:    # said of eight images
        said = given(k)(test.take(slice(8), device, images), texts).values()
        common.save_captions(run.dir / "captions.txt", torch.cat([*said]), test.words)
    run.time_samples(joint("generator", k))
    return metrics


def latent_metrics(model: Revision, train_set, test, args, device) -> dict[str, float]:
    """Reconstruction and linear classification of z from q-samples, and from latents that z_steps
    under the whole posterior revised; up to 2,000 items each."""
    def latents(dataset):                                   # z [2 n d], -log p(X|z) [2 n]
        found = []
        for x in data.batches(dataset, args.eval_batch, device=device):
            state = model.to_state(x)
            z = sample_q(model, state)
            z = torch.stack([z, revise_z(model, z, state, args.z_steps, args)])
            found.append((z, torch.stack([-log_lik(state, model.generate(row), args.sigma,
                                                   args.decoder_dist) for row in z])))
        return [torch.cat(part, 1) for part in zip(*found)]
    sets, keys = [train_set.head(2000), test.head(2000)], ("q", "revised")
    (z, _), (z_test, errors) = map(latents, sets)
    metrics = {f"recon_nats_{key}": e for key, e in zip(keys, errors.mean(1).tolist())}
    if test.y is not None:
        metrics |= {f"latent_accuracy_{key}": common.linear_accuracy(
            z[i, :, :model.z_dim], sets[0].y, z_test[i, :, :model.z_dim], sets[1].y)
            for i, key in enumerate(keys)}
    return metrics


def diagnose_chains(model: Revision, args, run) -> dict[str, float]:
    """The x chain, 4 from each of 8 latents: energy, displacement; 4 times longer: ESS."""
    z = repeat(model.prior(8, run.device), "b d -> (b c) d", c=4)
    n, trace, start = args.x_steps_test, [], model.generate(z, start=True)
    end = revise_x(model.ebm, start, n, args)
    metrics = {f"displacement_{m}": (end[m] - v).square().mean().sqrt().item()
               for m, v in start.items()}
    metrics |= {"energy_initial": -model.ebm(start).mean().item(),
                "energy_revised": -model.ebm(end).mean().item()}
    revise_x(model.ebm, start, 4 * max(n, 1), args, trace=trace)            # each [b f]
    energy = torch.stack([-model.ebm(unpack(row, start)) for row in trace])
    chosen = torch.linspace(0, trace[0].shape[1] - 1, 64).long().to(run.device)
    chains = rearrange([row[:, chosen].cpu() for row in trace], "n (b c) d -> n c (b d)", c=4)
    return metrics | common.chain_report(chains, run.dir / "diagnostics.png", energy=energy)


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate; returns the metrics of result.json."""
    args = parse_args(argv)
    with common.open_run(args, __file__, argv) as run:
        common.seed_everything(args.seed)
        sizes = {"train": args.n_train, "test": args.n_test}
        sets = data.load_splits(args.dataset, sizes, args.data_dir, run.device,
                                n_modalities=args.n_modalities)
        try:
            model = Revision(sets["train"].net_shapes, args).to(run.device)
        except ValueError as error:
            raise common.RunError(error) from None
        run.start(model)
        for net in [*model.decoders.values(), *model.encoders.values()] if args.compile else []:
            net.compile()                                                   # f gained nothing (CPU)
        if args.eval_only:
            model.load_state_dict(run.load(args.checkpoint, INFERENCE_FLAGS, 1)["model"])
        else:
            train(model, sets["train"], args, run)
        test = sets["test"].head(args.n_eval)
        metrics = evaluate(model, sets["train"], test, args, run)
        return run.finish(metrics, sets["train"].note, len(test))


if __name__ == "__main__":
    common.cli(main)
