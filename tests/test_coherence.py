"""Judges, the FID net, coherence and distances, on hand-made sets whose answers are known."""
import hashlib
from argparse import Namespace
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.inception import Inception3

import common
import data

N = 300


def make_set(split, n=N, names=("a", "b", "c"), n_classes=10):
    """Images of one shade each, the label's: the plainest task that a judge can have."""
    y = torch.arange(n) % n_classes
    x = {m: (y * 25).byte()[:, None, None, None].expand(n, 1 + 2 * (m == "b"), 12, 12).contiguous()
         for m in names}
    return data.Dataset(x=x, y=y, kinds=dict.fromkeys(names, "image"), name="toy", split=split)


class Reader(nn.Module):
    """A perfect judge of `make_set`: reads the label off the first pixel."""
    accuracy = 1.0

    def forward(self, x):
        return F.one_hot((x[:, 0, 0, 0] * 10.2).round().long(), 11).float(), x.flatten(1)[:, :2]


JUDGES = {m: Reader() for m in "abc"}


def images(labels):
    return (labels.float() / 10.2)[:, None, None, None].expand(-1, 1, 12, 12)


# ---- Coherence ----------------------------------------------------------------------------------
def test_joint_coherence_of_copies_of_chance_and_of_a_hand_made_case():
    sizes = []

    def copies(b):
        sizes.append(b)
        return dict.fromkeys("abc", images(torch.randint(10, (b,))))
    assert common.coherence_joint(copies, JUDGES, n=25, batch_size=10)["coherence_joint"] == 1.0
    assert sizes == [10, 10, 5]

    def chance(b):
        return {m: images(torch.randint(10, (b,))) for m in "ab"}
    two = {m: JUDGES[m] for m in "ab"}
    joint = common.coherence_joint(chance, two, n=20_000)["coherence_joint"]
    assert joint == pytest.approx(0.1, abs=0.01)
    rows = torch.tensor([[1, 1, 1], [1, 1, 2], [3, 3, 3], [4, 5, 5]]).T          # 2 of 4 agree
    by_hand = common.coherence_joint(lambda b: dict(zip("abc", map(images, rows))), JUDGES, n=4)
    assert by_hand["coherence_joint"] == 0.5
    assert common.coherence_joint(chance, {}, n=5) == {}
    alone = common.coherence_joint(chance, {"a": Reader()}, n=5)
    assert alone.keys() == {"classes_joint"}                               # none to agree with


def test_images_that_are_not_finite_agree_with_none_and_have_no_distance():
    rows = torch.tensor([0, 0, 3, 3])                                       # argmax of nan is 0
    x = {m: images(rows) for m in "ab"}
    judges = {m: nn.Sequential(nn.Flatten(), nn.Linear(144, 10)) for m in "ab"}
    judges = {m: lambda v, net=net: (net(v), v.flatten(1)[:, :2]) for m, net in judges.items()}
    for m in "ab":
        x[m][0, 0, 5, 5] = torch.nan
    x["a"][1, 0, 0, 0] = torch.inf
    judges["b"] = judges["a"]
    test = make_set("test", names=("a", "b"))
    metrics = common.coherence_joint(lambda b: x, judges, 4, 4)
    assert metrics["coherence_joint"] == 0.5 and metrics["classes_joint"] >= 1
    cross = common.coherence_cross(lambda given, targets: {m: images(
        torch.zeros(len(given["a" if m == "b" else "b"]))) * torch.nan for m in targets}, test,
        judges, 300)
    assert cross["coherence_cross_1"] == 0
    nan = torch.full((128,), torch.nan), torch.full((128, 128), torch.nan)
    distance = common.frechet_distance(*nan, torch.zeros(128), torch.eye(128))
    assert distance != distance                                             # eigh of nan raises


