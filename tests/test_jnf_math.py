"""JNF's densities, losses, flow and sampler against closed forms and torch.distributions."""
import argparse
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Laplace, Normal

import jnf


def identity(z):
    return z, z.new_zeros(len(z))


def random_maf(z_dim=5, n_blocks=2, hidden=16):
    torch.manual_seed(0)
    flow = jnf.MAF(z_dim, n_blocks, n_hidden=2, hidden=hidden).double()
    for p in flow.blocks.parameters():                # far from the identity
        torch.nn.init.normal_(p, std=0.4)
    return flow


# ---- Flow ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("z_dim", [1, 2, 5])
def test_maf_inverse_and_jacobian(z_dim):
    flow = random_maf(z_dim)
    z = torch.randn(7, z_dim, dtype=torch.float64)
    u, log_det = flow(z)
    assert torch.allclose(flow.inverse(u), z, atol=1e-9)
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(lambda a: flow(a[None])[0][0], z[i])
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det[i], atol=1e-9)


def test_made_is_strictly_triangular_and_uses_every_input():
    layers = random_maf(6, 1).weights()[0]
    z = torch.randn(6, dtype=torch.float64)
    for output in (0, 1):
        jacobian = torch.autograd.functional.jacobian(
            lambda a: jnf.made(a[None], layers)[output][0], z)
        assert jacobian.triu().abs().max() == 0
        assert (jacobian.tril(-1).abs().sum(0)[:-1] > 0).all()      # all but the last are used


def test_every_flow_parameter_gets_a_gradient_and_zero_blocks_is_the_identity():
    flow = random_maf()
    u, log_det = flow(torch.randn(9, 5, dtype=torch.float64))
    (u.square().sum() - log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.blocks.parameters())
    z = torch.randn(3, 4)
    u, log_det = jnf.MAF(4, 0)(z)
    assert torch.equal(u, z) and (log_det == 0).all() and torch.equal(jnf.MAF(4, 0).inverse(z), z)


