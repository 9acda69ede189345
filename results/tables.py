"""Rewrites the tables of both READMEs from result.json:  python results/tables.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`, in README.md or in
results/README.md. Each row is one variant: the mean and, with two seeds or more, the standard
deviation over its seeds. --check changes nothing and exits with 1 if a README differs.
"""
import json
import math
import re
import statistics
import sys
from pathlib import Path

from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
CROSS = [("given 1", "coherence_cross_1"), ("given 2", "coherence_cross_2")]
CHAINS = [("R-hat", "r_hat"), ("its 95 %", "r_hat_95"),
          ("autocorrelation time", "autocorrelation_time")]
TABLES = {       # name: (folder below results, [(column, metric)])
    "jnf": ("jnf", [("joint", "coherence_joint"), ("mnist → svhn", "coherence_mnist_to_svhn"),
                    ("svhn → mnist", "coherence_svhn_to_mnist"), *CROSS, *CHAINS[:2],
                    ("ESS a step", "ess_per_step"), ("accept", "accept_rate")]),
    "sbm_vae": ("sbm_vae", [("joint", "coherence_joint"),
                            ("independent latents", "coherence_joint_independent"), *CROSS,
                            ("given 3", "coherence_cross_3"), ("given 4", "coherence_cross_4"),
                            ("precision", "precision"), ("recall", "recall"),
                            ("recall, independent", "recall_independent")]),
    "latent_ebm_prior": ("latent_ebm_prior", [
        ("joint, EBM prior", "coherence_joint"), ("base prior", "coherence_joint_base"),
        *((f"Gaussians: {k}", f"coherence_joint_gmm{k}") for k in (1, 10, 100)),
        ("latents resampled", "coherence_joint_resampled"), *CROSS, *CHAINS]),
    "joint_layer_ebm": ("joint_layer_ebm", [
        ("Fréchet (judge), EBM", "frechet_clf"), ("without EBM", "frechet_clf_k0"), *CHAINS,
        ("energy after K steps", "energy_k"), ("at the end", "energy_end")]),
    "ebm_revision": ("ebm_revision", [
        ("joint, revised", "coherence_joint"), ("initial", "coherence_joint_initial"),
        ("from noise", "coherence_joint_noise"), ("given 1, revised", "coherence_cross_1"),
        ("initial", "coherence_cross_1_initial"), ("Fréchet (judge), revised", "distance"),
        ("initial", "distance_initial"), ("matched preferred", "f_prefers_matched"), *CHAINS[:2]]),
}


def distance(metrics: dict, suffix: str = "") -> float | None:
    """The judges' Fréchet distance of joint samples, mean over modalities."""
    names = [k.removeprefix("judge_accuracy_") for k in metrics if k.startswith("judge_accuracy_")]
    values = [metrics.get(f"frechet_clf_{m}{suffix}") for m in names]
    return statistics.mean(values) if values and None not in values else None


def read(path: Path) -> dict:
    """A result.json, with the mean distances and the seconds among its metrics."""
    result = json.loads(path.read_text())
    more = {f"distance{end}": distance(result["metrics"], end)
            for end in ("", "_base", "_initial", "_independent")}
    result["metrics"] |= more | {"seconds": result.get("seconds_per_1000")}
    return result


def cell(results: list[dict], metric: str) -> str:
    """Mean ± standard deviation; the number of values in brackets if some results have none."""
    values = [r["metrics"][metric] for r in results if r["metrics"].get(metric) is not None]
    if not values:
        return ""
    mean = statistics.mean(values)
    digits = 3 if abs(mean) < 1000 else 0
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{spread}" + f" ({len(values)})" * (len(values) < len(results))


