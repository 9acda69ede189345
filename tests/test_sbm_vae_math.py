"""sbm_vae.py against closed forms: Gaussian latents have known scores, energies and posteriors."""
import math

import pytest
import torch
from einops import rearrange
from torch.distributions import Normal, kl_divergence

import sbm_vae
from sbm_vae import VPSDE, sample

SDE = VPSDE(0.1, 20.0)
M, D = 3, 2
GENERATOR = torch.Generator().manual_seed(3)
ROOT = torch.randn(M * D, M * D, generator=GENERATOR)
COV = ROOT @ ROOT.T / 4 + 0.1 * torch.eye(M * D)
MEAN = torch.randn(M * D, generator=GENERATOR)


def exact(z, t, mean=MEAN, cov=COV, sde=SDE):
    """The score of N(mean, cov) noised to the largest of the times."""
    alpha, sigma = sde.alpha_sigma(t.amax())
    flat = z.flatten(1)
    noised = alpha**2 * cov + sigma**2 * torch.eye(len(cov))
    return -torch.linalg.solve(noised, (flat - alpha * mean).T).T.view_as(z)


def posterior(z_obs, n_obs=D, mean=MEAN, cov=COV):
    """Mean [b d'] and covariance of the other latents given the first n_obs."""
    gain = torch.linalg.solve(cov[:n_obs, :n_obs], cov[:n_obs, n_obs:]).T
    return mean[n_obs:] + (z_obs - mean[:n_obs]) @ gain.T, \
        cov[n_obs:, n_obs:] - gain @ cov[:n_obs, n_obs:]


def exact_conditional(z, t):
    """The score of the last modalities given the first, clean at time 0; useless on the first."""
    alpha, sigma = SDE.alpha_sigma(t.amax())
    assert (t[:, 0] == 0).all() and (t[:, 1:] == t.amax()).all()
    mean, cov = posterior(z[:, 0])
    rest = z[:, 1:].flatten(1) - alpha * mean
    s = -torch.linalg.solve(alpha**2 * cov + sigma**2 * torch.eye(len(cov)), rest.T).T
    return torch.cat([torch.full_like(z[:, :1], 7.0), s.view(len(z), M - 1, D)], 1)


