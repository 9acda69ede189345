"""The latent EBM prior's densities, bounds, samplers and steps against closed forms."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, Normal

import latent_ebm_prior as lep

SHAPES = {"a": (1, 4, 4), "b": (3, 4, 4), "c": (1, 4, 4)}


def options(*flags):
    return lep.parse_args(["--dataset", "paired", "--z_dim", "3", "--w_dim", "2", "--ebm_hidden",
                           "8", "--prior_steps", "3", "--post_steps", "3", "--chains", "16",
                           *flags])


def build(*flags, shapes=SHAPES, b=5):
    args = options(*flags)
    torch.manual_seed(0)
    model = lep.MMVAEPlus(shapes, args).double()
    torch.nn.init.normal_(model.aux)
    x = {m: torch.rand(b, *s, dtype=torch.float64) for m, s in shapes.items()}
    return model, x, args


def optimisers(model, args):
    return lep.make_optimisers(model, args, SimpleNamespace(world=1))


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


# ---- Nets and densities --------------------------------------------------------------------------
def test_parameter_counts_of_the_published_nets():
    model = lep.MMVAEPlus({f"m{i}": (3, 28, 28) for i in range(5)},
                          lep.parse_args(["--dataset", "polymnist"]))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in
             (("all", model), ("ebm", model.ebm), ("tower", model.encoders["m0"]["z"]),
              ("decoder", model.decoders["m0"]))}
    assert count == {"all": 22_156_655 + 47_001, "ebm": 47_001, "tower": 1_473_024,
                     "decoder": 1_485_251}
    pair = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}
    args = lep.parse_args(["--dataset", "mnist_svhn"])
    model = lep.MMVAEPlus(pair, args)
    for m, shape in pair.items():
        mu_z, _, mu_w, _ = model.encode({m: torch.rand(1, *shape)})
        z = torch.randn(2, 3, 20)
        assert mu_z.shape == (1, 1, 20) and mu_w.shape == (1, 1, 0)
        assert model.decode(m, z, z[..., :0]).shape == (2, 3, *shape)
    assert args.rescale and model.weight == {"mnist": 3072 / 784, "svhn": 1.0}


def test_birds_have_the_published_nets_of_images_and_captions_as_categoricals():
    """CUB's ResNets reach 2 x 2 by five halvings; log_lik of tokens is Categorical's, for any
    leading dimensions; weights are lambda_m, and must be as many as modalities."""
    shapes = {"image": (3, 64, 64), "caption": (32, 11)}
    args = lep.parse_args(["--dataset", "cub", "--width", "4", "--post_steps", "2"])
    model = lep.MMVAEPlus(shapes, args)
    tower = model.encoders["image"]["z"]
    assert tower.mu.in_features == 4 * 4 * 2 * 2 and model.weight["caption"] == 5
    assert [b.conv2.out_channels for b in tower.body if isinstance(b, lep.ResBlock)] == [
        4, 8, 16, 16, 16, 16]
    x = {"image": torch.rand(2, 3, 64, 64), "caption": torch.randint(11, (2, 32))}
    mu_z, _, mu_w, _ = model.encode(x)
    z, w = torch.randn(2, 5, *mu_z.shape[1:]), torch.randn(2, 5, *mu_w.shape[1:])
    assert model.decode("image", z, w).shape == (2, 5, 2, 3, 64, 64)
    logits = model.decode("caption", z, w)
    exact = Categorical(logits=logits).log_prob(x["caption"].expand(2, 5, 2, 32)).sum(-1)
    assert torch.allclose(lep.log_lik(x["caption"], logits, args), exact, atol=1e-4)
    assert torch.allclose(lep.log_lik(x["caption"], logits[0, 0], args), exact[0, 0], atol=1e-4)
    opts = optimisers(model, args)
    assert all(v.isfinite() for v in lep.train_step(model, x, opts, args).values())
    end = lep.sample_posterior(model, {"caption": x["caption"]}, args, 2, True)
    assert end.shape == (2, 48 + 2 * 16) and end.isfinite().all()
    with pytest.raises(ValueError, match="--weight: give 2, one for each of image, caption"):
        lep.MMVAEPlus(shapes, lep.parse_args(["--dataset", "cub", "--weight", "1"]))


def test_patch_nets_see_and_draw_each_patch_in_its_place():
    """A change of one 4 x 4 patch reaches the features only through that patch's columns, and the
    decoder's own features of a patch fill that patch alone."""
    shape, a = (3, 8, 12), 5
    tower, n_features = lep.body(shape, "patch", a)
    x = torch.rand(2, *shape)
    assert tower(x).shape == (2, n_features)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 6, 48)
    assert torch.equal(tower[0](x), patches)
    draw = lep.decoder(shape, "patch", a, 7)
    assert draw(torch.randn(2, 7)).shape == (2, *shape)
    features = torch.randn(2, 6 * a)
    moved = features.clone()
    moved[:, 4 * a:5 * a] += 1                                             # row 1, column 1
    same = (draw[4:](features) == draw[4:](moved)).all(1).all(0)
    assert not same[4:8, 4:8].any() and same.sum() == 96 - 16


@pytest.mark.parametrize("net, shape", [("mlp", (1, 28, 28)), ("conv", (3, 32, 32)),
                                        ("patch", (3, 28, 28)), ("resnet", (3, 28, 28))])
