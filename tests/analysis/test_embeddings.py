"""Spectra, overlaps and collapse of made-up weights, and the embeddings analysis of a run."""

import math

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.embeddings import (
    Settings,
    effective_unembedding,
    measure_members,
    principal_cosines,
    spectrum_shares,
    subspace,
)
from icl.analysis.run import Members
from icl.build import build_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.model.stacked import stack
from icl.runs.checkpoints import Checkpoint, save_checkpoint
from icl.runs.folder import RunFolder


def weights(config=TINY, *, seed=0):
    model = build_model(change(config, seeds={"model": seed}))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def rows_of(params, config=TINY, **settings):
    members = Members(config, [Checkpoint(0, config, params, "digest")], stack([params]), 0)
    (found,) = measure_members(members, settings=Settings(**settings))
    return {(row["quantity"], row["part"], row["component"]): row["value"] for row in found.rows}


def orthogonal(rows, columns, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_values(values, *, rows=8, seed=0):
    """Return a matrix with given singular values."""
    singular = torch.tensor(values, dtype=torch.float64)
    return orthogonal(rows, len(values), seed=seed) * singular @ orthogonal(len(values), len(values), seed=seed + 1).mT


def test_shares_of_a_known_spectrum():
    assert spectrum_shares(with_values([3.0, 1.0, 2.0])).tolist() == pytest.approx([9 / 14, 4 / 14, 1 / 14])


def test_a_subspace_has_as_many_directions_as_it_needs():
    matrix = with_values([10.0, 1.0, 0.1, 0.0])
    assert [subspace(matrix, kept).shape[1] for kept in (0.9, 0.999, 1.0)] == [1, 2, 3]
    assert subspace(torch.zeros(4, 2, dtype=torch.float64), 1.0).shape == (4, 0)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2])
def test_principal_angles_of_two_planes(angle):
    """The planes share e1 and differ by an angle in the plane of e2 and e3. A rotation within either plane changes nothing."""
    first = torch.eye(8, dtype=torch.float64)[:, :2]
    second = first.clone()
    second[1:3, 1] = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    cosines = principal_cosines(first @ orthogonal(2, 2), second @ orthogonal(2, 2, seed=5))
    assert cosines.tolist() == pytest.approx([1, math.cos(angle)], abs=1e-7)


def test_random_subspaces_overlap_by_chance():
    """In C dimensions, the mean squared cosine of r random directions with an s-dimensional subspace is s / C."""
    overlaps = torch.stack(
        [
            principal_cosines(orthogonal(32, 3, seed=n), orthogonal(32, 12, seed=1000 + n)).square().mean()
            for n in range(200)
        ]
    )
    assert abs(overlaps.mean() - 12 / 32) < 4 * overlaps.std() / 200**0.5


def test_the_published_cosine_was_that_of_a_rotation():
    """The whole matrix U preserves every norm, whatever the subspace is. The basis of the subspace alone does not."""
    tokens, positions = with_values([1.0, 1.0], seed=3), with_values([2.0, 1.0, 1.0], seed=7)
    rotation = torch.linalg.svd(positions, full_matrices=True).U
    kept = (rotation.mT @ tokens).norm(dim=0) / tokens.norm(dim=0)
    assert kept.tolist() == pytest.approx([1, 1])
    ours = principal_cosines(subspace(tokens, 1.0), subspace(positions, 1.0))
    assert ours.square().mean() < 0.9


def test_overlaps_of_a_model_by_projectors():
    """The mean squared cosine is tr(P_A P_B) / min(dim). For one direction, it is the share of its squared norm that the projection keeps."""
    config = change(TINY, model={"embed_size": 32})
    params = weights(config)
    found = rows_of(params, config, spectrum_kept=1.0)
    tokens, positions = params["token_embedding.weight"].double(), params["position_embedding"].double().mT
    projectors = [matrix @ torch.linalg.pinv(matrix) for matrix in (tokens, positions)]
    assert found["overlap", "token_embedding on position_embedding", None] == pytest.approx(
        ((projectors[0] @ projectors[1]).trace() / 3).item()
    )
    assert found["overlap_chance", "token_embedding on position_embedding", None] == 8 / 32
    readout = effective_unembedding(params).weight.double()
    ratio = (projectors[1] @ readout).norm() / readout.norm()
    assert found["cosine", "readout on position_embedding", 1] == pytest.approx(ratio.item())
    assert found["overlap_chance", "readout on token_embedding", None] == 3 / 32