# ---- SDE and loss --------------------------------------------------------------------------------
@pytest.mark.parametrize("sde", [SDE, VPSDE(1.0, 5.0), VPSDE(2.0, 2.0)])
def test_alpha_sigma_are_the_marginals_of_simulated_paths(sde):
    grid = torch.linspace(1e-5, 1, 50)
    alpha, sigma = sde.alpha_sigma(grid)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(50))
    assert torch.allclose(sde.time((alpha / sigma).log()), grid, atol=1e-4)
    z, n = torch.full((20_000,), 2.0), 1000
    for i in range(n // 2):                                         # to t = 1/2, from a point
        beta = sde.beta(torch.tensor((i + 0.5) / n))
        z = z - 0.5 * beta * z / n + (beta / n) ** 0.5 * torch.randn_like(z)
    alpha, sigma = sde.alpha_sigma(torch.tensor(0.5))
    assert z.mean() == pytest.approx(2 * alpha.item(), abs=0.03)
    assert z.std() == pytest.approx(sigma.item(), rel=0.02)
    b = -2 * sde.alpha_sigma(torch.tensor(1.0))[0].log()
    assert b == pytest.approx((sde.beta_min + sde.beta_max) / 2, rel=1e-4)


def denoising_minimum(cov, n=4000):
    """Mean over t and entries of Var(eps | Z_t) = alpha^2 l / (alpha^2 l + sigma^2)."""
    t = (torch.arange(n) + 0.5) / n
    alpha, sigma = (v[:, None] for v in SDE.alpha_sigma(t))
    values = torch.linalg.eigvalsh(cov)
    return (alpha**2 * values / (alpha**2 * values + sigma**2)).mean().item()


def draws(n):
    return torch.distributions.MultivariateNormal(MEAN, COV).sample((n,)).view(n, M, D)


def loss_of(score, n=40_000):
    torch.manual_seed(1)
    return sbm_vae.score_loss(score, draws(n), SDE).item()


def batched_exact(z, t):
    """exact() with a time for each sample."""
    alpha, sigma = (v[:, None, None] for v in SDE.alpha_sigma(t.amax(1)))
    noised = alpha**2 * COV + sigma**2 * torch.eye(M * D)
    rest = z.flatten(1)[..., None] - alpha * MEAN[:, None]
    return -torch.linalg.solve(noised, rest).view_as(z)


def test_the_exact_score_attains_the_analytic_minimum_of_the_loss():
    least = loss_of(batched_exact)
    assert least == pytest.approx(denoising_minimum(COV), rel=0.02)
    for factor in (0.9, 1.1, -1.0):
        assert loss_of(lambda z, t: factor * batched_exact(z, t)) > least + 0.002


def test_masked_loss_leaves_observed_ones_clean_and_counts_missing_ones_only():
    seen = []

    def score(z, t):
        seen.append((z, t))
        return torch.where(t[..., None] == 0, 1e6, torch.zeros_like(z))     # not looked at
    torch.manual_seed(0)
    z = draws(5000)
    loss = sbm_vae.score_loss(score, z, SDE, 0.7)
    (z_t, t), = seen
    observed = t == 0
    assert loss == pytest.approx(1.0, abs=0.03)                     # E |eps|^2, an entry
    assert torch.equal(z_t[observed], z[observed]) and not observed.all(1).any()
    share = observed.any(1).float().mean()
    assert share == pytest.approx(0.7, abs=0.03)
    sizes = observed.sum(1)
    assert (sizes == 1).float().mean() == pytest.approx(0.35, abs=0.03)
    assert torch.equal(t.amax(1, keepdim=True).expand_as(t)[~observed], t[~observed])


def test_v_weighted_loss_is_the_squared_error_of_v():
    """With v_hat = 0, s = -Z_t: the loss is E |v|^2 = E (alpha eps - sigma Z)^2."""
    torch.manual_seed(0)
    loss = sbm_vae.score_loss(lambda z, t: -z, draws(40_000), SDE, v_weight=True).item()
    alpha, sigma = SDE.alpha_sigma((torch.arange(1000) + 0.5) / 1000)
    second = (COV.diagonal() + MEAN**2).mean()
    assert loss == pytest.approx((alpha**2 + sigma**2 * second).mean().item(), rel=0.02)


@pytest.mark.parametrize("kind", ["uniform", "angle"])
def test_training_times_are_uniform_in_t_or_in_the_angle_of_noise_to_signal(kind):
    torch.manual_seed(0)
    sde = VPSDE(0.1, 20.0)
    t = sbm_vae.random_times(20_000, sde, kind, "cpu")
    assert t.shape == (20_000, 1) and t.min() > 0 and t.max() <= 1 + 1e-4
    ends = torch.cat([t[:, 0].sort().values, torch.tensor([1e-5, 1.0])])
    if kind == "angle":
        ends = torch.atan2(*sde.alpha_sigma(ends)[::-1])
    share = (ends[:-2] - ends[-2]) / (ends[-1] - ends[-2])
    assert (share - torch.linspace(0, 1, 20_000)).abs().max() < 0.02       # Kolmogorov-Smirnov


# ---- Samplers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    dict(sampler="em", n_steps=300), dict(sampler="pc", n_steps=150), dict(sampler="ode"),
    dict(sampler="pc", n_steps=100, repaint=2),
    dict(sampler="pc", n_steps=300, corrector="official")], ids=str)
def test_samplers_return_the_mean_and_covariance_of_a_gaussian(options):
    z = sample(exact, (12_000, M, D), sde=SDE, **options).flatten(1)
    assert (z.mean(0) - MEAN).abs().max() < 0.05
    error = torch.linalg.matrix_norm(z.T.cov() - COV) / torch.linalg.matrix_norm(COV)
    assert error < 0.05


