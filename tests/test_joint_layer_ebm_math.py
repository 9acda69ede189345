"""The layered prior, its tilt, chains and losses against closed forms of linear-Gaussian models."""
import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import data
import joint_layer_ebm as jl

B, LOG_S, A1, A2, W, SIGMA = 0.7, -0.4, 1.5, 0.6, 1.3, 0.8     # z_1 = B z_2 + exp(LOG_S) eps_1
PREC = torch.tensor([[math.exp(-2 * LOG_S) + A1, -B * math.exp(-2 * LOG_S)],
                     [-B * math.exp(-2 * LOG_S), 1 + B**2 * math.exp(-2 * LOG_S) + A2]])
JAC = torch.tensor([[math.exp(LOG_S), B], [0.0, 1.0]])          # dT/deps


class Quadratic(nn.Module):
    """f_i = -a_i z_i^2 / 2 for two layers of one dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.nets = nn.Parameter(torch.tensor([A1, A2])), [None]

    def forward(self, z):
        return -0.5 * self.a.to(z) * z**2


def linear_model():
    """Tilted prior N(0, PREC^-1), and x = W z_1 + SIGMA noise as a 1 x 1 image."""
    prior = jl.TopDown([1, 1], n_hidden=0)
    with torch.no_grad():
        prior.nets[0][0].weight.copy_(torch.tensor([[B], [0.0]]))
        prior.nets[0][0].bias.copy_(torch.tensor([0.0, 3 * math.atanh(LOG_S / 3)]))
    return SimpleNamespace(prior=prior, energies=Quadratic(), encoder=None, amp=False,
                           decode=lambda z: W * z[:, :1, None, None])


def settings(*more):
    return jl.parse_args(["--z_dims", "4", "3", "2", "--width", "4", "--prior_hidden", "8",
                          "--f_hidden", "6", "--prior_steps", "3", "--post_steps", "2", *more])


def model_of(args, shape=(1, 12, 12)):
    torch.manual_seed(0)
    model = jl.JointEBM(shape, args).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.25)                            # far from trivial
    return model


PRIORS = {"mlp": settings(), "deep": settings("--net", "deep", "--groups", "1", "2",
                                              "--group_dim", "2", "--epochs_backbone", "1")}


# ---- T -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRIORS)
def test_t_and_its_inverse_and_the_change_of_variables(name):
    prior = model_of(PRIORS[name]).prior
    eps = torch.randn(3, sum(prior.dims), dtype=torch.float64)
    z = prior.to_z(eps)
    assert torch.allclose(prior.to_eps(z), eps, atol=1e-5)      # heads return float32
    log_std = prior.at(z)[1]
    normal = Normal(0.0, 1.0).log_prob(eps).sum(1)
    assert torch.allclose(prior.log_prob(z) + log_std.sum(1), normal, atol=1e-4)
    jacobian = torch.autograd.functional.jacobian(lambda e: prior.to_z(e[None])[0], eps[0])
    log_det = torch.linalg.slogdet(jacobian)[1].item()
    assert log_det == pytest.approx(log_std[0].sum().item(), abs=1e-4)
    assert abs(log_det) > 0.1                                   # the case is not trivial
    assert jacobian.tril(-1).abs().max() == 0                   # bottom layers first: triangular
    top = prior.dims[-1]
    assert torch.equal(z[:, -top:], eps[:, -top:])


def test_top_down_density_is_the_linear_gaussian():
    prior, z = linear_model().prior, torch.randn(5, 2)
    want = Normal(0, 1).log_prob(z[:, 1]) + Normal(B * z[:, 1], math.exp(LOG_S)).log_prob(z[:, 0])
    assert torch.allclose(prior.log_prob(z), want, atol=1e-5)


def test_every_layer_depends_on_all_above():
    prior = model_of(settings()).prior
    z = torch.randn(1, 9, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: prior.at(v)[0][0], z)[:, 0]  # [d d]
    assert (jacobian[:4, 4:].abs().sum(0) > 0).all() and (jacobian[4:7, 7:].abs().sum(0) > 0).all()
    assert jacobian[:, :4].abs().max() == 0


# ---- Targets -------------------------------------------------------------------------------------
def hessian(model, space, x=None):
    return -torch.autograd.functional.hessian(
        lambda u: jl.log_target(model, u[None], space, x, SIGMA)[0], torch.randn(2))


def test_tilted_prior_has_the_closed_form_precision_in_both_spaces():
    model = linear_model()
    assert torch.allclose(hessian(model, "z"), PREC, atol=1e-4)
    assert torch.allclose(hessian(model, "eps"), JAC.T @ PREC @ JAC, atol=1e-4)


def test_target_on_eps_has_the_normal_of_eps_and_not_p0():
    model, eps = model_of(settings()), torch.randn(20, 9, dtype=torch.float64)
    z = model.prior.to_z(eps)
    want = Normal(0.0, 1.0).log_prob(eps).sum(1) + model.energies(z).sum(1)
    assert torch.allclose(jl.log_target(model, eps, "eps"), want, atol=1e-4)
    assert model.prior.at(z)[1].sum(1).std() > 0.05             # else the two would be equal


def test_posterior_target_adds_the_likelihood():
    model, x = linear_model(), torch.full((1, 1, 1, 1), 0.9)
    extra = torch.zeros(2, 2)
    extra[0, 0] = W**2 / SIGMA**2
    assert torch.allclose(hessian(model, "z", x), PREC + extra, atol=1e-4)
    assert torch.allclose(hessian(model, "eps", x), JAC.T @ (PREC + extra) @ JAC, atol=1e-4)
    u = torch.zeros(2, requires_grad=True)
    jl.log_target(model, u[None], "z", x, SIGMA).sum().backward()
    assert u.grad[0].item() == pytest.approx(W * 0.9 / SIGMA**2, rel=1e-4)


def test_log_lik_is_the_normal_s_up_to_a_constant():
    x, mean = torch.randn(2, 4, 3, 5, 5)
    difference = Normal(mean, 0.3).log_prob(x).sum((1, 2, 3)) - jl.log_lik(x, mean, 0.3)
    assert torch.allclose(difference, difference[:1].expand(4), atol=1e-2)
    assert (jl.log_lik(x, mean, 0.3) < 0).all()


# ---- Chains --------------------------------------------------------------------------------------
@pytest.mark.parametrize("v", [1.0, 0.3])
def test_langevin_has_the_biased_variance_of_ula(v):
    z = jl.langevin(lambda z: -0.5 * (z**2).sum(1) / v, torch.zeros(60_000, 1), 80, 0.4)
    assert z.var().item() == pytest.approx(v / (1 - 0.4**2 / (4 * v)), rel=0.03)


def ula_covariance(precision, jacobian, s):
    """Stationary covariance in z of a chain of step s on u, z = jacobian u."""
    a = jacobian.T @ precision @ jacobian
    return jacobian @ torch.linalg.inv(a @ (torch.eye(2) - s**2 / 4 * a)) @ jacobian.T


@pytest.mark.parametrize("space, jacobian, s", [("eps", JAC, 0.4), ("z", torch.eye(2), 0.4)])
def test_chain_samples_the_tilted_prior(space, jacobian, s):
    model, args = linear_model(), argparse.Namespace(space=space, sigma=SIGMA)
    z = jl.chain(model, model.prior.sample(40_000, "cpu"), 80, s, args)
    assert torch.allclose(z.T.cov(), ula_covariance(PREC, jacobian, s), atol=0.012)


@pytest.mark.parametrize("space, jacobian", [("eps", JAC), ("z", torch.eye(2))])
def test_posterior_chain_has_the_closed_form_mean_and_covariance(space, jacobian):
    model, n = linear_model(), 40_000
    args = argparse.Namespace(space=space, sigma=SIGMA, scheme="mcmc", post_steps=120,
                              post_step_size=0.3)
    z = jl.sample_posterior(model, torch.full((n, 1, 1, 1), 0.9), args)
    precision = PREC + torch.diag(torch.tensor([W**2 / SIGMA**2, 0.0]))
    mean = torch.linalg.inv(precision) @ torch.tensor([W * 0.9 / SIGMA**2, 0.0])
    assert torch.allclose(z.mean(0), mean, atol=0.012)
    assert torch.allclose(z.T.cov(), ula_covariance(precision, jacobian, 0.3), atol=0.012)


def test_resampling_below_keeps_what_is_above_and_draws_the_tilted_conditional():
    model, n = linear_model(), 40_000
    args = argparse.Namespace(space="z", sigma=SIGMA, prior_step_size=0.3)
    z = torch.tensor([[5.0, 1.2]]).expand(n, 2)
    new = jl.resample_below(model, z, 1, 80, args)
    assert torch.allclose(new[:, 1], z[:, 1]) and torch.equal(jl.resample_below(model, z, 0, 9,
                                                                                 args), z)
    mean = B * 1.2 * math.exp(-2 * LOG_S) / PREC[0, 0]
    a = PREC[0, 0] * math.exp(2 * LOG_S)                        # in eps_1
    assert new[:, 0].mean().item() == pytest.approx(mean.item(), abs=0.012)
    assert new[:, 0].var().item() == pytest.approx(
        (math.exp(2 * LOG_S) / (a * (1 - 0.3**2 / 4 * a))).item(), rel=0.04)
    plain = jl.resample_below(model, z, 1, 0, args)             # p0(z_1|z_2)
    assert plain[:, 0].mean().item() == pytest.approx(B * 1.2, abs=0.02)
    assert plain[:, 0].std().item() == pytest.approx(math.exp(LOG_S), rel=0.03)


@pytest.mark.parametrize("space", ["eps", "z"])
def test_no_gradient_is_left_in_chains_and_the_start_is_untouched(space):
    args = settings("--space", space)
    model = model_of(args).float()
    z = model.prior.sample(5, "cpu")
    kept, x = z.clone(), torch.rand(5, 1, 12, 12)
    for out in (jl.chain(model, z, 3, 0.2, args), jl.chain(model, z, 3, 0.2, args, x)):
        assert not out.requires_grad and torch.equal(z, kept) and not torch.equal(out, z)
    assert all(p.grad is None for p in model.parameters())
    assert not z.requires_grad


def test_chains_do_not_interact():
    args = settings("--space", "eps")
    model, z = model_of(args), torch.randn(4, 9, dtype=torch.float64)
    u = z.clone().requires_grad_(True)
    jl.log_target(model, u, "eps")[0].backward()
    assert u.grad[1:].abs().max() == 0 and u.grad[0].abs().max() > 0


def test_no_steps_give_the_backbone_and_a_seed_its_samples():
    args = settings("--prior_steps", "0")
    model = model_of(args).float()

    def seeded(work):
        torch.manual_seed(3)
        return work()
    plain = seeded(lambda: model.prior.sample(6, "cpu"))
    assert torch.equal(seeded(lambda: jl.sample_prior(model, 6, "cpu", args)), plain)
    args.prior_steps = 4
    tilted = seeded(lambda: jl.sample_prior(model, 6, "cpu", args))
    assert torch.equal(tilted, seeded(lambda: jl.sample_prior(model, 6, "cpu", args)))
    assert not torch.allclose(tilted, plain, atol=1e-3)
    none = settings("--f_hidden", "0")                          # no energies: the backbone again
    bare = model_of(none).float()
    bare.prior.load_state_dict(model.prior.state_dict())
    assert torch.equal(seeded(lambda: jl.sample_prior(bare, 6, "cpu", none)), plain)


# ---- Losses --------------------------------------------------------------------------------------
def test_energy_loss_gradient_is_that_of_the_negative_log_likelihood():
    f, z_pos, z_neg = Quadratic(), torch.randn(50, 2), 2 * torch.randn(70, 2)
    jl.energy_loss(f(z_pos), f(z_neg[:50])).backward()
    want = 0.5 * (z_pos**2).mean(0) - 0.5 * (z_neg[:50]**2).mean(0)
    assert torch.allclose(f.a.grad, want, atol=1e-6)            # of -log p, f = -a z^2 / 2
    swapped = jl.energy_loss(f(z_neg[:50]), f(z_pos))
    assert swapped.item() == pytest.approx(-jl.energy_loss(f(z_pos), f(z_neg[:50])).item())


def test_learning_the_energies_recovers_the_tilt():
    model, args = linear_model(), argparse.Namespace(space="eps", sigma=SIGMA, prior_steps=40,
                                                     prior_step_size=0.2)
    with torch.no_grad():
        model.energies.a.zero_()
    z_pos = torch.randn(20_000, 2) @ torch.linalg.cholesky(torch.linalg.inv(PREC)).T
    opt = torch.optim.SGD([model.energies.a], 1.5)
    for _ in range(60):
        z_neg = jl.sample_prior(model, 4000, "cpu", args)
        opt.zero_grad()
        jl.energy_loss(model.energies(z_pos[:4000]), model.energies(z_neg)).backward()
        opt.step()
    assert torch.allclose(model.energies.a, torch.tensor([A1, A2]), atol=0.35)


def random_layers(n=60_000):
    torch.manual_seed(1)
    mu, mu_p = torch.randn(2, 1, 4).expand(2, n, 4)
    log_std, log_std_p = 0.4 * torch.randn(2, 1, 4).expand(2, n, 4)
    return mu + log_std.exp() * torch.randn(n, 4), mu, log_std, mu_p, log_std_p


def test_kl_of_layers_in_closed_form_and_from_draws():
    parts = random_layers()
    _, mu, log_std, mu_p, log_std_p = (p[:1] for p in parts)
    want = kl_divergence(Normal(mu, log_std.exp()), Normal(mu_p, log_std_p.exp()))[0]
    want = torch.stack([want[:3].sum(), want[3:].sum()])
    assert torch.allclose(jl.kl_layers(*parts, [3, 1], [True, True])[0], want, atol=1e-5)
    drawn = jl.kl_layers(*parts, [3, 1], [False, False])
    assert torch.allclose(drawn.mean(0), want, rtol=0.03)
    assert drawn.std(0).min() > 0


@pytest.mark.parametrize("net", ["ladder", "mlp", "deep", "svhn"])
def test_posterior_gives_consistent_parameters(net):
    more = ["--z_dims", "4", "3"] if net == "svhn" else []
    args = settings("--net", net, "--scheme", "variational", "--group_dim", "2", *more)
    shape = (3, 32, 32) if net == "svhn" else (1, 12, 12)
    model = jl.JointEBM(shape, args)
    x = torch.rand(7, *shape) * 2 - 1
    torch.manual_seed(5)
    z, mu, log_std, mu_p, log_std_p, state = model.posterior(x)
    torch.manual_seed(5)
    noise = torch.randn(7, sum(model.prior.dims))
    assert torch.allclose(z, mu + log_std.exp() * noise, atol=1e-5)
    for a, b in zip((mu_p, log_std_p), model.prior.at(z)):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(model.generate(z, state), model.decode(z), atol=1e-4)
    other = model.posterior(-x)[1]
    assert ((mu - other).abs() > 0).all()                       # q looks at x, in all layers


def test_vae_loss_is_minus_the_elbo_less_f():
    args = settings("--net", "ladder", "--scheme", "variational", "--sigma", "0.5")
    model, x = jl.JointEBM((1, 12, 12), args), torch.rand(40, 1, 12, 12) * 2 - 1
    losses = []
    for kl_weight, tilted in ((1.0, False), (1.0, True), (0.0, False)):
        torch.manual_seed(2)
        loss, z, _ = jl.vae_loss(model, x, args, kl_weight, tilted)
        losses.append(loss)
    assert not z.requires_grad
    nll = ((x - model.decode(z))**2).sum((1, 2, 3)).mean() / (2 * 0.25)
    assert losses[2].item() == pytest.approx(nll.item(), rel=1e-5)
    f = model.energies(z).sum(1).mean()
    assert (losses[0] - losses[1]).item() == pytest.approx(f.item(), abs=2e-3)
    torch.manual_seed(2)
    _, mu, log_std, mu_p, log_std_p, _ = model.posterior(x)
    kl = kl_divergence(Normal(mu, log_std.exp()), Normal(mu_p, log_std_p.exp())).sum(1).mean()
    assert (losses[0] - losses[2]).item() == pytest.approx(kl.item(), rel=1e-3)


# ---- One training step ---------------------------------------------------------------------------
class Record(torch.optim.SGD):
    """Steps of size 0 that leave the gradients where they are."""

    def __init__(self, params):
        super().__init__(list(params), lr=0.0)


def one_step(scheme, stage, monkeypatch, fixed=True):
    args = settings("--net", "ladder", "--scheme", scheme, "--epochs_backbone", "0")
    torch.manual_seed(0)
    model, x = jl.JointEBM((1, 12, 12), args), torch.rand(6, 1, 12, 12)
    z_pos, z_neg = torch.randn(2, 6, 9)
    if fixed:
        monkeypatch.setattr(jl, "sample_prior", lambda *_: z_neg)
        monkeypatch.setattr(jl, "sample_posterior", lambda *_: z_pos)
    nets = [n for n in (model.prior, model.generator, model.encoder) if n is not None]
    opts = [Record(p for n in nets for p in n.parameters()), Record(model.energies.parameters())]
    jl.train_step(model, x, stage, *opts, args)
    return model, 2 * x - 1, z_pos, z_neg, args


def grads_of(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def same(module, wanted):
    return all(torch.allclose(p.grad, g, atol=1e-5, rtol=1e-4)
               for p, g in zip(module.parameters(), wanted))


def test_mcmc_step_gradients(monkeypatch):
    model, x, z_pos, z_neg, args = one_step("mcmc", "joint", monkeypatch)
    assert model.encoder is None
    model.requires_grad_(True)
    prior = model.prior.log_prob(z_neg).mean() - model.prior.log_prob(z_pos).mean()
    assert same(model.prior, grads_of(prior, model.prior))
    nll = ((x - model.decode(z_pos))**2).sum((1, 2, 3)).mean() / (2 * args.sigma**2)
    assert same(model.generator, grads_of(nll, model.generator))
    energy = model.energies(z_neg).sum(1).mean() - model.energies(z_pos).sum(1).mean()
    assert same(model.energies, grads_of(energy, model.energies))


def test_variational_step_gradients(monkeypatch):
    torch.manual_seed(0)
    model, x, _, z_neg, args = one_step("variational", "joint", monkeypatch)
    model.requires_grad_(True)
    state = torch.get_rng_state()
    torch.manual_seed(0)                                        # the noise that the step drew
    jl.JointEBM((1, 12, 12), args), torch.rand(6, 1, 12, 12), torch.randn(2, 6, 9)
    loss, z_pos, _ = jl.vae_loss(model, x, args, 1.0, True)
    torch.set_rng_state(state)
    loss = loss + model.prior.log_prob(z_neg).mean()
    for net in (model.prior, model.encoder, model.generator):
        assert same(net, grads_of(loss, net) if net is model.generator else
                    torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))
    energy = model.energies(z_neg).sum(1).mean() - model.energies(z_pos).sum(1).mean()
    assert same(model.energies, grads_of(energy, model.energies))


def test_free_bits_and_the_kl_weight_are_for_the_vae_alone():
    args = settings("--net", "ladder", "--scheme", "variational")
    model, x = jl.JointEBM((1, 12, 12), args), 2 * torch.rand(6, 1, 12, 12) - 1
    for tilted in (True, False):
        found = []
        for args.free_bits, weight in ((0.0, 1.0), (100.0, 0.1)):
            torch.manual_seed(1)
            found.append(jl.vae_loss(model, x, args, weight, tilted)[0].item())
        assert (found[0] == found[1]) == tilted


def test_backbone_stage_trains_no_energy_and_energy_stage_nothing_else(monkeypatch):
    model, *_ = one_step("two_stage", "backbone", monkeypatch)
    assert all(p.grad is None for p in model.energies.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())
    model, *_ = one_step("two_stage", "energy", monkeypatch)
    assert all(p.grad is not None for p in model.energies.parameters())
    for net in (model.prior, model.generator, model.encoder):
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())


# ---- Networks ------------------------------------------------------------------------------------
def count(module):
    return sum(p.numel() for p in module.parameters())


def test_official_cifar_nets_have_the_published_sizes():
    model = jl.JointEBM((3, 32, 32), jl.parse_args(["--dataset", "cifar10"]))
    assert count(model.generator) == 18_883_075 and count(model.prior) == 192_256
    assert [count(net) for net in model.energies.nets] == [106_401, 20_301]
    assert model.decode(torch.randn(2, 228)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("net, shape", [("svhn", (3, 32, 32)), ("celeba", (3, 64, 64))])
def test_other_official_nets_see_the_bottom_layer_only(net, shape):
    model = jl.JointEBM(shape, settings("--net", net, "--z_dims", "5", "4"))
    z = torch.randn(2, 9)
    x = model.decode(z)
    z[:, 5:] += 1
    assert x.shape == (2, *shape) and torch.equal(model.decode(z), x)


@pytest.mark.parametrize("dims", [[4], [4, 3], [4, 3, 2], [5, 4, 3, 2], [6, 5, 4, 3, 2]])
@pytest.mark.parametrize("side", [28, 32])
def test_ladders_of_one_to_five_layers(dims, side):
    args = settings("--z_dims", *map(str, dims), "--scheme", "variational", "--net", "ladder")
    model = jl.JointEBM((1, side, side), args)
    x = torch.rand(2, 1, side, side)
    z = model.posterior(x)[0]
    assert model.decode(z).shape == x.shape and model.energies(z).shape == (2, len(dims))
    z = torch.randn(1, sum(dims), requires_grad=True)
    model.decode(z).sum().backward()
    assert (z.grad != 0).all()                                  # every layer reaches the image


def test_deep_groups_shapes_and_energies():
    args = settings("--net", "deep", "--groups", "2", "1", "--scheme", "two_stage")
    model = jl.JointEBM((3, 32, 32), args)
    assert model.prior.shapes == [(4, 8, 8), (4, 4, 4), (4, 4, 4)]
    z = model.prior.sample(2, "cpu")
    assert model.decode(z).shape == (2, 3, 32, 32) and model.energies(z).shape == (2, 3)


def test_spectral_norm_bounds_the_energy_and_rests_in_chains():
    args = settings("--spectral_norm")
    model = jl.JointEBM((1, 12, 12), args).eval()
    model.energies.train()
    for _ in range(50):
        model.energies(torch.randn(4, 9))
    model.eval()
    before = [b.clone() for b in model.buffers()]
    jl.sample_prior(model, 4, "cpu", args)
    assert before and all(torch.equal(a, b) for a, b in zip(before, model.buffers()))
    z = torch.randn(64, 9, requires_grad=True)
    (slope,) = torch.autograd.grad(model.energies(z)[:, 0].sum(), z)
    assert slope.norm(dim=1).max() <= 1.01


def test_score_is_the_mean_log_joint_and_layers_above_k_stay(monkeypatch):
    args = settings("--net", "ladder", "--scheme", "variational")
    model = jl.JointEBM((1, 12, 12), args).requires_grad_(False)
    x = torch.randint(0, 256, (5, 1, 12, 12), dtype=torch.uint8)
    dataset = data.Dataset({"m": x}, torch.zeros(5).long(), {"m": "image"}, "m", "test")
    z = torch.randn(5, 9)
    monkeypatch.setattr(jl, "sample_posterior", lambda *_: z)
    want = jl.log_target(model, z, "z", 2 * x.float() / 255 - 1, args.sigma)
    want = torch.stack([want, want - model.energies(z).sum(1)], 1)
    assert torch.allclose(jl.scores(model, dataset, args, "cpu"), want, rtol=1e-4)
    assert (want[:, 0] != want[:, 1]).all()
    seen = []
    monkeypatch.setattr(jl, "log_target", lambda m, z, *_: seen.append(z) or z.sum(1))
    args.ood_steps = 0
    jl.scores(model, dataset, args, "cpu", 1, 2)
    assert len(seen) == 2 and torch.allclose(seen[0][:, 4:], z[:, 4:], atol=1e-5)
    assert not torch.allclose(seen[0][:, :4], z[:, :4])


def test_anomaly_auprc_of_both_shares(monkeypatch):
    y, held = torch.tensor([3, 0, 1, 2, 3, 4, 5, 6]), torch.full((20,), 3)
    value = [torch.tensor([4.0, 9, 1, 8, 2, 7, 6, 5]),          # minus the anomaly score
             torch.tensor([3.0, 3, 3, 3, 0, 0, 0, 0])]          # 4 * 2 more, the first ones
    asked = []

    def scores(model, dataset, *_):
        asked.append(len(dataset.y))
        score = value[len(asked) - 1]
        return torch.stack([score, -score], 1)
    monkeypatch.setattr(jl, "scores", scores)

    def made(y):
        return data.Dataset({"m": torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8)}, y,
                            {"m": "image"}, "m", "test")
    model = SimpleNamespace(requires_grad_=lambda _: None)
    found = jl.anomaly_auprc(model, [made(y), made(held)], argparse.Namespace(held_out=3, seed=0),
                             torch.device("cpu"))
    assert asked == [8, 8]
    # ranks, most anomalous first: 1 normal, 2 out, 4 out, 5 .. 9 normal
    assert found[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # without f, reversed: 9 8 7 6 5 normal, 4 out, 2 out
    assert found[1] == pytest.approx((1 / 6 + 2 / 7) / 2)
    # five times as many: 0 x 4 out, 1 normal, 2 out, 3 x 4 out, 4 out
    assert found[2] == pytest.approx((4 * 1 + 5 / 6 + 4 * 9 / 10 + 10 / 11) / 10)
    assert found[3] != found[2]


def test_mlp_nets_see_all_layers_and_encode_each():
    args = settings("--net", "mlp", "--scheme", "variational", "--width", "16")
    model = jl.JointEBM((1, 12, 12), args)
    x, z = torch.rand(3, 1, 12, 12), torch.randn(3, 9, requires_grad=True)
    model.decode(z).sum().backward()
    assert model.decode(z).shape == x.shape and (z.grad != 0).all()
    q = model.encoder(x, None)
    assert [q(i)[j].shape[1] for i in range(3) for j in (0, 1)] == [4, 4, 3, 3, 2, 2]
    assert torch.equal(torch.cat([q(i)[0] for i in range(3)] + [q(i)[1] for i in range(3)], 1),
                       nn.Sequential.forward(model.encoder, x))
