"""ebm_revision.py on two 2-D modalities:  python tests/toy_revision.py [--seeds 10] [--steps 150]

Data: a joint mixture of four modes; mode k lies in corner k of modality a and of modality b. A
sample is right if both its points are nearest to the same corner (chance: 0.25). Four models, each
with its initialisers on or replaced by noise at equal compute, no warm-up: how often revised
samples are right, the generator's and chains from noise. Prints the means with 95 % intervals over
the seeds, writes them, a file a seed, and draws toy_revision.png, all to --out.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import ebm_revision as er                                                   # noqa: E402
from tables import interval                                                 # noqa: E402

CORNERS = torch.tensor([[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]])
FLAGS = ["--width", "4", "--z_dim", "2", "--sigma", "0.3", "--x_step_size", "0.4", "--x_noise",
         "0.01", "--z_step_size", "0.3", "--z_noise", "0.3", "--x_steps_test", "10",
         "--lr_ebm", "1e-3", "--lr_gen", "2e-3", "--lr_enc", "2e-3"]
NOISE = {"full": [], "x from noise": ["--x_init", "noise"], "z from noise": ["--z_init", "noise"],
         "both from noise": ["--x_init", "noise", "--z_init", "noise"]}


def draw(n: int) -> dict[str, torch.Tensor]:
    """n tuples {m: [n 2 1 1] in [0, 1]}, corners at 0.2 and 0.8."""
    corner = CORNERS[torch.randint(4, (n,))]
    return {m: ((corner + 0.08 * torch.randn(n, 2) + 1) / 2)[..., None, None] for m in "ab"}


def agreement(state: dict[str, torch.Tensor]) -> float:
    """Share of tuples whose points are nearest to the same corner."""
    nearest = [torch.cdist(v.flatten(1), CORNERS).argmin(1) for v in state.values()]
    return (nearest[0] == nearest[1]).float().mean().item()


def experiment(variant: str, seed: int, steps: int) -> tuple[dict[str, float], dict]:
    """Trains one model: ({start: P(modes agree) after the chain}, revised states)."""
    torch.manual_seed(seed)
    args = er.parse_args([*FLAGS, *NOISE[variant]])
    model = er.Revision({m: (2, 1, 1) for m in "ab"}, args)
    opts = er.make_optimizers(model, args, 1)
    for _ in range(steps):
        er.train_step(model, draw(64), opts, args)
    model.eval()
    z, k = torch.randn(2000, args.z_dim), args.x_steps_test
    revised = er.sample_joint(model, z, args.x_init, k, args)
    return {"revised": agreement(revised),
            "initial": agreement(er.sample_joint(model, z, "generator", 0, args)),
            "noise": agreement(er.sample_joint(model, z, "noise", k, args))}, revised


def main(argv=None) -> dict[str, dict[str, tuple[float, float]]]:
    """{variant: {start: (mean, half width)}}, printed and drawn."""
    from matplotlib.figure import Figure
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--out", default=".", help="folder")
    args = p.parse_args(argv)
    out, found = Path(args.out), [{} for _ in range(args.seeds)]
    figure, table = Figure((11, 2.6), dpi=150, layout="constrained"), {}
    for axes, variant in zip(figure.subplots(1, 4, sharex=True, sharey=True), NOISE):
        runs = [experiment(variant, seed, args.steps) for seed in range(args.seeds)]
        row = {key: interval([shares[key] for shares, _ in runs]) for key in runs[0][0]}
        for of_seed, (shares, _) in zip(found, runs):
            of_seed[variant] = shares
        table[variant] = row
        print(f"{variant:16s}" + "".join(f"  {k} {m:.3f} ± {h:.3f}" for k, (m, h) in row.items()),
              flush=True)
        for m, v in runs[0][1].items():
            axes.plot(*v[:300].flatten(1).T.numpy(), ".", markersize=2, label=f"modality {m}")
        axes.set_title(f"{variant}: {row['revised'][0]:.3f} ± {row['revised'][1]:.3f}", fontsize=8)
        axes.set_xlim(-2, 2)
        axes.set_ylim(-2, 2)
    axes.legend(fontsize=7)
    figure.savefig(out / "toy_revision.png")
    for seed, of_seed in enumerate(found):
        (out / f"{seed}.json").write_text(json.dumps(of_seed, indent=1))
    return table


if __name__ == "__main__":
    main()
