"""Presets: the settings of papers, and our own small models. `preset("L2H4")` returns a complete `RunConfig`.

A comment at every preset names its source. If the paper does not give a setting, we chose the value, and the comment says so. Tests
check the exact numbers of parameters: `transience` 68,100, `L2H4` 51,717, `raventos-base` 1,591,808, `raventos-small` 202,752,
`carroll` 2,654,217, `icr` 4,761,097, `L2W256` 3,355,016.

The `sampler` of every preset except `L2W256` is our choice, because estimates with the published sampler
(`icl.sampling.published.PUBLISHED`) cannot be trusted. For regression runs, we choose the sampler by three rules:

- In a flat direction, chains spread to a width of 1 / sqrt(localization). This width is small compared with the root mean
  square weight, so chains stay in the basin.
- `nbeta` equals `localization`. So mostly directions whose curvature is above one contribute to the LLC, and the loss along
  the chains rises only a little.
- Let h be the largest eigenvalue of the loss's Hessian. At the step where the measured h is largest, lr x nbeta x h is about 3.
  If this product is above 4, the chains of `sgld` are unstable.

We have checked estimates with these samplers for the quickstart, and for `L2H4` at one checkpoint. For another model or task,
`icl llc RUN --calibrate` searches for settings, and the verdicts say whether these settings work.
"""

import dataclasses
import difflib
import math

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

# The quickstart's sampler is the default `SamplerConfig`. The largest eigenvalue of the Hessian is 140 at step 832 and 85 at the last step.
# The root mean square of the weights is about 0.2. At the last checkpoint, chains leave the basin with nbeta = localization = 300, and
# lr = 1e-4 is too large.

# Hoogland et al. (2024), arXiv 2402.02364, linear-regression transformer. Hyperparameters are from the authors' sweep file
# L2H4Minf.yaml (January 2024) and their config.py: K = 8, Adam, batch 256, 500,000 steps, a triangular schedule with peak 3e-3,
# and 100 log-spaced and 100 linear checkpoints. The published models add each residual twice: see `model.double_residual`.
L2H4 = RunConfig(
    preset="L2H4",
    task=TaskConfig(num_tasks=math.inf, task_size=4, max_examples=8, noise_variance=0.125),
    model=ModelConfig(num_layers=2, num_heads=4, embed_size=64, mlp_size=64),
    optim=OptimConfig(lr=3e-3, schedule="triangle"),
    trainer=TrainerConfig(max_steps=500_000, batch_size=256),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(num_log=100, num_linear=100),
    # For the released models, the largest eigenvalue of the Hessian reaches 660 at step 9,000, and is between 24 and 140 later. The root
    # mean square of the initial weights is about 0.11. With the published nbeta = 67 and localization = 6.7, chains leave the basin at
    # every step up to 46,000. At step 40,293, this sampler with only 150 draws per chain (2,384 gradients of 1,024 prompts) gives an LLC of
    # 159 ± 1.6 and an effective sample size of 105. SGLD with lr = 3e-6 gave 158.7 ± 3.1 from 6,000 gradients of 256 prompts.
    sampler=SamplerConfig(
        lr=5e-6,
        friction=0.7,
        nbeta=1000.0,
        localization=1000.0,
        num_samples=2**17,
        batch_size=1024,
        num_chains=8,
        num_draws=400,
        num_burnin_steps=120,
    ),
)

# The root mean square of the initial weights of these models is only about 0.03 to 0.06 (GPT-2's initialisation, or wide layers), so
# chains need a stronger localization than for the small models. The kernel is SGLD, because we have not measured `baoab` on these models.
_WIDE = SamplerConfig(
    kernel="sgld",
    lr=1e-6,
    nbeta=1e4,
    localization=1e4,
    num_samples=2**20,
    batch_size=1024,
    num_chains=4,
    num_draws=500,
    num_burnin_steps=500,
)

# Raventos et al. (2023), arXiv 2306.15063, section 2 and the authors' configs/example.py: GPT-2 blocks, D = 8, K = 16,
# sigma^2 = 0.25, a triangular schedule with peak 1e-3 (from their example; in the paper they tune the peak), batch 256, 500,000 steps,
# evaluation every 1,000 steps. In the paper, M is 2 to 2^20 or infinite. These presets have M = 2^20.
_GPT2 = ModelConfig(
    num_layers=8,
    num_heads=2,
    embed_size=128,
    mlp_size=512,
    activation="gelu_tanh",
    attention_bias=True,
    unembedding_bias=False,
    output="scalar",
    init="gpt2",
)
RAVENTOS_BASE = RunConfig(
    preset="raventos-base",
    task=TaskConfig(num_tasks=2**20, task_size=8, max_examples=16, noise_variance=0.25),
    model=_GPT2,
    optim=OptimConfig(lr=1e-3, schedule="triangle"),
    trainer=TrainerConfig(max_steps=500_000, batch_size=256),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(num_log=100, num_linear=100),
    sampler=_WIDE,
)
RAVENTOS_SMALL = dataclasses.replace(
    RAVENTOS_BASE,
    preset="raventos-small",
    model=dataclasses.replace(_GPT2, num_layers=4, embed_size=64, mlp_size=256),
)

