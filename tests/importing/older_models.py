"""Plain transcriptions of the architectures of older code bases, with the names of their parameters, for tests.

The layouts are facts of the public code: ic_regression.py, timaeus-research/icl (`DTransformer`) and mansheej/icl-task-diversity.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import nn


def tokens_of(xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Return all 2K tokens: (0, x) and (y, 0)."""
    tokens = torch.zeros(len(xs), 2 * xs.shape[1], xs.shape[2] + 1)
    tokens[:, 0::2, 1:] = xs
    tokens[:, 1::2, 0] = ys
    return tokens


@dataclasses.dataclass
class ICRegConfig:
    """The settings that the older code pickles."""

    D: int = 3
    K: int = 5
    sigma2: float = 0.125
    d_model: int = 16
    d_mlp: int = 24
    n_heads: int = 4
    n_layers: int = 2
    use_prenorm: bool = True
    M: int | str = 6
    max_M: int = 100  # noqa: N815
    device: str = "cpu"


class _ICRBlock(nn.Module):
    def __init__(self, cfg: ICRegConfig) -> None:
        super().__init__()
        self.pre = cfg.use_prenorm
        self.ln1, self.ln2 = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self.attn = nn.MultiheadAttention(cfg.d_model, cfg.n_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(cfg.d_model, cfg.d_mlp), nn.GELU(), nn.Linear(cfg.d_mlp, cfg.d_model))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.ln1(x) if self.pre else x
        x = x + self.attn(h, h, h, attn_mask=mask)[0]
        if self.pre:
            return x + self.mlp(self.ln2(x))
        x = self.ln1(x)
        return self.ln2(x + self.mlp(x))


class ICRModel(nn.Module):
    """The model of ic_regression.py."""

    def __init__(self, cfg: ICRegConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(cfg.D + 1, cfg.d_model)
        self.pos_emb = nn.Parameter(torch.randn(1, 2 * cfg.K, cfg.d_model))
        self.blocks = nn.ModuleList(_ICRBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(cfg.d_model)
        self.output_proj = nn.Linear(cfg.d_model, cfg.D + 1)
        self.register_buffer("attn_mask", torch.ones(2 * cfg.K, 2 * cfg.K, dtype=torch.bool).triu(1))

    def forward(self, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        """Predict every y."""
        x = self.input_proj(tokens_of(xs, ys)) + self.pos_emb
        for block in self.blocks:
            x = block(x, self.attn_mask)
        return self.output_proj(self.ln_f(x))[:, 0::2, 0]


class _TimaeusAttention(nn.Module):
    def __init__(self, width: int, heads: int, max_tokens: int, has_output: bool) -> None:
        super().__init__()
        self.heads, self.attention = heads, nn.Linear(width, 3 * width, bias=False)
        self.register_buffer("causal_mask", torch.ones(max_tokens, max_tokens).tril().log())
        self.include_output = has_output
        if has_output:
            self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        parts = self.attention(x).view(batch, length, self.heads, 3 * size)
        results = []
        for head in range(self.heads):
            q, k, v = (parts[:, :, head, i * size : (i + 1) * size] for i in range(3))
            scores = q @ k.transpose(1, 2) / math.sqrt(size) + self.causal_mask[:length, :length]
            results.append(scores.softmax(-1) @ v)
        joined = torch.cat(results, dim=-1)
        return self.output(joined) if self.include_output else joined


class _TimaeusBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, max_tokens: int, has_norm: bool, has_output: bool) -> None:
        super().__init__()
        self.attention = _TimaeusAttention(width, heads, max_tokens, has_output)
        self.compute = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) if has_norm else nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.layer_norms[0](x))
        return x + self.compute(self.layer_norms[1](x))


