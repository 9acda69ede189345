"""Score-based multimodal autoencoder: SBM-VAE and SBM-RAE (Wesego & Rooshenas, arXiv 2305.15708).

Every modality has an autoencoder of its own, trained alone, so that its pictures do not suffer
from the others. A diffusion model of their stacked latents then learns what belongs together.

Model       z_m = mean of q_m(z|x_m) (VAE) or the code (RAE),  Z = (z_1 .. z_M)  [b m d]
            forward SDE  dZ = -1/2 beta(t) Z dt + sqrt(beta(t)) dW,  beta linear, 0 < t <= 1
            Z_t = alpha_t Z + sigma_t eps,  alpha_t^2 + sigma_t^2 = 1
Symbols     s(Z_t, t) score, estimate of grad log p(Z_t); eps = -sigma_t s; O observed modalities;
            E(z_i, z_j, t) pair energy, low for pairs that belong together; w guidance weight

Algorithm
  ae      all M autoencoders side by side: squared error + beta KL(q_m || N(0, I)), or for an RAE
          squared error of dec(z + sigma_z n) + lambda |z|^2; then frozen, all data encoded once
  score   t ~ U(0, 1):  minimise the mean of (sigma_t s(Z_t, t) + eps)^2.  Masked training: a
          random subset of a sample's modalities stays clean at time 0, the loss is on the rest
  energy  optional: sigmoid(-E) tells noised pairs of one tuple from shuffled ones; its optimum is
          -log p(z_i, z_j) / (p(z_i) p(z_j)), so that -dE/dz_j = d log p(z_j|z_i) - d log p(z_j)
  sample  Z ~ N(0, I) back from t = 1: predictor-corrector, or the probability-flow ODE by a
          second-order multistep rule in log(alpha/sigma). Observed latents are imposed in each
          step; with w, the score of each missing z_j gains -w mean_{i in O} dE(z_i, z_j, t)/dz_j

Usage
  python sbm_vae.py          four synthetic modalities, 9 minutes on two CPU cores: given one 0.82
  python sbm_vae.py --dataset polymnist10 --preset paper --data_dir DIR       the authors' setting
  python sbm_vae.py --eval_only --sampler pc --obs_noise fresh                another sampler

Deviations from the authors' public code (--preset paper undoes those marked *)
  D1* latents standardised, net predicts v = alpha eps - sigma Z from alpha Z_t, loss on v, t with
      uniform atan(sigma/alpha), 1000 t in the embedding, EMA, beta(t) 0.1 .. 20
  D2* masked training and clean observed latents; official: observed z_o enter as (alpha+sigma) z_o
  D3* corrector steps of fixed size: no sample depends on its batch; official: batch-mean norms
  D4* the ODE sampler; predictor steps end at t_end (theirs overshoot), corrector at the new time
  D5  w is for each sample, all observed i (of a masked net: alpha z_i); theirs: one pair, w / batch
  D6  energy: a pair is drawn for each sample, not one for a batch; (*) a dot product of features
  D7  autoencoders share one learning-rate schedule and the epoch with the best summed loss
  D8  all latents are encoded once, so that mnist_svhn's pairs are drawn once
  D9  not in --preset paper either: on faces an energy for each pair that moves both its latents,
      their stage lengths of RAEs and energies (--epochs_*), images padded to 32 x 32 in the loss.
      Not built: their audio-video data, the image refiner
"""
import argparse
import math
from itertools import combinations, islice

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import common
import data

# ---- Config --------------------------------------------------------------------------------------
POLY = dict(z_dim=64, ae_net="resnet", epochs_ae=200, epochs_score=500, batch_size=256,
            batch_ae=256, lr_ae=1e-3, lr_score=5e-4, width=512, vae_beta=[0.5], dim=64)
PRESETS = {"synth_mnist_svhn": {}, "paired": {},                           # --preset ours
    "synth_polymnist": dict(n_modalities=4, n_eval=2000), "mnist_svhn": dict(epochs_score=45),
    "polymnist": POLY, "polymnist10": dict(POLY, dim=128, n_modalities=10),
    "celebamask_hq": dict(POLY, z_dim=256, vae_beta=[0.1, 1.0, 0.1], lr_ae=2e-4, epochs_ae=300,
                          dim=256, dim_mults=[1, 2, 2, 2, 2], epochs_score=1000, lr_score=1e-4)}
PAPER = dict(
    ae_net="resnet", score_net="unet", parametrisation="score", standardise="none", ema=0.0,
    time_scale=1.0, times="uniform", cond_train="none", obs_noise="official", sampler="pc",
    n_steps=100, corrector="official", beta_min=1.0, beta_max=5.0, schedule="plateau", z_dim=64,
    dim=64, noise_negatives=True, lr_score=5e-4, energy_net="mlp", lr_energy=5e-4, vae_beta=[0.5],
    lr_ae=1e-3, batch_size=256, batch_ae=256)
PAPER_MORE = {"polymnist10": dict(dim=128), "celebamask_hq": dict(         # on top of PAPER
    z_dim=256, dim=256, lr_ae=2e-4, lr_score=5e-5, n_steps=1000, beta_min=0.1, beta_max=20.0,
    schedule="constant", vae_beta=[0.1, 1.0, 0.1], rae_lambda=[1e-4, 1e-5, 1e-4],
    rae_sigma=[1e-3, 1e-3, 0.1])}
