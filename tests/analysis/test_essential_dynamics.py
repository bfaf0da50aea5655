"""Essential dynamics from start to end: the table, its null models, several runs, refused inputs, and the figure."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from tiny_runs import TINY, change

from icl.analysis.essential_dynamics import fit_components
from icl.analysis.essential_dynamics.forms import find_shapes
from icl.analysis.essential_dynamics.trajectories import StateSettings, Trajectory, read_trajectory, references
from icl.analysis.run import analyse
from icl.build import build_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.plotting.essential_dynamics import plot
from icl.runs.checkpoints import CheckpointError, save_checkpoint
from icl.runs.folder import RunFolder

STEPS = (0, 1, 2, 4, 7, 12, 20, 33, 54, 60)


def saved_run(path, steps=STEPS, config=TINY, start=0):
    """Return a run whose weights go in a straight line from one seed's model to another's, with a detour."""
    folder = RunFolder(path)
    ends = [build_model(change(config, seeds={"model": start + seed})).state_dict() for seed in (0, 1, 2)]
    for step in steps:
        way = np.log1p(step) / np.log1p(60)
        weights = (1 - way, way, 0.5 * np.sin(np.pi * way))
        mixed = {name: sum(w * end[name] for w, end in zip(weights, ends, strict=True)) for name in ends[0]}
        save_checkpoint(folder.checkpoints, step, config, {name: tensor.float() for name, tensor in mixed.items()})
    return folder


def made_up(points, steps):
    return Trajectory("r", TINY, list(steps), ["x"] * len(points), list(points), [0.0] * len(points))


def values(table, quantity):
    return table[table["quantity"] == quantity].set_index("item")["value"]


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path, capsys):
    folder, out = saved_run(tmp_path / "r"), tmp_path / "out.json"
    words = ["analyse", str(folder.path), "--what", "essential-dynamics", "--num_prompts", "16", "--out", str(out)]
    assert main(words) == 0
    assert "Squared displacement" in capsys.readouterr().out
    assert (folder.figures / "essential-dynamics.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "essential-dynamics.csv")
    assert len(json.loads(out.read_text())["rows"]) == len(table)
    scores = table[table["quantity"] == "score"]
    assert scores["step"].tolist() == [step for step in STEPS for _ in range(4)]
    assert scores["checkpoint_hash"].nunique() == len(STEPS)
    assert set(table["bandwidth"]) == {0.15}
    assert set(table.loc[table["quantity"] == "reference_score", "run"]) == {"ridge", "dMMSE M=16"}
    assert (table[table["quantity"] == "arc_length"]["value"].diff().dropna() > 0).all()
    for name in ("explained_share", "null_walk", "null_flips", "null_brownian", "null_equal"):
        shares = values(table, name)
        assert list(shares.index) == ["PC1", "PC2", "PC3", "PC4"]
        assert 0.5 < shares.sum() <= 1 + 1e-9


def test_weights_on_a_known_way_have_its_two_components(tmp_path):
    table = analyse("essential-dynamics", saved_run(tmp_path / "r").path, state="weights").table
    shares = values(table, "explained_share")
    assert shares["PC1"] + shares["PC2"] == pytest.approx(1, abs=1e-6)
    assert values(table, "displacement_ratio")["all"] > 2
    assert "reference_score" not in set(table["quantity"])


def test_two_runs_share_their_components(tmp_path):
    runs = [saved_run(tmp_path / name, start=start) for name, start in (("a", 0), ("b", 5))]
    result = analyse("essential-dynamics", runs[0].path, jointly_with=str(runs[1].path), num_prompts=16)
    scores = result.table[result.table["quantity"] == "score"]
    assert scores.groupby("run").size().to_dict() == {"a": 40, "b": 40}
    assert scores.groupby("item")["value"].sum().abs().max() < 1e-3  # centred together
    assert scores[scores["item"] == "PC1"].groupby("run")["value"].sum().abs().min() > 1
    figure = plot(result.table, title="a")
    assert "a and 1 more" in figure.get_suptitle()


@pytest.mark.parametrize("state", ["outputs", "tokens", "weights", "gradients"])
def test_a_joint_pca_is_that_of_the_stacked_states(tmp_path, state):
    """The result equals NumPy's SVD, up to signs."""
    runs = [saved_run(tmp_path / name, start=start) for name, start in (("a", 0), ("b", 5))]
    settings = StateSettings(state=state, num_prompts=16)
    rows = [row[:] for run in runs for row in read_trajectory(run.path, settings, run="x").rows]
    matrix = np.array(rows, dtype=np.float64)
    left, singular, _ = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    table = analyse(
        "essential-dynamics", runs[0].path, jointly_with=str(runs[1].path), state=state, num_prompts=16
    ).table
    scores = table[table["quantity"] == "score"].pivot(index=["run", "step"], columns="item", values="value")
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :4] * singular[:4]), atol=1e-6 * singular[0])
    np.testing.assert_allclose(values(table, "explained_share"), (singular**2 / (singular**2).sum())[:4], rtol=1e-9)


