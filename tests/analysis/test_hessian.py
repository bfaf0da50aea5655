"""The Hessian of a model, compared with a dense Hessian in float64, and the Hessian analysis of a run."""

import shutil

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.hessian import NUM_BATCHES, Settings, analyse, hessian_products, measure_members
from icl.analysis.run import Measurement, Members
from icl.build import build_model
from icl.cli import main
from icl.compute.linalg import lanczos, ritz, trace
from icl.config.validation import ConfigError
from icl.model.stacked import stack
from icl.plotting.hessian import plot
from icl.runs.checkpoints import Checkpoint, CheckpointError, save_checkpoint
from icl.runs.folder import RunFolder
from icl.tasks.prompts import Prompts, sample_prompts

SMALL = change(TINY, model={"embed_size": 4, "mlp_size": 4})
QUICK = ["--num_prompts", "16", "--num_steps", "8", "--num_probes", "2", "--num_eigenvalues", "2"]


def weights(config, *, seed=0, dtype=torch.float64):
    model = build_model(change(config, seeds={"model": seed}))
    return {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}


def prompts(count=32, dtype=torch.float64):
    found = sample_prompts(TINY, stream="hessian", step=0, batch_size=count)
    return Prompts(*(tensor.to(dtype) for tensor in found))


def dense(config, params, batch):
    """Return the Hessian of the mean loss, by double backward passes, row by row.

    We do not use `torch.func.hessian`, which maps over rows by vmap. In torch 2.13 this gives wrong second
    derivatives in a layer norm's weight: the matrix is not symmetric. Finite differences of the gradient agree with
    the method used here.
    """
    model = build_model(config).double()
    flat = torch.cat([tensor.flatten() for tensor in params.values()])

    def loss(vector):
        pieces = vector.split([tensor.numel() for tensor in params.values()])
        named = {name: piece.view_as(params[name]) for name, piece in zip(params, pieces, strict=True)}
        predictions = torch.func.functional_call(model, named, (batch.xs, batch.ys))
        return (predictions - batch.ys).square().mean()

    return torch.autograd.functional.hessian(loss, flat)


def test_products_are_those_of_the_dense_hessian_of_each_batch():
    members, batch = [weights(SMALL, seed=seed) for seed in range(2)], prompts(16)
    size = sum(tensor.numel() for tensor in members[0].values())
    vectors = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = [Prompts(*(tensor[start : start + 8] for tensor in batch)) for start in (0, 8)]
    expected = torch.stack(
        [
            torch.stack([dense(SMALL, params, half) @ vector for half in halves])
            for params, vector in zip(members, vectors, strict=True)
        ]
    )
    for at_once in (1000, 8, 1):  # all kept; one batch at a time; the least there is
        products = hessian_products(SMALL.model, stack(members), batch, 2, prompts_at_once=at_once)
        for _ in range(2):  # what is kept can be used again
            torch.testing.assert_close(products(vectors), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_eigenvalues_and_trace_are_those_of_the_dense_hessian():
    """In float32, as used for runs, eigenvalues must agree to 1 % and the trace to 5 %."""
    params, batch = weights(SMALL), prompts()
    matrix = dense(SMALL, params, batch)
    torch.testing.assert_close(matrix, matrix.mT)
    truth = torch.linalg.eigvalsh(matrix)
    single = {name: tensor.float().unsqueeze(0) for name, tensor in params.items()}
    products = hessian_products(SMALL.model, single, prompts(dtype=torch.float32), NUM_BATCHES, prompts_at_once=1000)
    vectors = torch.randn(257, 1, len(matrix), generator=torch.Generator().manual_seed(1))
    krylov = lanczos(products, vectors[0], 40)
    found, traces = ritz(krylov), trace(products, krylov, vectors[1:].sign())
    assert found.values[0, -3:].tolist() == pytest.approx(truth[-3:].tolist(), rel=1e-2)
    assert found.values[0, 0].item() == pytest.approx(truth[0].item(), rel=1e-2)
    exact = matrix.trace().item()
    assert abs(traces.whole.value.item() - exact) < 4 * traces.probe_stderr.item() + 1e-4 * exact
    assert traces.whole.value.item() == pytest.approx(exact, rel=5e-2)


def members_of(config, seeds):
    params = [weights(config, seed=seed, dtype=torch.float32) for seed in seeds]
    checkpoints = [Checkpoint(seed, config, one, "digest") for seed, one in zip(seeds, params, strict=True)]
    return Members(config, checkpoints, stack(params), 0)


def test_a_members_rows_do_not_depend_on_its_company(monkeypatch):
    settings = Settings(num_prompts=16, num_steps=6, num_probes=2, num_eigenvalues=2)
    together = measure_members(members_of(SMALL, [0, 5]), settings=settings)
    monkeypatch.setattr("icl.analysis.prompts._NUMBERS_AT_ONCE", 1)
    alone = measure_members(members_of(SMALL, [5]), settings=settings)
    for one, other in zip(together[1].rows, alone[0].rows, strict=True):
        assert (one["quantity"], one["part"]) == (other["quantity"], other["part"])
        assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-4)


