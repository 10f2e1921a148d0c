"""Generated from proto/weft/v1 by `python -m tools.generate_proto`; not edited by hand."""
