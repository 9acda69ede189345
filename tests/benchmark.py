"""Speed of every script, beside the formulation of the public codes on the same nets and data.

    python tests/benchmark.py [--only SCRIPT] [--peer] [--compile] [--amp] [--device D] [--out F]

Prints a row for each stage and sampler: rate, FLOP/s over the measured matmul rate of this machine
("of floor": 1 would be a machine that does nothing but multiply matrices), peak memory. That rate
and a rival, where there is one, alternate with ours in the same process, so that other load on the
machine hits all; the median of the repetitions counts. JNF's rival is MultiVae 1.0.3 (--peer, needs
`pip install multivae==1.0.3`), the others' is the loop that the public codes use. Not a test.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common                                                                           # noqa: E402
import data                                                                             # noqa: E402
import ebm_revision                                                                     # noqa: E402
import jnf                                                                              # noqa: E402
import joint_layer_ebm                                                                  # noqa: E402
import latent_ebm_prior                                                                 # noqa: E402
import sbm_vae                                                                          # noqa: E402

PAIR = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}
TRIPLE = {m: (3, 28, 28) for m in ("m0", "m1", "m2")}


def clock(work, device: str) -> float:
    """Seconds of work()."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_rate(device: str, n: int = 2048) -> float:
    """FLOP/s of an fp32 product of two n x n matrices, best of three."""
    a, b = torch.randn(2, n, n, device=device)
    return 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(3))


def random_set(shapes: dict, n: int, device: str) -> data.Dataset:
    x = {m: torch.randint(0, 256, (n, *s), dtype=torch.uint8) for m, s in shapes.items()}
    kinds = dict.fromkeys(shapes, "image")
    return data.Dataset(x, torch.zeros(n, dtype=torch.long), kinds, "random", "train").to(device)


# ---- Rows: {name: (work(), count, unit)}, or (.., rival's work(), rival's name) ------------------
def jnf_training(args, device: str, steps: int) -> dict:
    model = jnf.JNF(PAIR, args).to(device, memory_format=torch.channels_last)
    dataset = random_set(PAIR, 128 * steps, device)
    joint = [model.joint_heads, model.joint_trunk, model.decoders]
    stages = {"J": (jnf.joint_loss, joint, dataset),
              "U": (jnf.flow_loss, [model.posteriors],
                    jnf.with_frozen_features(model, dataset, args))}

    def stage(loss_fn, parts, dataset):
        parts = torch.nn.ModuleList(parts)
        opt = torch.optim.Adam(parts.parameters(), 1e-3, fused=True)
        loss_fn = torch.compile(loss_fn) if args.compile else loss_fn
        order = torch.Generator().manual_seed(0)

        def work():
            model.requires_grad_(False)
            parts.requires_grad_(True)
            for x in data.batches(dataset, 128, order, device):
                jnf.train_step(model, x, loss_fn, opt, args)
        return work
    return {f"stage {name}": (stage(*parts), steps, "steps/s") for name, parts in stages.items()}


def jnf_samplers(args, official, device: str) -> dict:
    torch.manual_seed(0)
    args.net = official.net = "conv"
    model = jnf.JNF(TRIPLE, args).to(device).requires_grad_(False).eval()
    x = random_set(TRIPLE, 200, device).take(slice(200))
    two = {m: x[m] for m in ("m0", "m1")}
    u, flow = torch.randn(10_000, args.z_dim, device=device), model.posteriors["m0"]["flow"]
    sample = jnf.sample_posterior
    return {"HMC 100 x 10, 200 chains": (lambda: sample(model, two, official), 1, "s"),
            "HMC default, 200 chains": (lambda: sample(model, two, args), 1, "s"),
            "flow inverse, 10,000": (lambda: flow.inverse(u), 1, "s")}


def tighten(model: torch.nn.Module) -> None:
    """Experts of standard deviation 0.2, about as wide as trained ones (untrained: 1)."""
    for head in model.modules():
        if isinstance(head, jnf.GaussianHead):
            torch.nn.init.constant_(head.s.bias, -3.2)


