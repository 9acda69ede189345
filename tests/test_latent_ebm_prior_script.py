"""latent_ebm_prior.py end to end through its command line: files, resume, ranks, bad input."""
import json
import sys

import numpy as np
import pytest
import torch

import common
import data
import latent_ebm_prior as lep
from whole_runs import (assert_same_run, kill_and_resume, lines, metrics_of, two_processes,
                        untrained_judges)

TINY = ["--z_dim", "3", "--w_dim", "2", "--ebm_hidden", "8", "--prior_steps", "3", "--chains", "8",
        "--post_steps", "2", "--batch_size", "32", "--epochs_vae", "3", "--epochs_ebm", "2",
        "--log_every", "1", "--eval_batch", "64", "--prior_sweep", "0", "5", "--gmm", "2",
        "--width", "4", "--net", "mlp", "--n_eval", "40"]


def flags(folder, *more):
    return ["--dataset", "paired", "--data_dir", str(folder), "--out_dir", str(folder / "runs"),
            *TINY, *more]


def folder_of(folder, name="runs"):
    return folder / name / "latent_ebm_prior/paired/0"


# ---- Whole runs ----------------------------------------------------------------------------------
def polymnist(folder, monkeypatch, *more):
    """Arguments for three modalities in colour, 120 train, 24 test, with judges of no training."""
    monkeypatch.setattr(common, "load_judges", untrained_judges)
    monkeypatch.setattr(common, "load_inception", lambda *_: None)
    return ["--dataset", "synth_polymnist", "--n_train", "120", "--n_test", "24", "--data_dir",
            str(folder), "--out_dir", str(folder / "runs"), *TINY, *more]


def test_resnets_with_mcmc_and_the_ebm_on_all_latents(tmp_path, monkeypatch):
    metrics = lep.main(polymnist(tmp_path, monkeypatch, "--net", "resnet", "--inference", "mcmc",
                                 "--ebm_on", "u", "--max_steps", "2"))
    assert np.isfinite(metrics["gap"]) and 0 <= metrics["coherence_joint"] <= 1


@pytest.mark.pictures
def test_three_modalities_with_judges_controls_and_eval_only(tmp_path, monkeypatch):
    arguments = polymnist(tmp_path, monkeypatch, "--net", "patch", "--cross_steps", "2")
    metrics = lep.main(arguments)
    run_dir = tmp_path / "runs/latent_ebm_prior/synth_polymnist/0"
    for name in ("config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "samples.png",
                 "cross.png", "curves.png", "diagnostics.png", "result.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert {"coherence_joint", "coherence_joint_base", "coherence_cross_1", "accept_rate", "gap",
            "coherence_cross_1_base", "coherence_joint_gmm2", "coherence_joint_resampled",
            "coherence_joint_steps0", "coherence_joint_steps5", "coherence_cross_1_langevin2",
            "frechet_clf_m0", "frechet_clf_m0_base", "energy_long", "ess_per_step", "std_neg",
            "post_log_p_end_nats", "bound_base_nats", "classes_joint", "latent_accuracy_z",
            "latent_accuracy_w_m2", "classes_joint_base"} <= set(metrics)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["metrics"]["coherence_cross_2"] == metrics["coherence_cross_2"]
    monkeypatch.setattr(common, "_save_rows", lambda *_: None)
    assert lep.main([*arguments, "--eval_only"]) == pytest.approx(metrics, nan_ok=True)


