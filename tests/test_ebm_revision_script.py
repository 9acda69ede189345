"""ebm_revision.py end to end: files, resume, rollback, ranks, bad input."""
import math
import sys

import pytest
import torch

import common
import data
import ebm_revision
from whole_runs import (ROOT, assert_same_run, kill_and_resume, lines, two_processes,
                        untrained_judges, write_pairs)

TINY = ["--z_dim", "2", "--width", "4", "--x_steps", "2", "--x_steps_test", "4", "--z_steps", "2",
        "--cond_z_steps", "2", "--batch_size", "32", "--epochs", "4", "--warmup", "1",
        "--mixed", "1", "--log_every", "1", "--eval_batch", "64", "--n_eval", "30"]


@pytest.fixture
def paired(tmp_path, monkeypatch):
    """A folder with unlabelled pairs, so that no judge is trained: 100 train, 20 test."""
    monkeypatch.setattr(common, "load_inception", lambda *_: None)
    return write_pairs(tmp_path, 100, 20)


def flags(folder, *more):
    return ["--dataset", "paired", "--data_dir", str(folder), "--out_dir", str(folder / "runs"),
            *TINY, *more]


@pytest.mark.pictures
def test_a_run_leaves_all_files_and_eval_only_repeats_it(paired, monkeypatch):
    metrics = ebm_revision.main(flags(paired))
    run_dir = paired / "runs/ebm_revision/paired/0"
    for name in ("config.json", "source.py", "metrics.jsonl", "checkpoint.pt", "samples.png",
                 "cross.png", "curves.png", "diagnostics.png", "result.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert {row["stage"] for row in lines(run_dir)} == {"warmup", "full", "mixed"}
    assert {"displacement_a", "energy_initial", "energy_revised", "f_prefers_matched",
            "ess_per_step", "recon_nats_q", "recon_nats_revised"} <= set(metrics)
    monkeypatch.setattr(common, "_save_rows", lambda *_, **__: None)
    again = ebm_revision.main(flags(paired, "--eval_only"))
    assert again == pytest.approx(metrics, nan_ok=True)


def test_labelled_run_has_every_figure_twice(paired, monkeypatch):
    monkeypatch.setattr(common, "load_judges", untrained_judges)
    metrics = ebm_revision.main(["--data_dir", str(paired), "--out_dir", str(paired / "runs"),
                                 "--n_train", "80", "--n_test", "24", "--n_eval", "24", *TINY])
    assert {"coherence_joint", "coherence_joint_initial", "coherence_joint_noise",
            "coherence_cross_1", "coherence_cross_1_initial", "classes_joint",
            "classes_joint_initial", "classes_joint_noise", "latent_accuracy_q",
            "latent_accuracy_revised", "frechet_clf_svhn_initial"} <= set(metrics)


def test_text_and_images_end_to_end(paired, monkeypatch):
    def load(name, split, *_, **__):
        n = 40 if split == "train" else 16
        x = {"image": torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8),
             "caption": torch.randint(11, (n, 32))}
        return data.Dataset(x, None, {"image": "image", "caption": "text"}, name, split,
                            words=tuple("abcdefghijk"))
    monkeypatch.setattr(data, "load", load)
    ebm_revision.main(["--dataset", "cub", "--out_dir", str(paired / "runs"), *TINY])
    folder = paired / "runs/ebm_revision/cub/0"
    assert (folder / "result.json").exists()
    captions = (folder / "captions.txt").read_text().splitlines()          # of 8 test images
    assert [len(line.split()) for line in captions] == [32] * 8


def test_killed_in_all_stages_and_resumed_equals_the_uninterrupted_run(paired):
    command = ["ebm_revision.py", *flags(paired, "--ema", "0.5", "--w_dim", "1", "--ckpt_minutes",
                                         "0")]
    run_dir, whole_dir = (paired / name / "ebm_revision/paired/0" for name in ("runs", "whole"))
    kill_and_resume(command, run_dir, {"warmup": 2, "full": 5, "mixed": 7})
    ebm_revision.main([*command[1:], "--out_dir", str(paired / "whole")])
    assert_same_run(run_dir, whole_dir)


@pytest.mark.parametrize("key, value", [("gap", math.nan), ("loss_enc", math.inf),
                                        ("loss_enc", 1e9), ("loss_gen", -1e9)])
def test_divergence_rolls_back_halves_the_rate_and_stops_after_three(paired, monkeypatch, key,
                                                                     value):
    plain, calls = ebm_revision.train_step, []

    def step(model, x, opts, args, phase):
        metrics = plain(model, x, opts, args, phase)
        calls.append(opts["ebm"].param_groups[0]["lr"])
        if len(calls) in broken:
            metrics[key] = torch.tensor(value)
        return metrics
    monkeypatch.setattr(ebm_revision, "train_step", step)
    broken = {5}
    ebm_revision.main(flags(paired, "--gamma", "1", "--lr_mixed", "5e-4"))
    events = [row for row in lines(paired / "runs/ebm_revision/paired/0") if "event" in row]
    assert len(events) == 1 and calls[-1] == calls[0] / 2
    broken, calls[:] = set(range(1000)), []
    with pytest.raises(FloatingPointError, match="3 rollbacks"):
        ebm_revision.main(flags(paired, "--overwrite"))


