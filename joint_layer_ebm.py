"""Learning joint latent space EBM prior model for multi-layer generator
(Cui, Wu & Han, CVPR 2023, arXiv 2306.06323).

A generator with layers of latent variables has a Gaussian prior, layer upon layer: too simple, for
its samples look worse than reconstructions. Here one energy a layer tilts it, all layers jointly,
and short Langevin chains sample the tilted prior.

Model       p(z) = exp(sum_i f_i(z_i)) p0(z) / Z,      z = [z_1 .. z_L], z_1 beside the image
            p0(z) = N(z_L; 0, I) prod_{i<L} N(z_i; mu_i(z_>i), diag sigma_i(z_>i)^2)
            p(x|z) = N(x; g(z), sigma^2 I),  x in [-1, 1]
Whitened    z = T(eps):  z_L = eps_L,  z_i = mu_i(z_>i) + sigma_i(z_>i) eps_i,  top-down.  Since
            p0(T(eps)) |det dT/deps| = N(eps; 0, I), the tilted prior is, with no determinant left,
            p(eps) proportional to exp(sum_i f_i(T(eps)_i)) N(eps; 0, I)
Symbols     z, eps [b d] flat, layers from the bottom up; f [b L] NEGATIVE energies, high = likely;
            z+ (z_pos) posterior, z- (z_neg) tilted prior, K prior_steps

Algorithm, for each batch x; z+ and z- are constants
  1  z-: K Langevin steps on eps from N(0, I);  z+: scheme mcmc: Langevin on eps given x;
     variational: z ~ q(z|x);  two_stage: z ~ q(z|x) of a VAE trained first and then frozen
  2  energies      minimise  mean f(z-) - mean f(z+)
  3  mcmc          minimise  -log p(x|z+)  and  mean log p0(z-) - mean log p0(z+)
     variational   minimise  -log p(x|z) + KL(q(z|x) || p0(z)) - f(z)  and  mean log p0(z-)

Usage
  python joint_layer_ebm.py   synthetic SVHN-like digits, 10 CPU minutes: distance 13, p0's 80
  python joint_layer_ebm.py --dataset mnist [--held_out 1]  real digits; anomaly detection of 1
  python joint_layer_ebm.py --dataset cifar10 --ood svhn    the authors' two layers; OOD scores
  python joint_layer_ebm.py --scheme two_stage              energies on a deep residual VAE

Deviations from the authors' public code
  D1 chains run on eps (theirs, joint training: on z; --space z) and always start at p0 (theirs:
     all layers from N(0, I)), so that K = 0 is the plain generator
  D2 the target on eps has -|eps|^2 / 2 (theirs, two-stage: log p0(T(eps)), which is not its law)
  D3 log sigma_i is bounded by a tanh to (-3, 3) (theirs is not); chains on z need sigma > s / 2
  D4 p0(z_L) has standard deviation 1 (theirs 1.01)
  D5 two_stage takes steps of 0.1 (theirs 0.006, mnist's here 0.02: a gradient flow)
  D6 a VAE may come first (--epochs_backbone), rates may fall (--decay); diverged runs roll back
"""
import argparse
import math

import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import common
import data

# ---- Config --------------------------------------------------------------------------------------
# cifar10: the authors'; svhn, celeba: its sampler, the predecessor's nets, from memory; rest: ours
SYNTH = dict(scheme="variational", net="ladder", z_dims=[16, 32, 32], f_hidden=[200], f_layers=[2],
             prior_layers=2, prior_steps=40, lr=1e-3, lr_ebm=3e-4, epochs_backbone=5, epochs=2,
             width=24, decay=True)
DIGITS = SYNTH | dict(z_dims=[16, 12, 8], epochs_backbone=15, epochs=15)
ANOMALY = SYNTH | dict(scheme="two_stage", net="mlp", width=256, z_dims=[1, 1, 6], prior_hidden=64,
                       f_hidden=[32, 32, 200], prior_steps=10, prior_step_size=0.02, max_gap=1e5,
                       batch_size=200, lr_ebm=2e-3, epochs_backbone=35, epochs=12, decay=False)
PRESETS = {"synth_svhn": SYNTH, "synth_mnist": DIGITS, "fashion_mnist": DIGITS, "images": SYNTH,
           "mnist": DIGITS | dict(epochs_backbone=4, epochs=2), "cifar10": dict(net="cifar"),
           **{name: dict(net=name, z_dims=[100, 100]) for name in ("svhn", "celeba")}}
DEEP = dict(net="deep", width=32, batch_size=100, f_hidden=[200], prior_steps=20,
            prior_step_size=0.1, lr=1e-3, lr_ebm=1e-4)
VAE_FIRST = dict(epochs_backbone=100, epochs=10)
TWO_STAGE = {"svhn": VAE_FIRST, "celeba": VAE_FIRST, "cifar10": dict(                  # on top
    width=128, groups=[4, 4, 4], group_dim=20, batch_size=64, epochs=10, epochs_backbone=400,
    kl_warmup=20_000, free_bits=1.0)}
