"""jnf.py end to end through its command line: files, resume, ranks, bad input."""
import json
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
import data
import jnf
from whole_runs import (ROOT, assert_same_run, finish, kill_and_resume, lines, metrics_of, start,
                        two_processes, untrained_judges, wait_for)

TINY = ["--z_dim", "3", "--flow_hidden", "8", "--hmc_steps", "3", "--hmc_adapt", "3",
        "--batch_size", "32", "--epochs_shared", "3", "--epochs_joint", "3", "--epochs_flow", "3",
        "--log_every", "1", "--eval_batch", "64", "--n_eval", "100", "--n_leapfrog", "2"]


def flags(folder, *more):
    return ["--dataset", "paired", "--data_dir", str(folder), "--out_dir", str(folder / "runs"),
            *TINY, *more]


# ---- Whole runs ----------------------------------------------------------------------------------
@pytest.mark.pictures
def test_three_modalities_with_judges_all_files_and_all_subsets(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_judges", untrained_judges)
    monkeypatch.setattr(common, "load_inception", lambda *_: None)
    metrics = jnf.main(["--dataset", "synth_polymnist", "--n_train", "120", "--n_test", "24",
                        "--data_dir", str(tmp_path), "--out_dir", str(tmp_path / "runs"),
                        "--latent_prior", "gmm", "--gmm_components", "2", *TINY])
    run_dir = tmp_path / "runs/jnf/synth_polymnist/0"
    for name in ("config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "samples.png",
                 "cross.png", "curves.png", "diagnostics.png", "result.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert {"coherence_m0+m1_to_m2", "coherence_m2_to_m0", "coherence_cross_1", "coherence_cross_2",
            "coherence_joint", "coherence_joint_normal_prior", "kl_m1_nats", "accept_rate", "r_hat",
            "ess_per_step", "frechet_clf_m0"} <= set(metrics)
    assert metrics["coherence_subsets"] == 6
    result = json.loads((run_dir / "result.json").read_text())
    assert {"metrics", "note", "n", "seed", "minutes", "device", "torch", "command"} <= set(result)
    assert result["metrics"]["coherence_cross_2"] == metrics["coherence_cross_2"]
    monkeypatch.setattr(common, "_save_rows", lambda *_, **__: None)
    again = jnf.main(["--dataset", "synth_polymnist", "--n_train", "120", "--n_test", "24",
                      "--data_dir", str(tmp_path), "--out_dir", str(tmp_path / "runs"),
                      "--latent_prior", "gmm", "--gmm_components", "2", *TINY, "--eval_only"])
    assert again == pytest.approx(metrics, nan_ok=True)             # the checkpoint is enough


@pytest.mark.pictures
def test_shapes_draws_the_posteriors(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_judges", untrained_judges)
    jnf.main(["--dataset", "shapes", "--n_train", "100", "--n_test", "12", "--data_dir",
              str(tmp_path), "--out_dir", str(tmp_path / "runs"), *TINY, "--z_dim", "2"])
    assert (tmp_path / "runs/jnf/shapes/0/posteriors.png").exists()


@pytest.mark.parametrize("shared", ["contrastive", "dcca"])
def test_jnf_shared_trains_projectors_first_and_freezes_them(paired, shared):
    jnf.main(flags(paired, "--shared", shared, "--dcca_batch", "100"))
    run_dir = paired / "runs/jnf/paired/0"
    assert [s for s in dict.fromkeys(row["stage"] for row in lines(run_dir))] == \
        ["shared", "joint", "flow"]
    losses = [row["loss"] for row in lines(run_dir) if row["stage"] == "shared"
              and row["split"] == "train"]
    assert losses[-1] < losses[0]


def test_stage_u_leaves_joint_part_and_projectors_unchanged(paired):
    jnf.main(flags(paired, "--shared", "contrastive", "--epochs_flow", "0"))
    checkpoint = paired / "runs/jnf/paired/0/checkpoint.pt"
    before = torch.load(checkpoint, weights_only=True)["state"]["model"]
    jnf.main(flags(paired, "--shared", "contrastive", "--overwrite"))
    after = torch.load(checkpoint, weights_only=True)["state"]["model"]
    for name in before:
        if not name.startswith("posteriors"):
            assert torch.equal(before[name], after[name]), name
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("posteriors"))


@pytest.mark.parametrize("other", [["--flow_blocks", "0"], ["--warm_start"],
                                   ["--shared", "contrastive", "--shared_layers", "2"]])
def test_variants_share_the_joint_vae_to_the_bit(paired, other):
    models = []
    for more in ([], other):
        jnf.main(flags(paired, "--overwrite", *more))
        checkpoint = torch.load(paired / "runs/jnf/paired/0/checkpoint.pt", weights_only=True)
        models.append(checkpoint["state"]["model"])
    joint = [name for name in models[0] if name.startswith(("joint", "decoders"))]
    assert joint and all(torch.equal(models[0][name], models[1][name]) for name in joint)


def test_learning_rate_rises_over_the_first_steps_of_each_stage(paired, monkeypatch):
    rates, step = [], jnf.train_step

    def record(model, x, loss_fn, opt, args):
        rates.append(opt.param_groups[0]["lr"])
        return step(model, x, loss_fn, opt, args)
    monkeypatch.setattr(jnf, "train_step", record)
    jnf.main(flags(paired, "--lr", "0.002", "--lr_warmup", "4", "--max_steps", "7"))
    stage = [0.0005, 0.001, 0.0015, 0.002, 0.002, 0.002, 0.002]
    assert rates == pytest.approx(2 * stage)                               # J, then U


def test_warm_start_hands_the_joint_heads_bodies_to_the_encoders(paired):
    for more in [], ["--warm_start", "--overwrite"]:
        jnf.main(flags(paired, "--epochs_flow", "0", *more))
        checkpoint = torch.load(paired / "runs/jnf/paired/0/checkpoint.pt", weights_only=True)
        state = checkpoint["state"]["model"]
        bodies = {n: v for n, v in state.items() if re.match(r"joint_heads\.\w+\.0\.", n)}
        same = [torch.equal(v, state[re.sub(r"joint_heads\.(\w+)", r"posteriors.\1.encoder", n)])
                for n, v in bodies.items()]
        assert same and (all(same) if more else not any(same))


def test_frozen_features_change_no_number(paired):
    args = jnf.parse_args(flags(paired, "--shared", "contrastive"))
    sets = data.load("paired", "val", paired)
    torch.manual_seed(0)
    model = jnf.JNF(sets.shapes, args)
    cached = jnf.with_frozen_features(model, sets, args)
    plain = jnf.validate(model, sets, jnf.flow_loss, args, torch.device("cpu"))
    again = jnf.validate(model, cached, jnf.flow_loss, args, torch.device("cpu"))
    assert again == pytest.approx(plain, rel=1e-5)


def test_same_seed_same_numbers_other_seed_others(paired):
    out = [jnf.main(flags(paired, "--seed", seed, "--overwrite")) for seed in ("0", "0", "1")]
    assert out[0] == pytest.approx(out[1], rel=0, abs=0, nan_ok=True) and out[0] != out[2]


# ---- Resume --------------------------------------------------------------------------------------
def test_killed_in_every_stage_and_resumed_equals_the_uninterrupted_run(paired):
    command = ["jnf.py", *flags(paired, "--shared", "contrastive", "--ckpt_minutes", "0",
                                "--lr_warmup", "12")]
    run_dir, whole_dir = (paired / name / "jnf/paired/0" for name in ("runs", "whole"))
    kill_and_resume(command, run_dir, {"shared": 7, "joint": 7, "flow": 7})
    finish(start(*command, "--out_dir", str(paired / "whole")))
    assert_same_run(run_dir, whole_dir)


def test_sigterm_saves_and_says_how_to_continue(paired):
    asked = flags(paired, "--epochs_joint", "100000")
    process = start("jnf.py", *asked, "--overwrite")
    wait_for(process, paired / "runs/jnf/paired/0/metrics.jsonl", '"step": 3,')
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert shlex.split(out.rpartition("to continue: python jnf.py ")[2]) == [*asked, "--resume"]
    assert (paired / "runs/jnf/paired/0/checkpoint.pt").exists()


def test_two_processes_train_as_one_at_the_same_global_batch(paired):
    options = flags(paired, "--epochs_joint", "20")
    single = jnf.main(options)
    two_processes("jnf.py", *options, "--out_dir", str(paired / "two"))
    one, two = (paired / name / "jnf/paired/0" for name in ("runs", "two"))
    assert metrics_of(two)["loss_joint"] == pytest.approx(single["loss_joint"], rel=0.05)
    assert len(lines(two)) == len(lines(one))


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "mnits"], "--dataset"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--batch_size", "0"], "--batch_size"), (["--batch_size", "1e9x"], "--batch_size"),
    (["--seed", "-1"], "--seed"), (["--flow_blocks", "-1"], "--flow_blocks"),
    (["--tau", "0"], "--tau"), (["--n_modalities", "1"], "--n_modalities"),
    (["--z_dim", "300"], "--flow_hidden"), (["--epoch_joint", "3"], "--epoch_joint"),
    (["--hmc_step_size", "inf"], "--hmc_step_size"),
    (["--warm_start", "--shared", "dcca"], "--warm_start")])