def test_a_pixel_far_below_its_target_is_pulled_as_hard_as_a_near_one(net, shape):
    """D8; a saturated sigmoid would let go of it."""
    decode = lep.decoder(shape, net, 8, 4)
    bias = list(decode.parameters())[-1]                                   # of the image
    grads = []
    for value in (-50.0, -5.0):
        torch.nn.init.constant_(bias, value)
        lep.log_lik(torch.full((2, *shape), 0.5), decode(torch.randn(2, 4)),
                    options()).sum().backward()
        grads.append(bias.grad)
        bias.grad = None
    assert torch.equal(*grads) and grads[0].min() > 0


def test_sigmoid_ends_every_decoder_only_if_asked():
    shapes = {"a": (1, 28, 28), "b": (3, 32, 32)}
    for flags, bounded in (([], False), (["--sigmoid"], True)):
        model = lep.MMVAEPlus(shapes, options("--net", "mlp", *flags))
        z, w = 30 * torch.randn(9, 3), 30 * torch.randn(9, 2)
        images = [model.decode(m, z, w) for m in shapes]
        assert all((0 <= x.min() and x.max() <= 1) == bounded for x in images)


def test_densities_are_those_of_torch():
    z, mu, scale = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) + 0.1
    assert torch.allclose(lep.log_laplace(z, mu, scale), Laplace(mu, scale).log_prob(z).sum(-1))
    for base, dist in (("laplace", Laplace), ("gaussian", Normal)):
        args = options("--base", base, "--base_scale", "1.7")
        assert torch.allclose(lep.log_base(z, args), dist(0.0, 1.7).log_prob(z).sum(-1))
    x, mean = torch.rand(5, 3, 2, 2).double(), torch.randn(7, 5, 3, 2, 2).double()
    for name, dist in (("laplace", Laplace), ("normal", Normal)):
        ours = lep.log_lik(x, mean, options("--decoder_dist", name, "--decoder_scale", "0.4"))
        assert torch.allclose(ours, dist(mean, 0.4).log_prob(x).sum((-1, -2, -3)))


