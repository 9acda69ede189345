"""Metrics, judges, chain diagnostics and the mixture, against closed forms and brute force."""
import math
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import common


# ---- Fréchet distance ---------------------------------------------------------------------------
def test_frechet_of_diagonal_gaussians_is_exact():
    mu, std = torch.randn(2, 7).double(), torch.rand(2, 7).double() + 0.1
    exact = (mu[0] - mu[1]).square().sum() + (std[0] - std[1]).square().sum()
    got = common.frechet_distance(mu[0], std[0].square().diag(), mu[1], std[1].square().diag())
    assert got == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [2, 6])
def test_frechet_of_any_covariances_agrees_with_sqrtm(rank):
    a, b = np.random.default_rng(0).normal(size=(2, 6, rank))
    mu, c1, c2 = np.zeros(6), a @ a.T, b @ b.T
    root = scipy.linalg.sqrtm(c1 @ c2 + 0j).real               # complex by rounding if rank < 6
    got = common.frechet_distance(mu, c1, mu + 2, c2)
    assert got == pytest.approx(24 + np.trace(c1 + c2 - 2 * root), abs=1e-5)
    assert common.frechet_distance(mu, c1, mu, c1) == pytest.approx(0, abs=1e-6)
    assert got == pytest.approx(common.frechet_distance(mu, c2, mu + 2, c1), abs=1e-6)


def test_feature_stats_of_batches_do_not_cancel():
    x = 1e6 + np.random.default_rng(0).normal(size=(500, 3)) * [1, 2, 3]
    stats = common.FeatureStats()
    for part in np.split(x, [1, 7, 300]):
        stats.update(torch.tensor(part))
    mu, cov = stats.mean_cov()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.T), rtol=1e-6)


def test_precision_and_recall_of_points_on_a_line(monkeypatch):
    real = torch.arange(10.0)[:, None]                          # k = 3: inner balls reach 2, ends 3
    fake = torch.tensor([[0.5], [4.2], [-2.9], [-3.1], [12.1], [50.0]])
    got = common.precision_recall(real, fake, k=3)
    assert got["precision"] == pytest.approx(3 / 6)             # 0.5, 4.2 and -2.9
    assert common.precision_recall(fake, real, 3)["recall"] == got["precision"]
    near = torch.tensor([[2.0], [2.1], [2.2], [2.3]])           # k = 1: balls reach 0.1
    assert common.precision_recall(real, near, 1) == {"precision": 1.0, "recall": 0.1}
    big = torch.randn(2500, 8)                                  # several chunks
    same = common.precision_recall(big, big.flip(0))
    assert same == {"precision": 1.0, "recall": 1.0}
    assert common.precision_recall(big, big + 100) == {"precision": 0.0, "recall": 0.0}


def test_f1_is_the_mean_over_items():
    predicted = torch.tensor([[0.9, 0.6, 0.2, 0.5], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    target = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]])
    assert common.f1_score(predicted, target) == pytest.approx((2 / 4 + 1 + 0 + 0) / 4)
    shaped = (x.reshape(4, 1, 2, 2) for x in (predicted > 0.5, target.bool()))
    assert common.f1_score(*shaped) == pytest.approx(0.375)


# ---- Ranking ------------------------------------------------------------------------------------
def test_linear_accuracy_is_that_of_bayes_rule_on_two_gaussians():
    """N(-+mu, I) in 2 dimensions, one stretched and one squeezed: Phi(|mu|)."""
    torch.manual_seed(0)
    y, y_test = torch.arange(4000) % 2, torch.arange(20_000) % 2
    scale, mu = torch.tensor([30.0, 0.01]), torch.tensor([0.3, 0.8])
    z, z_test = ((torch.randn(len(c), 2) + (2.0 * c - 1)[:, None] * mu) * scale + 7
                 for c in (y, y_test))
    bayes = scipy.stats.norm.cdf(mu.norm().item())
    assert common.linear_accuracy(z, y, z_test, y_test) == pytest.approx(bayes, abs=0.012)


@pytest.mark.parametrize("levels", [3, 10**6])                  # many ties, none
def test_ranking_equals_brute_force(levels):
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(0, levels, 60) / 7, rng.integers(0, 2, 60)
    pairs = [(p > n) + (p == n) / 2 for p, n in product(scores[labels == 1], scores[labels == 0])]
    assert common.auroc(scores, labels) == pytest.approx(np.mean(pairs))
    expected, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        kept = labels[scores >= threshold]
        expected += (kept.sum() / labels.sum() - recall) * kept.mean()
        recall = kept.sum() / labels.sum()
    got = common.average_precision(torch.tensor(scores), torch.tensor(labels == 1))
    assert got == pytest.approx(expected)
    with pytest.raises(ValueError):
        common.auroc(scores, labels * 0)
    with pytest.raises(ValueError):
        common.average_precision(scores * math.nan, labels)


# ---- Chain diagnostics --------------------------------------------------------------------------
def ar1(rho, n=4000, c=8):
    x = torch.randn(n, c).double()
    for t in range(1, n):
        x[t] = rho * x[t - 1] + (1 - rho**2) ** 0.5 * x[t]
    return x


@pytest.mark.parametrize("rho", [0.9, 0.5, 0.0, -0.4])
def test_ess_and_autocorrelation_of_an_ar1_process(rho):
    x = ar1(rho)
    exact = torch.tensor([rho**k for k in range(5)]).double()
    torch.testing.assert_close(common.autocorrelation(x)[:5], exact, atol=0.03, rtol=0)
    assert common.ess(x) == pytest.approx(x.numel() * (1 - rho) / (1 + rho), rel=0.12)
    assert common.split_r_hat(x) == pytest.approx(1, abs=0.02)