@pytest.mark.parametrize("n_classes", (1, 2, 10))
def test_classes_joint_tells_collapse_from_coherence(n_classes):
    same = images(torch.arange(100) % n_classes)
    metrics = common.coherence_joint(lambda b: {"a": same, "b": same}, JUDGES, n=100)
    assert metrics == {"coherence_joint": 1.0, "classes_joint": pytest.approx(n_classes, rel=1e-4)}


def test_a_judge_looks_once_at_the_same_images_and_anew_at_others():
    judge, calls, x = common.Judge((1, 12, 12), 10), [], torch.rand(4, 1, 12, 12)
    judge.body.register_forward_hook(lambda *_: calls.append(1))
    dropped, _ = judge(x)                               # training, with a graph: never kept
    with torch.no_grad():
        logits, features = judge.eval()(x)
        assert not torch.equal(logits, dropped) and len(calls) == 2
        assert judge(x)[0] is logits and judge(x)[1] is features and len(calls) == 2
        assert torch.equal(judge(x.clone())[0], logits) and len(calls) == 3
        x.mul_(0.5)                                     # the same tensor, other images
        assert not torch.equal(judge(x)[0], logits) and len(calls) == 4
    assert judge(x)[0].requires_grad and len(calls) == 5


def test_cross_coherence_over_all_subsets_by_hand():
    calls, heard = [], []

    def generate(x, targets):                           # knows the label only if it is shown "a"
        calls.append((tuple(x), tuple(targets)))
        seen = next(iter(x.values()))
        y = (seen[:, :1] * 10.2).round() if "a" in x else torch.full_like(seen[:, :1], 10)
        return {t: y / 10.2 for t in targets}
    got = common.coherence_cross(generate, make_set("test"), JUDGES, batch_size=200,
                                 progress=lambda *now: heard.append(now))
    ones = {"a_to_b", "a_to_c", "a+b_to_c", "a+c_to_b"}
    zeros = {"b_to_a", "b_to_c", "c_to_a", "c_to_b", "b+c_to_a"}
    expected = {f"coherence_{k}": 1.0 for k in ones} | {f"coherence_{k}": 0.0 for k in zeros}
    expected |= {"coherence_cross_1": 2 / 6, "coherence_cross_2": 2 / 3, "coherence_subsets": 6}
    assert got == pytest.approx(expected)
    assert len(calls) == 12 and calls[0] == (("a",), ("b", "c"))                 # two batches each
    assert heard == [("evaluation", 0, 1, i, 6, N) for i in range(6)]


def test_cross_coherence_of_many_modalities_takes_a_fixed_balanced_sample_of_every_size():
    names = [f"m{i}" for i in range(7)]
    test, seen = make_set("test", 20, names), []

    def generate(x, targets):
        seen.append(tuple(x))
        return {t: images(test.y) for t in targets}
    judges = {m: Reader() for m in names}
    got = common.coherence_cross(generate, test, judges)
    assert len(seen) == len(set(seen)) == got["coherence_subsets"] == 42
    for k in range(1, 7):                               # every modality as often observed as any
        assert Counter(m for s in seen if len(s) == k for m in s) == dict.fromkeys(names, k)
    first = list(seen)
    common.coherence_cross(generate, test, judges)
    assert seen[42:] == first
    got = common.coherence_cross(generate, test, judges, subsets=[("m0", "m6")])
    assert got["coherence_cross_2"] == got["coherence_m0+m6_to_m3"] == 1 and len(got) == 7


