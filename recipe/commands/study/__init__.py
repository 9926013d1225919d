"""``python -m recipe study``: cases of a config, trained with several seeds and compared."""

from recipe.commands.study.command import main

__all__ = ["main"]
