"""Files that try to need much memory or time, or to mislead `icl import`, are refused in one sentence."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importing import older_models as older

from icl.api import load_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.files.reading import ContentError
from icl.importing.formats import FORMATS
from icl.importing.models import number_files
from icl.importing.msgpack import parse_msgpack
from icl.importing.pickles import OlderFileError, read_pickle
from icl.importing.run import import_run
from icl.runs.checkpoints import list_steps
from icl.runs.folder import RunError

msgpack = pytest.importorskip("msgpack")


def icr_tree(step: int = 1, **changes: Any) -> dict[str, Any]:
    """Return what ic_regression.py saves, with the config as a dict."""
    cfg = older.ICRegConfig()
    model = older.perturb(older.ICRModel(cfg))
    tree = {"step": step, "model_state_dict": model.state_dict(), "cfg": {**vars(cfg), **changes}, "M": cfg.M}
    return {**tree, "M": changes.get("M", cfg.M)}


def nested(levels: int, width: int, leaf: Any) -> Any:
    """Return a list that contains the same list many times, on many levels."""
    for _ in range(levels):
        leaf = [leaf] * width
    return leaf


def test_numbers_of_numpy_are_settings(tmp_path):
    """`M = 2 ** np.arange(10)[6]` is such a number."""
    torch.save(icr_tree(M=np.int64(6), sigma2=np.float32(0.125), n_heads=np.int32(4)), tmp_path / "1.pt")
    config = import_run(tmp_path / "1.pt", "icr", tmp_path / "run").settings.config
    assert (config.task.num_tasks, config.task.noise_variance, config.model.num_heads) == (6, 0.125, 4)


@pytest.mark.parametrize("value", [np.float64(0.1).astype(">f8"), np.complex128(1), torch.ones(2), [4], None])
def test_a_setting_that_is_no_number_is_asked_for(tmp_path, value):
    torch.save(icr_tree(n_heads=value, D=value), tmp_path / "1.pt")
    with pytest.raises((ConfigError, OlderFileError), match=r"does not contain `model.num_heads`|its config says D"):
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run")


@pytest.mark.parametrize("key", ["x", "cfg", "M", "n_heads"])
def test_a_list_that_contains_itself_many_times_takes_no_time(tmp_path, key):
    tree = icr_tree()
    bomb = nested(40, 2, torch.ones(1))
    torch.save(
        {**tree, "cfg": {**tree["cfg"], key: bomb}} if key == "n_heads" else {**tree, key: bomb}, tmp_path / "1.pt"
    )
    if key == "x":
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run")
        return
    with pytest.raises(ConfigError, match=r"does not contain|cannot be drawn again") as refusal:
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run")
    assert len(str(refusal.value)) < 1000


def test_a_compressed_file_does_not_fill_the_memory(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model_state_dict": {"input_proj.weight": torch.zeros(2**24)}}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "1.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    tracemalloc.start()
    with pytest.raises(OlderFileError, match="is compressed or damaged: it claims to contain 67,"):
        read_pickle(tmp_path / "1.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [bytearray, torch.Tensor, torch.FloatTensor, torch.UntypedStorage])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_call_that_allocates_memory_is_refused(tmp_path, function, is_zip):
    """With `weights_only=True`, PyTorch calls these functions with any number that the file contains."""
    torch.save({"x": Call(function, 400_000_000)}, tmp_path / "1.pt", _use_new_zipfile_serialization=is_zip)
    tracemalloc.start()
    with pytest.raises(OlderFileError, match=f"contains the Python object `[a-z.]*{function.__name__}`"):
        read_pickle(tmp_path / "1.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_file_with_two_tables_of_contents_is_refused(tmp_path):
    """PyTorch reads the table at the offset that the end of the file gives, and zipfile the table before the end of the file."""
    buffer = io.BytesIO()
    torch.save({"x": 1}, buffer)
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as archive:
        start = archive.start_dir
    harmless = buffer.getvalue()
    (tmp_path / "1.pt").write_bytes(harmless[:start] + harmless)
    with pytest.raises(OlderFileError, match="it has bytes that do not belong to the zip file"):
        read_pickle(tmp_path / "1.pt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused(tmp_path):
    weights = {"input_proj.weight": torch.nested.nested_tensor([torch.ones(2)])}
    torch.save({"model_state_dict": weights}, tmp_path / "1.pt")
    with pytest.raises(OlderFileError, match="sparse, nested or quantized tensor"):
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run")


def array(shape: Any, name: str = "float32", data: bytes = b"\0" * 4) -> bytes:
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb([shape, name, data])))


def chunked(shape: list[Any]) -> bytes:
    chunks = {"0": msgpack.ExtType(1, msgpack.packb([[4], "float32", b"\0" * 16]))}
    axes = {str(axis): size for axis, size in enumerate(shape)}
    return msgpack.packb({"__msgpack_chunked_array__": True, "shape": axes, "chunks": chunks})


@pytest.mark.parametrize(
    "data",
    [
        array([1] * 100),
        array([True]),
        array([-1]),
        array([0, 2**39, 2**39], data=b""),
        array([1], "bfloat16", b"\0" * 3),
        chunked([-1, -4]),
        chunked([4] + [1] * 99),
        chunked([True, 4]),
        chunked([4.0]),
    ],
)
def test_an_impossible_shape_is_refused(data):
    with pytest.raises(ContentError):
        parse_msgpack(data)


@pytest.mark.parametrize(
    ("name", "step"),
    [("1465", 1465), ("checkpoint_step_7", 7), ("step=7", 7), ("run-step-000007", 7), ("iter_7", 7), ("0", 0)],
)
def test_a_name_says_the_step(name, step):
    assert number_files([Path(f"{name}.pt")], FORMATS["timaeus"], None) == [(step, Path(f"{name}.pt"))]


@pytest.mark.parametrize("name", ["seed-3", "M-64", "model-0.5", "-5", "٣", "v2"])
def test_other_numbers_in_a_name_are_no_steps(tmp_path, name):
    torch.save(older.TimaeusModel().state_dict(), tmp_path / f"{name}.pt")
    with pytest.raises(OlderFileError, match="does not say its step"):
        number_files([tmp_path / f"{name}.pt"], FORMATS["timaeus"], None)
    assert number_files([tmp_path / f"{name}.pt"], FORMATS["timaeus"], 8)[0][0] == 8


def test_a_failed_import_leaves_nothing_that_the_next_one_would_take_up(tmp_path):
    (tmp_path / "old").mkdir()
    for step in (1, 3):
        torch.save(icr_tree(step), tmp_path / "old" / f"checkpoint_step_{step}.pt")
    (tmp_path / "old" / "checkpoint_step_2.pt").write_bytes(b"half")
    (tmp_path / "old" / "._checkpoint_step_9.pt").write_bytes(b"macOS")
    with pytest.raises(OlderFileError, match=r"checkpoint_step_2\.pt is damaged"):
        import_run(tmp_path / "old", "icr", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "old" / "checkpoint_step_2.pt").unlink()
    (tmp_path / "old" / "checkpoint_step_1.pt").unlink()
    run = import_run(tmp_path / "old", "icr", tmp_path / "run").folder
    assert list_steps(run.checkpoints) == [3]
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match="perhaps from an import that was killed"):
        import_run(tmp_path / "old", "icr", tmp_path / "killed")


def test_a_link_to_nothing_is_not_skipped(tmp_path):
    """Git-annex has such links for files that were not fetched."""
    torch.save(icr_tree(), tmp_path / "checkpoint_step_1.pt")
    (tmp_path / "checkpoint_step_2.pt").symlink_to(tmp_path / "nothing")
    with pytest.raises(OlderFileError, match=r"checkpoint_step_2\.pt is not a file"):
        import_run(tmp_path, "icr", tmp_path / "run")


@pytest.mark.parametrize("key", ["run_name", "preset", "population.seeds", "checkpoints.store", "task.imported_tasks"])
def test_an_option_without_meaning_is_refused(tmp_path, key):
    torch.save(icr_tree(), tmp_path / "1.pt")
    with pytest.raises(ConfigError, match="cannot be chosen for an imported run"):
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run", options={key: "1"})


def test_a_schedule_that_is_no_triangle_is_not_called_one(tmp_path):
    for name, step in (("linear", 1), ("cos", 2)):
        model = older.TimaeusModel()
        optimizer = torch.optim.Adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-3, total_steps=100, anneal_strategy=name, pct_start=0.3
        )
        tree = {"model": model.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(tree, tmp_path / f"{step}.pt")
    facts = [FORMATS["timaeus"].facts(read_pickle(tmp_path / f"{step}.pt")) for step in (1, 2)]
    assert (facts[0]["optim.schedule"], facts[0]["optim.warmup_steps"]) == ("triangle", 30)
    assert "optim.schedule" not in facts[1]


def test_tables_of_tasks_that_mislead_are_refused(tmp_path):
    torch.save(icr_tree(), tmp_path / "1.pt")
    np.save(tmp_path / "large.npy", np.full((6, 3), 1e300))
    np.save(tmp_path / "big-endian.npy", np.ones((6, 3), dtype=">f8"))
    header = (tmp_path / "large.npy").read_bytes()
    (tmp_path / "header.npy").write_bytes(header[:10] + b"(" * 60 + header[70:])
    (tmp_path / "claim.npy").write_bytes(header.replace(b"(6, 3)", b"(6000000000000, 3)")[:300])
    torch.save({"a": torch.ones(6, 3), "b": torch.ones(6, 3)}, tmp_path / "two.pt")
    for name, message in (
        ("large.npy", "not finite in 32 bits"),
        ("header.npy", "cannot be read"),
        ("claim.npy", "cannot be read"),
        ("two.pt", "must contain one table, or a table with the name `tasks`; it contains 2 tables"),
    ):
        with pytest.raises(OlderFileError, match=message):
            import_run(tmp_path / "1.pt", "icr", tmp_path / "run", tasks=str(tmp_path / name))
    import_run(tmp_path / "1.pt", "icr", tmp_path / "run", tasks=str(tmp_path / "big-endian.npy"))


def test_a_pool_that_no_file_could_hold_is_refused_before_it_is_drawn(tmp_path):
    torch.save(icr_tree(M=2**31 - 1, max_M=2**60), tmp_path / "1.pt")
    with pytest.raises(ConfigError, match="Write --tasks unknown"):
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tree = icr_tree()
    tree["model_state_dict"]["ln_f.bias"][3] = float("nan")
    torch.save(tree, tmp_path / "1.pt")
    with pytest.raises(OlderFileError, match="weights that are not finite"):
        import_run(tmp_path / "1.pt", "icr", tmp_path / "run")


def test_a_damaged_imported_run_is_to_be_imported_again(tmp_path, capsys):
    torch.save(icr_tree(), tmp_path / "1.pt")
    run = import_run(tmp_path / "1.pt", "icr", tmp_path / "run").folder
    (run.checkpoints.root / "tasks.safetensors").write_bytes(b"x")
    assert main(["checkpoints", str(run.path), "verify"]) == 1
    assert "import the run again with `icl import`" in capsys.readouterr().err


def test_load_model_names_the_file_that_it_refuses(tmp_path):
    torch.save({"model_state_dict": {"input_proj.weight": torch.ones(4, 3)}, "step": 1}, tmp_path / "1.pt")
    with pytest.raises(OlderFileError, match=r"1\.pt cannot be loaded: it contains no tensor pos_emb"):
        load_model(tmp_path / "1.pt")