def test_reference_measures_the_real_data_and_then_a_model():
    test, train = make_set("test"), make_set("train", 2 * N)
    real = common.reference(test, train, JUDGES, None)
    assert real.metrics["coherence_ceiling"] == real.metrics["judge_accuracy_a"] == 1
    assert real.metrics["frechet_clf_floor"] == pytest.approx(0, abs=1e-3)       # 299 against 599
    assert {f"frechet_clf_floor_{m}" for m in "abc"} <= real.metrics.keys()

    def moved(x, targets):                              # 0.1 in both features: distance 0.02
        return {t: next(iter(x.values()))[:, :1] + 0.1 for t in targets}
    got = common.coherence_cross(moved, test, JUDGES, reference=real)
    assert got["frechet_clf_a_to_b"] == pytest.approx(0.02, rel=1e-3)
    assert not any("+" in key and key.startswith("frechet") for key in got)
    joint = common.coherence_joint(lambda b: test.take(slice(b)), JUDGES, N, N, real)
    assert joint["frechet_clf_c"] == pytest.approx(0, abs=1e-6)
    alone = common.reference(test, train, {"a": JUDGES["a"]}, None)            # with whom to agree?
    assert "coherence_ceiling" not in alone.metrics
    bare = common.reference(test, train, {}, lambda x: x.flatten(1)[:, :3])     # no labels
    joint = common.coherence_joint(lambda b: test.take(slice(b)), {}, N, N, bare)
    assert joint.keys() == {"fid_a", "fid_b", "fid_c"} and "fid_floor_a" in bare.metrics


def test_reference_looks_at_all_of_a_sorted_set_and_takes_the_floor_from_train():
    test, train = make_set("test"), make_set("train")
    order = test.y.sort(stable=True).indices
    test = data.Dataset(**vars(test) | {"y": test.y[order], "x": {
        m: x[order] for m, x in test.x.items()}})
    real = common.reference(test, train, JUDGES, None, n=50)
    mean, _ = real.stats["frechet_clf", "a"]
    assert mean[0].item() == pytest.approx(4.5 * 25 / 255, rel=0.05)            # all ten classes
    train.x["a"] = (train.x["a"].float() + 20).byte()
    moved = common.reference(test, train, JUDGES, None).metrics
    shift = 2 * (20 / 255) ** 2                                                 # of two features
    assert moved["frechet_clf_floor_a"] == pytest.approx(shift, rel=0.01)
    assert moved["frechet_clf_floor_b"] == pytest.approx(0, abs=1e-6)


