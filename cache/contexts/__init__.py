"""Contexts: prompts that a tenant names and keeps for a time. Host side, without JAX.

    contexts = Contexts(ContextLimits(max_tokens), page_size, directory, fingerprint)  # registry.py

    contexts.create(tenant, token_ids, ttl_s=600.0)         a Context (context.py), with its name
    contexts.get(tenant, name)
    contexts.list(tenant, limit, page_token)
    contexts.update(tenant, name, token_ids, ttl_s=600.0)   what it was, and what it is now
    contexts.delete(tenant, name)                           what it was
    contexts.let_go(context)                                whether it was still there
    contexts.expire()                                       those whose time is over, each once
    contexts.all()                                          also those that a restart found again
    contexts.skipped                                        files that were not read, by reason

What is wrong raises a ContextError (context.py). A file has a context's token ids, not its keys and
values: to keep its pages, and to compute those that are lost, is the caller's.
"""
