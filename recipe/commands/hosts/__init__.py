"""TODO commands.hosts."""

from recipe.commands.hosts.command import main

__all__ = ["main"]
