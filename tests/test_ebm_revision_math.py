"""ebm_revision.py against closed forms: both chains, the losses' gradients, clamping, fusion."""
import math

import pytest
import torch
from torch import nn

import ebm_revision as er
import toy_revision

IMAGES = {"a": (1, 28, 28), "b": (3, 32, 32)}
TEXT = {"image": (3, 64, 64), "caption": (6, 9)}


def flags(*more):
    return er.parse_args(["--width", "4", "--z_dim", "3", *more])


class Linear(nn.Module):
    """x = A z as an 'image' of shape (n, 1, 1)."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, z):
        return (z @ self.a.T)[..., None, None]


class Expert(nn.Module):
    """A Normal that does not look at x."""

    def __init__(self, mu, log_var):
        super().__init__()
        self.mu, self.log_var = nn.Parameter(mu), log_var

    def forward(self, x):
        return self.mu.expand(len(x), -1), self.log_var.expand(len(x), -1)


def toy(a_1, a_2, args):
    model = er.Revision({}, args)
    model.decoders = nn.ModuleDict({"a": Linear(a_1), "b": Linear(a_2)})
    return model


# ---- Chains --------------------------------------------------------------------------------------
@pytest.mark.parametrize("observed", [("a", "b"), ("a",)])
def test_z_chain_has_the_posterior_of_a_linear_gaussian_model(observed):
    args = flags("--z_dim", "2", "--sigma", "0.7", "--z_step_size", "0.15", "--z_noise", "0.15")
    a = {"a": torch.tensor([[1.0, 0.5], [0.2, -0.6]]), "b": torch.tensor([[0.3, 1.1]])}
    model = toy(a["a"], a["b"], args)
    x = {"a": torch.tensor([0.8, -0.3]), "b": torch.tensor([1.2])}
    x = {m: x[m] for m in observed}
    precision = torch.eye(2) + sum(a[m].T @ a[m] for m in x) / 0.7**2
    mean = torch.linalg.solve(precision, sum(a[m].T @ x[m] for m in x) / 0.7**2)
    n = 40_000
    state = {m: v.expand(n, -1)[..., None, None] for m, v in x.items()}
    z = er.revise_z(model, torch.randn(n, 2), state, 300, args)
    assert torch.allclose(z.mean(0), mean, atol=0.02)
    # ULA: the covariance is (P - s^2 P^2 / 4)^-1
    cov = torch.linalg.inv(precision - 0.15**2 / 4 * precision @ precision)
    assert torch.allclose(z.T.cov(), cov, atol=0.02)


@pytest.mark.parametrize("s, n", [(0.4, 0.4), (0.4, 0.1)])
def test_x_chain_has_the_tempered_law(s, n):
    args = flags("--x_step_size", str(s), "--x_noise", str(n))
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]])

    class Quadratic(nn.Module):
        def forward(self, state):
            x = torch.cat([state["a"], state["b"]], 1)
            return -0.5 * (x @ precision * x).sum(1)
    start = {m: torch.randn(40_000, 1) for m in "ab"}
    x = er.revise_x(Quadratic(), start, 150, args)
    cov = torch.cat([x["a"], x["b"]], 1).T.cov()
    exact = (n / s)**2 * torch.linalg.inv(precision - s**2 / 4 * precision @ precision)
    assert torch.allclose(cov, exact, rtol=0.05, atol=0.02 * (n / s)**2)


@pytest.mark.parametrize("shapes", [IMAGES, TEXT])
def test_observed_modalities_stay_bit_for_bit_and_others_move(shapes):
    args = flags("--x_steps_test", "3")
    model = er.Revision(shapes, args).eval()
    full = model.to_state(model.to_data(model.generate(torch.randn(5, 3))))
    for m in shapes:
        out = er.sample_given(model, {m: full[m]}, 3, args)
        start = er.sample_given(model, {m: full[m]}, 0, args)
        assert torch.equal(out[m], full[m]) and list(out) == list(shapes)
        for other in shapes.keys() - {m}:
            assert out[other].shape == full[other].shape
            assert not torch.equal(out[other], start[other])


def test_no_gradient_from_chains_and_modes_restored():
    args = flags()
    model = er.Revision(IMAGES, args).train()
    state = model.generate(torch.randn(4, 3))
    x = er.revise_x(model.ebm, state, 2, args)
    z = er.revise_z(model, er.sample_q(model, x), x, 2, args)
    assert not z.requires_grad and not any(v.requires_grad for v in x.values())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.ebm.training and model.decoders.training


def test_spectral_norm_stands_still_inside_a_chain_and_moves_in_training():
    args = flags()
    model = er.Revision(IMAGES, args).train()
    state = {m: v.detach() for m, v in model.generate(torch.randn(4, 3)).items()}
    before = [b.clone() for b in model.ebm.buffers()]
    er.revise_x(model.ebm, state, 3, args)
    assert all(torch.equal(a, b) for a, b in zip(before, model.ebm.buffers()))
    model.ebm(state)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.ebm.buffers()))


def test_a_chain_does_not_depend_on_who_shares_the_batch():
    args = flags("--x_noise", "0")
    model = er.Revision(IMAGES, args).eval()
    state = {m: v.detach() for m, v in model.generate(torch.randn(6, 3)).items()}
    whole = er.revise_x(model.ebm, state, 3, args)
    part = er.revise_x(model.ebm, {m: v[:2] for m, v in state.items()}, 3, args)
    assert all(torch.allclose(whole[m][:2], part[m], atol=1e-5) for m in state)


# ---- Densities and losses ------------------------------------------------------------------------
def test_log_densities():
    x, g = {"a": torch.randn(5, 2, 3, 3)}, {"a": torch.randn(5, 2, 3, 3)}
    y, h = x["a"].flatten(1), g["a"].flatten(1)
    exact = torch.distributions.Normal(h, 0.3).log_prob(y).sum(1)
    exact = exact + 18 * (math.log(0.3) + 0.5 * math.log(2 * math.pi))
    assert torch.allclose(er.log_lik(x, g, 0.3, "normal"), exact, rtol=1e-4)
    exact = torch.distributions.Laplace(h, 0.3).log_prob(y).sum(1) + 18 * math.log(0.6)
    assert torch.allclose(er.log_lik(x, g, 0.3, "laplace"), exact, rtol=1e-4)
    tokens, logits = torch.randint(7, (5, 4)), torch.randn(5, 4, 7)
    hard = {"t": 50.0 * torch.nn.functional.one_hot(tokens, 7)}
    exact = torch.distributions.Categorical(logits=logits).log_prob(tokens).sum(1)
    assert torch.allclose(er.log_lik(hard, {"t": logits}, 0.3, "normal"), exact, atol=1e-4)


def log_normal(z, mu, lv):
    return -0.5 * ((z - mu) ** 2 / lv.exp() + lv + math.log(2 * math.pi)).sum(-1)


def test_nll_of_the_mixture_is_exact_and_below_the_bound():
    experts = [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(3)]
    z, rows = torch.randn(5, 3), torch.randn(3, 5, 3)
    p = torch.stack([log_normal(z, *e).exp() for e in experts])
    assert torch.allclose(er.nll_q(z, experts, "mixture"), -p.mean(0).log(), atol=1e-4)
    assert torch.allclose(er.nll_q(z, experts, "per_expert"), -p.log().mean(0), atol=1e-4)
    own = -torch.stack([log_normal(rows[m], *experts[m]) for m in range(3)]).mean(0)
    assert torch.allclose(er.nll_q(rows, experts, "per_expert"), own, atol=1e-4)
    mixture = torch.stack([er.nll_q(row, experts, "mixture") for row in rows]).mean(0)
    assert torch.allclose(er.nll_q(rows, experts, "mixture"), mixture, atol=1e-4)
    assert (mixture <= own + math.log(3) + 1e-5).all()


def test_gradients_of_the_three_losses():
    args = flags("--z_dim", "2", "--sigma", "0.5", "--l_rec", "2", "--l_syn", "3", "--l_inf", "0.5")
    model = toy(torch.randn(2, 2), torch.randn(1, 2), args)
    state = {"a": torch.randn(8, 2, 1, 1), "b": torch.randn(8, 1, 1, 1)}
    x_rev = {m: torch.randn_like(v) for m, v in state.items()}
    z, z_rev = torch.randn(2, 8, 2)
    er.loss_generator(model, state, z_rev, z, x_rev, args).backward()
    for m, net in model.decoders.items():                   # d/dA of |x - A z|^2 / (2 sigma^2)
        grads = [(z @ net.a.T - x[m].flatten(1)).T @ z / 8 / 0.25
                 for x, z in ((state, z_rev), (x_rev, z))]
        assert torch.allclose(net.a.grad, 2 * grads[0] + 3 * grads[1], atol=1e-4)
    model.encoders = nn.ModuleDict({m: Expert(torch.randn(2), torch.zeros(2)) for m in state})
    er.loss_inference(model, state, z_rev, z, x_rev, args).backward()
    for expert in model.encoders.values():                  # mean over two experts: the factor 1/2
        exact = 0.5 * ((expert.mu - z_rev).mean(0) + 0.5 * (expert.mu - z).mean(0))
        assert torch.allclose(expert.mu.grad, exact, atol=1e-5)
    w = nn.Parameter(torch.zeros(()))

    def ebm(s):
        return w * s["a"].flatten(1).sum(1)
    loss, gap = er.loss_energy(ebm, state, x_rev)
    loss.backward()
    exact = -(state["a"].flatten(1).sum(1).mean() - x_rev["a"].flatten(1).sum(1).mean())
    assert torch.allclose(w.grad, exact) and gap == -loss.detach()


def test_the_energy_penalty_holds_the_level_of_f():
    """f = w + 1 on data, w - 3 on revised: the gap stays 4, w goes to where w^2 terms balance."""
    w, x = torch.tensor(2.0, requires_grad=True), {"a": torch.ones(4, 1)}
    loss, gap = er.loss_energy(lambda s: s["a"][:, 0] + w, x, {"a": -3 * torch.ones(4, 1)}, 0.1)
    loss.backward()
    assert gap == 4 and torch.isclose(loss, torch.tensor(-4 + 0.1 * (9 + 1)))
    assert torch.isclose(w.grad, torch.tensor(0.1 * 2 * (3 - 1)))


def test_clipped_steps_are_no_longer_than_asked_row_by_row():
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    end = er.langevin(lambda z: -z.square().sum(1), z, 1, 0.2, 0.0, clip=1.0)
    assert torch.allclose(z - end, 0.02 * torch.tensor([[0.6, 0.8], [0.6, 0.8], [0, 0]]))
    end = er.langevin(lambda z: -z.square().sum(1), z, 1, 0.2, 0.0, clip=5.0)
    assert torch.allclose(z - end, 0.02 * torch.tensor([[3.0, 4.0], [0.6, 0.8], [0, 0]]))


def test_both_chains_clip():
    args = flags("--clip", "1e-6", "--x_noise", "0", "--z_noise", "0")
    model = er.Revision(IMAGES, args).eval()
    z = torch.randn(6, 3)
    state = {m: v.detach() for m, v in model.generate(z).items()}
    moved = er.revise_x(model.ebm, state, 3, args)
    assert max((moved[m] - v).abs().max() for m, v in state.items()) < 1e-5
    assert (er.revise_z(model, z, state, 3, args) - z).abs().max() < 1e-6


def test_product_of_exact_experts_is_the_joint_posterior():
    a, x, sigma = {"a": 1.3, "b": -0.4}, {"a": 0.8, "b": 1.7}, 0.6

    def posterior(names):                                  # of z ~ N(0, 1), x_m ~ N(a_m z, sigma^2)
        precision = 1 + sum(a[m]**2 for m in names) / sigma**2
        mean = sum(a[m] * x[m] for m in names) / sigma**2 / precision
        return torch.tensor([[mean]]), -torch.tensor([[precision]]).log()
    mu, log_var = er.product([posterior("a"), posterior("b")], 1)
    assert torch.allclose(mu, posterior("ab")[0]) and torch.allclose(log_var, posterior("ab")[1])
    wide = torch.zeros(1, 1), torch.full((1, 1), 3.0)       # wider than the prior: says nothing
    mu, log_var = er.product([posterior("a"), wide], 1)
    assert torch.allclose(mu, posterior("a")[0]) and torch.allclose(log_var, posterior("a")[1])


@pytest.mark.parametrize("m", [2, 3])
def test_wide_experts_that_agree_do_not_send_the_product_beyond_them(m):
    """The pull of an expert is mu / var. Experts that learn from draws of their product get wider
    the further it is from them; clamped to the prior's width they would pull it further still."""
    for var_m, gain in ((1.0, m), (m, 1), (4 * m, 0.25)):   # at the prior's width: Bayes' rule
        experts = [(torch.full((1, 1), 5.0), torch.full((1, 1), math.log(var_m)))] * m
        mu, log_var = er.product(experts, 1)
        assert mu.item() == pytest.approx(5 * gain) and log_var.item() == pytest.approx(0, abs=1e-5)
        mu, log_var = er.product(experts, 1, faded=False)
        assert mu.item() == pytest.approx(5 * m) and log_var.item() == pytest.approx(0, abs=1e-5)


