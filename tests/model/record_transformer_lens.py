"""Record the logits of TransformerLens for the models of `test_language.py`, so that the default tests have them as an oracle.

    python -m tests.model.record_transformer_lens

Needs `transformer-lens`, which the extra `lens` installs. The weights are those of `make_model`, so the file has only rows and logits.
"""

import json
import sys

import torch

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


def lens_logits(model, rows):
    """Return TransformerLens's logits for a model's weights, in float32."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = model.config
    theirs = HookedTransformer(
        HookedTransformerConfig(
            n_layers=config.num_layers,
            d_model=config.embed_size,
            n_heads=config.num_heads,
            d_head=config.heads_width // config.num_heads,
            d_mlp=config.mlp_size or None,
            act_fn=ACTIVATIONS[config.activation] if config.mlp_size else None,
            n_ctx=model.context_size,
            d_vocab=model.vocab_size,
            normalization_type="LN",
            attn_only=not config.mlp_size,
            positional_embedding_type=config.positions,
            dtype=torch.float32,
            device="cpu",
        )
    )
    names = dict(theirs.named_parameters())
    ours = {name: tensor.detach() for name, tensor in model.named_parameters()}
    if set(names) != set(ours):
        raise SystemExit(f"The names differ: {sorted(set(names) ^ set(ours))}.")
    missing = theirs.load_state_dict(ours, strict=False)
    if missing.unexpected_keys:
        raise SystemExit(f"TransformerLens does not know {missing.unexpected_keys}.")
    with torch.no_grad():
        return theirs(rows, return_type="logits")


def main():
    """Write the file of `test_language.py`."""
    import transformer_lens

    from tests.model.test_language import LENS, OPTIONS, make_config, make_model, make_rows

    cases = []
    for name, options in OPTIONS.items():
        model, rows = make_model(make_config(**options), dtype=torch.float32), make_rows()
        logits = lens_logits(model, rows)
        print(f"{name}: largest difference {float((model(rows) - logits).abs().max()):.2g}", file=sys.stderr)
        cases.append(
            {
                "name": name,
                "options": options,
                "rows": rows.tolist(),
                "logits": [[[float(f"{x:.9g}") for x in row] for row in part] for part in logits.tolist()],
            }
        )
    version = getattr(transformer_lens, "__version__", "")
    LENS.write_text(json.dumps({"transformer_lens": version, "torch": torch.__version__, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
