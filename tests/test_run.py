"""The folder of a run: who may use it, what is in it, exact resumes, signals, failures, ranks."""
import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import common


@pytest.fixture
def open_run(tmp_path):
    """open_run(**flags) -> Run in tmp_path; closed after the test."""
    runs = []

    def make(**flags):
        args = dict(dataset="toy", seed=0, out_dir=str(tmp_path), device="cpu", judges=None,
                    resume=False, overwrite=False, eval_only=False, checkpoint=None,
                    ckpt_minutes=5.0)
        runs.append(common.open_run(Namespace(**args | flags), __file__, ["--seed", "0"]))
        return runs[-1]
    yield make
    for run in reversed(runs):
        run.close()


PROGRAM = """
import os, signal, sys, time
from argparse import Namespace
import torch, common
args = Namespace(dataset="toy", seed=0, out_dir=sys.argv[1], device="cpu", judges=None,
                 resume=False, overwrite=False, eval_only=False, checkpoint=None, ckpt_minutes=5.0)
def main():
    with common.open_run(args, "test_run.py", []) as run:
        {body}
common.cli(main)
"""


def start(body, folder, **env):
    """A python process that has a run open, and does `body` with it."""
    (folder / "test_run.py").write_text("")
    program = PROGRAM.replace("{body}", textwrap.indent(textwrap.dedent(body), " " * 8).strip())
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | env)


# ---- Command line -------------------------------------------------------------------------------
@pytest.mark.parametrize("flag, text", [
    ("--lr", "0"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "2"), ("--free", "-inf"),
    ("--n", "-1"), ("--n", "1.5"), ("--n", "x")])