def naive_ess(chains):
    """Stan's estimate, step by step, for a list of split chains."""
    n, c = len(chains[0]), len(chains)
    mean = [np.mean(x) for x in chains]
    cov = [[np.sum((x[:n - k] - m) * (x[k:] - m)) / n for x, m in zip(chains, mean)]
           for k in range(n)]
    within = np.mean(cov[0]) * n / (n - 1)
    total = within * (n - 1) / n + np.var(mean, ddof=1)
    rho = [1.0] + [1 - (within - np.mean(cov[k])) / total for k in range(1, n)]
    tau, previous, k = -1.0, math.inf, 0
    while k + 1 < n and rho[k] + rho[k + 1] > 0:
        previous = min(previous, rho[k] + rho[k + 1])
        tau += 2 * previous
        k += 2
    tau += max(rho[k], 0) if k + 1 < n else 0
    return n * c / max(tau, 1 / math.log10(n * c))


@pytest.mark.parametrize("rho, n", [(0.8, 60), (-0.6, 41), (0.0, 30)])
def test_diagnostics_equal_the_textbook_loops(rho, n):
    x = torch.stack([ar1(rho, n, 3) for _ in range(12)], -1)                    # [n 3 12]
    x[..., 0] += torch.arange(3)                                                # not mixed
    halves = np.concatenate([x[:n // 2], x[-(n // 2):]], axis=1)                # [n/2 6 12]
    for i in range(12):
        parts = list(halves[..., i].T)
        assert common.ess(x)[i].item() == pytest.approx(naive_ess(parts), rel=1e-9)
        assert common.ess(x[..., i]) == pytest.approx(naive_ess(parts), rel=1e-9)
        within = np.mean([np.var(p, ddof=1) for p in parts])
        between = np.var([np.mean(p) for p in parts], ddof=1)
        r_hat = math.sqrt(((n // 2 - 1) / (n // 2) * within + between) / within)
        assert common.split_r_hat(x)[i].item() == pytest.approx(r_hat, rel=1e-9)


def test_r_hat_flags_what_has_not_mixed():
    x = torch.randn(200, 4)
    assert common.split_r_hat(x + 10 * torch.arange(4)) > 5
    assert common.split_r_hat(x + torch.linspace(0, 5, 200)[:, None]) > 1.3      # drifts in step
    assert math.isnan(common.split_r_hat(x * 0)) and math.isnan(common.ess(x * 0))
    assert common.split_r_hat(x * 0 + torch.arange(4)) > 1e6                     # stuck
    with pytest.raises(ValueError, match="4 steps"):
        common.ess(x[:3])


def test_chain_report_sums_up_and_does_not_hide_chains_that_stick(tmp_path):
    x = torch.randn(200, 4, 20)
    found = common.chain_report(x, tmp_path / "a.png")
    assert found["r_hat"] == common.split_r_hat(x).median().item()
    assert found["r_hat_95"] == common.split_r_hat(x).quantile(0.95).item()
    assert found["ess_per_step"] == pytest.approx(common.ess(x).mean().item() / 800)
    assert found["autocorrelation_time"] == pytest.approx((800 / common.ess(x)).mean().item())
    x[..., :4] = torch.arange(4)[:, None]                       # a fifth of the coordinates
    found = common.chain_report(x, tmp_path / "a.png")
    assert found["r_hat"] < 1.1 and found["r_hat_95"] == 1e6 and (tmp_path / "a.png").exists()


# ---- Gaussian mixture ---------------------------------------------------------------------------
def test_mixture_is_recovered_and_its_density_is_right():
    true = torch.tensor([0.3, 0.7]), torch.tensor([[-3.0, 0.0], [3.0, 1.0]]), \
        torch.tensor([[[1.0, 0], [0.8, 0.5]], [[0.5, 0], [0, 1.5]]])
    z = common.sample_gmm(true, 20_000, torch.Generator().manual_seed(1))
    gmm = common.fit_gmm(z, 2, seed=3, n_iter=30)
    order = gmm[1][:, 0].argsort()
    weights, means, chol = (t[order].float() for t in gmm)
    torch.testing.assert_close(weights, true[0], atol=0.02, rtol=0)
    torch.testing.assert_close(means, true[1], atol=0.05, rtol=0)
    torch.testing.assert_close(chol @ chol.mT, true[2] @ true[2].mT, atol=0.07, rtol=0)
    density = sum(w.item() * scipy.stats.multivariate_normal(m, c @ c.T).pdf(z[:50])
                  for w, m, c in zip(*(t.double().numpy() if i else t for i, t in enumerate(gmm))))
    log_p = common._log_joint(gmm, z[:50]).logsumexp(1)
    np.testing.assert_allclose(log_p.exp(), density, rtol=1e-8)


def test_em_never_lowers_the_likelihood_and_survives_few_points():
    z = torch.cat([torch.randn(300, 5), torch.randn(300, 5) * 0.2 + 1])
    score = [common._log_joint(common.fit_gmm(z, 4, 0, n), z).logsumexp(1).mean()
             for n in (1, 2, 5, 20)]
    assert all(b > a for a, b in zip(score, score[1:]))
    draws = common.sample_gmm(common.fit_gmm(torch.randn(8, 20), 5), 10)
    assert draws.shape == (10, 20) and draws.isfinite().all()