def test_the_ode_sampler_is_of_second_order_and_needs_n_steps_calls():
    calls = []

    def score(z, t):
        calls.append(t)
        return exact(z, t).double()
    cov = torch.diag(torch.tensor([0.1, 0.5, 2.0, 4.0, 1.0, 0.3])).double()
    values = cov.diagonal().view(1, M, D)

    def double(z, t):
        calls.append(t)
        return exact(z, t, torch.zeros(6).double(), cov)
    start = torch.randn(64, M, D).double()
    a1, s1 = (v.double() for v in SDE.alpha_sigma(torch.ones(1).double()))
    a0, s0 = SDE.alpha_sigma(torch.full((1,), 1e-3).double())
    flow = start * ((a0**2 * values + s0**2) / (a1**2 * values + s1**2)).sqrt()
    truth = (flow + s0**2 * double(flow, torch.full((64, M), 1e-3).double())) / a0
    errors = []
    for n in (20, 40, 80):
        calls.clear()
        z = sbm_vae._ode(lambda z, t: double(z, t.expand(64, M)), lambda z, t: z, start, SDE, n,
                         1e-3)
        assert len(calls) == n
        errors.append((z - truth).abs().max().item())
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3.3 and errors[2] < 0.02


@pytest.mark.parametrize("sampler, n_steps, calls", [("pc", 20, 39), ("em", 20, 20),
                                                     ("ode", 20, 20)])
def test_calls_of_the_network(sampler, n_steps, calls):
    count = []
    sample(lambda z, t: count.append(0) or -z, (2, M, D), sde=SDE, sampler=sampler,
           n_steps=n_steps)
    assert len(count) == calls


def test_predictor_corrector_leaves_no_noise_on_a_point():
    """The exact score of one point; with beta(t) dt for its integral, or a corrector after the last
    predictor, 25 steps end 0.26 or 0.14 away."""
    def score(z, t):
        alpha, sigma = SDE.alpha_sigma(t[..., None])
        return -(z - 2 * alpha) / sigma**2
    z = sample(score, (2000, M, D), sde=SDE, sampler="pc", n_steps=25)
    assert (z - 2).square().mean().sqrt() < 0.02


OBSERVED = MEAN[:D] + torch.tensor([1.5, -1.0])


def conditional_error(n=4000, score=exact, sde=SDE, **options):
    """(error of the mean in posterior sds, root mean square; ratio of variances) of z_2, z_3."""
    torch.manual_seed(0)
    z = sample(score, (n, M, D), {0: OBSERVED.expand(n, D)}, sde=sde, **options)[:, 1:].flatten(1)
    mean, cov = posterior(OBSERVED[None])
    sd = cov.diagonal().sqrt()
    return ((z.mean(0) - mean) / sd).square().mean().sqrt().item(), \
        (z.var(0) / cov.diagonal()).mean().item()


@pytest.mark.parametrize("options", [
    dict(sampler="ode", n_steps=50), dict(sampler="em", n_steps=500),
    dict(sampler="pc", n_steps=250)], ids=str)
def test_the_exact_conditional_score_gives_the_gaussian_posterior(options):
    bias, ratio = conditional_error(score=exact_conditional, obs_noise="clean", conditional=True,
                                    **options)
    assert bias < 0.06 and ratio == pytest.approx(1.0, abs=0.06)


def test_bias_of_the_ways_to_impose_observed_latents():
    """Error of the conditional mean, in posterior standard deviations, root mean square. Measured:
    fresh 0.30, fixed 0.32, official 0.35, clean 0.33, fresh with 10 RePaint passes 0.12."""
    pc = dict(sampler="pc", n_steps=100)
    found = {name: conditional_error(obs_noise=name, **pc)[0]
             for name in ("fresh", "fixed", "official", "clean")}
    found["repaint"] = conditional_error(obs_noise="fresh", repaint=10, **pc)[0]
    assert found["repaint"] < 0.15 and all(0.2 < found[k] < 0.45 for k in found if k != "repaint")
    assert found["fresh"] < found["official"]


