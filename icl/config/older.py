"""Names of commands and settings in older code bases, and their new names, for use in error messages.

`docs/older-commands.md` lists the same names in tables. A test checks that the tables agree with this module.
"""

OLDER_COMMANDS = {
    "ic_regression": "icl train",
    "train_ic_regression": "icl train",
    "train": "icl train",
    "restore": "icl train",
    "main": "icl train",
    "run_m_diversity_experiment": "icl diversity",
    "run_experiment": "icl diversity --background",
    "analyze_all_checkpoints": "icl evaluate --checkpoint_base_dir checkpoints",
    "evaluate_models": "icl evaluate RUN",
    "evaluate_ood": "icl evaluate RUN",
    "evaluate_ood_score": "icl evaluate RUN",
    "compute_gradients": "icl analyse RUN --what gradients",
    "pca_gradients": "icl analyse RUN --what gradients",
    "regression_analysis": "icl analyse --what diversity --input_file FILE",
    "hessians": "icl analyse RUN --what hessian",
    "predict": "icl predict RUN --prompt FILE",
    "predict_from_prompt": "icl predict RUN --prompt FILE",
    "load_checkpoint": "icl checkpoints RUN ls",
    "load_model": "icl predict RUN --prompt FILE",
    "sweep": "icl sweep FILE",
    "agent": "wandb agent ID",
    "main_figures": "icl analyse RUN --what all",
    "essential_dynamics": "icl analyse RUN --what essential-dynamics",
    "task_prior": "icl analyse RUN --what behaviour",
    "llcs": "icl llc RUN",
}
"""Commands that replace older scripts, modules, functions and notebooks, keyed by the older name without folder and suffix."""

OLDER_SETTINGS = {
    "learning_rate": "optim.lr",
    "num_steps": "trainer.max_steps",
    "batch_size": "trainer.batch_size",
    "warmup_steps": "optim.warmup_steps",
    "grad_clip": "optim.grad_clip",
    "checkpoint_every": "checkpoints.every",
    "eval_every": "evaluation.every",
    "print_every": "trainer.log_every",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_min_delta": "early_stopping.min_delta",
    "checkpoint_dir": "run_name",
    "device": "trainer.accelerator",
    "seed": "seeds.model",
    "m": "task.num_tasks",
    "d": "task.task_size",
    "k": "task.max_examples",
    "sigma2": "task.noise_variance",
    "d_model": "model.embed_size",
    "d_mlp": "model.mlp_size",
    "n_heads": "model.num_heads",
    "n_layers": "model.num_layers",
    "use_prenorm": "model.layer_norm",
    "max_m": "",
    "eval_batch_size": "evaluation.num_prompts",
    "layer_norm": "model.layer_norm",
    "include_output": "model.attention_output",
    "model_seed": "seeds.model",
    "pretrain_seed": "seeds.tasks",
    "true_seed": "seeds.evaluation",
    "sampling_seed": "seeds.data",
    "log_space": "checkpoints.num_log",
    "linear_space": "checkpoints.num_linear",
    "scheduler_type": "optim.schedule",
    "noise_scale": "sampler.lr",
    "epsilon": "sampler.lr",
    "gradient_scale": "sampler.nbeta",
    "localization_scale": "sampler.localization",
    "gamma": "sampler.localization",
    "elasticity": "sampler.localization",
    "restoring_force": "sampler.localization",
    "num_burn_in": "sampler.num_burnin_steps",
}
"""Settings that replace older flags and settings, keyed by the older name in lower case, without section. An empty string means that
the older setting is not needed any more."""

_SUFFIXES = (".py", ".sh", ".ipynb")
_LAUNCHERS = ("python", "python3", "-m", "nohup", "wandb")


def modern_command(words: list[str]) -> str | None:
    """Return the command that replaces an older command line, or None if the words are not an older command."""
    word = next((word for word in words if word not in _LAUNCHERS), "")
    name = word.rpartition("/")[2]
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return OLDER_COMMANDS.get(name.rpartition(".")[2].lower().replace("-", "_"))


def modern_setting(key: str) -> str | None:
    """Return a sentence that names the new setting for an older flag or setting, or None if the key is not an older name."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    if name not in OLDER_SETTINGS:
        return None
    return (
        f"Its new name is `{OLDER_SETTINGS[name]}`."
        if OLDER_SETTINGS[name]
        else "It is not needed any more; leave it out."
    )
