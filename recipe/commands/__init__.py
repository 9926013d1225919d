"""The commands of ``python -m recipe``, a module each; the core imports none of them."""