AUPRC = ("auprc", "auprc_plain", "auprc_five", "auprc_five_plain")         # anomaly_auprc
SWEEP = (0, 10, 20, 40, 60, 100)                                           # prior steps measured
EVAL_FLAGS = ("ood", "ood_samples", "ood_steps", "long_steps")             # not for training
STACKS = {"cifar": (8, [1024, 512, 256]), "svhn": (4, [512, 256, 128]),    # first kernel, widths
          "celeba": (4, [512, 256, 128, 64])}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Explicit flag > preset of --dataset, --held_out, --scheme > default, as --help shows."""
    p = common.run_parser("joint_layer_ebm.py", __doc__, "synth_svhn", list(PRESETS))
    count, one, positive = (common.number(int, 0), common.number(int, 1),
                            common.number(float, 0, open_low=True))
    flag = p.add_argument_group("model").add_argument
    flag("--scheme", default="mcmc", choices=["mcmc", "variational", "two_stage"],
         help="two_stage, if given: on the deep backbone")
    flag("--net", default="ladder", choices=["ladder", "mlp", "deep", *STACKS],
         help="cifar, svhn, celeba: the authors' two layers, g sees z_1 only")
    flag("--z_dims", type=one, nargs="+", default=[128, 100], help="z_1, .., z_L; not of deep")
    flag("--width", type=common.number(int, 4), default=32, help="channels; mlp: units")
    flag("--groups", type=count, nargs="+", default=[2, 1], help="deep: a scale, 4 x 4 maps first")
    flag("--group_dim", type=one, default=4, help="deep: channels of a group")
    flag("--prior_hidden", type=one, default=200)
    flag("--prior_layers", type=count, default=4, help="hidden layers of mu_i, sigma_i")
    flag("--f_hidden", type=count, nargs="+", default=[200, 100],
         help="of f_1, f_2, ..; the last for all above; all 0: the plain backbone")
    flag("--f_layers", type=one, nargs="+", default=[3, 2], help="hidden layers of f_1, ..")
    flag("--spectral_norm", action=argparse.BooleanOptionalAction, default=False, help="in f")
    flag("--sigma", type=positive, default=0.3, help="of p(x|z), images in [-1, 1]")
    flag = p.add_argument_group("training").add_argument
    flag("--epochs_backbone", type=count, default=0, help="VAE alone, before the energies")
    flag("--epochs", type=count, default=101)
    flag("--max_steps", type=count, default=0, help="steps a stage; 0: epochs decide")
    flag("--batch_size", type=one, default=100, help="over all processes")
    flag("--lr", type=positive, default=1e-4, help="Adam: generator, prior, encoder")
    flag("--lr_ebm", type=positive, default=2e-5, help="Adam: energies")
    flag("--decay", action=argparse.BooleanOptionalAction, default=False,
         help="the energies' stage: both rates fall linearly to 0")
    flag("--kl_warmup", type=count, default=0, help="backbone: steps until the KL has weight 1")
    flag("--free_bits", type=common.number(float, 0), default=0.0, help="backbone: nats a layer")
    flag("--max_gap", type=positive, default=500.0, help="|mean f(z+) - mean f(z-)|: roll back")
    flag = p.add_argument_group("sampler").add_argument
    flag("--space", default="eps", choices=["eps", "z"], help="coordinates of the chains")
    flag("--prior_steps", type=count, default=60)
    flag("--prior_step_size", type=positive, default=0.4)
    flag("--post_steps", type=count, default=40)
    flag("--post_step_size", type=positive, default=0.1)
    flag = p.add_argument_group("evaluation").add_argument
    flag("--held_out", type=common.number(int, -1, 9), default=-1, help="class never trained on")
    flag("--last_epochs", type=one, default=10, help="whose AUPRC of --held_out is averaged")
    flag("--ood", choices=list(PRESETS), help="data set to be told from the test set")
    flag("--ood_samples", type=one, default=4, help="of z for an image and a k")
    flag("--ood_steps", type=count, default=0, help="Langevin steps on the layers up to k")
    flag("--long_steps", type=common.number(int, 40), default=2500, help="of diagnostic chains")
    dataset, asked = common.peek(p, argv, "dataset"), common.peek(p, argv, "scheme", "")
    held_out = dataset == "mnist" and str(common.peek(p, argv, "held_out")) != "-1"
    more = {"two_stage": DEEP | TWO_STAGE.get(dataset, {}), "mcmc": dict(epochs_backbone=0)}
    p.set_defaults(**(ANOMALY if held_out else PRESETS.get(dataset, {})) | more.get(asked, {}))
    args = p.parse_args(argv)
    if not any(args.f_hidden):                                             # nothing to climb
        args.prior_steps, args.epochs = 0, 0 if args.scheme == "two_stage" else args.epochs
    if args.scheme == "mcmc" and args.epochs_backbone:
        p.error("--epochs_backbone: --scheme mcmc trains no VAE first; give 0")
    if args.net in STACKS and len(args.z_dims) != 2:
        p.error(f"--z_dims: --net {args.net} has two layers, not {len(args.z_dims)}")
    if not sum(args.groups):
        p.error("--groups: give one latent group or more")
    return args


# ---- Networks ------------------------------------------------------------------------------------
# z and eps are flat [b d]; entry 0 of a list of layers is the paper's z_1, the last one z_L.
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers, a leaky ReLU between two."""
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def bounded(log_std: Tensor, bound: float = 3.0) -> Tensor:
    """Smoothly into (-bound, bound)."""
    return bound * torch.tanh(log_std.float() / bound)


