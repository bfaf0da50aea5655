"""Language runs: the same loop trains and resumes them, and every command serves them or says in a sentence that it does not."""

import dataclasses
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from icl.analysis.language.probes import positions
from icl.analysis.run import analyse
from icl.api import load_model
from icl.build import build_model
from icl.cli import main
from icl.cli.analyse import that_apply
from icl.compute.step import adam_state, make_step
from icl.config import (
    CheckpointsConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplerConfig,
    TaskConfig,
    TrainerConfig,
)
from icl.config.validation import ConfigError
from icl.model.flat import layout_of
from icl.model.stacked import stack
from icl.presets import preset
from icl.run_names import run_name
from icl.runs.folder import RunFolder
from icl.sampling.published import PUBLISHED, llc_with_initial_loss_bug, published
from icl.sampling.records import WITH_BUG, read_all
from icl.tasks.rows import row_source
from icl.training.callbacks import StopSignals
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.run import train, train_population

TINY = RunConfig(
    run_name="words",
    language=LanguageConfig(vocab_size=12, context_size=20),
    model=dataclasses.replace(preset("language-quickstart").model, num_heads=2, embed_size=8),
    optim=OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1, grad_clip=1.0),
    trainer=TrainerConfig(max_steps=24, batch_size=4, log_every=6),
    evaluation=EvaluationConfig(every=12, num_prompts=16),
    early_stopping=EarlyStoppingConfig(monitor="eval/test/loss"),
    checkpoints=CheckpointsConfig(every=8, num_log=0, num_linear=0, resume_seconds=0.0),
    sampler=SamplerConfig(
        kernel="sgld",
        lr=1e-5,
        nbeta=10.0,
        localization=10.0,
        num_samples=64,
        batch_size=8,
        num_chains=2,
        num_draws=4,
        num_burnin_steps=1,
        num_init_batches=2,
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> RunFolder:
    return train(TINY, folder=tmp_path_factory.mktemp("language") / "words").folder


def test_training_is_adamw_on_the_rows_of_the_stream(folder):
    """Train the definition with PyTorch's AdamW and compare losses and weights."""
    model = build_model(TINY).double()
    source = row_source(TINY, stream="train")
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(24):
        xs, ys = (part[0] for part in source.sample(range(step, step + 1), range(4)))
        loss = torch.nn.functional.cross_entropy(model(xs).flatten(0, 1), ys.flatten())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    table = pd.read_csv(folder.metrics_file).set_index("step")
    assert table.loc[24, "train/loss"] == pytest.approx(np.mean(losses[18:24]), rel=1e-4)
    assert list(table.columns) == ["train/loss", "lr", "clipped_fraction", "eval/test/loss", "eval/test/icl_score"]
    for name, weight in load_model(folder.path).named_parameters():
        torch.testing.assert_close(
            weight.detach().double(), dict(model.named_parameters())[name].detach(), rtol=0, atol=2e-3
        )


def test_weight_decay_is_that_of_adamw_for_each_member():
    config = dataclasses.replace(TINY, optim=dataclasses.replace(TINY.optim, grad_clip=None))
    models = [
        build_model(dataclasses.replace(config, seeds=dataclasses.replace(config.seeds, model=seed))).double()
        for seed in (0, 1)
    ]
    params = stack([{n: p.detach() for n, p in model.named_parameters()} for model in models])
    state, step = adam_state(params), make_step(config.model, config.optim, layout_of(params))
    source, rates = row_source(config, stream="train"), torch.tensor([1e-2, 3e-3], dtype=torch.float64)
    adams = [
        torch.optim.AdamW(model.parameters(), lr=float(rate), weight_decay=0.1)
        for model, rate in zip(models, rates, strict=True)
    ]
    for s in range(4):
        xs, ys = source.sample(range(2 * s, 2 * s + 2), range(3))
        step(state, xs, ys, rates)
        for number, (model, adam) in enumerate(zip(models, adams, strict=True)):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(xs[number]).flatten(0, 1), ys[number].flatten()).backward()
            adam.step()
    ours = layout_of(params).to_params(state.rows)
    for name in params:
        expected = torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11, msg=name)