SAMPLER_FLAGS = ("sampler", "n_steps", "obs_noise", "corrector", "snr", "repaint", "jump")
INFERENCE_FLAGS = (*SAMPLER_FLAGS, "guide_weight", "guide_sweep", "curve", "n_curve")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Explicit flag > --preset > data set's preset > default, as --help shows."""
    number, switch = common.number, argparse.BooleanOptionalAction
    p = common.run_parser("sbm_vae.py", __doc__, "synth_polymnist", list(PRESETS))
    flag = p.add_argument_group("model").add_argument
    flag("--preset", default="ours", choices=["ours", "paper"], help="paper: the official code")
    flag("--autoencoder", default="vae", choices=["vae", "rae"])
    flag("--ae_net", default="patch", choices=["patch", "resnet"], help="patch: fast on a CPU")
    flag("--z_dim", type=number(int, 1), default=32, help="d, of each modality")
    flag("--score_net", default="mlp", choices=["mlp", "unet"])
    flag("--width", type=number(int, 8), default=192, help="of the MLP; twice it in the trunk")
    flag("--blocks", type=number(int, 1), default=2, help="layers of the MLP's trunk")
    flag("--dim", type=number(int, 8), default=64, help="of the UNet; 128 for 10 modalities")
    flag("--dim_mults", type=number(int, 1), nargs="+", default=[1, 2, 2, 2], help="of the UNet")
    flag("--energy_net", default="dot", choices=["dot", "mlp"], help="of the pairs; mlp: theirs")
    flag("--parametrisation", default="v", choices=["v", "eps", "score"], help="the net's output")
    flag("--time_scale", type=number(float, 0, open_low=True), default=1000.0)
    flag("--standardise", default="dim", choices=["none", "dim", "modality"],
         help="latents to mean 0, and sd 1 in each dimension or in each modality's widest one")
    flag("--times", default="angle", choices=["uniform", "angle"], help="t of training: uniform, "
         "or atan(sigma/alpha) uniform")
    flag("--beta_min", type=number(float, 0, open_low=True), default=0.1)
    flag("--beta_max", type=number(float, 0, 60, open_low=True), default=20.0)
    flag = p.add_argument_group("training").add_argument
    flag("--epochs_ae", type=number(int, 0), default=7)
    flag("--epochs_score", type=number(int, 0), default=85)
    flag("--epochs_energy", type=number(int, 0), default=0, help="0: no guidance")
    flag("--batch_size", type=number(int, 1), default=128, help="over all processes")
    flag("--batch_ae", type=number(int, 1), default=32, help="the autoencoders': many small steps")
    flag("--lr_ae", type=number(float, 0, open_low=True), default=2e-3)
    flag("--lr_score", type=number(float, 0, open_low=True), default=1e-3)
    flag("--lr_energy", type=number(float, 0, open_low=True), default=2e-3)
    flag("--schedule", default="cosine", choices=["constant", "plateau", "cosine"],
         help="of the learning rate; plateau is for the autoencoders only")
    flag("--vae_beta", type=number(float, 0), nargs="+", default=[0.05], help="one, or one each")
    flag("--rae_lambda", type=number(float, 0), nargs="+", default=[1e-5])
    flag("--rae_sigma", type=number(float, 0), nargs="+", default=[0.01], help="noise on codes")
    flag("--cond_train", default="masked", choices=["none", "masked"])
    flag("--masked_share", type=number(float, 0, 1), default=0.7, help="samples with observed ones")
    flag("--noise_negatives", action=switch, default=False, help="N(0, I) pairs as negatives too")
    flag("--ema", type=number(float, 0, 0.99999), default=0.999, help="of the score net; 0: none")
    flag = p.add_argument_group("sampler").add_argument
    flag("--sampler", default="ode", choices=SAMPLERS, help="em: pc, no corrector")
    flag("--n_steps", type=number(int, 2), default=25, help="network calls; pc: two a step")
    flag("--obs_noise", default="clean", choices=OBS_NOISE,
         help="how observed latents enter; clean and masked: at time 0")
    flag("--corrector", default="fixed", choices=["fixed", "official"])
    flag("--snr", type=number(float, 0, open_low=True), default=0.16, help="of the corrector")
    flag("--repaint", type=number(int, 1), default=1, help="passes over each --jump steps (pc, em)")
    flag("--jump", type=number(int, 1), default=10)
    flag("--guide_weight", type=number(float, 0), default=0.0, help="w; needs --epochs_energy")
    flag("--guide_sweep", type=number(float, 0), nargs="*", default=[], help="weights to compare")
    flag("--curve", type=number(int, 4), nargs="*", default=[10, 20, 50, 200], help="network calls")
    flag("--n_curve", type=number(int, 4), default=500, help="samples a point of curve and sweep")
    dataset, preset, masked = (common.peek(p, argv, f) for f in ("dataset", "preset", "cond_train"))
    paper = PAPER | PAPER_MORE.get(dataset, {}) if preset == "paper" else {}
    noise = {"obs_noise": "fresh"} if masked == "none" else {}             # no net for clean ones
    p.set_defaults(**PRESETS.get(dataset, {}) | noise | paper)
    args = p.parse_args(argv)
    side = math.isqrt(args.z_dim)
    if args.score_net == "unet" and (side**2 != args.z_dim or side % 2**(len(args.dim_mults) - 1)):
        p.error(f"--score_net unet halves the side of a square of --z_dim {args.z_dim} entries "
                f"{len(args.dim_mults) - 1} times (--dim_mults): give 64 or 256")
    if args.sampler == "ode" and args.repaint > 1:
        p.error("--repaint is for --sampler pc and em")
    if not args.epochs_energy and (args.guide_weight or args.guide_sweep):
        p.error("--guide_weight and --guide_sweep need --epochs_energy, an energy to guide by")
    return args


