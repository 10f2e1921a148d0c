"""WHERE things are computed: mesh, table of sharding rules, collectives, pipeline ring.

It does not know what is computed; `model/` stands on it.
"""