def train_until(step, config, folder, monkeypatch):
    """Begin a run, and stop it by a signal at a step."""
    original = StopSignals.on_train_batch_end

    def stop(self, trainer, *rest):
        if trainer.global_step >= step and self.received is None:
            self.received = signal.SIGTERM
        original(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "on_train_batch_end", stop)
        status = train(config, folder=folder).status
    assert status.state == "preempted"
    assert step <= status.step < config.trainer.max_steps


def test_a_long_run_is_compiled_only_if_its_batch_is_computed_as_a_whole(monkeypatch):
    def is_compiled(config, **trainer):
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **trainer))
        params = stack([dict(build_model(config).named_parameters())])
        return PopulationModule([Member(config, RunFolder("unused"))], params)._is_compiled()

    quickstart = preset("language-quickstart")
    assert not is_compiled(quickstart)  # too short
    assert is_compiled(quickstart, max_steps=100_000)
    assert is_compiled(quickstart, compile="true")
    monkeypatch.setattr("icl.training.module.rows_at_once", lambda *_: 31)  # the batch has 32 rows
    assert not is_compiled(quickstart, max_steps=100_000)


def compare_compiled():
    """Make three steps of a tiny model, eager and compiled. Return the losses and the largest difference of the weights."""
    params = stack([{name: p.detach() for name, p in build_model(TINY).double().named_parameters()}])
    xs, ys = row_source(TINY, stream="train").sample(range(3), range(4))
    rates, ends, losses = torch.tensor([1e-2], dtype=torch.float64), [], []
    for compiled in (False, True):
        state, step = adam_state(params), make_step(TINY.model, TINY.optim, layout_of(params), compiled=compiled)
        losses.append([float(step(state, xs[None, s], ys[None, s], rates).losses) for s in range(3)])
        ends.append(state.rows)
    return *losses, float((ends[0] - ends[1]).abs().max())


@pytest.mark.slow
def test_the_compiled_step_is_the_eager_step():
    """The compiler cannot trace functions whose shapes are checked, so the steps run in a program of their own."""
    code = "import json, sys; from tests.training.test_language_training import compare_compiled; print(json.dumps(compare_compiled()))"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:icl", "-c", code], capture_output=True, text=True, check=True
    )
    assert "without torch.compile" not in done.stderr
    eager, compiled, difference = json.loads(done.stdout.splitlines()[-1])
    assert compiled == pytest.approx(eager, rel=1e-9)
    assert (
        difference < 1e-4
    )  # Adam makes steps of 1e-2 of gradients that are rounding errors, such as those of the keys' biases


def test_an_interrupted_run_resumes_bit_identically(folder, tmp_path, monkeypatch):
    train_until(10, TINY, tmp_path / "words", monkeypatch)
    again = train(TINY, folder=tmp_path / "words")
    assert again.status.state == "finished"
    assert again.folder.metrics_file.read_bytes() == folder.metrics_file.read_bytes()
    for file in folder.checkpoints.root.glob("*.safetensors"):
        assert (again.folder.checkpoints.root / file.name).read_bytes() == file.read_bytes()


def test_a_run_whose_text_changes_resumes_bit_identically(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 1)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).integers(0, 11, 2000).astype(np.uint16))
    texts = {"source": str(tmp_path / "a.npy"), "next_source": str(tmp_path / "b.npy"), "change_step": 5}
    config = dataclasses.replace(
        TINY,
        language=dataclasses.replace(TINY.language, **texts),
        trainer=dataclasses.replace(TINY.trainer, max_steps=8, log_every=1),
    )
    whole = train(config, folder=tmp_path / "whole")
    train_until(4, config, tmp_path / "parts", monkeypatch)
    again = train(config, folder=tmp_path / "parts")
    assert again.folder.metrics_file.read_bytes() == whole.folder.metrics_file.read_bytes()
    unchanged = dataclasses.replace(config, language=dataclasses.replace(TINY.language, source=texts["source"]))
    same = pd.read_csv(train(unchanged, folder=tmp_path / "unchanged").folder.metrics_file)["train/loss"]
    ours = pd.read_csv(whole.folder.metrics_file)["train/loss"]
    assert same[1:6].tolist() == ours[1:6].tolist()
    assert same[6] != ours[6]  # the sixth update is the first with rows of the second text