def test_official_corrector_counts_the_missing_rows_only_under_masked_training():
    """Its step is the ratio of two norms: both of the rows that move. The score is N(0, I)'s, whose
    variance the corrector changes by the same factor however many modalities are observed."""
    found = []
    for known in (0, 1, 3):
        torch.manual_seed(0)
        z = sample(lambda z, t: -z, (4000, 4, 8), {j: torch.zeros(4000, 8) for j in range(known)},
                   sde=SDE, sampler="pc", n_steps=100, corrector="official", conditional=True,
                   obs_noise="clean")
        found.append(z[:, known:].var().item())
    assert found == pytest.approx([0.925] * 3, abs=0.02)


@pytest.mark.parametrize("noise", ["fresh", "fixed", "official", "clean"])
@pytest.mark.parametrize("sampler", ["pc", "ode"])
def test_observed_latents_come_back_bit_identical_and_enter_as_said(noise, sampler):
    z_obs, seen = torch.randn(5, D), []

    def score(z, t):
        seen.append((z[:, 1].clone(), t[0, 1].clone()))
        return -z
    z = sample(score, (5, M, D), {1: z_obs}, sde=SDE, sampler=sampler, n_steps=12, obs_noise=noise)
    assert torch.equal(z[:, 1], z_obs)
    noises = []
    for value, t in seen:
        alpha, sigma = SDE.alpha_sigma(t)
        if noise == "official":
            assert torch.allclose(value, (alpha + sigma) * z_obs, atol=1e-6)
        elif noise == "clean":
            assert torch.equal(value, z_obs)
        else:
            noises.append((value - alpha * z_obs) / sigma)
    if noises:
        same = torch.allclose(noises[0], noises[5], atol=1e-4)
        assert same == (noise == "fixed")


def test_no_sample_depends_on_its_batch_but_with_the_official_corrector():
    def disturbed(z, t):
        s = exact(z, t)
        return torch.cat([50 * s[:1], s[1:]])
    for corrector, equal in (("fixed", True), ("official", False)):
        out = []
        for score in (exact, disturbed):
            torch.manual_seed(0)
            out.append(sample(score, (4, M, D), sde=SDE, sampler="pc", n_steps=20, t_end=0.2,
                              corrector=corrector)[1:])
        assert torch.allclose(*out, atol=1e-5) == equal


def test_divergence_is_an_error_with_a_name():
    with pytest.raises(FloatingPointError, match="--snr"):
        sample(lambda z, t: 1e30 * z**3, (2, M, D), sde=SDE, n_steps=5)


# ---- Pair energy ---------------------------------------------------------------------------------
def log_normal(z, t, keep):
    """Log density of the latents of the modalities keep, noised to times t [b]."""
    index = torch.tensor([D * k + i for k in keep for i in range(D)])
    alpha, sigma = (v[:, None, None] for v in SDE.alpha_sigma(t))
    cov = alpha**2 * COV[index][:, index] + sigma**2 * torch.eye(len(index))
    return torch.distributions.MultivariateNormal(alpha[:, 0] * MEAN[index], cov).log_prob(z)


def exact_energy(z_i, z_j, i, j, t):
    """log p(z_i) p(z_j) / p(z_i, z_j), by index pair."""
    out = torch.zeros(len(z_i))
    for a in range(M):
        for b in range(M):
            at = (i == a) & (j == b)
            if a != b and at.any():
                pair = torch.cat([z_i[at], z_j[at]], 1)
                out[at] = log_normal(z_i[at], t[at], [a]) + log_normal(z_j[at], t[at], [b]) \
                    - log_normal(pair, t[at], [a, b])
    return out


