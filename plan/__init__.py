"""WHAT A MESH COSTS: experiments over models, meshes and batches, measured or compiled.

It does not know peers (`bench/`). Who reads experiments and writes reports imports no JAX: points
are measured in processes of their own (`plan/worker.py`).
"""
