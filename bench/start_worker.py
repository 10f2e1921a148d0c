"""One start of an engine, timed from its process's creation to its first token: `bench/start.py`.

    python -m bench.start_worker SPAWNED_S < CONFIG_JSON

The last line it prints is a Start in JSON; progress goes to stderr. It imports nothing before the
imports that it times, and does not know what was kept from which start.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

IMPORTS, CONFIGURE, DEVICES, OPEN, LOAD, ALLOCATE, COMPILE, TOKEN = STAGES = (
    "imports",
    "configuration, tokenizer",
    "devices",
    "opening the checkpoint",
    "loading weights",
    "allocating pages and slots",
    "programs",
    "first token",
)


@dataclass
class Start:
    """Where the time of a start went."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    platform: str = ""
    """JAX's, of the devices."""
    weight_bytes: int = 0
    """On the devices, all replicas together."""
    num_programs: int = 0
    num_kept: int = 0
    """Those of them that an earlier start compiled."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class Stopwatch:
    """Gives each stage the time since the one before it ended."""

    def __init__(self, since_s: float) -> None:
        self.start = Start()
        self._since_s = since_s

    def ended(self, stage: str) -> None:
        now_s = time.monotonic()
        self.start.seconds[stage] += now_s - self._since_s
        self._since_s = now_s

    def reporter(self) -> Any:
        """A Progress that tells when loading and compiling, of each replica, begin and end."""
        from serve.progress import Progress

        watch = self

        class Watched(Progress):
            def __enter__(self) -> "Watched":
                watch.ended(OPEN if self.unit == "B" else ALLOCATE)
                return super().__enter__()

            def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
                super().__exit__(kind, *rest)
                if self.unit == "B":
                    watch.ended(LOAD)
                    watch.start.weight_bytes += self.done
                else:
                    watch.ended(COMPILE)
                    watch.start.num_programs += self.done
                    watch.start.num_kept += self.kept

        return Watched


def run(watch: Stopwatch, values: dict[str, Any]) -> Start:
    """Does what `weft serve` does until it listens, then generates one token."""
    from pathlib import Path

    import jax

    import serve.commands.serve  # noqa: F401  (for its time)
    from bench.outputs import outputs_of
    from serve.build import build_engine
    from serve.commands.devices import ensure_devices, keep_compiled_programs
    from serve.commands.text import load_text
    from serve.config import make_config
    from serve.request import GenerateRequest, SamplingParams

    watch.ended(IMPORTS)
    config = make_config(values, "weft bench start")
    load_text(Path(config.model.path))
    watch.ended(CONFIGURE)
    ensure_devices(config.mesh)
    keep_compiled_programs()
    watch.start.platform = jax.devices()[0].platform
    watch.ended(DEVICES)
    engine = build_engine(config, watch.reporter())
    watch.ended(ALLOCATE)
    engine.start()
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for _ in outputs_of(engine, [GenerateRequest("first", (0,), sampling)]):
        pass
    watch.ended(TOKEN)
    engine.stop()
    return watch.start


if __name__ == "__main__":
    print(json.dumps(asdict(run(Stopwatch(float(sys.argv[1])), json.load(sys.stdin)))))
