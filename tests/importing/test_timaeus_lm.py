"""`icl import --from timaeus-lm` reads both formats of the published language models, from files that the tests make."""

import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch

from icl.api import load_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.importing import timaeus_lm
from icl.importing.pickles import OlderFileError
from icl.importing.run import import_run
from icl.model.language import LanguageModel
from icl.runs.checkpoints import list_steps
from tests.model.test_language import make_config, make_model

V, T = 11, 9
ROWS = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(0))


def state_of(model):
    """Return a state dict with TransformerLens's buffers."""
    buffers = {}
    for layer in range(model.config.num_layers):
        buffers[f"blocks.{layer}.attn.mask"] = torch.tril(torch.ones(T, T, dtype=torch.bool))
        buffers[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-torch.inf)
    return {**{name: tensor.detach() for name, tensor in model.named_parameters()}, **buffers}


def format_a(folder: Path, steps=(0, 100, 200), **options) -> list[LanguageModel]:
    """Write files as georgeyw/L2W256-3m-rr has them."""
    config = make_config(**{"positions": "shortformer", **options})
    models = [make_model(config, seed, torch.float32) for seed in steps]
    (folder / "checkpoints").mkdir(parents=True)
    for step, model in zip(steps, models, strict=True):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        model(ROWS).sum().backward()
        adam.step()
        content = {"model_state_dict": state_of(model), "optimizer_state_dict": adam.state_dict()}
        torch.save(content, folder / "checkpoints" / f"checkpoint_{step:07d}.pth")
    (folder / "losses.txt").write_text("7.9\n7.8\n")
    return models


def format_b(folder: Path, positions="shortformer", **options) -> LanguageModel:
    """Write files as timaeus/H8-dh64 has them."""
    model = make_model(make_config(positions=positions, **options), 5, torch.float32)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in state_of(model).items()}, folder / "model.safetensors"
    )
    about = {"n_layers": 2, "act_fn": "gelu_new", "normalization_type": "LN"}
    (folder / "config.json").write_text(json.dumps({"transformer_config": about}))
    (folder / "model.yaml").write_text(
        f"!!python/object:os.system\npositional_embedding_type: {positions}\nact_fn: gelu_new\n"
    )
    return model


def test_format_a_becomes_a_run_with_the_same_logits(tmp_path, capsys):
    models = format_a(tmp_path / "L2W256-3m-rr")
    run = tmp_path / "run"
    assert main(["import", str(tmp_path / "L2W256-3m-rr"), "--from", "timaeus-lm", "--out", str(run)]) == 0
    told = capsys.readouterr().out
    assert "V = 11, context 9; 2 layers, 2 heads, width 8, MLP none, shortformer positions" in told
    assert "Steps   3, from 0 to 200" in told
    for step, model in zip((0, 100, 200), models, strict=True):
        assert torch.equal(load_model(run, step=step)(ROWS), model(ROWS))
    about = json.loads((run / "imported.json").read_text())
    assert about["from"] == "timaeus-lm"
    assert about["settings_in_files"]["optim.weight_decay"] == 0.05
    with pytest.raises(ConfigError, match="language run has no tasks; leave out --tasks"):
        import_run(tmp_path / "L2W256-3m-rr", "timaeus-lm", tmp_path / "other", tasks="unknown")


@pytest.mark.parametrize("positions", ["shortformer", "standard"])
def test_format_b_takes_positions_and_activation_from_the_files_beside_it(positions, tmp_path):
    model = format_b(tmp_path / "H8-dh64", positions, mlp_size=6, head_size=3, activation="gelu_tanh")
    result = import_run(tmp_path / "H8-dh64", "timaeus-lm", tmp_path / "run", step=50_000)
    config = result.settings.config
    assert (config.model.positions, config.model.activation, config.model.head_size) == (positions, "gelu_tanh", 3)
    assert list_steps(result.folder.checkpoints) == [50_000]
    assert torch.equal(load_model(tmp_path / "run")(ROWS), model(ROWS))


def test_the_folder_of_checkpoints_is_preferred_to_the_last_model(tmp_path):
    format_a(tmp_path / "both")
    model = make_model(make_config(positions="shortformer"), 9, torch.float32)
    safetensors.torch.save_file(state_of(model), tmp_path / "both" / "model.safetensors")
    assert import_run(tmp_path / "both", "timaeus-lm", tmp_path / "run").steps == [0, 100, 200]
    with pytest.raises(OlderFileError, match=r"does not say its step\. Give --step N"):
        import_run(tmp_path / "both" / "model.safetensors", "timaeus-lm", tmp_path / "one")


def test_files_without_their_settings_take_those_of_the_command_line(tmp_path):
    models = format_a(tmp_path / "a", positions="standard", mlp_size=4, activation="gelu")
    with pytest.raises(ConfigError, match=r"does not contain `model\.activation` \(relu, gelu or gelu_tanh\)"):
        import_run(tmp_path / "a", "timaeus-lm", tmp_path / "none")
    options = {"model.activation": "gelu", "model.positions": "standard"}
    import_run(tmp_path / "a", "timaeus-lm", tmp_path / "run", options=options)
    assert torch.equal(load_model(tmp_path / "run", step=200)(ROWS), models[2](ROWS))


