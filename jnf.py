"""Bridging the inference gap in multimodal variational autoencoders: JNF and JNF-Shared
(Senellart & Allassonniere, arXiv 2502.03952).

A joint VAE learns one latent space for all modalities. Then every modality gets a normalising-flow
posterior of its own, fitted to the frozen joint posterior, and any subset of observed modalities
is inferred from the product of those posteriors by Hamiltonian Monte Carlo (HMC).

Model       p(z) = N(0, I),  p(x_j|z) = Laplace or Normal around a decoder's mean
            q(z|X)     = N(mu(X), diag sigma(X)^2)                            joint encoder
            q_j(z|x_j) = N(T_j(z); mu_j(x_j), diag sigma_j(x_j)^2) |det dT_j/dz|
                         T_j: masked autoregressive flow (MAF), not conditioned on x_j
            q(z|x_S)   proportional to  p(z)^(1-|S|) * prod_{j in S} q_j(z|x_j)
Symbols     z [b d] latent, u = T_j(z), log_det = log|det du/dz|, S observed modalities, g_j
            projectors, lambda_j likelihood weights, beta KL weight, tau temperature

Algorithm
  S  (JNF-Shared only) projectors g_j by contrastive learning or deep CCA, frozen afterwards
  J  joint VAE: minimise  -sum_j lambda_j log p(x_j|z) + beta KL(q(z|X) || p(z)),  z ~ q(z|X)
  U  J frozen: minimise   -sum_j log q_j(z|x_j),  z ~ q(z|X);    JNF-Shared: q_j(z|g_j(x_j))
  Every stage hands on the weights that were best on the validation set. Inference: S = {} prior;
  |S| = 1 the flow's inverse; all modalities q(z|X); otherwise HMC.

Usage
  python jnf.py              synthetic digits, 10 minutes on one CPU thread: given one 0.95
  python jnf.py --dataset mnist_svhn --data_dir DIR      the authors' setting; --help lists flags
  python jnf.py --shared contrastive                     JNF-Shared;  results: results/README.md

Deviations from the authors' public code
  D1 the prior's exponent is |S|-1 (their main branch: 1; --prior_exponent official)
  D2 chains start at a draw from one expert, through the inverse flow (theirs skip the inverse)
  D3 HMC tunes a step size a chain, is preconditioned, and stays where the prior has its mass: the
     product of learned experts need not be integrable (--sampler official: theirs)
  D4 MNIST-SVHN pairs are drawn anew each epoch; validation shares no image with training
  D5 frozen nets are in eval mode, their heads and projectors run once, not in each step
  D6 --warm_start: encoders of stage U start as copies of the joint encoder's (theirs: at random)
"""
import argparse
import math
from functools import cache, partial
from itertools import combinations, islice

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

import common
import data

# ---- Config --------------------------------------------------------------------------------------
# The authors' values where known, else ours: results/README.md.
POLY = dict(z_dim=128, net="resnet", beta=1.0, rescale=False, plateau=30, n_leapfrog=25)
PRESETS = {
    "synth_mnist_svhn": dict(epochs_shared=5, epochs_joint=10, epochs_flow=7, lr=2e-3,
                             lr_warmup=500),
    "synth_polymnist": dict(epochs_shared=5, epochs_joint=15, epochs_flow=10, z_dim=32, net="conv",
                            rescale=False, n_leapfrog=25),
    "mnist_svhn": dict(pairings=5, epochs_shared=150), "polymnist": POLY, "paired": {},
    "translated_polymnist": dict(POLY, z_dim=200, std="softplus", plateau=0, flow_hidden=256,
                                 epochs_shared=80, epochs_joint=150, epochs_flow=150),
    "shapes": dict(z_dim=2, decoder_dist="normal", decoder_scale=1.0, beta=1.0, epochs_joint=15,
                   epochs_flow=15), "polymnist10": dict(POLY, n_modalities=10)}
TWO_LAYERS = dict(common_dim=64, shared_layers=2)
POLY_SHARED = dict(TWO_LAYERS, batch_size=64, epochs_joint=200, epochs_flow=200)
SHARED = {"translated_polymnist": TWO_LAYERS, "polymnist": POLY_SHARED,    # on top of PRESETS
          "polymnist10": POLY_SHARED}
OFFICIAL_HMC = dict(hmc_steps=100, hmc_adapt=0, hmc_step_size=0.01, n_leapfrog=10, bound=0.0,
                    prior_exponent="official")
