"""JNF of MultiVae 1.0.3 on real MNIST-SVHN under this repository's protocol, as jnf.py --max_steps.

    python tests/peer_quality.py --data_dir DIR [--steps 3000] [--seed 0] [--out FILE]

Same nets, images, number and size of batches (of pairs drawn at random within class, not the same
draws), judges and test tuples; training and inference are MultiVae's (`pip install
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


def train(model, train_set: data.Dataset, steps: int, seed: int) -> None:
    """MultiVae's two stages, steps each: joint VAE, then (its epoch 2) encoders and flows."""
    from multivae.data.datasets.base import MultimodalBaseDataset
    for stage in (1, 2):
        opt, step = torch.optim.Adam(model.train().parameters(), 1e-3), 0
        while step < steps:
            order = torch.Generator().manual_seed(seed * 10**6 + stage * 10**5 + step)
            for x in islice(data.batches(train_set, 128, order), steps - step):
                loss = model(MultimodalBaseDataset(data=x), epoch=stage).loss
                opt.zero_grad()
                loss.backward()
                opt.step()
                step += 1
                if step % 250 == 0:
                    print(f"stage {stage}, step {step}: loss {loss.item():.2f}", flush=True)


@torch.no_grad()
def evaluate(model, train_set: data.Dataset, test: data.Dataset, judges: dict) -> dict[str, float]:
    """jnf.py's coherence and Fréchet distances, z from MultiVae's own encode."""
    from multivae.data.datasets.base import MultimodalBaseDataset
    model.eval()
    real = common.reference(test, train_set, judges, None)

    def decode(z, targets=test.modalities):
        return {m: model.decoders[m](z).reconstruction for m in targets}

    def generate(x, targets):
        z = model.encode(MultimodalBaseDataset(data=x), cond_mod=next(iter(x)))
        return decode(z.z, targets)
    metrics = common.coherence_joint(lambda b: decode(torch.randn(b, model.latent_dim)), judges,
                                     len(test), reference=real)
    return metrics | common.coherence_cross(generate, test, judges, reference=real) | real.metrics


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data_dir", required=True)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--judges", default="runs/judges", help="folder of their cache")
    p.add_argument("--out", default="results/jnf/mnist_svhn/multivae-3000-steps/0/result.json")
    a, start = p.parse_args(), time.time()
    command = " ".join(["python tests/peer_quality.py", *sys.argv[1:]])
    sets = {s: data.load("mnist_svhn", s, a.data_dir) for s in ("train", "test")}
    judges = common.load_judges(*sets.values(), Path(a.judges), torch.device("cpu"))
    torch.manual_seed(a.seed)
    model = benchmark.peer_model(sets["train"].shapes, jnf.parse_args(["--dataset", "mnist_svhn"]))
    train(model, sets["train"], a.steps, a.seed)
    metrics = evaluate(model, sets["train"], sets["test"].head(10_000), judges)
    result = {"script": "jnf", "dataset": "mnist_svhn", "seed": a.seed, "metrics": metrics,
              "note": sets["train"].note, "n": 10_000, "device": "cpu", "torch": torch.__version__,
              "minutes": round((time.time() - start) / 60, 2), "command": command}
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(result, indent=1))
    print({k: v for k, v in metrics.items() if k.startswith("coherence")})


if __name__ == "__main__":
    main()
