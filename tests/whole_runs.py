"""What the tests of whole runs share: small data, judges of no training, and scripts in processes
of their own, killed and resumed."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import common

ROOT = Path(__file__).resolve().parent.parent


def write_pairs(folder, n_train: int, n_test: int) -> Path:
    """Unlabelled pairs of two grey levels in folder, for --dataset paired: no judge is trained."""
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        shade = rng.integers(0, 255, (n, 1, 1, 1))
        a, b = (np.broadcast_to(v, (n, 8, 8, c)).astype("u1") for v, c in
                ((shade, 1), (255 - shade, 3)))
        np.savez(folder / f"paired_{split}.npz", a=a, b=b)
    return folder


def untrained_judges(train, test, *_):
    """Stands in for common.load_judges."""
    torch.manual_seed(0)
    judges = {m: common.Judge(s, 10).eval().requires_grad_(False) for m, s in train.shapes.items()}
    for judge in judges.values():
        judge.accuracy = 0.1
    return judges


def start(*command: str) -> subprocess.Popen:
    """python with these arguments, in the repository's root."""
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def two_processes(*command: str) -> None:
    """The command under torchrun, to its end."""
    finish(start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command))


def wait_for(process: subprocess.Popen, path: Path, text: str, seconds: float = 300) -> None:
    """Until the file has the text."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"{text} did not come: {process.communicate()[1]}")


def kill_and_resume(command: list[str], run_dir: Path, moments: dict[str, int]) -> None:
    """The command, killed (-9) once {stage: step} is in its log, each time resumed, to its end."""
    process = start(*command)
    for stage, step in moments.items():
        wait_for(process, run_dir / "metrics.jsonl", f'"stage": "{stage}", "step": {step},')
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start(*command, "--resume")
    finish(process)


def lines(run_dir: Path) -> list[dict]:
    """metrics.jsonl without the wall clock."""
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]


def metrics_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())["metrics"]


def state_of(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["state"]


def assert_same_run(one: Path, two: Path) -> None:
    """The same log, weights and metrics, to the bit."""
    assert lines(one) == lines(two) and metrics_of(one) == metrics_of(two)
    models = [state_of(run_dir)["model"] for run_dir in (one, two)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