INFERENCE_FLAGS = (*OFFICIAL_HMC, "sampler", "latent_prior", "gmm_components")  # not for training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Explicit flag > preset of --dataset, --shared, --sampler > default, as --help shows."""
    number, switch = common.number, argparse.BooleanOptionalAction
    p = common.run_parser("jnf.py", __doc__, "synth_mnist_svhn", list(PRESETS))
    flag = p.add_argument_group("model").add_argument
    flag("--z_dim", type=number(int, 1), default=20)
    flag("--net", default="auto", choices=["auto", "mlp", "conv", "resnet"])
    flag("--decoder_dist", default="laplace", choices=["laplace", "normal"])
    flag("--decoder_scale", type=number(float, 0, open_low=True), default=0.75)
    flag("--rescale", action=switch, default=True, help="lambda_j = largest size / size of x_j")
    flag("--std", default="exp", choices=["exp", "softplus"], help="how a net's output is sigma")
    flag("--flow_blocks", type=number(int, 0, 64), default=2, help="0: Gaussian posteriors (JMVAE)")
    flag("--flow_hidden", type=number(int, 1), default=128)
    flag("--shared", default="none", choices=["none", "contrastive", "dcca"], help="JNF-Shared")
    flag("--common_dim", type=number(int, 1), default=10, help="output of a modality's projector")
    flag("--shared_dim", type=number(int, 1), default=10, help="dimension of the code g_j(x_j)")
    flag("--shared_layers", type=number(int, 1), default=1, help="hidden layers of the shared MLP")
    flag = p.add_argument_group("training").add_argument
    flag("--epochs_shared", type=number(int, 0), default=100, help="stage S")
    flag("--epochs_joint", type=number(int, 0), default=100, help="stage J")
    flag("--epochs_flow", type=number(int, 0), default=100, help="stage U")
    flag("--max_steps", type=number(int, 0), default=0, help="steps a stage; 0: epochs decide")
    flag("--batch_size", type=number(int, 1), default=128, help="over all processes")
    flag("--dcca_batch", type=number(int, 2), default=800, help="DCCA needs large batches")
    flag("--lr", type=number(float, 0, open_low=True), default=1e-3, help="Adam")
    flag("--lr_warmup", type=number(int, 0), default=0, help="steps of a linear rise, each stage")
    flag("--warm_start", action=switch, default=False, help="stage U: from the joint heads (D6)")
    flag("--plateau", type=number(int, 0), default=0, help="epochs without gain until lr / 10")
    flag("--beta", type=number(float, 0), default=2.5, help="KL weight; the authors': 0.5 to 2.5")
    flag("--tau", type=number(float, 0, open_low=True), default=0.1, help="contrastive temperature")
    flag("--pairings", type=number(int, 1), default=1, help="mnist_svhn: pairings an epoch")
    flag = p.add_argument_group("sampler").add_argument
    flag("--sampler", default="adaptive", choices=["adaptive", "official"], help="see OFFICIAL_HMC")
    flag("--hmc_steps", type=number(int, 1), default=20, help="after the adaptation")
    flag("--hmc_adapt", type=number(int, 0), default=30, help="steps that tune the step size")
    flag("--hmc_step_size", type=number(float, 0, open_low=True), default=0.5)
    flag("--n_leapfrog", type=number(int, 1), default=4)
    flag("--bound", type=number(float, 0), default=3.0, help="|z| <= sqrt(d) + bound; 0: none")
    flag("--prior_exponent", default="exact", choices=["exact", "official", "none"],
         help="|S|-1, 1 or 0")
    flag("--latent_prior", default="normal", choices=["normal", "gmm"], help="gmm: fit to q(z|X)")
    flag("--gmm_components", type=number(int, 1), default=10)
    dataset, shared, sampler = (common.peek(p, argv, f) for f in ("dataset", "shared", "sampler"))
    preset = PRESETS.get(dataset, {}) | (SHARED.get(dataset, {}) if shared != "none" else {})
    p.set_defaults(**preset | (OFFICIAL_HMC if sampler == "official" else {}))
    args = p.parse_args(argv)
    if args.flow_blocks and args.flow_hidden < args.z_dim - 1:
        p.error(f"--flow_hidden must be >= {args.z_dim - 1} (--z_dim - 1), got {args.flow_hidden}")
    if args.warm_start and args.shared != "none":
        p.error("--warm_start: with --shared the encoders see codes, not images")
    if args.shared == "dcca" and args.dcca_batch <= args.shared_dim:
        p.error(f"--dcca_batch must be above --shared_dim, {args.shared_dim}")
    return args


# ---- Networks ------------------------------------------------------------------------------------
class ResBlock(nn.Module):
    """Pre-activation residual block: shortcut(x) + 0.1 conv(lrelu(conv(lrelu(x))))."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        c_mid, lrelu = min(c_in, c_out), nn.LeakyReLU(0.2)
        self.body = nn.Sequential(lrelu, nn.Conv2d(c_in, c_mid, 3, 1, 1),
                                  lrelu, nn.Conv2d(c_mid, c_out, 3, 1, 1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + 0.1 * self.body(x)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers, a ReLU after each."""
    pairs = zip(sizes, sizes[1:])
    return nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())])


