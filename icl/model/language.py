"""Language models: decoder-only transformers over tokens of text, with the architecture and the parameter names of TransformerLens.

Each token t of a row is embedded, passes through L causal blocks, and gives the logits of the next token. Let x be the residual stream,
p the position embeddings and LN a layer norm (eps 1e-5). A block with H heads of c channels is

    q, k = W_Q u + b_Q, W_K u + b_K,   v = W_V LN1(x) + b_V
    x <- x + sum over heads of W_O softmax(q k^T / sqrt(c), causal) v + b_O,   then   x <- x + MLP(LN2(x)) if there is an MLP

The setting `model.positions` determines u. With `standard` positions, x begins as W_E[t] + p and u = LN1(x). With `shortformer`
positions (Press, Smith and Lewis 2021), x begins as W_E[t] and u = LN1(x) + p. Shortformer positions affect the attention pattern, but
are not part of the values and so never enter the residual stream. The logits are LN(x) W_U + b_U. The model of Hoogland et al. (2024)
has two such blocks without MLPs, with 3,355,016 parameters in total.

`LanguageModel` defines the model. `apply_language` computes the same function for many parameter sets (members) on a leading axis N, with
the linear maps, layer norms and attention of `icl.model.stacked`. Tests compare these two implementations with each other, with a loop over
positions, and with TransformerLens.

Memory: `next_token_losses` needs the logits of its rows, which are V numbers for each token. `rows_at_once` returns the number of rows for
which autograd saves at most `MAX_NUMBERS` numbers. Callers pass at most this number of rows at a time (`icl.model.losses`).

Axis letters: those of `icl.model.stacked`, V tokens of the vocabulary, L blocks.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from icl.config import ModelConfig
from icl.model.attention import attention
from icl.model.stacked import Params, affine, layer_norm
from icl.model.transformer import ACTIVATIONS

INIT_STD = 0.05
"""Standard deviation of the entries of every initial matrix with `model.init` = `normal` (Hoogland et al. 2024)."""
MAX_NUMBERS = 2**27
"""Largest count of numbers that autograd saves for the rows that are computed at once: 512 MiB in float32. A single row may need more."""
_MAX_TINY = 160
"""Largest number of tokens in a row for which we use `icl.model.attention`. For longer rows, PyTorch's fused attention is faster."""