def test_product_under_another_prior_leaves_private_latents_alone():
    var, noise, x = 2.0, 0.6**2, torch.tensor([[0.8], [1.7]])   # z ~ N(0, 2), x_m ~ N(z, 0.36)
    q = 1 / (1 / var + 1 / noise)                           # of one observation
    w = torch.randn(1, 2), torch.randn(1, 2)
    experts = [(torch.cat([q / noise * v[None], w[0]], 1),
                torch.cat([torch.full((1, 1), math.log(q)), w[1]], 1)) for v in x]
    mu, log_var = er.product(experts, 1, var)
    both = 1 / (1 / var + 2 / noise)
    assert mu[0, 0].item() == pytest.approx(both * x.sum().item() / noise, abs=1e-5)
    assert log_var[0, 0].item() == pytest.approx(math.log(both), abs=1e-5)
    assert torch.equal(mu[:, 1:], w[0]) and torch.equal(log_var[:, 1:], w[1])
    wide = torch.zeros(1, 1), torch.ones(1, 1)
    wide = tuple(torch.cat([v, rest], 1) for v, rest in zip(wide, w))
    mu, log_var = er.product([experts[0], wide], 1, var)    # variance e > 2: says nothing
    assert mu[0, 0].item() == pytest.approx(0.8 * q / noise, abs=1e-5)
    assert log_var[0, 0].item() == pytest.approx(math.log(q), abs=1e-5)


