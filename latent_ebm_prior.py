"""Learning multimodal latent space with EBM prior and MCMC inference
(Yuan, Lipizzi & Han, arXiv 2408.10467).

A mixture-of-experts VAE (MMVAE+, Palumbo et al. 2023) has one latent z that modalities share and
one private latent w_m each. Its Laplace prior on z leaves holes: samples of the prior decode to
modalities that disagree. An energy-based prior on z, learned with short-run Langevin chains, fills
them; a second Langevin chain can bring the encoder's samples nearer to the true posterior.

Model       p_a(z) = exp(f(z)) p0(z) / Z(a)     f = NEGATIVE energy; p0 Laplace(0, 1) or Normal
            p(w_m) = Laplace(0, 1);  p(x_m|z, w_m) = Laplace or Normal(decoder_m(z, w_m), 0.75), or
            of a caption, tokens [b l], Categorical(logits decoder_m(z, w_m)) a word
            q(z|x) = 1/M sum_m q_m(z|x_m),  q_m(z|x_m) and q_m(w|x_m) Laplace;  scales sum to dim
            r_m(w) = Laplace(0, s_m): stands for w_m where x_m is drawn from another modality's z
Symbols     z, w [b d]; m, j modality (experts first: [m k b d]), k importance sample, b batch;
            v = (z, w_1 .. w_M) [b d]; z_pos, z_neg samples of q and of the prior chain

Algorithm   for each minibatch
  1  encode; z_m ~ q_m(z|x_m), w_m ~ q_m(w|x_m), w'_n ~ r_n; K each
  2  z_neg: z ~ p0, then prior_steps times z <- z + s^2/2 d/dz (f + log p0)(z) + s eps
  3  ascend 1/M sum_m log 1/K sum_k W_m^k,  f held fixed,  n runs over the modalities but m:
            log W_m = lambda_m log p(x_m|z,w_m) + sum_n lambda_n log p(x_n|z,w'_n)
            + beta (f(z) + log p0(z) + log p(w_m) - log q(z|x) - log q_m(w_m|x_m))
  3' --inference mcmc: v ~ encoder, then post_steps of Langevin on log p(v|x); the decoders ascend
     rho sum_n lambda_n (log p(x_n|z,w_n) + log p(x_n|z,w'_n)) + (1 - rho) (3), z and w the chain's
     ends; the encoders (3), or with --phi teach 1/M sum_m log q_m(z|x_m) + sum_n log q_n(w_n|x_n)
  4  f descends  mean f(z_neg) - mean f(z_pos),  z_pos: z of 1, or the chain's end of 3'
  Afterwards epochs_ebm epochs of 2 and 4 alone (z_pos as before). Generation: z from chain 2,
  w ~ p(w), or of r_m as in (3) (--w_test aux: more coherent, less diverse); decoders.

Usage
  python latent_ebm_prior.py         synthetic digits, 7 CPU minutes: joint 0.66, under p0 0.47
  python latent_ebm_prior.py --inference mcmc               with posterior chains
  python latent_ebm_prior.py --dataset polymnist --data_dir DIR    full nets
  python latent_ebm_prior.py --prior laplace                the base alone: MMVAE+

Deviations and choices (neither the paper's code nor its hyperparameters could be had)
  D1 f = c tanh(g/c), --bound c: with a Laplace p0 a steeper f would make exp(f) p0 improper
  D2 EBM sizes, steps and rates are those of its relatives (Pang et al. 2020); rho, phi are ours
  D3 the posterior chain divides the likelihood by beta, to match (3); --no-temper does not
  D4 --objective dreg is unbiased for a mixture of experts; public code leaves the score term in
  D5 --ebm_on u: f sees (z, w_1 .. w_M), and w_n learns from it in expert n's term only, as from
     p(w_n); joint samples have f's w, drawing x_n from others takes w_n as --w_test says
  D6 the synthetic presets learn f after the autoencoder: (3) has p0 alone (--ebm_warmup)
  D7 their nets of 4 x 4 patches, sizes, rates and decoder scale are ours: minutes on a CPU
  D8 decoders end without a sigmoid (synth_mnist_svhn's: --sigmoid): a pixel that it saturates
     never comes back, because the gradient of a Laplace likelihood does not grow with the error
  D9 --cross_warmup: in these first epochs latents explain the other modalities alone, and beta and
     the draws' scales grow from 0 (no bound yet, no DReG); else real PolyMNIST's z stays blind
  D10 latents can be sharp where decoders look and wide where they do not: --whiten has f, p0 and
     prior chains in units of mean |z|; --smooth blurs z_pos and ends them with Tweedie's step
  D11 cub has MMVAE+'s sizes, weights and nets of images; its nets of captions have BatchNorm, which
     chains through a decoder would disturb, ours none; its posteriors are Normal and it takes DReG,
     ours are Laplace, whose path gradients, of order 1 / scale, blew a sharp encoder up: iwae
"""
import argparse
import math
from functools import cache
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import common
import data

# ---- Config --------------------------------------------------------------------------------------
SYNTH = dict(z_dim=16, w_dim=8, width=32, net="patch", decoder_scale=0.4, decay=True, batch_size=64,
             lr=3e-3, epochs_vae=12, ebm_warmup=12, epochs_ebm=6, lr_ebm=1e-3, ebm_act="lrelu",
             max_gap=15.0)
POLY = dict(z_dim=32, w_dim=32, net="resnet", beta=2.5, epochs_vae=150)
PRESETS = {
    "synth_polymnist": SYNTH, "synth_mnist_svhn": dict(SYNTH, rescale=True, sigmoid=True, z_dim=10),
    "polymnist": POLY, "polymnist10": dict(POLY, n_modalities=10),
    "mnist_svhn": dict(z_dim=20, private=False, k=30, objective="dreg", rescale=True,
                       epochs_vae=30), "paired": dict(net="mlp"),
    "cub": dict(z_dim=48, w_dim=16, decoder_scale=0.01, weight=[32 / 12288, 5.0], epochs_vae=50,
                objective="iwae", k=10, batch_size=32, prior_steps=50, eval_batch=50)}


