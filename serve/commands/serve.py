"""`weft serve`: an endpoint from its configuration to its last answer."""

import asyncio
import gc
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

from serve.api.contexts_service import ContextsService
from serve.api.grpc_server import GrpcServer, run_until_signalled
from serve.api.http_server import HttpServer
from serve.api.transfer_service import TransferService
from serve.build import build_contexts, build_engine
from serve.commands.devices import ensure_devices, keep_compiled_programs
from serve.commands.text import load_text
from serve.config import ServeConfig
from serve.contexts import ContextCache
from serve.engine import Engine
from serve.front import Front
from serve.progress import Progress
from serve.replicas import Replicas
from serve.trace import traced

SWITCH_INTERVAL_S = 0.0002
"""How long a thread of Python may keep the others waiting: Python's 5 ms are longer than a step of
a GPU, and the engine's thread waits for its turn several times in each."""


def run(config: ServeConfig, profile: Path | None = None) -> None:
    """Returns when a signal has ended it and what ran is finished.

    With `profile`, a directory, it leaves traces there and prints where steps' time went.
    """
    if profile is not None:
        # What can't be is told before the minutes that a large model takes to load.
        profile.mkdir(parents=True, exist_ok=True)
    _check_free("listen.grpc", config.listen.grpc)
    if config.listen.http:
        _check_free("listen.http", config.listen.http)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    text = load_text(Path(config.model.path))
    ensure_devices(config.mesh, config.split.prefill_mesh(config.mesh))
    keep_compiled_programs()
    engine = build_engine(config, Progress)
    # What is there now stays: a collection that went through it all would stop every step for long,
    # half a second on two cores.
    gc.collect()
    gc.freeze()
    registry = build_contexts(config, engine.info)
    front = Front(engine, text.tokenizer, text.chat_template, registry)
    contexts = ContextCache(front, engine, registry) if registry is not None else None
    with traced(engine.profiles, profile) if profile else nullcontext():
        engine.start()
        try:
            asyncio.run(_serve(front, engine, contexts, config))
        finally:
            engine.stop()


async def _serve(
    front: Front,
    engine: Engine | Replicas,
    contexts: ContextCache | None,
    config: ServeConfig,
) -> None:
    listen = config.listen
    services = [ContextsService.of(contexts)] if contexts else []
    if engine.page_form is not None:
        host = listen.grpc.rpartition(":")[0] if config.split.carrier == "jax" else ""
        services = [TransferService.of(engine, engine.page_form, host)]
    server = GrpcServer(front, listen.grpc, services)
    await server.start()
    try:
        metrics = HttpServer(engine, listen.http, front.contexts) if listen.http else nullcontext()
        async with contexts.expiring() if contexts else nullcontext():
            with metrics as http:
                addresses = _at(listen.grpc, server.port), http and _at(listen.http, http.port)
                print(_greeting(front, engine.page_form is not None, *addresses), flush=True)
                await run_until_signalled(server, listen.grace_s)
    finally:
        await server.stop()


def _at(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"


def _greeting(front: Front, prefills_only: bool, grpc: str, http: str | None) -> str:
    """Says that the endpoint is ready, and a command that shows it."""
    metrics = f", metrics on http://{http}/metrics" if http else ""
    if prefills_only:
        return f"weft: {front.engine.info.name} is prefilled for others on {grpc} (gRPC){metrics}"
    prompt, shown = ("'import '", "c.text") if front.tokenizer else ("[1]", "c.token_ids")
    code = (
        f"from serve.client import Client; [print({shown}, end='', flush=True) "
        f"for c in Client('{grpc}').generate({prompt}, max_tokens=64)]"
    )
    return (
        f"weft: {front.engine.info.name} is served on {grpc} (gRPC){metrics}; try\n"
        f'{sys.executable} -c "{code}"'
    )


def _check_free(key: str, address: str) -> None:
    """A taken port is told before the minutes that a large model takes to load."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        raise OSError(
            f"cannot listen on {address}: {error.strerror}; choose with --set {key}=HOST:PORT"
        ) from None
