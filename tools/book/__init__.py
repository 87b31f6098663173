"""The web book: `python -m tools.book` makes it, `conf.py` has its settings."""