class TopDown(nn.Module):
    """p0(z) = N(z_L; 0, I) prod_i N(z_i; mu_i(z_>i), diag sigma_i(z_>i)^2), and T: eps -> z.
    On the way down a state carries the layers seen so far; here it is those, side by side."""

    def __init__(self, dims: list[int], hidden: int = 200, n_hidden: int = 4):
        super().__init__()
        self.dims, self.shapes = list(dims), [(d,) for d in dims]
        self.nets = nn.ModuleList(mlp(sum(dims[i + 1:]), *[hidden] * n_hidden, 2 * d)
                                  for i, d in enumerate(dims[:-1]))

    def begin(self, z: Tensor) -> Tensor:
        return z.new_zeros(len(z), 0)

    def absorb(self, i: int, state: Tensor, z_i: Tensor) -> Tensor:
        return torch.cat([z_i, state], 1)

    def walk(self, pick, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top-down, z_i = pick(i, mu_i, log_std_i, state): z, mu, log_std [b d], the last state."""
        state, layers = self.begin(like), []
        for i in reversed(range(len(self.dims))):
            mu = log_std = torch.zeros(len(like), self.dims[i], device=like.device)
            if i < len(self.dims) - 1:
                mu, log_std = self.nets[i](state).flatten(1).float().chunk(2, dim=1)
                log_std = bounded(log_std)
            layers.insert(0, (pick(i, mu, log_std, state), mu, log_std))
            state = self.absorb(i, state, layers[0][0])
        return *(torch.cat(parts, 1) for parts in zip(*layers)), state

    def to_z(self, eps: Tensor) -> Tensor:
        """T: eps [b d] -> z [b d]."""
        parts = eps.split(self.dims, 1)
        return self.walk(lambda i, mu, log_std, _: mu + log_std.exp() * parts[i], eps)[0]

    def at(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu, log_std [b d] of all layers and the last state, along given z [b d]."""
        parts = z.split(self.dims, 1)
        return self.walk(lambda i, *_: parts[i], z)[1:]

    def to_eps(self, z: Tensor) -> Tensor:
        """T^-1: z [b d] -> eps [b d]."""
        mu, log_std, _ = self.at(z)
        return (z - mu) * (-log_std).exp()

    def log_prob(self, z: Tensor) -> Tensor:
        """log p0(z), constants kept: [b d] -> [b]."""
        return log_normal(z, *self.at(z)[:2])

    @torch.no_grad()
    def sample(self, n: int, device) -> Tensor:
        """n draws of p0: [n d]."""
        return self.to_z(torch.randn(n, sum(self.dims), device=device))


class Cell(nn.Module):
    """Residual bottleneck without normalisation, so that chains do not interact."""

    def __init__(self, a: int):
        super().__init__()
        b = max(a // 2, 4)
        convs = [(a, b, 1), (b, b, 3, 1, 1), (b, b, 3, 1, 1), (b, a, 1)]
        self.body = nn.Sequential(*[m for c in convs for m in (nn.SiLU(), nn.Conv2d(*c))])

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.body(x)


class DeepTopDown(TopDown):
    """The prior half of a residual top-down VAE (NVAE, VDVAE): groups of latent maps [c s s],
    groups[j] of them of side 4 * 2^j. The state is a feature map [b width s s]."""

    def __init__(self, groups: list[int], c: int, width: int):
        super().__init__([])
        self.sizes = [4 * 2**j for j, n in enumerate(groups) for _ in range(n)][::-1]
        self.shapes = [(c, s, s) for s in self.sizes]
        self.dims = [math.prod(shape) for shape in self.shapes]
        self.top = nn.Parameter(0.1 * torch.randn(1, width, self.sizes[-1], self.sizes[-1]))
        self.nets = nn.ModuleList(nn.Sequential(Cell(width), nn.Conv2d(width, 2 * c, 1))
                                  for _ in self.sizes[1:])
        self.merge = nn.ModuleList(nn.Conv2d(c, width, 1) for _ in self.sizes)
        self.cells = nn.ModuleList(Cell(width) for _ in self.sizes)

    def begin(self, z: Tensor) -> Tensor:
        return self.top.expand(len(z), -1, -1, -1)

    def absorb(self, i: int, state: Tensor, z_i: Tensor) -> Tensor:
        state = self.cells[i](state + self.merge[i](z_i.unflatten(1, self.shapes[i])))
        return F.interpolate(state, size=self.sizes[i - 1]) if i else state


# Encoders: (x, noise [b d]) -> q, with q(i, mu_i, log_std_i of p0, state) -> (mu, log_std) of layer
# i; noise is what z will be made of. exact[i]: was z_>i drawn without a look at z_i?
class DeepEncoder(nn.Module):
    """The other half: q(z_i|x, z_>i) as shifts of p0's parameters, from bottom-up maps of x."""

    def __init__(self, prior: DeepTopDown, channels: int, c: int, width: int):
        super().__init__()
        self.exact, self.sizes = [True] * len(prior.dims), prior.sizes
        self.stem = nn.Conv2d(channels, width, 3, 1, 1)
        self.cells = nn.ModuleDict({str(s): Cell(width) for s in prior.sizes})
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(2 * width, width, 1), Cell(width), nn.Conv2d(width, 2 * c, 1))
            for _ in prior.sizes)

    def forward(self, x: Tensor, noise: Tensor):
        maps, h = {}, self.stem(x)
        for size, cell in self.cells.items():
            h = maps[int(size)] = cell(F.adaptive_avg_pool2d(h, int(size)))

        def q(i, mu, log_std, state):
            h = self.heads[i](torch.cat([state, maps[self.sizes[i]]], 1))
            shift, widen = h.float().flatten(1).chunk(2, dim=1)
            return mu + shift, log_std + widen
        return q


class StackEncoder(nn.Module):
    """q(z_1|x) q(z_2|z_1): the authors' convolutions, then an MLP."""

    def __init__(self, dims: list[int], shape: tuple[int, int, int], n: int = 64):
        super().__init__()
        layers, widths = [nn.Conv2d(shape[0], 4 * n, 3, 1, 1)], [4 * n, 8 * n, 16 * n, 16 * n]
        for a, b in zip(widths, widths[1:3 + shape[1] // 64]):             # down to 8 x 8
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(a, b, 4, 2, 1)]
        self.bottom = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv2d(b, 2 * dims[0], 8),
                                    nn.Flatten())
        self.top, self.exact = mlp(dims[0], 200, 200, 2 * dims[1]), [False, True]

    def forward(self, x: Tensor, noise: Tensor):
        mu, log_std = self.bottom(x).float().chunk(2, dim=1)
        z_1 = mu + bounded(log_std, 5).exp() * noise[:, :mu.shape[1]]
        q = (mu, log_std), self.top(z_1).chunk(2, dim=1)
        return lambda i, *_: q[i]


def stack_generator(name: str, z_dim: int, channels: int) -> nn.Sequential:
    """The authors' CIFAR-10 generator, z_1 [b d_1] -> [b c h w] in [-1, 1], and its siblings."""
    kernel, widths = STACKS[name]
    layers = [nn.Unflatten(1, (z_dim, 1, 1)), nn.ConvTranspose2d(z_dim, widths[0], kernel)]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.LeakyReLU(0.2), nn.ConvTranspose2d(a, b, 4, 2, 1)]
    last = (3, 1, 1) if name == "cifar" else (4, 2, 1)
    return nn.Sequential(*layers, nn.LeakyReLU(0.2),
                         nn.ConvTranspose2d(widths[-1], channels, *last), nn.Tanh())


