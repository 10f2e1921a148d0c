"""Pages that travel from the engine that computed them to the one that decodes. Host side, no JAX.

    sending = Sending(first, last, deliver, window)      the side that has them (sending.py)
    arrivals = Arrivals(keys, wake, on_taken, on_over)   the side that waits for them (arrivals.py)
    chunks_of(page, record), Assembler(form, keys, ...)  a page's record on a wire (chunks.py)

Both sides let go on their own: the sender when nothing was taken for a lease, the receiver when
nothing came for one. Whatever is lost, doubled, out of order or damaged on the way ends the
transfer, and what did not arrive is computed: a page is right or it is not there. They do not know
engines, wires, or how a page is made.
"""