def test_noise_contrast_is_2_ln_2_at_zero_and_least_at_the_density_ratio():
    def loss(factor, noise=False):
        torch.manual_seed(0)
        return sbm_vae.pair_loss(lambda *a: factor * exact_energy(*a), draws(20_000), SDE,
                                 noise).item()
    assert loss(0.0) == pytest.approx(2 * math.log(2)) == loss(0.0, True)
    least = loss(1.0)
    assert least < loss(0.6) - 1e-3 and least < loss(1.5) - 1e-3 and loss(-1.0) > loss(0.0)


def test_guidance_turns_the_marginal_into_the_conditional_score():
    z, t, known = draws(6), torch.tensor(0.3), [True, False, False]
    found = sbm_vae.guidance(exact_energy, z, t, known)
    for j in (1, 2):
        z_j = z[:, j].clone().requires_grad_(True)
        times = t.expand(6)
        both = torch.cat([z[:, 0], z_j], 1)
        ratio = log_normal(both, times, [0, j]) - log_normal(z_j, times, [j])
        (truth,) = torch.autograd.grad(ratio.sum(), z_j)
        assert torch.allclose(found[:, j], truth, atol=1e-4)
    assert (found[:, 0] == 0).all()
    alone = sbm_vae.guidance(exact_energy, z[2:3], t, known)
    assert torch.allclose(alone, found[2:3], atol=1e-5)             # no 1/b
    two = sbm_vae.guidance(exact_energy, z, t, [True, True, False])[:, 2]
    z_2 = z[:, 2].clone().requires_grad_(True)
    mean = sum(-exact_energy(z[:, k], z_2, torch.full((6,), k), torch.full((6,), 2), t.expand(6))
               for k in (0, 1)) / 2
    assert torch.allclose(two, torch.autograd.grad(mean.sum(), z_2)[0], atol=1e-4)
    for nothing in ([False] * 3, [True] * 3):
        assert (sbm_vae.guidance(exact_energy, z, t, nothing) == 0).all()


def test_dot_energy_is_symmetric_learns_pairs_and_guides_one_latent_towards_the_other():
    torch.manual_seed(0)
    args = sbm_vae.parse_args(["--z_dim", "4"])
    energy, sde = sbm_vae.DotEnergy(2, args), sbm_vae.VPSDE(0.1, 20.0)

    def draw(n):                                                           # z_1 = -z_0, and noise
        z = torch.randn(n, 1, 4)
        return torch.cat([z, -z], 1) + 0.3 * torch.randn(n, 2, 4)
    opt = torch.optim.Adam(energy.parameters(), 2e-3)
    for _ in range(300):
        loss = sbm_vae.pair_loss(energy, draw(256), sde, times="angle")
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 2 * math.log(2) - 0.1
    z, i, t = draw(200), torch.zeros(200, dtype=torch.long), torch.full((200,), 0.01)
    there, back = energy(z[:, 0], z[:, 1], i, i + 1, t), energy(z[:, 1], z[:, 0], i + 1, i, t)
    assert torch.allclose(there, back, atol=1e-5)
    energy.requires_grad_(False)
    z[:, 1] = 0
    push = sbm_vae.guidance(energy, z, torch.tensor(0.01), [True, False])[:, 1]
    assert torch.cosine_similarity(push, -z[:, 0]).mean() > 0.5


@pytest.mark.parametrize("sampler", ["pc", "ode"])
def test_weight_zero_is_no_guidance_and_another_weight_adds_to_the_score(sampler):
    def run(**options):
        torch.manual_seed(0)
        return sample(exact, (6, M, D), {0: OBSERVED.expand(6, D)}, sde=SDE, sampler=sampler,
                      n_steps=15, **options)
    plain = run()
    assert torch.equal(run(energy=exact_energy, weight=0.0), plain)
    assert not torch.allclose(run(energy=exact_energy, weight=0.5)[:, 1:], plain[:, 1:])


