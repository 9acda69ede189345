"""ebm_revision.py's variants: which of its chains, starts and losses earn their place?

    python results/ablation.py [--variants full additive ..] [flags of ebm_revision.py]

Trains and evaluates each variant with the other flags as given, prints a table, and writes it to
<out_dir>/ablation/<dataset>/<seed>.json. Called again it reads the finished variants and resumes
the one that broke off. `revised` and `initial` start at the generator, `noise` at noise: a variant
whose chains were trained from noise is to be judged by the last. The --warmup, which is the same in
most variants, is trained once: they go on from its end (row `VAE alone`), bit for bit as if each
had trained it. With --overwrite each does. `VAE longer` goes on as it was, to the end of --epochs.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tables import distance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common                                                               # noqa: E402
import data                                                                 # noqa: E402
import ebm_revision                                                         # noqa: E402

VARIANTS = {                                                # what each adds to the command's flags
    "full": [], "x from noise": ["--x_init", "noise"], "z from noise": ["--z_init", "noise"],
    "both from noise": ["--x_init", "noise", "--z_init", "noise"],
    "z from q": ["--z_init", "random"], "staged": ["--staged"],
    **{f"k_x {k}": ["--x_steps", str(k), "--x_steps_test", str(k)] for k in (0, 10, 30, 60)},
    **{f"k_z {k}": ["--z_steps", str(k)] for k in (0, 10, 30)},
    "no data KL": ["--l_rec", "0"], "no syn KL": ["--l_syn", "0", "--l_inf", "0"],
    "additive": ["--fusion", "additive"], "mixture NLL": ["--nll", "mixture"]}
WARMUP, LONGER = "VAE alone", "VAE longer"                  # no energy; the second for --epochs
NO_BRANCH = ("additive", "mixture NLL")                     # another warm-up
# flags in which a finished run may differ: none that changes a number
FREE = ("out_dir", "judges", "resume", "overwrite", "device", "log_every", "ckpt_minutes")
KEYS = [*(f"coherence_{key}" for key in ("joint", "joint_initial", "joint_noise", "cross_1",
                                         "cross_1_initial")), "frechet_clf", "frechet_clf_initial"]


def branch(checkpoint: Path, args: argparse.Namespace, folder: Path) -> None:
    """Puts a checkpoint of other flags into a run's folder as if it were of the run's own."""
    kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept["flags"] = json.dumps(vars(args), default=str)
    folder.mkdir(parents=True, exist_ok=True)
    with common.atomic_write(folder / "checkpoint.pt") as file:
        torch.save(kept, file)


def main(argv: list[str]) -> dict[str, dict[str, float]]:
    """{variant: {metric: value}}; RunError if a finished variant had other flags."""
    p = argparse.ArgumentParser("ablation.py", allow_abbrev=False, add_help=False)
    names = [*VARIANTS, LONGER]
    p.add_argument("--variants", nargs="+", default=names, choices=names)
    chosen, argv = p.parse_known_args(argv)
    args = ebm_revision.parse_args(argv)
    root, table = Path(args.out_dir) / "ablation" / args.dataset, {}
    argv = [*(a for a in argv if a != "--resume"), "--judges", args.judges or str(root / "judges")]

    def run(name, more, warm=None):                         # its metrics and folder
        own = [*argv, *more, "--out_dir", str(root / name.replace(" ", "_"))]
        done = Path(own[-1]) / "ebm_revision" / args.dataset / str(args.seed)
        again = (done / "checkpoint.pt").exists() and not args.overwrite
        new = ebm_revision.parse_args(own)
        if again and (done / "result.json").exists():
            kept = json.loads((done / "config.json").read_text())
            other = [flag for flag, value in vars(new).items()
                     if kept.get(flag) != value and flag not in FREE]
            if other:
                raise common.RunError(f"{done} had another --{other[0]}: give --overwrite, or "
                                      "another --out_dir")
            return json.loads((done / "result.json").read_text())["metrics"], done
        if warm and not again:
            branch(warm, new, done)
        return ebm_revision.main([*own, *["--resume"] * bool(again or warm)]), done

    train_set = data.load(args.dataset, "train", args.data_dir, n=args.n_train,
                          n_modalities=args.n_modalities)
    steps, warm = max(len(train_set) // args.batch_size, 1), None          # steps an epoch
    if args.warmup and not args.overwrite and set(chosen.variants) - set(NO_BRANCH):
        table[WARMUP], done = run(WARMUP, ["--max_steps", str(args.warmup * steps)])
        warm = done / "checkpoint.pt"
    longer = ["--warmup", str(args.epochs), "--epochs", str(args.epochs + 1), "--mixed", "0",
              "--max_steps", str(args.epochs * steps)]
    for name in chosen.variants:
        table[name], _ = run(name, (VARIANTS | {LONGER: longer})[name],
                             None if name in NO_BRANCH else warm)
    for row in table.values():
        row |= {f"frechet_clf{end}": distance(row, end) for end in ("", "_initial")}
    table = {name: {key: row[key] for key in KEYS if row.get(key) is not None}
             for name, row in table.items()}
    print(f"{'variant':16s}" + "".join(f"{key.removeprefix('coherence_'):>20s}" for key in KEYS))
    for name, row in table.items():
        print(f"{name:16s}" + "".join(f"{row.get(key, math.nan):20.3f}" for key in KEYS))
    (root / f"{args.seed}.json").write_text(json.dumps(table, indent=1))
    return table


if __name__ == "__main__":
    common.cli(lambda: main(sys.argv[1:]))