# ---- Networks ------------------------------------------------------------------------------------
class GroupedLinear(nn.Module):
    """g linear layers side by side: [b g i] -> [b g o], initialised as nn.Linear."""

    def __init__(self, g: int, n_in: int, n_out: int):
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(g, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(g, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.baddbmm(self.bias, rearrange(x, "b g i -> g b i"), self.weight)
        return rearrange(x, "g b o -> b g o")


class RBlock(nn.Module):
    """act(shortcut(x) + conv-BN-act-conv-BN(x)), then pooled or upsampled; g nets in g groups."""

    def __init__(self, widths: tuple[int, int, int], g: int, resample: nn.Module, smooth: bool):
        super().__init__()
        a, mid, b = (g * n for n in widths)
        self.act = nn.GELU() if smooth else nn.LeakyReLU(0.2)
        self.body = nn.Sequential(
            nn.Conv2d(a, mid, 3, 1, 1, groups=g, bias=False), nn.BatchNorm2d(mid), self.act,
            nn.Conv2d(mid, b, 3, 1, 1, groups=g, bias=False), nn.BatchNorm2d(b))
        self.shortcut = nn.Conv2d(a, b, 1, groups=g, bias=False) if a != b else nn.Identity()
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.act(self.shortcut(x) + self.body(x)))


class Patches(nn.Module):
    """g bodies of dense layers on a 4 x 4 grid of patches: three matrix products each way."""

    def __init__(self, shape: tuple[int, ...], g: int, z_dim: int):
        super().__init__()
        c, h, w = shape
        self.n_features, self.shape, size = 256, shape, c * h * w // 16
        self.enc = nn.ModuleList([GroupedLinear(g, size, 96), GroupedLinear(g, 16 * 96, 256)])
        self.dec = nn.ModuleList([GroupedLinear(g, z_dim, 256), GroupedLinear(g, 256, 16 * 96),
                                  GroupedLinear(g, 96, size)])

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:                # [b g c h w] -> [b g f]
        x = rearrange(x, "b g c (i h) (j w) -> (b i j) g (c h w)", i=4, j=4)
        h = rearrange(self.enc[0](x).relu(), "(b n) g f -> b g (n f)", n=16)
        h = self.enc[1](h).relu()
        return h, h

    def decode(self, z: Tensor) -> Tensor:                                 # [b g d] -> [b g c h w]
        h = self.dec[1](self.dec[0](z).relu()).relu()
        h = self.dec[2](rearrange(h, "b g (n f) -> (b n) g f", n=16))
        return rearrange(h, "(b i j) g (c h w) -> b g c (i h) (j w)", i=4, j=4, c=self.shape[0],
                         h=self.shape[1] // 4).sigmoid()


RESNETS = {     # shape: (encoder blocks, decoder blocks) of (in, mid, out, factor)
    (3, 32, 32): ([(64, 64, 64, 2), (64, 128, 128, 2), (128, 256, 256, 2)],
                  [(256, 128, 128, 2), (128, 128, 64, 2), (64, 64, 64, 2)]),
    (3, 128, 128): ([(64, 128, 128, 2), (128, 256, 256, 2), (256, 512, 512, 2)],
                    [(512, 512, 256, 2), (256, 256, 128, 2), (128, 128, 64, 2)]),
    (1, 128, 128): ([(64, 128, 128, 4), (128, 256, 256, 4)],
                    [(256, 256, 128, 4), (128, 128, 64, 4)])}
RESNETS |= dict.fromkeys([(3, 28, 28), (1, 28, 28), (1, 32, 32)], RESNETS[3, 32, 32])


class ResNets(nn.Module):
    """g bodies of the paper's ResNets; 28 x 28 is padded to 32 and cropped. Faces: smooth nets."""

    def __init__(self, shape: tuple[int, ...], g: int, z_dim: int):
        super().__init__()
        self.pad, side = (2, 32) if shape[1] == 28 else (0, shape[1])
        (enc, dec), smooth, self.g, c = RESNETS[shape], side == 128, g, shape[0]
        scale = math.prod(r for *_, r in enc)
        self.stem = nn.Sequential(
            nn.Conv2d(g * c, g * enc[0][0], 5, 1, 2, groups=g), nn.BatchNorm2d(g * enc[0][0]),
            nn.LeakyReLU(0.1 if smooth else 0.2), nn.AvgPool2d(2),
            *[RBlock(n[:3], g, nn.AvgPool2d(n[3]), smooth) for n in enc])
        self.side, width = side // scale, enc[-1][2]
        self.n_features = width // 2 * (self.side // 2) ** 2
        self.lift, last = GroupedLinear(g, z_dim, width * self.side**2), dec[-1][2]
        up = [nn.Upsample(scale_factor=n[3], mode="bilinear" if smooth else "nearest") for n in dec]
        self.head = nn.Sequential(
            *[RBlock(n[:3], g, u, smooth) for n, u in zip(dec, up)],
            RBlock((last, last, last), g, nn.Identity(), False),
            nn.Conv2d(g * last, g * c, 5, 1, 2, groups=g),
            nn.Sigmoid() if smooth else nn.Identity())

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:                # half for mu, half for s
        x = F.pad(rearrange(x, "b g c h w -> b (g c) h w"), (self.pad,) * 4)
        return rearrange(self.stem(x), "b (g two f) h w -> two b g (f h w)", g=self.g, two=2)

    def decode(self, z: Tensor) -> Tensor:
        h = rearrange(self.lift(z).relu(), "b g (f h w) -> b (g f) h w", h=self.side, w=self.side)
        x = rearrange(self.head(h), "b (g c) h w -> b g c h w", g=self.g)
        return x[..., self.pad:x.shape[-2] - self.pad, self.pad:x.shape[-1] - self.pad]


class Attributes(nn.Module):
    """The paper's body for n binary attributes [b 1 n]; decodes to logits."""

    def __init__(self, n: int, z_dim: int):
        super().__init__()
        def dense(*sizes):
            return nn.Sequential(*[m for a, b in zip(sizes, sizes[1:]) for m in
                                   (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())])
        self.n_features, self.body = 512, dense(n, 128, 256, 512, 512, 512)
        self.head = nn.Sequential(dense(z_dim, 512, 512, 512, 256, 128), nn.Linear(128, n))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x[:, 0])[:, None]
        return h, h

    def decode(self, z: Tensor) -> Tensor:
        return self.head(z[:, 0])[:, None]


class Autoencoders(nn.Module):
    """g autoencoders for modalities of one shape, side by side: g groups, none shares a weight.

    x [b g ...] in [0, 1]; encode -> mu, log_var [b g d] (log_var None for an RAE).
    """

    def __init__(self, shape: tuple[int, ...], g: int, args):
        super().__init__()
        if len(shape) == 1:
            self.net = Attributes(shape[0], args.z_dim)
        elif shape not in RESNETS if args.ae_net == "resnet" else shape[1] % 4 or shape[2] % 4:
            raise ValueError(f"--ae_net {args.ae_net} is not made for images of {shape}: patch "
                             "takes multiples of 4, resnet 28x28, 32x32, 128x128; resize or pad")
        else:
            self.net = (ResNets if args.ae_net == "resnet" else Patches)(shape, g, args.z_dim)
        self.mu, self.decode = GroupedLinear(g, self.net.n_features, args.z_dim), self.net.decode
        if args.autoencoder == "vae":
            self.log_var = GroupedLinear(g, self.net.n_features, args.z_dim)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h_mu, h_var = self.net.features(x)
        return self.mu(h_mu), self.log_var(h_var) if hasattr(self, "log_var") else None


def embed(t: Tensor, dim: int) -> Tensor:
    """[...] -> [... dim]: sine and cosine of t exp(-k ln(10^4) / (dim/2 - 1)), k = 0 .. dim/2-1."""
    k = torch.arange((dim + 1) // 2, device=t.device)
    phase = t[..., None].float() * (-k * math.log(1e4) / max(dim // 2 - 1, 1)).exp()
    return torch.cat([phase.sin(), phase.cos()], -1)[..., :dim]


def time_mlp(n_in: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class MLP(nn.Module):
    """Z [b m d] and a time for each modality [b m] -> [b m d]: an extractor a modality, a trunk on
    all their features, a head a modality that sees its own latent again. One dense net instead
    needs many times the steps to find what the modalities share."""

    def __init__(self, m: int, args):
        super().__init__()
        a, own, self.scale = args.width, args.z_dim + 33, args.time_scale
        self.extract = nn.Sequential(GroupedLinear(m, own, a), nn.SiLU(), GroupedLinear(m, a, a),
                                     nn.SiLU())
        sizes = [m * (a + 33)] + [2 * a] * args.blocks
        self.trunk = nn.Sequential(*[layer for n, k in zip(sizes, sizes[1:])
                                     for layer in (nn.Linear(n, k), nn.SiLU())])
        self.head = nn.Sequential(
            GroupedLinear(m, 2 * a + own, a), nn.SiLU(), GroupedLinear(m, a, a), nn.SiLU(),
            GroupedLinear(m, a, args.z_dim))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        time = torch.cat([(t == 0).to(z)[..., None], embed(self.scale * t, 32)], -1)
        own = torch.cat([z, time], -1)
        shared = self.trunk(torch.cat([self.extract(own), time], -1).flatten(1))
        return self.head(torch.cat([repeat(shared, "b f -> b m f", m=z.shape[1]), own], -1))


class ConvNeXt(nn.Module):
    """Depthwise 7 x 7 plus the time's shift, then two 3 x 3, with a shortcut."""

    def __init__(self, a: int, b: int, time_dim: int = 0):
        super().__init__()
        self.time = nn.Sequential(nn.GELU(), nn.Linear(time_dim, a)) if time_dim else None
        self.spatial = nn.Conv2d(a, a, 7, padding=3, groups=a)
        self.body = nn.Sequential(nn.GroupNorm(1, a), nn.Conv2d(a, 2 * b, 3, padding=1), nn.GELU(),
                                  nn.GroupNorm(1, 2 * b), nn.Conv2d(2 * b, b, 3, padding=1))
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.spatial(x)
        if self.time is not None:
            h = h + rearrange(self.time(time), "b c -> b c 1 1")
        return self.body(h) + self.shortcut(x)


class Attention(nn.Module):
    """x + attention(GroupNorm(x)), 4 heads of 32; linear: softmax over features and places."""

    def __init__(self, c: int, linear: bool):
        super().__init__()
        self.linear, self.norm = linear, nn.GroupNorm(1, c)
        self.qkv, out = nn.Conv2d(c, 3 * 128, 1, bias=False), nn.Conv2d(128, c, 1)
        self.out = nn.Sequential(out, nn.GroupNorm(1, c)) if linear else out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n heads c) h w -> n b heads c (h w)", n=3,
                            heads=4)
        if self.linear:
            context = k.softmax(-1) @ v.mT                                 # [b heads c c]
            h = context.mT @ q.softmax(-2) * 32**-0.5
        else:
            h = v @ (q.mT @ k * 32**-0.5).softmax(-1).mT
        return x + self.out(rearrange(h, "b heads c (h w) -> b (heads c) h w", h=x.shape[2]))


class Unet(nn.Module):
    """The paper's net: Z as an image of m channels and side sqrt(d). As theirs it has one time, the
    largest, and never uses the finest skip. Masked: m more inputs tell which are observed."""

    def __init__(self, m: int, args):
        super().__init__()
        self.masked, self.scale, self.dim = args.cond_train == "masked", args.time_scale, args.dim
        dims = [args.dim // 3 * 2, *(args.dim * mult for mult in args.dim_mults)]
        pairs, time = list(zip(dims, dims[1:])), 4 * args.dim
        self.time = time_mlp(args.dim, time)
        self.stem = nn.Conv2d(m * (1 + self.masked), dims[0], 7, padding=3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(pairs):
            half = nn.Conv2d(b, b, 4, 2, 1) if i < len(pairs) - 1 else nn.Identity()
            self.down.append(nn.ModuleList([ConvNeXt(a, b, time), ConvNeXt(b, b, time),
                                            Attention(b, True), half]))
        self.mid = nn.ModuleList([ConvNeXt(b, b, time), Attention(b, False), ConvNeXt(b, b, time)])
        for a, b in reversed(pairs[1:]):
            self.up.append(nn.ModuleList([ConvNeXt(2 * b, a, time), ConvNeXt(a, a, time),
                                          Attention(a, True), nn.ConvTranspose2d(a, a, 4, 2, 1)]))
        self.out = nn.Sequential(ConvNeXt(dims[1], args.dim), nn.Conv2d(args.dim, m, 1))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        side, time = math.isqrt(z.shape[-1]), self.time(embed(self.scale * t.amax(1), self.dim))
        x = rearrange(z, "b m (h w) -> b m h w", h=side)
        if self.masked:
            seen = repeat((t == 0).to(z), "b m -> b m h w", h=side, w=side)
            x = torch.cat([x, seen], 1)
        x, skips = self.stem(x), []
        for first, second, attention, half in self.down:
            x = attention(second(first(x, time), time))
            skips.append(x)
            x = half(x)
        x = self.mid[2](self.mid[1](self.mid[0](x, time)), time)
        for first, second, attention, double in self.up:
            x = torch.cat([x, skips.pop()], 1)
            x = double(attention(second(first(x, time), time)))
        return rearrange(self.out(x), "b m h w -> b m (h w)")


class PairEnergy(nn.Module):
    """E(z_i, z_j, t) [b]: one net for all ordered pairs; each layer sees time and both indices."""

    def __init__(self, args):
        super().__init__()
        d, p, self.scale = args.z_dim, 2 * args.z_dim, args.time_scale
        self.time, self.index = time_mlp(p, p), nn.ModuleList(time_mlp(d, d) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(2 * p + 2 * d, p if k < 5 else 2 * p)
                                    for k in range(6))
        self.out = nn.Linear(2 * p, 1)

    def forward(self, z_i: Tensor, z_j: Tensor, i: Tensor, j: Tensor, t: Tensor) -> Tensor:
        h = x = torch.cat([z_i, z_j], -1)                                  # [b p]
        d = z_i.shape[-1]
        given = [self.time(embed(self.scale * t, 2 * d)),
                 *(net(embed(k + 1, d)) for net, k in zip(self.index, (i, j)))]
        for k, layer in enumerate(self.layers):
            h = F.softplus(layer(torch.cat([h + x if k == 4 else h, *given], -1)))
        return self.out(h)[..., 0]


class DotEnergy(nn.Module):
    """E(z_i, z_j, t) = b - h_i(z_i, t) . h_j(z_j, t) [b], a first layer for each of m modalities: a
    product finds in 2,000 steps what belongs together, PairEnergy had found nothing by then."""

    def __init__(self, m: int, args):
        super().__init__()
        self.m, self.scale, a = m, args.time_scale, 256
        self.extract = nn.Sequential(nn.Linear(m * args.z_dim + 32, a), nn.SiLU(),
                                     nn.Linear(a, a), nn.SiLU(), nn.Linear(a, 64))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, z_i: Tensor, z_j: Tensor, i: Tensor, j: Tensor, t: Tensor) -> Tensor:
        time = embed(self.scale * t, 32)
        placed = ((F.one_hot(k, self.m)[..., None] * z[:, None]).flatten(1)
                  for z, k in ((z_i, i), (z_j, j)))                        # [b m*d], zero elsewhere
        h_i, h_j = (self.extract(torch.cat([z, time], 1)) for z in placed)
        return self.bias - (h_i * h_j).sum(1)


class SBM(nn.Module):
    """All nets for modalities of given shapes; modalities of one shape share a bank."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], args):
        super().__init__()
        self.modalities, kinds = list(shapes), list(dict.fromkeys(shapes.values()))
        self.banks = [[m for m in shapes if shapes[m] == kind] for kind in kinds]
        self.shapes, self.output = shapes, args.parametrisation
        self.autoencoders = nn.ModuleList(
            Autoencoders(kind, len(bank), args) for kind, bank in zip(kinds, self.banks))
        self.score_net = (MLP if args.score_net == "mlp" else Unet)(len(shapes), args)
        self.energy = None if not args.epochs_energy else \
            DotEnergy(len(shapes), args) if args.energy_net == "dot" else PairEnergy(args)
        self.sde = VPSDE(args.beta_min, args.beta_max)
        self.register_buffer("mean", torch.zeros(len(shapes), args.z_dim))
        self.register_buffer("std", torch.ones(len(shapes), args.z_dim))

    def encode(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """{m: z [b d]}, standardised, of the modalities in x: means or codes, no draws."""
        z, (given, *_) = {}, x.values()
        for net, bank in zip(self.autoencoders, self.banks):
            if any(m in x for m in bank):
                blank = torch.zeros(len(given), *self.shapes[bank[0]], device=given.device)
                mu, _ = net.encode(torch.stack([x.get(m, blank) for m in bank], 1))
                z |= {m: mu[:, k] for k, m in enumerate(bank) if m in x}
        return {m: (z[m] - self.mean[j]) / self.std[j]
                for j, m in enumerate(self.modalities) if m in z}

    def decode(self, z: Tensor, targets=None) -> dict[str, Tensor]:
        """Standardised Z [b m d] -> {m: image in [0, 1] or logits of attributes}."""
        z, x = z * self.std + self.mean, {}
        for net, bank in zip(self.autoencoders, self.banks):
            if targets is None or any(m in targets for m in bank):
                out = net.decode(z[:, [self.modalities.index(m) for m in bank]])
                out = out if out.ndim == 3 else out.clamp(0, 1)
                x |= {m: out[:, k] for k, m in enumerate(bank) if targets is None or m in targets}
        return {m: x[m] for m in self.modalities if m in x}

    def score(self, z: Tensor, t: Tensor) -> Tensor:
        """s(Z_t, t) [b m d], t [b m]; of no meaning where t is 0. The net's output is s, eps =
        -sigma s, or v = alpha eps - sigma Z, so that eps = alpha v + sigma Z_t."""
        alpha, sigma = self.sde.alpha_sigma(t[..., None])
        out = self.score_net(alpha * z if self.output == "v" else z, t)    # v: no noise at t = 1
        out = alpha * out + sigma * z if self.output == "v" else out
        return out if self.output == "score" else -out / sigma.clamp_min(1e-4)


# ---- Densities -----------------------------------------------------------------------------------
class VPSDE:
    """beta(t) = beta_min + t (beta_max - beta_min); Z_t = alpha_t Z + sigma_t eps."""

    def __init__(self, beta_min: float, beta_max: float):
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)), B the integral of beta from 0 to t."""
        b = t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))
        return (-0.5 * b).exp(), (-torch.expm1(-b)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which log(alpha/sigma) is log_snr: solves beta_min t + slope t^2 / 2 = B."""
        b = F.softplus(-2 * log_snr)
        return 2 * b / (self.beta_min
                        + (self.beta_min**2 + 2 * b * (self.beta_max - self.beta_min)).sqrt())


def random_observed(b: int, m: int, share: float, device) -> Tensor:
    """Observed [b m]: in a share of the rows a random subset of random size 1 .. m-1, else none."""
    size = torch.randint(1, m, (b, 1), device=device)
    rank = torch.rand(b, m, device=device).argsort(1).argsort(1)
    return (rank < size) & (torch.rand(b, 1, device=device) < share)


def random_times(b: int, sde: VPSDE, kind: str, device) -> Tensor:
    """t [b 1] in [1e-5, 1]: uniform, or with a uniform angle atan(sigma/alpha), so that the noise
    levels at which modalities can learn from each other are not rare."""
    u = torch.rand(b, 1, device=device)
    if kind == "uniform":
        return 1e-5 + (1 - 1e-5) * u
    alpha, sigma = sde.alpha_sigma(torch.linspace(1e-5, 1.0, 2, device=device))
    first, last = torch.atan2(sigma, alpha)
    return sde.time(-torch.lerp(first, last, u).tan().log())


def score_loss(score, z: Tensor, sde: VPSDE, masked_share: float = 0.0, v_weight: bool = False,
               times: str = "uniform") -> Tensor:
    """Mean of (sigma_t s(Z_t, t) + eps)^2 over missing entries, then over samples z [b m d].

    v_weight: over alpha_t^2, which makes it the squared error of v: much noise counts as well.
    """
    b, m, _ = z.shape
    seen = random_observed(b, m, masked_share, z.device)
    t = torch.where(seen, 0.0, random_times(b, sde, times, z.device))      # [b m]
    alpha, sigma = (a[..., None] for a in sde.alpha_sigma(t))
    eps = torch.randn_like(z)
    error = (sigma * score(alpha * z + sigma * eps, t) + eps).square().mean(-1)
    error = error / alpha[..., 0] ** 2 if v_weight else error
    return ((error * ~seen).sum(1) / (~seen).sum(1)).mean()


def ae_loss(model: SBM, x: dict[str, Tensor], args) -> dict[str, Tensor]:
    """Sum over modalities of the losses of independent VAEs or RAEs (sums over pixels)."""
    metrics, names = {}, model.modalities
    for net, bank in zip(model.autoencoders, model.banks):
        image = torch.stack([x[m] for m in bank], 1)                       # [b g ...]
        mu, log_var = net.encode(image)

        def each(values):                                                  # one value, or one each
            return torch.tensor([values[names.index(m) % len(values)] for m in bank]).to(
                mu.device, non_blocking=True)
        if log_var is None:
            z = mu + each(args.rae_sigma)[:, None] * torch.randn_like(mu) if net.training else mu
            penalty = each(args.rae_lambda) * mu.square().sum(-1)
        else:
            z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
            penalty = -0.5 * each(args.vae_beta) * (1 + log_var - mu**2 - log_var.exp()).sum(-1)
        out = net.decode(z)
        error = F.binary_cross_entropy_with_logits(out, image, reduction="none") \
            if image.ndim == 3 else (out - image).square()
        error = error.flatten(2).sum(-1)                                   # [b g]
        metrics |= {f"recon_{m}": e for m, e in zip(bank, error.detach().mean(0))}
        metrics["loss"] = metrics.get("loss", 0.0) + (error + penalty).sum(1).mean()
    return metrics


def pair_loss(energy, z: Tensor, sde: VPSDE, noise_negatives: bool = False,
              times: str = "uniform") -> Tensor:
    """Noise contrast of pairs of one tuple (positives) against shuffled ones, 2 ln 2 at E = 0."""
    b, m, _ = z.shape
    row, i = torch.arange(b, device=z.device), torch.randint(m, (b,), device=z.device)
    j = (i + torch.randint(1, m, (b,), device=z.device)) % m
    t, t_minus = random_times(2 * b, sde, times, z.device).view(2, b)

    def noised(v, time):
        alpha, sigma = sde.alpha_sigma(time[:, None])
        return alpha * v + sigma * torch.randn_like(v)
    plus = energy(noised(z[row, i], t), noised(z[row, j], t), i, j, t)
    one, two = (z[torch.randperm(b, device=z.device)] for _ in range(2))
    minus = energy(noised(one[row, i], t_minus), noised(two[row, j], t_minus), i, j, t_minus)
    negative = F.softplus(-minus).mean()
    if noise_negatives:
        n_i, n_j = torch.randn(2, *z[:, 0].shape, device=z.device)
        negative = 0.5 * (negative + F.softplus(-energy(n_i, n_j, i, j, t_minus)).mean())
    return F.softplus(plus).mean() + negative


# ---- Sampler -------------------------------------------------------------------------------------
def guidance(energy, z: Tensor, t: Tensor, known: list[bool]) -> Tensor:
    """-d/dz_j of mean_{i in O} E(z_i, z_j, t) for every missing j, zero on the known; z [b m d]."""
    seen = [i for i, on in enumerate(known) if on]
    pairs = [(i, j) for i in seen for j in range(len(known)) if j not in seen]
    if not pairs:
        return torch.zeros_like(z)
    i, j = torch.tensor(pairs, device=z.device).T
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        e = energy(z[:, i].flatten(0, 1), z[:, j].flatten(0, 1), i.repeat(len(z)), j.repeat(len(z)),
                   t.expand(len(z) * len(i)))                              # [b p]
        (grad,) = torch.autograd.grad(e.sum() / len(seen), z)              # sum: no 1/b
    return -grad.index_fill(1, i, 0.0)


SAMPLERS, OBS_NOISE = ("ode", "em", "pc"), ("fresh", "fixed", "official", "clean")


@torch.no_grad()
def sample(score, shape: tuple[int, int, int], observed: dict[int, Tensor] | None = None, *,
           sde: VPSDE, sampler: str = "ode", n_steps: int = 25, obs_noise: str = "fresh",
           conditional: bool = False, corrector: str = "fixed", snr: float = 0.16,
           repaint: int = 1, jump: int = 10, energy=None, weight: float = 0.0,
           t_end: float = 1e-3, device="cpu") -> Tensor:
    """Z [b m d] ~ p(Z | observed), observed = {modality index: z [b d]}, which come back unchanged.

    score        s(Z_t [b m d], t [b m]); conditional: it was trained with observed ones at time 0
    obs_noise    how observed ones enter: alpha z + sigma eps with new eps in each step (fresh) or
                 one (fixed), (alpha + sigma) z (official), z (clean)
    sampler      ode: n_steps score calls; em: the same; pc: two in each step
    FloatingPointError if a sample is not finite, ValueError for another word.
    """
    if sampler not in SAMPLERS or obs_noise not in OBS_NOISE:
        raise ValueError(f"no sampler {sampler!r}, or no obs_noise {obs_noise!r}")
    place = [j in (observed or {}) for j in range(shape[1])]
    known, z_obs = torch.tensor(place, device=device), torch.zeros(shape, device=device)
    for j, value in (observed or {}).items():
        z_obs[:, j] = value
    row = known[:, None]
    kept = torch.randn(shape, device=device)

    def impose(z, t):
        alpha, sigma = sde.alpha_sigma(t)
        eps = torch.randn_like(z) if obs_noise == "fresh" else kept
        seen = {"official": (alpha + sigma) * z_obs, "clean": z_obs}.get(
            obs_noise, alpha * z_obs + sigma * eps)
        return torch.where(row, seen, z)

    def slope(z, t):                                                       # guided score
        times = torch.where(known & conditional, 0.0, t).expand(shape[:2])
        s = score(z, times)
        if energy is not None and weight and observed:
            alpha, _ = sde.alpha_sigma(t)
            mean = torch.where(row & conditional, alpha * z_obs, z)        # noise would mislead
            s = s + weight * guidance(energy, mean, t, place)
        return torch.where(row & conditional, 0.0, s)

    z = torch.randn(shape, device=device)
    if sampler == "ode":
        z = _ode(slope, impose, z, sde, n_steps, t_end)
    else:
        z = _predictor_corrector(slope, impose, z, sde, n_steps, t_end, corrector, repaint, jump,
                                 snr if sampler == "pc" else 0.0)
    if not z.isfinite().all():
        raise FloatingPointError("the sampler diverged; lower --lr_score, --snr or --guide_weight")
    return torch.where(row, z_obs, z)


def _predictor_corrector(slope, impose, z: Tensor, sde: VPSDE, n_steps: int, t_end: float,
                         corrector: str, repaint: int, jump: int, snr: float) -> Tensor:
    """Euler-Maruyama on the reverse SDE, then, unless snr is 0, a Langevin step at the new time
    (official: the old). RePaint (Lugmayr et al. 2022): each jump of steps is noised again and
    repeated. Returns the last mean, without noise. Ours integrates beta(t) over a step exactly."""
    official = corrector == "official"
    grid = torch.linspace(1, t_end, n_steps + (not official), device=z.device)
    grid = torch.cat([grid, grid[-1:]]) if official else grid              # n_steps + 1 times
    disc = torch.linspace(sde.beta_min, sde.beta_max, n_steps, device=z.device) / n_steps
    disc = disc[(grid * (n_steps - 1)).long()] if official else disc       # of each step
    rate = sde.beta(grid) / n_steps if official else 2 * sde.alpha_sigma(grid)[0].log().diff()
    turns = [(start, turn) for start in range(0, n_steps, jump) for turn in range(repaint)]
    for start, turn in turns:
        end = min(start + jump, n_steps)
        if turn:
            ratio = sde.alpha_sigma(grid[start])[0] / sde.alpha_sigma(grid[end])[0]
            z = ratio * z + (1 - ratio**2).sqrt() * torch.randn_like(z)
        for i in range(start, end):
            t, z = grid[i], impose(z, grid[i])
            mean = z + (0.5 * z + slope(z, t)) * rate[i]
            z = mean + rate[i] ** 0.5 * torch.randn_like(z)
            if snr and (official or i < n_steps - 1):
                t = t if official else grid[i + 1]
                z = z if official else impose(z, t)
                s, xi = slope(z, t), torch.randn_like(z)
                if official:                                               # norms meaned over b
                    xi = xi * (s != 0)                                     # masked: no observed row
                    norm = xi.norm(dim=(1, 2)).mean() / s.norm(dim=(1, 2)).mean()
                    a = 1 - disc[i]
                else:                                                      # |xi| / |s|, about
                    norm, a = sde.alpha_sigma(t)[1], 1.0
                step = 2 * a * (snr * norm) ** 2
                mean = z + step * s
                z = mean + (2 * step) ** 0.5 * xi
    return mean


def _ode(slope, impose, z: Tensor, sde: VPSDE, n_steps: int, t_end: float) -> Tensor:
    """Probability-flow ODE from t = 1, second-order multistep in l = log(alpha/sigma) on the mean
    of the clean Z, x = (Z_t + sigma^2 s) / alpha (DPM-Solver++ 2M, Lu et al. 2022)."""
    ends = sde.alpha_sigma(torch.tensor([1.0, t_end], dtype=z.dtype, device=z.device))
    first, last = (ends[0] / ends[1]).log()
    grid = torch.linspace(0, 1, n_steps, dtype=z.dtype, device=z.device) * (last - first) + first
    times, before = sde.time(grid), None
    alpha, sigma = sde.alpha_sigma(times)
    for i, t in enumerate(times):
        z = impose(z, t)
        x = (z + sigma[i]**2 * slope(z, t)) / alpha[i]
        if i == n_steps - 1:
            return x
        ahead = x if before is None else x + 0.5 * (x - before)            # equal steps
        z, before = sigma[i + 1] / sigma[i] * z \
            - alpha[i + 1] * torch.expm1(grid[i] - grid[i + 1]) * ahead, x


# ---- Training ------------------------------------------------------------------------------------
def stage_score(model: SBM, x: dict[str, Tensor], args) -> dict[str, Tensor]:
    share = args.masked_share if args.cond_train == "masked" else 0.0
    return {"loss": score_loss(model.score, x["z"], model.sde, share, model.output == "v",
                               args.times)}


def stage_energy(model: SBM, x: dict[str, Tensor], args) -> dict[str, Tensor]:
    return {"loss": pair_loss(model.energy, x["z"], model.sde, args.noise_negatives, args.times)}


def train_step(model: SBM, x: dict[str, Tensor], loss_fn, opt, args) -> dict[str, Tensor]:
    """One optimiser step of a stage's loss_fn(model, x, args); returns its metrics."""
    with torch.autocast(next(iter(x.values())).device.type, torch.bfloat16, enabled=args.amp):
        metrics = loss_fn(model, x, args)
    opt.zero_grad(set_to_none=True)
    metrics["loss"].backward()
    opt.step()
    return metrics | {"loss": metrics["loss"].detach()}


@torch.no_grad()
def encode_all(model: SBM, dataset: data.Dataset, args, device) -> data.Dataset:
    """The latents of a data set, {"z": [n m d]} on the device."""
    z = [torch.stack(list(model.encode(x).values()), 1)
         for x in data.batches(dataset, args.eval_batch, device=device, names=model.modalities)]
    return data.Dataset({"z": torch.cat(z)}, None, {"z": "feature"}, dataset.name, dataset.split)


def train_stage(model: SBM, index: int, stage: tuple, sets: list[data.Dataset], args, run,
                state: dict | None) -> None:
    """One stage, from its start or a checkpoint's state; keeps the best autoencoders, else the
    last weights, or their average over time (EMA; the validation loss is that of the weights)."""
    name, loss_fn, n_epochs, lr, part = stage
    params = list(part.requires_grad_(True).train().parameters())
    opt = torch.optim.Adam(params, lr, fused=True)
    opt.register_step_pre_hook(lambda *_: common.average_gradients(params, run.world))
    plateau = args.schedule == "plateau" and name == "ae"
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=5 if plateau else 10**9)
    train_set, val_set = sets
    batch_size = args.batch_ae if name == "ae" else args.batch_size
    per_epoch = max(len(train_set) // batch_size, 1)
    total, step, best = n_epochs * per_epoch, 0, {"loss": math.inf, "part": part.state_dict()}
    decay = args.ema if name == "score" else 0.0
    average = [p.detach().clone() for p in params] if decay else []
    if state is not None:
        opt.load_state_dict(state["opt"])
        schedule.load_state_dict(state["schedule"])
        step, best, average = state["step"], state["best"], [a.to(run.device) for a in state["ema"]]
    loss_fn = torch.compile(loss_fn) if args.compile else loss_fn
    while step < total:
        epoch = step // per_epoch
        order = torch.Generator().manual_seed(args.seed * 10**6 + index * 10**5 + epoch)
        for x in islice(data.batches(train_set, batch_size, order, run.device,
                                     step % per_epoch, run.rank, run.world), total - step):
            if args.schedule == "cosine":
                opt.param_groups[0]["lr"] = lr * (0.01 + 0.495 * (1 + math.cos(
                    math.pi * step / total)))
            metrics = train_step(model, x, loss_fn, opt, args)
            step += 1
            if average:                                                    # short memory at first
                torch._foreach_lerp_(average, [p.detach() for p in params],
                                     1 - min(decay, (1 + step) / (10 + step)))
            if step % args.log_every == 0 or step == total:
                run.log(stage=name, step=step, epoch=epoch, split="train", **metrics)
                run.progress(name, epoch, n_epochs, step, total, batch_size, **metrics)
            if step % per_epoch == 0 or step == total:
                part.eval()
                for buffer in part.buffers() if run.world > 1 else ():     # BatchNorm's statistics
                    torch.distributed.broadcast(buffer, 0)
                val = common.mean_over(lambda x: loss_fn(model, x, args), data.batches(
                    val_set, args.eval_batch, device=run.device), run.device)
                part.train()
                run.log(stage=name, step=step, epoch=epoch, split="val", **val)
                schedule.step(val["loss"])
                if val["loss"] < best["loss"] and name == "ae":
                    best = {"loss": val["loss"],
                            "part": {k: v.clone() for k, v in part.state_dict().items()}}
            if run.checkpoint_due():
                run.save({"stage": index, "step": step, "model": model.state_dict(), "best": best,
                          "opt": opt.state_dict(), "schedule": schedule.state_dict(),
                          "ema": average})
            if run.stop_requested:
                run.stop()
    if name == "ae":
        part.load_state_dict(best["part"])
    for p, a in zip(params, average):
        p.data.copy_(a)
    model.requires_grad_(False).eval()
    run.say(f"stage {name}: {step} steps, {run.wall_s():.0f} s since the start")


def train(model: SBM, train_set: data.Dataset, val_set: data.Dataset, args, run) -> None:
    """Stages ae, score, energy in turn; --resume goes on where the checkpoint stands."""
    stages = [("ae", ae_loss, args.epochs_ae, args.lr_ae, model.autoencoders),
              ("score", stage_score, args.epochs_score, args.lr_score, model.score_net)]
    if args.epochs_energy:
        stages.append(("energy", stage_energy, args.epochs_energy, args.lr_energy, model.energy))
    torch.manual_seed(args.seed + 10**6 * run.rank)                        # noise of each rank
    state = run.load(args.checkpoint, free=INFERENCE_FLAGS) if args.resume else {"stage": 0}
    if args.resume:
        model.load_state_dict(state["model"])
    model.requires_grad_(False).eval()
    latents = None
    for i in range(state["stage"], len(stages)):
        if i and latents is None:
            latents = [encode_all(model, s, args, run.device) for s in (train_set, val_set)]
        resumed = state if i == state["stage"] and "opt" in state else None
        train_stage(model, i, stages[i], latents or [train_set, val_set], args, run, resumed)
        if i == 0 and args.standardise != "none":
            z = encode_all(model, train_set, args, run.device).x["z"]
            std = z.std(0).clamp_min(1e-4)
            model.mean.copy_(z.mean(0))
            model.std.copy_(std if args.standardise == "dim" else std.amax(1, keepdim=True))
        run.save({"stage": i + 1, "model": model.state_dict()})


# ---- Evaluation ----------------------------------------------------------------------------------
def draw(model: SBM, b: int, observed: dict[str, Tensor], args, device, **changes) -> Tensor:
    """Standardised latents Z [b m d] given latents {m: z [b d]}, as the flags or changes say."""
    flags = {k: getattr(args, k) for k in SAMPLER_FLAGS}
    given = {model.modalities.index(m): z for m, z in observed.items()}
    flags |= {"weight": args.guide_weight, "energy": model.energy} | changes
    conditional = args.cond_train == "masked" and flags["obs_noise"] == "clean"
    return sample(model.score, (b, *model.mean.shape), given, sde=model.sde, device=device,
                  conditional=conditional, **flags)


def agreement(classes: Tensor) -> dict[str, float]:
    """Shares of joint samples, classes [n m], of which k modalities or more show one class: that of
    the first modality (agree_anchored_k), or any (agree_majority_k)."""
    anchored = (classes == classes[:, :1]).sum(1)
    majority = F.one_hot(classes).sum(1).amax(1)
    return {f"agree_{name}_{k}": (count >= k).float().mean().item()
            for name, count in (("anchored", anchored), ("majority", majority))
            for k in range(2, classes.shape[1] + 1)}


def measure_joint(model: SBM, z: Tensor, judges, args, real) -> dict[str, float]:
    """Coherence, distances, precision and recall of joint samples, latents [n m d]."""
    parts = iter(z.split(args.eval_batch))
    seen = {m: [] for m in judges}

    def decode(_):
        x = model.decode(next(parts))
        for m, judge in judges.items():
            seen[m].append(judge(x[m]))
        return x
    metrics = common.coherence_joint(decode, judges, len(z), args.eval_batch, real)
    if judges:
        metrics |= agreement(torch.stack([torch.cat([a.argmax(1) for a, _ in v])
                                          for v in seen.values()], 1))
        metrics["frechet_clf"] = sum(metrics[f"frechet_clf_{m}"] for m in judges) / len(judges)
        scores = [common.precision_recall(real.features[m], torch.cat([f for _, f in v]))
                  for m, v in seen.items()]
        metrics |= {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}
    return metrics


def evaluate(model: SBM, sets: dict[str, data.Dataset], test: data.Dataset, args, run) -> dict:
    """Losses, coherence, distances, precision, recall, F1, sampler curve, guidance sweep."""
    run.begin_evaluation()
    model.requires_grad_(False).eval()
    device, n = run.device, args.n_eval
    judges = common.load_judges(sets["train"], test, run.judges, device, run.say)
    inception = common.load_inception(args, device)
    real = common.reference(test, sets["train"], judges, inception, n)
    real.features = {m: torch.cat([judge(x[m])[1] for x in data.batches(
        test, args.eval_batch, device=device, names=[m])]) for m, judge in judges.items()}
    encoded, metrics = encode_all(model, test, args, device), {}
    for name, loss_fn, dataset in (("ae", ae_loss, test), ("score", stage_score, encoded)):
        found = common.mean_over(lambda x: loss_fn(model, x, args), data.batches(
            dataset, args.eval_batch, device=device), device)
        metrics |= {f"loss_{name}": found.pop("loss")} | found
    latents = encoded.x["z"]
    images = [m for m in test.modalities if test.kinds[m] == "image"]

    def joint(n, **changes):
        return torch.cat([draw(model, min(args.eval_batch, n - i), {}, args, device, **changes)
                          for i in range(0, n, args.eval_batch)])

    def sample(b, targets=images):
        return model.decode(joint(b), targets)

    def generate(x, targets, **changes):
        b = len(next(iter(x.values())))
        return model.decode(draw(model, b, model.encode(x), args, device, **changes), targets)

    apart = torch.stack([z[torch.randperm(len(z), generator=torch.Generator().manual_seed(j))]
                         for j, z in enumerate(latents.unbind(1))], 1)
    metrics |= {f"{k}{kind}": v for kind, z in (
        ("_independent", apart), ("_reconstructed", latents), ("", joint(n)))
        for k, v in measure_joint(model, z, judges, args, real).items()}
    metrics |= measure_conditional(generate, test, judges, args, run, real)
    if judges:
        metrics |= compare_samplers(model, joint, generate, sets["val"], judges, args, run, real)
    elif args.curve or args.guide_sweep:
        run.say("no --curve, no --guide_sweep: they need labels, for judges")
    metrics |= f1_scores(sample, generate, test, args, device)             # of mask, attributes
    common.draw_samples(run.dir, sample, generate, test.take(slice(8), device, images))
    run.time_samples(sample)
    return metrics | real.metrics


def measure_conditional(generate, test: data.Dataset, judges, args, run, real) -> dict[str, float]:
    """coherence_*, and frechet_clf_cross_<k>: mean over targets, given k; as many samples each."""
    seen, by_size = {}, {}

    def record(x, targets):
        out, step = generate(x, targets), len(test.modalities) - len(x)    # about n are kept
        for m in [m for m in out if m in judges]:
            kept = seen.setdefault((len(x), m), [])
            kept.append(judges[m](out[m])[1][len(kept) % step::step])
        return out
    metrics = common.coherence_cross(record, test, judges, args.eval_batch, real, run.progress)
    for (k, m), features in seen.items():
        features, stats = torch.cat(features), common.FeatureStats()
        stats.update(features[torch.linspace(0, len(features) - 1, len(test)).long()])
        by_size.setdefault(k, []).append(common.frechet_distance(
            *stats.mean_cov(), *real.stats["frechet_clf", m]))
    return metrics | {f"frechet_clf_cross_{k}": sum(d) / len(d) for k, d in by_size.items()}


def compare_samplers(model: SBM, joint, generate, val: data.Dataset, judges, args, run,
                     real) -> dict[str, float]:
    """Quality against network calls (--curve, in curves.png), and guidance weights to choose from
    (--guide_sweep, on the validation split)."""
    metrics, val = {}, val.head(args.n_curve)
    for calls in args.curve:
        for name, n_steps in (("ode", calls), ("pc", calls // 2)):
            z = joint(args.n_curve, sampler=name, n_steps=n_steps, repaint=1)
            found = measure_joint(model, z, judges, args, real)
            found = {f"{k}_by_calls": found[k] for k in ("coherence_joint", "frechet_clf",
                                                         "precision", "recall")}
            run.log(stage=name, split="curve", step=calls, **found)
            metrics |= {f"{k}_{name}_{calls}": v for k, v in found.items()}
    names = val.modalities
    subsets = [s for k in sorted({1, len(names) - 1}) for s in combinations(names, k)]
    for w in args.guide_sweep:
        found = common.coherence_cross(lambda x, targets: generate(x, targets, weight=w), val,
                                       judges, args.eval_batch, subsets=subsets)
        metrics |= {f"{k}_guided_{w:g}": v for k, v in found.items() if "cross_" in k}
    return metrics


def f1_scores(sample, generate, test: data.Dataset, args, device) -> dict[str, float]:
    """f1_<observed>_to_<m> of attributes and mask, given nothing (none) and every proper subset."""
    found, names = {}, test.modalities
    for subset in (s for size in range(len(names)) for s in combinations(names, size)):
        targets = [m for m in ("mask", "attributes") if m in names and m not in subset]
        for x in data.batches(test, args.eval_batch, device=device) if targets else ():
            given = {m: x[m] for m in subset}
            out = generate(given, targets) if given else sample(len(x[names[0]]), targets)
            for m in targets:
                guess = out[m].sigmoid() if test.kinds[m] == "binary" else out[m]
                key = f"f1_{'+'.join(subset) or 'none'}_to_{m}"
                found.setdefault(key, []).append((guess, x[m]))
    return {k: common.f1_score(*map(torch.cat, zip(*pairs))) for k, pairs in found.items()}


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate; returns the metrics of result.json."""
    args = parse_args(argv)
    with common.open_run(args, __file__, argv) as run:
        common.seed_everything(args.seed)
        sizes = {"train": args.n_train, "val": args.n_train, "test": args.n_test}
        sets = data.load_splits(args.dataset, sizes, args.data_dir, run.device,
                                n_modalities=args.n_modalities)
        for name in ("vae_beta", "rae_lambda", "rae_sigma"):
            if args.dataset == "celebamask_hq" and len(getattr(args, name)) == 3:
                setattr(args, name, getattr(args, name)[:len(sets["train"].shapes)])    # the .npz
            if len(getattr(args, name)) not in (1, len(sets["train"].shapes)):
                raise common.RunError(f"--{name}: give one value, or one for each modality")
        try:
            model = SBM(sets["train"].shapes, args).to(run.device)
        except ValueError as error:
            raise common.RunError(error) from None
        run.start(model)
        if args.eval_only:
            model.load_state_dict(run.load(args.checkpoint, INFERENCE_FLAGS,
                                           2 + (args.epochs_energy > 0))["model"])
        else:
            train(model, sets["train"], sets["val"], args, run)
        test = sets["test"].head(args.n_eval)
        metrics = evaluate(model, sets, test, args, run)
        return run.finish(metrics, sets["train"].note, len(test))


if __name__ == "__main__":
    common.cli(main)
