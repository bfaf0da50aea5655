"""The section `model`: the architecture and initial weights of regression models and language models.

Language models have TransformerLens's architecture, so some settings have a fixed value in every language model.
"""

from dataclasses import dataclass
from typing import Literal

from icl.config.validation import require, validate

LANGUAGE_ONLY = {"head_size": None, "positions": "standard"}
"""Settings of `model` that only language models use, with the values that regression models require."""
_OF_EVERY_LANGUAGE_MODEL = {
    "layer_norm": "pre",
    "attention_output": True,
    "embedding_bias": False,
    "attention_bias": True,
    "mlp_bias": True,
    "unembedding_bias": True,
    "output": "token",
    "double_residual": False,
}
"""Settings of `model` with a fixed value in every language model. The values are those of TransformerLens's models."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer that reads vectors (`icl/model/transformer.py`) or the tokens of a text (`icl/model/language.py`)."""

    family: Literal["regression", "language"] = "regression"
    """Family of the model: `regression` reads the prompts of `task`, `language` reads the text of `language`."""
    num_layers: int = 2
    """Number L of blocks, each with attention and MLP."""
    num_heads: int = 4
    """Number H of attention heads per block. H must divide `embed_size`, unless `head_size` is set."""
    head_size: int | None = None
    """Number c of channels of each head in a language model. The default is `embed_size` / `num_heads`."""
    embed_size: int = 32
    """Width C of the residual stream."""
    mlp_size: int = 64
    """Hidden width of the MLP. In a language model, 0 leaves the MLPs out."""
    positions: Literal["standard", "shortformer"] = "standard"
    """The place where position embeddings are added. `standard`: to the token embeddings. `shortformer` (only in language models; Press et al.
    2021): to the inputs of queries and keys."""
    layer_norm: Literal["pre", "post", "none"] = "pre"
    """Place of the layer norms: before each sublayer (`pre`), after each residual sum (`post`), or nowhere (`none`)."""
    attention_output: bool = True
    """Whether attention has an output projection W_O."""
    activation: Literal["relu", "gelu", "gelu_tanh"] = "relu"
    """MLP activation: ReLU, exact GELU, or GPT-2's tanh approximation of GELU."""
    embedding_bias: bool = False
    """Whether the token embedding has a bias."""
    attention_bias: bool = False
    """Whether query, key, value and output projections have biases."""
    mlp_bias: bool = True
    """Whether the MLP has biases."""
    unembedding_bias: bool = True
    """Whether the unembedding has a bias."""
    output: Literal["scalar", "token", "gaussian", "mixture"] = "token"
    """Output of the model. `scalar`: the prediction alone. `token`: D + 1 numbers, the first of which is the prediction. `gaussian` or
    `mixture`: a predictive distribution of y, which is one Gaussian or a mixture of Gaussians. With a predictive distribution, training
    minimises the negative log-likelihood, and the prediction is the mean of the distribution."""
    num_components: int = 4
    """Number J of Gaussians in the output `mixture`. With any other output, this setting has no effect and must keep its default."""
    init: Literal["pytorch", "gpt2", "normal"] = "pytorch"
    """Distribution of the initial weights. `pytorch`: nn.Linear's uniform distribution. `gpt2`: N(0, 0.02^2), with scaled residual
    projections. `normal` (only language models): N(0, 0.05^2) for every matrix."""
    double_residual: bool = False
    """Whether each block's input is added twice, as in the code of Hoogland et al. Set this to true only to reproduce their results."""

    def __post_init__(self) -> None:
        counts = {"num_layers": 1, "num_heads": 1, "embed_size": 1, "mlp_size": 0 if self.is_language else 1}
        validate("model", self, counts={**counts, "head_size": 1, "num_components": 1}, numbers={})
        require(
            self.head_size is not None or self.embed_size % self.num_heads == 0,
            f"`model.num_heads` must divide `model.embed_size`, got {self.num_heads} heads and width {self.embed_size}.",
        )
        require(
            self.output == "mixture" or self.num_components == type(self).num_components,
            f"`model.num_components` has no effect on the output `{self.output}`. Set `model.output` to `mixture`.",
        )
        required = LANGUAGE_ONLY if not self.is_language else _OF_EVERY_LANGUAGE_MODEL
        for name, value in required.items():
            got = getattr(self, name)
            require(got == value, f"`model.{name}` must be {value!r} in a {self.family} model, got {got!r}.")
        require(
            self.is_language == (self.init == "normal"),
            f"`model.init` must be {'normal' if self.is_language else 'pytorch or gpt2'} in a {self.family} model, got {self.init!r}.",
        )

    @property
    def is_language(self) -> bool:
        """Whether this is a language model."""
        return self.family == "language"

    @property
    def heads_width(self) -> int:
        """Total number of channels of the H heads of a block: H times the channels per head."""
        return self.embed_size if self.head_size is None else self.num_heads * self.head_size

    @property
    def has_density(self) -> bool:
        """Whether the model outputs a predictive distribution of y. If so, it is trained by negative log-likelihood."""
        return self.output in ("gaussian", "mixture")

    @property
    def loss_name(self) -> Literal["mse", "nll"]:
        """The loss that training minimises: squared error (`mse`) per target, or negative log-likelihood in nats per target or token (`nll`)."""
        return "nll" if self.has_density or self.is_language else "mse"

    @property
    def train_metric(self) -> str:
        """Name of the column of `metrics.csv` that contains the training loss."""
        return "train/nll" if self.has_density else "train/loss"