@pytest.mark.parametrize("layer_norm", ["pre", "post", "none"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_effective_unembedding_is_what_the_model_reads_out(layer_norm, has_bias):
    config = change(TINY, model={"layer_norm": layer_norm, "unembedding_bias": has_bias})
    params = {name: tensor + 0.3 for name, tensor in weights(config).items()}
    model = build_model(config)
    model.load_state_dict(params)
    stream = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    normalised = stream if layer_norm == "none" else torch.nn.functional.layer_norm(stream, (8,))
    readout = effective_unembedding(params)
    expected = model.unembedding(model.final_norm(stream))[:, 0]
    torch.testing.assert_close(normalised @ readout.weight + readout.bias, expected.detach())


def test_statistics_and_shares_of_made_up_weights():
    params = {name: torch.ones_like(tensor) for name, tensor in weights().items()}
    params["final_norm.weight"] = torch.tensor([0.05, -0.05, 0.0, 0.2, 2.0, -2.0, 1.0, 0.0])
    params["unembedding.weight"][0] = 0.5
    found = rows_of(params)
    value = {quantity: found[quantity, "final_norm.weight", None] for quantity in ("mean", "std", "min", "max", "norm")}
    gamma = params["final_norm.weight"].double()
    assert value["mean"] == pytest.approx(gamma.mean().item())
    assert value["norm"] ** 2 == pytest.approx(gamma.square().sum().item())
    assert value["std"] ** 2 + value["mean"] ** 2 == pytest.approx(value["norm"] ** 2 / 8)
    assert (value["min"], value["max"]) == (-2, 2)
    assert found["share_small", "final_norm.weight", None] == 0.5
    assert found["share_small", "effective_unembedding", None] == 4 / 8  # 0.2 * 0.5 is a tenth and no less
    assert found["share_small", "blocks.0.mlp.hidden.weight", None] == 0
    count = sum(tensor.numel() for tensor in params.values())
    assert found["share_small", "all", None] == pytest.approx(4 / count)
    assert found["weight", "effective_unembedding", 5] == 1.0
    assert found["bias", "effective_unembedding", None] == pytest.approx(0.5 * 8 + 1)
    assert rows_of(params, threshold=3.0)["share_small", "all", None] == 1


def test_a_model_without_layer_norms_has_no_rows_of_them():
    config = change(TINY, model={"layer_norm": "none", "output": "scalar"})
    found = rows_of(weights(config), config)
    assert not any("norm" in part for _, part, _ in found)
    assert found["spectrum_share", "unembedding", 1] == pytest.approx(1)


def test_a_diverged_checkpoint_is_nan_and_the_others_are_measured(tmp_path, capsys):
    folder = RunFolder(tmp_path / "r")
    folder.write_config(TINY)
    for step, bad in ((0, 0.0), (7, math.nan), (9, math.inf)):
        params = weights()
        params["token_embedding.weight"] = params["token_embedding.weight"] + bad
        save_checkpoint(folder.checkpoints, step, TINY, params)
    assert main(["analyse", str(folder.path), "--what", "embeddings"]) == 0
    assert "Weights are not finite at 2 of 3 saved steps, first at step 7" in capsys.readouterr().out
    table = pd.read_csv(folder.results / "embeddings.csv")
    assert table.loc[table["step"] > 0, "value"].isna().all()
    assert table.loc[table["step"] == 0, "value"].notna().all()
    kept = table[table["quantity"] != "cosine"].groupby("step").size()
    assert kept[0] == kept[7] == kept[9]


@pytest.mark.slow
@pytest.mark.parametrize("layer_norm", ["pre", pytest.param("none", marks=pytest.mark.slow)])
def test_the_embeddings_of_a_run_from_the_command_line(tmp_path, capsys, layer_norm):
    config = change(TINY, model={"layer_norm": layer_norm, "num_layers": 2})
    folder = RunFolder(tmp_path / "r")
    folder.write_config(config)
    for step in (0, 7):
        save_checkpoint(folder.checkpoints, step, config, weights(config, seed=step))
    assert main(["analyse", str(folder.path), "--what", "embeddings"]) == 0
    assert "by chance" in capsys.readouterr().out
    assert (folder.figures / "embeddings.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "embeddings.csv")
    assert set(table["step"]) == {0, 7}
    assert set(table["threshold"]) == {0.1}
    shares = table[table["quantity"] == "spectrum_share"].groupby(["step", "part"])["value"].sum()
    assert shares.to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"spectrum_kept": 0.0}, {"spectrum_kept": 1.1}])
def test_settings_that_cannot_be_are_sentences(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)
