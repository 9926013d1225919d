"""``python -m recipe pack``: an image folder in a few large files."""

from recipe.commands.pack.command import main

__all__ = ["main"]