def free_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags that may differ from the training's; amortised training runs no posterior chain."""
    free = "w_test", "cross_steps", "prior_sweep", "gmm"
    chain = "post_steps", "post_step_size", "post_init", "temper"
    return free + chain if args.inference == "amortised" else free


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Explicit flag > preset of --dataset > default, as --help shows."""
    number, switch = common.number, argparse.BooleanOptionalAction
    p = common.run_parser("latent_ebm_prior.py", __doc__, "synth_polymnist", [*PRESETS])
    flag = p.add_argument_group("model").add_argument
    flag("--z_dim", type=number(int, 1), default=32)
    flag("--w_dim", type=number(int, 1), default=32)
    flag("--private", action=switch, default=True, help="w_m; without: E24's base version")
    flag("--net", default="auto", choices=["auto", "mlp", "patch", "conv", "resnet"])
    flag("--width", type=number(int, 1), default=64, help="channels, features of patch; 64: full")
    flag("--sigmoid", action=switch, default=False, help="at the end of decoders (D8)")
    flag("--decoder_dist", default="laplace", choices=["laplace", "normal"], help="p(x_m|z, w_m)")
    flag("--decoder_scale", type=number(float, 0, open_low=True), default=0.75)
    flag("--rescale", action=switch, default=False, help="weigh by largest size / size of x_m")
    flag("--weight", type=number(float, 0), nargs="+", help="lambda_m of each modality instead")
    flag("--prior", default="ebm", choices=["ebm", "laplace"], help="laplace: p0 alone, MMVAE+")
    flag("--base", default="laplace", choices=["laplace", "gaussian"], help="p0 of z")
    flag("--base_scale", type=number(float, 0, open_low=True), default=1.0)
    flag("--ebm_on", default="z", choices=["z", "u"], help="u: all of z, w_1 .. w_M")
    flag("--ebm_hidden", type=number(int, 1), default=200)
    flag("--ebm_act", default="gelu", choices=list(ACTS), help="of f; lrelu: the faster chain")
    flag("--bound", type=number(float, 0), default=30.0, help="|f| < bound (D1); 0: none")
    flag = p.add_argument_group("training").add_argument
    flag("--epochs_vae", type=number(int, 0), default=150, help="autoencoder and EBM together")
    flag("--epochs_ebm", type=number(int, 0), default=0, help="then the EBM alone")
    flag("--ebm_warmup", type=number(int, 0), default=1, help="first epochs with p0 alone")
    flag("--cross_warmup", type=number(int, 0), default=0, help="first epochs that anneal (D9)")
    flag("--max_steps", type=number(int, 0), default=0, help="steps a stage; 0: epochs decide")
    flag("--batch_size", type=number(int, 1), default=128, help="over all processes")
    flag("--objective", default="elbo", choices=["elbo", "iwae", "dreg"], help="elbo: k is 1")
    flag("--k", type=number(int, 1), default=1, help="importance samples")
    flag("--beta", type=number(float, 0, open_low=True), default=1.0)
    flag("--lr", type=number(float, 0, open_low=True), default=1e-3, help="Adam, amsgrad")
    flag("--lr_ebm", type=number(float, 0, open_low=True), default=1e-4)
    flag("--decay", action=switch, default=False, help="rates go down to 0 along a stage, linearly")
    flag("--ebm_reg", type=number(float, 0), default=0.0, help="times mean f^2 of both signs")
    flag("--whiten", action=switch, default=False, help="f alone: z in units of its spread (D10)")
    flag("--smooth", type=number(float, 0), default=0.0, help="f alone: noise on z_pos (D10)")
    flag("--max_gap", type=number(float, 0, open_low=True), default=50.0, help="rollback at |gap|")
    flag("--inference", default="amortised", choices=["amortised", "mcmc"])
    flag("--rho", type=number(float, 0, 1), default=0.5, help="weight of the chain for decoders")
    flag("--phi", default="elbo", choices=["elbo", "teach"], help="what trains the encoders")
    flag = p.add_argument_group("sampler").add_argument
    flag("--prior_steps", type=number(int, 0), default=60, help="training and test")
    flag("--prior_step_size", type=number(float, 0, open_low=True), default=0.4)
    flag("--chains", type=number(int, 1), default=128, help="prior chains a step, over all ranks")
    flag("--post_steps", type=number(int, 0), default=20)
    flag("--post_step_size", type=number(float, 0, open_low=True), default=0.03)
    flag("--post_init", default="moe", choices=["moe", "noise"], help="noise: start at p0, no q")
    flag("--temper", action=switch, default=True, help="likelihood to the power 1/beta (D3)")
    flag = p.add_argument_group("test").add_argument
    flag("--w_test", default="prior", choices=["prior", "aux"], help="w_m not given: p(w), r_m")
    flag("--cross_steps", type=number(int, 0), default=0, help="Langevin for coherence_cross_*")
    flag("--prior_sweep", type=number(int, 0), nargs="*", default=[0, 10, 30, 60, 100])
    flag("--gmm", type=number(int, 1), nargs="*", default=[1, 10, 100], help="mixtures fit to z")
    p.set_defaults(**PRESETS.get(common.peek(p, argv, "dataset"), {}))
    args = p.parse_args(argv)
    if args.objective == "elbo" and args.k > 1:
        p.error(f"--objective elbo has --k 1, not {args.k}; give --objective iwae or dreg")
    if args.objective == "dreg" and args.ebm_on == "u":
        p.error("--objective dreg is for --ebm_on z")
    if args.cross_warmup > max(args.epochs_vae - 1, 0):
        p.error("--cross_warmup: give more --epochs_vae")
    if args.prior == "ebm" and args.cross_warmup > args.ebm_warmup:
        p.error("--cross_warmup: give as many --ebm_warmup")
    if args.inference != "mcmc" and any(vars(args)[f] != p.get_default(f) for f in ("rho", "phi")):
        p.error("--rho and --phi are for --inference mcmc")
    alone = args.prior == "ebm" and args.ebm_warmup >= args.epochs_vae
    if (args.whiten or args.smooth) and not alone:
        p.error("--whiten and --smooth are for f alone: give --prior ebm and as many --ebm_warmup "
                "as --epochs_vae")
    if alone and not args.epochs_ebm and args.epochs_vae:
        p.error("f would never train: give --epochs_ebm, or --ebm_warmup below --epochs_vae")
    return args


# ---- Networks ------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    """Pre-activation residual block: shortcut(x) + 0.1 conv(lrelu(conv(lrelu(x))))."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        c_mid = min(c_in, c_out)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_mid, 3, 1, 1), nn.Conv2d(c_mid, c_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(x, 0.2))
        return self.shortcut(x) + 0.1 * self.conv2(F.leaky_relu(h, 0.2))


RESNETS = {28: (1, 1, 2, 4), 64: (1, 1, 2, 4, 4, 4, 4)}                     # widths by side