class LanguageModel(nn.Module):
    """Transformer that gives the logits of every next token of a row."""

    def __init__(self, config: ModelConfig, *, vocab_size: int, context_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context_size = config, vocab_size, context_size
        self.embed: nn.ParameterDict = _table(W_E=(vocab_size, config.embed_size))
        self.pos_embed: nn.ParameterDict = _table(W_pos=(context_size, config.embed_size))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.ln_final = _LayerNorm(config.embed_size)
        self.unembed: nn.ParameterDict = _table(W_U=(config.embed_size, vocab_size), b_U=(vocab_size,))

    def forward(self, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the token after each of the T tokens.

        Raises:
            ValueError: If the rows are longer than the context, or a token is not in the vocabulary.
        """
        self._require_rows_that_fit(tokens)
        positions = self.pos_embed["W_pos"][: tokens.shape[1]]  # T C
        x = self.embed["W_E"][tokens]  # B T C
        if self.config.positions == "standard":
            x, positions = x + positions, torch.zeros_like(positions)
        future = torch.ones(2 * [tokens.shape[1]], dtype=torch.bool, device=tokens.device).triu(1)  # T T
        for block in self.blocks:
            x = block(x, positions, future)  # B T C
        return self.ln_final(x) @ self.unembed["W_U"] + self.unembed["b_U"]

    def _require_rows_that_fit(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_size:
            raise ValueError(f"Expected tokens (B, T) with T from 1 to {self.context_size}, got {tuple(tokens.shape)}.")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(f"Tokens must be from 0 to {self.vocab_size - 1}, got {tokens.min()} to {tokens.max()}.")


class _Block(nn.Module):
    """Attention, then an MLP if the model has MLPs. The outputs of both are added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1, self.attn = _LayerNorm(config.embed_size), _Attention(config)
        if config.mlp_size:
            self.ln2, self.mlp = _LayerNorm(config.embed_size), _MLP(config)

    def forward(self, x: Tensor, positions: Tensor, future: Tensor) -> Float[Tensor, "B T C"]:
        """Return the residual stream after this block."""
        x = x + self.attn(self.ln1(x), positions, future)
        return x + self.mlp(self.ln2(x)) if hasattr(self, "mlp") else x


class _Attention(nn.Module):
    """Causal attention whose queries and keys read the input plus `positions`, and whose values read the input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = (config.num_heads, config.embed_size, config.heads_width // config.num_heads)
        for part in "QKV":
            setattr(self, f"W_{part}", nn.Parameter(torch.empty(size)))
            setattr(self, f"b_{part}", nn.Parameter(torch.empty(size[0], size[2])))
        self.W_O = nn.Parameter(torch.empty(size[0], size[2], size[1]))
        self.b_O = nn.Parameter(torch.empty(size[1]))

    def forward(self, x: Tensor, positions: Tensor, future: Tensor) -> Float[Tensor, "B T C"]:
        """Return the contribution of all heads to the residual stream."""
        inputs = {"Q": x + positions, "K": x + positions, "V": x}
        q, k, v = (
            torch.einsum("btc,hcd->bhtd", inputs[part], getattr(self, f"W_{part}"))
            + getattr(self, f"b_{part}")[:, None]
            for part in "QKV"
        )  # each B H T c
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # B H T T
        pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # B H T T
        return torch.einsum("bhtd,hdc->btc", pattern @ v, self.W_O) + self.b_O


class _MLP(nn.Module):
    """Perceptron with one hidden layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.W_in = nn.Parameter(torch.empty(config.embed_size, config.mlp_size))
        self.b_in = nn.Parameter(torch.empty(config.mlp_size))
        self.W_out = nn.Parameter(torch.empty(config.mlp_size, config.embed_size))
        self.b_out = nn.Parameter(torch.empty(config.embed_size))

    def forward(self, x: Tensor) -> Float[Tensor, "B T C"]:
        """Return the MLP's contribution to the residual stream."""
        return self.activation(x @ self.W_in + self.b_in) @ self.W_out + self.b_out


class _LayerNorm(nn.Module):
    """Layer norm over channels, with TransformerLens's names of gains and shifts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x to mean 0 and variance 1 over channels, then scale and shift it."""
        return F.layer_norm(x, x.shape[-1:], self.w, self.b)


def _table(**shapes: tuple[int, ...]) -> nn.ParameterDict:
    """Return uninitialised parameters of these shapes, keyed by name."""
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})