def test_models_of_other_kinds_and_hostile_files_are_refused(tmp_path):
    format_b(tmp_path / "rotary")
    (tmp_path / "rotary" / "config.json").write_text('{"positional_embedding_type": "rotary"}')
    with pytest.raises(OlderFileError, match="positional_embedding_type rotary"):
        import_run(tmp_path / "rotary", "timaeus-lm", tmp_path / "run", step=1)
    (tmp_path / "bad" / "checkpoints").mkdir(parents=True)

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    with (tmp_path / "bad" / "checkpoints" / "checkpoint_0000001.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(OlderFileError, match="checkpoint_0000001"):
        import_run(tmp_path / "bad", "timaeus-lm", tmp_path / "run")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(OlderFileError, match="is damaged, or is not a file of safetensors"):
        import_run(tmp_path / "cut", "timaeus-lm", tmp_path / "run", step=1)
    extra = {**state_of(make_model(make_config(), 1)), "other": torch.zeros(2)}
    (tmp_path / "extra").mkdir()
    safetensors.torch.save_file(extra, tmp_path / "extra" / "model.safetensors")
    with pytest.raises(
        OlderFileError, match="contains the tensor other, which the architecture of this model does not have"
    ):
        import_run(tmp_path / "extra", "timaeus-lm", tmp_path / "run", step=1)


def test_a_repository_of_the_hub_is_fetched_and_its_absence_is_one_sentence(tmp_path, monkeypatch, capsys):
    format_a(tmp_path / "snapshot")
    asked = []
    hub = types.ModuleType("huggingface_hub")

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "georgeyw/L2W256-3m-rr":
            raise ConnectionError("Name or service not known\nmore lines")
        return str(tmp_path / "snapshot")

    hub.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "runs"))
    assert main(["import", "hf://georgeyw/L2W256-3m-rr", "--from", "timaeus-lm"]) == 0
    assert asked[0] == ("georgeyw/L2W256-3m-rr", [*timaeus_lm.PATTERNS, "config.json", "model.yaml"])
    assert list_steps_of(tmp_path / "runs" / "L2W256-3m-rr") == [0, 100, 200]
    capsys.readouterr()
    assert main(["import", "hf://no/body", "--from", "timaeus-lm"]) != 0
    told = capsys.readouterr().err
    assert (
        "hf://no/body cannot be fetched from the Hugging Face Hub (Name or service not known). Without a network, copy"
        in told
    )
    assert main(["import", "hf://no/body", "--from", "icr"]) != 0
    assert "only --from timaeus-lm reads from the Hub" in capsys.readouterr().err


def list_steps_of(path):
    return [int(file.stem.partition("-")[2]) for file in sorted((path / "checkpoints").glob("step-*"))]


def test_the_settings_of_another_model_are_not_used(tmp_path):
    model = format_b(tmp_path / "models" / "a", "standard")
    (tmp_path / "models" / "config.json").write_text('{"positional_embedding_type": "shortformer"}')
    result = import_run(tmp_path / "models" / "a", "timaeus-lm", tmp_path / "run", step=1)
    assert result.settings.config.model.positions == "standard"
    assert torch.equal(load_model(tmp_path / "run")(ROWS), model(ROWS))


def test_settings_that_contradict_each_other_or_are_not_supported_are_refused(tmp_path):
    format_b(tmp_path / "two", "standard")
    (tmp_path / "two" / "config.json").write_text('{"positional_embedding_type": "shortformer"}')
    with pytest.raises(OlderFileError, match=r"`model.positions` is standard, but another file .* says shortformer"):
        import_run(tmp_path / "two", "timaeus-lm", tmp_path / "run", step=1)
    format_b(tmp_path / "silu", mlp_size=6)
    (tmp_path / "silu" / "config.json").write_text('{"act_fn": "silu"}')
    (tmp_path / "silu" / "model.yaml").unlink()
    with pytest.raises(OlderFileError, match=r"`model.activation` must be one of .*, got 'silu'"):
        import_run(tmp_path / "silu", "timaeus-lm", tmp_path / "run", step=1, options={"model.activation": "gelu"})
    format_b(tmp_path / "attention-only")
    (tmp_path / "attention-only" / "config.json").write_text('{"act_fn": "silu", "attn_only": true}')
    (tmp_path / "attention-only" / "model.yaml").unlink()
    import_run(tmp_path / "attention-only", "timaeus-lm", tmp_path / "run", step=1)


def test_a_repository_whose_name_has_a_dot_keeps_its_name(tmp_path, monkeypatch):
    format_a(tmp_path / "snapshot")
    monkeypatch.setattr(timaeus_lm, "fetch", lambda address: tmp_path / "snapshot")
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path / "runs"))
    assert main(["import", "hf://timaeus/model-0.5", "--from", "timaeus-lm"]) == 0
    assert (tmp_path / "runs" / "model-0.5").is_dir()