def command(result: dict) -> str:
    """The command of a result, less what changes no number (folders, --resume), and its commit."""
    shown = "`" + re.sub(r" --(out_dir|judges) \S+| --resume", "", result["command"]) + "`"
    commit = result.get("commit") or ""
    return shown + f" at {commit[:7]}{'-dirty' * commit.endswith('-dirty')}" * bool(commit)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def table(folder: str, columns: list[tuple[str, str]]) -> str:
    """A row a variant; below it, folded away, the command and commit of each one's first seed."""
    head = ["data set", "variant", *(name for name, _ in columns)]
    head += ["seeds", "n", "minutes", "device"]
    rows: list[list[str]] = []
    variants: dict[tuple[str, str], list[dict]] = {}
    for path in sorted((ROOT / "results" / folder).glob("*/*/*/result.json")):
        variants.setdefault(path.parts[-4:-2], []).append(read(path))
    for (dataset, variant), results in variants.items():
        minutes = statistics.mean(r["minutes"] for r in results)
        rows.append([dataset, variant, *(cell(results, metric) for _, metric in columns),
                     str(len(results)), str(results[0]["n"]), f"{minutes:.0f}",
                     results[0]["device"]])
    commands = [f"* {dataset}, {variant}: {command(r)}"
                for (dataset, variant), (r, *_) in variants.items()]
    return "\n".join([markdown(head, rows), "", "<details><summary>Commands of these rows (first "
                      "seed, and the commit that it ran at; folders left out)</summary>", "",
                      *commands, "", "</details>"])


# script: (its baseline, suffix of the baseline's metrics, {data set: (its row, baseline's row)})
METHODS = {
    "jnf": ("Gaussian posteriors (JMVAE)", "", {
        "synth_mnist_svhn": ("default", "gaussian"),
        "synth_polymnist": ("three-modalities", "three-modalities-gaussian"),
        "mnist_svhn": ("3000-steps-warmup", "gaussian-3000-steps-warmup"),
        "polymnist": ("8000-steps", "gaussian-8000-steps")}),
    "sbm_vae": ("latents of different items", "_independent", {
        "synth_mnist_svhn": ("default", "default"), "mnist_svhn": ("default", "default"),
        "synth_polymnist": ("three-modalities", "three-modalities"),
        "polymnist": ("small", "small")}),
    "latent_ebm_prior": ("Laplace prior (MMVAE+)", "_base", {
        "synth_mnist_svhn": ("default", "default"), "synth_polymnist": ("default", "default"),
        "mnist_svhn": ("long-f", "long-f"),
        "polymnist": ("cross-warmup-wide", "cross-warmup-wide")}),
    "ebm_revision": ("generator alone", "_initial", {
        "synth_mnist_svhn": ("default", "default"),
        "synth_polymnist": ("three-modalities", "three-modalities"),
        "mnist_svhn": ("small-10-steps", "small-10-steps"), "polymnist": ("small", "small")})}


def seeds(script: str, dataset: str, variant: str) -> list[dict]:
    paths = (ROOT / "results" / script / dataset / variant).glob("*/result.json")
    return [read(path) for path in sorted(paths)]


def comparison(dataset: str, sizes: tuple[int, ...] = (1,)) -> str:
    """One row of each multimodal script on one data set, beside its built-in baseline; coherence
    given as many modalities as sizes say."""
    own = ["joint", *(f"given {k}" for k in sizes), "Fréchet (judge)"]
    head = ["script", *own, "baseline", *own, "seeds", "n", "minutes", "s / 1,000 samples"]
    rows = []
    keys = ["joint", *(f"cross_{k}" for k in sizes)]
    for script, (name, suffix, variants) in METHODS.items():
        results, base = (seeds(script, dataset, v) for v in variants.get(dataset, ["not run"] * 2))
        if results:
            number = str(len(results)) + f", {len(base)}" * (0 < len(base) != len(results))
            rows.append([
                script, *(cell(results, f"coherence_{k}") for k in keys), cell(results, "distance"),
                name, *(cell(base, f"coherence_{k}{suffix}") if base else "not run" for k in keys),
                cell(base, f"distance{suffix}"), number, str(results[0]["n"]),
                f"{statistics.mean(r['minutes'] for r in results):.0f}", cell(results, "seconds")])
    return markdown(head, rows)


SINGLE = {"synth_svhn": "default", "mnist": "variational", "svhn": "variational",
          "cifar10": "ood-svhn"}


def comparison_single() -> str:
    """joint_layer_ebm on single modalities: the judge's Fréchet distance after the trained number
    of prior steps and after none, and that of real training against real test images."""
    columns = [("Fréchet (judge)", "frechet_clf"),
               ("without Langevin steps", "frechet_clf_k0"), ("real", "frechet_clf_floor"),
               *CHAINS[:2]]
    head = ["data set", "row", *(name for name, _ in columns), "seeds", "minutes"]
    rows = []
    for dataset, variant in SINGLE.items():
        results = seeds("joint_layer_ebm", dataset, variant)
        rows.append([dataset, f"`{variant}`", *(cell(results, key) for _, key in columns),
                     str(len(results)), f"{statistics.mean(r['minutes'] for r in results):.0f}"])
    return markdown(head, rows)