def test_flow_density_integrates_to_one():
    flow = random_maf(2, 2)
    axis = torch.linspace(-40, 40, 1601, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    mu, log_var = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([[-0.5, 0.2]]).double()
    with torch.no_grad():
        mass = jnf.log_poe(z, [(mu, log_var, flow)]).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(mass - 1) < 0.01


# ---- Densities and losses ------------------------------------------------------------------------
def test_log_densities_match_torch_distributions():
    z, mu, log_var = torch.randn(3, 4, 6)
    expected = Independent(Normal(mu, (0.5 * log_var).exp()), 1).log_prob(z)
    assert torch.allclose(jnf.log_normal(z, mu, log_var), expected, atol=1e-5)
    x, mean = torch.rand(2, 3, 2, 5, 5)
    for dist, torch_dist in (("laplace", Laplace), ("normal", Normal)):
        expected = Independent(torch_dist(mean, 0.75), 3).log_prob(x)
        assert torch.allclose(jnf.log_lik(x, mean, dist, 0.75), expected, atol=1e-4)


@pytest.mark.parametrize("n_experts", [1, 2, 3])
def test_poe_of_gaussians_has_the_prior_exponent_s_minus_1(n_experts):
    torch.manual_seed(1)
    mu, log_var = torch.randn(n_experts, 1, 4), -torch.rand(n_experts, 1, 4) - 0.5
    experts = [(m, v, identity) for m, v in zip(mu, log_var)]
    precision = (-log_var).exp().sum(0) - (n_experts - 1)
    mean = ((-log_var).exp() * mu).sum(0) / precision
    z = torch.randn(50, 4)
    ratio = jnf.log_poe(z, experts) - jnf.log_normal(z, mean, -precision.log())
    assert (ratio - ratio[0]).abs().max() < 1e-3                    # equal up to the constant
    official = jnf.log_poe(z, experts, prior_power=1)
    expected = sum(jnf.log_normal(z, m, v) for m, v, _ in experts) - jnf.log_normal(z)
    assert torch.allclose(official, expected, atol=1e-4)


def test_stacked_experts_equal_the_plain_product():
    experts = [(torch.randn(7, 5).double(), torch.randn(7, 5).double(), random_maf())
               for _ in range(3)]
    for _, _, flow in experts[1:]:
        flow.blocks[0][0].weight.data.mul_(-1.3)
    z = torch.randn(7, 5).double().requires_grad_(True)
    mu, log_var, blocks = jnf.stack_experts(experts)
    flow = functools.partial(jnf.flow_pass, blocks=blocks)
    stacked, plain = jnf.log_poe(z, [(mu, log_var, flow)], 2), jnf.log_poe(z, experts)
    assert torch.allclose(stacked, plain, rtol=1e-9)
    grads = [torch.autograd.grad(p.sum(), z)[0] for p in (stacked, plain)]
    assert torch.allclose(*grads, rtol=1e-8)


def tiny(**changes):
    flags = [f"--{k}={v}" for k, v in changes.items() if not isinstance(v, bool)]
    flags += [f"--{'' if v else 'no-'}{k}" for k, v in changes.items() if isinstance(v, bool)]
    args = jnf.parse_args(["--z_dim", "4", "--flow_hidden", "8", *flags])
    torch.manual_seed(0)
    return jnf.JNF({"mnist": (1, 28, 28), "svhn": (3, 32, 32)}, args), args


def images(n=6):
    torch.manual_seed(3)
    return {"mnist": torch.rand(n, 1, 28, 28), "svhn": torch.rand(n, 3, 32, 32)}


def test_joint_loss_is_the_weighted_negative_elbo():
    model, args = tiny(beta=2.5)
    x = images()
    torch.manual_seed(5)
    terms = jnf.joint_loss(model, x, args)
    loss = terms["loss"]
    torch.manual_seed(5)
    mu, log_var = model.joint_encoder(x)
    q = Independent(Normal(mu, (0.5 * log_var).exp()), 1)
    z = q.rsample()
    kl = torch.distributions.kl_divergence(q, Independent(Normal(torch.zeros_like(mu), 1.0), 1))
    nll = {m: -Independent(Laplace(model.decoders[m](z), 0.75), 3).log_prob(x[m]).mean() for m in x}
    expected = 3072 / 784 * nll["mnist"] + nll["svhn"] + 2.5 * kl.mean()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(terms["kl_joint_nats"], kl.mean(), rtol=1e-5)
    plain = jnf.joint_loss(model, x, tiny(beta=2.5, rescale=False)[1])["loss"]
    assert plain < loss


def test_flow_loss_is_kl_and_leaves_the_joint_part_alone():
    model, args = tiny(flow_blocks=0)
    x = images(400)
    terms = jnf.flow_loss(model, x, args)
    loss = terms["loss"]
    loss.backward()
    assert all(p.grad is None for p in model.joint_heads.parameters())
    assert all(p.grad is None for p in model.joint_trunk.parameters())
    assert all(p.grad is not None for p in model.posteriors.parameters())
    q = Independent(Normal(*((p if i == 0 else (0.5 * p).exp())
                             for i, p in enumerate(model.joint_encoder(x)))), 1)
    for m in x:                                       # Gaussian posteriors: the KL is known
        mu, log_var = model.posteriors[m]["encoder"](x[m])
        exact = torch.distributions.kl_divergence(
            q, Independent(Normal(mu, (0.5 * log_var).exp()), 1)).mean()
        assert torch.allclose(terms[f"kl_{m}_nats"], exact, rtol=0.15, atol=5e-3)


def test_contrastive_loss_is_a_cross_entropy_over_all_other_rows():
    torch.manual_seed(0)
    codes = [F.normalize(torch.randn(5, 3), dim=1) for _ in range(3)]
    expected = 0.0
    for i in range(3):
        for j in range(i + 1, 3):
            rows = torch.cat([codes[i], codes[j]])
            for r in range(10):
                similarity = (rows[r] * rows).sum(1) / 0.2
                others = [k for k in range(10) if k != r]
                expected += (similarity[others].exp().sum().log() - similarity[(r + 5) % 10]) / 10
    assert torch.allclose(jnf.contrastive_loss(codes, 0.2), expected, rtol=1e-5)


def test_dcca_counts_correlated_directions():
    torch.manual_seed(0)
    common, noise = torch.randn(4000, 2), torch.randn(2, 4000, 2)
    mix = [torch.linalg.qr(torch.randn(4, 4))[0] for _ in range(2)]
    size = torch.tensor([1, 2, 3, 1.0])
    a, b = (torch.cat([common, n], 1) * size @ m for n, m in zip(noise, mix))
    assert abs(jnf.dcca_loss([a, b]) + 2) < 0.12      # two shared directions; the ridge adds a bit
    assert abs(jnf.dcca_loss([a, b], ridge=1e-8) + 2) < 0.06
    assert jnf.dcca_loss([a, b, a]) < jnf.dcca_loss([a, b]) - 2      # pairs are summed


def test_svhn_decoders_have_the_size_of_the_authors_file():
    args = jnf.parse_args([])
    model = jnf.JNF({"mnist": (1, 28, 28), "svhn": (3, 32, 32)}, args)
    assert sum(p.numel() for p in model.decoders.parameters()) == 529_347


# ---- Sampler -------------------------------------------------------------------------------------
def gaussian(mean, chol):
    inverse = torch.cholesky_inverse(chol)
    return lambda z: -0.5 * torch.einsum("bi,ij,bj->b", z - mean, inverse, z - mean)


def test_hmc_mean_and_covariance_on_a_correlated_gaussian():
    torch.manual_seed(0)
    chol = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-0.3, 0.4, 2.0]])
    mean = torch.tensor([1.0, -2.0, 0.5])
    start = 3 * torch.randn(5000, 3)
    kept = start.clone()
    z, accept = jnf.hmc(gaussian(mean, chol), start, 20, 0.4, 5, n_adapt=30, jitter=0.2)
    assert torch.equal(start, kept) and not z.requires_grad
    assert 0.7 < accept < 0.95
    assert ((z.mean(0) - mean) / chol.norm(dim=1)).abs().max() < 5 / math.sqrt(5000)
    assert (z.T.cov() - chol @ chol.T).abs().max() < 0.5