def test_laplace_samples_have_the_right_law_and_gradient():
    mu, scale = torch.tensor(1.5, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    torch.manual_seed(1)
    z = lep.sample_laplace(mu.expand(400_000), scale.expand(400_000))
    assert abs(z.mean() - 1.5) < 0.01 and abs((z - 1.5).abs().mean() - 0.7) < 0.01
    assert abs((z < 1.5 - 0.7 * math.log(2)).float().mean() - 0.25) < 0.005
    (z - 1.5).square().mean().backward()                     # variance 2 scale^2: slope 4 scale
    assert abs(scale.grad - 2.8) < 0.1 and abs(mu.grad) < 0.02
    assert lep.sum_to_dim(torch.randn(5, 4)).sum(-1).allclose(torch.tensor(4.0), atol=1e-4)


def test_the_mixture_of_experts_is_torchs_mixture():
    mu, scale, z = torch.randn(3, 5, 2), torch.rand(3, 5, 2) + 0.2, torch.randn(4, 7, 5, 2)
    ours = lep.log_experts(z, mu, scale).logsumexp(0) - math.log(3)
    parts = Independent(Laplace(mu.permute(1, 0, 2), scale.permute(1, 0, 2)), 1)
    theirs = MixtureSameFamily(Categorical(torch.ones(5, 3)), parts).log_prob(z)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("act", ["gelu", "lrelu"])
@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_closed_form_gradient_is_autograds(bound, act):
    ebm = lep.EBM(4, 16, bound, act).double()
    z = (3 * torch.randn(9, 4, dtype=torch.float64)).requires_grad_(True)
    (grad,) = torch.autograd.grad(ebm(z).sum(), z)
    assert torch.allclose(ebm.gradient(z), grad, atol=1e-12)
    assert not bound or ebm(1e6 * z).abs().max() <= bound
    ebm(z, fixed=True).sum().backward()
    assert torch.allclose(z.grad, grad) and all(p.grad is None for p in ebm.parameters())


@pytest.mark.parametrize("flags", [("--base", "laplace"), ("--base", "gaussian", "--ebm_on", "u")])
def test_prior_gradient_is_that_of_the_prior(flags):
    model, _, args = build(*flags, "--base_scale", "1.3")
    model.ebm.unit[:3] = torch.tensor([0.5, 1.0, 3.0])                     # --whiten
    u = lep.start_prior(model, 6, args, "cpu").double().requires_grad_(True)
    z, w = u[:, :3], u[:, 3:]
    log_p = lep.log_prior(model, z, w.split(2, 1), args, True) + lep.log_laplace(w, 0.0, 1.0)
    (grad,) = torch.autograd.grad(log_p.sum(), u)
    assert torch.allclose(lep.prior_gradient(model, u.detach(), args), grad, atol=1e-12)


# ---- Bounds --------------------------------------------------------------------------------------
@pytest.mark.parametrize("t, flags", [
    (1, ()), (1, ("--beta", "2.5", "--rescale")), (1, ("--objective", "iwae", "--k", "3")),
    (1, ("--no-private",)), (1, ("--ebm_on", "u", "--base", "gaussian")),
    (1, ("--decoder_dist", "normal")), (0.4, ("--beta", "2.5", "--objective", "iwae", "--k", "3"))])
def test_objective_is_the_sum_over_experts_written_out(t, flags, monkeypatch):
    """t < 1: no expert explains its own modality, scales and beta are t times theirs (D9)."""
    model, x, args = build(*flags)
    likelihood = Laplace if args.decoder_dist == "laplace" else Normal
    monkeypatch.setattr(lep, "sample_laplace", lambda mu, s: mu + s * torch.linspace(
        -1, 2, mu.shape[1], dtype=mu.dtype).reshape(-1, 1, 1) if mu.ndim == 4 else mu + s)
    ours = lep.objective(model, x, args, True, t)
    mu_z, s_z, mu_w, s_w = (p.detach() for p in model.encode(x))
    names, d_w, total = list(SHAPES), model.w_dim, 0.0
    shift = torch.linspace(-1, 2, args.k, dtype=torch.float64)
    for m in range(3):
        log_w = []
        for k in range(args.k):
            z, w = mu_z[m] + shift[k] * t * s_z[m], mu_w + shift[k] * t * s_w  # [b d], [n b d]
            log_p = lep.log_base(z, args) + Laplace(0, 1).log_prob(w[m]).sum(-1)
            u = z if args.ebm_on == "z" else torch.cat([z, *w], 1)
            log_p = log_p + model.ebm(u)
            q = torch.stack([Laplace(mu_z[j], s_z[j]).log_prob(z).sum(1).exp() for j in range(3)])
            log_q = q.mean(0).log() + Laplace(mu_w[m], s_w[m]).log_prob(w[m]).sum(1)
            lik = 0.0
            for n, name in enumerate(names):
                aux = shift[k] * t * lep.sum_to_dim(model.aux[n])
                code = w[n] if n == m else aux.expand(5, d_w)
                mean = model.decoders[name](torch.cat([code, z], 1))
                log_p_n = likelihood(mean, 0.75).log_prob(x[name]).sum((1, 2, 3))
                lik = lik + model.weight[name] * log_p_n * (t == 1 or n != m)
            log_w.append(lik + t * args.beta * (log_p - log_q))
        total = total + (torch.stack(log_w).logsumexp(0) - math.log(args.k)) / 3
    expected = total.mean()
    assert ours["bound_nats"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert ours["loss"].item() == pytest.approx(-expected.item(), rel=1e-9)
    dim = 3 + 6 * (args.ebm_on == "u")
    assert ours["z_pos"].shape == (15 * args.k, dim) and not ours["z_pos"].requires_grad


def toy_weight(z, w, q, beta=1.0):
    """A target that is no Laplace, w private: [m k b]."""
    log_p = Normal(torch.tensor(0.8), 0.6).log_prob(z).sum(-1) + \
        Normal(0.3 * z, 1.1).log_prob(w).sum(-1)
    log_q = lep.log_experts(z, *q[:2]).logsumexp(0) - math.log(len(z))
    return log_p + beta * (-log_q - lep.log_laplace(w, q[2][:, None], q[3][:, None]))


def toy_gradients(surrogate, n, beta, k, private):
    q = [torch.tensor(v).reshape(2, 1, 1).requires_grad_(True) for v in
         ([0.2, 1.4], [0.7, 0.4], [0.1, -0.5], [1.2, 0.8])]
    if not private:
        q[2:] = [torch.zeros(2, 1, 0), torch.ones(2, 1, 0)]
    wide = [p.expand(2, n, p.shape[-1]) for p in q]
    expand = [p[:, None].expand(2, k, n, p.shape[-1]) for p in wide]
    z, w = lep.sample_laplace(*expand[:2]), lep.sample_laplace(*expand[2:])
    if surrogate == "dreg":
        bound = lep.dreg_surrogate(lambda z, w, q: toy_weight(z, w, q, beta), z, w, wide, beta)
    else:
        bound = lep.importance_bound(toy_weight(z, w, wide, beta))
    leaves = [p for p in q if p.requires_grad]
    value = lep.importance_bound(toy_weight(z, w, wide, beta)).mean().item()
    return value, torch.cat([g.flatten() for g in torch.autograd.grad(bound.mean(), leaves)])


@pytest.mark.parametrize("beta, k, private", [(1.0, 2, False), (1.0, 5, True), (2.5, 3, True)])
def test_dreg_and_iwae_have_the_same_mean_gradient_and_dreg_less_noise(beta, k, private):
    torch.manual_seed(0)
    draws = {s: torch.stack([toy_gradients(s, 20_000, beta, k, private)[1] for _ in range(30)])
             for s in ("iwae", "dreg")}
    mean = {s: g.mean(0) for s, g in draws.items()}
    error = (draws["iwae"].var(0) / 30 + draws["dreg"].var(0) / 30).sqrt()
    assert ((mean["iwae"] - mean["dreg"]).abs() < 4.5 * error).all()
    if beta == 1:
        assert (draws["dreg"].var(0) < draws["iwae"].var(0)).float().mean() > 0.7


def test_while_draws_are_narrowed_dreg_is_iwae():
    """Its scores are those of q, and a draw of scale t s is not q's."""
    found = []
    for objective in ("iwae", "dreg"):
        model, x, args = build("--objective", objective, "--k", "3")
        torch.manual_seed(1)
        lep.objective(model, x, args, False, 0.5)["loss"].backward()
        found.append(torch.cat([g.flatten() for g in grads(model.encoders.parameters())]))
    assert torch.equal(*found) and found[0].abs().sum() > 0


def test_dreg_reports_the_bound_and_not_its_surrogate():
    model, x, _ = build()
    found = {}
    for name in ("iwae", "dreg"):
        torch.manual_seed(1)
        args = options("--objective", name, "--k", "4", "--beta", "2")
        found[name] = lep.objective(model, x, args, True)["bound_nats"].item()
    assert found["dreg"] == pytest.approx(found["iwae"], rel=1e-12)


def test_f_on_all_latents_reaches_w_in_its_own_experts_term_only(monkeypatch):
    model, x, args = build("--ebm_on", "u")
    seen = []
    monkeypatch.setattr(lep, "log_prior", lambda model, z, w_all, args, use_ebm: seen.append(
        w_all) or lep.log_base(z, args))
    lep.objective(model, x, args, True)
    for n, name in enumerate(model.modalities):
        bias = [p for p in model.encoders[name]["w"].parameters()][-1]
        for m in range(3):
            (grad,) = torch.autograd.grad(seen[0][n, m].sum(), bias, retain_graph=True)
            assert (grad.abs().sum() > 0) == (n == m)


def test_looser_iwae_and_dreg_against_quadrature():
    mu, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True)
                 for v in ([0.2, 1.4], [0.7, 0.4]))
    t = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500 - 0.5       # quantiles
    t = -t.sign() * torch.log1p(-2 * t.abs())
    exact = 0.0
    for m in range(2):
        z = mu[m] + scale[m] * t
        log_q = Laplace(mu[:, None], scale[:, None]).log_prob(z).logsumexp(0) - math.log(2)
        log_w = Normal(torch.tensor(0.8, dtype=torch.float64), 0.6).log_prob(z) - log_q
        exact = exact + (torch.logaddexp(log_w[:, None], log_w) - math.log(2)).mean() / 2  # K = 2
    grad = torch.cat(torch.autograd.grad(exact, (mu, scale)))
    torch.manual_seed(0)
    for surrogate in ("iwae", "dreg"):
        runs = [toy_gradients(surrogate, 50_000, 1.0, 2, False) for _ in range(12)]
        value, draws = sum(v for v, _ in runs) / 12, torch.stack([g for _, g in runs])
        assert value == pytest.approx(exact.item(), abs=2e-3)
        error = draws.std(0) / math.sqrt(12)
        assert ((draws.mean(0) - grad).abs() < 5 * error + 2e-3).all(), surrogate


