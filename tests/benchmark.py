"""Speed of every script, and of MultiVae 1.0.3 on the same nets, data and steps.

    python tests/benchmark.py [--peer] [--compile] [--device cuda] [--out FILE]      (not a test)

Prints a row for each stage and sampler: rate, FLOP/s over the measured matmul rate of this machine
("of floor": 1 would be a machine that does nothing but multiply matrices), peak memory. --peer
needs `pip install multivae==1.0.3`; ours and theirs alternate, so that other load on the machine
hits both, and the median of the repetitions counts.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common                                                                           # noqa: E402
import data                                                                             # noqa: E402
import jnf                                                                              # noqa: E402

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
    """FLOP/s of an fp32 product of two n x n matrices."""
    a, b = torch.randn(2, n, n, device=device)
    a @ b
    return 10 * 2 * n**3 / min(clock(lambda: [a @ b for _ in range(10)], device) for _ in range(3))


def random_set(shapes: dict, n: int, device: str) -> data.Dataset:
    x = {m: torch.randint(0, 256, (n, *s), dtype=torch.uint8) for m, s in shapes.items()}
    kinds = dict.fromkeys(shapes, "image")
    return data.Dataset(x, torch.zeros(n, dtype=torch.long), kinds, "random", "train").to(device)


# ---- Ours: each function returns {row: (work(), count, unit)} ------------------------------------
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
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--peer", action="store_true")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out")
    a = p.parse_args()
    extra = ["--compile"] if a.compile else []
    args, official = jnf.parse_args(extra), jnf.parse_args(["--sampler", "official", *extra])
    ours = jnf_training(args, a.device, a.steps) | jnf_samplers(
        jnf.parse_args(extra), official, a.device)
    theirs = peer_rows(args, a.device, a.steps) if a.peer else {}
    rate = matmul_rate(a.device)
    print(f"{a.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"fp32 matmul {rate / 1e9:.0f} GFLOP/s")
    rows = {"matmul_flops": rate, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, (work, count, unit) in ours.items():
        work()                                            # warm up, and compile
        done = flops(work) if unit == "steps/s" and not a.compile else 0  # counting is slow
        times = {"ours": [], "peer": []}
        for _ in range(a.repeats):
            times["ours"].append(clock(work, a.device))
            if name in theirs:
                times["peer"].append(clock(theirs[name][0], a.device))
        mine = statistics.median(times["ours"])
        row = {"seconds": mine, "of_floor": done / rate / mine}
        text = f"{mine:8.2f} s" if unit == "s" else f"{count / mine:8.1f} {unit}"
        line = f"{name:26s}{text:20s}" + (f" of floor {row['of_floor']:.2f}" if done else "")
        if times["peer"]:
            row["peer_seconds"] = statistics.median(times["peer"])
            line += f"   MultiVae {row['peer_seconds']:.2f} s against {mine:.2f} s: " \
                    f"{row['peer_seconds'] / mine:.1f} x"
        rows[name] = row
        print(line, flush=True)
    if a.peer:
        per_s = [our_ess(jnf.parse_args(["--net", "conv"]), a.device)
                 / rows["HMC default, 200 chains"]["seconds"],
                 peer_ess(args, a.device) / rows["HMC 100 x 10, 200 chains"]["peer_seconds"]]
        rows["ess_per_second_and_chain"] = per_s
        print(f"effective draws per second and chain: default {per_s[0]:.2f}, MultiVae "
              f"{per_s[1]:.4f}: {per_s[0] / per_s[1]:.0f} x")
    memory = torch.cuda.max_memory_allocated() if a.device == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {memory / 2**30:.2f} GiB")
    if a.out:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(json.dumps(rows | {"peak_bytes": memory}, indent=1))


if __name__ == "__main__":
    main()