@pytest.mark.parametrize("base", ["gaussian", "laplace"])
def test_prior_its_draws_density_and_kl(base):
    p = {"gaussian": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[base](
        torch.tensor(0.0), 1.0)
    model = er.Revision(IMAGES, flags("--base", base, "--w_dim", "2"))
    z = model.prior(40_000, "cpu")
    assert z.shape == (40_000, 3 + 2 * 2)
    assert torch.allclose(z.var(0), torch.tensor(er.prior_var(base)), rtol=0.06)
    assert torch.allclose(z.abs().mean(0), p.sample((10**6,)).abs().mean(), rtol=0.03)
    change = er.log_prior(z[:9], base) - er.log_prior(z[9:18], base)
    exact = p.log_prob(z[:9]).sum(1) - p.log_prob(z[9:18]).sum(1)
    assert torch.allclose(change, exact, atol=1e-4)
    mu, log_var = torch.tensor([[0.0, -1.3, 4.0]]), torch.tensor([[-3.0, 1.1, 0.4]])
    q = torch.distributions.Normal(mu, (log_var / 2).exp())
    grid = torch.linspace(-30, 30, 600_001)[:, None]
    kl = (q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid))).sum(0) * 1e-4
    assert torch.allclose(er.kl_to_prior(mu, log_var, base), kl.sum(), atol=1e-3)