def test_iwae_grows_with_k_towards_the_evidence():
    torch.manual_seed(0)
    values = [toy_gradients("iwae", 20_000, 1.0, k, False)[0] for k in (1, 5, 50)]
    assert values[0] < values[1] < values[2] < 0.002 and values[2] > -0.02     # log 1


def test_a_target_costs_one_decoder_call(monkeypatch):
    model, x, args = build("--objective", "iwae", "--k", "2")
    calls = []
    for m, net in model.decoders.items():
        net.register_forward_hook(lambda _, u, __, m=m: calls.append((m, len(u[0]))))
    lep.objective(model, x, args, True)
    assert calls == [("a", 30), ("b", 30), ("c", 30)]


# ---- Samplers ------------------------------------------------------------------------------------
def test_langevin_settles_at_its_biased_variance():
    torch.manual_seed(0)
    for s, v in ((0.4, 1.0), (0.8, 2.0)):
        z = lep.langevin(lambda z: -(z**2).sum(1) / (2 * v), torch.randn(20_000, 4), 100, s)
        assert z.var().item() == pytest.approx(v / (1 - s**2 / (4 * v)), rel=0.015)


@pytest.mark.parametrize("step, expected", [(0.1, 1.005), (0.4, 1.044)])
def test_chains_of_the_flat_ebm_follow_the_base(step, expected):
    model, _, args = build("--prior_step_size", str(step), "--bound", "0")
    for p in model.ebm.parameters():
        torch.nn.init.zeros_(p)
    model.float()
    z = lep.sample_prior(model, 30_000, args, "cpu", n_steps=60)
    assert z.abs().mean().item() == pytest.approx(expected, abs=0.015)
    z = lep.sample_prior(model, 30_000, args, "cpu", n_steps=0)
    assert z.abs().mean().item() == pytest.approx(1.0, abs=0.015)


def test_compiled_chains_are_the_plain_ones(monkeypatch):
    """--compile: ten steps a graph without a break, the rest in another; traced with the kernels
    and random numbers of eager mode, so that the ends are equal to the bit."""
    model, _, args = build()
    model.float()
    compiled = torch.compile(lep.prior_chain, backend="eager", fullgraph=True)
    calls = []
    monkeypatch.setattr(lep, "compiled_chain",
                        lambda _: lambda *a: calls.append(a[2]) or compiled(*a))
    ends = []
    for args.compile in (False, True):
        torch.manual_seed(0)
        ends.append(lep.sample_prior(model, 8, args, "cpu", n_steps=23))
    assert torch.equal(*ends) and calls == [10, 10, 3]


