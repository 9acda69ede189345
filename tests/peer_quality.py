"""MultiVae 1.0.3 under this repository's protocol: JNF on real MNIST-SVHN, as jnf.py --max_steps;
MMVAE+ on the synthetic pairs, as the autoencoder of latent_ebm_prior.py under its Laplace prior.

    python tests/peer_quality.py --data_dir DIR [--steps 3000] [--seed 0] [--out FILE]
    python tests/peer_quality.py latent_ebm_prior [--seed 0] [--out FILE]

Same nets, images, number and size of batches (JNF: of pairs drawn at random within class, not the
same draws), judges and test tuples; training and inference are MultiVae's (`pip install
multivae==1.0.3`), its last weights count. Not a test.
"""
import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import benchmark                                                                        # noqa: E402
import common                                                                           # noqa: E402
import data                                                                             # noqa: E402
import jnf                                                                              # noqa: E402
import latent_ebm_prior                                                                 # noqa: E402


def wrap(x: dict):
    from multivae.data.datasets.base import MultimodalBaseDataset
    return MultimodalBaseDataset(data=x)


def train_jnf(model, train_set: data.Dataset, steps: int, seed: int) -> None:
    """MultiVae's two stages, steps each: joint VAE, then (its epoch 2) encoders and flows."""
    for stage in (1, 2):
        opt, step = torch.optim.Adam(model.train().parameters(), 1e-3), 0
        while step < steps:
            order = torch.Generator().manual_seed(seed * 10**6 + stage * 10**5 + step)
            for x in islice(data.batches(train_set, 128, order), steps - step):
                loss = model(wrap(x), epoch=stage).loss
                opt.zero_grad()
                loss.backward()
                opt.step()
                step += 1
                if step % 250 == 0:
                    print(f"stage {stage}, step {step}: loss {loss.item():.2f}", flush=True)


def mmvae_plus(shapes: dict, args):
    """MultiVae's MMVAE+ around the towers and decoders of latent_ebm_prior.py, and those."""
    from multivae.models import MMVAEPlus, MMVAEPlusConfig
    from multivae.models.nn.base_architectures import BaseMultilatentEncoder
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn.base_architectures import BaseDecoder
    ours = latent_ebm_prior.MMVAEPlus(shapes, args)

    class Encoder(BaseMultilatentEncoder):
        def __init__(self, m):
            super().__init__()
            self.towers, self.latent_dim, self.style_dim = ours.encoders[m], args.z_dim, args.w_dim

        def forward(self, x):
            (mu, s), (mu_w, s_w) = ((t.mu(h), t.logits(h)) for t in (self.towers["z"],
                                    self.towers["w"]) for h in [t.body(x)])
            return ModelOutput(embedding=mu, log_covariance=s, style_embedding=mu_w,
                               style_log_covariance=s_w)

    class Decoder(BaseDecoder):
        def __init__(self, m):
            super().__init__()
            self.net, self.latent_dim = ours.decoders[m], args.z_dim + args.w_dim

        def forward(self, u):                               # theirs: z first, ours: w first
            return ModelOutput(reconstruction=self.net(u.roll(args.w_dim, -1)))

    config = MMVAEPlusConfig(
        n_modalities=len(shapes), latent_dim=args.z_dim, modalities_specific_dim=args.w_dim,
        input_dims=shapes, uses_likelihood_rescaling=args.rescale, K=1, loss="iwae_looser",
        beta=args.beta, decoders_dist=dict.fromkeys(shapes, "laplace"),
        decoder_dist_params={m: {"scale": args.decoder_scale} for m in shapes})
    return MMVAEPlus(config, {m: Encoder(m) for m in shapes}, {m: Decoder(m) for m in shapes}), ours


