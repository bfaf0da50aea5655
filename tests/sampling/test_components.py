"""Components of the model: their parameters, and their refined LLCs and susceptibilities from the command line."""

import dataclasses

import pandas as pd
import pytest
import torch
from llc_runs import CONFIG, QUICK, make_run

from icl.build import build_model
from icl.cli import main
from icl.config import ModelConfig
from icl.config.validation import ConfigError
from icl.presets import preset
from icl.sampling.components import component_masks, component_names
from icl.sampling.records import read_all
from icl.sampling.run import estimate_run
from icl.tasks.prompts import sample_prompts

BIASED = dataclasses.replace(
    preset("L2H4"), model=dataclasses.replace(preset("L2H4").model, embed_size=16, mlp_size=8, attention_bias=True)
)


def params_of(config):
    params = {name: tensor.detach() for name, tensor in build_model(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for name, tensor in params.items()
    }


@pytest.mark.parametrize(
    "config", [BIASED, preset("L2H4"), preset("quickstart"), preset("carroll")], ids=lambda c: c.run_name
)
def test_every_parameter_is_in_exactly_one_layer(config):
    params = params_of(config)
    counts = {name: torch.zeros(tensor.shape) for name, tensor in params.items()}
    for component in component_names(config.model, "layers"):
        for name, mask in component_masks(config.model, params, component).items():
            counts[name] += mask
    assert all((count == 1).all() for count in counts.values())


def test_heads_that_change_places_leave_the_function_as_it_is():
    """This shows that the masks cover whole heads, and nothing else."""
    model, params = build_model(BIASED).double(), params_of(BIASED)
    first, second = (component_masks(BIASED.model, params, name) for name in ("L1H0", "L1H3"))
    assert set(first) == {f"blocks.1.attention.{name}" for name in ("qkv.weight", "qkv.bias", "output.weight")}
    swapped = {name: tensor.clone() for name, tensor in params.items()}
    for name in first:
        assert not (first[name] & second[name]).any()
        swapped[name][first[name]] = params[name][second[name]]
        swapped[name][second[name]] = params[name][first[name]]
    xs, ys, _ = sample_prompts(BIASED, stream="train", step=0, batch_size=4)
    before, after = (torch.func.functional_call(model, each, (xs.double(), ys.double())) for each in (params, swapped))
    torch.testing.assert_close(before, after)
    changed = params | {name: torch.where(mask, 0.0, params[name]) for name, mask in first.items()}
    assert not torch.allclose(torch.func.functional_call(model, changed, (xs.double(), ys.double())), before)


def test_a_component_that_the_model_lacks_is_one_sentence():
    model = ModelConfig(num_layers=2, num_heads=2)
    for name in ("L2", "L0H2", "H0", "", "L-1", "embedding2"):
        with pytest.raises(ConfigError, match=r"no component .*2 layers of 2 heads\.$"):
            component_masks(model, {}, name)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    return make_run(tmp_path / "tiny")


@pytest.mark.slow
def test_a_component_moves_alone(run):
    """The chains have as many dimensions as the component has parameters. Their noise differs from that of the whole model's chains."""
    last = dataclasses.replace(QUICK, steps="last")
    whole = estimate_run(run.path, last).table
    records = {name: estimate_run(run.path, last, component=name).records[-1] for name in ("embedding", "L0H0")}
    for name, record in records.items():
        masks = component_masks(CONFIG.model, params_of(CONFIG), name)
        assert record.row["num_params"] == sum(int(mask.sum()) for mask in masks.values()) < whole["num_params"].iloc[0]
        assert record.row["component"] == name
        assert record.susceptibilities.shape == (2, 2 * CONFIG.task.max_examples)
    assert len(read_all(run)) == 3


@pytest.mark.slow
def test_heads_and_layers_from_the_command_line(run, capsys):
    assert main(["llc", "tiny", "--steps", "last"]) in (0, 1)
    before = (run.results / "llc.csv").read_bytes()
    assert main(["llc", "tiny", "--components", "layers", "--steps", "last"]) == 0
    said = capsys.readouterr()
    assert "1 step x 3 components" in said.err
    table = pd.read_csv(run.results / "llc-components.csv")
    assert list(table["component"].unique()) == ["L0", "embedding", "unembedding"]
    parts = pd.read_csv(run.results / "llc-susceptibilities.csv")
    assert len(parts) == 3 * 2 * CONFIG.task.max_examples
    assert set(parts["distribution"]) == {"pretrain", "true"}
    assert (parts["stderr"] > 0).all()
    assert (run.figures / "llc-layers.png").is_file()
    assert main(["llc", "tiny", "--steps", "last"]) in (0, 1)
    assert (run.results / "llc.csv").read_bytes() == before  # components stay out of the whole model's table
    assert main(["llc", "tiny", "--components", "layers", "--steps", "last"]) == 0
    assert "nothing to do, all 1 step x 3 components are stored" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--calibrate"], ["--rescale", "2"], ["--self-test"]])
def test_components_go_with_no_other_mode(run, words, capsys):
    assert main(["llc", *(["tiny"] if words != ["--self-test"] else []), "--components", "heads", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_division_is_one_sentence(run, capsys):
    assert main(["llc", "tiny", "--components", "neurons"]) == 2
    said = capsys.readouterr().err
    assert "heads" in said
    assert "layers" in said
    assert said.count("\n") == 1