@pytest.mark.parametrize("n_experts", [2, 3])
def test_hmc_samples_the_exact_product_of_gaussian_experts(n_experts):
    torch.manual_seed(2)
    b, d = 10_000, 3
    mu = torch.randn(n_experts, 1, d).expand(-1, b, -1)
    var = torch.rand(n_experts, 1, d).expand(-1, b, -1) * 0.5 + 0.1
    experts = [(m, v.log(), identity) for m, v in zip(mu, var)]
    z, accept = jnf.hmc(lambda z: jnf.log_poe(z, experts), torch.randn(b, d), 15, 0.3, 4,
                        n_adapt=25, jitter=0.2)
    precision = (1 / var[:, 0]).sum(0) - (n_experts - 1)
    mean = (mu[:, 0] / var[:, 0]).sum(0) / precision
    sd = precision.rsqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 5 / math.sqrt(b)
    assert (z.var(0) * precision - 1).abs().max() < 6 * math.sqrt(2 / b)
    assert accept > 0.6


def test_hmc_conserves_energy_to_second_order_and_accepts_small_steps():
    """The error of H falls 4 times when the step is halved over the same path."""
    torch.manual_seed(0)
    z = torch.randn(4000, 2)
    quartic = lambda z: -(z**4).sum(1) / 4                           # noqa: E731
    loss = []
    for step_size, n in ((0.2, 5), (0.1, 10), (0.05, 20)):
        torch.manual_seed(1)
        _, accept = jnf.hmc(quartic, z, 1, step_size, n)
        loss.append(1 - accept)
    assert 2.8 < loss[0] / loss[1] < 5.5 and 2.8 < loss[1] / loss[2] < 5.5
    assert loss[2] < 0.01


def test_hmc_rejects_proposals_that_are_not_finite():
    def half_line(z):                                                # nan for z > 1
        return torch.where(z[:, 0] > 1, torch.nan, -0.5 * (z**2).sum(1))
    z, accept = jnf.hmc(half_line, torch.zeros(5000, 1), 30, 0.7, 3)
    assert z.isfinite().all() and z.max() <= 1 and 0 < accept < 1
    # mean of a standard normal cut off above 1
    expected = -math.exp(-0.5) / math.sqrt(2 * math.pi) / 0.8413
    assert abs(z.mean() - expected) < 0.06
    with pytest.raises(FloatingPointError):
        jnf.hmc(half_line, torch.full((3, 1), 2.0), 1, 0.1, 1)


def test_hmc_chains_do_not_interact():
    """A chain's target and step size do not depend on its neighbours."""
    def shifted(offset):
        return lambda z: -0.5 * ((z - offset) ** 2).sum(1)
    start, far = torch.zeros(64, 2), torch.zeros(64, 1)
    far[1:] = 1e3                                                    # bad targets for all but row 0
    torch.manual_seed(0)
    alone, _ = jnf.hmc(shifted(0.0), start, 5, 0.3, 3, n_adapt=10, jitter=0.2)
    torch.manual_seed(0)
    among, _ = jnf.hmc(shifted(far), start, 5, 0.3, 3, n_adapt=10, jitter=0.2)
    assert torch.equal(alone[0], among[0]) and not torch.equal(alone[1], among[1])