def draw_comparison(datasets: list[str], path: Path) -> None:
    """Quality against joint coherence, a point a seed; hollow: without the method's own idea."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    figure = Figure((9.6, 7), dpi=120, layout="constrained")
    grid = figure.subplots(2, 2)
    for axes, dataset in zip(grid.flat, datasets):
        for i, (script, (_, suffix, variants)) in enumerate(METHODS.items()):
            for variant, end, fill in zip(variants[dataset], ("", suffix), ("full", "none")):
                found = [r["metrics"] for r in seeds(script, dataset, variant)]
                axes.plot([m[f"coherence_joint{end}"] for m in found],
                          [m[f"distance{end}"] or math.nan for m in found], "o", color=f"C{i}",
                          fillstyle=fill, label=script if fill == "full" else None)
        axes.set(xlabel="joint coherence", ylabel="Fréchet distance (judge)", yscale="log",
                 title=dataset)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def draw_scaling(path: Path) -> None:
    """SBM-VAE with 2, 4, 8, 10 of PolyMNIST's modalities: coherence and judge's distance given k of
    them; distance of joint samples and reconstructions of the two modalities that all runs have."""
    from matplotlib.figure import Figure
    found = {m: of_run(f"{m}-modalities", "polymnist10", "sbm_vae") for m in (2, 4, 8, 10)}
    found = {m: metrics for m, metrics in found.items() if metrics}
    figure = Figure((11, 3), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, key in ((left, "coherence_cross"), (middle, "frechet_clf_cross")):
        for i, (m, metrics) in enumerate(found.items()):
            sizes = range(1, m)
            axes.plot(sizes, [metrics[f"{key}_{k}"] for k in sizes], "o-", color=f"C{i}",
                      label=f"M = {m}")
    left.set(xlabel="observed modalities", ylabel="coherence of the others")
    middle.set(xlabel="observed modalities", ylabel="Fréchet (judge) of the others", ylim=(0, None))
    for key, name in (("", "drawn jointly"), ("_reconstructed", "reconstructed")):
        right.plot(list(found), [(metrics[f"frechet_clf_m0{key}"] + metrics[f"frechet_clf_m1{key}"])
                                 / 2 for metrics in found.values()], "o-", label=name)
    right.set(xlabel="M", ylabel="Fréchet (judge), m0 and m1", ylim=(0, None))
    for axes in (left, middle, right):
        axes.legend(fontsize=7)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval (Student's t) of two values or more."""
    n = len(values)
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return statistics.mean(values), half


def intervals(folder: str, columns: list[tuple[str, str]], name: str) -> str:
    """Means with 95 % intervals over the seeds in results/ebm_revision/<folder>/<seed>.json, each
    {variant: {metric: value}}; one value or two stand as they are."""
    paths = (ROOT / "results/ebm_revision" / folder).glob("*.json")
    runs = [json.loads(path.read_text()) for path in sorted(paths)]
    rows = []
    for variant in dict.fromkeys(variant for run in runs for variant in run):
        cells = []
        for _, key in columns:
            values = [run[variant][key] for run in runs if key in run.get(variant, {})]
            if len(values) > 2:
                cells.append("{:.3f} ± {:.3f}".format(*interval(values)))
            else:                                           # two values make no interval
                cells.append(", ".join(f"{value:.3f}" for value in values))
        cells.append(str(sum(variant in run for run in runs)))
        rows.append([variant, *cells])
    return markdown([name, *(title for title, _ in columns), "seeds"], rows)


MIXING = [         # chain, script, data set, row
    ("HMC, product of two flows", "jnf", "synth_mnist_svhn", "default"),
    ("the same, Gaussian experts", "jnf", "synth_mnist_svhn", "gaussian"),
    ("the same, flows", "jnf", "polymnist", "8000-steps"),
    ("Langevin, prior of z", "latent_ebm_prior", "synth_polymnist", "default"),
    ("the same, in units of z (D10)", "latent_ebm_prior", "synth_polymnist", "whiten"),
    ("Langevin, prior of all layers", "joint_layer_ebm", "synth_svhn", "default"),
    ("the same", "joint_layer_ebm", "mnist", "variational"),
    ("the same, small steps on a frozen VAE", "joint_layer_ebm", "mnist", "held-out-1"),
    ("Langevin, pixels", "ebm_revision", "synth_mnist_svhn", "default")]


