"""The door for people: one parser, and a module for each command."""

from icl.cli.entry import COMMANDS, main

__all__ = ["COMMANDS", "main"]