def autoencoder(shape: tuple[int, ...], net: str, z_dim: int) -> tuple[nn.Module, int, nn.Module]:
    """(encoder body [b c h w] -> [b f], f, decoder [b d] -> mean image [b c h w]) of the authors.
    auto: conv for small colour images, else mlp. ValueError if a net is not made for the shape."""
    (c, h, w), small = shape, shape[1:] in ((28, 28), (32, 32))
    conv, up, relu = nn.Conv2d, nn.ConvTranspose2d, nn.ReLU()
    if net == "auto":
        net = "conv" if c == 3 and small else "mlp"
    if net == "mlp":
        hidden = [400] if shape == (1, 28, 28) else [512, 512]
        decoder = nn.Sequential(mlp(z_dim, hidden[-1]), nn.Linear(hidden[-1], c * h * w),
                                nn.Sigmoid(), nn.Unflatten(1, shape))
        return nn.Sequential(nn.Flatten(), mlp(c * h * w, *hidden)), hidden[-1], decoder
    if net == "conv" and small:
        k = 4 if h == 32 else 3
        body = nn.Sequential(conv(c, 32, k, 2, 1), relu, conv(32, 64, k, 2, 1), relu,
                             conv(64, 128, k, 2, 1), relu, nn.Flatten())
        if h == 32:
            decoder = nn.Sequential(nn.Unflatten(1, (z_dim, 1, 1)), up(z_dim, 128, 4), relu,
                                    up(128, 64, 4, 2, 1), relu, up(64, 32, 4, 2, 1), relu,
                                    up(32, c, 4, 2, 1), nn.Sigmoid())
        else:
            decoder = nn.Sequential(mlp(z_dim, 2048), nn.Unflatten(1, (128, 4, 4)),
                                    up(128, 64, 3, 2, 1), relu, up(64, 32, 3, 2, 1, 1), relu,
                                    up(32, c, 3, 2, 1, 1))
        return body, 128 * 4 * 4, decoder
    if net == "resnet" and (h, w) == (28, 28):
        pool = nn.AvgPool2d(3, 2, 1)
        body = nn.Sequential(conv(c, 64, 3, 1, 1), ResBlock(64, 64), pool, ResBlock(64, 128),
                             pool, ResBlock(128, 256), nn.Flatten())
        decoder = nn.Sequential(nn.Linear(z_dim, 256 * 7 * 7), nn.Unflatten(1, (256, 7, 7)),
                                ResBlock(256, 128), nn.Upsample(scale_factor=2),
                                ResBlock(128, 64), nn.Upsample(scale_factor=2), ResBlock(64, 64),
                                nn.LeakyReLU(0.2), conv(64, c, 3, 1, 1))
        return body, 256 * 7 * 7, decoder
    raise ValueError(f"--net {net} is not made for images of {shape}; use --net mlp")


class GaussianHead(nn.Module):
    """Features [b f] -> (mu, log_var), both [b d]; std 'softplus': sigma = softplus(s) + 1e-5."""

    def __init__(self, n_features: int, z_dim: int, std: str):
        super().__init__()
        self.mu, self.s, self.std = nn.Linear(n_features, z_dim), nn.Linear(n_features, z_dim), std

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s(h)
        return self.mu(h), s if self.std == "exp" else 2 * (F.softplus(s) + 1e-5).log()


