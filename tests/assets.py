"""Where the test data is: beside the checkout, or where WEFT_ASSETS says."""

import os
from pathlib import Path

import pytest

ASSETS = Path(
    os.environ.get("WEFT_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)

needs_assets = pytest.mark.skipif(
    not ASSETS.is_dir(), reason=f"no test assets at {ASSETS}; set WEFT_ASSETS to their directory"
)
