"""Every script on a second device, on a machine without one. A tensor that a script puts on `cuda`
stays in this machine's memory but says that it is there, and an operation on both kinds of tensors,
`.numpy()` of one there, or a generator of the wrong kind fails as on a GPU."""
import importlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import common
from whole_runs import untrained_judges

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SCRIPTS = ["jnf", "sbm_vae", "latent_ebm_prior", "joint_layer_ebm", "ebm_revision"]
MORE = {"jnf-shared": ["--shared", "contrastive", "--epochs_shared", "1", "--latent_prior", "gmm",
                       "--gmm_components", "2"],
        "sbm_vae-guided": ["--sampler", "pc", "--cond_train", "none", "--epochs_energy", "1",
                           "--guide_weight", "1", "--guide_sweep", "1"],
        "latent_ebm_prior-mcmc": ["--inference", "mcmc", "--whiten", "--w_test", "aux"],
        "joint_layer_ebm-mcmc": ["--scheme", "mcmc", "--epochs_backbone", "0", "--held_out", "1"]}


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Operations(TorchDispatchMode):
    """Knows what is on the second device: the result of an operation is where its inputs are. waits
    counts what a GPU would have to finish its work for: `.item()` and the like, `.cpu()`."""

    def __init__(self):
        super().__init__()
        self.storages, self.default, self.waits, self.checks = {}, [False], 0, False

    def has(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.storages

    def put(self, x: Tensor, there: bool) -> None:
        storage = x.untyped_storage()
        self.storages.pop(storage._cdata, None)
        if there:                               # the weak reference keeps the number from reuse
            self.storages[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs, name = tensors((args, kwargs)), func._schema.name.removeprefix("aten::")
        there = [self.has(x) for x in inputs]
        self.waits += any(there) and not self.checks and name in ("_local_scalar_dense", "nonzero")
        if name in ("index", "index_put_", "_index_put_impl_"):             # by indices on the CPU
            bad = any(there) and not there[0]
        else:                                   # a GPU takes numbers, [], of the CPU along
            bad = name != "copy_" and any(there) and any(
                not on and (x.dim() or name in ("cat", "stack") or i == 0 and name.endswith("_"))
                for i, (x, on) in enumerate(zip(inputs, there)))
        if bad:
            raise RuntimeError(f"{func}: tensors on two devices")
        result = func(*args, **kwargs or {})
        if any(there) or not inputs and self.default[-1]:
            for x in tensors(result) if name != "copy_" else ():
                self.put(x, True)
        return result


class SecondDevice(TorchFunctionMode):
    """Within it torch.device("cuda") is a second device."""

    def __enter__(self):
        self.operations = Operations().__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operations.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, has = kwargs or {}, self.operations.has
        inputs, name = tensors((args, kwargs)), getattr(func, "__name__", "")
        there = wanted = any(map(has, inputs))
        if name == "_parse_to":                 # Module.to reads its arguments: no tensors
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return CUDA if there else func(*args)
        if there and name in ("numpy", "__array__"):
            raise TypeError("can't convert a tensor on cuda to numpy")
        places = [a.type for a in (*args, *kwargs.values()) if isinstance(a, torch.device)]
        if name == "to" and isinstance(args[-1], Tensor) and len(args) > 1:
            places = ["cuda" if has(args[1]) else "cpu"]
        if places or name == "cpu":
            wanted = places == ["cuda"]
        if wanted and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator on the CPU")
        args, kwargs = tree_map(lambda a: CPU if isinstance(a, torch.device) else a, (args, kwargs))
        self.operations.default.append(wanted)
        self.operations.checks = name == "one_hot"          # of its input: not made on a GPU
        try:
            result = func(*args, **kwargs)
        finally:
            self.operations.default.pop()
        self.operations.waits += there and not wanted
        if (places or name == "cpu") and isinstance(result, Tensor) and has(result) != wanted:
            storages = [x.untyped_storage()._cdata for x in inputs]
            result = result.clone() if result.untyped_storage()._cdata in storages else result
            self.operations.put(result, wanted)
        return result


def test_the_second_device_refuses_what_a_gpu_refuses():
    with SecondDevice():
        x, y = torch.randn(3, 4, device=CUDA), torch.randn(3, 4)
        for made in (x * 2, x + torch.tensor(1.0), y.to(x), y.to(CUDA), x.new_zeros(2), x[[0, 2]],
                     torch.zeros_like(x), torch.ones(2, device=x.device), x[torch.tensor([1])],
                     torch.as_tensor(y, device=CUDA), torch.nn.Linear(4, 2).to(CUDA).weight):
            assert made.device == CUDA
        for made in (x.cpu(), y * 2, x.to(y), y.to(CUDA).to(CPU), torch.randn(2)):
            assert made.device == CPU
        for wrong in (lambda: x + y, lambda: torch.cat([x, y]), lambda: y[x[:, 0] > 0],
                      lambda: y.add_(x), lambda: x.numpy(), lambda: np.asarray(x),
                      lambda: torch.randn(3, device=CUDA, generator=torch.Generator()),
                      lambda: torch.nn.Linear(4, 2)(x), lambda: torch.zeros(()).add_(x[0, 0]),
                      lambda: torch.stack([x[0, 0], y[0, 0]])):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


@pytest.mark.parametrize("case", [*SCRIPTS, *MORE])
def test_a_script_keeps_to_its_device(case, tmp_path, monkeypatch, break_off):
    """Broken off in its fourth step, resumed, evaluated; without judges' training and pictures. No
    step of the training waits for the device."""
    name = case.partition("-")[0]
    script = importlib.import_module(name)
    monkeypatch.setattr(common, "load_judges", lambda *sets: {
        m: judge.to(CUDA) for m, judge in untrained_judges(*sets).items()})
    monkeypatch.setattr(script, "SWEEP", (0, 5), raising=False)
    for function, result in (("set_device", None), ("get_device_name", "none"),
                             ("get_rng_state", torch.zeros(1)), ("set_rng_state", None)):
        monkeypatch.setattr(torch.cuda, function, lambda *_, result=result: result)
    data = ["--dataset", "synth_mnist_svhn"] if name != "joint_layer_ebm" else [
        "--dataset", "synth_svhn", "--epochs_backbone", "1"]
    flags = [*importlib.import_module(f"test_{name}_script").TINY, *data, "--data_dir",
             str(tmp_path), "--out_dir", str(tmp_path), "--n_train", "80", "--n_test", "20",
             "--n_eval", "20", "--eval_batch", "16", "--batch_size", "16", "--log_every", "1",
             "--ckpt_minutes", "0", "--device", "cuda", *MORE.get(case, [])]
    step, waits, device = script.train_step, [], SecondDevice()

    def counted(*args):
        before = device.operations.waits
        metrics = step(*args)
        waits.append(device.operations.waits - before)
        return metrics
    monkeypatch.setattr(script, "train_step", counted)
    break_off(script)
    with device:
        with pytest.raises(OSError):
            script.main(flags)
        assert script.main([*flags, "--resume"])
    assert len(waits) > 3 and not any(waits)
