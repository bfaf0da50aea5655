"""Make the folder in which bad inputs are tried: a tiny trained run, damaged runs, and files that no command can use."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from icl.cli import main
from icl.config import RunConfig
from icl.runs.checkpoints import checkpoint_files, save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.status import Status

SETTINGS = """\
run_name: tiny
task: {num_tasks: 16, task_size: 2, max_examples: 4}
model: {num_layers: 1, num_heads: 2, embed_size: 8, mlp_size: 8}
trainer: {max_steps: 4, batch_size: 8, log_every: 2, compile: "false"}
evaluation: {every: 2, num_prompts: 16}
checkpoints: {num_log: 2, num_linear: 0}
sampler: {num_samples: 256, batch_size: 8, num_chains: 2, num_draws: 4, num_burnin_steps: 2, num_init_batches: 2}
"""
STEP = "runs/tiny/checkpoints/step-000000004.safetensors"
STEPS = ("foo", "[0, x]", "4:0", "null", "true", "1.5", "[]", "[0, -1]", "0:4:0", "-1", "[1.5]", "'all, 4'", "1:2:3:4")
"""Invalid values of `sampler.steps` in a file."""
_DEEP = 3000
"""Depth of nested lists and tables."""


def make_bench(folder: Path) -> None:
    """Write all files that the cases name to an empty folder, which must be the working directory."""
    Path("tiny.yaml").write_text(SETTINGS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(["train", "--config", "tiny.yaml"])
    if status != 0:
        raise RuntimeError("The tiny run could not be trained.")
    _make_runs()
    _make_odd_files()
    for name, text in (_settings_files() | _sweep_files() | _prompt_files() | _table_files()).items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _make_runs() -> None:
    """Make runs that are empty, unfinished, damaged, of another model or of two models, an experiment, and links to a run."""
    tiny = RunFolder("runs/tiny")
    config = tiny.read_config()
    for name in ("empty", "unfinished", "broken", "mixed", "other", "notes"):
        folder = RunFolder(f"runs/{name}")
        folder.write_config(dataclasses.replace(config, run_name=name))
        folder.write_status(Status(state="running", max_steps=4, updated=0.0))
    first, last = checkpoint_files(tiny.path)[0], checkpoint_files(tiny.path)[-1]
    for name, file in (("unfinished", first), ("broken", last), ("mixed", last)):
        target = Path("runs", name, "checkpoints", file.name)
        target.parent.mkdir(parents=True)
        data = file.read_bytes()
        target.write_bytes(data if name != "broken" else data[: len(data) // 2])
    other = dataclasses.replace(config, task=dataclasses.replace(config.task, task_size=3))
    _save_initial(RunFolder("runs/other"), other)
    shutil.copy(checkpoint_files("runs/other")[0], "runs/mixed/checkpoints/")
    Path("runs/notes/config.yaml").write_bytes(b"\x00\x01binary")
    Path("runs/nothing").mkdir()
    shutil.copytree("runs/tiny", "checkpoints/checkpoints_M16")
    Path("checkpoints/experiment_metadata.json").write_text("{}")
    Path("link.csv").symlink_to("runs/tiny/metrics.csv")
    Path("tiny-link").symlink_to("runs/tiny")


def _save_initial(run: RunFolder, config: RunConfig) -> None:
    from icl.build import build_model

    save_checkpoint(run.checkpoints, 0, config, dict(build_model(config).named_parameters()))


def _make_odd_files() -> None:
    """Make paths that are not plain text files."""
    Path("folder").mkdir()
    Path("a-file").write_text("words\n")
    Path("empty.file").write_bytes(b"")
    Path("binary.bin").write_bytes(bytes(range(256)) * 8)
    for suffix in ("yaml", "json", "csv"):
        os.mkfifo(f"fifo.{suffix}")
        Path(f"zero.{suffix}").symlink_to("/dev/zero")
        Path(f"loop.{suffix}").symlink_to(f"loop.{suffix}")
        Path(f"empty.{suffix}").write_bytes(b"")
        Path(f"binary.{suffix}").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
        Path(f"folder.{suffix}").mkdir()
        with Path(f"huge.{suffix}").open("wb") as file:
            file.truncate(6 * 2**30)  # a sparse file, which takes no space on the disk
    Path("fifo").symlink_to("fifo.yaml")
    Path("loop").symlink_to("loop")


def _settings_files() -> Mapping[str, str | bytes]:
    laughs = [f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 10)]
    return {
        "deep.yaml": "[" * _DEEP + "]" * _DEEP,
        "deep-map.yaml": "{a: " * _DEEP + "1" + "}" * _DEEP,
        "deep.json": '{"a":' * _DEEP + "1" + "}" * _DEEP,
        "laughs.yaml": "\n".join(["a0: &a0 {k: lol}", *laughs]),
        "laughs-list.yaml": "\n".join(
            ["a0: &a0 [lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
        ),
        "itself.yaml": "task: &t\n  num_tasks: 4\n  more: *t\n",
        "twice.yaml": "optim: {lr: 0.1}\ntask: {num_tasks: 4}\noptim: {lr: 0.2}\n",
        "twice-inner.yaml": "optim:\n  lr: 0.1\n  lr: 0.2\n",
        "dotted-and-nested.yaml": "optim.lr: 0.1\noptim: {lr: 0.2}\n",
        "tab.yaml": "optim:\n\tlr: 0.1\n",
        "utf16.yaml": "optim: {lr: 0.1}\n".encode("utf-16"),
        "latin.yaml": "run_name: é\n".encode("latin-1"),
        "null-byte.yaml": b"optim: {lr: 0.1}\x00\n",
        "list.yaml": "- 1\n- 2\n",
        "text.yaml": "just words\n",
        "number.yaml": "17\n",
        "unknown.yaml": "optim: {learning_rate: 0.1}\n",
        "unknown-section.yaml": "optimizer: {lr: 0.1}\n",
        "section-is-number.yaml": "optim: 3\n",
        "leaf-is-table.yaml": "optim: {lr: {value: 0.1}}\n",
        "leaf-is-list.yaml": "optim: {lr: [0.1, 0.2]}\n",
        "leaf-is-date.yaml": "trainer: {max_steps: 2026-01-01}\n",
        "no-name.yaml": "optim:\n  ? [1, 2]\n  : 3\n",
        "null-section.yaml": "optim:\n",
        "number-key.yaml": "optim: {7: 3}\n",
        "python-tag.yaml": "optim: !!python/object/apply:os.system ['true']\n",
        "unclosed.yaml": "optim: {lr: 0.1\n",
        "two-documents.yaml": "optim: {lr: 0.1}\n---\noptim: {lr: 0.2}\n",
        "unclosed.json": '{"optim": {"lr": 0.1}',
        "overflow.yaml": "run_name: n\ntask: {num_tasks: 1.0e+400}\n",
        "overflow-text.yaml": "run_name: n\ntask: {num_tasks: 1e400}\n",
        "overflow.json": '{"run_name": "n", "optim": {"lr": 1e400}}',
        "underflow.yaml": "run_name: n\ntask: {noise_variance: 1.0e-400}\n",
        "date-name.yaml": "run_name: 2026-01-01\n",
        "time-name.yaml": "run_name: 2026-01-01 10:00:00\n",
        "date-key.yaml": "optim: {2026-01-01: 3}\n",
        "binary-name.yaml": "run_name: !!binary aGk=\n",
        "set.yaml": "task: !!set {num_tasks}\n",
        "omap.yaml": "task: !!omap [num_tasks: 4]\n",
        "clock.yaml": "run_name: n\ntrainer: {max_steps: 1:30}\n",
        "sampler.json": '{"sampler": {"lr": 1e-05}}',
        "sampler.csv": "sampler: {lr: 1.0e-05}\n",
        **{f"steps-{i}.yaml": f"sampler: {{steps: {steps}}}\n" for i, steps in enumerate(STEPS)},
        "many-steps.yaml": "trainer: {max_steps: 1" + "0" * 5000 + "}\n",
    }


def _sweep_files() -> Mapping[str, str]:
    command = 'command: ["${env}", icl, train, "--config=tiny.yaml", "${args}"]\n'
    lr = "parameters: {optim.lr: {values: [0.1, 0.2]}}\n"
    drawn = "parameters: {optim.lr: {min: 0.1, max: 0.2}}\n"
    return {
        "sweep.yaml": f"method: grid\n{command}{lr}",
        "sweep-no-method.yaml": command + lr,
        "sweep-bayes.yaml": f"method: bayes\n{command}{lr}",
        "sweep-typo.yaml": f"metod: grid\n{command}{lr}",
        "sweep-no-parameters.yaml": f"method: grid\n{command}",
        "sweep-empty-values.yaml": f"method: grid\n{command}parameters: {{optim.lr: {{values: []}}}}\n",
        "sweep-text-values.yaml": f"method: grid\n{command}parameters: {{optim.lr: {{values: 0.1}}}}\n",
        "sweep-bare-value.yaml": f"method: grid\n{command}parameters: {{optim.lr: 0.1}}\n",
        "sweep-unknown-key.yaml": f"method: grid\n{command}parameters: {{optim.rate: {{values: [0.1]}}}}\n",
        "sweep-grid-uniform.yaml": f"method: grid\n{command}parameters: {{optim.lr: {{min: 0.1, max: 0.2}}}}\n",
        "sweep-reversed.yaml": f"method: random\nrun_cap: 2\n{command}parameters: {{optim.lr: {{min: 0.2, max: 0.1}}}}\n",
        "sweep-endless.yaml": f"method: random\n{command}parameters: {{optim.lr: {{min: 0.1, max: 0.2}}}}\n",
        "sweep-same.yaml": f"method: grid\n{command}parameters: {{optim.lr: {{values: [0.1, 0.1]}}}}\n",
        "sweep-text-command.yaml": f"method: grid\ncommand: icl train\n{lr}",
        "sweep-macro.yaml": f'method: grid\ncommand: ["${{env}}", icl, train, "${{argz}}"]\n{lr}',
        "sweep-cap.yaml": f"method: random\nrun_cap: 0\n{command}parameters: {{optim.lr: {{min: 0.1, max: 0.2}}}}\n",
        "sweep-distribution.yaml": f"method: random\nrun_cap: 2\n{command}"
        "parameters: {optim.lr: {distribution: unifrom, min: 0.1, max: 0.2}}\n",
        "sweep-sigma.yaml": f"method: random\nrun_cap: 2\n{command}"
        "parameters: {optim.lr: {distribution: normal, mu: 0, sigma: -1}}\n",
        "sweep-twice.yaml": f"method: grid\n{command}parameters: {{optim.lr: {{value: 1}}, optim: {{parameters: "
        "{lr: {value: 2}}}}\n",
        "sweep-huge.yaml": f"method: grid\n{command}parameters: {{"
        + ", ".join(f"seeds.{name}: {{values: {list(range(1000))}}}" for name in ("model", "data", "noise", "tasks"))
        + "}\n",
        **{
            f"sweep-{name}.yaml": f"method: {method}\n{command}parameters: {{optim.lr: {{{options}}}}}\n"
            for name, method, options in (
                ("distribution-list", "random", "distribution: [uniform], min: 0.1, max: 0.2"),
                ("distribution-map", "grid", "distribution: {a: 1}, values: [1]"),
                ("distribution-null", "grid", "distribution: null, values: [1]"),
                ("date", "grid", "values: [2026-01-01]"),
                ("overflow", "grid", "values: [0.1, 1.0e+400]"),
                ("overflow-bound", "random\nrun_cap: 2", "min: 0.1, max: 1.0e+400"),
                ("many", "grid", "min: 0, max: 1000000000000000000"),
                ("more", "grid", f"min: 0, max: {'9' * 200}"),
                ("fine", "grid", "distribution: q_uniform, min: 0, max: 1.0e+300, q: 1.0e-05"),
                ("list", "grid", "values: [[0.1, 0.2]]"),
                ("map", "grid", "values: [{a: 1}]"),
                ("null", "grid", "value: null"),
                ("q", "random\nrun_cap: 2", "distribution: q_uniform, min: 0.1, max: 0.2, q: 1.0e-320"),
                ("mu", "random\nrun_cap: 2", "distribution: normal, mu: 1.0e+308, sigma: 1.0e+308"),
                ("probabilities", "random\nrun_cap: 2", "values: [0.1], probabilities: 1"),
                ("small", "grid", "value: 1.0e-50"),
            )
        },
        **{
            f"sweep-cap-{name}.yaml": f"method: {method}\nrun_cap: {cap}\n{command}{lr if method == 'grid' else drawn}"
            for name, method, cap in (
                ("20", "random", 10**20),
                ("20-grid", "grid", 10**20),
                ("9", "random", 10**9),
                ("half", "random", 1.5),
                ("true", "grid", "true"),
                ("list", "grid", "[3]"),
                ("date", "grid", "2026-01-01"),
                ("overflow", "grid", "1.0e+400"),
            )
        },
        **{
            f"sweep-command-{name}.yaml": f"method: grid\ncommand: {words}\n{lr}"
            for name, words in (
                ("list", "[[icl, train]]"),
                ("null", "[icl, train, null]"),
                ("date", "[icl, train, 2026-01-01]"),
                ("word", "[icl, trian]"),
                ("zero", '["a\\0b"]'),
                ("steps", '[icl, train, --sampler.steps, "4:0"]'),
                ("config", "[icl, train, --config]"),
            )
        },
        "sweep-method-list.yaml": f"method: [grid]\n{command}{lr}",
        "sweep-program-list.yaml": f"method: grid\nprogram: [train.py]\n{lr}",
        "sweep-program-empty.yaml": f"method: grid\nprogram: ''\n{lr}",
        "sweep-inside.yaml": f"method: grid\n{command}parameters: {{run_name: {{values: [a, a/b]}}}}\n",
        "sweep-steps.yaml": f"method: grid\n{command}parameters: {{sampler.steps: {{value: foo}}}}\n",
        "sweep-nothing.yaml": f"method: grid\n{command}parameters: {{run_name: {{value: n}}, trainer.max_steps: {{value: 1}}, "
        "optim.schedule: {value: triangle}}\n",
        "sweep-monitor.yaml": f"method: grid\n{command}parameters: {{run_name: {{value: n}}, early_stopping.patience: "
        "{value: 2}, early_stopping.monitor: {value: loss}}\n",
        "sweep-other.yaml": f"method: grid\nprogram: train.py\ncommand: [python, '${{program}}']\n{lr}",
    }


def _prompt_files() -> Mapping[str, str | bytes]:
    good = {"x_context": [[1, 0]], "y_context": [0.5], "x_query": [[2, 0]]}

    def changed(**parts: object) -> str:
        return json.dumps({**good, **parts})

    return {
        "prompt.json": json.dumps(good),
        "prompt.txt": json.dumps(good),
        "prompt-wide.json": changed(x_context=[[1, 0, 0]], x_query=[[2, 0, 0]]),
        "prompt-wide-query.json": changed(x_query=[[2, 0, 0]]),
        "prompt-long.json": changed(x_context=[[1, 0]] * 9, y_context=[1] * 9),
        "prompt-uneven.json": changed(y_context=[1, 2]),
        "prompt-ragged.json": changed(x_context=[[1, 0], [1]]),
        "prompt-no-query.json": changed(x_query=[]),
        "prompt-nan.json": changed(x_query=[[float("nan"), 0]]),
        "prompt-inf.json": changed(x_context=[[float("inf"), 0]]),
        "prompt-text.json": changed(x_query=[["a", "b"]]),
        "prompt-null.json": changed(y_context=[None]),
        "prompt-huge.json": changed(x_query=[[10**400, 0]]),
        "prompt-large.json": changed(x_query=[[1e300, 0]]),
        "prompt-true.json": changed(x_query=[[True, False]]),
        "prompt-flat.json": changed(x_query=[2, 0]),
        "prompt-number.json": changed(x_query=3),
        "prompt-missing.json": json.dumps({"x_context": [[1, 0]], "y_context": [0.5]}),
        "prompt-typo.json": json.dumps({"x_contxt": [[1, 0]], "y_context": [0.5], "x_query": [[2, 0]]}),
        "prompt-list.json": "[1, 2]",
        "prompt-cut.json": json.dumps(good)[:-5],
        "prompt-utf16.json": json.dumps(good).encode("utf-16"),
        "prompt-twice.json": '{"x_context": [[1, 0]], "y_context": [0.5], "y_context": [0.7], "x_query": [[2, 0]]}',
        "prompt-overflow.json": '{"x_context": [[1, 0]], "y_context": [0.5], "x_query": [[1e400, 0]]}',
        "prompt-overflow.csv": "x1,x2,y\n1,0,0.5\n1e400,0,\n",
        "prompt-deep.json": '{"x_context": ' + "[" * _DEEP + "]" * _DEEP + ', "y_context": [], "x_query": [[1, 0]]}',
        "prompt-header.csv": "1,0,0.5\n2,0,\n",
        "prompt-names.csv": "a,b,y\n1,0,0.5\n2,0,\n",
        "prompt-gap.csv": "x1,x3,y\n1,0,0.5\n2,0,\n",
        "prompt-wide.csv": "x1,x2,x3,y\n1,0,0,0.5\n2,0,0,\n",
        "prompt-short-row.csv": "x1,x2,y\n1\n2,0,\n",
        "prompt-long-row.csv": "x1,x2,y\n1,0,0.5,9\n2,0,\n",
        "prompt-words.csv": "x1,x2,y\none,0,0.5\n2,0,\n",
        "prompt-no-query.csv": "x1,x2,y\n1,0,0.5\n",
        "prompt-nan.csv": "x1,x2,y\nnan,0,0.5\n2,0,\n",
        "prompt-semicolons.csv": "x1;x2;y\n1;0;0,5\n2;0;\n",
        "prompt-header-only.csv": "x1,x2,y\n",
        "prompt-field.csv": "x1,x2,y\n" + "1" * 200_000 + ",0,\n",
        "prompt-null-byte.csv": b"x1,x2,y\n1,0\x00,0.5\n2,0,\n",
    }


def _table_files() -> Mapping[str, str | bytes]:
    header = "num_tasks,step,checkpoint_hash,distribution,quantity,position,value,stderr\n"
    rows = [
        f"{m},4,h{m},{name},{quantity},{position},{1 + m / 10},0.1\n"
        for m in (2, 4, 8, 16)
        for name in ("pretrain", "true")
        for quantity in ("loss", "delta_ridge", "delta_dmmse")
        for position in ("mean", "1", "4")
    ]
    table = header + "".join(rows)
    return {
        "table.csv": table,
        "table-columns.csv": "a,b\n1,2\n",
        "table-header.csv": header,
        "table-words.csv": table.replace("1.2,0.1", "many,0.1"),
        "table-nan.csv": table.replace("1.2,0.1", "nan,0.1"),
        "table-inf.csv": table.replace("1.2,0.1", "inf,0.1"),
        "table-overflow.csv": table.replace("\n16,", "\n1e400,"),
        "table-few.csv": header + "".join(row for row in rows if row.startswith(("2,", "4,"))),
        "table-m.csv": table.replace("\n16,", "\nsixteen,"),
        "table-list.json": "[1, 2, 3]",
        "table-object.json": '{"rows": 3}',
        "table-cut.json": '[{"num_tasks": 2',
        "table-ragged.csv": header + "2,4\n1,2,3,4,5,6,7,8,9,10\n",
        "table-utf16.csv": table.encode("utf-16"),
        "table.txt": table,
    }