def test_number_refuses_what_is_out_of_range(flag, text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=common.number(float, 0, 1, open_low=True))
    parser.add_argument("--n", type=common.number(int, 0))
    parser.add_argument("--free", type=common.number(float), default=-1.0)
    assert parser.parse_args(["--lr", "1", "--n", "0"]) == Namespace(lr=1.0, n=0, free=-1.0)
    with pytest.raises(SystemExit):
        parser.parse_args([f"{flag}={text}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert flag in said and text in said
    allowed = {"--lr": "(0, 1]", "--free": "(-inf, inf)", "--n": "[0, inf)"}[flag]
    assert allowed in said or "invalid int" in said


@pytest.mark.parametrize("error, code", [
    (common.RunError("bad flag"), 2), (FileNotFoundError("gone"), 1),
    (FloatingPointError("nan"), 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_cli_turns_known_errors_into_a_line_and_a_code(error, code, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        common.cli(main)
    assert stop.value.code == code and capsys.readouterr().err.count("\n") == (code != 143)
    with pytest.raises(ZeroDivisionError):                     # a bug keeps its traceback
        common.cli(lambda: 1 / 0)


# ---- The folder ---------------------------------------------------------------------------------
def test_a_folder_is_claimed_by_one_run_and_not_overwritten(open_run, tmp_path):
    run = open_run()
    folder = tmp_path / "test_run" / "toy" / "0"
    assert run.dir == folder and {file.name for file in folder.iterdir()} == {".lock"}
    run.start(nn.Linear(1, 1))
    assert (folder / "source.py").read_text() == open(__file__).read()
    config = json.loads((folder / "config.json").read_text())
    assert config["ckpt_minutes"] == 5 and config["argv"] == ["--seed", "0"]
    assert config["run"]["processes"] == 1 and config["run"]["device"] == "cpu"
    with pytest.raises(common.RunError, match="in use"):
        open_run()
    run.close()
    run = open_run()                                           # nothing was logged: free to reuse
    run.log(step=1, loss=1.0)
    run.close()
    with pytest.raises(common.RunError, match="give --overwrite, or"):     # nothing to resume
        open_run()
    for flag in ("resume", "eval_only"):
        with pytest.raises(common.RunError, match=f"--{flag}: there is no .*toy/0/checkpoint.pt"):
            open_run(**{flag: True})
    (folder / "notes.txt").write_text("mine")
    run = open_run(overwrite=True)
    assert (folder / "metrics.jsonl").exists()                 # data or model may still be refused
    run.start(nn.Linear(1, 1))
    run.close()
    assert not (folder / "metrics.jsonl").exists() and (folder / "notes.txt").exists()
    for bad, named in ((dict(checkpoint="x.pt"), "--checkpoint needs --resume or --eval_only"),
                       (dict(overwrite=True, resume=True), "--overwrite would delete")):
        with pytest.raises(common.RunError, match=named):
            open_run(**bad)
    with pytest.raises(common.RunError, match="--device quantum"):
        open_run(device="quantum", out_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_killed_run_frees_its_folder(open_run, tmp_path):
    other = start("print('ready', flush=True); time.sleep(60)", tmp_path)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(common.RunError, match="in use"):
        open_run()
    other.kill()                                               # kill -9
    other.communicate()
    open_run()


# ---- Log, checkpoint, resume --------------------------------------------------------------------
def train(run, n_steps, stop_after=None):
    """A loop that uses every random state; saves every second step."""
    net = nn.Linear(2, 1)
    opt, first = torch.optim.Adam(net.parameters()), 0
    if run.args.resume:
        state = run.load()
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
    for step in range(first + 1, n_steps + 1):
        loss = (net(torch.randn(4, 2)) - random.random() - np.random.rand()).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(step=step, loss=loss.detach(), lr=np.float32(0.5), split="train")
        if step % 2 == 0:
            run.save({"net": net.state_dict(), "opt": opt.state_dict(), "step": step, "name": "x"})
        if step == stop_after:
            return
    run.finish({"loss": loss.detach(), "r_hat": float("nan")}, "note", n=4)


def test_denormal_numbers_count_as_zero():
    torch.set_flush_denormal(False)
    assert (torch.tensor([1e-38]) * 0.1).item() > 0
    common.seed_everything(0)
    assert (torch.tensor([1e-38]) * 0.1).item() == 0


def test_a_resumed_run_equals_the_uninterrupted_one(open_run, tmp_path, capsys):
    logs = []
    for out_dir, stop_after in ((tmp_path / "a", None), (tmp_path / "b", 5)):
        common.seed_everything(7)
        with open_run(out_dir=out_dir) as run:
            train(run, 8, stop_after)
        if stop_after:                                         # step 5 came after the checkpoint
            common.seed_everything(99)
            with open_run(out_dir=out_dir, resume=True) as run:
                train(run, 8)
        rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").open()]
        assert [row.pop("wall_s") for row in rows] == sorted(row["wall_s"] for row in map(
            json.loads, (run.dir / "metrics.jsonl").open()))
        logs.append(rows)
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == list(range(1, 9))
    result = json.loads((run.dir / "result.json").read_text())
    assert result["metrics"]["loss"] == logs[0][-1]["loss"] and result["metrics"]["r_hat"] is None
    assert {"note", "n", "seed", "epochs", "flags", "minutes", "device", "torch", "command",
            "commit"} <= result.keys()
    assert result["command"] == "python test_run.py --seed 0"
    assert "loss" in capsys.readouterr().out.splitlines()[-1]


def test_log_refuses_what_is_not_finite(open_run):
    with pytest.raises(FloatingPointError, match="loss is nan at step 3: .*--lr"):
        open_run().log(step=3, loss=torch.tensor(float("nan")))


def test_a_run_that_logged_nothing_finishes(open_run, tmp_path):
    open_run().save({"step": 3})
    path = tmp_path / "test_run" / "toy" / "0" / "checkpoint.pt"
    run = open_run(eval_only=True, checkpoint=str(path), out_dir=tmp_path / "new")     # elsewhere
    assert run.load(path) == {"step": 3} and (run.dir / "config.json").exists()
    assert run.finish({"loss": 1.0}, "", 1) == {"loss": 1.0}
    (run.dir / "metrics.jsonl").write_text("")
    run.finish({"loss": 1.0}, "", 1)
    assert not (run.dir / "curves.png").exists()
    (run.dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')   # torn
    run.finish({"loss": 1.0}, "", 1)
    assert (run.dir / "curves.png").exists()


def test_a_file_that_is_no_checkpoint_is_named(open_run, tmp_path):
    run = open_run()
    with pytest.raises(common.RunError, match="checkpoint.pt"):
        run.load()
    run.save({"w": torch.ones(100)})
    whole = (run.dir / "checkpoint.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    at = whole.index(torch.ones(100).numpy().tobytes())
    flipped = whole[:at + 40] + bytes([whole[at + 40] ^ 64]) + whole[at + 41:]
    for content in (b"", b"hello", whole[:50], whole[:len(whole) // 2], whole[:-1], whole[100:],
                    flipped):                                  # one byte of a weight
        bad.write_bytes(content)
        with pytest.raises(common.RunError, match="bad.pt"):
            run.load(bad)
    torch.save({"script": "other", "format": 1}, bad)
    with pytest.raises(common.RunError, match="not a checkpoint of this"):
        run.load(bad)
    run.args.eval_only = True                                  # takes the weights, not the noise
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(run.load()["w"], torch.ones(100))
    assert torch.equal(before, torch.get_rng_state())


def test_a_refused_resume_leaves_the_folder_as_it_was(open_run):
    run = open_run(z_dim=3)
    run.start(nn.Linear(1, 1))
    run.save({"step": 1})
    run.close()
    before = {file.name: file.read_bytes() for file in run.dir.iterdir()}
    again = open_run(z_dim=4, resume=True)
    again.start(nn.Linear(2, 1))
    with pytest.raises(common.RunError, match="--z_dim 3, not 4"):
        again.load()
    again.close()
    assert {file.name: file.read_bytes() for file in run.dir.iterdir()} == before
    good = open_run(z_dim=3, resume=True, ckpt_minutes=1.0)
    good.start(nn.Linear(1, 1))
    good.load()
    config = json.loads((run.dir / "config.json").read_text())
    assert config["ckpt_minutes"] == 1 and config["resume"] is True


def test_flags_that_differ_from_the_checkpoints_are_refused(open_run):
    run = open_run(z_dim=3, hmc_steps=5)
    run.save({})
    run.args.ckpt_minutes, run.args.hmc_steps = 1.0, 9
    run.load(free=("hmc_steps",))
    with pytest.raises(common.RunError, match="--hmc_steps 5"):
        run.load()
    run.args.hmc_steps, run.args.sigmoid = 5, False                        # a later version's flag
    run.args.z_dim = 4
    with pytest.raises(common.RunError, match="--z_dim 3, not 4; --sigmoid .no such flag then., "):
        run.load()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("[enforce fail] write failed\nC++ trace")])
def test_a_failed_save_keeps_the_earlier_checkpoint(open_run, monkeypatch, error):
    run = open_run()
    run.save({"step": 1})

    def fail(payload, file):
        file.write(b"half")
        raise error
    with monkeypatch.context() as patch, pytest.raises(OSError, match="checkpoint.pt") as caught:
        patch.setattr(torch, "save", fail)
        run.save({"step": 2})
    assert "\n" not in str(caught.value) and run.load()["step"] == 1
    assert not list(run.dir.glob("*.tmp")) and not list(run.dir.glob(".*.tmp"))


def test_a_full_disk_ends_the_run_with_one_line(open_run, tmp_path):
    process = start("""
        import resource
        run.save({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run.save({"step": 2, "big": torch.zeros(10**6)})""", tmp_path)
    out, err = process.communicate()
    assert process.returncode == 1 and err.count("\n") == 1 and "checkpoint.pt" in err, err
    run = open_run(resume=True)
    assert run.load()["step"] == 1 and not list(run.dir.glob(".*.tmp"))


# ---- Signals, progress, ranks -------------------------------------------------------------------
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_for_a_checkpoint_and_an_end(open_run, number, code, capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    run = open_run()
    assert not run.checkpoint_due() and not run.stop_requested
    os.kill(os.getpid(), number)
    assert not run.stop_requested                              # not before it is saved
    assert run.checkpoint_due() and run.stop_requested == number
    assert signal.getsignal(number) == before[number]          # a second one aborts
    with pytest.raises(SystemExit) as stop:
        run.stop()
    assert stop.value.code == code and "--resume" in capsys.readouterr().out
    run.close()
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_stopped_run_says_how_to_continue_also_if_it_began_elsewhere(open_run, capsys, tmp_path):
    other = open_run(out_dir=str(tmp_path / "other"))
    other.save({"step": 1})
    run = open_run(resume=True, checkpoint=str(other.dir / "checkpoint.pt"))
    run.save(run.load(run.args.checkpoint) | {"step": 2})
    run.stop_requested = signal.SIGTERM
    with pytest.raises(SystemExit):
        run.stop()
    own = str(run.dir / "checkpoint.pt")
    assert shlex.split(capsys.readouterr().out.rpartition("to continue: ")[2]) == [
        "python", "test_run.py", "--seed", "0", "--resume", "--checkpoint", own]
    run.close()
    assert open_run(resume=True, checkpoint=own).load(own) == {"step": 2}


def test_a_signal_in_an_evaluation_ends_the_run_at_once(open_run, capsys):
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored behind a "&"
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    run = open_run(seed=3)
    run.begin_evaluation()
    assert {n: signal.getsignal(n) for n in before} == before
    assert torch.equal(torch.rand(2), torch.manual_seed(3) and torch.rand(2))
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    signal.signal(signal.SIGINT, outer)
    run.close()
    run = open_run(seed=4)
    os.kill(os.getpid(), signal.SIGTERM)                       # after the last step of training
    with pytest.raises(SystemExit) as stop:
        run.begin_evaluation()
    assert stop.value.code == 143 and "--resume" in capsys.readouterr().out


def test_checkpoints_fall_due_and_progress_is_sparse(open_run, capsys, monkeypatch):
    run, now = open_run(ckpt_minutes=1.0), time.monotonic()
    for seconds in range(0, 61, 5):
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        run.progress("joint", 1, 2, seconds, 120, 12, loss=torch.tensor(0.5))
    assert run.checkpoint_due()
    run.save({})
    assert not run.checkpoint_due()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5                                     # at 0, 15, 30, 45, 60 s
    assert lines[2] == "joint  epoch 2/2  step 30/120  loss 0.5  12/s  ETA 1.5 min"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run.progress("flow", 1, 2, 1, 9, 12)
    run.say("done")
    assert capsys.readouterr().out == "\r\x1b[Kflow  epoch 2/2  step 1/9\r\x1b[Kdone\n"
    for step, seconds in ((5, 70), (1, 100), (3, 110)):        # began anew at 100: so does the pace
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        run.progress("flow", 1, 2, step, 9, 12)
    assert capsys.readouterr().out.endswith("flow  epoch 2/2  step 3/9  2/s  ETA 0.5 min")


def test_two_ranks_average_gradients_agree_to_stop_and_one_writes(tmp_path):
    body = """
        p = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))]
        sum((run.rank + 1.0) * (i + 1) * q.sum() for i, q in enumerate(p)).backward()
        common.average_gradients(p, run.world)
        assert [q.grad.tolist() for q in p] == [[1.5] * 2, [3.0] * 3]
        if run.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert run.checkpoint_due() and run.stop_requested == signal.SIGTERM
        run.log(step=1, rank=run.rank)
        run.save({"rank": run.rank})
        dist = torch.distributed
        dist.barrier()
        assert run.load()["rank"] == 0
        noise = [torch.zeros(1), torch.zeros(1)]
        dist.all_gather(noise, torch.randn(1))
        assert noise[0] != noise[1]
        run.stop()"""
    port = str(random.randint(20_000, 50_000))
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(body, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    said = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], said
    assert said[0][0].strip().endswith("torchrun --nproc_per_node 2 test_run.py --resume")
    log = (tmp_path / "test_run" / "toy" / "0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["rank"] for line in log] == [0] and said[1][0] == ""


def test_ranks_have_noise_of_their_own_share_the_model_and_sync_rarely(tmp_path):
    body = """
        dist = torch.distributed
        def other(mine):
            both = [torch.zeros(1), torch.zeros(1)]
            dist.all_gather(both, mine)
            return both[0] != both[1]
        common.seed_everything(0)
        net = torch.nn.Linear(1, 1)
        before = torch.get_rng_state()
        run.start(net)
        assert torch.equal(before, torch.get_rng_state()) == (run.rank == 0)
        assert not other(net.weight.detach()[0]) and other(torch.randn(1))
        if run.rank:
            common.save_grid(run.dir / "rank1.png", {"x": torch.rand(2, 1, 8, 8)})
        reduce, count = dist.all_reduce, []
        dist.all_reduce = lambda *a: (count.append(1), reduce(*a))
        for step in range(100):
            if run.rank and step == 50:
                os.kill(os.getpid(), signal.SIGTERM)
            if run.checkpoint_due():
                break
        assert 50 <= step < 60 and len(count) <= 10, (step, len(count))
        assert run.stop_requested == signal.SIGTERM
        run.stop()"""
    port = str(random.randint(20_000, 50_000))
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(body, tmp_path, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    said = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], said
    assert not (tmp_path / "test_run" / "toy" / "0" / "rank1.png").exists()


def test_rollback_returns_the_last_checkpoint_three_times_then_stops(open_run, tmp_path):
    run = open_run()
    with pytest.raises(FloatingPointError, match="gap 9.*after 0 rollbacks"):
        open_run(seed=1).rollback("gap 9")
    run.save({"step": 7})
    noise = []
    for count in (1, 2, 3):
        assert run.rollback("gap 9") == {"step": 7}
        noise.append(torch.randn(()).item())
    assert len(set(noise)) == 3, "every retry has noise of its own"
    rows = [json.loads(row) for row in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["event"], row["count"]) for row in rows] == [("rollback", k) for k in (1, 2, 3)]
    run.save({"step": 8})
    run.close()
    resumed = open_run(resume=True)
    assert resumed.load() == {"step": 8} and resumed.rollbacks == 3
    with pytest.raises(FloatingPointError, match="gap 9, after 3 rollbacks: .*--lr_ebm"):
        resumed.rollback("gap 9")


def test_flags_of_a_result_are_those_that_were_given(open_run):
    run = open_run(weights=[1, 2, 3], n_eval=50)
    run.args.weights = run.args.weights[:2]                     # as a script may cut them to fit
    run.finish({"loss": 1.0}, "", 5)
    flags = json.loads((run.dir / "result.json").read_text())["flags"]
    assert flags == {"dataset": "toy", "seed": 0, "weights": [1, 2, 3]}


def test_seconds_per_1000_samples_leave_the_warm_up_out(open_run):
    run, naps = open_run(), {10: 0.4, 1000: 0.05}

    def sample(n):
        time.sleep(naps[n])
        return {"a": torch.zeros(n)}
    run.time_samples(sample)
    run.finish({"loss": 1.0}, "", 5)
    result = json.loads((run.dir / "result.json").read_text())
    assert 0.05 <= result["seconds_per_1000"] < 0.4 and result["epochs"] == {}