def made(z: Tensor, layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Masked MLP (Germain et al. 2015): shift_i and log_scale_i, [b d], see z_1 .. z_(i-1) only.
    layers: masked weights (w [i o], b [o]); of s nets (w [s i o], b [s 1 o]), then all is [s b d].
    """
    for i, (w, b) in enumerate(layers):
        z = z.relu() if i else z
        z = F.linear(z, w.T, b) if w.dim() == 2 else torch.baddbmm(b, z.expand(len(w), -1, -1), w)
    return z.chunk(2, dim=-1)


def flow_pass(z: Tensor, blocks: list) -> tuple[Tensor, Tensor]:
    """z [b d] -> (u [b d], log_det = log|det du/dz| [b]) of MAF.weights(), or of several stacked:
    u_i = (z_i - shift_i(z_<i)) exp(-log_scale_i(z_<i)), then the order is reversed; each block."""
    log_det = z.new_zeros(z.shape[:-1])
    for layers in blocks:
        shift, log_scale = made(z, layers)
        z, log_det = ((z - shift) * (-log_scale).exp()).flip(-1), log_det - log_scale.sum(-1)
    return z, log_det


class MAF(nn.Module):
    """Masked autoregressive flow (Papamakarios et al. 2017), the identity if n_blocks is 0."""

    def __init__(self, z_dim: int, n_blocks: int = 2, n_hidden: int = 3, hidden: int = 128):
        super().__init__()
        degrees = [torch.arange(z_dim)] + [torch.arange(hidden) % max(z_dim - 1, 1)] * n_hidden
        masks = [a[:, None] <= b for a, b in zip(degrees, degrees[1:])]    # [i o]
        masks.append((degrees[-1][:, None] < degrees[0]).repeat(1, 2))
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", mask.float(), persistent=False)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(*m.shape) for m in masks)
                                    for _ in range(n_blocks))

    def weights(self) -> list[list[tuple[Tensor, Tensor]]]:
        """[block][layer] of (masked weight [i o], bias [o])."""
        return [[(layer.weight.T * mask, layer.bias) for layer, mask in zip(block, self.buffers())]
                for block in self.blocks]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [b d] -> (u [b d], log_det [b])."""
        return flow_pass(z, self.weights())

    @torch.no_grad()
    def inverse(self, u: Tensor) -> Tensor:
        """u [... d] -> z [... d]: d sequential passes a block, without gradient."""
        for layers in reversed(self.weights()):
            u, z = u.flip(-1), torch.zeros_like(u)
            for i in range(u.shape[-1]):
                shift, log_scale = made(z, layers)
                z[..., i] = u[..., i] * log_scale[..., i].exp() + shift[..., i]
            u = z
        return u


class JNF(nn.Module):
    """The authors' nets for images of shapes {modality: (c, h, w)}. joint_heads and joint_trunk:
    q(z|X). projectors: g_j (JNF-Shared). posteriors: encoders of (mu_j, log_var_j), flows T_j."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], args: argparse.Namespace):
        super().__init__()
        self.shapes, self.modalities, self.shared = shapes, list(shapes), args.shared
        self.joint_heads, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        self.projectors, self.posteriors = nn.ModuleDict(), nn.ModuleDict()
        for m, shape in shapes.items():           # first, so that no flag of S or U changes stage J
            body, f, self.decoders[m] = autoencoder(shape, args.net, args.z_dim)
            self.joint_heads[m] = nn.Sequential(body, nn.Linear(f, args.z_dim))
        self.joint_trunk = nn.Sequential(mlp(len(shapes) * args.z_dim, 512, 512),
                                         GaussianHead(512, args.z_dim, args.std))
        sizes = [args.common_dim] + args.shared_layers * [512]
        hidden = [m for ab in zip(sizes, sizes[1:]) for m in (nn.Linear(*ab), nn.SiLU())]
        shared_mlp = nn.Sequential(*hidden, nn.Linear(512, args.shared_dim))    # of all modalities
        for m, shape in shapes.items():
            net = args.net if args.shared == "none" else args.net.replace("resnet", "conv")
            body, f, _ = autoencoder(shape, net, args.z_dim)
            if args.shared != "none":
                self.projectors[m] = nn.Sequential(body, nn.Linear(f, args.common_dim), shared_mlp)
                body, f = mlp(args.shared_dim, 512, 512), 512
            encoder = nn.Sequential(body, GaussianHead(f, args.z_dim, args.std))
            self.posteriors[m] = nn.ModuleDict({"encoder": encoder})
        for q in self.posteriors.values():
            q["flow"] = MAF(args.z_dim, args.flow_blocks, hidden=args.flow_hidden)

    def joint_encoder(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(mu, log_var) [b d] of q(z|X); heads may come cached as x['head_<modality>']."""
        heads = self.joint_heads.items()
        h = [x[f"head_{m}"] if f"head_{m}" in x else head(x[m]) for m, head in heads]
        return self.joint_trunk(torch.cat(h, 1))

    def code(self, x: dict[str, Tensor], m: str) -> Tensor:
        """What q_j is conditioned on: the image; for JNF-Shared g_j(x_j), cached as 'code_<m>'."""
        if self.shared == "none":
            return x[m]
        if f"code_{m}" in x:
            return x[f"code_{m}"]
        code = self.projectors[m](x[m])
        return F.normalize(code, dim=1) if self.shared == "contrastive" else code


# ---- Densities and losses ------------------------------------------------------------------------
# Log-densities are [b], in nats, summed over features. The loss of a stage is a dictionary of
# scalars, means over the batch: what is minimised is "loss", the others are detached.
def log_normal(z: Tensor, mu: Tensor | float = 0.0, log_var: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, diag exp(log_var)), constants kept: [b d] -> [b]."""
    log_var = log_var if isinstance(log_var, Tensor) else z.new_full((), log_var)
    return -0.5 * ((z - mu) ** 2 * (-log_var).exp() + log_var + math.log(2 * math.pi)).sum(-1)


def log_lik(x: Tensor, mean: Tensor, dist: str, scale: float) -> Tensor:
    """log p(x|z) around the decoder's mean, Laplace or Normal of fixed scale: [b c h w] -> [b]."""
    if dist == "laplace":
        log_p = -(x - mean).abs() / scale - math.log(2 * scale)
    else:
        log_p = -((x - mean) / scale) ** 2 / 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
    return reduce(log_p, "b c h w -> b", "sum")


def log_poe(z: Tensor, posteriors: list[tuple], prior_power: float | None = None) -> Tensor:
    """Product of experts: sum_{j in S} log q_j(z|x_j) - (|S|-1) log N(z; 0, I); [b d] -> [b].

    posteriors: (mu_j [b d], log_var_j [b d], flow_j) for each j in S, flow_j(z) = (u, log_det); or
    one entry of s stacked experts, [s b d], and prior_power = |S|-1. Unnormalised if |S| > 1.
    """
    power = len(posteriors) - 1 if prior_power is None else prior_power
    log_p = -power * log_normal(z)
    for mu, log_var, flow in posteriors:
        u, log_det = flow(z)
        log_p = log_p + (log_normal(u, mu, log_var) + log_det).reshape(-1, len(z)).sum(0)
    return log_p


def stack_experts(experts: list[tuple]) -> tuple[Tensor, Tensor, list]:
    """(mu_j, log_var_j, MAF_j) -> mu [s b d], log_var [s b d], weights of all flows, masked: HMC
    needs one batched product a layer."""
    mu, log_var, flows = zip(*experts)
    blocks = [[(torch.stack([w for w, _ in layers]), torch.stack([b for _, b in layers])[:, None])
               for layers in zip(*block)] for block in zip(*(flow.weights() for flow in flows))]
    return torch.stack(mu), torch.stack(log_var), blocks


@cache
def compiled_gradient():
    """torch.compile of (z, *stack_experts(..), power) -> (gradient [b d], (sum, log_poe [b]))."""
    def log_p(z, mu, log_var, blocks, power):
        value = log_poe(z, [(mu, log_var, partial(flow_pass, blocks=blocks))], power)
        return value.sum(), value
    return torch.compile(torch.func.grad_and_value(log_p, has_aux=True))


def joint_loss(model: JNF, x: dict[str, Tensor], args) -> dict[str, Tensor]:
    """Stage J: -sum_j lambda_j log p(x_j|z) + beta KL(q(z|X) || N(0, I)), one z ~ q(z|X).
    lambda_j = max_k dim_k / dim_j with --rescale: a small image counts as much as a large one."""
    mu, log_var = (p.float() for p in model.joint_encoder(x))
    z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)                  # [b d]
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1).mean()
    dims = {m: math.prod(s) for m, s in model.shapes.items()}
    nll = {m: -log_lik(x[m], decode(z), args.decoder_dist, args.decoder_scale).mean()
           for m, decode in model.decoders.items()}
    weight = {m: max(dims.values()) / d if args.rescale else 1.0 for m, d in dims.items()}
    loss = sum(weight[m] * nll[m] for m in nll) + args.beta * kl
    terms = {f"nll_{m}_nats": v.detach() for m, v in nll.items()}
    return {"loss": loss, "kl_joint_nats": kl.detach()} | terms