def our_ess(args, device: str) -> float:
    """Effective draws (mean over chains and dimensions) of one default call on 200 chains."""
    torch.manual_seed(0)
    model = jnf.JNF(TRIPLE, args).to(device).requires_grad_(False).eval()
    tighten(model)
    x = random_set(TRIPLE, 50, device).take(slice(50), names=["m0", "m1"])
    x, trace = {m: v.repeat_interleave(4, 0) for m, v in x.items()}, []
    longer = argparse.Namespace(**vars(args) | {"hmc_steps": 400})
    jnf.sample_posterior(model, x, longer, trace=trace)
    chains = torch.stack(trace).unflatten(1, (50, 4)).transpose(1, 2).flatten(2)        # [n c d]
    return common.ess(chains).mean().item() / (400 * 4) * args.hmc_steps


def sbm_rows(args, device: str, steps: int) -> dict:
    """Stage ae with its four autoencoders side by side against one after the other; stage score;
    1,000 joint samples of each sampler, predictor-corrector with 200 calls as the authors'."""
    shapes = {f"m{i}": (3, 28, 28) for i in range(4)}
    model = sbm_vae.SBM(shapes, args).to(device)
    apart = sbm_vae.SBM(shapes, args).to(device)
    apart.banks = [[m] for m in shapes]
    apart.autoencoders = torch.nn.ModuleList(
        sbm_vae.Autoencoders(shape, 1, args) for shape in shapes.values()).to(device)
    latents = data.Dataset({"z": torch.randn(args.batch_size * steps, 4, args.z_dim)}, None,
                           {"z": "feature"}, "random", "train").to(device)
    images = random_set(shapes, args.batch_ae * steps, device)

    def stage(model, loss_fn, part, dataset, batch_size):
        opt = torch.optim.Adam(part.parameters(), 1e-3, fused=True)

        def work():
            part.requires_grad_(True)
            for x in data.batches(dataset, batch_size, torch.Generator().manual_seed(0), device):
                sbm_vae.train_step(model, x, loss_fn, opt, args)
        return work

    def draw(**changes):
        return lambda: sbm_vae.draw(model, 1000, {}, args, device, **changes)
    ae = [stage(net, sbm_vae.ae_loss, net.autoencoders, images, args.batch_ae)
          for net in (model, apart)]
    score = stage(model, sbm_vae.stage_score, model.score_net, latents, args.batch_size)
    return {"stage ae, 4 nets": (ae[0], steps, "steps/s", ae[1], "one after the other"),
            "stage score, MLP": (score, steps, "steps/s"),
            "ode, 25 calls, 1,000": (draw(), 1, "s"),
            "ode, 50 calls, 1,000": (draw(n_steps=50), 1, "s",
                                     draw(sampler="pc", n_steps=100), "pc, 200 calls")}


def latent_rows(args, device: str, steps: int) -> dict:
    """Steps of the default run on random images; prior chain 60 x 128 by the closed form against
    two autograd.grad calls a step, five in a row as a stage of f alone has them, so that a cold
    cache counts little, and the matrix products of those chains alone; posterior chain 20 x 64."""
    model = latent_ebm_prior.MMVAEPlus(TRIPLE, args)
    model.to(device, memory_format=torch.channels_last)
    opts = latent_ebm_prior.make_optimisers(model, args, SimpleNamespace(world=1))
    x = {m: torch.rand(args.batch_size, *s, device=device) for m, s in TRIPLE.items()}

    def train(use_ebm):
        return lambda: [latent_ebm_prior.train_step(model, x, opts, args, use_ebm)
                        for _ in range(steps)]

    def chains():
        for _ in range(5):
            latent_ebm_prior.sample_prior(model, 128, args, device, 60)

    def products():                                       # of f's layers, there and back
        w1, w2, w3 = (layer.weight for layer in model.ebm.layers)
        z, h = torch.randn(128, args.z_dim, device=device), torch.randn(128, len(w1), device=device)
        with torch.no_grad():
            for _ in range(5 * 60):
                z @ w1.T, h @ w2.T, h @ w3.T, h @ w2, h @ w1

    def two_gradients():
        for i in range(5 * 60):
            if i % 60 == 0:
                z = latent_ebm_prior.start_prior(model, 128, args, device)
            z = z.detach().requires_grad_(True)
            (f,) = torch.autograd.grad(model.ebm(z).sum(), z)
            (p,) = torch.autograd.grad(latent_ebm_prior.log_base(z, args).sum(), z)
            z = z + 0.08 * (f + p) + 0.4 * torch.randn_like(z)
    return {"VAE step": (train(False), steps, "steps/s"),
            "VAE and EBM step": (train(True), steps, "steps/s"),
            "five prior chains 60 x 128": (chains, 5 * 60, "steps/s", two_gradients,
                                           "two autograd.grad"),
            "their products alone": (products, 5 * 60, "steps/s"),
            "posterior chain 20 x 64": (
                lambda: latent_ebm_prior.sample_posterior(model, x, args, 20, True), 20, "steps/s")}


