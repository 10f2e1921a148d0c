"""What each command of `weft` does, one module for each; `serve/cli.py` has their flags."""
