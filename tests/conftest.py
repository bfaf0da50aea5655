"""Settings and fixtures of all tests: no account, network or GPU is used by default, and all files are in a temporary folder."""

import dataclasses
import importlib
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Set before torch and numpy are imported: on shared cores, threads that spin while they wait slow everything down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest

# A shell that starts the tests in the background lets them ignore Ctrl-C, but some tests send this signal to themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["hub_server", "s3_server", "slurm_cluster", "wandb_server"]

hypothesis.settings.register_profile("icl", derandomize=True, deadline=None, max_examples=15, database=None)
hypothesis.settings.load_profile("icl")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # the other processes run the tests
        return
    if config.getoption("jaxtyping_packages"):
        # Imported before icl: a library that is first imported by a module under jaxtyping's hook is compiled from its source.
        # This would take a third of the time of the start.
        for library in (
            "lightning.pytorch",
            "matplotlib.pyplot",
            "pandas",
            "scipy.optimize",
            "sklearn.decomposition",
            "torch._dynamo",
        ):
            importlib.import_module(library)
    import torch

    import icl.config

    # On two cores, two processes with two threads each would spend more time waiting for each other than computing.
    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    num_threads = max(1, min(2, (os.cpu_count() or 1) // num_processes))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", num_threads)))
    # The configuration refuses wrong values with its own errors, which we test. jaxtyping's hook would raise its errors first.
    for section in vars(icl.config).values():
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            section.__init__.__no_type_check__ = True  # type: ignore[misc]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def _roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Paths of new folders, one for each test. `mktemp` would list all earlier folders to find the next number."""
    base = tmp_path_factory.mktemp("roots")
    return (base / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _sealed(monkeypatch: pytest.MonkeyPatch, _roots: Iterator[Path]) -> None:
    """Use a temporary folder for runs, no store, no W&B and the CPU, and hide the variables of a cluster's job."""
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
    """Turn off the checks of shapes and types, if they are on, so that `icl` itself must refuse bad values."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