def mixing() -> str:
    """How the scripts' chains mix when they run for much longer than in use."""
    columns = [*CHAINS, ("accepted", "accept_rate")]
    head = ["script", "chain", "data set, row", *(name for name, _ in columns), "seeds"]
    rows = []
    for chain, script, dataset, variant in MIXING:
        results = seeds(script, dataset, variant)
        rows.append([script, chain, f"{dataset}, `{variant}`",
                     *(cell(results, k) for _, k in columns), str(len(results))])
    return markdown(head, rows)


INFERENCE = [      # data, variants (data set/row) without and with posterior chains
    ("synthetic pairs", "synth_mnist_svhn", "default", "mcmc-small-step"),
    ("the same, w of r_m", "synth_mnist_svhn", "aux", "mcmc-small-step-aux"),
    ("synthetic pairs, D10", "synth_mnist_svhn", "whiten", "mcmc-whiten"),
    ("the same, w of r_m", "synth_mnist_svhn", "whiten-aux", "mcmc-whiten-aux"),
    ("synthetic pairs, f on all latents", "synth_mnist_svhn", None, "mcmc-u"),
    ("real pairs, no w", "mnist_svhn", "shared-k3-8-epochs", "shared-k3-mcmc"),
    ("PolyMNIST", "polymnist", "cross-warmup-wide", "cross-warmup-mcmc"),
    ("PolyMNIST, w of r_m", "polymnist", "cross-warmup-long-f-aux", "cross-warmup-mcmc-aux")]


def inference() -> str:
    """Latent EBM with and without MCMC inference: joint coherence under the base prior -> the EBM
    prior; given one."""
    head = ["data", "amortised inference", "seeds", "posterior chains", "seeds", "rows"]
    rows = []
    for name, dataset, *variants in INFERENCE:
        cells = []
        for results in (seeds("latent_ebm_prior", dataset, v) if v else [] for v in variants):
            base, joint, given = (cell(results, f"coherence_{key}")
                                  for key in ("joint_base", "joint", "cross_1"))
            cells += [f"{base} → {joint}; {given}" if results else "not run", str(len(results))]
        rows.append([name, *cells, ", ".join(f"`{v}`" for v in variants if v)])
    return markdown(head, rows)


IMPOSED = {        # how observed latents enter: row of sbm_vae's polymnist10
    "masked training, clean observed latents (default)": "4-modalities",
    "masked, noised anew in each step": "4-modalities-fresh",
    "masked, official": "4-modalities-official",
    "no masks, noised anew in each step": "4-modalities-unmasked",
    "no masks, official": "4-modalities-unmasked-official",
    "no masks, noised anew, guided at 10": "4-modalities-unmasked-guided",
    "masked, clean, guided at 10": "4-modalities-masked-guided",
    "`--preset paper`, but with our stage 1, small net, rates and schedule": "4-modalities-paper"}


def imposed() -> str:
    """SBM-VAE on four of PolyMNIST's modalities: coherence (and the judge's distance) given k."""
    rows = []
    for name, variant in IMPOSED.items():
        m = of_run(variant, "polymnist10", "sbm_vae")
        cells = [f"{m[f'coherence_cross_{k}']:.2f} ({m[f'frechet_clf_cross_{k}']:.0f})"
                 for k in (1, 2, 3)]
        rows.append([name, *cells])
    return markdown(["", "one", "two", "three"], rows)


PAPERS = {1: (".063", ".470", ".722", ".494"), 4: (".337", ".941", ".949", ".920"),
          5: (".325", ".964", ".980", ".913"), 7: (".148", ".815", ".941", ".680"),
          9: (".104", ".796", ".935", ".791")}     # VAE, the paper, its successor, HVAE L>0 there


def of_run(variant: str, dataset: str = "mnist", script: str = "joint_layer_ebm") -> dict:
    """Metrics of the first seed of a run, {} if there is none."""
    return next((r["metrics"] for r in seeds(script, dataset, variant)), {})