def initialise_language(model: LanguageModel, generator: torch.Generator) -> None:
    """Set every parameter in place, in the order of `named_parameters`.

    Matrices are drawn from N(0, 0.05^2). Biases are set to 0, and gains to 1.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf.startswith("W_"):
                parameter.normal_(0, INIT_STD, generator=generator)
            else:
                parameter.fill_(1.0 if leaf == "w" else 0.0)


def apply_language(config: ModelConfig, params: Params, tokens: Int64[Tensor, "*N B T"]) -> Float[Tensor, "N B T V"]:
    """Return the logits of every member for its rows.

    Args:
        config: The architecture.
        params: Stacked parameters, with the names of `LanguageModel`. Logits have the dtype of the parameters.
        tokens: Rows (N, B, T), or rows (B, T) that all members share.
    """
    return logits_of(params, last_residual(config, params, tokens))


def last_residual(config: ModelConfig, params: Params, tokens: Int64[Tensor, "*N B T"]) -> Float[Tensor, "N B T C"]:
    """Return the residual stream after the last block. To compute logits at a few positions, pass only these positions to `logits_of`."""
    *_, (x, _, _) = _stream(config, params, tokens)
    return x


def logits_of(params: Params, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T V"]:
    """Return the logits of a residual stream after the last block."""
    x = layer_norm(x, params["ln_final.w"], params["ln_final.b"])
    return affine(x, params["unembed.W_U"].mT, params["unembed.b_U"])


def attention_patterns(
    config: ModelConfig, params: Params, tokens: Int64[Tensor, "*N B T"], queries: Int64[Tensor, "*N B Q"]
) -> Float[Tensor, "N B L H Q T"]:
    """Return the attention weights of every head of every block, from the positions `queries` of each row to all positions."""
    layers = []
    for _, q, k in _stream(config, params, tokens):
        wanted = queries.expand(len(q), *queries.shape[-2:])[..., None].expand(-1, -1, -1, q.shape[-1])  # N B Q Hc
        chosen, keys = (
            part.unflatten(-1, (config.num_heads, -1)).transpose(2, 3) for part in (q.gather(2, wanted), k)
        )  # N B H . c
        scores = chosen @ keys.mT / math.sqrt(keys.shape[-1])  # N B H Q T
        is_later = torch.arange(k.shape[2], device=k.device) > queries[..., None]  # *N B Q T
        layers.append(scores.masked_fill(is_later.unsqueeze(-3), -math.inf).softmax(-1))
    return torch.stack(layers, dim=2)


def next_token_losses(
    config: ModelConfig, params: Params, inputs: Int64[Tensor, "*N B T"], targets: Int64[Tensor, "*N B T"]
) -> Float[Tensor, "N B T"]:
    """Return -log P(target) at every position, in nats, where P is the softmax of the logits after each input."""
    logits = apply_language(config, params, inputs)  # N B T V
    losses = F.cross_entropy(logits.flatten(0, 2), targets.expand(logits.shape[:3]).flatten(), reduction="none")
    return losses.unflatten(0, logits.shape[:3])


def rows_at_once(config: ModelConfig, params: Params, num_tokens: int, *, max_numbers: int = MAX_NUMBERS) -> int:
    """Return how many rows of each member are computed at once, at least 1.

    For each token, autograd saves at most 2 V numbers for the logits. In each block it saves at most 8 numbers per channel of the residual
    stream, 6 per channel of the heads and 4 per channel of the MLP. If attention is not fused, it also saves 2 T numbers per head for the
    attention weights. Outside the blocks it saves 4 numbers per channel. The number of rows depends only on settings, so a resumed run
    splits its batches in the same way.
    """
    width = 8 * config.embed_size + 6 * config.heads_width + 4 * config.mlp_size + 2 * config.num_heads * num_tokens
    vocab_size = params["unembed.b_U"].shape[-1]
    per_row = num_tokens * (2 * vocab_size + config.num_layers * width + 4 * config.embed_size)
    return max(1, max_numbers // (per_row * len(params["unembed.b_U"])))


def _stream(
    config: ModelConfig, params: Params, tokens: Int64[Tensor, "*N B T"]
) -> Iterator[tuple[Float[Tensor, "N B T C"], Float[Tensor, "N B T _"], Float[Tensor, "N B T _"]]]:
    """Yield, for every block, the residual stream after it, and the queries and keys of its heads."""
    table = params["embed.W_E"]
    tokens = tokens.expand(len(table), *tokens.shape[-2:])  # N B T
    positions = params["pos_embed.W_pos"][:, None, : tokens.shape[-1]]  # N 1 T C
    x = torch.stack([F.embedding(rows, member) for rows, member in zip(tokens, table, strict=True)])  # N B T C
    is_added = config.positions == "standard"
    x = x + positions if is_added else x
    for layer in range(config.num_layers):
        block = _block_params(params, f"blocks.{layer}.")
        normed = layer_norm(x, block["ln1.w"], block["ln1.b"])
        placed = normed if is_added else normed + positions
        q, k = (_head_parts(block, part, placed) for part in "QK")
        gathered = _attend(q, k, _head_parts(block, "V", normed), config.num_heads)  # N B T Hc
        x = x + affine(gathered, block["attn.W_O"].flatten(1, 2).mT, block["attn.b_O"])
        if config.mlp_size:
            hidden = affine(layer_norm(x, block["ln2.w"], block["ln2.b"]), block["mlp.W_in"].mT, block["mlp.b_in"])
            x = x + affine(ACTIVATIONS[config.activation](hidden), block["mlp.W_out"].mT, block["mlp.b_out"])
        yield x, q, k


def _block_params(params: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): tensor for name, tensor in params.items() if name.startswith(prefix)}


def _head_parts(block: Params, part: str, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T _"]:
    """Return the queries, keys or values of all heads, sorted by head."""
    weight = block[f"attn.W_{part}"].mT.flatten(1, 2)  # N Hc C
    return affine(x, weight, block[f"attn.b_{part}"].flatten(1))


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Float[Tensor, "N B T _"]:
    """Return the causal attention of all heads, by the kernel for short rows or by PyTorch's fused attention for long ones."""
    if q.shape[2] <= _MAX_TINY:
        return attention(q, k, v, num_heads=num_heads, stride=1)
    queries, keys, values = (part.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    return (
        F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        .transpose(1, 2)
        .flatten(2)
        .unflatten(0, q.shape[:2])
    )
