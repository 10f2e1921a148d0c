"""WHAT A MESH COSTS: experiments over models, meshes and batches, measured or compiled.

It knows of peers (`bench/`) the commands that start them, no more. Who reads experiments and writes
reports imports no JAX: points are measured in processes of their own (`plan/worker.py`).
"""
