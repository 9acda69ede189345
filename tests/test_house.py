"""The rules of the repository that a program can check."""
import ast
import builtins
import dis
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / f"{name}.py" for name in ("jnf", "sbm_vae", "latent_ebm_prior", "joint_layer_ebm",
                                            "ebm_revision") if (ROOT / f"{name}.py").exists()]
LINES = {"common": 1017, "data": 699, "jnf": 723, "sbm_vae": 1003, "latent_ebm_prior": 929,
         "joint_layer_ebm": 827, "ebm_revision": 731}       # no headroom; others: 600
BANNERS = ["Config", "Networks", "Densities", "Sampler", "Training", "Evaluation", "Main"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_stands_alone(path):
    text, names = path.read_text(), {p.stem for p in SCRIPTS} - {path.stem}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [a.name for a in node.names] + [getattr(node, "module", None)]
            assert not names & set(imported)
    core = text[text.index("# ---- Networks"):text.index("# ---- Training")]
    assert not re.search(r"\b(common|data)\.\w", core), "these need torch and einops only"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_nets_and_samplers_can_be_copied(path):
    """From "Networks" to "Training", with the imports but without common.py and data.py."""
    text, copied = path.read_text(), {}
    imports = [ast.unparse(node) for node in ast.parse(text).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = [line for line in imports if line not in ("import common", "import data")]
    core = text[text.index("# ---- Networks"):text.index("# ---- Training")]
    exec("\n".join(lines) + "\n" + core, copied)
    sampler = {"jnf": "hmc", "sbm_vae": "sample"}.get(path.stem, "langevin")
    assert callable(copied[sampler])
    if sampler == "hmc":                                        # the README's example
        readme = (ROOT / "README.md").read_text()
        exec(re.search(r"```python\n(z, accept_rate = .*?)```", readme, re.S).group(1), copied)
        assert copied["z"].shape == (64, 10) and 0.5 < copied["accept_rate"].mean() < 1


def test_what_the_readme_says_to_copy_needs_nothing_else():
    """All globals that the functions and classes of a row read are in the row, or its imports."""
    rows = re.findall(r"^\| (`[^|]*`) \| `(\w+\.py)` \|([^|]*)\|",
                      (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 7 and {file for _, file, _ in rows} == {path.name for path in SCRIPTS}
    for take, file, more in rows:
        named, used, own = set(re.findall(r"`(\w+)`", f"{take} {more}")), set(), set()
        parts = [part for part in compile((ROOT / file).read_text(), file, "exec").co_consts
                 if hasattr(part, "co_names") and part.co_name in named]
        assert parts
        while parts:
            part = parts.pop()
            steps = [(step.opname, step.argval) for step in dis.get_instructions(part)]
            used |= {name for op, name in steps if op in ("LOAD_GLOBAL", "LOAD_NAME")}
            own |= {name for op, name in steps if op == "STORE_NAME"}       # in a class's body
            parts += [const for const in part.co_consts if hasattr(const, "co_names")]
        extra = used - own - named - {"math", "torch", "Tensor", "nn", "__name__"}
        assert not extra - set(dir(builtins)), (take, file, extra)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_banners_stand_in_house_order(path):
    found = re.findall(r"^# ---- (\w+)", path.read_text(), re.M)
    assert found == BANNERS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_flag_is_read_somewhere(path):
    text = path.read_text()
    flags = re.findall(r'flag\("--(\w+)"', text)
    assert flags and all(re.search(rf"args\.{flag}\b|\"{flag}\"|\b{flag}=", text) for flag in flags)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("tests/*.py")),
                         ids=lambda p: p.name)
def test_style(path):
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100
    if path.parent == ROOT:
        bad = ("type=" "bool", ".cu" "da()", "nan_to" "_num", "except Ex" "ception", "except" ":")
        assert not [word for word in bad if word in text]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_a_file_is_short(path):
    assert len(path.read_text().splitlines()) <= LINES.get(path.stem, 600)


def test_help_says_the_preset_values():
    done = subprocess.run([sys.executable, "jnf.py", "--dataset", "polymnist", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "resnet" in done.stdout
    assert re.search(r"--z_dim \S+\s+\(default: 128\)", done.stdout)


def test_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, "results/tables.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run: python results/tables.py"


def test_every_row_of_reproduce_is_a_command_of_today():
    done = subprocess.run(["bash", "results/reproduce.sh", "--list"], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    commands = [line.split() for line in done.stdout.splitlines()]
    folders = [command[command.index("--out_dir") + 1] + "".join(command[1:6])
               for command in commands]
    assert len(commands) > 100 and len(set(folders)) == len(folders), "two rows share a folder"
    for python, script, *flags in commands:
        script = script.removesuffix(".py")
        args = json.loads(json.dumps(vars(importlib.import_module(script).parse_args(flags))))
        path = ROOT / "results" / script / args["dataset"] / Path(args["out_dir"]).name
        then = path / str(args["seed"]) / "result.json"
        then = json.loads(then.read_text()).get("flags", {}) if then.exists() else {}
        changed = {k: (v, args.get(k)) for k, v in then.items() if args.get(k) != v}
        assert not changed, f"{path}: flags (when measured, today) {changed}"


@pytest.mark.parametrize("bad", ["--minutes soon", "--only foo", "--data_dir nowhere", "--foo"])
def test_reproduce_refuses_a_bad_option(bad):
    done = subprocess.run(["bash", "results/reproduce.sh", *bad.split()], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and bad.split()[0] in done.stderr.splitlines()[0]


STUB = """
import pathlib, sys
a = sys.argv
folder = pathlib.Path(a[a.index("--out_dir") + 1], a[0][:-3], *(a[i + 1] for i in (1, 3)))
folder.mkdir(parents=True, exist_ok=True)
fresh = not (folder / "calls").exists()
open(folder / "calls", "a").write(" ".join(a) + "\\n")
(folder / "config.json").touch()
if "--eval_only" not in a:
    (folder / "checkpoint.pt").touch()
(folder / ("killed" if fresh else "result.json")).touch()
"""


def test_reproduce_resumes_what_broke_off_and_repeats_nothing_finished(tmp_path):
    """With a stand-in for the script that leaves no result when it is called first."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/reproduce.sh").write_text((ROOT / "results/reproduce.sh").read_text())
    (tmp_path / "sbm_vae.py").write_text(STUB)

    def run(minutes):
        command = f"bash results/reproduce.sh --only sbm_vae --minutes {minutes}"
        return subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True,
                              check=True, env=os.environ | {"PATH": path}).stdout.splitlines()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    real = [line for line in run(0) if "(needs --data_dir)" in line]
    first, second, third = run(9), run(9), run(9)
    rows = [line for line in first if line.startswith("run:")]
    assert real and rows and len(real) + len(rows) == int(first[-1].split()[0])
    assert [line for line in second if line.startswith("run:")] == rows
    assert not [line for line in third if line.startswith("run:")]
    assert second[-1] == third[-1] == f"{len(real)} rows left"
    for calls in tmp_path.glob("runs/results/*/sbm_vae/*/*/calls"):
        one, two = calls.read_text().splitlines()
        assert two == one + " --resume" * ("--eval_only" not in one)


QUOTED = {"jnf": ".048 .526 0.52 0.75", "latent_ebm_prior": "0.943 0.897 0.574 0.878",  # papers
          "joint_layer_ebm": ".063 .104 .20 .23 .870 .927 37.73 11.34"}
SECTIONS = {"JNF": "jnf", "SBM-VAE": "sbm_vae", "Latent EBM prior": "latent_ebm_prior",
            "Joint-layer EBM": "joint_layer_ebm", "EBM revision": "ebm_revision"}


@functools.cache
def measured(folder: str) -> list[tuple[Path, dict]]:
    return [(path, json.loads(path.read_text()))
            for path in (ROOT / "results" / folder).rglob("*.json")]


def unmeasured(text: str, scripts: set[str], rows: set[str] | None = None) -> list[str]:
    """Decimals in a text, but for tables and code, that are no metric of a script's results (or
    mean over a row's seeds; rows: of these variants alone), nor QUOTED from a paper."""
    text = re.sub(r"<!-- table.*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    values, seeds = [], {}
    for folder in [*scripts, *([] if rows else ["benchmark"])]:
        for path, found in measured(folder):
            if rows and path.name == "result.json" and path.parts[-3] not in rows:
                continue
            values += [v for v in numbers(found.get("metrics", found)) if math.isfinite(v)]
            for key, value in found.get("metrics", {}).items():
                seeds.setdefault((path.parent.parent, key), []).append(value)
    values += [sum(v) / len(v) for v in seeds.values() if None not in v]
    quoted, left = " ".join(QUOTED.get(script, "") for script in scripts).split(), []
    for number in re.findall(r"(?<![\w.,-])\d[\d,]*\.\d+|(?<![\w.,-])\.\d+", text):
        places, value = len(number.split(".")[1]), float(number.replace(",", ""))
        if number not in quoted and not any(abs(v - value) <= 0.5001 * 10**-places for v in values):
            left.append(number)
    return left


@pytest.mark.parametrize("title, script", SECTIONS.items())
def test_a_decimal_in_the_text_is_a_metric_of_some_result(title, script):
    page = (ROOT / "results/README.md").read_text()
    assert not unmeasured(re.search(rf"\n## {title}\n(.*?)\n## ", page, re.S).group(1), {script})


def test_a_decimal_on_the_first_page_is_a_metric_of_what_is_named_beside_it():
    """Scripts by name, their rows in code or `default`; the ablations count as one row."""
    page = (ROOT / "README.md").read_text()
    names = {name.lower().removesuffix(" prior"): script for name, script in SECTIONS.items()}
    for title in ("One table", "What we learned"):
        for text in re.search(rf"\n## {title}\n(.*?)\n## ", page, re.S).group(1).split("\n"):
            named = {script for name, script in names.items()
                     if name in text.lower() or f"`{script}" in text}
            rows = set(re.findall(r"`([^`]*)`", text)) | {"default"}
            assert not unmeasured(text, named, rows), text[:80]


def numbers(tree):
    """All numbers in nested dictionaries."""
    for v in tree.values() if isinstance(tree, dict) else []:
        if isinstance(v, dict):
            yield from numbers(v)
        elif isinstance(v, (int, float)) and not isinstance(v, bool):
            yield float(v)


def test_no_data_and_no_large_file_is_in_the_repository():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for path in map(ROOT.joinpath, done.stdout.splitlines()):
        if path.exists():
            assert path.suffix not in {".npz", ".pt", ".gz"} and path.stat().st_size < 2**20, path


def test_no_path_of_one_machine():
    for path in [ROOT / "README.md", ROOT / "results/README.md",
                 *(ROOT / "results").rglob("*.json")]:
        assert not re.search(r"(^|[\s`\"=])/(tmp|home|root|work|Users)/", path.read_text()), path


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_what_a_page_shows_or_links_exists(page):
    """Pictures, files and sections."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        path, _, section = "".join(link).partition("#")
        if path.startswith("http"):
            continue
        target = folder / path if path else ROOT / page
        assert target.exists(), path
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if section else []
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not section or section in slugs, f"{path}#{section}"


def test_readme_begins_with_the_two_commands():
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert block.splitlines() == ["python jnf.py", "python -m pytest -q tests"]


def test_readme_example_of_own_data_trains(tmp_path):
    code = re.search(r"```python\n(import numpy.*?)```", (ROOT / "README.md").read_text(), re.S)
    subprocess.run([sys.executable, "-c", code.group(1)], cwd=tmp_path, check=True)
    import data
    train = data.load("paired", "train", tmp_path)
    assert train.shapes == {"left": (1, 28, 28), "right": (3, 32, 32)} and train.y is not None
