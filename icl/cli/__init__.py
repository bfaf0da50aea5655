"""The door for people: a module for each command; `icl.command_line` has their parser."""

from icl.cli.entry import COMMANDS, main

__all__ = ["COMMANDS", "main"]
