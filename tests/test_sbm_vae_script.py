"""sbm_vae.py end to end through its command line: files, resume, ranks, bad input."""
import sys

import pytest
import torch

import common
import data
import sbm_vae
from whole_runs import assert_same_run, kill_and_resume, lines, two_processes, untrained_judges

TINY = ["--z_dim", "4", "--width", "16", "--blocks", "1", "--batch_size", "32", "--epochs_ae", "3",
        "--epochs_score", "3", "--n_steps", "5", "--log_every", "1", "--eval_batch", "64",
        "--curve", "4", "--n_curve", "8", "--n_eval", "32"]


def flags(folder, *more):
    return ["--dataset", "paired", "--data_dir", str(folder), "--out_dir", str(folder / "runs"),
            *TINY, *more]


# ---- Whole runs ----------------------------------------------------------------------------------
@pytest.mark.pictures
def test_four_modalities_with_judges_all_files_all_metrics_and_eval_only(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_judges", untrained_judges)
    monkeypatch.setattr(common, "load_inception", lambda *_: None)
    arguments = ["--n_train", "120", "--n_test", "24", "--data_dir", str(tmp_path), "--out_dir",
                 str(tmp_path / "runs"), *TINY, "--epochs_energy", "1", "--guide_sweep", "0", "1"]
    metrics = sbm_vae.main(arguments)
    run_dir = tmp_path / "runs/sbm_vae/synth_polymnist/0"
    for name in ("config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "samples.png",
                 "cross.png", "curves.png", "result.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert {"coherence_joint", "coherence_joint_independent", "coherence_joint_reconstructed",
            "coherence_m0+m1+m2_to_m3", "coherence_cross_1", "coherence_cross_3", "precision",
            "recall", "agree_anchored_4", "agree_majority_2", "frechet_clf", "frechet_clf_cross_2",
            "coherence_cross_3_guided_1"} <= set(metrics)
    assert {"frechet_clf_by_calls_ode_4", "coherence_joint_by_calls_pc_4"} <= set(metrics)
    each = [metrics[f"frechet_clf_m{j}"] for j in range(4)]
    assert metrics["frechet_clf"] == pytest.approx(sum(each) / 4)
    assert list(dict.fromkeys(r["stage"] for r in lines(run_dir))) == ["ae", "score", "energy",
                                                                      "ode", "pc"]
    again = sbm_vae.main([*arguments, "--eval_only"])
    assert again == pytest.approx(metrics, nan_ok=True)             # the checkpoint is enough
    other = sbm_vae.main([*arguments, "--eval_only", "--sampler", "pc", "--obs_noise", "fresh",
                          "--guide_weight", "1", "--n_steps", "10"])
    assert other["coherence_joint_reconstructed"] == metrics["coherence_joint_reconstructed"]


def test_the_papers_setting_runs_at_small_size(paired):
    metrics = sbm_vae.main(flags(paired, "--preset", "paper", "--z_dim", "64", "--dim", "8",
                                 "--ae_net", "patch", "--autoencoder", "rae", "--epochs_energy",
                                 "1", "--guide_weight", "0.5"))
    state = torch.load(paired / "runs/sbm_vae/paired/0/checkpoint.pt", weights_only=True)["state"]
    assert metrics.keys() == {"loss_ae", "loss_score", "recon_a", "recon_b"}   # without labels
    assert metrics["loss_ae"] >= metrics["recon_a"] + metrics["recon_b"]
    assert (state["model"]["mean"] == 0).all() and (state["model"]["std"] == 1).all()


def test_faces_masks_and_attributes_have_f1_scores(tmp_path, monkeypatch):
    """The modalities of celebamask_hq, small: three shapes, one of them not an image."""
    def load(name, split, *_, **__):
        torch.manual_seed(len(split))
        x = {"image": torch.randint(256, (60, 3, 16, 16)),
             "mask": torch.randint(256, (60, 1, 16, 16)),
             "attributes": torch.randint(2, (60, 18))}
        x = {m: v.to(torch.uint8) for m, v in x.items()}
        kinds = {"image": "image", "mask": "image", "attributes": "binary"}
        return data.Dataset(x, None, kinds, name, split)
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(common, "load_inception", lambda *_: None)
    metrics = sbm_vae.main(["--dataset", "celebamask_hq", "--out_dir", str(tmp_path), *TINY,
                            "--ae_net", "patch", "--autoencoder", "rae", "--rae_lambda", "1e-4",
                            "1e-5", "1e-4"])
    for key in ("none_to_mask", "image_to_attributes", "image+mask_to_attributes",
                "attributes_to_mask"):
        assert 0 < metrics[f"f1_{key}"] <= 1, key
    assert (tmp_path / "sbm_vae/celebamask_hq/0/cross.png").exists()


def test_later_stages_leave_the_autoencoders_alone_and_run_no_encoder(paired, monkeypatch):
    calls, encode = [], sbm_vae.SBM.encode
    monkeypatch.setattr(sbm_vae.SBM, "encode", lambda *a: calls.append(0) or encode(*a))
    sbm_vae.main(flags(paired, "--epochs_score", "0"))
    few = len(calls)
    checkpoint = paired / "runs/sbm_vae/paired/0/checkpoint.pt"
    before = torch.load(checkpoint, weights_only=True)["state"]["model"]
    sbm_vae.main(flags(paired, "--epochs_score", "9", "--epochs_energy", "2", "--overwrite"))
    assert len(calls) == 2 * few                                    # however long stage score is
    after = torch.load(checkpoint, weights_only=True)["state"]["model"]
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"score_net"}


