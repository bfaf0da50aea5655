"""`icl predict`: use a trained model to predict the targets of the queries in a file."""

from pathlib import Path

from icl.cli.outputs import require_output_table
from icl.command_line import CommandParser
from icl.config.validation import ConfigError
from icl.config.values import whole_number
from icl.runs.folder import require_place

HELP = "predict the targets of queries in a file"


def run(words: list[str]) -> int:
    """Predict the targets of the queries, and print the predictions. With --out, also write them to a file."""
    parser = CommandParser(
        "predict",
        "Predict y for queries, given a context of examples. FILE is JSON with x_context, y_context and x_query, or CSV with the\n"
        "columns x1, ..., xD, y. In a CSV file, a row with an empty y is a query.\n"
        "For a language model, FILE is text (.txt) or JSON with tokens, and the most likely next tokens are printed.",
        """icl predict runs/quickstart --prompt prompt.json
        icl predict hf://USER/REPO --step 1465 --prompt prompt.json""",
    )
    parser.add(
        "path CHECKPOINT",
        "a checkpoint file, the folder or name of a run, or an address in a store, such as hf://USER/REPO or hf://USER/REPO@REVISION",
    )
    parser.add("--step N", "the step to load from a run (default: the last saved step)", type=whole_number(0, 10**15))
    parser.add("--prompt FILE", "file with the context and the queries", type=Path, required=True)
    parser.add("--out FILE", "also write the predictions to FILE (.csv or .json)", type=Path)
    options = parser.parse_args(words)
    from icl.api import load_checkpoint
    from icl.evaluation.next_tokens import is_tokens, predict_next, write_next
    from icl.evaluation.prediction import predict_from_prompt, read_prompt_file, write_predictions
    from icl.model.language import LanguageModel

    is_stored = "://" in options.path
    if options.out is not None:
        require_output_table(options.out, options.prompt, None if is_stored else options.path)
    prompt = None if is_tokens(options.prompt) else read_prompt_file(options.prompt)
    model, info = load_checkpoint(options.path if is_stored else require_place(options.path), step=options.step)
    if isinstance(model, LanguageModel):
        print(f"{info['path']} (step {info['step']:,})")
        ahead = predict_next(model, info["config"], options.prompt)
        for token, chance, text in ahead:
            print(f"  {token:6d}  {chance:.4f}  {'' if text is None else repr(text)}".rstrip())
        if options.out is not None:
            print(f"Predictions  {write_next(options.out, ahead)}")
        return 0
    if prompt is None:
        raise ConfigError(
            f"{options.prompt} has text or tokens, but {info['path']} is a regression model. "
            "Give a file with x_context, y_context and x_query."
        )
    predictions = predict_from_prompt(model, *prompt)
    print(f"{info['path']} (step {info['step']:,}), {len(prompt.x_context)} context examples")
    for query, prediction in zip(prompt.x_query.tolist(), predictions.tolist(), strict=True):
        print(f"  x = ({', '.join(f'{x:g}' for x in query)})  ->  y = {prediction:.6g}")
    if options.out is not None:
        print(f"Predictions  {write_predictions(options.out, prompt, predictions)}")
    return 0