# Carroll et al. (2025), arXiv 2501.17745, sections 3.1 and 4.1: D = 8, K = 16, sigma^2 = 0.125, 2 layers, 2.65M
# parameters, 150,000 steps, 2,203 checkpoints. The main text does not give the number of heads, the learning rate, its schedule
# or the batch size, so these are our choice.
CARROLL = RunConfig(
    preset="carroll",
    task=TaskConfig(num_tasks=64, task_size=8, max_examples=16, noise_variance=0.125),
    model=ModelConfig(num_layers=2, num_heads=4, embed_size=512, mlp_size=512, attention_output=False),
    optim=OptimConfig(lr=1e-3, schedule="constant"),
    trainer=TrainerConfig(max_steps=150_000, batch_size=1024),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(every=100, num_log=1000, num_linear=0),
    sampler=_WIDE,
)

# The documented defaults of the older code base with `ICRegConfig`: D = 8, K = 16, sigma^2 = 0.125, 3 pre-norm layers of
# width 512 with biases and GELU, M = 64, a constant rate of 1e-3 with the gradient clipped at 1, 150,000 steps of 2,048
# prompts. (Later versions of that code had 8 layers and sigma^2 = 0.25.)
ICR = RunConfig(
    preset="icr",
    task=TaskConfig(num_tasks=64, task_size=8, max_examples=16, noise_variance=0.125),
    model=ModelConfig(
        num_layers=3,
        num_heads=4,
        embed_size=512,
        mlp_size=512,
        activation="gelu",
        embedding_bias=True,
        attention_bias=True,
        init="gpt2",
    ),
    optim=OptimConfig(lr=1e-3, schedule="constant", grad_clip=1.0),
    trainer=TrainerConfig(max_steps=150_000, batch_size=2048),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    checkpoints=CheckpointsConfig(every=10_000, num_log=0, num_linear=0),
    sampler=_WIDE,
)

# Our own preset, which shows transient ridge (Carroll et al. 2025) on a laptop. The loss on new tasks is smallest at about step 700. By
# then, this loss has fallen by 71 % of the distance from the loss of predicting zero to ridge's loss. It later rises while the model learns
# its ten tasks. (docs/reproduction.md lists the settings that we tried.) With batches of 256 prompts and a constant rate, the scatter of
# the loss between steps is less than a tenth of the rise. The preset uses the quickstart's sampler. We have not checked the sampler for
# this model.
TRANSIENCE = RunConfig(
    preset="transience",
    task=TaskConfig(num_tasks=10, task_size=3, max_examples=8, noise_variance=0.1),
    model=ModelConfig(embed_size=64, mlp_size=128),
    optim=OptimConfig(lr=3e-3, schedule="constant"),
    trainer=TrainerConfig(max_steps=15_000, batch_size=256),
    checkpoints=CheckpointsConfig(num_log=60, num_linear=60),
)

# Hoogland et al. (2024), arXiv 2402.02364, language model. The settings of text, model, optimiser and sampler are from the authors' files.
# At step 25,000, the authors change to a second training text. To do the same, add --language.next_source hf://georgeyw/dsir-pile-5m-2
# --language.change_step 25000. The preset does not contain these two settings, because with them `icl` would fetch both texts before the
# first step. The authors save every 100 steps. In the sampler, `nbeta` is n / ln n with n = 100, as in their settings. We have not checked
# estimates with this sampler at this size.
L2W256 = RunConfig(
    preset="L2W256",
    language=LanguageConfig(
        source="hf://georgeyw/dsir-pile-5m",
        tokenizer="hf://georgeyw/TinyStories-tokenizer-5k",
        column="contents",
        vocab_size=5000,
        context_size=1024,
    ),
    model=ModelConfig(
        family="language",
        num_layers=2,
        num_heads=8,
        embed_size=256,
        mlp_size=0,
        positions="shortformer",
        attention_bias=True,
        init="normal",
    ),
    optim=OptimConfig(lr=1e-3, schedule="constant", weight_decay=0.05),
    trainer=TrainerConfig(max_steps=50_000, batch_size=100),
    evaluation=EvaluationConfig(every=1000, num_prompts=1024),
    early_stopping=EarlyStoppingConfig(monitor="eval/test/loss"),
    checkpoints=CheckpointsConfig(every=100, num_log=0, num_linear=0),
    sampler=SamplerConfig(
        kernel="sgld",
        lr=3e-3,
        nbeta=100 / math.log(100),
        localization=300.0,
        num_samples=100,
        batch_size=100,
        num_chains=20,
        num_draws=200,
        num_burnin_steps=0,
        num_init_batches=32,
        minibatches="fresh",
    ),
)

