"""What measures Weft, other engines beside it.

Imports nothing: a peer's worker runs it on that peer's own Python, without Weft's packages.
"""
