"""Rewrites the tables of README.md from results/**/result.json:  python results/tables.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Each row is one variant: the mean
and, with two seeds or more, the standard deviation over its seeds. --check changes nothing and
exits with 1 if README.md differs.
"""
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = {       # name: (folder below results, [(column, metric)])
    "jnf": ("jnf", [("joint", "coherence_joint"), ("mnist → svhn", "coherence_mnist_to_svhn"),
                    ("svhn → mnist", "coherence_svhn_to_mnist"), ("given 1", "coherence_cross_1"),
                    ("given 2", "coherence_cross_2"), ("R-hat", "r_hat"),
                    ("ESS a step", "ess_per_step"), ("accept", "accept_rate")]),
}


def cell(results: list[dict], metric: str) -> str:
    values = [r["metrics"][metric] for r in results if r["metrics"].get(metric) is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(folder: str, columns: list[tuple[str, str]]) -> str:
    head = ["data set", "variant", *(name for name, _ in columns)]
    head += ["seeds", "n", "minutes", "device"]
    rows = ["| " + " | ".join(head) + " | command |", "|" + "---|" * (len(head) + 1)]
    variants: dict[tuple[str, str], list[dict]] = {}
    for path in sorted((ROOT / "results" / folder).glob("*/*/*/result.json")):
        variants.setdefault(path.parts[-4:-2], []).append(json.loads(path.read_text()))
    for (dataset, variant), results in variants.items():
        minutes = statistics.mean(r["minutes"] for r in results)
        cells = [dataset, variant, *(cell(results, metric) for _, metric in columns),
                 str(len(results)), str(results[0]["n"]), f"{minutes:.0f}", results[0]["device"]]
        rows.append("| " + " | ".join(cells) + f" | `{results[0]['command']}` |")
    return "\n".join(rows)


def main() -> int:
    readme = ROOT / "README.md"
    text = old = readme.read_text()
    for name, (folder, columns) in TABLES.items():
        start, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, rest = text.split(start)
        text = before + start + table(folder, columns) + "\n" + end + rest.split(end, 1)[1]
    if "--check" in sys.argv:
        return int(text != old)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