def flow_loss(model: JNF, x: dict[str, Tensor], args) -> dict[str, Tensor]:
    """Stage U: -sum_j log q_j(z|x_j), z ~ q(z|X) fixed; up to q's entropy sum_j KL(q || q_j)."""
    with torch.no_grad():
        mu, log_var = (p.float() for p in model.joint_encoder(x))
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)              # [b d]
        log_q = log_normal(z, mu, log_var).mean()
    nll = {}
    for m, q in model.posteriors.items():
        mu, log_var = (p.float() for p in q["encoder"](model.code(x, m)))
        with torch.autocast(z.device.type, enabled=False):                 # flows stay fp32
            nll[m] = -log_poe(z, [(mu, log_var, q["flow"])]).mean()
    kl = {f"kl_{m}_nats": v.detach() + log_q for m, v in nll.items()}
    return {"loss": sum(nll.values())} | kl


def contrastive_loss(codes: list[Tensor], tau: float) -> Tensor:
    """Stage S, InfoNCE on unit codes [b f], one a modality: mean over rows, sum over pairs. A row's
    positive is its partner; all other 2b - 1 rows of both modalities are in the denominator."""
    loss = codes[0].new_zeros(())
    for a, b in combinations(codes, 2):
        rows = torch.cat([a, b])                                           # [2b f]
        with torch.autocast(a.device.type, enabled=False):
            logits = (rows @ rows.T / tau).fill_diagonal_(-torch.inf)
        target = torch.arange(len(rows), device=a.device).roll(len(a))
        loss = loss + F.cross_entropy(logits, target)
    return loss


def dcca_loss(codes: list[Tensor], ridge: float = 1e-3, eps: float = 1e-9) -> Tensor:
    """Stage S, deep CCA (Andrew et al. 2013): minus the canonical correlations of codes [b f],
    b > f, over all pairs: roots of the eigenvalues of T'T + ridge I, T = S11^-1/2 S12 S22^-1/2,
    with the same ridge on S11 and S22; float64."""
    codes = [c.double() - c.double().mean(0) for c in codes]
    eye = torch.eye(codes[0].shape[1], dtype=torch.float64, device=codes[0].device)

    def whitener(c: Tensor) -> Tensor:                                     # [b f] -> S^-1/2 [f f]
        val, vec = torch.linalg.eigh(c.T @ c / (len(c) - 1) + ridge * eye)
        return vec * val.clamp_min(eps).rsqrt() @ vec.T

    loss = codes[0].new_zeros(())
    for a, b in combinations(codes, 2):
        t = whitener(a) @ (a.T @ b / (len(a) - 1)) @ whitener(b)
        loss = loss - torch.linalg.eigvalsh(t.T @ t + ridge * eye).clamp_min(eps).sqrt().sum()
    return loss


def shared_loss(model: JNF, x: dict[str, Tensor], args) -> dict[str, Tensor]:
    """Stage S of JNF-Shared on the codes g_j(x_j)."""
    codes = [model.code(x, m).float() for m in model.modalities]
    contrastive = args.shared == "contrastive"
    return {"loss": contrastive_loss(codes, args.tau) if contrastive else dcca_loss(codes)}


