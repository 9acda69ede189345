"""What all tests share: the repository on the path, a fixed seed, one thread, no network."""
import os
import socket
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)                        # for the scripts that tests start
os.environ["OMP_NUM_THREADS"] = "1"                         # for those too
torch.set_num_threads(1)                                    # small tensors; bit-equal reruns

import common  # noqa: E402
from whole_runs import write_pairs  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "pictures: a whole run that draws its pictures")


@pytest.fixture(autouse=True)
def _sealed(monkeypatch):
    """Every test starts from one seed, and a download fails at once."""
    def refuse(*args, **kwargs):
        raise OSError("the tests have no network")
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _few_pictures(request, monkeypatch):
    """A picture takes a second, and a thousand samples take some: unless a whole run is marked it
    leaves a file without a picture, and times no samples."""
    if request.module.__name__.endswith(("_script", "_device")) \
            and not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(common, "_save_rows", lambda path, *_, **__:
                            Path(path).write_bytes(b"not drawn"))
        monkeypatch.setattr(common.Run, "time_samples", lambda *_: None)


@pytest.fixture
def paired(tmp_path):
    """A folder with unlabelled pairs, so that no judge is trained: 200 train, 30 test."""
    return write_pairs(tmp_path, 200, 30)


@pytest.fixture
def break_off(monkeypatch):
    """break_off(script): its training ends with an OSError in the fourth step, once."""
    def patch(script):
        step, steps = script.train_step, count(1)

        def breaks_off(*args):
            if next(steps) == 4:
                raise OSError
            return step(*args)
        monkeypatch.setattr(script, "train_step", breaks_off)
    return patch