def layer_rows(args, device: str, steps: int, chains: int = 100, n: int = 40) -> dict:
    """A step of each scheme; the prior chain on z against the authors' formulation (two
    autograd.grad calls, parameters tracked, a host sync each step), on eps, the posterior chain."""
    rows, shape = {}, (3, 32, 32)
    for scheme, stage in (("variational", "joint"), ("mcmc", "joint"), ("two_stage", "energy")):
        own = joint_layer_ebm.parse_args(["--scheme", scheme, "--epochs_backbone", "0"])
        model = joint_layer_ebm.JointEBM(shape, own).to(device, memory_format=torch.channels_last)
        opts = joint_layer_ebm.optimisers(model, own, SimpleNamespace(world=1))
        x = torch.rand(own.batch_size, *shape, device=device)

        def work(model=model, stage=stage, opts=opts, x=x, own=own):
            for _ in range(steps):
                joint_layer_ebm.train_step(model, x, stage, *opts, own)
        rows[f"{scheme} step"] = (work, steps, "steps/s")
    tracked, quiet = (joint_layer_ebm.JointEBM(shape, args).to(device) for _ in range(2))
    quiet.requires_grad_(False)
    on_z = argparse.Namespace(**vars(args) | {"space": "z"})
    z, x = quiet.prior.sample(chains, device), torch.rand(chains, *shape, device=device)

    def official():
        z = tracked.prior.sample(chains, device)
        for _ in range(n):
            z = z.detach().requires_grad_(True)
            f, p = tracked.energies(z).sum(), tracked.prior.log_prob(z).sum()
            (g_f,), (g_p,) = torch.autograd.grad(f, z), torch.autograd.grad(p, z)
            z = z + 0.5 * 0.1**2 * (g_f + g_p) + 0.1 * torch.randn_like(z)
            f.item(), p.item()

    def chain(args, n, **given):
        return lambda: joint_layer_ebm.chain(quiet, z, n, 0.1, args, **given)
    return rows | {"prior chain on z": (chain(on_z, n), n, "steps/s", official, "authors' form"),
                   "prior chain on eps": (chain(args, n), n, "steps/s"),
                   "posterior chain on eps": (chain(args, 5, x=x), 5, "steps/s")}


def revision_rows(args, device: str, steps: int) -> dict:
    """A whole training step; the z chain; the x chain against the ancestor's formulation: spectral
    norm in training mode and parameters tracked in each step, a host sync each step."""
    model = ebm_revision.Revision(PAIR, args).to(device)
    opts = ebm_revision.make_optimizers(model, args, 1)
    x = random_set(PAIR, args.batch_size, device).take(slice(args.batch_size))
    state = model.to_state(x)
    z = ebm_revision.sample_q(model, state)

    def ancestor():
        model.ebm.train().requires_grad_(True)
        x = {m: v.clone().requires_grad_(True) for m, v in state.items()}
        for _ in range(10):
            f = model.ebm(x).sum()
            grads = torch.autograd.grad(f, list(x.values()))
            x = {m: (v + args.x_step_size**2 / 2 * g + args.x_noise * torch.randn_like(v)).detach()
                 .requires_grad_(True) for (m, v), g in zip(x.items(), grads)}
            f.item()
    return {"training step": (lambda: [ebm_revision.train_step(model, x, opts, args)
                                       for _ in range(steps)], steps, "steps/s"),
            "x chain": (lambda: ebm_revision.revise_x(model.ebm, state, 10, args), 10, "steps/s",
                        ancestor, "ancestor's form"),
            "z chain": (lambda: ebm_revision.revise_z(model, z, state, 10, args), 10, "steps/s")}