def test_laplace_prior_in_the_z_chain():
    """Nothing observed of z: the chain's law is Laplace(0, 1), mean |z| 1 and variance 2."""
    args = flags("--z_dim", "1", "--base", "laplace", "--z_step_size", "0.3", "--z_noise", "0.3")
    model = toy(torch.zeros(1, 1), torch.zeros(1, 1), args)
    state = {"a": torch.ones(20_000, 1, 1, 1)}
    z = er.revise_z(model, torch.randn(20_000, 1), state, 250, args)
    assert z.abs().mean().item() == pytest.approx(1, abs=0.05)
    assert z.var().item() == pytest.approx(2, abs=0.15)


# ---- Private latents -----------------------------------------------------------------------------
def private(*more):
    """x_a = A (z, w_a), x_b = B (z, w_b), z and w of one dimension each."""
    args = flags("--z_dim", "1", "--w_dim", "1", "--sigma", "0.7", "--z_step_size", "0.15",
                 "--z_noise", "0.15", *more)
    a = {"a": torch.tensor([[1.0, 0.5], [0.2, -0.6]]), "b": torch.tensor([[0.3, 1.1]])}
    return toy(a["a"], a["b"], args), a, args


@pytest.mark.parametrize("observed", ["ab", "b"])
def test_z_chain_has_the_posterior_of_shared_and_private_latents(observed):
    model, a, args = private()
    x = {"a": torch.tensor([0.8, -0.3]), "b": torch.tensor([1.2])}
    wide = {"a": a["a"] @ torch.tensor([[1.0, 0, 0], [0, 1, 0]]),          # of (z, w_a, w_b)
            "b": a["b"] @ torch.tensor([[1.0, 0, 0], [0, 0, 1]])}
    precision = torch.eye(3) + sum(wide[m].T @ wide[m] for m in observed) / 0.7**2
    mean = torch.linalg.solve(precision, sum(wide[m].T @ x[m] for m in observed) / 0.7**2)
    n = 40_000
    state = {m: x[m].expand(n, -1)[..., None, None] for m in observed}
    z = er.revise_z(model, model.prior(n, "cpu"), state, 300, args)
    assert torch.allclose(z.mean(0), mean, atol=0.025)
    cov = torch.linalg.inv(precision - 0.15**2 / 4 * precision @ precision)
    assert torch.allclose(z.T.cov(), cov, atol=0.025)