def train_mmvae_plus(model, train_set: data.Dataset, args) -> None:
    """The batches, optimiser and falling rate of latent_ebm_prior.py's first stage."""
    opt = torch.optim.Adam(model.train().parameters(), args.lr, amsgrad=True)
    per_epoch = len(train_set) // args.batch_size
    total = args.epochs_vae * per_epoch
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.Generator().manual_seed(args.seed * 10**6 + step // per_epoch)
            batches = data.batches(train_set, args.batch_size, order)
        opt.param_groups[0]["lr"] = args.lr * (1 - step / total)
        loss = model(wrap(next(batches))).loss / args.batch_size
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 250 == 0:
            print(f"step {step} of {total}: loss {loss.item():.2f}", flush=True)


@torch.no_grad()
def compare_bounds(model, ours, x: dict, args, n: int = 20) -> None:
    """Both codes' ELBO of one batch at the same weights, a mean over n draws, and its error."""
    ours.aux.copy_(torch.cat([model.logvars_priors[m] for m in ours.modalities]))
    theirs = torch.stack([-model(wrap(x)).loss / len(next(iter(x.values()))) for _ in range(n)])
    own = torch.stack([latent_ebm_prior.objective(ours, x, args, False)["bound_nats"]
                       for _ in range(n)])
    for name, v in (("MultiVae", theirs), ("ours", own)):
        print(f"bound of one batch, {name}: {v.mean():.2f} +- {v.std() / n**0.5:.2f} nats")


@torch.no_grad()
def evaluate(model, train_set: data.Dataset, test: data.Dataset, judges: dict,
             suffix: str = "") -> dict[str, float]:
    """Coherence and Fréchet distances as everywhere here, latents from MultiVae's own encode;
    suffix: of the keys of joint samples."""
    model.eval()
    real, shared = common.reference(test, train_set, judges, None), model.latent_dim

    def decode(z, w, targets=test.modalities):
        return {m: model.decoders[m](torch.cat([z, w[m]], 1) if w else z).reconstruction
                for m in targets}

    def joint(b):
        u = model.generate_from_prior(b).z
        return decode(u, {}) if u.shape[1] == shared else decode(
            u[:, :shared], {m: model.generate_from_prior(b).z[:, shared:] for m in test.modalities})

    def generate(x, targets):
        found = model.encode(wrap(x), cond_mod=next(iter(x)))
        return decode(found.z, getattr(found, "modalities_z", None) or {}, targets)
    found = common.coherence_joint(joint, judges, len(test), reference=real)
    metrics = {key + suffix: value for key, value in found.items()}
    return metrics | common.coherence_cross(generate, test, judges, reference=real) | real.metrics


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("script", nargs="?", default="jnf", choices=["jnf", "latent_ebm_prior"])
    p.add_argument("--data_dir", default="datasets")
    p.add_argument("--steps", type=int, default=3000, help="of JNF")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--judges", default="runs/judges", help="folder of their cache")
    p.add_argument("--out", help="default results/<script>/<data set>/multivae*/<seed>/result.json")
    a, start = p.parse_args(), time.time()
    dataset, variant = {"jnf": ("mnist_svhn", "multivae-3000-steps"),
                        "latent_ebm_prior": ("synth_mnist_svhn", "multivae")}[a.script]
    sets = {s: data.load(dataset, s, a.data_dir) for s in ("train", "test")}
    judges = common.load_judges(*sets.values(), Path(a.judges), torch.device("cpu"))
    torch.manual_seed(a.seed)
    if a.script == "jnf":
        model = benchmark.peer_model(sets["train"].shapes, jnf.parse_args(["--dataset", dataset]))
        train_jnf(model, sets["train"], a.steps, a.seed)
    else:
        args = latent_ebm_prior.parse_args(["--dataset", dataset, "--seed", str(a.seed)])
        model, ours = mmvae_plus(sets["train"].shapes, args)
        x = next(data.batches(sets["train"], 256))
        compare_bounds(model, ours, x, args)
        train_mmvae_plus(model, sets["train"], args)
        compare_bounds(model, ours, x, args)
    test = sets["test"].head(10_000)
    metrics = evaluate(model, sets["train"], test, judges, "_base" * (a.script != "jnf"))
    result = {"script": a.script, "dataset": dataset, "seed": a.seed, "metrics": metrics,
              "note": sets["train"].note, "n": len(test), "device": "cpu",
              "torch": torch.__version__, "minutes": round((time.time() - start) / 60, 2),
              "command": " ".join(["python tests/peer_quality.py", *sys.argv[1:]])}
    out = Path(a.out or f"results/{a.script}/{dataset}/{variant}/{a.seed}/result.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    print({k: v for k, v in metrics.items() if k.startswith("coherence")})


if __name__ == "__main__":
    main()
