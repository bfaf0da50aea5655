"""`icl import` converts files in the formats of older code into runs with the same predictions and tasks."""

import dataclasses
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from importing import older_models as older

from icl import baselines
from icl.api import ICRegConfig, load_checkpoint, load_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.evaluation.sets import REPORT
from icl.importing.pickles import OlderFileError, read_pickle
from icl.importing.run import import_run
from icl.runs.checkpoints import CheckpointError, list_steps
from icl.runs.folder import RunError, RunFolder
from icl.tasks.priors import task_pool, task_sequence
from icl.tasks.prompts import sample_prompts

TOLERANCE = 1e-5


@pytest.fixture
def icr_module(monkeypatch):
    """Make the module `ic_regression` available, as while the older code saves. Reading must work without it."""
    module = types.ModuleType("ic_regression")
    fields = [(field.name, field.type, field.default) for field in dataclasses.fields(older.ICRegConfig)]
    kind = dataclasses.make_dataclass("ICRegConfig", fields)
    kind.__module__ = "ic_regression"
    module.ICRegConfig = kind
    monkeypatch.setitem(sys.modules, "ic_regression", module)
    return module


def save_icr(folder: Path, module, *, step: int, name: str | None = None, compiled: bool = False, **changes):
    """Save a checkpoint as ic_regression.py does, and return its model and config."""
    cfg = module.ICRegConfig(**changes)
    torch.manual_seed(step)
    model = older.perturb(older.ICRModel(cfg))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model(*older.prompts(cfg.D, cfg.K)).square().mean().backward()
    optimizer.step()
    state = {f"_orig_mod.{key}" if compiled else key: value for key, value in model.state_dict().items()}
    tree = {
        "step": step,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "cfg": cfg,
        "M": cfg.M,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or f"checkpoint_step_{step}.pt")
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    return model.eval(), cfg, path


def save_timaeus(folder: Path, *, step: int, callables: bool = False, **changes):
    """Save a checkpoint as timaeus-research/icl does, and return its model."""
    torch.manual_seed(step)
    model = older.perturb(older.TimaeusModel(**changes))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=500, anneal_strategy="linear")
    state = scheduler.state_dict()
    if callables:  # PyTorch 2.0 had this function in the state
        state["anneal_func"] = torch.optim.lr_scheduler.OneCycleLR._annealing_linear
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": state}
    tree |= {} if callables else {"rng_state": torch.get_rng_state().tolist(), "metadata": {}}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tree, folder / f"{step}.pt")
    return model.eval()


def assert_same_predictions(path: Path, model: torch.nn.Module, D: int = 3, K: int = 5) -> None:
    xs, ys = older.prompts(D, K)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(xs, ys), model(xs, ys), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("use_prenorm", [True, False])
def test_a_folder_of_icr_predicts_as_the_older_model_at_every_step(
    tmp_path, icr_module, monkeypatch, capsys, use_prenorm
):
    models = {
        step: save_icr(tmp_path / "old", icr_module, step=step, compiled=step == 20, use_prenorm=use_prenorm)[0]
        for step in (10, 20)
    }
    save_icr(tmp_path / "old", icr_module, step=20, name="checkpoint_final.pt", use_prenorm=use_prenorm)
    monkeypatch.delitem(sys.modules, "ic_regression")
    run = RunFolder(tmp_path / "run")
    assert main(["import", str(tmp_path / "old"), "--from", "icr", "--out", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "M = 6" in said
    assert "trainer.batch_size" in said
    assert list_steps(run.checkpoints) == [10, 20]
    for step, model in models.items():
        assert_same_predictions(run.checkpoints.root / f"step-{step:09d}.safetensors", model)
    config = run.read_config()
    assert (config.task.noise_variance, config.task.num_tasks, config.model.num_heads) == (0.125, 6, 4)
    assert (config.optim.lr, config.model.layer_norm) == (2e-3, "pre" if use_prenorm else "post")
    assert main(["checkpoints", str(run.path), "verify"]) == 0
    about = json.loads((run.path / "imported.json").read_text())
    assert set(about["files"]) == {"checkpoint_step_10.pt", "checkpoint_step_20.pt", "checkpoint_final.pt"}


def test_the_tasks_of_icr_are_those_of_its_code(tmp_path, icr_module):
    save_icr(tmp_path / "old", icr_module, step=1)
    run = import_run(tmp_path / "old", "icr", tmp_path / "run").folder
    tasks = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))[:6]  # as its sample_task_sequence
    config = run.read_config()
    assert torch.equal(task_pool(6, 3, task_sequence(config)), tasks)
    drawn = sample_prompts(config, stream="pretrain", step=0, batch_size=50).ws
    assert (drawn[:, None] == tasks).all(-1).any(1).all()