def test_latents_are_standardised_over_the_training_split(paired):
    sbm_vae.main(flags(paired, "--standardise", "dim"))
    args = sbm_vae.parse_args(flags(paired))
    train = data.load("paired", "train", paired)
    model = sbm_vae.SBM(train.shapes, args).eval()
    path = paired / "runs/sbm_vae/paired/0/checkpoint.pt"
    model.load_state_dict(torch.load(path, weights_only=True)["state"]["model"])
    z = sbm_vae.encode_all(model, train, args, "cpu").x["z"]
    assert z.mean(0).abs().max() < 1e-3 and (z.std(0) - 1).abs().max() < 1e-3


def test_ema_is_what_stage_score_hands_on(paired):
    weights = []
    for ema in ("0", "0.9"):
        sbm_vae.main(flags(paired, "--ema", ema, "--overwrite"))
        state = torch.load(paired / "runs/sbm_vae/paired/0/checkpoint.pt", weights_only=True)
        weights.append(state["state"]["model"]["score_net.trunk.0.weight"])
    assert not torch.equal(*weights)


def test_same_seed_same_numbers_other_seed_others(paired):
    out = []
    for seed in ("0", "0", "1"):
        sbm_vae.main(flags(paired, "--seed", seed, "--overwrite"))
        out.append(lines(paired / f"runs/sbm_vae/paired/{seed}"))
    assert out[0] == out[1] and out[0] != out[2]


# ---- Resume --------------------------------------------------------------------------------------
def test_killed_in_every_stage_and_resumed_equals_the_uninterrupted_run(paired):
    command = ["sbm_vae.py", *flags(paired, "--epochs_energy", "3", "--ckpt_minutes", "0")]
    run_dir, whole_dir = (paired / name / "sbm_vae/paired/0" for name in ("runs", "whole"))
    kill_and_resume(command, run_dir, {"ae": 7, "score": 7, "energy": 7})
    sbm_vae.main([*command[1:], "--out_dir", str(paired / "whole")])
    assert_same_run(run_dir, whole_dir)


def test_two_processes_train_as_one_at_the_same_global_batch(paired):
    noiseless = flags(paired, "--autoencoder", "rae", "--rae_sigma", "0")
    sbm_vae.main(noiseless)
    two_processes("sbm_vae.py", *noiseless, "--out_dir", str(paired / "two"))
    one, two = (lines(paired / f"{name}/sbm_vae/paired/0") for name in ("runs", "two"))
    assert len(one) == len(two)
    last = [[row["loss"] for row in rows if row["stage"] == "ae" and row["split"] == "val"][-1]
            for rows in (one, two)]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "mnits"], "--dataset"), (["--lr_ae", "-1"], "--lr_ae"),
    (["--beta_max", "nan"], "--beta_max"), (["--n_steps", "1"], "--n_steps"),
    (["--ema", "1"], "--ema"), (["--masked_share", "1.5"], "--masked_share"),
    (["--n_modalities", "1"], "--n_modalities"), (["--obs_noise", "none"], "--obs_noise"),
    (["--score_net", "unet"], "--z_dim"), (["--guide_weight", "1"], "--epochs_energy"),
    (["--guide_sweep", "0", "1"], "--epochs_energy"), (["--n_step", "3"], "--n_step")])
def test_bad_flags_are_refused_before_any_work(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        sbm_vae.main([*arguments, "--out_dir", str(tmp_path)])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more, words", [
    (["--ae_net", "resnet"], "--ae_net"), (["--vae_beta", "1", "1", "1"], "--vae_beta"),
    (["--resume"], "--resume"), (["--eval_only"], "checkpoint")])
def test_what_does_not_fit_is_one_line_and_exit_2(paired, more, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sbm_vae.py", *flags(paired, *more)])
    with pytest.raises(SystemExit) as stop:
        common.cli(sbm_vae.main)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and len(error.splitlines()) == 1


def test_a_flag_of_training_may_not_change_on_resume_but_a_sampler_may(paired):
    sbm_vae.main(flags(paired))
    with pytest.raises(common.RunError, match="--width"):
        sbm_vae.main(flags(paired, "--eval_only", "--width", "24"))
    sbm_vae.main(flags(paired, "--eval_only", "--sampler", "em", "--n_steps", "7"))