@pytest.mark.parametrize("base, var", [("gaussian", 1.0), ("laplace", 2.0)])
def test_every_expert_for_z_comes_with_all_private_posteriors(base, var):
    model, _, args = private("--base", base)
    said = {m: (torch.randn(2), torch.randn(2)) for m in "ab"}
    model.encoders = nn.ModuleDict({m: Expert(*v) for m, v in said.items()})
    x = {m: torch.zeros(5, 1, 1, 1) for m in "ab"}
    for i, layout in ((0, "mean"), (1, "log variance")):
        z_a, w_a, z_b, w_b = *said["a"][i], *said["b"][i]
        for expert, z in zip(model.experts(x), (z_a, z_b)):
            assert torch.equal(expert[i], torch.stack([z, w_a, w_b]).expand(5, 3)), layout
        alone = model.experts({"b": x["b"]})
        unseen = torch.tensor(math.log(var) if i else 0.0)
        assert len(alone) == 1
        assert torch.equal(alone[0][i], torch.stack([z_b, unseen, w_b]).expand(5, 3)), layout
    u, experts = torch.randn(5, 3), model.experts(x)
    q = {(m, j): log_normal(u[:, [k]], said[m][0][j], said[m][1][j]).exp()
         for m, j, k in (("a", 0, 0), ("b", 0, 0), ("a", 1, 1), ("b", 1, 2))}
    exact = -((q["a", 0] + q["b", 0]) / 2 * q["a", 1] * q["b", 1]).log()
    assert torch.allclose(er.nll_q(u, experts, "mixture"), exact, atol=1e-4)


def test_a_decoder_sees_its_own_private_latent_alone():
    model = er.Revision(IMAGES, flags("--w_dim", "2")).eval()
    u = torch.randn(4, 3 + 2 * 2)
    made = model.generate(u)
    for columns, moved in ((slice(0, 3), "ab"), (slice(3, 5), "a"), (slice(5, 7), "b")):
        other = u.clone()
        other[:, columns] += 1
        again = model.generate(other)
        assert [m for m in IMAGES if not torch.equal(made[m], again[m])] == list(moved)
        assert list(model.generate(u, ["b"])) == ["b"]


# ---- The generator's average ---------------------------------------------------------------------
def test_chains_start_at_the_average_and_losses_do_not():
    args = flags("--ema", "0.75", "--cond_z_steps", "0")
    model, plain = er.Revision(IMAGES, args).eval(), er.Revision(IMAGES, flags())
    before = [p.clone() for p in model.starts.parameters()]
    for p in model.decoders.parameters():
        p.data += 0.01
    model.follow()
    assert all(torch.allclose(a, b + 0.0025, atol=1e-6)
               for a, b in zip(model.starts.parameters(), before))
    z = model.prior(4, "cpu")
    start = er.sample_joint(model, z, "generator", 0, args)
    plain.decoders.load_state_dict(model.starts.state_dict())
    assert torch.equal(start["b"], plain.generate(z)["b"])
    assert not torch.equal(start["b"], model.generate(z)["b"])
    plain.encoders.load_state_dict(model.encoders.state_dict())
    torch.manual_seed(0)
    seen = er.sample_q(model, {"a": start["a"]})
    torch.manual_seed(0)
    given = er.sample_given(model, {"a": start["a"]}, 0, args)
    assert torch.equal(given["b"], plain.generate(seen)["b"])
    plain.decoders.load_state_dict(model.decoders.state_dict())         # z chains: the live ones
    ends = []
    for net in (model, plain):
        torch.manual_seed(0)
        ends.append(er.revise_z(net, z, start, 2, args))
    assert torch.equal(*ends)
    x = {m: torch.rand(4, *s) for m, s in IMAGES.items()}
    live = [p.clone() for p in model.decoders.parameters()]
    average = [p.clone() for p in model.starts.parameters()]
    er.train_step(model, x, er.make_optimizers(model, args, 1), args)       # one step of generator
    assert any(not torch.equal(a, b) for a, b in zip(live, model.decoders.parameters()))
    for p, old, new in zip(model.starts.parameters(), average, model.decoders.parameters()):
        assert torch.allclose(p, 0.75 * old + 0.25 * new, atol=1e-5)