def test_load_model_takes_the_documented_file_and_config(tmp_path, icr_module, monkeypatch):
    model, cfg, path = save_icr(tmp_path / "checkpoints_M64", icr_module, step=150_000)
    monkeypatch.delitem(sys.modules, "ic_regression")
    names = ("D", "K", "sigma2", "d_model", "d_mlp", "n_heads", "n_layers", "M")
    mine = ICRegConfig(**{name: getattr(cfg, name) for name in names})
    xs, ys = older.prompts()
    with torch.no_grad():
        torch.testing.assert_close(load_model(path, mine)(xs, ys), model(xs, ys), rtol=0, atol=TOLERANCE)
    assert load_checkpoint(path)[1]["step"] == 150_000
    with pytest.raises(CheckpointError, match="num_layers is 2, not 3"):
        load_model(path, ICRegConfig())


@pytest.mark.parametrize(
    ("norm", "output", "callables"),
    [(True, True, False), (True, False, True), (False, True, False), (False, False, True)],
)
def test_a_folder_of_timaeus_predicts_as_the_older_model(tmp_path, capsys, norm, output, callables):
    folder = tmp_path / "M-inf-seed-3-task-0a1b2c-opt-0a1b2c-sched-0a1b2c"
    models = {
        step: save_timaeus(folder, step=step, norm=norm, output=output, callables=callables) for step in (0, 9, 100)
    }
    words = ["import", str(folder), "--from", "timaeus", "--out", str(tmp_path / "run")]
    assert main([*words, "--task.noise_variance", "0.125"]) == 2
    assert "`model.num_heads`" in capsys.readouterr().err
    assert main([*words, "--task.noise_variance", "0.125", "--model.num_heads", "4"]) == 0
    run = RunFolder(tmp_path / "run")
    assert list_steps(run.checkpoints) == [0, 9, 100]
    for step, model in models.items():
        assert_same_predictions(run.checkpoints.root / f"step-{step:09d}.safetensors", model)
    config = run.read_config()
    assert (config.task.is_gaussian, config.seeds.model) == (True, 3)
    assert (config.optim.schedule_steps, config.optim.lr) == (500, 3e-3)


def test_the_tasks_of_timaeus_come_from_a_file_or_its_seed(tmp_path):
    model = save_timaeus(tmp_path / "old", step=5)
    torch.manual_seed(11)
    tasks = torch.normal(mean=0.0, std=1.0, size=(4, 3))
    options = {"task.num_tasks": 4, "task.noise_variance": 0.25, "model.num_heads": 4}
    with pytest.raises(ConfigError, match="--tasks FILE"):
        import_run(tmp_path / "old", "timaeus", tmp_path / "none", options=options)
    assert not (tmp_path / "none").exists()
    drawn = import_run(
        tmp_path / "old", "timaeus", tmp_path / "a", options={**options, "seeds.tasks": 11}, tasks="recompute"
    )
    np.save(tmp_path / "tasks.npy", tasks[:, :, None].numpy())
    torch.save({"tasks": tasks}, tmp_path / "tasks.pt")
    for name in ("tasks.npy", "tasks.pt"):
        read = import_run(
            tmp_path / "old", "timaeus", tmp_path / name[-3:], options=options, tasks=str(tmp_path / name)
        )
        assert torch.equal(task_pool(4, 3, task_sequence(read.settings.config)), tasks)
    assert torch.equal(task_pool(4, 3, task_sequence(drawn.settings.config)), tasks)
    assert_same_predictions(drawn.folder.path, model)
    unknown = import_run(tmp_path / "old", "timaeus", tmp_path / "u", options=options, tasks="unknown").settings.config
    with pytest.raises(ConfigError, match="tasks of this imported run are not known"):
        sample_prompts(unknown, stream="pretrain", step=0, batch_size=2)


def test_a_state_dict_alone_is_imported_and_contradictions_are_refused(tmp_path):
    model = older.perturb(older.TimaeusModel(heads=2)).eval()
    torch.save(model.state_dict(), tmp_path / "7.pt")
    options = {"task.num_tasks": "inf", "task.noise_variance": 0.25, "model.num_heads": 2}
    with pytest.raises(
        ConfigError, match=r"`task.task_size` is 3 according to the files of the run.*, but 4 on the command line"
    ):
        import_run(tmp_path / "7.pt", "timaeus", tmp_path / "run", options={**options, "task.task_size": 4})
    run = import_run(tmp_path / "7.pt", "timaeus", tmp_path / "run", options=options)
    assert run.steps == [7]
    assert_same_predictions(run.folder.path, model)
    with pytest.raises(RunError, match="There is already a run at"):
        import_run(tmp_path / "7.pt", "timaeus", tmp_path / "run", options=options)