def test_whitened_chains_live_in_units_of_the_latents():
    """Gaussian base and f = 0: standard deviation unit, ULA's bias that of a step in units; the
    Metropolis test sees the same chain; f(z) is f of z in units."""
    model, _, args = build("--base", "gaussian", "--bound", "0", "--prior_step_size", "0.8",
                           "--no-private")
    f = copy.deepcopy(model.ebm)
    unit = model.ebm.unit.copy_(torch.tensor([0.1, 1.0, 5.0]))
    z = torch.randn(7, 3, dtype=torch.float64)
    assert torch.allclose(model.ebm(unit * z), f(z))
    rates = []
    for net in (f, model.ebm):
        torch.manual_seed(0)
        rates.append(lep.metropolis_rate(lambda z: net(z) - ((z / net.unit)**2).sum(1) / 2,
                                         lambda z: net.gradient(z) - z / net.unit**2,
                                         net.unit * z, 0.8 * net.unit))
    assert torch.allclose(*rates) and rates[0] < 0.999
    for p in model.ebm.parameters():
        torch.nn.init.zeros_(p)
    model.float()
    for n_steps, variance in ((0, 1.0), (60, 1 / (1 - 0.8**2 / 4))):
        z = lep.sample_prior(model, 40_000, args, "cpu", n_steps=n_steps)
        assert torch.allclose(z.var(0) / unit.float()**2, torch.tensor(variance), rtol=0.03)
    own = lep.draw_prior(model, 40_000, args, "cpu", 0)                    # the autoencoder's p0
    assert torch.allclose(own.var(0), torch.ones(3), rtol=0.03)


def test_blur_and_tweedies_formula():
    """z ~ N(0, (1 - s^2) unit^2), blurred by s units, is N(0, unit^2): the base prior with f = 0,
    and the mean of z given the blurred one is 1 - s^2 times it."""
    model, _, args = build("--base", "gaussian", "--smooth", "0.6", "--no-private",
                           "--ebm_warmup", "150", "--epochs_ebm", "1")
    unit = model.ebm.unit.copy_(torch.tensor([0.1, 1.0, 5.0]))
    for p in model.ebm.parameters():
        torch.nn.init.zeros_(p)
    torch.manual_seed(0)
    z = 0.8 * unit * torch.randn(50_000, 3, dtype=torch.float64)
    u = lep.blur(model, z, args)
    assert torch.allclose((u - z).std(0), 0.6 * unit, rtol=0.02)
    assert torch.allclose(lep.denoise(model, u, args), (1 - 0.36) * u)
    error = lep.denoise(model, u, args) - z
    assert torch.allclose(error.std(0), 0.8 * 0.6 * unit, rtol=0.02)       # the posterior's
    _, _, plain = build()
    assert lep.blur(model, z, plain) is z and torch.equal(lep.denoise(model, u, plain), u)


def test_f_learns_from_blurred_positives(monkeypatch):
    model, _, args = build("--smooth", "0.5", "--ebm_warmup", "150", "--epochs_ebm", "1")
    seen, forward = [], lep.EBM.forward
    monkeypatch.setattr(lep.EBM, "forward", lambda self, z, *a: seen.append(z) or
                        forward(self, z, *a))
    z_pos = torch.randn(4000, 3, dtype=torch.float64)
    lep.ebm_step(model, z_pos, optimisers(model, args)["ebm"], args, 1)
    assert (seen[0] - z_pos).std().item() == pytest.approx(0.5, rel=0.03)


def test_langevin_leaves_its_input_alone_and_rows_apart():
    z = torch.randn(6, 2, requires_grad=True)
    before, trace = z.detach().clone(), []
    torch.manual_seed(3)
    end = lep.langevin(lambda z: -(z**4).sum(1), z, 5, 0.1, trace=trace)
    assert torch.equal(z, before) and not end.requires_grad and len(trace) == 5
    assert torch.equal(trace[-1], end)
    other = torch.cat([before[:3], 5 * before[3:]])
    torch.manual_seed(3)
    assert torch.equal(lep.langevin(lambda z: -(z**4).sum(1), other, 5, 0.1)[:3], end[:3])
    torch.manual_seed(3)
    closed = lep.langevin(None, before, 5, 0.1, gradient=lambda z: -4 * z**3)
    assert torch.allclose(closed, end, atol=1e-6)


def test_posterior_chain_reaches_the_posterior_of_quadrature():
    """One modality of 8 pixels, one z, no w: mean and variance of exp(f) p0 p(x|z)."""
    shapes = {"a": (1, 2, 4)}
    model, x, args = build("--z_dim", "1", "--no-private", "--base", "gaussian",
                           "--post_step_size", "0.1", "--beta", "2.0", shapes=shapes, b=1)
    with torch.no_grad():
        model.ebm.layers[2].weight.mul_(8)

    class Ramp(torch.nn.Module):                        # as a decoder: mean image z * ramp
        def forward(self, u):
            return u.reshape(-1, 1, 1, 1) * torch.linspace(0.5, 1.5, 8).double().reshape(1, 2, 4)

    model.decoders["a"] = Ramp()
    axis = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    log_p = Normal(0, 1).log_prob(axis[:, 0]) + model.ebm(axis) + 0.5 * Laplace(
        model.decoders["a"](axis), 0.75).log_prob(x["a"]).sum((1, 2, 3))
    same = {"a": x["a"].expand(4001, 1, 2, 4)}
    assert torch.allclose(lep.log_joint(model, same, axis, args, True), log_p, atol=1e-9)
    p = log_p.softmax(0).detach()
    mean = (p * axis[:, 0]).sum()
    var = (p * (axis[:, 0] - mean) ** 2).sum()
    many = {"a": x["a"].expand(8000, 1, 2, 4)}
    torch.manual_seed(0)
    z = lep.sample_posterior(model, many, args, 400, True)[:, 0]
    assert z.mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert z.var().item() == pytest.approx(var.item(), rel=0.06)


