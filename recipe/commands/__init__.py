"""The commands of ``python -m recipe``, each a module or a room of its own. Nothing else imports them."""
