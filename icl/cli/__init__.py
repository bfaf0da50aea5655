"""The command line of `icl`, with one module per command. The parser that all commands share is in `icl.command_line`."""

from icl.cli.entry import COMMANDS, main

__all__ = ["COMMANDS", "main"]
