"""Attention over pages: one signature, chosen by backend in one place.

It does not know layers or requests.
"""

from model.kernels.paged_attention import paged_attention as paged_attention
from model.kernels.paged_attention import write_pages as write_pages