def test_log_joint_counts_the_observed_only_and_tempers():
    model, x, args = build("--beta", "2.5")
    v = torch.randn(5, 9, dtype=torch.float64)
    z, w = v[:, :3], [v[:, 3:5], v[:, 5:7], v[:, 7:]]
    prior = model.ebm(z) + sum(Laplace(0, 1).log_prob(p).sum(1) for p in (z, *w))
    lik = [Laplace(model.decoders[m](torch.cat([w[i], z], 1)), 0.75).log_prob(x[m]).sum((1, 2, 3))
           for i, m in enumerate(SHAPES)]
    ours = lep.log_joint(model, {"b": x["b"]}, v, args, True)
    assert torch.allclose(ours, prior + lik[1] / 2.5)
    args.temper = False
    assert torch.allclose(lep.log_joint(model, x, v, args, False),
                          prior - model.ebm(z) + sum(lik))


def test_start_posterior_mixes_experts_and_draws_missing_w_from_the_prior():
    model, x, args = build(b=2)
    x = {m: v[:1].expand(6000, *v.shape[1:]) for m, v in x.items()}
    mu_z, _, mu_w, s_w = model.encode({m: v[:1] for m, v in x.items()})
    v = lep.start_posterior(model, {m: x[m] for m in ("a", "c")}, args)
    z, w = model.split(v)
    assert torch.allclose(z.mean(0), (mu_z[0, 0] + mu_z[2, 0]) / 2, atol=0.1)
    expected = torch.stack([mu_w[0, 0], 0 * mu_w[1, 0], mu_w[2, 0]])
    assert torch.allclose(w.mean(1), expected, atol=0.1)
    assert torch.allclose((w[0] - mu_w[0, 0]).abs().mean(0), s_w[0, 0], atol=0.1)


@pytest.mark.parametrize("source", ["prior", "aux"])
def test_w_that_is_not_given_is_of_p_w_or_of_the_auxiliary_priors(source):
    model, x, args = build("--w_test", source)
    x = {m: v[:1].expand(20_000, *v.shape[1:]) for m, v in x.items()}
    scale = torch.ones(3, 2).double() if source == "prior" else lep.sum_to_dim(model.aux.detach())
    w = model.split(lep.start_posterior(model, {"b": x["b"]}, args))[1]
    for m in (0, 2):                                                       # a and c
        assert torch.allclose(w[m].abs().mean(0), scale[m], rtol=0.04)
    seen = {}
    for m in SHAPES:
        model.decoders[m].register_forward_hook(lambda net, given, out, m=m: seen.update(
            {m: given[0][:, :2]}))
    lep.joint_images(model, torch.zeros(20_000, 3).double(), args)
    for i, m in enumerate(SHAPES):
        assert torch.allclose(seen[m].abs().mean(0), scale[i], rtol=0.04)


@pytest.mark.parametrize("ebm_on", ["z", "u"])
def test_base_samples_have_w_as_asked_and_no_pixel_outside_of_0_and_1(ebm_on, monkeypatch):
    model, _, args = build("--ebm_on", ebm_on, "--w_test", "aux")
    monkeypatch.setattr(lep, "draw_w", lambda model, n, source: {"aux": torch.full(
        (3, n, 2), 7.0, dtype=torch.float64)}[source])
    seen = []
    monkeypatch.setattr(model, "decode", lambda m, z, w: seen.append(w) or z.new_tensor([-3, 5.]))
    z = lep.draw_prior(model, 4, args, "cpu", 0)
    assert z.shape == (4, 3)
    made = lep.joint_images(model, z.double(), args)
    assert all((w == 7).all() for w in seen) and made["a"].tolist() == [0, 1]
    u = lep.draw_prior(model, 4, args, "cpu", 0) if ebm_on == "z" else torch.zeros(4, 9)
    lep.joint_images(model, u.double(), args)                               # f's own w stay
    assert (seen[-1] == (7 if ebm_on == "z" else 0)).all()


def test_amp_leaves_the_parameters_of_posteriors_in_full_precision():
    model, x, _ = build()
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        q = model.encode({m: v.float() for m, v in x.items()})
    assert all(p.dtype == torch.float32 for p in q)
    assert not torch.equal(q[1], q[1].bfloat16().float())                   # nor rounded before


@pytest.mark.parametrize("base", ["laplace", "gaussian"])
def test_a_posterior_chain_from_noise_starts_at_the_base_prior(base):
    model, x, args = build("--base", base, "--base_scale", "3", "--w_test", "aux", b=1)
    x = {m: v.expand(20_000, *v.shape[1:]) for m, v in x.items()}
    z, w = model.split(lep.start_posterior(model, x, args, "noise"))
    want = 3 if base == "laplace" else 3 * math.sqrt(2 / math.pi)          # mean |z|
    assert torch.allclose(z.abs().mean(0), torch.full((3,), want).to(z), rtol=0.04)
    assert torch.allclose(w.abs().mean(1), torch.ones(3, 2).to(w), rtol=0.04)


def test_probes_read_the_class_where_it_is(monkeypatch):
    """The class is in z and in w_c, nowhere else."""
    model, _, args = build()
    monkeypatch.setattr(lep, "encoded", lambda model, s, *_: s.v)
    def items(n):
        v, y = torch.randn(n, 9), torch.arange(n) % 2
        v[:, [0, 8]] += 20 * y[:, None]
        return SimpleNamespace(v=v, y=y, head=lambda k: SimpleNamespace(v=v[:k], y=y[:k]))
    torch.manual_seed(0)
    found = lep.probe_latents(model, items(2500), items(3000), args, SimpleNamespace(device="cpu"))
    assert list(found) == [f"latent_accuracy_{k}" for k in ("z", "w_a", "w_b", "w_c")]
    right, blank = [found[f"latent_accuracy_{k}"] for k in ("z", "w_c")], \
        [found[f"latent_accuracy_{k}"] for k in ("w_a", "w_b")]
    assert min(right) == 1 and 0.45 < min(blank) <= max(blank) < 0.55