@pytest.mark.parametrize("conditional, obs_noise", [(True, "clean"), (False, "official")])
@pytest.mark.parametrize("sampler", ["pc", "ode"])
def test_what_guidance_sees_of_the_observed_latents(sampler, conditional, obs_noise):
    """A masked net: the mean of the noised ones, no draw of noise, which would add up over steps;
    else what was imposed, (alpha + sigma) z if official."""
    z_obs, seen = torch.randn(5, D), []

    def energy(z_i, z_j, i, j, t):
        alpha, sigma = (v[:, None] for v in SDE.alpha_sigma(t))
        factor = alpha if conditional else alpha + sigma
        seen.append((z_i - factor * z_obs.repeat_interleave(2, 0)).abs().max())
        return (z_i * z_j).sum(1)
    sample(exact_conditional if conditional else exact, (5, M, D), {0: z_obs}, sde=SDE,
           sampler=sampler, n_steps=8, conditional=conditional, obs_noise=obs_noise, energy=energy,
           weight=0.1)
    assert len(seen) >= 8 and max(seen) < 1e-5


# ---- Networks ------------------------------------------------------------------------------------
def arguments(*flags):
    return sbm_vae.parse_args([*flags])


@pytest.mark.parametrize("dataset, m, count", [("polymnist10", 10, 42_669_450),
                                               ("celebamask_hq", 3, 222_847_613)])
def test_unet_has_the_papers_parameters(dataset, m, count):
    args = arguments("--dataset", dataset, "--preset", "paper")
    with torch.device("meta"):
        net = sbm_vae.Unet(m, args)
    assert sum(p.numel() for p in net.parameters()) == count


def test_unet_maps_latents_to_latents_of_any_number_of_modalities():
    args = arguments("--preset", "paper", "--dim", "16")
    for m in (2, 10):
        net, z = sbm_vae.Unet(m, args), torch.randn(3, m, 64)
        assert net(z, torch.full((3, m), 0.4)).shape == z.shape
    args = arguments("--preset", "paper", "--dim", "16", "--cond_train", "masked")
    net, z, t = sbm_vae.Unet(4, args), torch.randn(3, 4, 64), torch.full((3, 4), 0.4)
    other = t.clone()
    other[:, 0] = 0
    assert not torch.allclose(net(z, t), net(z, other))


def test_score_net_does_not_care_which_modality_is_called_the_first():
    """Permuting modalities together with the weights that belong to them permutes the output."""
    args = arguments("--z_dim", "4", "--width", "8")
    net, other = sbm_vae.MLP(3, args), sbm_vae.MLP(3, args)
    order, weights = torch.tensor([2, 0, 1]), {k: v.clone() for k, v in net.state_dict().items()}
    for key in weights:
        if not key.startswith("trunk"):
            weights[key] = weights[key][order]
    columns = rearrange(weights["trunk.0.weight"], "o (m f) -> o m f", m=3)
    weights["trunk.0.weight"] = columns[:, order].flatten(1)
    other.load_state_dict(weights)
    z, t = torch.randn(5, 3, 4), torch.rand(5, 3)
    torch.testing.assert_close(other(z[:, order], t[:, order]), net(z, t)[:, order])


@pytest.mark.parametrize("linear", [False, True])
def test_attention_is_that_of_its_formula(linear):
    net, x = sbm_vae.Attention(6, linear), torch.randn(2, 6, 4, 4)
    q, k, v = net.qkv(net.norm(x)).reshape(2, 3, 4, 32, 16).transpose(-1, -2).unbind(1)
    if linear:                                                              # [b heads places c]
        context = torch.einsum("bhnc,bhnd->bhcd", k.softmax(2), v)
        h = torch.einsum("bhcd,bhnc->bhnd", context, q.softmax(3) * 32**-0.5)
    else:
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = x + net.out(h.transpose(-1, -2).reshape(2, 128, 4, 4))
    torch.testing.assert_close(net(x), expected)


