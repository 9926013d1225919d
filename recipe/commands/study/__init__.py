"""TODO commands.study."""

from recipe.commands.study.command import main

__all__ = ["main"]