@pytest.mark.slow
def test_runs_of_different_diversity_from_the_command_line(tmp_path, capsys):
    """As in Carroll et al. 2025, ridge and every run's dMMSE are projected on the components, but do not influence them."""
    configs = [change(TINY, task={"num_tasks": num_tasks}) for num_tasks in (2, 4, float("inf"))]
    runs = [saved_run(tmp_path / str(place), config=config, start=place) for place, config in enumerate(configs)]
    others = ",".join(str(run.path) for run in runs[1:])
    words = ["analyse", str(runs[0].path), "--what", "essential-dynamics", "--jointly_with", others]
    assert main([*words, "--distribution", "first_task", "--num_prompts", "16"]) == 0
    assert "30 checkpoints of 0, 1, 2" in capsys.readouterr().out
    table = pd.read_csv(runs[0].results / "essential-dynamics.csv", dtype={"run": str})
    settings = StateSettings(distribution="first_task", num_prompts=16)
    matrix = np.array([row[:] for run in runs for row in read_trajectory(run.path, settings, run="x").rows], float)
    fit = PCA(4).fit(matrix)
    points = references(configs, settings)
    assert list(points) == ["ridge", "dMMSE M=2", "dMMSE M=4"]
    for name, point in points.items():
        own = table[(table["run"] == name) & (table["quantity"] == "reference_score")]["value"]
        np.testing.assert_allclose(np.abs(own), np.abs(fit.transform(point[None])[0]), rtol=1e-6)
    plot(table, title="three")


def test_gradients_that_are_noise_are_in_doubt(tmp_path):
    """First the steps hardly differ and there are only two prompts. Then the models are far apart and there are many prompts."""
    still = RunFolder(tmp_path / "still")
    for step in STEPS:
        model = build_model(TINY).state_dict()
        model["unembedding.bias"] += 1e-3 * step
        save_checkpoint(still.checkpoints, step, TINY, model)
    for path, num_prompts, doubted in ((still.path, 2, True), (saved_run(tmp_path / "far").path, 256, False)):
        result = analyse("essential-dynamics", path, state="gradients", num_prompts=num_prompts)
        share = result.table[result.table["quantity"] == "noise_share"].iloc[0]
        assert (share["value"] > 0.5) == doubted
        reasons = result.table.loc[result.table["quantity"] == "explained_share", "reasons"]
        assert reasons.str.contains("estimation noise").all() == doubted
        assert any("Share of estimation noise" in line for line in result.summary)
        plot(result.table, title="x")