def test_pair_energy_sees_time_and_both_indices_and_its_input_again_in_layer_five():
    torch.manual_seed(0)
    args = arguments("--z_dim", "3", "--time_scale", "1")
    net, (z_i, z_j), t = sbm_vae.PairEnergy(args), torch.randn(2, 7, 3), torch.rand(7)
    i, j = torch.randint(0, 4, (2, 7))
    x = h = torch.cat([z_i, z_j], 1)
    more = torch.cat([net.time(sbm_vae.embed(t, 6)), net.index[0](sbm_vae.embed(i + 1, 3)),
                      net.index[1](sbm_vae.embed(j + 1, 3))], 1)
    for number, layer in enumerate(net.layers, 1):
        h = layer(torch.cat([h + x if number == 5 else h, more], 1)).exp().add(1).log()
    torch.testing.assert_close(net(z_i, z_j, i, j, t), h @ net.out.weight[0] + net.out.bias)
    assert [layer.out_features for layer in net.layers] == [6] * 5 + [12]


@pytest.mark.parametrize("shape, z_dim, n_features, millions", [
    ((3, 28, 28), 64, 512, 2.43), ((3, 128, 128), 256, 16384, 51.8),
    ((1, 128, 128), 256, 2048, 7.6), ((18,), 256, 512, 1.8)])