def test_posterior_chain_raises_log_p():
    model, x, args = build("--post_step_size", "0.05")
    x = {m: v.repeat(40, 1, 1, 1) for m, v in x.items()}
    start = 2 * torch.randn(200, 9, dtype=torch.float64)
    end = lep.langevin(lambda v: lep.log_joint(model, x, v, args, True), start, 40, 0.05)
    assert lep.log_joint(model, x, end, args, True).mean() > \
        lep.log_joint(model, x, start, args, True).mean() + 0.2


def test_metropolis_rate_is_that_of_the_proposal_densities():
    torch.manual_seed(0)
    z, s = torch.randn(200_000, 1), 0.9
    rate = lep.metropolis_rate(lambda z: -(z**2).sum(1) / 2, lambda z: -z, z, s)
    new = Normal((1 - s**2 / 2) * z, s).sample()
    ratio = Normal(0, 1).log_prob(new) - Normal(0, 1).log_prob(z) + \
        Normal((1 - s**2 / 2) * new, s).log_prob(z) - Normal((1 - s**2 / 2) * z, s).log_prob(new)
    assert rate.item() == pytest.approx(ratio.clamp_max(0).exp().mean().item(), abs=3e-3)
    assert rate < 0.99
    small = lep.metropolis_rate(lambda z: -(z**2).sum(1) / 2, lambda z: -z, z, 0.05)
    assert small > 0.999


# ---- Learning ------------------------------------------------------------------------------------
def test_one_ebm_step_lifts_the_data_over_the_chains():
    model, _, args = build("--lr_ebm", "0.01")
    model.float()
    before, z_pos = copy.deepcopy(model.ebm), 2 + torch.randn(200, 3)
    metrics = lep.ebm_step(model, z_pos, optimisers(model, args)["ebm"], args, 1)
    z_neg = lep.sample_prior(model, 2000, args, "cpu")
    rise = model.ebm(z_pos).mean() - before(z_pos).mean() - \
        (model.ebm(z_neg).mean() - before(z_neg).mean())
    assert rise > 0.01
    f_pos, f_neg = torch.tensor([1.0, 3.0]), torch.tensor([0.5])
    assert lep.ebm_loss(f_pos, f_neg, 0.1).item() == pytest.approx(0.5 - 2 + 0.1 * (5 + 0.25))
    assert metrics["gap"] == pytest.approx((metrics["f_pos"] - metrics["f_neg"]).item(), abs=1e-6)


def test_a_one_dimensional_ebm_is_learned_to_two_percent():
    """Total variation between exp(f) p0 / Z, Z by quadrature, and a target with two modes."""
    args = options("--z_dim", "1", "--no-private", "--ebm_hidden", "16", "--prior_steps", "100",
                   "--prior_step_size", "0.3", "--chains", "500", "--base", "gaussian",
                   "--base_scale", "1.5")
    model, axis = lep.MMVAEPlus({"a": (1, 2, 2)}, args), torch.linspace(-8, 8, 4001)[:, None]
    target = MixtureSameFamily(Categorical(torch.tensor([0.65, 0.35])),
                               Normal(torch.tensor([-0.8, 1.2]), torch.tensor([0.8, 0.7])))
    q = target.log_prob(axis[:, 0]).softmax(0)
    z_pos = axis[torch.searchsorted(q.cumsum(0), (torch.arange(2000) + 0.5) / 2000)]
    opt, mean = torch.optim.Adam(model.ebm.parameters(), 0.02), copy.deepcopy(model.ebm)
    for i in range(160):
        opt.param_groups[0]["lr"] = 0.02 * (1 - i / 160) + 1e-4
        lep.ebm_step(model, z_pos, opt, args, 1)
        weight = 1.0 if i < 80 else 1 / (i - 79)                  # the mean of the last 80 steps
        for a, b in zip(mean.parameters(), model.ebm.parameters()):
            a.data.lerp_(b.data, weight)
    p0 = lep.log_base(axis, args)
    tv = [0.5 * ((p0 + f).detach().softmax(0) - q).abs().sum() for f in (mean(axis), 0.0)]
    assert tv[0] < 0.02 and tv[1] > 0.1, tv


def test_vae_loss_leaves_the_ebm_alone_and_reaches_all_else():
    model, x, args = build()
    lep.objective(model, x, args, True)["loss"].backward()
    for name, p in model.named_parameters():
        if name.startswith("ebm"):
            assert p.grad is None
        else:
            assert p.grad.abs().sum() > 0, name
    with_f = grads(model.encoders.parameters())
    model.zero_grad()
    with torch.no_grad():
        model.ebm.layers[2].weight.mul_(1000)
    torch.manual_seed(0)
    lep.objective(model, x, args, True)["loss"].backward()
    assert not torch.allclose(with_f[0], next(model.encoders.parameters()).grad)   # f pulls on phi


