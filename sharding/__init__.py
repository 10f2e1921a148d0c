"""WHERE things are computed: the mesh, the one table of sharding rules, collectives, the pipeline's ring.

It does not know what is computed; `model/` stands on it.
"""