def ladder_levels(size: int, n_layers: int, width: int) -> tuple[list[int], list[int]]:
    """Sides and channels of maps, each half the one below, to 4 x 4 or less, a level a layer."""
    sides = [math.ceil(size / 2)]
    while sides[-1] > 4 or len(sides) < n_layers:
        sides.append(math.ceil(sides[-1] / 2))
    return sides, [min(width * 2**i, 4 * width) for i in range(len(sides))]


class LadderGenerator(nn.Module):
    """z_L makes the smallest map; on the way up to the image every z_i is added to a larger one."""

    def __init__(self, dims: list[int], shape: tuple[int, int, int], width: int):
        super().__init__()
        sides, widths = (v[::-1] for v in ladder_levels(shape[1], len(dims), width))
        self.dims, self.sides = dims, [*sides[1:], shape[1]]
        self.inject = nn.ModuleList(
            nn.Sequential(nn.Linear(d, c * s**2), nn.Unflatten(1, (c, s, s)))
            for d, s, c in zip(dims[::-1], sides, widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1)
                                for a, b in zip(widths, [*widths[1:], shape[0]]))

    def forward(self, z: Tensor) -> Tensor:
        parts, h = z.split(self.dims, 1)[::-1], 0.0
        for i, (up, s) in enumerate(zip(self.up, self.sides)):
            h = h + self.inject[i](parts[i]) if i < len(parts) else h
            h = up(F.leaky_relu(h, 0.2))[..., :s, :s]                      # 28 is not 4 * 2^3
        return h.tanh()


class LadderEncoder(nn.Module):
    """q(z|x) = prod_i q(z_i|x): a trunk of convolutions with a head for each layer."""

    def __init__(self, dims: list[int], shape: tuple[int, int, int], width: int):
        super().__init__()
        sides, widths = ladder_levels(shape[1], len(dims), width)
        self.exact, n = [True] * len(dims), len(dims)
        self.trunk = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1 + s % 2) for a, b, s in
                                   zip([shape[0], *widths], widths, [shape[1], *sides]))
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(c, c, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(c * math.ceil(s / 2)**2, 2 * d))
            for d, s, c in zip(dims, sides[-n:], widths[-n:]))

    def forward(self, x: Tensor, noise: Tensor):
        maps = []
        for conv in self.trunk:
            x = F.leaky_relu(conv(x), 0.2)
            maps.append(x)
        q = [head(h).chunk(2, dim=1) for head, h in zip(self.heads, maps[-len(self.heads):])]
        return lambda i, *_: q[i]


class MLPEncoder(nn.Sequential):
    """q(z|x) = prod q(z_i|x), all from one MLP."""

    def __init__(self, dims: list[int], shape: tuple[int, int, int], width: int):
        super().__init__(nn.Flatten(), mlp(math.prod(shape), width, width, 2 * sum(dims)))
        self.dims, self.exact = dims, [True] * len(dims)

    def forward(self, x: Tensor, noise: Tensor):
        mu, log_std = (half.split(self.dims, 1) for half in super().forward(x).chunk(2, dim=1))
        return lambda i, *_: (mu[i], log_std[i])