def test_a_random_walk_is_told_from_a_curve():
    generator = np.random.default_rng(0)
    steps = np.unique(np.geomspace(1, 1000, 40).astype(int))
    walk = np.cumsum(generator.normal(size=(len(steps), 2000)), axis=0)
    times = np.log1p(steps)
    curve = np.stack([times, np.cos(times)], 1) @ generator.normal(size=(2, 2000))
    ratios = {}
    for name, points in (("walk", walk), ("curve", curve)):
        fit = fit_components([made_up(points, steps)], {}, num_components=3)
        ratios[name] = fit.displacement[0] / np.quantile(fit.walks.displacement, 0.95)
        if name == "walk":
            np.testing.assert_allclose(fit.components.shares, fit.nulls["null_walk"], rtol=5 * (2 / 2000) ** 0.5)
            assert (fit.components.shares < 1.2 * fit.walks.shares.max(0)).all()
    assert ratios["walk"] < 1.2
    assert ratios["curve"] > 3


def test_shapes_are_found_at_their_step_and_doubted_where_walks_have_as_many():
    steps = np.unique(np.geomspace(1, 5000, 150).astype(int))
    away = np.log1p(steps) - np.log1p(300)
    curve = np.stack([away**2, away**3, away**3 - away**2], 1)
    line = np.outer(away, np.ones(3))
    (form,) = find_shapes(steps, curve, np.stack([line, line]), bandwidth=0.2).forms
    assert np.expm1(form.time) == pytest.approx(300, rel=0.03)
    assert form.reasons == ""
    shapes = find_shapes(steps, curve, np.stack([line, curve]), bandwidth=0.2)
    assert shapes.in_walks == {"cusp": [0, 3], "vertex": [0, 0], "form": [0, 1]}
    assert {one.reasons for one in shapes.forms} == {"random walks made from the run's own steps show as many"}


def test_few_checkpoints_give_components_but_no_curves(tmp_path):
    result = analyse("essential-dynamics", saved_run(tmp_path / "r", steps=STEPS[:4]).path, num_prompts=8)
    assert any("no curves" in line for line in result.summary)
    assert len(values(result.table, "explained_share")) == 3
    assert "smooth_score" not in set(result.table["quantity"])
    plot(result.table, title="few")


@pytest.mark.parametrize(("num_steps", "is_short"), [(4, True), (6, True), (7, False)])
def test_too_few_saved_steps_are_the_reason_if_there_are_fewer_than_seven(tmp_path, num_steps, is_short):
    """The reason used to be that random walks explain as much, and a displacement could be `ok` after six steps."""
    reason = "there are too few saved steps to compare with random walks; save more checkpoints"
    result = analyse("essential-dynamics", saved_run(tmp_path / "r", steps=range(num_steps)).path, num_prompts=8)
    rows = result.table[result.table["quantity"].isin(["explained_share", "displacement_ratio"])]
    assert set(rows["reasons"] == reason) == {is_short}
    assert any("too few saved steps" in line for line in result.summary) == is_short
    assert not (is_short and any("Random walks explain as much" in line for line in result.summary))


def test_what_cannot_be_done_is_a_sentence(tmp_path):
    folder = saved_run(tmp_path / "r", steps=(0, 1))
    for settings, error, said in (
        ({"num_prompts": 4}, CheckpointError, "at least three saved steps, got 2"),
        ({"jointly_with": str(folder.path)}, ConfigError, "must not name a run twice"),
        ({"bandwidth": 0.0}, ConfigError, "`bandwidth` must be positive"),
        ({"num_components": 0}, ConfigError, "`num_components` must be a whole number of at least 1"),
        ({"num_prompts": 0}, ConfigError, "`num_prompts` must be a whole number of at least 1"),
    ):
        with pytest.raises(error, match=said):
            analyse("essential-dynamics", folder.path, **settings)
    for points in (np.ones((5, 3)), np.full((5, 3), np.nan)):
        with pytest.raises(CheckpointError, match="not finite, or are all equal"):
            fit_components([made_up(points, range(5))], {}, num_components=2)


def test_a_trajectory_in_one_direction_has_one_component():
    line = np.outer(np.arange(9.0), np.ones(20))
    fit = fit_components([made_up(line, range(9))], {}, num_components=4)
    assert fit.components.scores.shape == (9, 1)
    assert fit.components.shares == pytest.approx([1])
    assert fit.displacement == pytest.approx([8])
