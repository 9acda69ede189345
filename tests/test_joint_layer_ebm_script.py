"""joint_layer_ebm.py end to end through its command line: schemes, resume, rollback, bad input."""
import sys

import numpy as np
import pytest
import torch

import common
import joint_layer_ebm as jl
from whole_runs import (assert_same_run, finish, kill_and_resume, lines, metrics_of, start,
                        state_of, two_processes, untrained_judges)

TINY = ["--z_dims", "4", "3", "2", "--width", "4", "--prior_hidden", "8", "--f_hidden", "8",
        "--prior_steps", "3", "--post_steps", "3", "--batch_size", "20", "--epochs", "2",
        "--log_every", "1", "--eval_batch", "20", "--long_steps", "60", "--group_dim", "2",
        "--ood_samples", "2"]
VAE, SWEEP = ["--epochs_backbone", "2"], jl.SWEEP


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small files, 120 train and 40 test; no judge is trained, no weights are looked for."""
    rng = np.random.default_rng(0)
    for name in ("fashion_mnist", "svhn", "cifar10"):
        side, channels = (28, 1) if name == "fashion_mnist" else (32, 3)
        for split, n in (("train", 120), ("test", 40)):
            y = np.arange(n) % 10
            x = np.zeros((n, side, side, channels), "u1")
            for i, c in enumerate(y):
                x[i, 2 + c:8 + c, 4:20] = rng.integers(100, 255)
            np.savez(tmp_path / f"{name}_{split}.npz", x=x, y=y)
    monkeypatch.setattr(common, "load_judges", untrained_judges)
    monkeypatch.setattr(common, "load_inception", lambda *_: None)
    monkeypatch.setattr(jl, "SWEEP", (0, 10))
    return tmp_path


def flags(folder, *more, dataset="fashion_mnist"):
    return ["--dataset", dataset, "--data_dir", str(folder), "--out_dir", str(folder / "runs"),
            *TINY, *more]


def run_dir(folder, dataset="fashion_mnist", name="runs"):
    return folder / name / "joint_layer_ebm" / dataset / "0"


# ---- Whole runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [
    pytest.param(["--scheme", "variational", *VAE, "--net", "ladder"], marks=pytest.mark.pictures),
    ["--scheme", "two_stage", *VAE, "--groups", "1", "1", "--spectral_norm"],
    ["--scheme", "mcmc", "--epochs_backbone", "0", "--space", "z"]], ids=lambda more: more[1])
def test_schemes_write_all_files_and_eval_only_repeats_the_result(folder, more, monkeypatch):
    monkeypatch.setattr(jl, "SWEEP", SWEEP)
    metrics = jl.main(flags(folder, *more))
    names = ["config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "samples.png",
             "cross.png", "curves.png", "diagnostics.png", "result.json", "layer_1.png",
             "layer_2.png"]
    for name in names:
        assert (run_dir(folder) / name).stat().st_size > 0, name
    assert {"frechet_clf", "recon_mse", "energy_start", "energy_k", "energy_end", "r_hat",
            "ess_per_step", "frechet_clf_floor"} <= set(metrics)
    assert {f"frechet_clf_k{k}" for k in (0, 3, 10, 20, 40, 60, 100)} <= set(metrics)
    assert metrics["frechet_clf"] == metrics["frechet_clf_k3"] != metrics["frechet_clf_k0"]
    stages = dict.fromkeys(row["stage"] for row in lines(run_dir(folder)))
    assert list(stages) == {"mcmc": ["joint"], "two_stage": ["backbone", "energy"],
                            "variational": ["backbone", "joint"]}[more[1]]
    if more[1] != "variational":                                # not twice with pictures
        again = jl.main(flags(folder, *more, "--eval_only"))
        assert again == pytest.approx(metrics, nan_ok=True)


def test_two_stage_leaves_the_backbone_as_the_first_stage_left_it(folder):
    more = ["--scheme", "two_stage", *VAE, "--groups", "1", "1"]
    states = []
    for epochs in ("0", "2"):
        jl.main(flags(folder, *more, "--epochs", epochs, "--overwrite"))
        states.append(torch.load(run_dir(folder) / "checkpoint.pt", weights_only=True)["state"])
    before, after = (state["model"] for state in states)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"energies"}


def test_no_energies_are_the_plain_vae(folder):
    metrics = jl.main(flags(folder, "--f_hidden", "0", *VAE))
    assert metrics["energy_start"] == metrics["energy_end"] == 0
    assert not [row for row in lines(run_dir(folder)) if "f_pos" in row]


def test_a_held_out_digit_is_not_trained_on_and_has_an_auprc(folder, monkeypatch):
    seen = []
    step = jl.train_step
    monkeypatch.setattr(jl, "train_step", lambda m, x, *a: seen.append(x) or step(m, x, *a))
    metrics = jl.main(flags(folder, "--held_out", "7", "--last_epochs", "1"))
    names = [f"{name}{end}" for name in jl.AUPRC for end in ("", "_mean", "_sd")]
    assert set(names) <= set(metrics) and all(0 < metrics[name] <= 1 for name in jl.AUPRC)
    assert metrics["auprc_sd"] == 0 and metrics["auprc_five"] > metrics["auprc"]
    rows = torch.cat(seen)[:, 0, :, 10].argmax(1)               # the bar's first row is 2 + class
    assert 2 + 7 not in rows.unique().tolist() and len(rows.unique()) == 9
    again = jl.main(flags(folder, "--held_out", "7", "--last_epochs", "1", "--eval_only"))
    assert again["auprc_mean"] == metrics["auprc_mean"]


def test_ood_scores_for_every_k_and_a_data_set_is_not_ood_of_itself(folder):
    more = ["--net", "ladder", "--ood"]
    metrics = jl.main(flags(folder, *more, "svhn", dataset="cifar10"))
    for name in ("l0", "l1", "l2", "llr1", "llr2"):
        for end in ("", "_plain"):
            assert 0 <= metrics[f"ood_auroc_{name}{end}"] <= 1
            assert 0 < metrics[f"ood_auprc_{name}{end}"] <= 1
    itself = jl.main(flags(folder, *more, "cifar10", "--eval_only", dataset="cifar10"))
    assert itself["ood_auroc_l0"] == pytest.approx(0.5, abs=0.15)


def test_unfinished_training_is_not_evaluated(folder, break_off):
    break_off(jl)
    with pytest.raises(OSError):
        jl.main(flags(folder, "--ckpt_minutes", "0"))
    with pytest.raises(common.RunError, match="not finished"):
        jl.main(flags(folder, "--eval_only"))


def test_without_energies_the_backbone_alone_is_trained_and_sampled(folder):
    metrics = jl.main(flags(folder, "--scheme", "two_stage", "--f_hidden", "0", *VAE))
    assert metrics["frechet_clf"] == metrics["frechet_clf_k0"] and metrics["energy_k"] == 0


def test_same_seed_same_numbers_other_seed_others(folder):
    out = [jl.main(flags(folder, "--seed", seed, "--overwrite")) for seed in ("0", "0", "1")]
    assert out[0] == pytest.approx(out[1], rel=0, abs=0, nan_ok=True) and out[0] != out[2]


# ---- Resume and rollback -------------------------------------------------------------------------
STUB = """import common, joint_layer_ebm
common.load_judges = lambda *_: {}
common.load_inception = lambda *_: None
common._save_rows = lambda *_, **__: None
common.cli(joint_layer_ebm.main)
"""


def test_killed_in_both_stages_and_resumed_equals_the_uninterrupted_run(folder):
    command = ["-c", STUB, *flags(folder, *VAE, "--ckpt_minutes", "0", "--epochs", "4",
                                  "--held_out", "3")]
    kill_and_resume(command, run_dir(folder), {"backbone": 7, "joint": 14})
    finish(start(*command, "--out_dir", str(folder / "whole")))
    whole = run_dir(folder, name="whole")
    assert_same_run(run_dir(folder), whole)
    auprc, expected = (state_of(d)["auprc"] for d in (run_dir(folder), whole))
    assert auprc == expected and len(auprc) > 2


def test_diverged_chains_roll_back_with_half_the_rate_and_stop_after_three(folder, monkeypatch):
    step, calls, rates = jl.train_step, [], []

    def poisoned(model, x, stage, opt, opt_ebm, *rest):
        calls.append(stage)
        rates.append(opt_ebm.param_groups[0]["lr"])
        metrics = step(model, x, stage, opt, opt_ebm, *rest)
        if len(calls) in bad:
            with torch.no_grad():
                next(model.energies.parameters()).fill_(float("nan"))
            metrics["f_pos"] = metrics["f_pos"] * float("nan")
        return metrics
    monkeypatch.setattr(jl, "train_step", poisoned)
    bad = {8}
    metrics = jl.main(flags(folder, "--scheme", "variational", "--epochs_backbone", "1",
                            "--lr_ebm", "0.01", "--no-decay"))
    events = [row for row in lines(run_dir(folder)) if row.get("event") == "rollback"]
    assert len(events) == 1 and events[0]["count"] == 1 and "diverged" in events[0]["reason"]
    assert rates[7] == 0.01 and rates[8] == 0.005               # half, from the checkpoint on
    assert all(np.isfinite(v) for k, v in metrics.items() if k.startswith("frechet"))
    calls.clear()
    bad = set(range(8, 1000))
    with pytest.raises(FloatingPointError, match="diverged"):
        jl.main(flags(folder, "--scheme", "variational", "--epochs_backbone", "1", "--overwrite"))
    assert len([r for r in lines(run_dir(folder)) if r.get("event") == "rollback"]) == 3


def test_rates_fall_linearly_once_the_energies_learn(folder, monkeypatch):
    step, rates = jl.train_step, []

    def recorded(model, x, stage, opt, opt_ebm, *rest):
        rates.append([o.param_groups[0]["lr"] for o in (opt, opt_ebm)])
        return step(model, x, stage, opt, opt_ebm, *rest)
    monkeypatch.setattr(jl, "train_step", recorded)
    jl.main(flags(folder, "--epochs_backbone", "1", "--lr", "0.01", "--lr_ebm", "0.02", "--decay"))
    fall = [1.0] * 5 + [1 - i / 10 for i in range(10)]          # 5 backbone steps, then 10
    assert rates == [[pytest.approx(0.01 * f), pytest.approx(0.02 * f)] for f in fall]


def test_too_large_a_gap_counts_as_divergence(folder):
    with pytest.raises(FloatingPointError, match="diverged"):
        jl.main(flags(folder, "--max_gap", "1e-9", "--epochs_backbone", "0"))


def test_two_processes_train_as_one_at_the_same_global_batch(folder):
    options = flags(folder, *VAE, "--epochs", "4")
    finish(start("-c", STUB, *options))
    (folder / "stub.py").write_text(STUB)
    two_processes(str(folder / "stub.py"), *options, "--out_dir", str(folder / "two"))
    one, two = run_dir(folder), run_dir(folder, name="two")
    assert metrics_of(two)["recon_mse"] == pytest.approx(metrics_of(one)["recon_mse"], rel=0.15)
    assert len(lines(two)) == len(lines(one))


def test_own_images_of_any_square_size_train_without_labels(folder, monkeypatch):
    monkeypatch.setattr(common, "load_judges", lambda *_: {})
    images = np.random.default_rng(0).integers(0, 255, (60, 22, 22), np.uint8)
    for split in ("train", "test"):
        np.savez(folder / f"images_{split}.npz", x=images)
    own = flags(folder, "--epochs", "1", "--epochs_backbone", "1", dataset="images")
    metrics = jl.main(own)
    assert 0 < metrics["recon_mse"] < 1 and "frechet_clf" not in metrics
    np.savez(folder / "images_train.npz", x=images[:, :20])
    np.savez(folder / "images_test.npz", x=images[:, :20])
    with pytest.raises(common.RunError, match="--net ladder .* try mlp"):
        jl.main([*own, "--overwrite"])
    jl.main([*own, "--overwrite", "--net", "mlp"])


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "mnits"], "--dataset"), (["--scheme", "gan"], "--scheme"),
    (["--z_dims", "0"], "--z_dims"), (["--sigma", "0"], "--sigma"),
    (["--lr_ebm", "nan"], "--lr_ebm"),
    (["--groups", "0", "0"], "--groups"), (["--prior_steps", "-1"], "--prior_steps"),
    (["--net", "cifar"], "--z_dims"), (["--ood", "letters"], "--ood"),
    (["--scheme", "mcmc", "--epochs_backbone", "1"], "--epochs_backbone"),
    (["--epoch", "3"], "--epoch"),
    (["--prior_step_size", "inf"], "--prior_step_size"), (["--held_out", "10"], "--held_out")])
def test_bad_flags_are_refused_before_any_work(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        jl.main([*arguments, "--out_dir", str(tmp_path)])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, code, words", [
    (["--net", "svhn", "--z_dims", "3", "3"], 2, "--net svhn"),
    (["--ood", "svhn"], 2, "--ood svhn"), (["--resume"], 2, "--resume")])
def test_what_does_not_fit_the_data_is_one_line(folder, arguments, code, words, monkeypatch,
                                                capsys):
    monkeypatch.setattr(sys, "argv", ["joint_layer_ebm.py", *flags(folder, *arguments)])
    with pytest.raises(SystemExit) as stop:
        common.cli(jl.main)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == code and words in error and len(error.splitlines()) == 1


def test_presets_flags_and_help():
    args = jl.parse_args(["--dataset", "cifar10"])
    assert (args.scheme, args.net, args.z_dims, args.prior_steps) == ("mcmc", "cifar", [128, 100],
                                                                      60)
    assert (args.post_steps, args.post_step_size, args.lr_ebm, args.sigma) == (40, 0.1, 2e-5, 0.3)
    for dataset in jl.PRESETS:
        for scheme in ([], ["--scheme", "two_stage"]):
            args = jl.parse_args(["--dataset", dataset, *scheme])
            assert args.net == "deep" if scheme else args.net in ("ladder", "mlp", *jl.STACKS)
    assert jl.parse_args(["--z_dims", "5"]).z_dims == [5]       # the flag wins over the preset
    assert jl.parse_args(["--scheme", "mcmc"]).epochs_backbone == 0
    digits = jl.parse_args(["--dataset", "mnist", "--held_out", "-1"])
    assert (digits.scheme, digits.net) == ("variational", "ladder")
    plain = jl.parse_args(["--dataset", "mnist", "--held_out", "1", "--f_hidden", "0"])
    assert (plain.prior_steps, plain.epochs) == (0, 0) and plain.epochs_backbone > 0
