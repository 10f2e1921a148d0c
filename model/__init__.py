"""What is computed: configuration, decoder, sampling, text and checkpoints of a language model.

It does not know who is served when; it sees one device's shard of a batch and of the weights.

One alphabet of axes, used as suffixes of array names throughout (`q_BTHC`):

B  rows of a batch        T  new tokens of a row      S  cached tokens of a row
N  new tokens of a step   D  model width              F  feed-forward width
H  query heads            K  kv heads                 G  query heads per kv head
C  channels of a head     V  vocabulary               E  experts
U  channels of a value    P  pages                    W  page-table width
R  rows of a step: decode rows, then prefill rows
"""