def test_warmup_loss_and_its_gradients():
    args, n = flags("--z_dim", "1", "--sigma", "0.8"), 200_000
    a, x = {"a": 1.3, "b": -0.4}, {"a": 0.8, "b": 1.7}
    model = toy(torch.tensor([[a["a"]]]), torch.tensor([[a["b"]]]), args)
    experts = {"a": Expert(torch.tensor([0.5]), torch.tensor([-1.0])),
               "b": Expert(torch.tensor([-0.3]), torch.tensor([-2.0]))}
    model.encoders = nn.ModuleDict(experts)
    loss = er.loss_warmup(model, {m: torch.full((n, 1, 1, 1), v) for m, v in x.items()}, args)
    loss.backward()
    p, mu_m = {"a": math.e, "b": math.e**2}, {"a": 0.5, "b": -0.3}          # experts' precisions
    total = p["a"] + p["b"] - 1
    mu, var = sum(p[m] * mu_m[m] for m in p) / total, 1 / total
    exact = 0.5 * (mu**2 + var - math.log(var) - 1)
    for m in p:
        exact += ((x[m] - a[m] * mu)**2 + a[m]**2 * var) / (2 * 0.8**2)
        exact += 0.25 * (p[m] * ((mu - mu_m[m])**2 + var) - math.log(p[m]) + math.log(2 * math.pi))
    assert loss.item() == pytest.approx(exact, abs=0.01)
    slope = mu - sum(a[m] * (x[m] - a[m] * mu) for m in p) / 0.8**2         # of the ELBO, at mu
    for m, expert in experts.items():                       # and -log q_m(z), z held fixed
        exact = slope * p[m] / total + 0.5 * p[m] * (mu_m[m] - mu)
        assert expert.mu.grad.item() == pytest.approx(exact, abs=0.02)
        grad = (a[m] * var + mu * (a[m] * mu - x[m])) / 0.8**2
        assert model.decoders[m].a.grad.item() == pytest.approx(grad, abs=0.02)


def test_energy_step_raises_f_on_data_against_revised():
    args = flags("--lr_ebm", "1e-2")
    torch.manual_seed(0)
    model = er.Revision(IMAGES, args)
    data, rev = ({m: torch.full((8, *s), v) for m, s in IMAGES.items()} for v in (0.5, -0.5))
    opt, gaps = torch.optim.Adam(model.ebm.parameters(), 1e-2), []
    for _ in range(10):
        loss, gap = er.loss_energy(model.ebm, data, rev)
        opt.zero_grad()
        loss.backward()
        opt.step()
        gaps.append(gap.item())
    assert gaps[-1] > gaps[0]


def test_residual_block_with_an_idle_body_pools_or_repeats():
    x = torch.randn(2, 3, 4, 6)
    for up, exact in ((False, x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))),
                      (True, x.repeat_interleave(2, 2).repeat_interleave(2, 3))):
        block = er.ResBlock(3, 3, up)
        for p in (*block.body[-1].parameters(), block.skip.bias):
            torch.nn.init.zeros_(p)
        torch.nn.init.dirac_(block.skip.weight)
        assert torch.allclose(block(x), exact, atol=1e-6)
        torch.nn.init.ones_(block.body[-1].bias)                      # the body is added after it
        assert torch.allclose(block(x), exact + 1, atol=1e-6)


