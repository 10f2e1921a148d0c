"""Pages below the device: host memory, a local disk, object storage. Host side, without JAX.

An image is a page's content: bytes, as many for each page of a model. Made once:

    form = RecordFormat(fingerprint, image_bytes)                         # record.py
    disk = StoreTier("disk", open_store("file:///folder"), form, bytes)   # store.py, folder.py
    tiers = TierStack(HostTier(bytes, image_bytes), [disk])               # stack.py, host.py
    tiers.start()

The engine's thread may call all of it under its lock, since nothing waits for a store:

    tiers.find(keys, first)        the tier of each page, up to the first that none has
    tiers.fetch(keys, recompute_s, wake)
                                   a Fetch of what is faster to fetch than to compute, or None;
                                   its `done`, `take` and `cancel` are the caller's
    tiers.store(key, image)        keeps a page that left the device, or was computed
    tiers.use(keys)                says that a sequence's pages were used, be it on the device
    tiers.lacks(key)               whether the page is to be given to `store`
    tiers.pin(tier, keys)          keeps pages, here or yet to come; `unpin` undoes it
    tiers.worth.observe_prefill(cost, seconds), tiers.worth.recompute_s(costs)
                                   what computing takes, in the engine's units
    tiers.reports()                what is held, counted and decided, by tier
    tiers.clear(), tiers.await_cleared(timeout_s), tiers.close(grace_s)

A tier that fails answers with misses: no exception of a store reaches the caller. What is wrong
with the arguments does: ValueError, and PinsExceedBudget (cache/pins.py). It does not know
requests, device pages, or how an image is made.
"""
