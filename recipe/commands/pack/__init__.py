"""TODO commands.pack."""

from recipe.commands.pack.command import main

__all__ = ["main"]