# ---- Theirs --------------------------------------------------------------------------------------
def peer_model(shapes: dict, args):
    """MultiVae's JNF around the same nets."""
    try:
        from multivae.models import JNF, JNFConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn.base_architectures import BaseDecoder, BaseEncoder
    except ImportError as error:
        sys.exit(f"--peer needs MultiVae: pip install multivae==1.0.3 ({error})")

    class Encoder(BaseEncoder):
        def __init__(self, shape):
            super().__init__()
            body, f, _ = jnf.autoencoder(shape, args.net, args.z_dim)
            self.latent_dim = args.z_dim
            self.net = torch.nn.Sequential(body, jnf.GaussianHead(f, args.z_dim, "exp"))

        def forward(self, x):
            mu, log_var = self.net(x)
            return ModelOutput(embedding=mu, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self, shape):
            super().__init__()
            self.latent_dim = args.z_dim
            self.net = jnf.autoencoder(shape, args.net, args.z_dim)[2]

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z))

    config = JNFConfig(n_modalities=len(shapes), latent_dim=args.z_dim, input_dims=shapes, warmup=1,
                       uses_likelihood_rescaling=True, beta=2.5,
                       decoders_dist=dict.fromkeys(shapes, "laplace"),
                       decoder_dist_params={m: {"scale": 0.75} for m in shapes})
    return JNF(config, {m: Encoder(s) for m, s in shapes.items()},
               {m: Decoder(s) for m, s in shapes.items()})


def peer_rows(args, device: str, steps: int) -> dict:
    from multivae.data.datasets.base import MultimodalBaseDataset
    torch.manual_seed(0)
    model, dataset = peer_model(PAIR, args).to(device), random_set(PAIR, 128 * steps, device)

    def stage(epoch):
        opt = torch.optim.Adam(model.parameters(), 1e-3)

        def work():
            model.requires_grad_(True)
            for x in data.batches(dataset, 128, torch.Generator().manual_seed(0), device):
                loss = model(MultimodalBaseDataset(data=x), epoch=epoch).loss
                opt.zero_grad()
                loss.backward()
                opt.step()
        return work
    args = argparse.Namespace(**vars(args) | {"net": "conv"})
    three = peer_model(TRIPLE, args).to(device).requires_grad_(False).eval()
    x = MultimodalBaseDataset(data=random_set(TRIPLE, 200, device).take(slice(200)))
    u, flow = torch.randn(10_000, args.z_dim, device=device), three.flows["m0"].eval()
    return {"stage J": (stage(1), steps, "steps/s"), "stage U": (stage(2), steps, "steps/s"),
            "HMC 100 x 10, 200 chains": (lambda: three.encode(x, ["m0", "m1"]), 1, "s"),
            "flow inverse, 10,000": (lambda: flow.inverse(u), 1, "s")}


def peer_ess(args, device: str, n_steps: int = 200) -> float:
    """Effective draws of one official call: its chains recorded through its own density calls."""
    from multivae.data.datasets.base import MultimodalBaseDataset
    torch.manual_seed(0)
    args = argparse.Namespace(**vars(args) | {"net": "conv"})
    model = peer_model(TRIPLE, args).to(device).requires_grad_(False).eval()
    tighten(model)
    x = random_set(TRIPLE, 50, device).take(slice(50))
    x = MultimodalBaseDataset(data={m: v.repeat_interleave(4, 0) for m, v in x.items()})
    seen, density = [], model._compute_poe_posterior

    def recorded(subset, z, *rest, **options):
        seen.append(z.detach())
        return density(subset, z, *rest, **options)
    model._compute_poe_posterior = recorded
    model.encode(x, ["m0", "m1"], mcmc_steps=n_steps)
    chains = torch.stack(seen[::11])                      # a step: its start, then 10 leapfrogs
    chains = chains.unflatten(1, (50, 4)).transpose(1, 2).flatten(2)
    return common.ess(chains).mean().item() / (n_steps * 4) * 100