def body(shape: tuple[int, ...], net: str, width: int) -> tuple[nn.Module, int]:
    """(encoder tower [b c h w] -> [b f], f), of captions (l, words): [b l] -> [b f]. ValueError if
    the net has no version for the shape."""
    a = width
    if len(shape) == 2:
        return nn.Sequential(
            nn.Embedding(shape[1], 2 * a), Rearrange("b l e -> b e l"),
            nn.Conv1d(2 * a, 2 * a, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv1d(2 * a, 2 * a, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten()), 2 * a * shape[0]
    c, h, w = shape
    if net == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, 400), nn.ReLU()), 400
    if net == "patch" and h % 4 == w % 4 == 0:
        return nn.Sequential(
            Rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4), nn.Linear(16 * c, a),
            nn.ReLU(), nn.Flatten(), nn.Linear(h * w * a // 16, 8 * a), nn.ReLU()), 8 * a
    if net == "resnet" and h == w and h in RESNETS:
        blocks = [ResBlock(a * i, a * o) for i, o in zip(RESNETS[h], RESNETS[h][1:])]
        halved = [part for block in blocks[1:] for part in (nn.AvgPool2d(3, 2, 1), block)]
        return nn.Sequential(nn.Conv2d(c, a, 3, 1, 1), blocks[0], *halved,
                             nn.Flatten()), 4 * a * (h >> len(blocks) - 1) ** 2
    if net == "conv" and (h, w) == (32, 32):
        a = max(width // 2, 1)
        return nn.Sequential(nn.Conv2d(c, a, 4, 2, 1), nn.ReLU(), nn.Conv2d(a, 2 * a, 4, 2, 1),
                             nn.ReLU(), nn.Conv2d(2 * a, 4 * a, 4, 2, 1), nn.ReLU(),
                             nn.Flatten()), 4 * a * 16
    raise ValueError(f"--net {net} is not made for images of {shape}; use --net mlp")


def decoder(shape: tuple[int, ...], net: str, width: int, dim: int) -> nn.Sequential:
    """(w, z) [b dim] -> mean image [b c h w], unbounded (D8), or logits of words [b l words]."""
    a, up = width, nn.ConvTranspose2d
    if len(shape) == 2:
        return nn.Sequential(nn.Linear(dim, 8 * a), nn.LeakyReLU(0.2),
                             nn.Linear(8 * a, 2 * a * shape[0]), nn.LeakyReLU(0.2),
                             nn.Unflatten(1, (shape[0], 2 * a)), nn.Linear(2 * a, shape[1]))
    c, h, w = shape
    if net == "mlp":
        return nn.Sequential(nn.Linear(dim, 400), nn.ReLU(), nn.Linear(400, c * h * w),
                             nn.Unflatten(1, shape))
    if net == "patch":
        return nn.Sequential(
            nn.Linear(dim, 8 * a), nn.ReLU(), nn.Linear(8 * a, h * w * a // 16), nn.ReLU(),
            nn.Unflatten(1, (-1, a)), nn.Linear(a, 16 * c),
            Rearrange("b (h w) (c p q) -> b c (h p) (w q)", h=h // 4, p=4, q=4, c=c))
    if net == "resnet":
        blocks = [ResBlock(a * i, a * o) for o, i in zip(RESNETS[h], RESNETS[h][1:])][::-1]
        doubled = [part for block in blocks[:-1] for part in (block, nn.Upsample(scale_factor=2))]
        side = h >> len(blocks) - 1
        return nn.Sequential(nn.Linear(dim, 4 * a * side**2), nn.Unflatten(1, (4 * a, side, side)),
                             *doubled, blocks[-1], nn.LeakyReLU(0.2), nn.Conv2d(a, c, 3, 1, 1))
    a = max(width // 2, 1)
    return nn.Sequential(nn.Unflatten(1, (dim, 1, 1)), up(dim, 4 * a, 4), nn.ReLU(),
                         up(4 * a, 2 * a, 4, 2, 1), nn.ReLU(), up(2 * a, a, 4, 2, 1), nn.ReLU(),
                         up(a, c, 4, 2, 1))


def sum_to_dim(logits: Tensor) -> Tensor:
    """Laplace scales d softmax(logits) + 1e-6: [... d], their mean is 1, so width is shared out."""
    return logits.shape[-1] * logits.softmax(-1) + 1e-6


class LaplaceTower(nn.Module):
    """Image [b c h w] -> (mu, scale), both [b d]."""

    def __init__(self, shape: tuple[int, ...], net: str, width: int, dim: int):
        super().__init__()
        self.body, f = body(shape, net, width)
        self.mu, self.logits = nn.Linear(f, dim), nn.Linear(f, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).to(self.mu.weight.dtype)
        with torch.autocast(h.device.type, enabled=False):                  # scales may be 0.01
            return self.mu(h), sum_to_dim(self.logits(h))


ACTS = {"gelu": (F.gelu, torch.ops.aten.gelu_backward),     # of f: a(h), and g times a'(h)
        "lrelu": (lambda h: F.leaky_relu(h, 0.2),
                  lambda g, h: torch.ops.aten.leaky_relu_backward(g, h, 0.2, False))}


class EBM(nn.Module):
    """f(z) = bound tanh(g(z) / bound), g an MLP with two hidden layers; NEGATIVE energy, [b]."""

    def __init__(self, dim: int, hidden: int, bound: float, act: str = "gelu"):
        super().__init__()
        self.act, self.times_slope = ACTS[act]
        self.bound = bound
        self.layers = nn.ModuleList(map(nn.Linear, (dim, hidden, hidden), (hidden, hidden, 1)))
        self.register_buffer("unit", torch.ones(dim))                      # of z, --whiten

    def forward(self, z: Tensor, fixed: bool = False) -> Tensor:
        """z [... d] -> [...]; fixed: parameters are constants, z still gets a gradient."""
        z = z / self.unit
        for i, layer in enumerate(self.layers):
            weight, bias = (p.detach() if fixed else p for p in (layer.weight, layer.bias))
            z = F.linear(self.act(z) if i else z, weight, bias)
        g = rearrange(z, "... 1 -> ...")
        return self.bound * torch.tanh(g / self.bound) if self.bound else g

    @torch.no_grad()
    def gradient(self, z: Tensor) -> Tensor:
        """df/dz [b d] in closed form, four products: W1'(a'(h1) * W2'(a'(h2) * w3)) sech^2."""
        (w1, b1), (w2, b2), (w3, b3) = ((layer.weight, layer.bias) for layer in self.layers)
        h1 = torch.addmm(b1, z / self.unit, w1.T)                          # [b h]
        h2 = torch.addmm(b2, self.act(h1), w2.T)
        back = w3.expand_as(h2)
        if self.bound:
            g = (self.act(h2) * w3).sum(1, keepdim=True) + b3              # [b 1]
            back = (1 - torch.tanh(g / self.bound) ** 2) * w3
        return self.times_slope(self.times_slope(back, h2) @ w2, h1) @ w1 / self.unit


class MMVAEPlus(nn.Module):
    """All nets for images (c, h, w) and captions (l, words), shapes {m: ..}; weight: lambda_m; aux:
    logits of the scales of r_m, [m d]. ValueError if --net or --weight do not fit them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], args: argparse.Namespace):
        super().__init__()
        self.modalities, self.z_dim, self.amp = list(shapes), args.z_dim, args.amp
        self.w_dim = args.w_dim if args.private else 0
        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        self.texts = [m for m, s in shapes.items() if len(s) == 2]
        sizes = [math.prod(s[:1] if m in self.texts else s) for m, s in shapes.items()]
        weight = args.weight or [max(sizes) / n if args.rescale else 1.0 for n in sizes]
        if len(weight) != len(shapes):
            raise ValueError(f"--weight: give {len(shapes)}, one for each of {', '.join(shapes)}")
        self.weight = dict(zip(shapes, weight))
        for m, shape in shapes.items():
            net = args.net
            if net == "auto":
                net = {(3, 28): "resnet", (3, 64): "resnet", (3, 32): "conv"}.get(shape[:2], "mlp")
            self.encoders[m] = nn.ModuleDict(
                {name: LaplaceTower(shape, net, args.width, dim)
                 for name, dim in (("z", self.z_dim), ("w", self.w_dim)) if dim})
            self.decoders[m] = decoder(shape, net, args.width, self.z_dim + self.w_dim)
            if args.sigmoid and m not in self.texts:
                self.decoders[m].append(nn.Sigmoid())
        self.aux = nn.Parameter(torch.zeros(len(shapes), self.w_dim))
        dim = self.z_dim + (args.ebm_on == "u") * len(shapes) * self.w_dim
        self.ebm = EBM(dim, args.ebm_hidden, args.bound, args.ebm_act)

    def encode(self, x: dict[str, Tensor]) -> list[Tensor]:
        """mu_z, scale_z, mu_w, scale_w, each [m b d], of the modalities that x has."""
        q = {"z": [], "w": []}
        with torch.autocast(self.aux.device.type, torch.bfloat16, enabled=self.amp):
            for m in [m for m in self.modalities if m in x]:
                empty = self.aux.new_zeros(len(x[m]), 0)
                q["z"].append(self.encoders[m]["z"](x[m]))
                q["w"].append(self.encoders[m]["w"](x[m]) if self.w_dim else (empty, empty))
        return [torch.stack(p).to(self.aux) for name in q for p in zip(*q[name])]

    def decode(self, m: str, z: Tensor, w: Tensor) -> Tensor:
        """z, w [... d] -> mean images [... c h w], or logits [... l words], in one call."""
        u = torch.cat([w, z], -1)
        with torch.autocast(u.device.type, torch.bfloat16, enabled=self.amp):
            x = self.decoders[m](u.reshape(-1, u.shape[-1]))
        return x.to(u).unflatten(0, u.shape[:-1])

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v [... d] -> z [... d], w [m ... d]."""
        w = v[..., self.z_dim:].unflatten(-1, (len(self.modalities), self.w_dim))
        return v[..., :self.z_dim], rearrange(w, "... m d -> m ... d")


# ---- Densities and losses ------------------------------------------------------------------------
# Log-densities are summed over features, in nats, constants kept.
def log_laplace(z: Tensor, mu: Tensor | float, scale: Tensor | float) -> Tensor:
    """log Laplace(z; mu, scale), [... d] -> [...]."""
    scale = scale if isinstance(scale, Tensor) else z.new_full((), scale)
    return (-(z - mu).abs() / scale - (2 * scale).log()).sum(-1)


def log_base(z: Tensor, args) -> Tensor:
    """log p0(z), [... d] -> [...]: Laplace or Normal of scale base_scale."""
    if args.base == "laplace":
        return log_laplace(z, 0.0, args.base_scale)
    constant = math.log(args.base_scale) + 0.5 * math.log(2 * math.pi)
    return (-0.5 * (z / args.base_scale) ** 2 - constant).sum(-1)


def log_lik(x: Tensor, mean: Tensor, args) -> Tensor:
    """log Laplace or Normal(x; mean, decoder_scale): x [b c h w], mean [... b c h w] -> [... b]; of
    tokens x [b l] under logits mean [... b l words]: the sum over words."""
    if x.ndim == 2:
        log_p = mean.log_softmax(-1).gather(-1, x.expand(mean.shape[:-1])[..., None])
        return reduce(log_p, "... l 1 -> ...", "sum")
    error, scale, log_z = (x - mean).abs(), args.decoder_scale, math.log(2 * args.decoder_scale)
    if args.decoder_dist == "normal":
        error, log_z = error**2 / (2 * scale), math.log(scale) + 0.5 * math.log(2 * math.pi)
    return -reduce(error, "... c h w -> ...", "sum") / scale - log_z * math.prod(x.shape[-3:])


def sample_laplace(mu: Tensor, scale: Tensor | float) -> Tensor:
    """mu + scale * Laplace(0, 1), reparameterised, by the inverse distribution function."""
    u = torch.rand_like(mu) - 0.5
    return mu - scale * u.sign() * torch.log1p((-2 * u.abs()).clamp_min(-1 + 1e-7))


def log_experts(z: Tensor, mu_z: Tensor, scale_z: Tensor) -> Tensor:
    """log q_j(z|x_j) of every expert j: z [... b d], parameters [j b d] -> [j ... b]."""
    lead = (slice(None),) + (None,) * (z.ndim - 2)
    return log_laplace(z, mu_z[lead], scale_z[lead])


def log_lik_all(model: MMVAEPlus, x: dict[str, Tensor], z: Tensor, w: Tensor, args, t=1) -> Tensor:
    """sum_n lambda_n log p(x_n|z, w_n), w_n own for expert m = n, else w'_n ~ r_n: z, w [m k b d]
    -> [m k b]. One decoder call a target, for all experts and samples. t < 1: D9."""
    total = 0.0
    for i, n in enumerate(model.modalities):
        aux = sample_laplace(torch.zeros_like(w), t * sum_to_dim(model.aux[i]))      # w'_n
        own = torch.arange(len(z), device=z.device).eq(i)[:, None, None, None]
        mean = model.decode(n, z, torch.where(own, w, aux))                # [m k b c h w]
        total = total + model.weight[n] * (~own[..., 0] | (t == 1)) * log_lik(x[n], mean, args)
    return total


def log_lik_own(model: MMVAEPlus, x: dict[str, Tensor], z: Tensor, w: Tensor, args) -> Tensor:
    """sum_m lambda_m log p(x_m|z, w_m) over the m that x has: z [b d], w [m b d] -> [b]."""
    return sum(model.weight[m] * log_lik(x[m], model.decode(m, z, w[i]), args)
               for i, m in enumerate(model.modalities) if m in x)


def log_prior(model: MMVAEPlus, z: Tensor, w_all: Tensor, args, use_ebm: bool) -> Tensor:
    """f + log p0 without log Z, f's parameters fixed: z [... d], w_all [m ... d] (--ebm_on u)."""
    if not use_ebm:
        return log_base(z, args)
    log_p = log_base(z / model.ebm.unit[:model.z_dim], args)               # + constant
    u = z if args.ebm_on == "z" else torch.cat([z, *w_all], -1)
    return log_p + model.ebm(u, fixed=True)


def importance_bound(log_w: Tensor) -> Tensor:
    """Looser IWAE bound 1/M sum_m log 1/K sum_k W: [m k b] -> [b]; K = 1 is the ELBO."""
    return (log_w.logsumexp(1) - math.log(log_w.shape[1])).mean(0)


def dreg_surrogate(log_weight, z: Tensor, w: Tensor, q: list[Tensor], beta: float) -> Tensor:
    """[b] with the looser bound's mean gradient, less noisy (Tucker et al. 2019); z, w [m k b d].

    With V_k = W_k / sum W and e_m = q_m / sum_j q_j, expert m's own score -beta V e_m d log q_m is
    replaced by its reparameterised twin: the path through z weighs V (1 - beta e_m (1 - V)), and
    -beta V d e_m/dz is added; other experts' scores stay. Through w: V (1 - beta (1 - V)). With
    M = 1, beta = 1 both are the known V^2. log_weight(z, w, q) -> [m k b]. Its value is the bound.
    """
    fixed = [p.detach() for p in q]
    z_path, w_path = z.clone(), w.clone()
    log_w = log_weight(z_path, w_path, fixed)
    share_k = log_w.detach().softmax(1)                                    # V [m k b]
    log_q = log_experts(z, *fixed[:2])                                     # [j m k b]
    share = log_q.detach().softmax(0)
    own = torch.eye(len(z), device=z.device)[:, :, None, None]             # [j m 1 1]
    e = (share * own).sum(0)                                               # e_m [m k b]
    log_e = (log_q * own).sum(0) - log_q.logsumexp(0)
    z_path.register_hook(lambda g: g * (1 - beta * e * (1 - share_k))[..., None])
    if w.requires_grad:                                                    # not without w
        w_path.register_hook(lambda g: g * (1 - beta * (1 - share_k))[..., None])
    others = (share * (1 - own) * log_experts(z.detach(), *q[:2])).sum(0)
    surrogate = (share_k * (log_w - beta * (e * log_e + others))).sum(1).mean(0)
    return importance_bound(log_w).detach() + surrogate - surrogate.detach()


def objective(model: MMVAEPlus, x: dict[str, Tensor], args, use_ebm: bool, t: float = 1.0) -> dict:
    """Step 3. {"loss": [] minus the bound (or its surrogate), "bound_nats" [], "z_pos": [b' d]}. A
    bound of log p(x) under p0, without w, if all lambda and beta are 1; else the objective of
    MMVAE+, which is none: experts have w priors of their own. use_ebm: less beta log Z. t < 1: D9.
    """
    q, beta = model.encode(x), t * args.beta
    mu_z, scale_z, mu_w, scale_w = (repeat(p, "m b d -> m k b d", k=args.k) for p in q)
    z, w = sample_laplace(mu_z, t * scale_z), sample_laplace(mu_w, t * scale_w)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)[:, :, None, None, None]
    w_all = torch.where(own, w[:, None], w[:, None].detach())              # [n m k b d], D5

    def log_weight(z: Tensor, w: Tensor, q: list[Tensor]) -> Tensor:
        log_qz = log_experts(z, *q[:2]).logsumexp(0) - math.log(len(z))    # [m k b]
        log_qw = log_laplace(w, q[2][:, None], q[3][:, None])
        log_p = log_prior(model, z, w_all, args, use_ebm) + log_laplace(w, 0.0, 1.0)
        return log_lik_all(model, x, z, w, args, t) + beta * (log_p - log_qz - log_qw)

    bound = (dreg_surrogate(log_weight, z, w, q, beta) if args.objective == "dreg" and t == 1
             else importance_bound(log_weight(z, w, q))).mean()
    u = z if args.ebm_on == "z" else torch.cat([z, *w_all], -1)
    return {"loss": -bound, "bound_nats": bound.detach(),
            "z_pos": rearrange(u.detach(), "m k b d -> (m k b) d")}


def ebm_loss(f_pos: Tensor, f_neg: Tensor, reg: float) -> Tensor:
    """Step 4: mean f(z_neg) - mean f(z_pos) + reg (mean f_pos^2 + mean f_neg^2), scalar."""
    return f_neg.mean() - f_pos.mean() + reg * (f_pos.square().mean() + f_neg.square().mean())


# ---- Sampler -------------------------------------------------------------------------------------
def langevin(log_prob, z: Tensor, n_steps: int, step_size: float | Tensor, gradient=None,
             trace: list | None = None) -> Tensor:
    """Unadjusted Langevin: z <- z + s^2/2 d/dz log p(z) + s eps, eps ~ N(0, I); short runs from p0.

    log_prob [b d] -> [b], unnormalised nats, rows separate; gradient: z -> [b d], else autograd; s
    a number or [d]; trace: a list that gets each z. Returns end points, detached; z stays as it is.
    """
    z = z.detach()
    for _ in range(n_steps):
        if gradient is not None:
            grad = gradient(z)
        else:
            with torch.enable_grad():                                      # sum: rows are separate
                (grad,) = torch.autograd.grad(log_prob(z.requires_grad_(True)).sum(), z)
        z = z.detach() + 0.5 * step_size**2 * grad + step_size * torch.randn_like(z)
        if trace is not None:
            trace.append(z)
    return z


def start_prior(model: MMVAEPlus, n: int, args, device) -> Tensor:
    """Draws of p0(z / unit), or with --ebm_on u of that times prod p(w_m): [n d]."""
    draw = sample_laplace(torch.zeros(n, model.ebm.layers[0].in_features, device=device), 1.0)
    if args.base == "gaussian":
        draw[:, :model.z_dim] = torch.randn(n, model.z_dim, device=device)
    draw[:, :model.z_dim] *= args.base_scale
    return draw * model.ebm.unit


def prior_gradient(model: MMVAEPlus, u: Tensor, args) -> Tensor:
    """d/du (f + log p0(z / unit) + sum log p(w_m)), closed form: [b d]."""
    v = u / model.ebm.unit
    z, w = v[:, :model.z_dim], v[:, model.z_dim:]
    pull = z.sign() / args.base_scale if args.base == "laplace" else z / args.base_scale**2
    return model.ebm.gradient(u) - torch.cat([pull, w.sign()], 1) / model.ebm.unit


def prior_chain(model: MMVAEPlus, u: Tensor, n_steps: int, args, trace=None) -> Tensor:
    """n_steps of Langevin on the prior from u [b d], by the closed form."""
    return langevin(None, u, n_steps, args.prior_step_size * model.ebm.unit,
                    lambda u: prior_gradient(model, u, args), trace)


compiled_chain = cache(lambda device_type: torch.compile(      # once; with eager's random numbers
    prior_chain, options={"fallback_random": True, "cpp_wrapper": device_type == "cpu"}))


def sample_prior(model: MMVAEPlus, n: int, args, device, n_steps: int | None = None,
                 trace: list | None = None) -> Tensor:
    """Step 2: n short-run chains from p0, detached [n d]; n_steps 0: draws of p0 itself."""
    n_steps = args.prior_steps if n_steps is None else n_steps
    u = start_prior(model, n, args, device)
    if not args.compile or trace is not None:
        return prior_chain(model, u, n_steps, args, trace)
    for done in range(0, n_steps, 10):      # ten steps a graph: more compile for long
        u = compiled_chain(u.device.type)(model, u, min(10, n_steps - done), args)
    return u


def blur(model: MMVAEPlus, u: Tensor, args) -> Tensor:
    """u [b d] with noise of --smooth units (D10)."""
    return u + args.smooth * model.ebm.unit * torch.randn_like(u) if args.smooth else u


def denoise(model: MMVAEPlus, u: Tensor, args) -> Tensor:
    """Mean of what was blurred to u: u + sigma^2 d/du log p(u), p the prior (Tweedie), [b d]."""
    sigma = args.smooth * model.ebm.unit
    return u + sigma**2 * prior_gradient(model, u, args) if args.smooth else u


def log_joint(model: MMVAEPlus, x: dict[str, Tensor], v: Tensor, args, use_ebm: bool) -> Tensor:
    """log p(v, x_S) + constant, the likelihood to the power 1/beta with --temper: [b d] -> [b]."""
    (z, w), power = model.split(v), 1 / args.beta if args.temper else 1.0
    log_p = log_prior(model, z, w, args, use_ebm) + log_laplace(w, 0.0, 1.0).sum(0)
    return log_p + power * log_lik_own(model, x, z, w, args)


def draw_w(model: MMVAEPlus, b: int, source: str) -> Tensor:
    """w_m [m b d] for modalities that nobody observed: of p(w) (prior) or of r_m (aux)."""
    scale = sum_to_dim(model.aux) if source == "aux" else torch.ones_like(model.aux)
    return sample_laplace(scale.new_zeros(b, *scale.shape), scale).transpose(0, 1)


@torch.no_grad()
def start_posterior(model: MMVAEPlus, x: dict[str, Tensor], args, init: str = "moe") -> Tensor:
    """v [b d] given x_S: z ~ q_m(z|x_m), m in S random a row; w_m ~ q_m(w|x_m), the others as
    --w_test says. init noise: draws of p0(z) prod p(w_m)."""
    observed = [m for m in model.modalities if m in x]
    b, device = len(x[observed[0]]), x[observed[0]].device
    if init == "noise":                                                    # no encoder is asked
        z = start_prior(model, b, args, device)[:, :model.z_dim]
        return torch.cat([z, *draw_w(model, b, "prior")], 1)
    mu_z, scale_z, mu_w, scale_w = model.encode(x)
    pick = torch.randint(len(observed), (b,), device=device), torch.arange(b, device=device)
    z, w = sample_laplace(mu_z[pick], scale_z[pick]), draw_w(model, b, args.w_test)
    for i, name in enumerate(observed):
        w[model.modalities.index(name)] = sample_laplace(mu_w[i], scale_w[i])
    return torch.cat([z, *w], 1)


def sample_posterior(model: MMVAEPlus, x: dict[str, Tensor], args, n_steps: int,
                     use_ebm: bool) -> Tensor:
    """v ~ p(v|x_S), nearly: n_steps of Langevin from --post_init; none: from the encoders."""
    v = start_posterior(model, x, args, args.post_init if n_steps else "moe")
    return langevin(lambda v: log_joint(model, x, v, args, use_ebm), v, n_steps,
                    args.post_step_size)


@torch.no_grad()
def metropolis_rate(log_prob, gradient, z: Tensor, step_size: float) -> Tensor:
    """Mean acceptance [] of a Metropolis test of one Langevin step from z [b d]; 1: no bias."""
    def log_move(to, start, grad):
        return -0.5 * (((to - start) / step_size - 0.5 * step_size * grad) ** 2).sum(1)
    grad = gradient(z)
    new = z + 0.5 * step_size**2 * grad + step_size * torch.randn_like(z)
    log_ratio = log_move(z, new, gradient(new)) - log_move(new, z, grad)
    return (log_prob(new) - log_prob(z) + log_ratio).clamp_max(0).exp().mean()


# ---- Training ------------------------------------------------------------------------------------
def ebm_step(model: MMVAEPlus, z_pos: Tensor, opt, args, world: int) -> dict[str, Tensor]:
    """Steps 2 and 4: fresh prior chains, then one step of f."""
    z_neg = sample_prior(model, max(args.chains // world, 1), args, z_pos.device)
    z_pos = blur(model, z_pos, args)
    f_pos, f_neg = model.ebm(z_pos), model.ebm(z_neg)
    opt.zero_grad(set_to_none=True)
    ebm_loss(f_pos, f_neg, args.ebm_reg).backward()
    opt.step()
    return {"f_pos": f_pos.detach().mean(), "f_neg": f_neg.detach().mean(),
            "gap": (f_pos.mean() - f_neg.mean()).detach(), "std_pos": z_pos.std(),
            "std_neg": z_neg.std(), "max_pos": z_pos.abs().max(), "max_neg": z_neg.abs().max()}


def mcmc_gradients(model: MMVAEPlus, x: dict[str, Tensor], args, use_ebm) -> tuple[Tensor, dict]:
    """Step 3', after (3)'s backward: gradients of decoders and r_n become (1 - rho) (3) + rho times
    minus the likelihood at the chain's end v (own w and w' ~ r_n); --phi teach: the encoders'
    become those of -log q_m(z|x_m) - sum_n log q_n(w_n|x_n). Returns (z_pos [b d], metrics)."""
    v = sample_posterior(model, x, args, args.post_steps, use_ebm)
    z, w = model.split(v)
    for p in [p for p in (*model.decoders.parameters(), model.aux) if p.grad is not None]:
        p.grad.mul_(1 - args.rho)
    aux = sample_laplace(torch.zeros_like(w), rearrange(sum_to_dim(model.aux), "m d -> m 1 d"))
    cross = log_lik_own(model, x, z, aux, args) if model.w_dim else 0.0
    own = log_lik_own(model, x, z, w, args)
    (-args.rho * (own + cross).mean()).backward()
    if args.phi == "teach":
        model.encoders.zero_grad(set_to_none=True)
        mu_z, scale_z, mu_w, scale_w = model.encode(x)
        log_qz = log_experts(z, mu_z, scale_z).mean(0)                     # experts in turn, meaned
        (-(log_qz + log_laplace(w, mu_w, scale_w).sum(0)).mean()).backward()
    return z if args.ebm_on == "z" else v, {"nll_chain_nats": -own.detach().mean()}


def train_step(model: MMVAEPlus, x: dict[str, Tensor], opts: dict, args, use_ebm: bool = True,
               world: int = 1, t: float = 1.0) -> dict[str, Tensor]:
    """One minibatch of the algorithm, x = {m: [b c h w]}; metrics as tensors."""
    out = objective(model, x, args, use_ebm, t)
    opts["vae"].zero_grad(set_to_none=True)
    out["loss"].backward()
    z_pos, metrics = out["z_pos"], {}
    if args.inference == "mcmc" and t == 1:
        z_pos, metrics = mcmc_gradients(model, x, args, use_ebm)
    opts["vae"].step()
    metrics["bound_nats"] = out["bound_nats"]
    return metrics | (ebm_step(model, z_pos, opts["ebm"], args, world) if use_ebm else {})


def positives(model: MMVAEPlus, x: dict[str, Tensor], args) -> Tensor:
    """z_pos [b' d] for f alone: draws of with_encodings' x['q_<m>'] [b 2d], or ends of chains."""
    if args.inference == "mcmc":
        v = sample_posterior(model, x, args, args.post_steps, True)
        return v[:, :model.ebm.layers[0].in_features]
    q = torch.stack([x[f"q_{m}"] for m in model.modalities])               # [m b 2d]
    draw = sample_laplace(*q.chunk(2, -1))
    u = z = draw[..., :model.z_dim]
    if args.ebm_on == "u":
        u = torch.cat([z, *repeat(draw[..., model.z_dim:], "n b d -> n m b d", m=len(z))], -1)
    return u.flatten(0, 1)


def diverged(metrics: dict[str, Tensor], args, run) -> str:
    """Why the chains are lost, "" if they are not; the same answer on every rank."""
    values = torch.stack([v.float() for v in metrics.values()])
    if common.max_over_ranks(~values.isfinite().all(), run.world):
        return "a value is not finite"
    wide = metrics.get("gap", 0 * values[0]).abs() > args.max_gap
    return f"|gap| > {args.max_gap:g}" if common.max_over_ranks(wide, run.world) else ""


def with_encodings(model: MMVAEPlus, dataset: data.Dataset) -> data.Dataset:
    """Frozen encoders run once over every image: entries q_<m> = (mu_z, mu_w, scales), [n 2d]."""
    def code(x: Tensor, m: str) -> Tensor:
        mu_z, scale_z, mu_w, scale_w = (p[0] for p in model.encode({m: x}))
        return torch.cat([mu_z, mu_w, scale_z, scale_w], 1)
    model.eval()
    codes = {m: data.encode(lambda x, m=m: code(x, m), dataset.x[m]) for m in model.modalities}
    return dataset.attach("q", codes)


def make_optimisers(model: MMVAEPlus, args, run) -> dict:
    """Adam for the autoencoder and for f; over several ranks gradients are averaged first."""
    groups = {"vae": [*model.encoders.parameters(), *model.decoders.parameters(), model.aux],
              "ebm": list(model.ebm.parameters())}
    opts = {"vae": torch.optim.Adam(groups["vae"], args.lr, amsgrad=True, fused=True),
            "ebm": torch.optim.Adam(groups["ebm"], args.lr_ebm)}
    for name, params in groups.items():
        opts[name].register_step_pre_hook(
            lambda *_, params=params: common.average_gradients(params, run.world))
    return opts


def train_stage(model: MMVAEPlus, index: int, n_epochs: int, train_set: data.Dataset, args, run,
                state: dict | None) -> None:
    """Stage 0: autoencoder and EBM; stage 1: EBM alone; from its start or a checkpoint's state."""
    name, coded = ("vae", "ebm")[index], index == 1 and args.inference == "amortised"
    opts = make_optimisers(model, args, run)
    train_set = with_encodings(model, train_set) if coded else train_set
    names = [f"q_{m}" for m in model.modalities] if coded else model.modalities
    per_epoch = max(len(train_set) // args.batch_size, 1)
    total = min(n_epochs * per_epoch, args.max_steps or n_epochs * per_epoch)
    if args.prior == "ebm" and not args.epochs_ebm and total <= args.ebm_warmup * per_epoch:
        raise common.RunError("--max_steps ends within --ebm_warmup: f would never train")

    def restore(state: dict) -> int:
        model.load_state_dict(state["model"])
        for key in opts:
            opts[key].load_state_dict(state["opts"][key])
        return state["step"]

    def save() -> None:
        run.save({"stage": index, "step": step, "model": model.state_dict(),
                  "opts": {key: opt.state_dict() for key, opt in opts.items()}})

    step = restore(state) if state else 0
    save()                                                                 # a rollback needs one
    model.train()
    while step < total:
        epoch = step // per_epoch
        use_ebm = args.prior == "ebm" and epoch >= args.ebm_warmup
        order = torch.Generator().manual_seed(args.seed * 10**6 + index * 10**5 + epoch)
        for x in islice(data.batches(train_set, args.batch_size, order, run.device,
                                     step % per_epoch, run.rank, run.world, names), total - step):
            share = 1 - step / total if args.decay else 1.0
            for key, rate in (("vae", args.lr), ("ebm", args.lr_ebm * 0.5**run.rollbacks)):
                opts[key].param_groups[0]["lr"] = share * rate
            t = min(step / (args.cross_warmup * per_epoch), 1.0) if args.cross_warmup else 1.0
            if index:
                metrics = ebm_step(model, positives(model, x, args), opts["ebm"], args, run.world)
            else:
                metrics = train_step(model, x, opts, args, use_ebm, run.world, t)
            step += 1
            due, logged = run.checkpoint_due(), step % args.log_every == 0 or step == total
            reason = diverged(metrics, args, run) if due or logged else ""
            if reason:
                step = restore(run.rollback(reason))
                break
            if logged:
                run.log(stage=name, step=step, epoch=epoch, split="train", **metrics)
                run.progress(name, epoch, n_epochs, step, total, args.batch_size, **metrics)
            if due:
                save()
            if run.stop_requested:
                run.stop()
    run.say(f"stage {name}: {step} steps")


def train(model: MMVAEPlus, train_set: data.Dataset, args, run) -> None:
    """Both stages in turn; --resume goes on where the checkpoint stands."""
    state = run.load(args.checkpoint, free_flags(args)) if args.resume else {"stage": 0}
    if args.resume:
        model.load_state_dict(state["model"])
    stages = [args.epochs_vae, args.epochs_ebm if args.prior == "ebm" else 0]
    for i in range(state["stage"], len(stages)):
        resumed = state if i == state["stage"] and "opts" in state else None
        if i and args.whiten and not resumed:                              # units of the encodings
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                torch.manual_seed(args.seed)                               # the same on every rank
                z = encoded(model, train_set.head(5000), args, run.device)[:, :model.z_dim]
            model.ebm.unit[:model.z_dim] = z.abs().mean(0)
        if stages[i]:
            train_stage(model, i, stages[i], train_set, args, run, resumed)
        run.save({"stage": i + 1, "model": model.state_dict()})


# ---- Evaluation ----------------------------------------------------------------------------------
def joint_images(model: MMVAEPlus, u: Tensor, args) -> dict[str, Tensor]:
    """Mean images {m: [b c h w]} of u = z, w as --w_test says, or of u = (z, w_1 .. w_M)."""
    if u.shape[1] == model.z_dim:
        u = torch.cat([u, *draw_w(model, len(u), args.w_test)], 1)
    z, w = model.split(u)
    return {m: model.decode(m, z, w[i]).clamp(0, 1) for i, m in enumerate(model.modalities)
            if m not in model.texts}


def draw_prior(model: MMVAEPlus, n: int, args, device, n_steps: int) -> Tensor:
    """n ends of prior chains, denoised, [n d]; for 0 steps z of the autoencoder's own p0."""
    u = sample_prior(model, n, args, device, n_steps)
    return denoise(model, u, args) if n_steps else (u / model.ebm.unit)[:, :model.z_dim]


def encoded(model: MMVAEPlus, dataset: data.Dataset, args, device) -> Tensor:
    """A draw of v for each item, [n d]: of q(v|x), or with --inference mcmc a chain's end."""
    n_steps = args.post_steps if args.inference == "mcmc" else 0
    return torch.cat([sample_posterior(model, x, args, n_steps, args.prior == "ebm")
                      for x in data.batches(dataset, args.eval_batch, device=device)])


def evaluate(model: MMVAEPlus, train_set: data.Dataset, test: data.Dataset, args, run) -> dict:
    """Bound, coherence under the EBM and under p0, controls, diagnostics, pictures; test split.

    coherence_*_base: the same autoencoder with p0. Without Langevin steps (--cross_steps 0) cross
    generation asks no prior, so coherence_cross_* and *_base then are one number.
    """
    run.begin_evaluation()
    model.requires_grad_(False).eval()
    device, use_ebm = run.device, args.prior == "ebm"
    bound = argparse.Namespace(**vars(args) | {"objective": "iwae"})       # with p0: Z is unknown
    metrics = common.mean_over(
        lambda x: {"bound_base_nats": objective(model, x, bound, False)["bound_nats"]},
        data.batches(test, args.eval_batch, device=device), device)
    judges = common.load_judges(train_set, test, run.judges, device, run.say)
    inception = common.load_inception(args, device)
    real = common.reference(test, train_set, judges, inception, args.n_eval)

    def sample(n, steps=args.prior_steps if use_ebm else 0):
        return joint_images(model, draw_prior(model, n, args, device, steps), args)

    def generate(x, targets, n_steps=args.cross_steps, use_ebm=use_ebm):
        z, w = model.split(sample_posterior(model, x, args, n_steps, use_ebm))
        out = {m: model.decode(m, z, w[model.modalities.index(m)]) for m in targets}
        return {m: v.argmax(-1) if m in model.texts else v.clamp(0, 1) for m, v in out.items()}

    metrics |= common.coherence_joint(sample, judges, args.n_eval, args.eval_batch, real)
    base = common.coherence_joint(lambda n: sample(n, 0), judges, args.n_eval, args.eval_batch,
                                  real)
    metrics |= {f"{key}_base": value for key, value in base.items()}
    cross = common.coherence_cross(generate, test, judges, args.eval_batch, real, run.progress)
    metrics |= cross | real.metrics
    if args.cross_steps and use_ebm and judges:
        cross = common.coherence_cross(lambda x, t: generate(x, t, use_ebm=False), test, judges,
                                       args.eval_batch)
    metrics |= {f"{k}_base": v for k, v in cross.items() if k.startswith("coherence_cross")}
    if judges:
        metrics |= controls(model, train_set, test, judges, generate, args, run)
    if use_ebm:
        metrics |= diagnose_prior(model, test, args, run)
    metrics |= diagnose_posterior(model, test, args, run, use_ebm)
    images = test.take(slice(8), device, [m for m in test.modalities if m not in model.texts])
    common.draw_samples(run.dir, sample, generate, images)
    if model.texts:                                                        # said of eight images
        said = generate(images, model.texts).values()
        common.save_captions(run.dir / "captions.txt", torch.cat([*said]), test.words)
    metrics |= probe_latents(model, train_set, test, args, run) if test.y is not None else {}
    run.time_samples(sample)
    return metrics


def controls(model: MMVAEPlus, train_set: data.Dataset, test: data.Dataset, judges, generate, args,
             run, n: int = 2000) -> dict[str, float]:
    """Does the EBM earn its place? Joint coherence (2,000 samples) of mixtures of Gaussians and of
    resampling fitted to encoded z, and of other chain lengths; cross coherence with Langevin."""
    z = encoded(model, train_set.head(5000), args, run.device)[:, :model.z_dim]
    metrics, few = {}, test.head(1000)
    priors = {"resampled": lambda b: z[torch.randint(len(z), (b,), device=z.device)]}
    for k in args.gmm:
        gmm = common.fit_gmm(z, min(k, len(z)), n_iter=30)
        priors[f"gmm{k}"] = lambda b, gmm=gmm: common.sample_gmm(gmm, b).to(z.device)
    for steps in args.prior_sweep if args.prior == "ebm" else []:
        priors[f"steps{steps}"] = lambda b, k=steps: draw_prior(model, b, args, z.device, k)
    for name, draw in priors.items():
        joint = common.coherence_joint(lambda b: joint_images(model, draw(b), args), judges,
                                       min(n, args.n_eval), args.eval_batch)
        metrics |= {f"{key}_{name}": value for key, value in joint.items()}
    for steps in dict.fromkeys((0, args.post_steps)):
        cross = common.coherence_cross(lambda x, t: generate(x, t, n_steps=steps), few, judges,
                                       args.eval_batch, subsets=[(m,) for m in test.modalities])
        metrics[f"coherence_cross_1_langevin{steps}"] = cross["coherence_cross_1"]
    return metrics


@torch.no_grad()
def diagnose_prior(model: MMVAEPlus, test: data.Dataset, args, run) -> dict[str, float]:
    """f and spread of z_pos and z_neg; a chain 20 times as long (is it a sampler, or a short-run
    flow?), its mean energy, minus log-density, along the way; Metropolis acceptance at its end."""
    v = encoded(model, test.head(2000), args, run.device)
    z_pos = blur(model, v[:, :model.z_dim] if args.ebm_on == "z" else v, args)
    z_neg, trace = sample_prior(model, len(v), args, run.device), []
    n_steps = 20 * max(args.prior_steps, 1)
    z_long = sample_prior(model, 64, args, run.device, n_steps, trace)

    def log_prob(u):
        z, w = (u / model.ebm.unit).tensor_split([model.z_dim], 1)
        return log_base(z, args) + log_laplace(w, 0.0, 1.0) + model.ebm(u)

    chains = torch.stack(trace)                                            # [n c d]
    energy = -log_prob(chains.flatten(0, 1)).unflatten(0, chains.shape[:2])          # [n c]
    rate = metropolis_rate(log_prob, lambda u: prior_gradient(model, u, args), z_long,
                           args.prior_step_size * model.ebm.unit)
    report = common.chain_report(chains[n_steps // 2:], run.dir / "diagnostics.png", rate,
                                 energy[:, :8])
    f_pos, f_neg, f_long = (model.ebm(u).mean() for u in (z_pos, z_neg, z_long))
    return report | {
        "f_pos": f_pos, "f_neg": f_neg, "f_long": f_long, "gap": f_pos - f_neg,
        "std_pos": z_pos.std(), "std_neg": z_neg.std(), "std_long": z_long.std(),
        "max_pos": z_pos.abs().max(), "max_neg": z_neg.abs().max(), "accept_rate": rate,
        "energy_start": energy[0].mean(), "energy_trained": energy[n_steps // 20 - 1].mean(),
        "energy_long": energy[-1].mean()}


def diagnose_posterior(model: MMVAEPlus, test: data.Dataset, args, run, use_ebm) -> dict:
    """The log-density of the posterior chain before and after post_steps, 200 test items, means."""
    x = test.head(200).take(slice(200), run.device)
    start = start_posterior(model, x, args, args.post_init)
    end = langevin(lambda v: log_joint(model, x, v, args, use_ebm), start, args.post_steps,
                   args.post_step_size)
    return {f"post_log_p_{name}_nats": log_joint(model, x, v, args, use_ebm).mean()
            for name, v in (("start", start), ("end", end))}


def probe_latents(model: MMVAEPlus, train_set: data.Dataset, test: data.Dataset, args, run) -> dict:
    """latent_accuracy_z, _w_<m>: test accuracy of linear classifiers of draws; of w: a leak."""
    sets = train_set.head(2000), test.head(2000)
    (z, w), (z_test, w_test) = (model.split(encoded(model, s, args, run.device)) for s in sets)
    pairs = {"z": (z, z_test)} | {f"w_{m}": pair for m, *pair in zip(
        model.modalities, w, w_test) if model.w_dim}
    return {f"latent_accuracy_{name}": common.linear_accuracy(v, sets[0].y, v_test, sets[1].y)
            for name, (v, v_test) in pairs.items()}


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
            model = MMVAEPlus(sets["train"].net_shapes, args)
            model.to(run.device, memory_format=torch.channels_last)
        except ValueError as error:
            raise common.RunError(error) from None
        run.start(model)
        if args.eval_only:
            model.load_state_dict(run.load(args.checkpoint, free_flags(args), 2)["model"])
        else:
            train(model, sets["train"], args, run)
        train_set, test = sets["train"], sets["test"].head(args.n_eval)
        return run.finish(evaluate(model, train_set, test, args, run), train_set.note, len(test))


if __name__ == "__main__":
    common.cli(main)