def test_what_has_not_converged_is_suspect():
    settings = Settings(num_prompts=16, num_steps=4, num_probes=2, num_eigenvalues=2)
    (found,) = measure_members(members_of(TINY, [0]), settings=settings)
    verdicts = {row["part"]: row for row in found.rows if row["quantity"] == "eigenvalue"}
    assert set(verdicts) == {"top 1", "top 2", "bottom 1", "bottom 2"}
    doubtful = [row for row in verdicts.values() if row["lanczos_error"] > 0.01 * abs(row["value"])]
    assert doubtful
    assert all(row["verdict"] == "suspect" and "num_steps" in row["reasons"] for row in doubtful)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_diverged_checkpoint_is_invalid_and_the_others_are_measured(tmp_path, capsys, bad):
    folder = RunFolder(tmp_path / "r")
    folder.write_config(SMALL)
    diverged = {name: tensor + bad for name, tensor in weights(SMALL, dtype=torch.float32).items()}
    save_checkpoint(folder.checkpoints, 0, SMALL, weights(SMALL, dtype=torch.float32))
    save_checkpoint(folder.checkpoints, 5, SMALL, diverged)
    assert main(["analyse", str(folder.path), "--what", "hessian", *QUICK]) == 0
    assert "4 invalid" in "".join(line for line in capsys.readouterr().out.splitlines() if "Suspect eig" in line)
    table = pd.read_csv(folder.results / "hessian.csv")
    table = table[table["quantity"] != "num_parameters"]
    first, last = table[table["step"] == 0], table[table["step"] == 5]
    assert len(first) == len(last)
    assert last["value"].isna().all()
    assert set(last["verdict"]) == {"invalid"}
    assert last["reasons"].str.contains("not finite").all()
    assert first["value"].notna().all()
    assert "invalid" not in set(first["verdict"])


@pytest.mark.slow
def test_the_hessian_of_a_run_from_the_command_line(tmp_path, capsys):
    folder = RunFolder(tmp_path / "r")
    folder.write_config(SMALL)
    for step in (0, 1, 20):
        save_checkpoint(folder.checkpoints, step, SMALL, weights(SMALL, seed=step, dtype=torch.float32))
    assert main(["analyse", str(folder.path), "--what", "hessian", *QUICK]) == 0
    said = capsys.readouterr().out
    assert "eigenvalue top 1" in said
    assert (folder.figures / "hessian.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "hessian.csv")
    assert set(table["step"]) == {0, 1, 20}
    assert set(table["quantity"]) == {"eigenvalue", "trace", "num_parameters", "spectral_node", "spectral_weight"}
    weight = table[table["quantity"] == "spectral_weight"].groupby("step")["value"].sum()
    assert weight.tolist() == pytest.approx([1, 1, 1])
    assert (table.loc[table["quantity"] == "trace", "stderr"] > 0).all()
    shutil.rmtree(folder.results)
    assert main(["analyse", str(folder.path), "--what", "hessian", *QUICK]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(folder.results / "hessian.csv"), table)  # loading has no say in the draws


def test_few_steps_are_measured_together_so_that_work_is_kept(tmp_path, monkeypatch):
    counts = []

    def counting(members, *, settings):
        counts.append(len(members.checkpoints))
        row = {"quantity": "trace", "part": "all", "value": 1.0, "stderr": 0.0, "verdict": "ok", "reasons": ""}
        return [Measurement([row]) for _ in members.checkpoints]

    monkeypatch.setattr("icl.analysis.hessian.measure_members", counting)
    monkeypatch.setattr("icl.analysis.hessian._MEMBERS_AT_ONCE", 2)
    folder = RunFolder(tmp_path / "r")
    for step in range(5):
        save_checkpoint(folder.checkpoints, step, SMALL, weights(SMALL, seed=step, dtype=torch.float32))
    analyse(folder.path, Settings())
    assert counts == [2, 2, 1]
    analyse(folder.path, Settings())
    assert counts == [2, 2, 1]


def test_a_figure_of_one_step():
    settings = Settings(num_prompts=8, num_steps=4, num_probes=2, num_eigenvalues=2)
    (found,) = measure_members(members_of(SMALL, [0]), settings=settings)
    figure = plot(pd.DataFrame([{"step": 0, **row} for row in found.rows]), title="one")
    assert len(figure.axes) == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_prompts": 12}, "multiple of 8"),
        ({"num_steps": 5}, "`num_steps` must be a whole number of at least 6"),
        ({"num_probes": 1}, "`num_probes` must be a whole number of at least 2"),
        ({"num_eigenvalues": 0}, "`num_eigenvalues` must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_sentences(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Settings(**wrong)


def test_a_folder_without_checkpoints_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError):
        analyse(tmp_path / "nowhere", Settings())


@pytest.mark.slow
def test_the_published_trace_at_the_start():
    """In the released data of Hoogland et al. 2024, the trace at the start is about 150 (+- 30 between seeds), the top eigenvalue about 37."""
    from icl.presets import preset

    config = change(preset("L2H4"), model={"double_residual": True})
    settings = Settings(num_prompts=256, num_steps=24, num_probes=24)
    (found,) = measure_members(members_of(config, [0]), settings=settings)
    values = {(row["quantity"], row["part"]): (row["value"], row["stderr"]) for row in found.rows}
    value, stderr = values["trace", "all"]
    assert abs(value - 150) < 30 + 2 * stderr
    assert values["eigenvalue", "top 1"][0] == pytest.approx(37, rel=0.25)