def test_birds_and_captions_end_to_end(paired, monkeypatch):
    def load(name, split, *_, **__):
        n, rows = (40, torch.arange(80)) if split == "train" else (12, torch.arange(24))
        x = {"image": torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8),
             "caption": torch.randint(11, (2 * n, 32))}
        return data.Dataset(x, None, {"image": "image", "caption": "text"}, name, split,
                            rows={"image": rows // 2, "caption": rows}, words=tuple("abcdefghijk"))
    monkeypatch.setattr(data, "load", load)
    small = [*TINY, "--net", "auto", "--k", "2"]
    metrics = lep.main(["--dataset", "cub", "--out_dir", str(paired / "runs"), *small])
    folder = paired / "runs/latent_ebm_prior/cub/0"
    assert np.isfinite(metrics["bound_base_nats"])
    captions = (folder / "captions.txt").read_text().splitlines()          # of 8 test images
    assert [len(line.split()) for line in captions] == [32] * 8


@pytest.mark.parametrize("more", [
    ("--objective", "dreg", "--k", "3", "--no-private"), ("--objective", "iwae", "--k", "2"),
    ("--inference", "mcmc", "--phi", "teach", "--post_init", "noise"),
    ("--base", "gaussian", "--bound", "0", "--ebm_reg", "0.1"),
    ("--prior", "laplace", "--inference", "mcmc"), ("--amp", "--rescale")])
def test_every_variant_trains(paired, more):
    metrics = lep.main(flags(paired, "--epochs_vae", "8", "--lr", "0.005", *more))
    rows = [r["bound_nats"] for r in lines(folder_of(paired)) if r["stage"] == "vae"]
    assert np.mean(rows[-5:]) > np.mean(rows[:5]) and np.isfinite(metrics["bound_base_nats"])
    assert ("gap" in metrics) == ("laplace" not in more)


def test_second_stage_trains_the_ebm_alone(paired):
    lep.main(flags(paired, "--epochs_ebm", "0"))
    checkpoint = folder_of(paired) / "checkpoint.pt"
    before = torch.load(checkpoint, weights_only=True)["state"]["model"]
    lep.main(flags(paired, "--overwrite"))
    after = torch.load(checkpoint, weights_only=True)["state"]["model"]
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith("ebm.layers"), name


def test_second_stage_in_units_of_the_encoded_latents(paired, monkeypatch):
    """--whiten: mean |z| of draws of q for z, 1 for w; kept in the checkpoint, not made anew."""
    more = ("--epochs_vae", "3", "--ebm_warmup", "3", "--whiten", "--smooth", "0.2",
            "--ebm_on", "u")
    drawn, encoded = [], lep.encoded
    monkeypatch.setattr(lep, "encoded", lambda *a: drawn.append(encoded(*a)) or drawn[-1])
    metrics = lep.main(flags(paired, *more))
    kept = torch.load(folder_of(paired) / "checkpoint.pt", weights_only=True)["state"]["model"]
    assert torch.allclose(kept["ebm.unit"][:3], drawn[0][:, :3].abs().mean(0))
    assert torch.equal(kept["ebm.unit"][3:], torch.ones(4)) and np.isfinite(metrics["gap"])
    assert lep.main(flags(paired, *more, "--eval_only")) == pytest.approx(metrics, nan_ok=True)


def test_same_seed_same_numbers_other_seed_others(paired):
    out = [lep.main(flags(paired, "--seed", seed, "--overwrite")) for seed in ("0", "0", "1")]
    assert out[0] == pytest.approx(out[1], rel=0, abs=0, nan_ok=True) and out[0] != out[2]


def test_diverging_chains_roll_back_three_times_then_stop(paired, capsys, monkeypatch):
    seen, plain = [], lep.make_optimisers

    def remember(*args):
        seen.append(plain(*args)["ebm"])
        return {**plain(*args), "ebm": seen[-1]}
    monkeypatch.setattr(lep, "make_optimisers", remember)
    with pytest.raises(FloatingPointError, match="gap"):
        lep.main(flags(paired, "--max_gap", "1e-9", "--lr_ebm", "0.08"))
    events = [r for r in lines(folder_of(paired)) if r.get("event") == "rollback"]
    assert [e["count"] for e in events] == [1, 2, 3] and "gap" in events[0]["reason"]
    assert seen[0].param_groups[0]["lr"] == pytest.approx(0.08 / 8)


def test_one_rollback_cures_a_broken_step_and_the_run_ends(paired, monkeypatch):
    plain, count = lep.ebm_step, []

    def broken_once(model, *rest):
        count.append(1)
        metrics = plain(model, *rest)
        if len(count) == 4:
            torch.nn.init.constant_(model.ebm.layers[0].weight, float("nan"))
            return metrics | {"f_neg": torch.tensor(float("nan"))}
        return metrics
    monkeypatch.setattr(lep, "ebm_step", broken_once)
    metrics = lep.main(flags(paired))
    events = [r for r in lines(folder_of(paired)) if r.get("event") == "rollback"]
    assert len(events) == 1 and np.isfinite(metrics["gap"])
    assert json.loads((folder_of(paired) / "result.json").read_text())["rollbacks"] == 1


def seen_by_steps(monkeypatch, look):
    """A list that gets look(arguments) of every train_step from now on."""
    seen, plain = [], lep.train_step

    def remember(*arguments):
        seen.append(look(arguments))
        return plain(*arguments)
    monkeypatch.setattr(lep, "train_step", remember)
    return seen


def test_rates_decay_to_zero_along_a_stage(paired, monkeypatch):
    seen = seen_by_steps(monkeypatch, lambda arguments: [
        opt.param_groups[0]["lr"] for opt in arguments[2].values()])
    lep.main(flags(paired, "--decay", "--max_steps", "4", "--lr", "0.08", "--lr_ebm", "0.04"))
    assert seen == [pytest.approx([0.02 * i, 0.01 * i]) for i in (4, 3, 2, 1)]


def test_cross_warmup_anneals_over_its_epochs_of_the_first_stage(paired, monkeypatch):
    seen = seen_by_steps(monkeypatch, lambda arguments: arguments[-1])     # t
    lep.main(flags(paired, "--cross_warmup", "2", "--ebm_warmup", "2"))   # of 3, 5 steps each
    assert seen == pytest.approx([*(i / 10 for i in range(10)), 1, 1, 1, 1, 1])


# ---- Resume --------------------------------------------------------------------------------------
def test_killed_in_both_stages_and_resumed_equals_the_uninterrupted_run(paired):
    command = ["latent_ebm_prior.py", *flags(                          # 9: still in cross_warmup
        paired, "--ckpt_minutes", "0", "--inference", "mcmc", "--epochs_vae", "6", "--epochs_ebm",
        "6", "--cross_warmup", "3", "--ebm_warmup", "3", "--decoder_dist", "normal")]
    kill_and_resume(command, folder_of(paired), {"vae": 9, "ebm": 9})
    lep.main([*command[1:], "--out_dir", str(paired / "whole")])
    assert_same_run(folder_of(paired), folder_of(paired, "whole"))


def test_two_processes_train_as_one_at_the_same_global_batch(paired):
    options = flags(paired, "--epochs_vae", "12")
    single, two = lep.main(options), folder_of(paired, "two")
    two_processes("latent_ebm_prior.py", *options, "--out_dir", str(paired / "two"))
    assert metrics_of(two)["bound_base_nats"] == pytest.approx(single["bound_base_nats"], rel=0.1)
    assert len(lines(two)) == len(lines(folder_of(paired)))


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "mnits"], "--dataset"), (["--lr_ebm", "0"], "--lr_ebm"),
    (["--rho", "1.5"], "--rho"), (["--k", "0"], "--k"), (["--k", "2"], "--objective"),
    (["--objective", "dreg", "--ebm_on", "u"], "--ebm_on"), (["--bound", "-1"], "--bound"),
    (["--prior_step_size", "nan"], "--prior_step_size"), (["--base", "cauchy"], "--base"),
    (["--cross_warmup", "12"], "--cross_warmup"), (["--whiten", "--ebm_warmup", "2"], "--whiten"),
    (["--smooth", "0.2", "--ebm_warmup", "2"], "--smooth"),
    (["--cross_warmup", "2", "--ebm_warmup", "1"], "--ebm_warmup"), (["--rho", "0.2"], "--rho"),
    (["--prior", "laplace", "--smooth", "0.1"], "--prior ebm")])
def test_bad_flags_are_refused_before_any_work(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        lep.main([*arguments, "--out_dir", str(tmp_path)])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_before_f_learns_is_refused(paired):
    more = "--epochs_vae", "4", "--ebm_warmup", "3", "--epochs_ebm", "0", "--max_steps", "2"
    with pytest.raises(common.RunError, match="f would never train"):
        lep.main(flags(paired, *more))


def test_the_base_prior_needs_no_warmup_of_f_for_cross_warmup():
    assert lep.parse_args(["--prior", "laplace", "--cross_warmup", "2", "--ebm_warmup", "0"])


def test_nets_and_checkpoints_that_do_not_fit_are_one_line(paired, monkeypatch, capsys):
    def exit_of(arguments):
        monkeypatch.setattr(sys, "argv", ["latent_ebm_prior.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            common.cli(lep.main)
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and "Traceback" not in error
        return stop.value.code, error
    code, error = exit_of(flags(paired, "--net", "conv"))
    assert code == 2 and "--net mlp" in error
    lep.main(flags(paired, "--overwrite"))
    capsys.readouterr()
    code, error = exit_of(flags(paired, "--eval_only", "--z_dim", "4"))
    assert code == 2 and "--z_dim" in error