def test_two_processes(paired):
    two_processes("ebm_revision.py", *flags(paired))
    assert len(lines(paired / "runs/ebm_revision/paired/0")) == 4 * (100 * 9 // 10 // 32)


def test_ablation_prints_every_variant_and_goes_on_where_it_broke_off(paired, capsys, monkeypatch):
    sys.path.insert(0, str(ROOT / "results"))
    import ablation
    monkeypatch.setattr(ablation, "VARIANTS", {k: ablation.VARIANTS[k] for k in (
        "both from noise", "staged", "k_x 0", "mixture NLL")})
    table = ablation.main(flags(paired, "--epochs", "2"))
    out = capsys.readouterr().out
    assert all(f"\n{name}" in out for name in (ablation.WARMUP, *ablation.VARIANTS))
    root = paired / "runs/ablation/paired"
    assert len(lines(root / "both_from_noise/ebm_revision/paired/0")) == 2    # after the warm-up
    run = root / "staged/ebm_revision/paired/0"
    (run / "result.json").unlink()                              # as if it had broken off there
    assert ablation.main(flags(paired, "--epochs", "2")) == table
    assert capsys.readouterr().out.count("all metrics are in") == 1
    assert (run / "result.json").exists() and (root / "0.json").exists()
    with pytest.raises(common.RunError, match="--epochs"):
        ablation.main(flags(paired, "--epochs", "3", "--variants", "staged"))
    with pytest.raises(common.RunError, match="--eval_batch"):
        ablation.main(flags(paired, "--epochs", "2", "--eval_batch", "7", "--variants", "staged"))


@pytest.mark.parametrize("name", ["x from noise", "additive"])
def test_a_variant_that_shares_the_warmup_is_the_run_of_its_flags(paired, name):
    sys.path.insert(0, str(ROOT / "results"))
    import ablation
    ablation.main(flags(paired, "--variants", name))
    ebm_revision.main(flags(paired, *ablation.VARIANTS[name]))
    ends = [torch.load(folder / "ebm_revision/paired/0/checkpoint.pt", weights_only=True) for folder
            in (paired / "runs/ablation/paired" / name.replace(" ", "_"), paired / "runs")]
    first, second = ([*end["state"]["model"].values(), end["rng"]["torch"]] for end in ends)
    assert all(map(torch.equal, first, second)) and len(first) == len(second)


@pytest.mark.parametrize("arguments, words", [
    (["--sigma", "0"], "--sigma"), (["--x_steps", "-1"], "--x_steps"),
    (["--z_init", "all"], "--z_init"), (["--epochs", "5"], "--warmup"),
    (["--staged", "--warmup", "0"], "--staged"), (["--batch_size", "1"], "--mixed"),
    (["--lr_ebm", "nan"], "--lr_ebm"), (["--epoch", "3"], "--epoch"),
    (["--width", "0"], "--width"), (["--w_dim", "-1"], "--w_dim"), (["--ema", "1.5"], "--ema")])
def test_bad_flags_are_refused_before_any_work(arguments, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        ebm_revision.main([*arguments, "--out_dir", str(tmp_path)])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unfinished_training_is_not_evaluated(paired, break_off):
    break_off(ebm_revision)
    with pytest.raises(OSError):
        ebm_revision.main(flags(paired, "--ckpt_minutes", "0"))
    with pytest.raises(common.RunError, match="not finished"):
        ebm_revision.main(flags(paired, "--eval_only"))


@pytest.mark.parametrize("phase, chains", [("full", 2), ("ebm", 1), ("mixed", 1)])
def test_the_chain_is_run_again_only_where_a_net_has_moved(phase, chains, monkeypatch):
    args = ebm_revision.parse_args(["--rerun_chain", "--width", "4", "--x_steps", "1"])
    model = ebm_revision.Revision({"a": (1, 4, 4), "b": (1, 4, 4)}, args)
    revise, calls = ebm_revision.revise_x, []
    monkeypatch.setattr(ebm_revision, "revise_x", lambda *a: calls.append(1) or revise(*a))
    x = {m: torch.rand(6, 1, 4, 4) for m in "ab"}
    ebm_revision.train_step(model, x, ebm_revision.make_optimizers(model, args, 1), args, phase)
    assert len(calls) == chains


def test_early_fusion_needs_images_of_one_size(tmp_path):
    with pytest.raises(common.RunError, match="--fusion early"):
        ebm_revision.main(["--fusion", "early", "--n_train", "40", "--n_test", "8", "--data_dir",
                           str(tmp_path), "--out_dir", str(tmp_path / "runs")])
