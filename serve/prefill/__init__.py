"""Prompts computed elsewhere: on other devices of this process (local.py), or by other processes
(remote.py). The scheduler asks through `serve.prefixes.Prefiller`.

What comes are the prompt's full pages; the rest of the prompt, a page at most, is computed here,
with the first token. So sampling knows nothing of it, and tokens are those of one engine.
"""
