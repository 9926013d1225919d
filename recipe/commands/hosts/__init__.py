"""``python -m recipe hosts``: whether a launch on a hostfile's hosts would work."""

from recipe.commands.hosts.command import main

__all__ = ["main"]