def test_a_member_of_a_population_has_the_numbers_of_a_run_alone(folder, tmp_path):
    other = dataclasses.replace(TINY, seeds=dataclasses.replace(TINY.seeds, model=1, data=1))
    together = train_population([TINY, other], folders=[tmp_path / "a", tmp_path / "b"])
    assert (together[0].folder.metrics_file).read_bytes() == folder.metrics_file.read_bytes()
    assert (together[1].folder.metrics_file).read_bytes() != folder.metrics_file.read_bytes()


def test_evaluation_is_that_of_the_definition(folder, capsys):
    assert main(["evaluate", str(folder.path)]) == 0
    table = pd.read_csv(folder.results / "evaluation.csv")
    model, source = load_model(folder.path).double(), row_source(TINY, stream="test")
    xs, ys = (part[0] for part in source.sample(range(1, 2), range(16)))
    losses = -model(xs).detach().log_softmax(-1).gather(-1, ys[..., None])[..., 0]
    last = table[(table["step"] == 24) & (table["quantity"] == "loss")].set_index("position")
    assert last.loc["mean", "value"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert last.loc["7", "stderr"] == pytest.approx(float(losses[:, 6].std() / 4), rel=1e-4)
    baselines = pd.read_csv(folder.results / "baselines.csv").set_index(["quantity", "position"])["value"]
    xs, ys = (part[0] for part in source.sample(range(1), range(16)))  # the rows of training
    monitored = float(-model(xs).detach().log_softmax(-1).gather(-1, ys[..., None]).mean())
    assert pd.read_csv(folder.metrics_file)["eval/test/loss"].iloc[-1] == pytest.approx(monitored, rel=1e-5)
    assert monitored != pytest.approx(last.loc["mean", "value"], rel=1e-3)
    assert baselines["bigram", "mean"] < baselines["unigram", "mean"] < math.log(12)
    assert (folder.figures / "evaluation.png").is_file()
    assert "test" in capsys.readouterr().out


def test_behaviours_of_all_checkpoints_are_measured_once(folder, capsys):
    words = [
        "analyse",
        str(folder.path),
        "--what",
        "behaviour",
        "--num_rows",
        "8",
        "--num_bigram_rows",
        "8",
        "--num_probe_rows",
        "8",
        "--num_ngrams",
        "5",
    ]
    assert main(words) == 0
    table = pd.read_csv(folder.results / "language-behaviour.csv", keep_default_na=False)
    assert sorted(table["step"].unique()) == [0, 8, 16, 24]
    assert set(table["quantity"]) == {
        "loss",
        "icl_score",
        "bigram_score",
        "bigram_floor",
        "ngram_score",
        "previous_token",
        "prefix_matching",
        "k_composition",
        "ablated_loss",
        "ablation",
        "weight_norm",
        "position_spectrum",
    }
    assert table[(table["step"] == 0) & (table["quantity"] == "k_composition")]["value"].mean() == pytest.approx(
        0, abs=1e-12
    )
    files = {file: file.stat().st_mtime_ns for file in (folder.results / "language-behaviour").iterdir()}
    analyse("behaviour", folder.path, num_rows=8, num_bigram_rows=8, num_probe_rows=8, num_ngrams=5)
    assert files == {file: file.stat().st_mtime_ns for file in (folder.results / "language-behaviour").iterdir()}
    assert (folder.figures / "language-behaviour.png").is_file()
    capsys.readouterr()


def test_llc_has_a_verdict_and_report_shows_the_run(folder, capsys):
    assert main(["llc", str(folder.path), "--steps", "last"]) == 0
    row = pd.read_csv(folder.results / "llc.csv").iloc[0]
    assert row["verdict"] in ("ok", "suspect", "invalid")
    model, source = load_model(folder.path).double(), row_source(TINY, stream="llc")
    losses = []
    for block in range(8):
        xs, ys = (part[0] for part in source.sample(range(1), torch.arange(8 * block, 8 * block + 8)))
        losses.append(float(torch.nn.functional.cross_entropy(model(xs).flatten(0, 1), ys.flatten()).detach()))
    assert min(losses) < row["init_loss"] < max(losses)
    assert main(["report", str(folder.path)]) == 0
    page = (folder.path / "report.html").read_text()
    assert "V = 12, rows of 20 tokens" in page
    assert "--what gradients" not in page  # no command is proposed that does not serve the run
    capsys.readouterr()


def test_the_published_sampler_is_that_of_the_papers_language_models():
    sampler = published("language")
    assert (sampler.kernel, sampler.lr, sampler.localization, sampler.num_chains, sampler.num_draws) == (
        "sgld",
        3e-3,
        300,
        20,
        200,
    )
    assert (sampler.batch_size, sampler.num_burnin_steps) == (100, 0)
    assert sampler.inverse_temperature == pytest.approx(21.71, abs=0.01)
    assert published("regression") == PUBLISHED


def published_code(losses, nbeta):
    """Return the published estimate, by the loop of a program whose table of losses is filled while the chains run one after the other."""
    num_chains, num_draws = losses.shape
    table, llcs = np.zeros(losses.shape), np.zeros(losses.shape)
    for chain in range(num_chains):
        for draw in range(num_draws):
            table[chain, draw] = losses[chain, draw]
            if draw:
                before = draw * llcs[chain, draw - 1]
                llcs[chain, draw] = (before + nbeta * (losses[chain, draw] - table[:, 0].mean())) / (draw + 1)
    return llcs[:, -1].mean()


def test_the_published_mode_is_labelled_and_has_the_estimate_with_the_bug(folder, tmp_path, capsys):
    words = ["llc", str(folder.path), "--published", "--steps", "last", "--out", str(tmp_path / "rows.csv")]
    few = {"num_chains": 3, "num_draws": 5, "batch_size": 4, "num_samples": 4}
    main([*words, *(word for name, value in few.items() for word in (f"--sampler.{name}", str(value)))])
    told = capsys.readouterr().out
    row = pd.read_csv(tmp_path / "rows.csv").iloc[0]
    assert row["mode"].startswith("published, num_samples=4")
    assert row["loss_name"] == "cross_entropy"
    records = [record for record in read_all(folder) if record.row["settings"] == row["settings"]]
    traces, nbeta = records[0].traces.astype(float), row["nbeta"]
    assert row[WITH_BUG] == pytest.approx(published_code(traces, nbeta), rel=1e-5)
    # With one loss everywhere, only the bug is left.
    same = torch.full((20, 200), 3.0, dtype=torch.float64)
    expected = 2 * 3.0 * 19 / 40 * 199 / 200
    assert llc_with_initial_loss_bug(same, nbeta=2.0) == pytest.approx(expected, rel=1e-12)
    assert f"the loss of predicting the uniform distribution is {math.log(12):.4g}" in told
    assert "uniform's loss" in told
    assert "zero" not in told
    assert f"For these chains it gives {row[WITH_BUG]:.4g} (column {WITH_BUG} of llc.csv)." in told
    assert f"The estimate with the correct initial loss is {row['llc']:.4g}." in told


def test_essential_dynamics_are_those_of_the_logits(folder, capsys):
    assert (
        main(
            [
                "analyse",
                str(folder.path),
                "--what",
                "essential-dynamics",
                "--num_prompts",
                "16",
                "--num_components",
                "2",
            ]
        )
        == 0
    )
    table = pd.read_csv(folder.results / "essential-dynamics.csv")
    scores = table[table["quantity"] == "score"].pivot(index="step", columns="item", values="value").to_numpy()
    rows = row_source(TINY, stream="test").sample(range(1, 2), range(16))
    at = positions(0, 16, num_predictions=19)
    states = []
    for step in (0, 8, 16, 24):
        every = load_model(folder.path, step=step).double()(rows.xs[0]).detach()
        states.append([float(every[b, at[b], rows.ys[0, b, at[b]]]) for b in range(16)])
    centred = np.asarray(states) - np.mean(states, axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    assert np.linalg.norm(scores, axis=0) == pytest.approx(values[:2], rel=1e-4)
    assert main(["analyse", str(folder.path), "--what", "essential-dynamics", "--state", "gradients"]) != 0
    assert (
        "is for regression runs only. For a language run, use `--distribution true`, and set `--state` to `outputs`"
        in capsys.readouterr().err
    )


def test_all_analyses_of_a_language_run_are_those_that_serve_it_and_the_others_are_named(folder, capsys, monkeypatch):
    names = ["gradients", "essential-dynamics", "attention", "language-behaviour", "stages"]
    assert that_apply(names, folder.path) == ["essential-dynamics", "language-behaviour", "stages"]
    told = "icl: gradients, attention are left out, because they accept only regression runs.\n"
    assert capsys.readouterr().err == told
    assert that_apply(names[:3], folder.path / "nothing") == names[:3]
    assert not capsys.readouterr().err
    done = []
    monkeypatch.setattr("icl.cli.analyse._analyse_all", lambda names, *_: done.extend(names) or 0)
    assert main(["analyse", str(folder.path), "--what", "all"]) == 0
    assert done == ["essential-dynamics", "language-behaviour", "stages"]


def test_next_tokens_are_those_of_the_definition(folder, tmp_path, capsys):
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps({"tokens": [3, 1, 4]}))
    assert main(["predict", str(folder.path), "--prompt", str(prompt), "--out", str(tmp_path / "out.json")]) == 0
    chances = load_model(folder.path)(torch.tensor([[11, 3, 1, 4]]))[0, -1].softmax(-1).detach()
    told = json.loads((tmp_path / "out.json").read_text())
    assert [each["token"] for each in told] == chances.argsort(descending=True)[:5].tolist()
    assert told[0]["probability"] == pytest.approx(float(chances.max()), rel=1e-5)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["analyse", "RUN", "--what", "hessian"],
            "The analysis `hessian` is not available for language runs; choose one of essential-dynamics, language-behaviour, stages.",
        ),
        (
            ["llc", "RUN", "--components", "heads"],
            "`--components` accepts only regression runs, but this is a language run",
        ),
        (["llc", "RUN", "--rescale", "2"], "`--rescale` accepts only regression runs, but this is a language run"),
        (["diversity", "--preset", "language-quickstart"], "`icl diversity` accepts only regression runs"),
        (["predict", "RUN", "--prompt", "README.md"], "README.md must be JSON"),
        (
            ["train", "--preset", "language-quickstart", "--task.num_tasks", "3"],
            "`task.num_tasks` (3) has no effect on a language run",
        ),
        (["train", "--language.vocab_size", "9"], "`language.vocab_size` (9) has no effect on a regression run"),
        (
            ["train", "--preset", "language-quickstart", "--population.num_tasks", "1,2"],
            "`population.num_tasks` has no effect on a language run",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_does_not_serve_language_runs_is_one_sentence(words, sentence, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    assert main([str(folder.path) if word == "RUN" else word for word in words]) != 0
    told = capsys.readouterr().err
    assert sentence in " ".join(told.split())
    assert "Traceback" not in told


def test_a_text_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    assert main(["train", "--preset", "language-quickstart", "--language.source", str(tmp_path / "missing.npy")]) != 0
    assert "missing.npy cannot be read: No such file" in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


def test_settings_of_regression_runs_are_those_of_versions_without_language_models():
    tree = RunConfig().to_dict()
    assert "language" not in tree
    assert not {"family", "head_size", "positions"} & set(tree["model"])
    assert "weight_decay" not in tree["optim"]
    assert RunConfig.from_dict(tree) == RunConfig()
    decayed = RunConfig(optim=OptimConfig(weight_decay=0.1))
    assert RunConfig.from_dict(decayed.to_dict()) == decayed
    assert run_name(decayed) == "quickstart,weight_decay=0.1"
    assert run_name(RunConfig(task=TaskConfig(num_tasks=8))) == "quickstart,num_tasks=8"


def test_settings_of_language_runs_survive_a_dict_and_name_what_differs():
    config = preset("language-quickstart")
    assert RunConfig.from_dict(config.to_dict()) == config
    other = dataclasses.replace(config, language=LanguageConfig(copy_rate=0.0))
    assert run_name(other) == "language-quickstart,copy_rate=0.0"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layer_norm": "post"}, "`model.layer_norm` must be 'pre' in a language model, got 'post'."),
        ({"init": "gpt2"}, "`model.init` must be normal in a language model, got 'gpt2'."),
        (
            {"family": "regression", "mlp_size": 4},
            "`model.positions` must be 'standard' in a regression model, got 'shortformer'.",
        ),
        ({"num_heads": 3}, "`model.num_heads` must divide `model.embed_size`"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(settings, sentence):
    base = dataclasses.asdict(preset("language-quickstart").model)
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        ModelConfig(**{**base, **settings})
