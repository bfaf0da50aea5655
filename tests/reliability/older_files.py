"""Files in the formats of older code and of language models' data, for the fuzzer."""

import sys
import types
from dataclasses import fields, make_dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from importing import older_models as older
from torch import nn

from icl.cli import main
from tests.importing.test_raventos import CONFIG, save_run
from tests.importing.test_timaeus_lm import format_a, format_b


def make_older_files(base: Path) -> None:
    """Save a run of each older code base, and token rows, in `base`."""
    kind = make_dataclass(
        "ICRegConfig", [(field.name, field.type, field.default) for field in fields(older.ICRegConfig)]
    )
    kind.__module__ = "ic_regression"
    module = types.ModuleType("ic_regression")
    module.ICRegConfig = kind  # type: ignore[attr-defined]
    cfg = kind()
    icr, timaeus = older.ICRModel(cfg), older.TimaeusModel()
    tree = {"step": 1, "model_state_dict": icr.state_dict(), "cfg": cfg, "M": cfg.M, **_optimizer(icr)}
    with mock.patch.dict(sys.modules, {"ic_regression": module}):
        _save(base / "icr" / "checkpoint_step_1.pt", tree, is_zip=False)
    scheduler = {"scheduler": None, "rng_state": torch.get_rng_state().tolist(), "metadata": {}}
    _save(base / "timaeus" / "1.pt", {"model": timaeus.state_dict(), "optimizer": {}, **scheduler}, is_zip=True)
    save_run(base / "raventos", is_folder=True, config=CONFIG)
    format_a(base / "lm-a", steps=(100,))
    format_b(base / "lm-b")
    np.save(base / "tasks.npy", np.ones((7, 3), dtype=np.float32))


def import_from(code: str, *words: str):
    """Return the use that imports the run of one of these codes."""

    def use(base: Path, file: Path) -> int:
        places = [str(base / "tasks.npy") if word == "TASKS" else word for word in words]
        source = code.replace("lm-a", "timaeus-lm").replace("lm-b", "timaeus-lm")
        return main(["import", str(base / code), "--from", source, "--out", str(base / "imported"), *places])

    return use


def _optimizer(model: nn.Module) -> dict[str, object]:
    return {"optimizer_state_dict": torch.optim.Adam(model.parameters(), lr=2e-3).state_dict()}


def _save(path: Path, tree: dict, *, is_zip: bool) -> None:
    path.parent.mkdir(parents=True)
    torch.save(tree, path, _use_new_zipfile_serialization=is_zip)
