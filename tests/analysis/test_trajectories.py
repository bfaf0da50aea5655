"""Trajectories: each row is computed from a checkpoint and kept on disk, and products computed in parts equal dense products."""

import numpy as np
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.essential_dynamics import trajectories
from icl.analysis.essential_dynamics.trajectories import (
    StateSettings,
    centred_products,
    feature_blocks,
    fixed_prompts,
    read_trajectory,
    references,
    require_comparable,
)
from icl.build import build_checkpoint_model, build_model
from icl.config.validation import ConfigError
from icl.runs.checkpoints import CheckpointError, checkpoint_files, load_checkpoint_file, save_checkpoint
from icl.runs.folder import RunFolder
from icl.tasks.priors import task_pool

FEW = StateSettings(num_prompts=6)


def saved_run(path, steps=(0, 1, 4, 20), config=TINY):
    folder = RunFolder(path)
    for step in steps:
        model = build_model(change(config, seeds={"model": step}))
        save_checkpoint(folder.checkpoints, step, config, model.state_dict())
    return path


def test_outputs_are_those_of_the_plain_model_and_computed_once(tmp_path, monkeypatch):
    path = saved_run(tmp_path / "r")
    found = read_trajectory(path, FEW, run="r")
    assert found.steps == [0, 1, 4, 20]
    prompts = fixed_prompts(TINY, FEW)
    for file, row in zip(checkpoint_files(path), found.rows, strict=True):
        with torch.no_grad():
            expected = build_checkpoint_model(load_checkpoint_file(file))(prompts.xs, prompts.ys)
        np.testing.assert_allclose(row[:], expected.flatten().numpy(), rtol=1e-5, atol=5e-6)
    monkeypatch.setattr(trajectories, "predict_prompts", None)
    again = read_trajectory(path, FEW, run="r")
    np.testing.assert_array_equal(again.rows[2][:], found.rows[2][:])


def test_weights_are_read_from_the_checkpoints_in_one_order(tmp_path):
    path = saved_run(tmp_path / "r")
    found = read_trajectory(path, StateSettings(state="weights"), run="r")
    first, second = (load_checkpoint_file(file).params for file in checkpoint_files(path)[:2])
    assert len(found.rows[0]) == sum(tensor.numel() for tensor in first.values())
    expected = sum((first[name] * second[name]).sum().item() for name in first)
    assert found.rows[0][:] @ found.rows[1][:] == pytest.approx(expected, rel=1e-5)
    assert references([TINY], StateSettings(state="weights")) == {}


def test_whole_outputs_are_those_of_all_tokens(tmp_path):
    path = saved_run(tmp_path / "r")
    found = read_trajectory(path, StateSettings(state="tokens", num_prompts=6), run="r")
    assert [len(row) for row in found.rows] == [6 * 2 * 4 * 3] * 4  # B 2K (D + 1)
    outputs = read_trajectory(path, FEW, run="r")
    for whole, predictions in zip(found.rows, outputs.rows, strict=True):
        np.testing.assert_allclose(
            whole[:].reshape(6, 8, 3)[:, ::2, 0], predictions[:].reshape(6, 4), rtol=1e-5, atol=5e-6
        )
    assert references([TINY], StateSettings(state="tokens")) == {}


def test_gradients_are_those_of_the_plain_model(tmp_path):
    path, settings = saved_run(tmp_path / "r"), StateSettings(state="gradients", num_prompts=70)
    found, prompts = read_trajectory(path, settings, run="r"), fixed_prompts(TINY, settings)
    for file, row, noise in zip(checkpoint_files(path), found.rows, found.noise, strict=True):
        checkpoint = load_checkpoint_file(file)
        params = dict(build_checkpoint_model(checkpoint).named_parameters())
        predictions = torch.func.functional_call(build_model(TINY), params, (prompts.xs, prompts.ys))
        loss = (predictions - prompts.ys).square().mean()
        expected = torch.autograd.grad(loss, [params[name] for name in checkpoint.params])
        np.testing.assert_allclose(row[:], torch.cat([part.flatten() for part in expected]), rtol=1e-5, atol=1e-5)
        assert 0 < noise < 10 * np.square(row[:]).sum()
    with pytest.raises(ConfigError, match="at least 2 for gradients"):
        StateSettings(state="gradients", num_prompts=1)