def test_product_scale_is_the_gaussian_product_or_the_priors_if_improper():
    torch.manual_seed(0)
    sd = torch.tensor([[0.5, 0.8], [0.3, 0.9]])
    draws = torch.randn(2, 20_000, 3, 2) * sd[:, None, None]
    scale = jnf.product_scale(draws, 1)
    expected = ((1 / sd**2).sum(0) - 1).rsqrt()
    assert torch.allclose(scale, expected.expand(3, 2), rtol=0.03)
    assert (jnf.product_scale(4 * torch.randn(3, 1000, 5, 2), 2) == 1).all()


def test_any_subset_is_sampled_and_flags_of_the_official_run_are_the_official_run():
    model, args = tiny(hmc_steps=2, hmc_adapt=2)
    model.requires_grad_(False)
    x = images(3)
    for subset in (["mnist"], ["svhn"], ["mnist", "svhn"]):
        z = jnf.sample_posterior(model, {m: x[m] for m in subset}, args)
        assert z.shape == (3, 4) and z.isfinite().all()
    stats = {}
    jnf.sample_posterior(model, x, args, stats, product=True)
    assert 0 <= stats["accept_rate"][0] <= 1
    official = jnf.parse_args(["--sampler", "official", "--n_leapfrog", "7"])
    assert (official.hmc_steps, official.hmc_adapt, official.hmc_step_size) == (100, 0, 0.01)
    assert official.n_leapfrog == 7 and official.prior_exponent == "official"


def test_linear_gaussian_posteriors_are_recovered():
    """x_j = a_j z + noise with known joint posterior: stage U's optimum is the exact p(z|x_j)."""
    torch.manual_seed(0)
    n, a, s2 = 5000, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0])
    z = torch.randn(n, 1)
    x = z * a + s2.sqrt() * torch.randn(n, 2)                        # column j: modality j
    precision = 1 + (a**2 / s2).sum()
    joint_mu, joint_var = (x * a / s2).sum(1, keepdim=True) / precision, 1 / precision

    class Toy(torch.nn.Module):
        shared, modalities = "none", ["p", "q"]

        def __init__(self):
            super().__init__()
            self.posteriors = torch.nn.ModuleDict({m: torch.nn.ModuleDict({
                "encoder": jnf.GaussianHead(1, 1, "exp"), "flow": jnf.MAF(1, 0)}) for m in "pq"})

        def joint_encoder(self, x):
            return x["mu"], torch.full_like(x["mu"], math.log(joint_var))
        code = jnf.JNF.code

    model, batch = Toy(), {"p": x[:, :1], "q": x[:, 1:], "mu": joint_mu}
    opt = torch.optim.Adam(model.parameters(), 0.05)
    args, first = argparse.Namespace(amp=False), None
    for _ in range(200):
        terms = jnf.train_step(model, batch, jnf.flow_loss, opt, args)
        first = first or terms
    for j, m in enumerate("pq"):
        var = 1 / (1 + a[j] ** 2 / s2[j])
        head = model.posteriors[m]["encoder"]
        assert abs(head.mu.weight.item() - var * a[j] / s2[j]) < 0.03
        assert abs(head.s(batch[m]).mean().exp() - var) < 0.03
        assert terms[f"kl_{m}_nats"] < first[f"kl_{m}_nats"]


def test_chains_stay_where_the_prior_has_its_mass():
    """Experts wider than the prior: the product grows with |z|, unbounded chains run away."""
    model, args = tiny(flow_blocks=0, hmc_adapt=30, hmc_steps=60)
    for q in model.posteriors.values():
        torch.nn.init.constant_(q["encoder"][1].s.bias, 3.0)
    x = images(20)
    limit = args.z_dim**0.5 + 3
    args.bound = 3.0
    inside = jnf.sample_posterior(model, x, args, product=True).norm(dim=1)
    args.bound = 0.0
    outside = jnf.sample_posterior(model, x, args, product=True).norm(dim=1)
    assert inside.max() < limit < 2 * limit < outside.median()


