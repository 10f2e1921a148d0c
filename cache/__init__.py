"""WHAT IS KEPT: the bookkeeping of cached pages, on the host, without JAX.

It does not hold keys and values (the runner's device arrays do) and takes no decision of
scheduling.
"""
