"""Eight virtual CPU devices for every test, set before anything imports JAX."""

import os
from pathlib import Path

from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
NUM_DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = (
        f"{flags} --xla_force_host_platform_device_count={NUM_DEVICES}".strip()
    )
# Compiled programs outlive a run, however small: most of the suite's time is compiling.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# The shapes in signatures are checked where arrays are computed. Not in modules whose dataclasses
# cross jit: the same classes hold shapes and shardings in the arrays' places.
CHECKED = [f"model.{name}" for name in ("kernels", "linear", "mlp", "moe", "rope")]
install_import_hook(CHECKED, "beartype.beartype")

# No deadline: a shared machine's pauses are not failures.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