def fixed_posteriors(n, *flags):
    """A model of n modalities whose experts are N(T_j(z); mu_j, var_j), whatever the image."""
    args = jnf.parse_args(["--z_dim", "3", "--flow_hidden", "8", "--hmc_steps", "15",
                           "--hmc_adapt", "25", *flags])
    torch.manual_seed(0)
    model = jnf.JNF({f"m{i}": (1, 4, 4) for i in range(n)}, args).requires_grad_(False)
    mu, var = torch.randn(n, 3), 0.1 + 0.5 * torch.rand(n, 3)

    def fix(head, a, v):
        for layer, value in ((head.mu, a), (head.s, v.log())):
            layer.weight.data.zero_()
            layer.bias.data.copy_(value)
    for q, a, v in zip(model.posteriors.values(), mu, var):
        fix(q["encoder"][1], a, v)
        for p in q["flow"].parameters():
            torch.nn.init.normal_(p, std=0.3)
    fix(model.joint_trunk[1], mu.mean(0), var.mean(0))
    return model, args, mu, var


def given(n, b=3000):
    return {f"m{i}": torch.zeros(b, 1, 4, 4) for i in range(n)}


def assert_normal(z, mu, var):
    """Draws [b d] have this mean and variance within five standard errors."""
    assert ((z.mean(0) - mu).abs() < 5 * (var / len(z)).sqrt()).all()
    assert (z.var(0) / var - 1).abs().max() < 5 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("s", [1, 2, 3])
def test_sample_posterior_draws_from_the_product_of_gaussian_experts(s):
    model, args, mu, var = fixed_posteriors(4, "--flow_blocks", "0")
    precision = (1 / var[:s]).sum(0) - (s - 1)                              # p(z)^(1-|S|)
    z = jnf.sample_posterior(model, given(s), args)
    assert_normal(z, (mu[:s] / var[:s]).sum(0) / precision, 1 / precision)


def test_sample_posterior_given_one_or_all_modalities():
    model, args, mu, var = fixed_posteriors(2)
    u, _ = model.posteriors["m1"]["flow"](jnf.sample_posterior(model, {"m1": given(2)["m1"]}, args))
    assert_normal(u, mu[1], var[1])                                         # one: T(z) is normal
    assert_normal(jnf.sample_posterior(model, given(2), args), mu.mean(0), var.mean(0))


@pytest.mark.parametrize("sampler", ["adaptive", "official"])
def test_chains_start_through_the_inverse_flow_but_for_the_official_sampler(sampler, monkeypatch):
    model, args, mu, var = fixed_posteriors(2, "--sampler", sampler, "--bound", "0")
    monkeypatch.setattr(jnf, "hmc", lambda log_p, start, *_, **__: (start, 1.0))
    torch.manual_seed(0)
    start = jnf.sample_posterior(model, given(2), args, product=True)
    torch.manual_seed(0)                                                    # the same draws of u
    k = 1 if sampler == "official" else 16
    draws = [m + v.sqrt() * torch.randn(k, 3000, 3)[0] for m, v in zip(mu, var)]
    if sampler == "adaptive":
        draws = [q["flow"].inverse(u) for q, u in zip(model.posteriors.values(), draws)]
    own = torch.stack([torch.isclose(start, u, atol=1e-4).all(1) for u in draws])
    assert (own.sum(0) == 1).float().mean() > 0.99 and (own.float().mean(1) > 0.4).all()


@pytest.mark.parametrize("flags", [("--flow_blocks", "0"), ("--flow_blocks", "2"),
                                   ("--sampler", "official", "--hmc_steps", "5")])
def test_compiled_path_of_the_product_takes_the_same_steps(flags, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)                 # traced, not compiled
    jnf.compiled_gradient.cache_clear()
    ends = []
    for more in ((), ("--compile",)):
        model, args, *_ = fixed_posteriors(3, *flags, *more)
        torch.manual_seed(1)
        ends.append(jnf.sample_posterior(model, given(3, 50), args, product=True))
    jnf.compiled_gradient.cache_clear()
    assert torch.equal(*ends)


def test_hidden_layers_of_the_shared_projector_are_layers_of_their_own():
    sizes = []
    for n in (1, 2, 3):
        model = jnf.JNF({"a": (1, 4, 4), "b": (1, 4, 4)}, jnf.parse_args(
            ["--shared", "contrastive", "--shared_layers", str(n)]))
        sizes.append(sum(p.numel() for p in model.projectors.parameters()))
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 512 * 513