# What must be refused


class _Runs:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_could_run_code_is_refused_and_does_not(tmp_path, capsys, is_zip):
    path = tmp_path / "checkpoint_step_1.pt"
    torch.save({"model_state_dict": {}, "cfg": _Runs()}, path, _use_new_zipfile_serialization=is_zip)
    assert main(["import", str(path), "--from", "icr", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "`print`" in said.err
    assert "save the file again" in said.err
    assert "ran" not in said.out
    assert not (tmp_path / "run").exists()


def test_stand_ins_do_nothing(tmp_path):
    """Names in the list of stand-ins never lead to the real objects."""

    class Real:
        def __reduce__(self):
            return (getattr, (torch.optim.lr_scheduler.OneCycleLR, "_annealing_linear"))

    torch.save({"a": Real(), "b": torch.ones(2)}, tmp_path / "a.pt")
    tree = read_pickle(tmp_path / "a.pt")
    assert not callable(tree["a"])
    assert torch.equal(tree["b"], torch.ones(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: pickle.dumps({"a": 1}, protocol=5), "is damaged"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, damage, message):
    save_timaeus(tmp_path / "old", step=1)
    file = tmp_path / "old" / "1.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(OlderFileError, match=message) as refusal:
        import_run(file, "timaeus", tmp_path / "run")
    assert "\n" not in str(refusal.value)


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path):
    torch.save({"model_state_dict": {"input_proj.weight": torch.zeros(1).expand(2**40)}}, tmp_path / "1.pt")
    with pytest.raises(OlderFileError, match="larger than the file"):
        read_pickle(tmp_path / "1.pt")


def test_other_models_are_refused_by_name(tmp_path, icr_module):
    save_icr(tmp_path / "old", icr_module, step=1)
    with pytest.raises(OlderFileError, match="it looks like a checkpoint for --from icr"):
        import_run(tmp_path / "old", "timaeus", tmp_path / "run")
    with pytest.raises(ConfigError, match="--from"):
        import_run(tmp_path / "old", "garg", tmp_path / "run")
    save_icr(tmp_path / "old", icr_module, step=2, n_layers=1)
    with pytest.raises(OlderFileError, match=r"belong to different runs: `model\.num_layers`"):
        import_run(tmp_path / "old", "icr", tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    torch.save({"model_state_dict": {"input_proj.weight": torch.ones(4, 3)}, "step": 1}, tmp_path / "1.pt")
    with pytest.raises(OlderFileError, match="contains no tensor pos_emb"):
        import_run(tmp_path / "1.pt", "icr", tmp_path / "other")


def test_an_imported_run_is_not_trained_further(tmp_path, icr_module, capsys):
    save_icr(tmp_path / "old", icr_module, step=3)
    run = import_run(tmp_path / "old", "icr", tmp_path / "run").folder
    assert main(["train", "--config", str(run.config_file), "--run_name", "more"]) == 2
    assert "was imported from icr, so it cannot be trained further" in capsys.readouterr().err


@pytest.mark.slow
def test_every_command_works_on_an_imported_run(tmp_path, icr_module, capsys):
    """The evaluation uses the dMMSE of the older code's tasks."""
    _, cfg, _ = save_icr(tmp_path / "old", icr_module, step=3)
    save_icr(tmp_path / "old", icr_module, step=9)
    run = import_run(tmp_path / "old", "icr", tmp_path / "run").folder
    word = str(run.path)
    assert main(["evaluate", word, "--num_prompts", "64", "--out", str(tmp_path / "losses.csv")]) == 0
    rows = pd.read_csv(run.results / "evaluation.csv")
    (gap,) = rows.query(
        "step == 9 and distribution == 'pretrain' and quantity == 'delta_dmmse' and position == 'mean'"
    )["value"]
    xs, ys, _ = sample_prompts(run.read_config(), stream="pretrain", step=REPORT, batch_size=64)
    tasks = torch.randn(cfg.max_M, cfg.D, generator=torch.Generator().manual_seed(0))[: cfg.M]
    with torch.no_grad():
        predicted = load_model(run.path)(xs, ys)
    expected = (predicted - baselines.dmmse(xs, ys, tasks=tasks, noise_variance=cfg.sigma2)).square().mean()
    assert gap == pytest.approx(float(expected), rel=1e-4)
    (tmp_path / "prompt.csv").write_text("x1,x2,x3,y\n1,0,0,0.5\n0,1,0,\n")
    assert main(["predict", word, "--prompt", str(tmp_path / "prompt.csv")]) == 0
    assert main(["analyse", word, "--what", "embeddings"]) == 0
    assert main(["report", word]) == 0
    store = str(tmp_path / "store")
    assert main(["checkpoints", word, "push", "--store", store]) == 0
    assert main(["checkpoints", word, "verify", "--store", store]) == 0
    assert (tmp_path / "store" / "run" / "checkpoints" / "tasks.safetensors").is_file()
    (run.checkpoints.root / "tasks.safetensors").write_bytes(b"x")
    capsys.readouterr()
    assert main(["checkpoints", word, "verify", "--store", store]) == 1
    assert "tasks.safetensors is damaged" in capsys.readouterr().out


def test_a_relative_path_says_as_much_as_the_whole_path(tmp_path, monkeypatch):
    folder = tmp_path / "M-4-seed-3-task-0a1b2c-opt-0a1b2c-sched-0a1b2c"
    save_timaeus(folder, step=9)
    monkeypatch.chdir(folder)
    options = {"task.noise_variance": 0.25, "model.num_heads": 4}
    (folder / "inner").mkdir()
    for index, path in enumerate((".", "9.pt", "inner/..", "inner/../9.pt", "../" + folder.name)):
        config = import_run(
            path, "timaeus", tmp_path / f"run-{index}", options=options, tasks="unknown"
        ).settings.config
        assert (config.task.num_tasks, config.seeds.model) == (4, 3), path


def test_load_model_takes_the_step_and_the_number_of_tasks_from_the_names(tmp_path):
    folder = tmp_path / "M-4-seed-3-task-0a1b2c-opt-0a1b2c-sched-0a1b2c"
    model = save_timaeus(folder, step=9)
    shape = import_run(
        folder,
        "timaeus",
        tmp_path / "run",
        options={"task.noise_variance": 0.25, "model.num_heads": 4},
        tasks="unknown",
    ).settings.config
    for M in (4, float("inf")):  # the second contradicts the folder's name, which takes precedence
        task = dataclasses.replace(shape.task, num_tasks=M, imported_tasks=None)
        loaded, info = load_checkpoint(folder / "9.pt", dataclasses.replace(shape, task=task))
        assert info["step"] == 9
        xs, ys = older.prompts()
        with torch.no_grad():
            torch.testing.assert_close(loaded(xs, ys), model(xs, ys), rtol=0, atol=TOLERANCE)


def test_tied_weights_are_imported(tmp_path):
    model = older.perturb(older.TimaeusModel()).eval()
    blocks = model.token_sequence_transformer.blocks
    blocks[1].layer_norms[0].weight = blocks[0].layer_norms[0].weight
    torch.save(model.state_dict(), tmp_path / "7.pt")
    options = {"task.num_tasks": "inf", "task.noise_variance": 0.25, "model.num_heads": 4}
    run = import_run(tmp_path / "7.pt", "timaeus", tmp_path / "run", options=options).folder
    assert_same_predictions(run.path, model)


def test_tasks_do_not_depend_on_torchs_default_type(tmp_path, icr_module):
    save_icr(tmp_path / "icr", icr_module, step=1)
    save_timaeus(tmp_path / "timaeus", step=1)
    options = {"task.num_tasks": 4, "task.noise_variance": 0.25, "model.num_heads": 4, "seeds.tasks": 11}
    digests = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            icr = import_run(tmp_path / "icr", "icr", tmp_path / f"icr-{dtype}")
            timaeus = import_run(
                tmp_path / "timaeus", "timaeus", tmp_path / f"t-{dtype}", options=options, tasks="recompute"
            )
        finally:
            torch.set_default_dtype(torch.float32)
        digests.append([run.settings.config.task.imported_tasks for run in (icr, timaeus)])
    assert digests[0] == digests[1]


def test_a_failed_import_into_the_folder_of_the_older_code_removes_none_of_its_files(tmp_path):
    save_timaeus(tmp_path / "old", step=2)
    (tmp_path / "old" / "1.pt").write_bytes(b"half")
    for name in ("run.log", "imported.json"):
        (tmp_path / "old" / name).write_text("of the older code")
    options = {"task.num_tasks": "inf", "task.noise_variance": 0.25, "model.num_heads": 4}
    with pytest.raises(OlderFileError, match="is damaged"):
        import_run(tmp_path / "old", "timaeus", tmp_path / "old", options=options)
    for name in ("run.log", "imported.json"):
        assert (tmp_path / "old" / name).read_text() == "of the older code"


def test_an_option_that_is_no_setting_is_refused(tmp_path):
    save_timaeus(tmp_path / "old", step=2)
    with pytest.raises(ConfigError, match=r"There is no setting `model\.heads`"):
        import_run(tmp_path / "old", "timaeus", tmp_path / "run", options={"model.heads": 4})