def test_a_train_step_moves_each_net_by_its_own_loss():
    model, x, args = build()
    model.float()
    x = {m: v.float() for m, v in x.items()}
    before, opts = copy.deepcopy(model.state_dict()), optimisers(model, args)
    metrics = lep.train_step(model, x, opts, args)
    assert all(not torch.equal(before[k], v) for k, v in model.named_parameters())
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    before = copy.deepcopy(model.state_dict())
    lep.ebm_step(model, torch.randn(9, 3), opts["ebm"], args, 1)
    for k, v in model.state_dict().items():
        assert torch.equal(before[k], v) == (not k.startswith("ebm.layers")), k
    before = copy.deepcopy(model.ebm.state_dict())
    lep.train_step(model, x, opts, args, use_ebm=False)
    assert all(torch.equal(before[k], v) for k, v in model.ebm.state_dict().items())


@pytest.mark.parametrize("phi", ["elbo", "teach"])
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_mcmc_updates_mix_the_two_gradients_as_written(phi, rho, monkeypatch):
    model, x, args = build("--inference", "mcmc", "--rho", str(rho), "--phi", phi)
    v = torch.randn(5, 9, dtype=torch.float64)
    monkeypatch.setattr(lep, "sample_posterior", lambda *_: v.clone())
    monkeypatch.setattr(lep, "sample_laplace", lambda mu, s: mu + 0.5 * s)
    params = {"phi": list(model.encoders.parameters()),
              "theta": [*model.decoders.parameters(), model.aux]}
    lep.objective(model, x, args, True)["loss"].backward()
    vae = {k: grads(p) for k, p in params.items()}
    z_pos, _ = lep.mcmc_gradients(model, x, args, True)
    assert torch.equal(z_pos, v[:, :3])
    mixed = {k: grads(p) for k, p in params.items()}
    z, w = v[:, :3], [v[:, 3:5], v[:, 5:7], v[:, 7:]]
    nll = 0.0
    for i, m in enumerate(SHAPES):
        for code in (w[i], (0.5 * lep.sum_to_dim(model.aux[i])).expand(5, 2)):
            mean = model.decoders[m](torch.cat([code, z], 1))
            nll = nll - Laplace(mean, 0.75).log_prob(x[m]).sum((1, 2, 3)).mean()
    chain = torch.autograd.grad(nll, params["theta"])
    for got, a, b in zip(mixed["theta"], vae["theta"], chain):
        assert torch.allclose(got, (1 - rho) * a + rho * b, atol=1e-9)
    if phi == "teach":
        mu_z, s_z, mu_w, s_w = model.encode(x)
        loss = -sum(Laplace(mu_z[m], s_z[m]).log_prob(z).sum(1) for m in range(3)).mean() / 3 - \
            sum(Laplace(mu_w[m], s_w[m]).log_prob(w[m]).sum(1) for m in range(3)).mean()
        vae["phi"] = torch.autograd.grad(loss, params["phi"])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(mixed["phi"], vae["phi"]))


def test_mcmc_step_trains_the_ebm_on_the_ends_of_the_chains(monkeypatch):
    model, x, args = build("--inference", "mcmc")
    model.float()
    x, seen = {m: v.float() for m, v in x.items()}, []
    v = torch.randn(5, 9)
    monkeypatch.setattr(lep, "sample_posterior", lambda *_: v)
    monkeypatch.setattr(lep, "ebm_step", lambda model, z_pos, *_: seen.append(z_pos) or {})
    lep.train_step(model, x, optimisers(model, args), args)
    assert torch.equal(seen[0], v[:, :3])


@pytest.mark.parametrize("ebm_on", ["z", "u"])
def test_the_last_stage_of_mcmc_inference_takes_the_ends_of_chains_under_f(ebm_on, monkeypatch):
    model, x, args = build("--inference", "mcmc", "--ebm_on", ebm_on)
    ends, asked = torch.randn(5, 9, dtype=torch.float64), []
    monkeypatch.setattr(lep, "sample_posterior", lambda *a: asked.append(a[3:]) or ends)
    z_pos = lep.positives(model, x, args)
    assert asked == [(3, True)]
    assert torch.equal(z_pos, ends if ebm_on == "u" else ends[:, :3])


@pytest.mark.parametrize("ebm_on", ["z", "u"])
def test_the_last_stage_draws_from_the_encodings_of_every_expert(ebm_on, monkeypatch):
    model, x, args = build("--ebm_on", ebm_on)
    mu_z, s_z, mu_w, s_w = model.encode(x)                                 # [m b d]
    codes = torch.cat([mu_z, mu_w, s_z, s_w], -1).detach()
    monkeypatch.setattr(lep, "sample_laplace", lambda mu, scale: mu + 2 * scale)
    z_pos = lep.positives(model, {f"q_{m}": c for m, c in zip(model.modalities, codes)}, args)
    z, w = mu_z + 2 * s_z, torch.cat([*(mu_w + 2 * s_w)], 1)
    want = torch.cat([z, w.expand(len(z), *w.shape)], -1) if ebm_on == "u" else z
    assert torch.allclose(z_pos, want.flatten(0, 1))


def test_divergence_is_named():
    run, args = SimpleNamespace(world=1), options("--max_gap", "3")
    assert lep.diverged({"gap": torch.tensor(-2.9), "f_pos": torch.tensor(1.0)}, args, run) == ""
    assert "gap" in lep.diverged({"gap": torch.tensor(-3.1)}, args, run)
    assert "finite" in lep.diverged({"bound_nats": torch.tensor(math.nan)}, args, run)