class Energies(nn.Module):
    """f_i(z_i) of all layers, z [b d] -> [b L]: NEGATIVE energies, high where z is likely.
    An MLP for a vector; for maps (c, s, s) first convolutions down to 4 x 4."""

    def __init__(self, prior: TopDown, hidden: list[int], n_hidden: list[int], spectral: bool):
        super().__init__()
        self.dims, self.shapes, self.nets = prior.dims, prior.shapes, nn.ModuleList()
        for i, (n, *side) in enumerate(self.shapes if any(hidden) else []):
            (width, depth), layers = (v[min(i, len(v) - 1)] for v in (hidden, n_hidden)), []
            if side:
                s, depth = side[0], max(round(math.log2(side[0] / 4)), 1)
                while s > 4:
                    layers += [nn.Conv2d(n, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
                    n, s = 64, s // 2
                layers, n = [*layers, nn.Flatten()], n * s * s
            self.nets.append(nn.Sequential(*layers, mlp(n, *[width] * depth, 1)))
        for m in [m for m in self.modules() if spectral and isinstance(m, (nn.Linear, nn.Conv2d))]:
            spectral_norm(m)

    def forward(self, z: Tensor) -> Tensor:
        parts = zip(self.nets, z.split(self.dims, 1), self.shapes)
        f = [net(z_i.unflatten(1, shape)) for net, z_i, shape in parts]
        return torch.cat(f, 1) if f else z.new_zeros(len(z), len(self.dims))


class JointEBM(nn.Module):
    """prior p0 and T, generator g, encoder q, energies f; for images of shape (c, h, w)."""

    def __init__(self, shape: tuple[int, int, int], args: argparse.Namespace):
        super().__init__()
        self.amp, self.net, dims, width = args.amp, args.net, args.z_dims, args.width
        self.prior = TopDown(dims, args.prior_hidden, args.prior_layers) if args.net != "deep" \
            else DeepTopDown(args.groups, args.group_dim, width)
        if args.net == "deep":
            self.generator = nn.Sequential(
                nn.Upsample(shape[1:]), nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(),
                nn.Conv2d(width, shape[0], 3, 1, 1), nn.Tanh())
            encoder = DeepEncoder(self.prior, shape[0], args.group_dim, width)
        elif args.net == "mlp":
            self.generator = nn.Sequential(mlp(sum(dims), width, width, math.prod(shape)),
                                           nn.Tanh(), nn.Unflatten(1, shape))
            encoder = MLPEncoder(dims, shape, width)
        elif args.net == "ladder":
            self.generator = LadderGenerator(dims, shape, width)
            encoder = LadderEncoder(dims, shape, width)
        else:
            self.generator = stack_generator(args.net, dims[0], shape[0])
            encoder = StackEncoder(dims, shape)
        self.encoder = None if args.scheme == "mcmc" else encoder
        self.energies = Energies(self.prior, args.f_hidden, args.f_layers, args.spectral_norm)

    def backbone(self) -> list[nn.Module]:
        """All nets but the energies."""
        return [net for net in (self.prior, self.generator, self.encoder) if net is not None]

    def generate(self, z: Tensor, state: Tensor) -> Tensor:
        """Mean image [b c h w] in [-1, 1], of z [b d] and the prior's last state along it."""
        features = {"ladder": z, "mlp": z, "deep": state}.get(self.net, z[:, :self.prior.dims[0]])
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.amp):
            return self.generator(features).float()

    def decode(self, z: Tensor) -> Tensor:
        """g(z): [b d] -> [b c h w] in [-1, 1]."""
        return self.generate(z, self.prior.at(z)[2] if self.net == "deep" else z)

    def posterior(self, x: Tensor) -> tuple[Tensor, ...]:
        """z ~ q(z|x), then mu, log_std of q and of p0(z_i|z_>i) along it, all [b d]; a state."""
        noise, params = torch.randn(len(x), sum(self.prior.dims), device=x.device), []
        parts = noise.split(self.prior.dims, 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            q = self.encoder(x, noise)

            def pick(i, *above):
                mu, log_std = q(i, *above)
                params.insert(0, (mu.float(), bounded(log_std, 5)))        # from the top down
                return params[0][0] + params[0][1].exp() * parts[i]
            z, mu_p, log_std_p, state = self.prior.walk(pick, noise)
        return z, *(torch.cat(p, 1) for p in zip(*params)), mu_p, log_std_p, state


# ---- Densities and losses ------------------------------------------------------------------------
# Log-densities are [b], in nats, summed over features; losses are means over the batch.
def log_normal(z: Tensor, mu: Tensor | float = 0.0, log_std: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, diag exp(log_std)^2), constants kept: [b d] -> [b]."""
    log_std = log_std if isinstance(log_std, Tensor) else z.new_full((), log_std)
    return (-0.5 * ((z - mu) * (-log_std).exp())**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)


def log_lik(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """log N(x; mean, sigma^2 I) without its constant: [b c h w] -> [b]."""
    return -reduce((x - mean)**2, "b c h w -> b", "sum") / (2 * sigma**2)


def log_target(model: JointEBM, u: Tensor, space: str, x: Tensor | None = None,
               sigma: float = 1.0) -> Tensor:
    """What chains climb, u [b d] = eps or z: log of the tilted prior; given x, of the posterior.
    eps:  f(T(u)) + log N(u; 0, I) [+ log p(x|T(u))];   z:  f(u) + log p0(u) [+ log p(x|u)]
    With space z this is also log p(x, z) + const, the score of anomaly and OOD detection."""
    z, p0 = (model.prior.to_z(u), log_normal) if space == "eps" else (u, model.prior.log_prob)
    log_p = p0(u) + model.energies(z).sum(1)
    return log_p if x is None else log_p + log_lik(x, model.decode(z), sigma)


def kl_layers(z: Tensor, mu: Tensor, log_std: Tensor, mu_p: Tensor, log_std_p: Tensor,
              dims: list[int], exact: list[bool]) -> Tensor:
    """KL(q(z_i|..) || p0(z_i|z_>i)) of each layer, [b L]: in closed form where exact, i.e. where
    z_>i was drawn without looking at z_i; else log q - log p0 at z, equal on average."""
    delta, whitened = log_std_p - log_std, (z - mu_p) * (-log_std_p).exp()
    closed = delta - 0.5 + 0.5 * ((-2 * delta).exp() + ((mu - mu_p) * (-log_std_p).exp())**2)
    drawn = delta + 0.5 * (whitened**2 - ((z - mu) * (-log_std).exp())**2)
    layers = zip(exact, closed.split(dims, 1), drawn.split(dims, 1))
    return torch.stack([(a if is_exact else b).sum(1) for is_exact, a, b in layers], 1)


def energy_loss(f_pos: Tensor, f_neg: Tensor) -> Tensor:
    """mean f(z-) - mean f(z+), f [b L], summed over layers; one Adam for all f_i is one each."""
    return f_neg.mean(0).sum() - f_pos.mean(0).sum()


def vae_loss(model: JointEBM, x: Tensor, args, kl_weight: float = 1.0,
             tilted: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """-log p(x|z) + KL(q(z|x) || p0(z)), tilted: - f(z).  Returns (loss, z detached, its terms).
    Free bits and a KL weight are for the VAE alone: tilted, p0 is in log Z as well, at full weight.
    """
    z, mu, log_std, mu_p, log_std_p, state = model.posterior(x)
    nll = -log_lik(x, model.generate(z, state), args.sigma).mean()
    kl = kl_layers(z, mu, log_std, mu_p, log_std_p, model.prior.dims, model.encoder.exact).mean(0)
    loss = nll + kl.sum() - model.energies(z).sum(1).mean() if tilted else \
        nll + kl_weight * kl.clamp_min(args.free_bits).sum()
    return loss, z.detach(), {"nll_nats": nll.detach(), "kl_nats": kl.detach().sum()}


# ---- Sampler -------------------------------------------------------------------------------------
def langevin(log_prob, z: Tensor, n_steps: int, step_size: float) -> Tensor:
    """Unadjusted Langevin: z <- z + s^2/2 d/dz log p(z) + s noise; here z stands for z or eps.
    log_prob [b d] -> [b] nats, unnormalised; rows must not interact. Returns [b d], detached; the
    given z stays as it is. On N(0, v) the variance settles at v / (1 - s^2 / 4v)."""
    z = z.detach()
    for _ in range(n_steps):
        z.requires_grad_(True)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(log_prob(z).sum(), z)            # rows are separate: sum
        z = z.detach() + 0.5 * step_size**2 * grad + step_size * torch.randn_like(z)
    return z


@torch.no_grad()
def chain(model: JointEBM, z: Tensor, n_steps: int, step_size: float, args,
          x: Tensor | None = None, up_to: int | None = None) -> Tensor:
    """n_steps from z [b d] towards the tilted prior or, given x [b c h w], the posterior; [b d].
    On eps or z as --space says. up_to = k: on eps, and only layers 1 .. k move."""
    if n_steps == 0:
        return z
    space, low = ("eps", sum(model.prior.dims[:up_to])) if up_to else (args.space, z.shape[1])
    u, still = (model.prior.to_eps(z) if space == "eps" else z).tensor_split([low], 1)
    u = langevin(lambda v: log_target(model, torch.cat([v, still], 1), space, x, args.sigma),
                 u, n_steps, step_size)
    u = torch.cat([u, still], 1)
    return model.prior.to_z(u) if space == "eps" else u


def sample_prior(model: JointEBM, n: int, device, args) -> Tensor:
    """z- [n d]: --prior_steps from p0 towards the tilted prior; without energies p0 itself."""
    return chain(model, model.prior.sample(n, device), args.prior_steps, args.prior_step_size, args)


def sample_posterior(model: JointEBM, x: Tensor, args) -> Tensor:
    """z+ [b d] given x [b c h w] in [-1, 1]: by chains from p0 (scheme mcmc), else from q."""
    if args.scheme != "mcmc":
        return model.posterior(x)[0].detach()
    start = model.prior.sample(len(x), x.device)
    return chain(model, start, args.post_steps, args.post_step_size, args, x)


@torch.no_grad()
def resample_below(model: JointEBM, z: Tensor, k: int, n_steps: int, args) -> Tensor:
    """z [b d] with layers 1 .. k anew given those above: from p0, then n_steps of Langevin."""
    eps, low = model.prior.to_eps(z), sum(model.prior.dims[:k])
    z = model.prior.to_z(torch.cat([torch.randn_like(eps[:, :low]), eps[:, low:]], 1))
    return chain(model, z, n_steps if k else 0, args.prior_step_size, args, up_to=k)


# ---- Training ------------------------------------------------------------------------------------
def train_step(model: JointEBM, x: Tensor, stage: str, opt, opt_ebm, args,
               kl_weight: float = 1.0) -> dict[str, Tensor]:
    """One step on x [b c h w] in [0, 1]; stage: backbone (VAE), joint, energy (the rest frozen).
    A parameter takes gradients only within the loss that trains it. opt is of all but energies."""
    x, metrics = 2 * x - 1, {}
    model.requires_grad_(False)
    tilted = stage != "backbone" and len(model.energies.nets) > 0
    z_neg = sample_prior(model, len(x), x.device, args) if tilted else None
    if stage == "energy" or args.scheme == "mcmc":
        z_pos = sample_posterior(model, x, args)
    if stage != "energy":
        for net in model.backbone():
            net.requires_grad_(True)
        if args.scheme == "mcmc":
            loss = -log_lik(x, model.decode(z_pos), args.sigma).mean()
            metrics["nll_nats"] = loss.detach()
            loss = loss - model.prior.log_prob(z_pos).mean()
        else:
            loss, z_pos, metrics = vae_loss(model, x, args, kl_weight, tilted)
        loss = loss + model.prior.log_prob(z_neg).mean() if tilted else loss   # p0 is inside Z
        opt.zero_grad(set_to_none=True)
        loss.backward()
    if tilted:
        model.energies.requires_grad_(True).train()                        # spectral norm moves
        f_pos, f_neg = model.energies(torch.cat([z_pos, z_neg])).chunk(2)  # of the same weights
        opt_ebm.zero_grad(set_to_none=True)
        energy_loss(f_pos, f_neg).backward()
        opt_ebm.step()
        model.energies.eval()
        metrics |= {"f_pos": f_pos.detach().sum(1).mean(), "f_neg": f_neg.detach().sum(1).mean()}
    if stage != "energy":
        opt.step()
    return metrics


def optimisers(model: JointEBM, args, run) -> list[torch.optim.Adam]:
    """Of the backbone and of the energies; gradients are averaged over the ranks."""
    opts = []
    for nets, lr in ((model.backbone(), args.lr), ([model.energies], args.lr_ebm)):
        params = [p for net in nets for p in net.parameters()]
        opts.append(torch.optim.Adam(params or [torch.zeros(1)], lr, fused=True))
        opts[-1].register_step_pre_hook(
            lambda *_, params=params: common.average_gradients(params, run.world))
    return opts


def train(model: JointEBM, train_set: data.Dataset, tests, args, run) -> list[list[float]]:
    """Backbone steps, then those of the scheme; returns the AUPRCs after each of the last epochs.
    Chains that diverge: back to the last checkpoint, with half the learning rate of the energies.
    """
    m, per_epoch = train_set.modalities[0], max(len(train_set) // args.batch_size, 1)
    opts, step, auprc = optimisers(model, args, run), 0, []
    first, later = (min(n * per_epoch, args.max_steps or n * per_epoch)
                    for n in (args.epochs_backbone, args.epochs))
    total, n_epochs = first + later, math.ceil((first + later) / per_epoch)
    alarm = torch.zeros((), dtype=torch.bool, device=run.device)
    main_stage = "energy" if args.scheme == "two_stage" else "joint"

    def save():
        run.save({"step": step, "stage": int(step == total), "auprc": auprc,
                  "model": model.state_dict(), "opts": [opt.state_dict() for opt in opts]})

    def restore(state):
        model.load_state_dict(state["model"])
        for opt, kept in zip(opts, state["opts"]):
            opt.load_state_dict(kept)
        return state["step"], state["auprc"]
    if args.resume:
        step, auprc = restore(run.load(args.checkpoint, free=EVAL_FLAGS))
    else:
        torch.manual_seed(args.seed + 10**6 * run.rank)                    # noise of its own
    save()                                                                 # a rollback needs one
    while step < total:
        epoch = step // per_epoch
        order = torch.Generator().manual_seed(args.seed * 10**6 + epoch)
        for x in data.batches(train_set, args.batch_size, order, run.device, step % per_epoch,
                              run.rank, run.world, [m]):
            stage = "backbone" if step < first else main_stage
            share = (total - step) / later if args.decay and step >= first else 1.0
            for opt, lr in zip(opts, (args.lr, args.lr_ebm / 2**run.rollbacks)):
                opt.param_groups[0]["lr"] = share * lr
            step += 1
            kl_weight = min(1.0, step / max(args.kl_warmup, 1))
            metrics = train_step(model, x[m], stage, *opts, args, kl_weight)
            gap = metrics.get("f_pos", 0 * alarm) - metrics.get("f_neg", 0 * alarm)
            alarm = alarm | ~(gap.abs() < args.max_gap) | ~sum(metrics.values()).isfinite()
            due, last = run.checkpoint_due(), step % per_epoch == 0 or step in (first, total)
            if due or last or step % args.log_every == 0:
                if common.max_over_ranks(alarm, run.world):
                    step, auprc = restore(run.rollback(f"diverged by step {step} ({stage})"))
                    alarm = torch.zeros_like(alarm)
                    break
                run.log(stage=stage, step=step, epoch=epoch, split="train", **metrics)
                run.progress(stage, epoch, n_epochs, step, total, args.batch_size, **metrics)
            late = step > first and epoch >= n_epochs - args.last_epochs
            if last and late and args.held_out >= 0:
                auprc.append(anomaly_auprc(model, tests, args, run.device))
                run.log(step=step, epoch=epoch, split="test", **dict(zip(AUPRC, auprc[-1])))
            if due or step == first:
                save()
            if run.stop_requested:
                run.stop()
            if step == total:
                break
    save()
    return auprc


# ---- Evaluation ----------------------------------------------------------------------------------
def scores(model: JointEBM, dataset: data.Dataset, args, device, k: int = 0,
           n_samples: int = 1) -> Tensor:
    """L>k, [n 2]: mean of log p(x, z) + const over n_samples of z_>k ~ posterior and z_<=k from p0
    given z_>k, then --ood_steps of Langevin; then without f. L>0: minus the anomaly score."""
    values = []
    for x in data.batches(dataset, args.eval_batch, device=device, names=dataset.modalities[:1]):
        x, value = 2 * x.popitem()[1] - 1, 0.0
        for _ in range(n_samples):
            z = resample_below(model, sample_posterior(model, x, args), k, args.ood_steps, args)
            log_p = log_target(model, z, "z", x, args.sigma)
            plain = log_p - model.energies(z).sum(1)
            value = value + torch.stack([log_p, plain], 1) / n_samples
        values.append(value)
    return torch.cat(values).cpu()


def anomaly_auprc(model: JointEBM, tests: list[data.Dataset], args, device) -> list[float]:
    """Average precision of -log p(x, z), and without f, for the class held out; then with 5 times
    as many of it, from the second set: MEG's code tests on 20 % of the normal and all of these."""
    model.requires_grad_(False)
    test, n = tests[0], len(tests[0])
    held = tests[1].head(4 * int((test.y == args.held_out).sum()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # not training's noise
        torch.manual_seed(args.seed)
        score = -torch.cat([scores(model, part, args, device) for part in (test, held)])
    out = torch.cat([test.y, held.y]).cpu() == args.held_out
    return [common.average_precision(score[:e, i], out[:e]) for e in (n, None) for i in (0, 1)]


def ood_metrics(model: JointEBM, test: data.Dataset, out: data.Dataset, args,
                run) -> dict[str, float]:
    """AUROC and AUPRC of L>k and LLR>k = L>0 - L>k, as many images of --ood as of test. The signs
    are the theory's: low L>k and high LLR>k mean out; the positives are in."""
    n, score = min(len(out), len(test)), {}
    labels = torch.arange(2 * n) < n
    for k in range(len(model.prior.dims)):
        score[f"l{k}"] = torch.cat([scores(model, s.head(n), args, run.device, k, args.ood_samples)
                                    for s in (test, out)])
        score |= {f"llr{k}": score[f"l{k}"] - score["l0"]} if k else {}    # here minus the LLR
    return {f"ood_{what}_{name}{end}": rank(value, labels) for name, both in score.items()
            for end, value in zip(("", "_plain"), both.unbind(1))
            for what, rank in (("auroc", common.auroc), ("auprc", common.average_precision))}


def quality(model: JointEBM, judges, real, m: str, args, run) -> dict[str, float]:
    """frechet_clf (and fid) of the same chains after 0, 10, .., 100 steps, and --prior_steps."""
    z = torch.cat([model.prior.sample(min(args.eval_batch, args.n_eval - i), run.device)
                   for i in range(0, args.n_eval, args.eval_batch)])
    done, metrics, pictures = 0, {}, {}
    for k in sorted({*SWEEP, args.prior_steps}):
        z, done = torch.cat([chain(model, part, k - done, args.prior_step_size, args)
                             for part in z.split(args.eval_batch)]), k
        parts = iter(z.split(args.eval_batch))
        pictures[f"K = {k}"] = images(model, z[:16])
        found = common.coherence_joint(lambda _: {m: images(model, next(parts))}, judges,
                                       args.n_eval, args.eval_batch, real)
        for end in (f"_k{k}", "") if k == args.prior_steps else (f"_k{k}",):
            metrics |= {key.removesuffix(f"_{m}") + end: v for key, v in found.items()}
    common.save_grid(run.dir / "samples.png", pictures)
    return metrics


def images(model: JointEBM, z: Tensor) -> Tensor:
    """g(z) in [0, 1]."""
    return model.decode(z) / 2 + 0.5


@torch.no_grad()
def draw_layers(model: JointEBM, x: Tensor, args, run) -> None:
    """layer_<i>.png: 8 samples (rows), the first column as drawn, then eps_i taken from 8 others.
    cross.png: x, and for each k its layers above k with those up to k drawn anew, twice."""
    dims, prior, n = model.prior.dims, model.prior, 8
    eps = prior.to_eps(sample_prior(model, 2 * n, x.device, args))
    for i in range(len(dims)):
        rows = repeat(eps[:n], "r d -> r c d", c=n + 1).clone()
        layer = slice(sum(dims[:i]), sum(dims[:i + 1]))
        rows[:, 1:, layer] = eps[n:, layer]
        pictures = images(model, prior.to_z(rows.flatten(0, 1)))
        common.save_grid(run.dir / f"layer_{i + 1}.png", {f"layer {i + 1} varied": pictures}, n + 1)
    z = sample_posterior(model, repeat(2 * x - 1, "r ... -> (r s) ...", s=2), args)
    again = {f"above {k} kept": images(model, resample_below(model, z, k, args.prior_steps, args))
             for k in range(len(dims))}
    common.save_cross_grid(run.dir / "cross.png", {"test": x}, {"test": again})


def diagnose_chains(model: JointEBM, args, run, n: int = 64, every: int = 5) -> dict[str, float]:
    """n chains of --long_steps from p0, looked at every 5th step (the unit of diagnostics.png): -f
    (energy_k: at the 5th nearest to --prior_steps), and how up to 256 entries of eps mix."""
    z, energy, path = model.prior.sample(n, run.device), [], []
    shown = torch.linspace(0, z.shape[1] - 1, min(z.shape[1], 256), device=z.device).long()
    for i in range(args.long_steps // every + 1):
        z = chain(model, z, every, args.prior_step_size, args) if i else z
        energy.append(-model.energies(z).sum(1).cpu())                                   # [c]
        path.append(model.prior.to_eps(z)[:, shown].cpu())                               # [c d]
    energy, eps = torch.stack(energy), torch.stack(path)
    report = common.chain_report(eps[len(path) // 5:], run.dir / "diagnostics.png", energy=energy)
    at = {"start": 0, "k": min(round(args.prior_steps / every), len(path) - 1), "end": -1}
    return {"r_hat": report["r_hat"], "r_hat_95": report["r_hat_95"],
            "ess_per_step": report["ess_per_step"] / every,
            "autocorrelation_time": report["autocorrelation_time"] * every,
            "displacement": (eps[-1] - eps[0]).square().mean().sqrt().item(),
            **{f"energy_{name}": energy[i].mean().item() for name, i in at.items()}}


def evaluate(model: JointEBM, everything: data.Dataset, train_set: data.Dataset,
             tests: list[data.Dataset], out: data.Dataset | None, auprc: list[list[float]], args,
             run) -> dict[str, float]:
    """Fréchet distance against the number of steps, pictures, chains, anomaly and OOD; test split.
    A class that was held out is not in the distances; judges learn from everything."""
    run.begin_evaluation()
    model.requires_grad_(False).eval()
    m, metrics, test = train_set.modalities[0], {}, tests[0]
    judges = common.load_judges(everything, test, run.judges, run.device, run.say)
    if args.held_out >= 0:
        auprc = torch.tensor(auprc or [anomaly_auprc(model, tests, args, run.device)])
        for end, found in {"": auprc[-1], "_mean": auprc.mean(0),
                           "_sd": auprc.std(0, correction=0)}.items():
            metrics |= {name + end: v for name, v in zip(AUPRC, found.tolist())}
        test = test.select(test.y != args.held_out)
    inception = common.load_inception(args, run.device)
    real = common.reference(test, train_set, judges, inception, args.n_eval)
    metrics |= {k: v for k, v in real.metrics.items() if k != "coherence_ceiling"}
    metrics |= quality(model, judges, real, m, args, run)

    def error(x):
        z = sample_posterior(model, 2 * x[m] - 1, args)
        return {"recon_mse": (images(model, z) - x[m]).square().mean()}
    metrics |= common.mean_over(error, data.batches(
        test.head(args.n_eval), args.eval_batch, names=[m]), run.device)
    draw_layers(model, test.take(slice(8), names=[m])[m], args, run)
    metrics |= diagnose_chains(model, args, run)
    metrics |= ood_metrics(model, test, out, args, run) if out else {}
    run.time_samples(lambda n: {m: images(model, sample_prior(model, n, run.device, args))})
    return metrics


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate; returns the metrics of result.json."""
    args = parse_args(argv)
    with common.open_run(args, __file__, argv) as run:
        common.seed_everything(args.seed)
        sizes = {"train": args.n_train, "test": args.n_test}
        train_set, test = data.load_splits(args.dataset, sizes, args.data_dir, run.device).values()
        everything, tests = train_set, [test]
        if args.held_out >= 0:
            if train_set.y is None or not (test.y == args.held_out).any():
                raise common.RunError(f"--held_out: no label {args.held_out} in {args.dataset}")
            train_set = everything.select(everything.y != args.held_out)
            tests.append(everything.select(everything.y == args.held_out))
        shape = train_set.shapes[train_set.modalities[0]]
        out = data.load(args.ood, "test", args.data_dir).to(run.device) if args.ood else None
        if out and out.shapes[out.modalities[0]] != shape:
            raise common.RunError(f"--ood {args.ood}: its images are not of {shape}")
        side = {"celeba": 64, "ladder": shape[1]}.get(args.net, 32)
        if args.net in (*STACKS, "ladder") and shape[1:] != (side, side):
            raise common.RunError(f"--net {args.net} is not made for images of {shape}; try "
                                  + ("mlp" if args.net == "ladder" else "ladder"))
        model = JointEBM(shape, args).to(run.device, memory_format=torch.channels_last).eval()
        run.start(model)
        for part in [*model.backbone()[1:], model.energies] if args.compile else []:
            part.compile()
        if args.eval_only:
            state = run.load(args.checkpoint, EVAL_FLAGS, 1)
            model.load_state_dict(state["model"])
            auprc = state["auprc"]
        else:
            auprc = train(model, train_set, tests, args, run)
        args.n_eval = min(args.n_eval, len(test))
        metrics = evaluate(model, everything, train_set, tests, out, auprc, args, run)
        more = f"; --ood {out.name}: {len(out)} images, {out.note}" if out else ""
        return run.finish(metrics, train_set.note + more, args.n_eval)


if __name__ == "__main__":
    common.cli(main)