def test_bad_flags_are_refused_before_any_work(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        jnf.main([*arguments, "--out_dir", str(tmp_path)])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def exit_of(arguments, monkeypatch, capsys):
    """Exit code and the last line on stderr of a run through the command line's door."""
    monkeypatch.setattr(sys, "argv", ["jnf.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        common.cli(jnf.main)
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error and len(error.splitlines()) == 1, error
    return stop.value.code, error


def test_missing_and_broken_data(paired, monkeypatch, capsys, tmp_path_factory):
    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    empty = tmp_path_factory.mktemp("empty")
    code, error = exit_of(["--dataset", "mnist_svhn", "--data_dir", str(empty), "--out_dir",
                           str(empty / "runs")], monkeypatch, capsys)
    assert code == 1 and "synth_mnist_svhn" in error and str(empty) in error
    file = paired / "paired_train.npz"
    file.write_bytes(file.read_bytes()[:-50])
    code, error = exit_of(flags(paired), monkeypatch, capsys)
    assert code == 1 and "paired_train.npz" in error
    np.savez(file, a=np.zeros((5, 8, 8, 2), "u1"), b=np.zeros((5, 8), "f4"))
    code, error = exit_of(flags(paired), monkeypatch, capsys)
    assert code == 1 and "paired_train.npz" in error


def test_net_that_does_not_fit_the_images(paired, monkeypatch, capsys):
    code, error = exit_of(flags(paired, "--net", "resnet"), monkeypatch, capsys)
    assert code == 2 and "--net" in error


def test_folders_and_checkpoints(paired, monkeypatch, capsys):
    checkpoint = paired / "runs/jnf/paired/0/checkpoint.pt"
    code, error = exit_of(flags(paired, "--resume"), monkeypatch, capsys)
    assert code == 2 and "--resume" in error
    jnf.main(flags(paired))
    good = checkpoint.read_bytes()
    code, error = exit_of(flags(paired), monkeypatch, capsys)       # would mix two runs
    assert code == 2 and "--overwrite" in error
    code, error = exit_of(flags(paired, "--resume", "--beta", "1"), monkeypatch, capsys)
    assert code == 2 and "--beta" in error
    for clash in (["--eval_only", "--overwrite"], ["--checkpoint", str(checkpoint)]):
        code, error = exit_of(flags(paired, *clash), monkeypatch, capsys)
        assert code == 2 and clash[0] in error and checkpoint.read_bytes() == good
    other = dict(torch.load(checkpoint, weights_only=True), script="sbm_vae")
    torch.save(other, paired / "other.pt")
    (paired / "cut.pt").write_bytes(good[:len(good) // 2])
    for name in ("other.pt", "cut.pt", "paired_test.npz", "nothing.pt"):
        code, error = exit_of(flags(paired, "--eval_only", "--checkpoint", str(paired / name)),
                              monkeypatch, capsys)
        assert code == 2 and name in error
    assert checkpoint.read_bytes() == good


def test_two_runs_in_one_folder(paired, monkeypatch, capsys):
    args = jnf.parse_args(flags(paired))
    with common.open_run(args, jnf.__file__, []):
        code, error = exit_of(flags(paired, "--overwrite"), monkeypatch, capsys)
    assert code == 2 and "another process" in error


def test_full_disk_leaves_the_earlier_checkpoint(paired):
    jnf.main(flags(paired, "--epochs_flow", "0"))
    checkpoint = paired / "runs/jnf/paired/0/checkpoint.pt"
    good = checkpoint.read_bytes()
    code = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (99999, 99999));"
            "import common, jnf; common.cli(jnf.main)")
    arguments = [*flags(paired, "--epochs_flow", "0", "--resume")]
    state = torch.load(checkpoint, weights_only=True)
    state["state"] = dict(state["state"], stage=1)                  # as if training had to go on
    torch.save(state, checkpoint)
    good = checkpoint.read_bytes()
    assert len(good) > 99999
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 1 and "checkpoint.pt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and checkpoint.read_bytes() == good
    assert not list(checkpoint.parent.glob("*.tmp"))