def test_autoencoders_have_the_papers_sizes(shape, z_dim, n_features, millions):
    args = arguments("--ae_net", "resnet", "--z_dim", str(z_dim))
    with torch.device("meta"):
        net = sbm_vae.Autoencoders(shape, 1, args)
    assert net.net.n_features == n_features
    count = sum(p.numel() for p in net.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("ae_net, size", [("patch", 8), ("resnet", 28)])
def test_side_by_side_is_the_same_as_apart(ae_net, size):
    """Outputs and gradients of g = 3 nets in one equal those of each net alone."""
    args = arguments("--ae_net", ae_net, "--z_dim", "6")
    together = sbm_vae.Autoencoders((3, size, size), 3, args).double()
    x = torch.rand(4, 3, 3, size, size).double()
    mu, log_var = together.encode(x)
    out = together.decode(mu)
    assert out.shape == x.shape and mu.shape == log_var.shape == (4, 3, 6)
    out.square().sum().backward()
    for k in range(3):
        alone = sbm_vae.Autoencoders((3, size, size), 1, args).double()
        for (name, p), q in zip(together.named_parameters(), alone.parameters()):
            q.data = p.data.chunk(3)[k].clone()
        mu_k, log_var_k = alone.encode(x[:, k:k + 1])
        assert torch.allclose(mu_k[:, 0], mu[:, k], atol=1e-4)
        assert torch.allclose(log_var_k[:, 0], log_var[:, k], atol=1e-4)
        out_k = alone.decode(mu_k)
        assert torch.allclose(out_k[:, 0], out[:, k], atol=1e-4)
        out_k.square().sum().backward()
        for p, q in zip(together.parameters(), alone.parameters()):
            grad = p.grad.chunk(3)[k] if p.grad is not None else None
            assert grad is None or torch.allclose(grad, q.grad, rtol=1e-6, atol=1e-6)


def model_of(shapes, *flags):
    args = arguments("--z_dim", "4", "--width", "16", *flags)
    return sbm_vae.SBM(shapes, args), args


def test_vae_loss_is_squared_error_plus_beta_kl():
    shapes = {"a": (1, 8, 8), "b": (3, 8, 8), "c": (1, 8, 8)}
    model, args = model_of(shapes, "--vae_beta", "0.5", "1", "2")
    x = {m: torch.rand(5, *s) for m, s in shapes.items()}
    for net in model.autoencoders:                          # decoders that ignore z: 1/2 everywhere
        for p in net.net.dec.parameters():
            p.data.zero_()
    metrics = sbm_vae.ae_loss(model, x, args)
    truth = 0.0
    for m, beta in zip("abc", (0.5, 1, 2)):
        bank = 0 if m in "ac" else 1
        image = torch.stack([x[k] for k in model.banks[bank]], 1)
        mu, log_var = (v[:, model.banks[bank].index(m)] for v in
                       model.autoencoders[bank].encode(image))
        kl = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(1).mean()
        error = (x[m] - 0.5).square().sum((1, 2, 3)).mean()
        assert metrics[f"recon_{m}"] == pytest.approx(error.item(), rel=1e-5)
        truth += error + beta * kl
    assert metrics["loss"].item() == pytest.approx(truth.item(), rel=1e-5)


def test_rae_loss_has_noise_in_training_only_and_a_penalty():
    model, args = model_of({"a": (1, 8, 8)}, "--autoencoder", "rae", "--rae_lambda", "0.3",
                           "--rae_sigma", "0.5")
    x = {"a": torch.rand(6, 1, 8, 8)}
    code = model.encode(x)["a"]
    error = (model.decode(code[:, None])["a"] - x["a"]).square().sum((1, 2, 3)).mean()
    model.eval()
    loss = sbm_vae.ae_loss(model, x, args)["loss"]
    penalty = 0.3 * code.square().sum(1).mean()
    assert loss.item() == pytest.approx((error + penalty).item(), rel=1e-5)
    assert loss == sbm_vae.ae_loss(model, x, args)["loss"]
    model.train()
    assert sbm_vae.ae_loss(model, x, args)["loss"] != sbm_vae.ae_loss(model, x, args)["loss"]


def test_latents_are_standardised_going_in_and_restored_going_out():
    shapes = {"a": (1, 8, 8), "b": (3, 8, 8), "c": (1, 8, 8)}              # two nets for three
    model, _ = model_of(shapes)
    x = {m: torch.rand(5, *shape) for m, shape in shapes.items()}
    assert list(model.encode(x)) == list(model.decode(torch.randn(5, 3, 4))) == list("abc")
    raw = torch.stack(list(model.encode(x).values()), 1)
    out = model.decode(raw)
    model.mean.uniform_(-1, 1)
    model.std.uniform_(0.5, 2)
    z = torch.stack(list(model.encode(x).values()), 1)
    assert torch.allclose(z, (raw - model.mean) / model.std, atol=1e-5)
    assert all(torch.allclose(model.decode(z)[m], out[m], atol=1e-5) for m in out)
    assert torch.allclose(model.encode({"b": x["b"]})["b"], z[:, 1], atol=1e-6)
    assert list(model.decode(z, ["b"])) == ["b"]


@pytest.mark.parametrize("kind", ["eps", "score", "v"])
def test_what_the_net_predicts(kind):
    model, _ = model_of({"a": (1, 8, 8), "b": (1, 8, 8)}, "--parametrisation", kind)
    model.score_net.forward = lambda z, t: torch.ones_like(z)
    t = torch.tensor([[0.3, 0.0]])
    s, (_, sigma) = model.score(torch.full((1, 2, 4), 2.0), t), SDE.alpha_sigma(t)
    alpha, sigma = SDE.alpha_sigma(t)[0][0, 0].item(), sigma[0, 0].item()
    truth = {"eps": -1 / sigma, "score": 1.0, "v": -(alpha + 2 * sigma) / sigma}[kind]
    assert s[0, 0, 0].item() == pytest.approx(truth)
    assert s.isfinite().all()


def test_agreement_curves_by_hand():
    classes = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 1, 3], [0, 1, 2, 3]])
    found = sbm_vae.agreement(classes)
    assert [found[f"agree_anchored_{k}"] for k in (2, 3, 4)] == [0.5, 0.25, 0.25]
    assert [found[f"agree_majority_{k}"] for k in (2, 3, 4)] == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("word", [dict(sampler="ODE"), dict(obs_noise="none")])
def test_sample_refuses_words_that_it_does_not_know(word):
    with pytest.raises(ValueError, match="ODE|none"):
        sample(lambda z, t: -z, (5, M, D), sde=SDE, **word)
