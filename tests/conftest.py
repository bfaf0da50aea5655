"""Shared ground of the tests: no account, no network, no GPU by default, nothing written outside a temporary folder."""

import dataclasses
import importlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and numpy: threads that spin stall runs on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest
import torch

# Before icl: what a module under jaxtyping's hook is the first to import is compiled from its source, a third of the start.
for _library in (
    "lightning.pytorch",
    "matplotlib.pyplot",
    "pandas",
    "scipy.optimize",
    "sklearn.decomposition",
    "torch._dynamo",
):
    importlib.import_module(_library)

pytest_plugins = ["s3_server", "wandb_server"]

hypothesis.settings.register_profile("icl", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("icl")


def pytest_configure() -> None:
    import icl.config

    # Two processes with two threads each on two cores wait for each other more than they compute.
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    num_threads = max(1, min(2, (os.cpu_count() or 1) // num_processes))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", num_threads)))
    # The config tree refuses wrong values itself, in sentences that are under test; jaxtyping's hook would speak first.
    for section in vars(icl.config).values():
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            section.__init__.__no_type_check__ = True  # type: ignore[misc]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def _roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty folders, one for each test. `mktemp` would read through all earlier ones to number the next."""
    base = tmp_path_factory.mktemp("roots")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _sealed(monkeypatch: pytest.MonkeyPatch, _roots: Iterator[Path]) -> None:
    """Runs go to a temporary folder and no store, W&B is off, the device is the CPU, no job of a cluster is seen."""
    for name in os.environ:
        if name.startswith(("AWS_", "HF_", "SLURM_", "WANDB_")):
            monkeypatch.delenv(name)
    root = next(_roots)
    root.mkdir()
    monkeypatch.setenv("LOCAL_ROOT", str(root))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("DEVICE", "cpu")


@pytest.fixture
def as_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape and type checks off, as outside the tests: what is refused then is refused by `icl` itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
