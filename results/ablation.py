"""ebm_revision.py's variants: which of its chains, starts and losses earn their place?

    python results/ablation.py [--variants full additive ..] [flags of ebm_revision.py]

Trains and evaluates each variant with the other flags as given, prints a table, and writes it to
<out_dir>/ablation/<dataset>/<seed>.json. Called again it reads the finished variants and resumes
the one that broke off. `revised` and `initial` start at the generator, `noise` at noise: a variant
whose chains were trained from noise is to be judged by the last.
"""
import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common                                                               # noqa: E402
import ebm_revision                                                         # noqa: E402

VARIANTS = {
    "full": [], "x from noise": ["--x_init", "noise"], "z from noise": ["--z_init", "noise"],
    "both from noise": ["--x_init", "noise", "--z_init", "noise"],
    "z from q": ["--z_init", "random"], "staged": ["--staged"],
    **{f"k_x {k}": ["--x_steps", str(k), "--x_steps_test", str(k)] for k in (0, 10, 30, 60)},
    **{f"k_z {k}": ["--z_steps", str(k)] for k in (0, 10, 30)},
    "no data KL": ["--l_rec", "0"], "no syn KL": ["--l_syn", "0", "--l_inf", "0"],
    "additive": ["--fusion", "additive"], "mixture NLL": ["--nll", "mixture"]}
# flags in which a finished run may differ: none that changes a number
FREE = ("out_dir", "judges", "resume", "overwrite", "device", "log_every", "ckpt_minutes")
KEYS = [f"coherence_{key}" for key in ("joint", "joint_initial", "joint_noise", "cross_1",
                                       "cross_1_initial")]


def main(argv: list[str]) -> dict[str, dict[str, float]]:
    """{variant: {metric: value}}; RunError if a finished variant had other flags."""
    p = argparse.ArgumentParser("ablation.py", allow_abbrev=False, add_help=False)
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    chosen, argv = p.parse_known_args(argv)
    args = ebm_revision.parse_args(argv)
    root, table = Path(args.out_dir) / "ablation" / args.dataset, {}
    argv = [*(a for a in argv if a != "--resume"), "--judges", args.judges or str(root / "judges")]
    for name in chosen.variants:
        own = [*argv, *VARIANTS[name], "--out_dir", str(root / name.replace(" ", "_"))]
        run = Path(own[-1]) / "ebm_revision" / args.dataset / str(args.seed)
        again = (run / "checkpoint.pt").exists() and not args.overwrite
        if again and (run / "result.json").exists():
            kept, new = json.loads((run / "config.json").read_text()), ebm_revision.parse_args(own)
            other = [flag for flag, value in vars(new).items()
                     if kept.get(flag) != value and flag not in FREE]
            if other:
                raise common.RunError(f"{run} had another --{other[0]}: give --overwrite, or "
                                      "another --out_dir")
            found = json.loads((run / "result.json").read_text())["metrics"]
        else:
            found = ebm_revision.main([*own, *["--resume"] * again])
        table[name] = {key: found[key] for key in KEYS if key in found}
    print(f"{'variant':18s}" + "".join(f"{key[10:]:>17s}" for key in KEYS))
    for name, row in table.items():
        print(f"{name:18s}" + "".join(f"{row.get(key, math.nan):17.3f}" for key in KEYS))
    (root / f"{args.seed}.json").write_text(json.dumps(table, indent=1))
    return table


if __name__ == "__main__":
    common.cli(lambda: main(sys.argv[1:]))