def anomaly() -> str:
    """AUPRC of a held-out digit, mean ± sd over the last epochs: on the test split, and in brackets
    with five times as many of the digit."""
    head = ["digit", "plain VAE", "single-layer EBM", "ours", "VAE, published", "paper",
            "successor", "HVAE, published"]
    rows = []

    def both(metrics: dict, end: str = "") -> str:
        if f"auprc{end}_mean" not in metrics:
            return "not run"
        parts = [f"{metrics[f'{k}{end}_mean']:.3f} ± {metrics[f'{k}{end}_sd']:.3f}"
                 for k in ("auprc", "auprc_five")]
        return f"{parts[0]} ({parts[1]})"
    for digit, (vae, paper, successor, hvae) in PAPERS.items():
        ours, single = of_run(f"held-out-{digit}"), of_run(f"held-out-{digit}-single-layer")
        rows.append([str(digit), both(ours, "_plain"), both(single), both(ours), vae, paper,
                     successor, hvae])
    return markdown(head, rows)


def ood() -> str:
    """AUROC / AUPRC of every score of the OOD runs, with energies and without."""
    head = ["trained on, against", "score", "AUROC", "AUPRC", "AUROC without f", "AUPRC without f"]
    rows = []
    for dataset, variant, name in (("cifar10", "ood-svhn", "CIFAR-10, SVHN"),
                                   ("mnist", "ood-synth-mnist", "MNIST, synth_mnist")):
        found = of_run(variant, dataset)
        for key in (k for k in ("l0", "l1", "l2", "llr1", "llr2") if f"ood_auroc_{k}" in found):
            label = f"{key[:-1].upper()}>{key[-1]}"
            cells = [f"{found[f'ood_{m}_{key}{end}']:.3f}" for end in ("", "_plain")
                     for m in ("auroc", "auprc")]
            rows.append([name, label, *cells])
    rows.append(["paper: CIFAR-10, SVHN", "L>0, L>9, LLR>9", ".087, .870, .927",
                 ".319, .858, .918", "", ""])
    return markdown(head, rows)


def benchmark() -> str:
    """Speed, from what tests/benchmark.py --out results/benchmark/<machine>.json measured."""
    head = ["machine", "script", "what", "seconds", "of floor", "rival, seconds", "times faster"]
    rows = []
    for path in sorted((ROOT / "results/benchmark").glob("*.json")):
        found = json.loads(path.read_text())
        for script, part in found.items():
            for name, row in part.items() if isinstance(part, dict) else ():
                floor = f"{row['of_floor']:.2f}" if row["of_floor"] else ""
                cells = [path.stem, script, name, f"{row['seconds']:.3g}", floor]
                if "rival_seconds" in row:
                    times = row["rival_seconds"] / row["seconds"]
                    cells += [f"{row['rival']}: {row['rival_seconds']:.3g}", f"{times:.1f}"]
                rows.append([*cells, *[""] * (len(head) - len(cells))])
    return markdown(head, rows)


def fill(text: str, tables: dict[str, str]) -> str:
    """The page with the tables that it names put in."""
    return re.sub(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", text, flags=re.S)


def main() -> int:
    made = {name: table(*source) for name, source in TABLES.items()}
    toy = [("revised", "revised"), ("initial", "initial"), ("from noise", "noise")]
    ablated = [(name, f"coherence_{key}") for name, key in
               (("joint, revised", "joint"), ("initial", "joint_initial"),
                ("from noise", "joint_noise"), ("given 1, revised", "cross_1"),
                ("initial", "cross_1_initial"))]
    ablated += [("Fréchet, revised", "frechet_clf"), ("initial", "frechet_clf_initial")]
    made |= {"comparison": comparison("synth_mnist_svhn"),
             "comparison_single": comparison_single(),
             "comparison_real": comparison("mnist_svhn"),
             "comparison_three": comparison("synth_polymnist", (1, 2)),
             "comparison_poly": comparison("polymnist", (1, 2, 3, 4)),
             "toy": intervals("toy", toy, "chains"), "benchmark": benchmark(),
             "ablation": intervals("ablation", ablated, "variant"),
             "ablation_faded": intervals("ablation-faded", ablated, "variant"),
             "mixing": mixing(), "inference": inference(), "imposed": imposed(),
             "joint_layer_anomaly": anomaly(), "joint_layer_ood": ood()}
    pages = [ROOT / "README.md", ROOT / "results/README.md"]
    filled = [fill(page.read_text(), made) for page in pages]
    if "--check" in sys.argv:
        return int(filled != [page.read_text() for page in pages])
    for page, text in zip(pages, filled):
        page.write_text(text)
    draw_comparison(["synth_mnist_svhn", "synth_polymnist", "mnist_svhn", "polymnist"],
                    ROOT / "results/comparison.png")
    draw_scaling(ROOT / "results/sbm_vae/modalities.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