class _TimaeusTransformer(nn.Module):
    def __init__(self, size: int, tokens: int, width: int, hidden: int, heads: int, layers: int, norm: bool, out: bool):
        super().__init__()
        self.token_embedding = nn.Linear(size, width, bias=False)
        self.postn_embedding = nn.Linear(tokens, width, bias=False)
        self.blocks = nn.ModuleList(_TimaeusBlock(width, hidden, heads, tokens, norm, out) for _ in range(layers))
        last = nn.Linear(width, size)
        self.unembedding = nn.Sequential(nn.LayerNorm(width), last) if norm else last

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens) + self.postn_embedding.weight.T[: tokens.shape[1]]
        for block in self.blocks:
            x = x + block(x)  # the doubled residual
        return self.unembedding(x)


class TimaeusModel(nn.Module):
    """The regression transformer of timaeus-research/icl."""

    def __init__(self, *, D: int = 3, K: int = 5, norm: bool = True, output: bool = True, heads: int = 4) -> None:
        super().__init__()
        self.token_sequence_transformer = _TimaeusTransformer(D + 1, 2 * K, 16, 24, heads, 2, norm, output)

    def forward(self, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        """Predict every y."""
        return self.token_sequence_transformer(tokens_of(xs, ys))[:, 0::2, 0]


def perturb(model: nn.Module) -> nn.Module:
    """Move every parameter, so that no bias or norm has its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts(D: int = 3, K: int = 5, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random prompts."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, K, D, generator=generator), torch.randn(count, K, generator=generator)


def flax_params(*, D: int, K: int, width: int, layers: int, seed: int = 0) -> dict:
    """Return the parameters of the GPT-2 of icl-task-diversity by their Flax names, as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def array(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    def dense(rows: int, columns: int) -> dict:
        return {"kernel": array(rows, columns), "bias": array(columns)}

    def norm() -> dict:
        return {"scale": array(width, mean=1.0), "bias": array(width)}

    blocks = {
        f"hs_{layer}": {
            "ln_1": norm(),
            "attn": {"c_attn": dense(width, 3 * width), "c_proj": dense(width, width)},
            "ln_2": norm(),
            "mlp": {"c_fc": dense(width, 4 * width), "c_proj": dense(4 * width, width)},
        }
        for layer in range(layers)
    }
    inner = {"wpe": {"embedding": array(2 * K, width)}, **blocks, "ln_f": norm()}
    return {"_in": {"kernel": array(D + 1, width)}, "_h": inner, "_out": {"kernel": array(width, 1)}}


def flax_predict(params: dict, xs: np.ndarray, ys: np.ndarray, *, heads: int) -> np.ndarray:
    """Return the predictions of the same GPT-2, in NumPy and float64, with its masks and norms written out."""

    def dense(x: np.ndarray, part: dict) -> np.ndarray:
        return x @ part["kernel"].astype(np.float64) + part.get("bias", 0)

    def norm(x: np.ndarray, part: dict) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * part["scale"] + part["bias"]

    def attention(x: np.ndarray, part: dict) -> np.ndarray:
        batch, length, width = x.shape
        q, k, v = np.split(dense(x, part["c_attn"]), 3, axis=2)
        q, k, v = (each.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3) for each in (q, k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // heads)
        scores = np.where(np.tril(np.ones((length, length))).astype(bool), scores, np.finfo(np.float32).min)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        return dense((pattern @ v).transpose(0, 2, 1, 3).reshape(batch, length, width), part["c_proj"])

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    inner = params["_h"]
    tokens = tokens_of(torch.from_numpy(xs), torch.from_numpy(ys)).double().numpy()
    x = dense(tokens, params["_in"]) + inner["wpe"]["embedding"]
    for layer in range(sum(name.startswith("hs_") for name in inner)):
        block = inner[f"hs_{layer}"]
        x = x + attention(norm(x, block["ln_1"]), block["attn"])
        x = x + dense(gelu(dense(norm(x, block["ln_2"]), block["mlp"]["c_fc"])), block["mlp"]["c_proj"])
    return dense(norm(x, inner["ln_f"]), params["_out"])[:, ::2, 0]