def test_gradients_have_equal_small_batches():
    counts = {num: trajectories._num_batches(num) for num in (1, 2, 8, 24, 70, 97, 512, 1000)}
    assert counts == {1: 1, 2: 2, 8: 8, 24: 8, 70: 10, 97: 97, 512: 16, 1000: 40}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_read_from_beside_the_checkpoints(tmp_path, dtype):
    path, generator = saved_run(tmp_path / "r"), torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in build_model(TINY).state_dict().items()}
    saved = []
    for step in (0, 1, 4, 20):
        with pytest.raises(CheckpointError, match=f"no Adam moments at step {step}. .*--checkpoints.moments true"):
            read_trajectory(path, StateSettings(state="first_moment"), run="r")
        names = [f"{kind}/{name}" for kind in ("exp_avg_sq", "exp_avg") for name in shapes]  # in any order
        moments = {
            name: torch.randn(shapes[name.partition("/")[2]], generator=generator, dtype=dtype) for name in names
        }
        save_checkpoint(RunFolder(path).moments, step, TINY, moments)
        saved.append(moments)
    for state, prefix in (("first_moment", "exp_avg/"), ("second_moment", "exp_avg_sq/")):
        found = read_trajectory(path, StateSettings(state=state), run="r")
        for row, moments in zip(found.rows, saved, strict=True):
            own = [moments[name].flatten() for name in sorted(moments) if name.startswith(prefix)]
            np.testing.assert_array_equal(row[:], torch.cat(own))
    assert len(load_checkpoint_file(checkpoint_files(path)[0]).params) == len(shapes)  # weights are what they were
    file = RunFolder(path).moments.root / "step-000000004.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"moments/step-000000004\.safetensors is damaged"):
        read_trajectory(path, StateSettings(state="second_moment"), run="r")


def test_products_in_stretches_are_the_dense_ones():
    generator = np.random.default_rng(0)
    rows = list(generator.normal(size=(7, 50)).astype(np.float32) + 1000)
    points = generator.normal(size=(2, 50)) + 1000
    matrix = np.array(rows, dtype=np.float64)
    centred, others = matrix - matrix.mean(0), points - matrix.mean(0)
    for block_bytes in (1, 8 * 7 * 13, 2**20):
        found = centred_products(rows, points, block_bytes=block_bytes)
        np.testing.assert_allclose(found.rows, centred @ centred.T, atol=1e-9)
        np.testing.assert_allclose(found.references, others @ centred.T, atol=1e-9)
        np.testing.assert_allclose(found.squares, (others**2).sum(1))


def test_stretches_stay_within_their_memory():
    blocks = list(feature_blocks([np.zeros(100)] * 5, block_bytes=8 * 5 * 30))
    assert [block.shape for block in blocks] == [(5, 30), (5, 30), (5, 30), (5, 10)]


def test_prompts_of_the_first_task_are_the_same_for_every_pool():
    settings = StateSettings(distribution="first_task", num_prompts=3)
    prompts = fixed_prompts(TINY, settings)
    assert torch.equal(prompts.ws, task_pool(1, 2, TINY.seeds.tasks).expand(3, 2))
    other = fixed_prompts(change(TINY, task={"num_tasks": 2}), settings)
    assert torch.equal(prompts.ys, other.ys)
    noise = prompts.ys - (prompts.xs @ prompts.ws[0])
    assert noise.std().item() == pytest.approx(0.5, abs=5 * 0.5 / 24**0.5)


def test_references_are_the_bayes_predictors_of_every_run():
    configs = [change(TINY, task={"num_tasks": m}) for m in (1, 4, float("inf"))]
    found = references(configs, FEW)
    assert list(found) == ["ridge", "dMMSE M=1", "dMMSE M=4"]
    prompts = fixed_prompts(TINY, FEW)
    only = prompts.xs @ task_pool(1, 2, TINY.seeds.tasks)[0]
    np.testing.assert_allclose(found["dMMSE M=1"], only.flatten().numpy(), atol=1e-5)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    wider = change(TINY, model={"embed_size": 16})
    fewer = change(TINY, task={"num_tasks": 2})
    runs = [saved_run(tmp_path / name, config=config) for name, config in (("a", TINY), ("b", wider), ("c", fewer))]
    for settings, others, said in (
        (StateSettings(state="weights"), (0, 1), "different architectures"),
        (StateSettings(state="gradients", num_prompts=6), (0, 1), "different architectures"),
        (StateSettings(state="gradients", distribution="pretrain", num_prompts=6), (0, 2), "different prompts"),
        (StateSettings(distribution="pretrain", num_prompts=6), (0, 2), "different prompts"),
    ):
        pair = [read_trajectory(runs[place], settings, run=str(place)) for place in others]
        with pytest.raises(ConfigError, match=said):
            require_comparable(pair, settings)
    require_comparable([read_trajectory(run, FEW, run="x") for run in runs], FEW)
    with pytest.raises(CheckpointError, match="give the folder of a run"):
        read_trajectory(checkpoint_files(runs[0])[0], FEW, run="x")