# ---- Sampler -------------------------------------------------------------------------------------
def hmc(log_prob, z: Tensor, n_steps: int, step_size: float, n_leapfrog: int, n_adapt: int = 0,
        scale: Tensor | float = 1.0, target_accept: float = 0.8, jitter: float = 0.0,
        trace: list | None = None, value_and_grad=None) -> tuple[Tensor, Tensor]:
    """Hamiltonian Monte Carlo, H = -log_prob(z) + |momentum|^2 / 2, a chain for each row of z.

    log_prob [b d] -> [b] nats, unnormalised; rows must not interact. step_size (1 +- jitter) is in
    units of scale [b d], the target's rough standard deviations. In n_adapt steps before n_steps
    every chain tunes its own to target_accept by dual averaging (Hoffman & Gelman 2014, Algorithm
    5, gamma 0.2). trace: a list that gets z of each of the n_steps. value_and_grad: z -> (log_prob,
    gradient), if there is something faster than autograd. Returns (new z, mean acceptance [] of the
    n_steps). Proposals of non-finite energy are rejected; FloatingPointError for such a start.
    """
    def autograd(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            log_p = log_prob(z)
            return log_p.detach(), torch.autograd.grad(log_p.sum(), z)[0]  # rows are separate: sum

    value_and_grad = value_and_grad or autograd
    log_p, grad = value_and_grad(z)
    if not log_p.isfinite().all():
        raise FloatingPointError("hmc: a chain starts where the log-density is not finite")
    log_eps = torch.full_like(log_p, math.log(step_size))                  # [b]
    log_eps_mean, h_mean, accept_rate = torch.zeros_like(log_p), torch.zeros_like(log_p), 0.0
    for t in range(1, n_adapt + n_steps + 1):
        eps = log_eps.exp() * (1 + jitter * (2 * torch.rand_like(log_p) - 1))
        eps = eps[:, None] * scale                                         # [b d]
        momentum = torch.randn_like(z)
        energy = 0.5 * (momentum**2).sum(1) - log_p
        z_new, log_p_new, grad_new = z, log_p, grad
        for _ in range(n_leapfrog):
            momentum = momentum + 0.5 * eps * grad_new
            z_new = z_new + eps * momentum
            log_p_new, grad_new = value_and_grad(z_new)
            momentum = momentum + 0.5 * eps * grad_new
        energy_new = 0.5 * (momentum**2).sum(1) - log_p_new
        prob = torch.where(energy_new.isfinite(), (energy - energy_new).clamp(max=0).exp(), 0.0)
        accept = torch.rand_like(prob) < prob                              # [b]
        z, grad = (torch.where(accept[:, None], a, b) for a, b in ((z_new, z), (grad_new, grad)))
        log_p = torch.where(accept, log_p_new, log_p)
        if t <= n_adapt:
            h_mean = h_mean + (target_accept - prob - h_mean) / (t + 10)
            log_eps = math.log(10 * step_size) - math.sqrt(t) / 0.2 * h_mean
            log_eps_mean = log_eps_mean + t**-0.75 * (log_eps - log_eps_mean)
            log_eps = log_eps_mean if t == n_adapt else log_eps
        else:
            accept_rate = accept_rate + prob.mean() / n_steps
            if trace is not None:
                trace.append(z)
    return z, accept_rate


def product_scale(draws: Tensor, power: float) -> Tensor:
    """Gaussian guess of a product's standard deviations [b d], at most the prior's, from draws
    [s k b d] of its s experts: precision = sum_j 1/var_j - power."""
    return ((1 / draws.var(1).clamp_min(1e-6)).sum(0) - power).clamp_min(1.0).rsqrt()


@torch.no_grad()
def sample_posterior(model: JNF, x: dict[str, Tensor], args, stats: dict[str, list] | None = None,
                     product: bool = False, trace: list | None = None) -> Tensor:
    """z ~ q(z|x_S) [b d] given x = {modality: [b c h w]}, non-empty. All: the joint encoder (with
    product their product of experts). One: its flow's inverse. Else HMC; stats collects accept_rate
    and outside (the share of ends with |z| > sqrt(d) + 2, the prior: 0.3 %), trace the chains."""
    observed = [m for m in model.modalities if m in x]
    if len(observed) == len(model.modalities) and not product:
        mu, log_var = model.joint_encoder(x)
        return mu + (0.5 * log_var).exp() * torch.randn_like(mu)
    posteriors = [model.posteriors[m] for m in observed]
    experts = [(*q["encoder"](model.code(x, m)), q["flow"]) for m, q in zip(observed, posteriors)]
    official, s, b = args.sampler == "official", len(experts), len(x[observed[0]])
    k = 1 if official or s == 1 else 16                                    # draws an expert
    draws = []
    for mu, log_var, flow in experts:
        u = mu + (0.5 * log_var).exp() * torch.randn(k, *mu.shape, device=mu.device)
        draws.append(u if official and s > 1 else flow.inverse(u))
    draws = torch.stack(draws)                                             # [s k b d]
    if s == 1:
        return draws[0, 0]
    start = draws[torch.randint(s, (b,)), 0, torch.arange(b)]              # one expert a chain
    power = {"exact": s - 1, "official": 1, "none": 0}[args.prior_exponent]
    scale = product_scale(draws, power) if k > 1 else 1.0
    mu, log_var, blocks = stack_experts(experts)
    target = [(mu, log_var, partial(flow_pass, blocks=blocks))]
    limit = math.sqrt(mu.shape[-1]) + args.bound if args.bound else math.inf
    start = start * (0.99 * limit / start.norm(dim=1, keepdim=True)).clamp(max=1)

    def bounded(z, log_p):                             # -inf is rejected
        return log_p + torch.where(z.norm(dim=1) < limit, 0.0, -torch.inf)

    def compiled(z):
        grad, (_, log_p) = compiled_gradient()(z, mu, log_var, blocks, power)
        return bounded(z, log_p), grad

    z, accept_rate = hmc(lambda z: bounded(z, log_poe(z, target, power)), start, args.hmc_steps,
                         args.hmc_step_size, args.n_leapfrog, args.hmc_adapt, scale,
                         jitter=0.0 if official else 0.2, trace=trace,
                         value_and_grad=compiled if args.compile else None)
    if stats is not None:
        stats.setdefault("accept_rate", []).append(accept_rate)
        far = z.norm(dim=1) > math.sqrt(z.shape[1]) + 2
        stats.setdefault("outside", []).append(far.float().mean())
    return z


# ---- Training ------------------------------------------------------------------------------------
def train_step(model: JNF, x: dict[str, Tensor], loss_fn, opt, args) -> dict[str, Tensor]:
    """One optimiser step of a stage's loss_fn(model, x, args); returns its metrics."""
    with torch.autocast(next(iter(x.values())).device.type, torch.bfloat16, enabled=args.amp):
        metrics = loss_fn(model, x, args)
    opt.zero_grad(set_to_none=True)
    metrics["loss"].backward()
    opt.step()
    return metrics | {"loss": metrics["loss"].detach()}


def validate(model: JNF, dataset: data.Dataset, loss_fn, args, device,
             batch: int = 0) -> dict[str, float]:
    """Means of loss_fn's metrics over a data set, with the same noise each time; with batch, for a
    loss that depends on its size, over whole batches of a fixed random order."""
    order = torch.Generator().manual_seed(0) if batch else None
    return common.mean_over(lambda x: loss_fn(model, x, args), data.batches(
        dataset, batch or args.eval_batch, order, device), device)


def with_frozen_features(model: JNF, dataset: data.Dataset, args) -> data.Dataset:
    """For stage U: frozen heads and projectors run once over every image, not in each step (D5)."""
    heads = {m: data.encode(head, dataset.x[m]) for m, head in model.joint_heads.items()}
    codes = {m: data.encode(lambda x, m=m: model.code({m: x}, m), dataset.x[m])
             for m in model.modalities if args.shared != "none"}
    return dataset.attach("head", heads).attach("code", codes)


def train_stage(model: JNF, index: int, stage: tuple, sets: list[data.Dataset], args, run,
                state: dict | None) -> None:
    """Train one stage, from its start or a checkpoint's state; the model ends with its best."""
    name, loss_fn, n_epochs, parts = stage
    model.requires_grad_(False).eval()
    params = list(parts.requires_grad_(True).train().parameters())
    opt = torch.optim.Adam(params, args.lr, fused=True)
    opt.register_step_pre_hook(lambda *_: common.average_gradients(params, run.world))
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=args.plateau or 10**9,
                                                          threshold=0)     # losses may be negative
    if name == "flow":
        sets = [with_frozen_features(model, s, args) for s in sets]
    train_set, val_set = sets
    cached = name == "flow" and args.shared != "none"                      # no image is needed
    names = [n for n in train_set.x if not (cached and n in model.modalities)]
    batch = args.dcca_batch if (name, args.shared) == ("shared", "dcca") else args.batch_size
    ranks = (0, 1) if name == "shared" else (run.rank, run.world)          # its loss needs all rows
    per_epoch = max(len(train_set) // batch, 1)
    total = min(n_epochs * per_epoch, args.max_steps or n_epochs * per_epoch)
    seed = args.seed * 10**6 + index * 10**5
    step, best = 0, {"loss": math.inf, "model": model.state_dict()}
    if state is None:                          # a stage's noise does not depend on those before it
        torch.manual_seed(seed + 10**9 * (run.rank + 1))
    else:
        opt.load_state_dict(state["opt"])
        schedule.load_state_dict(state["schedule"])
        step, best = state["step"], state["best"]
    loss_fn = torch.compile(loss_fn) if args.compile else loss_fn
    while step < total:
        epoch = step // per_epoch
        order = torch.Generator().manual_seed(seed + epoch)
        for x in islice(data.batches(train_set, batch, order, run.device, step % per_epoch, *ranks,
                                     names), total - step):
            if step < args.lr_warmup:
                opt.param_groups[0]["lr"] = args.lr * (step + 1) / args.lr_warmup
            metrics = train_step(model, x, loss_fn, opt, args)
            step += 1
            if step % args.log_every == 0 or step == total:
                run.log(stage=name, step=step, epoch=epoch, split="train", **metrics)
                run.progress(name, epoch, n_epochs, step, total, batch, **metrics)
            if step % per_epoch == 0 or step == total:
                val = validate(model, val_set, loss_fn, args, run.device,
                               batch if name == "shared" else 0)
                run.log(stage=name, step=step, epoch=epoch, split="val", **val)
                schedule.step(val["loss"])
                if val["loss"] < best["loss"]:
                    weights = {k: v.clone() for k, v in model.state_dict().items()}
                    best = {"loss": val["loss"], "model": weights}
            if run.checkpoint_due():
                run.save({"stage": index, "step": step, "model": model.state_dict(), "best": best,
                          "opt": opt.state_dict(), "schedule": schedule.state_dict()})
            if run.stop_requested:
                run.stop()
    model.load_state_dict(best["model"])
    run.say(f"stage {name}: {step} steps, best validation loss {best['loss']:.4f}")


def train(model: JNF, train_set: data.Dataset, val_set: data.Dataset, args, run) -> None:
    """Stages S (JNF-Shared), J, U in turn; --resume goes on where the checkpoint stands."""
    joint = nn.ModuleList([model.joint_heads, model.joint_trunk, model.decoders])
    stages = [("shared", shared_loss, args.epochs_shared, model.projectors),
              ("joint", joint_loss, args.epochs_joint, joint),
              ("flow", flow_loss, args.epochs_flow, model.posteriors)]
    state = {"stage": int(args.shared == "none")}                          # 1: stage J is the first
    if args.resume:
        state = run.load(args.checkpoint, free=INFERENCE_FLAGS)
        model.load_state_dict(state["model"])
    for i in range(state["stage"], len(stages)):
        resumed = state if i == state["stage"] and "opt" in state else None
        if stages[i][0] == "flow" and args.warm_start and not resumed:
            for m, q in model.posteriors.items():                          # D6
                q["encoder"][0].load_state_dict(model.joint_heads[m][0].state_dict())
        train_stage(model, i, stages[i], [train_set, val_set], args, run, resumed)
        run.save({"stage": i + 1, "model": model.state_dict()})


# ---- Evaluation ----------------------------------------------------------------------------------
def evaluate(model: JNF, train_set: data.Dataset, test: data.Dataset, args, run) -> dict:
    """Posterior match, coherence, Fréchet distances, chain diagnostics, pictures; test split.
    kl_<m>_nats estimates the mean KL(q(z|X) || q_m(z|x_m)): what x_m does not say about z, and on
    top of that q_m's misfit."""
    run.begin_evaluation()
    model.requires_grad_(False).eval()
    device, stats, metrics = run.device, {}, {}
    for name, loss_fn in (("joint", joint_loss), ("flow", flow_loss)):
        values = validate(model, test, loss_fn, args, device)
        metrics |= {f"loss_{name}": values.pop("loss")} | values
    judges = common.load_judges(train_set, test, run.judges, device, run.say)
    inception = common.load_inception(args, device)
    real = common.reference(test, train_set, judges, inception, args.n_eval)

    def decode(z, targets=model.modalities):
        return {m: model.decoders[m](z) for m in targets}

    def generate(x, targets):
        return decode(sample_posterior(model, x, args, stats), targets)

    priors = {"normal": lambda b: decode(torch.randn(b, args.z_dim, device=device))}
    if args.latent_prior == "gmm":
        z = [sample_posterior(model, x, args) for x in data.batches(
            train_set.head(20_000), args.eval_batch, device=device)]
        gmm = common.fit_gmm(torch.cat(z), args.gmm_components)
        priors["gmm"] = lambda b: decode(common.sample_gmm(gmm, b).to(device))
    for name, sample in priors.items():
        joint = common.coherence_joint(sample, judges, args.n_eval, args.eval_batch, real)
        metrics |= joint | {f"{k}_{name}_prior": v for k, v in joint.items() if len(priors) > 1}
    metrics |= real.metrics | common.coherence_cross(generate, test, judges, args.eval_batch, real,
                                                     run.progress)
    metrics |= diagnose_chains(model, test, args, run, stats)
    metrics |= {k: torch.stack(v).mean().item() for k, v in stats.items()}
    if metrics["outside"] > 0.01:
        run.say(f"WARNING: {metrics['outside']:.1%} of the chains end at |z| > sqrt(d) + 2, the "
                "prior's 0.3 %: perhaps the product is not integrable"
                + ", and --bound decides" * bool(args.bound))
    sample = priors[args.latent_prior]
    common.draw_samples(run.dir, sample, generate, test.take(slice(8), device))
    if args.z_dim == 2:
        draw_posteriors(model, test.take(slice(3), device), args, run)
    run.time_samples(sample)
    return metrics


def diagnose_chains(model: JNF, test: data.Dataset, args, run, stats) -> dict[str, float]:
    """HMC on two modalities of 64 test items, 4 chains each, 10 times the usual length."""
    x = test.take(slice(64), run.device, model.modalities[:2])
    x = {m: repeat(v, "b ... -> (b c) ...", c=4) for m, v in x.items()}
    longer, trace = argparse.Namespace(**vars(args) | {"hmc_steps": 10 * args.hmc_steps}), []
    sample_posterior(model, x, longer, stats, product=True, trace=trace)
    chains = rearrange(torch.stack(trace).cpu(), "n (b c) d -> n c (b d)", c=4)
    return common.chain_report(chains, run.dir / "diagnostics.png", stats["accept_rate"][-1])


def draw_posteriors(model: JNF, given: dict[str, Tensor], args, run) -> None:
    """posteriors.png, z_dim 2: p(z|x_j) of the decoder, its best diagonal Gaussian, the flow's."""
    axis, rows = torch.linspace(-3.5, 3.5, 200), []
    z = torch.cartesian_prod(axis, axis).to(next(iter(given.values())))    # [g 2]
    for m, x in given.items():
        mean = torch.cat([model.decoders[m](part) for part in z.split(1000)])
        q = model.posteriors[m]
        for xi in x.split(1):
            log_p = log_normal(z) + log_lik(xi, mean, args.decoder_dist, args.decoder_scale)
            p = log_p.softmax(0)                                           # [g]
            mu = p @ z
            gaussian = log_normal(z, mu, (p @ (z - mu) ** 2).log()).softmax(0)
            flow = log_poe(z, [(*q["encoder"](model.code({m: xi}, m)), q["flow"])]).softmax(0)
            grids = [v.reshape(200, 200).T for v in (p, gaussian, flow)]
            rows.append([xi[0], *grids])
    common.save_densities(run.dir / "posteriors.png", rows,
                          ["given", "p(z|x)", "best Gaussian", "flow"], reach=3.5)


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate; returns the metrics of result.json."""
    args = parse_args(argv)
    with common.open_run(args, __file__, argv) as run:
        common.seed_everything(args.seed)
        sizes = {"train": args.n_train, "val": args.n_train, "test": args.n_test}
        sets = data.load_splits(args.dataset, sizes, args.data_dir, run.device,
                                pairings=args.pairings, n_modalities=args.n_modalities)
        try:
            model = JNF(sets["train"].shapes, args)
            model.to(run.device, memory_format=torch.channels_last)
        except ValueError as error:
            raise common.RunError(error) from None
        run.start(model)
        if args.eval_only:
            model.load_state_dict(run.load(args.checkpoint, INFERENCE_FLAGS, 3)["model"])
        else:
            train(model, sets["train"], sets["val"], args, run)
        test = sets["test"].head(args.n_eval)
        metrics = evaluate(model, sets["train"], test, args, run)
        return run.finish(metrics, sets["train"].note, len(test))


if __name__ == "__main__":
    common.cli(main)