# ---- Judges -------------------------------------------------------------------------------------
def test_judges_learn_are_cached_and_leave_the_random_state_alone(tmp_path, monkeypatch):
    train, test, lines = make_set("train", 400, "b", 2), make_set("test", 40, "b", 2), []
    state = torch.get_rng_state()
    judges = common.load_judges(train, test, tmp_path / "judges", "cpu", lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert judges["b"].accuracy == 1.0 and "WARNING" not in "".join(lines)
    assert ["trained now" in line for line in lines] == [True, False]
    x = test.take(slice(8))["b"]
    logits, features = judges["b"](x)
    assert logits.shape == (8, 2) and features.shape == (8, 128)
    assert not judges["b"].training and not any(p.requires_grad for p in judges["b"].parameters())

    plain, trained = common._train_judge, []
    monkeypatch.setattr(common, "_train_judge", lambda *a: (trained.append(1), plain(*a)))
    torch.manual_seed(123)
    again = common.load_judges(train, test, tmp_path / "judges", "cpu", lines.append)
    assert not trained and torch.equal(again["b"](x)[0], logits) and again["b"].accuracy == 1.0
    assert len(lines) == 3
    for file in (tmp_path / "judges").iterdir():
        file.write_bytes(file.read_bytes()[:1000])                               # truncated
    again = common.load_judges(train, test, tmp_path / "judges", "cpu", lines.append)
    assert len(trained) == 1 and torch.equal(again["b"](x)[0], logits)           # the same judge
    (file,) = (tmp_path / "judges").glob("*.pt")
    half = {k: v * 0 for k, v in torch.load(file, weights_only=True).items() if k != "head.bias"}
    torch.save(half, file)                                                       # fits in part
    again = common.load_judges(train, test, tmp_path / "judges", "cpu", lines.append)
    assert len(trained) == 2 and torch.equal(again["b"](x)[0], logits)
    trained.pop()
    wrong = data.Dataset(**vars(test) | {"y": 1 - test.y})                       # other test data
    again = common.load_judges(train, wrong, tmp_path / "judges", "cpu", lines.append)
    assert len(trained) == 1 and again["b"].accuracy == 0.0
    common.load_judges(train.head(390), test, tmp_path / "judges", "cpu", lines.append)
    assert len(trained) == 2                                                     # other data


def test_a_weak_judge_is_loud_and_unlabelled_data_have_none(tmp_path, monkeypatch):
    train, test, lines = make_set("train", 200, "a"), make_set("test", 50, "a"), []
    train.y[:] = train.y[torch.randperm(200)]
    common.load_judges(train, test, tmp_path, "cpu", lines.append)
    assert "WARNING" in "".join(lines)
    train, test = make_set("train", 200, ("a", "svhn")), make_set("test", 1000, ("a", "svhn"))
    for right, weak in ((960, []), (940, ["a"]), (910, ["a"]), (890, ["a", "svhn"])):
        seen, lines = torch.where(torch.arange(1000) < right, test.y, -1), []
        monkeypatch.setattr(common, "_measure", lambda _, judges, __: (dict.fromkeys(judges, seen),
                                                                       {}))
        common.load_judges(train, test, tmp_path, "cpu", lines.append)
        assert [m for m in ("a", "svhn") if f"measured with {m}" in "".join(lines)] == weak
    bare = data.Dataset(x=train.x, y=None, kinds=train.kinds, name="toy", split="train")
    assert common.load_judges(bare, bare, tmp_path, "cpu") == {}


# ---- The FID net --------------------------------------------------------------------------------
def test_fid_net_pools_like_the_tensorflow_graph():
    net, seen = common._inception(), {}
    for name in ("Mixed_5b", "Mixed_7b", "Mixed_7c"):
        block = getattr(net, name)
        block.register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i[0], o)}))
    grey = torch.rand(2, 1, 20, 20)
    first, handle = [], net.Conv2d_1a_3x3.register_forward_hook(lambda _, i, o: first.append(i[0]))
    out = net(grey)
    handle.remove()
    eight_bit = (grey * 255).round().expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(first[0], 2 * F.interpolate(eight_bit, (299, 299), mode="bilinear")
                               - 1, rtol=0, atol=1e-6)
    assert out.shape == (2, 2048) and torch.equal(out, net(grey.expand(-1, 3, -1, -1)))
    assert torch.equal(out, net((grey * 255).round() / 255))                     # 8 bits
    for name, (x, y) in seen.items():
        mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        pooled = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else mean
        branch = getattr(net, name).branch_pool(pooled)
        torch.testing.assert_close(y[:, -branch.shape[1]:], branch, rtol=1e-3, atol=0)


def test_fid_weights_are_checked_and_their_absence_is_reported(tmp_path, monkeypatch):
    args = Namespace(fid=False, data_dir=tmp_path, device="cpu", out_dir=tmp_path / "runs",
                     dataset="toy", seed=0, judges=None)
    assert common.load_inception(args, "cpu") is None                            # not asked for
    args.fid = True
    for early in (lambda: common.open_run(args, __file__, []),                   # no network
                  lambda: common.load_inception(args, "cpu")):
        with pytest.raises(common.RunError, match="--fid: .*pt_inception.*6726825d.pth is missing"):
            early()
    assert not (tmp_path / "runs").exists()
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    file.write_bytes(b"not the weights")
    with pytest.raises(common.RunError, match="6726825d"):
        common.load_inception(args, "cpu")
    weights = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    torch.save({k: v for k, v in weights.items() if "num_batches" not in k}, file)  # as in 2015
    sha = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file.rename(tmp_path / f"net-{sha}.pth")
    monkeypatch.setattr(common, "INCEPTION_URL", f"https://host/net-{sha}.pth")
    net = common.load_inception(args, "cpu")
    conv = net.Mixed_7c.branch_pool.conv.weight
    assert torch.equal(conv, weights["Mixed_7c.branch_pool.conv.weight"])