# Our own preset: the architecture of `L2W256` at a smaller width, which trains in about three minutes on one CPU core and needs no download. In the
# synthetic language, the model first learns the frequencies of tokens, then bigrams, then copying. With these settings of the sampler, the
# LLC at the last step has the verdict `ok` (docs/language-models.md).
LANGUAGE_QUICKSTART = RunConfig(
    preset="language-quickstart",
    model=dataclasses.replace(L2W256.model, num_heads=4, embed_size=64),
    optim=OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.05),
    trainer=TrainerConfig(max_steps=3000, batch_size=32, log_every=50),
    evaluation=EvaluationConfig(every=100, num_prompts=512),
    early_stopping=EarlyStoppingConfig(monitor="eval/test/loss"),
    checkpoints=CheckpointsConfig(num_log=30, num_linear=20),
    sampler=SamplerConfig(
        lr=1e-5,
        friction=0.8,
        nbeta=3000.0,
        localization=300.0,
        num_samples=2**13,
        batch_size=64,
        num_draws=400,
        num_burnin_steps=100,
        num_init_batches=128,
    ),
)

# Our own preset: a small model whose output is a predictive distribution, for `icl analyse --what prior` and `--what mixture` (docs/priors.md).
# It memorises its M = 4 tasks in about two minutes on two CPU cores. The learning rate is twice as large as in the quickstart, because the model
# is narrower.
PRIOR_QUICKSTART = RunConfig(
    preset="prior-quickstart",
    task=TaskConfig(num_tasks=4),
    model=ModelConfig(embed_size=16, mlp_size=32, output="mixture"),
    optim=OptimConfig(lr=6e-3),
    trainer=TrainerConfig(max_steps=3000),
    early_stopping=EarlyStoppingConfig(monitor="eval/pretrain/nll"),
)

# Our own presets: the quickstart with a different distribution of the tasks, the noise or the inputs (docs/priors.md). Every prompt has a
# new task, so the prior of the tasks matters. With the noise variance 1, the Bayes predictor differs from ridge more than with the
# quickstart's 0.25.
_NOISY = TaskConfig(num_tasks=math.inf, noise_variance=1.0)
_WORLDS = {
    "student-t-tasks": dataclasses.replace(_NOISY, prior="student_t", prior_df=3.0),
    "laplace-tasks": dataclasses.replace(_NOISY, prior="laplace"),
    "sparse-tasks": dataclasses.replace(_NOISY, prior="sparse", prior_density=0.25),
    "low-rank-tasks": dataclasses.replace(_NOISY, prior="low_rank", prior_rank=1),
    "mixture-tasks": dataclasses.replace(_NOISY, prior="mixture", prior_components=4, prior_between=0.9),
    "student-t-noise": dataclasses.replace(_NOISY, noise="student_t", noise_df=3.0),
    "laplace-noise": dataclasses.replace(_NOISY, noise="laplace"),
    "student-t-inputs": dataclasses.replace(_NOISY, inputs="student_t", input_df=3.0),
    "ar1-inputs": dataclasses.replace(_NOISY, inputs="ar1", input_correlation=0.9),
    # In these two presets, the eight tasks change during training. The model would memorise eight fixed tasks.
    "resampled-pool": TaskConfig(num_tasks=8, pool="resampled", pool_steps=30),
    "walking-pool": TaskConfig(num_tasks=8, pool="walk", pool_steps=30),
}

PRESETS: dict[str, RunConfig] = {
    config.preset: config
    for config in (
        *(RunConfig(), TRANSIENCE, L2H4, RAVENTOS_BASE, RAVENTOS_SMALL, CARROLL, ICR),
        *(L2W256, LANGUAGE_QUICKSTART, PRIOR_QUICKSTART),
        *(RunConfig(preset=name, task=task) for name, task in _WORLDS.items()),
    )
}


def preset(name: str) -> RunConfig:
    """Return the settings of the preset with this name.

    Raises:
        ConfigError: If there is no such preset. The message names the nearest preset and lists all presets.

    Examples:
        >>> preset("L2H4").task.max_examples
        8
    """
    if name in PRESETS:
        return PRESETS[name]
    name = " ".join(str(name).split())
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
    raise ConfigError(f"There is no preset `{name}`.{hint} The presets are {', '.join(PRESETS)}.")
