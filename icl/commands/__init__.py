"""The commands of `icl`: one module each, with `HELP` (a line for the overview) and `run(words) -> exit status`.

A command parses its words, calls one function of the library and says where its output is.
"""

import argparse


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example."""
    return argparse.ArgumentParser(
        prog=f"icl {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