# ---- Table ---------------------------------------------------------------------------------------
def flops(work) -> int:
    """Of work(); 0 where the counter fails: it cannot follow autograd.grad to a module's input."""
    try:
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            work()
    except RuntimeError:
        return 0
    return counter.get_total_flops()


def jnf_rows(a) -> dict:
    """JNF's rows, with MultiVae as their rival if --peer."""
    extra = ["--compile"] * a.compile + ["--amp"] * a.amp
    args, official = jnf.parse_args(extra), jnf.parse_args(["--sampler", "official", *extra])
    rows = jnf_training(args, a.device, a.steps) | jnf_samplers(jnf.parse_args(extra), official,
                                                                a.device)
    peer = peer_rows(args, a.device, a.steps) if a.peer else {}
    return {name: (*row, peer[name][0], "MultiVae") if name in peer else row
            for name, row in rows.items()}


def measure(name: str, row: tuple, a) -> dict:
    """One line of the table, and its numbers."""
    work, count, unit, *rival = row
    work()                                                # warm up, and compile
    done = flops(work) if unit == "steps/s" else 0
    times, other, rates = [], [], []
    for _ in range(a.repeats):
        rates.append(matmul_rate(a.device))
        times.append(clock(work, a.device))
        if rival:
            other.append(clock(rival[0], a.device))
    mine, rate = statistics.median(times), statistics.median(rates)
    found = {"seconds": mine, "count": count, "unit": unit, "matmul_flops": rate,
             "of_floor": done / rate / mine}
    text = f"{mine:8.2f} s" if unit == "s" else f"{count / mine:8.1f} {unit}"
    line = f"{name:26s}{text:20s}" + (f" of floor {found['of_floor']:.2f}" if done else "")
    if rival:
        found |= {"rival": rival[1], "rival_seconds": statistics.median(other)}
        line += f"   {rival[1]} {found['rival_seconds']:.2f} s against {mine:.2f} s: " \
                f"{found['rival_seconds'] / mine:.1f} x"
    print(line, flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    makers = {"jnf": jnf_rows,
              "sbm_vae": lambda a: sbm_rows(sbm_vae.parse_args([]), a.device, a.steps),
              "latent_ebm_prior": lambda a: latent_rows(latent_ebm_prior.parse_args(
                  ["--compile"] * a.compile), a.device, a.steps),
              "joint_layer_ebm": lambda a: layer_rows(joint_layer_ebm.parse_args([]), a.device,
                                                      a.steps),
              "ebm_revision": lambda a: revision_rows(ebm_revision.parse_args([]), a.device,
                                                      a.steps)}
    p.add_argument("--only", choices=list(makers))
    p.add_argument("--peer", action="store_true")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--amp", action="store_true", help="JNF in bf16, its rival in fp32")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out")
    a = p.parse_args()
    rate = matmul_rate(a.device)
    print(f"{a.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"fp32 matmul {rate / 1e9:.0f} GFLOP/s")
    found = {"matmul_flops": rate, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for script in [a.only] if a.only else makers:
        print(f"-- {script}")
        torch.manual_seed(0)
        rows = makers[script](a)
        found[script] = {name: measure(name, row, a) for name, row in rows.items()}
    if a.peer and "jnf" in found:
        args = jnf.parse_args(["--net", "conv"])
        per_s = [our_ess(args, a.device) / found["jnf"]["HMC default, 200 chains"]["seconds"],
                 peer_ess(jnf.parse_args([]), a.device)
                 / found["jnf"]["HMC 100 x 10, 200 chains"]["rival_seconds"]]
        found["ess_per_second_and_chain"] = per_s
        print(f"effective draws per second and chain: default {per_s[0]:.2f}, MultiVae "
              f"{per_s[1]:.4f}: {per_s[0] / per_s[1]:.0f} x")
    memory = torch.cuda.max_memory_allocated() if a.device == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {memory / 2**30:.2f} GiB")
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(json.dumps(found | {"peak_bytes": memory}, indent=1))


if __name__ == "__main__":
    main()