@pytest.mark.parametrize("net", ["mlp", "resnet"])
@pytest.mark.parametrize("fusion", ["late", "early", "additive"])
def test_interaction_contrast_vanishes_only_for_the_additive_energy(fusion, net):
    shapes = {"a": (1, 28, 28), "b": (1, 28, 28)}
    f = er.Energy(shapes, 8, fusion, net).eval().double()
    a, a2, b, b2 = torch.randn(4, 16, 1, 28, 28).double()
    contrast = sum(s * f({"a": u, "b": v}) for s, u, v in
                   ((1, a, b), (-1, a2, b), (-1, a, b2), (1, a2, b2)))
    if fusion == "additive":
        assert contrast.abs().max() < 1e-10
    else:
        assert contrast.abs().max() > 1e-8


def test_text_state_round_trip_and_smoothing():
    model = er.Revision(TEXT, flags())
    tokens = torch.randint(9, (4, 6))
    state = model.to_state({"caption": tokens})["caption"]
    assert torch.equal(model.to_data({"caption": state})["caption"], tokens)
    assert torch.allclose(state.softmax(-1).amax(-1), torch.tensor(0.95 + 0.05 / 9))


@pytest.mark.parametrize("more", [["--z_init", "stratified"],
                                  ["--net", "resnet"], ["--nll", "mixture"], ["--rerun_chain"],
                                  ["--x_init", "noise", "--z_init", "noise"],
                                  ["--z_init", "stratified", "--nll", "mixture"],
                                  ["--w_dim", "2", "--z_init", "stratified", "--ema", "0.9"],
                                  ["--w_dim", "2", "--base", "laplace", "--nll", "mixture"],
                                  ["--fusion", "additive", "--decoder_dist", "laplace"]])
@pytest.mark.parametrize("shapes", [IMAGES, TEXT], ids=["images", "text"])
def test_every_option_trains_every_net(more, shapes):
    args = flags("--x_steps", "2", "--z_steps", "2", *more)
    model = er.Revision(shapes, args)
    before = [p.clone() for p in model.parameters()]
    x = {m: torch.rand(4, *s) if len(s) == 3 else torch.randint(s[1], (4, s[0]))
         for m, s in shapes.items()}
    opts = er.make_optimizers(model, args, 1)
    assert set(er.train_step(model, x, opts, args, "warmup")) == {"loss_warmup"}
    metrics = er.train_step(model, x, opts, args)
    assert set(metrics) == {"loss_gen", "loss_enc", "loss_ebm", "gap"}
    assert all(v.isfinite() for v in metrics.values())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert sum(changed) > 0.9 * len(changed)


def test_mixed_starts_are_shuffled_data_and_teach_the_energy_alone(monkeypatch):
    """Of 6 chains 3 start at data of which modality j is item i + j's, the others at the generator;
    with no step they end there. No other net learns in this phase."""
    args, seen = flags("--x_steps", "0", "--ebm_reg", "0.3"), []
    model = er.Revision(IMAGES, args)
    state = model.to_state(x := {m: torch.rand(6, *s) for m, s in IMAGES.items()})
    monkeypatch.setattr(er, "loss_energy", lambda *a, f=er.loss_energy: seen.extend(a[2:]) or f(*a))
    before = {k: v.clone() for k, v in model.named_parameters()}
    torch.manual_seed(3)
    made = model.generate(torch.randn(6, model.z_dim))
    torch.manual_seed(3)
    er.train_step(model, x, er.make_optimizers(model, args, 1), args, "mixed")
    for j, m in enumerate(IMAGES):
        assert torch.equal(seen[0][m][:3], state[m][j:j + 3])
        assert torch.allclose(seen[0][m][3:], made[m][3:], atol=1e-5)
    moved = {k.split(".")[0] for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {"ebm"} and seen[1] == 0.3                             # the penalty's weight


def test_toy_with_four_modes_needs_the_generators_start():
    found = {v: toy_revision.experiment(v, 0, 40)[0] for v in ("full", "both from noise")}
    assert found["full"]["revised"] > 0.7 > 0.5 > found["both from noise"]["revised"]
    assert found["full"]["initial"] > found["full"]["noise"] + 0.3


def test_frozen_gives_a_net_back_also_after_an_error():
    net = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), er.frozen(net):
        assert not net.training and not net.weight.requires_grad
        1 / 0
    assert net.training and net.weight.requires_grad
