"""Writes serve/pb, the Python code of proto/weft/v1: `python -m tools.generate_proto`.

It does not know what the messages mean; the generated files are committed, and a test compares.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto" / "weft" / "v1"
PACKAGE = "serve/pb"


def generate(out: Path) -> None:
    """Writes the generated files under `out`/serve/pb."""
    (out / PACKAGE).mkdir(parents=True, exist_ok=True)
    protos = sorted(SOURCES.glob("*.proto"))
    status = protoc.main(
        [
            "protoc",
            # Seen by protoc as serve/pb/*.proto, so that the generated code imports from serve.pb.
            f"--proto_path={PACKAGE}={SOURCES}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *(f"{PACKAGE}/{proto.name}" for proto in protos),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status}; its message is above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
