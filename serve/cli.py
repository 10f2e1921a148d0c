"""The command line: `weft --help`.

It knows what can be asked and nothing of how it is done: a command's module, and JAX with it, is
imported when the command runs.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="weft",
    help="Serves large language models from a JAX mesh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(
    help="Measure; beside peers where they are installed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Format(StrEnum):
    ORBAX = "orbax"
    HF = "hf"


class Quantization(StrEnum):
    INT8 = "int8"
    FP8 = "fp8"


Model = Annotated[Path, typer.Argument(help="A converted or Hugging Face directory.")]
Mesh = Annotated[str, typer.Option(help="Such as stage=2,tensor=2; one device unless told.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as mesh.tensor=2."),
]
ProfileTo = Annotated[
    Path | None,
    typer.Option(metavar="DIR", file_okay=False, help="Trace steps, and show their times."),
]


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as configs/serve/demo.toml.")],
    overrides: Overrides = None,
    profile: ProfileTo = None,
) -> None:
    """Start an endpoint; SIGTERM or Ctrl-C finishes what runs and stops it."""
    from serve.config import load_config

    loaded = load_config(config, overrides or [])
    from serve.commands import serve as command

    command.run(loaded, profile)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='JSON lines, each {"prompt": "..."} or {"prompt_ids": [...]}.',
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer at most.")] = 128,
    min_tokens: Annotated[int, typer.Option(help="Tokens before an end is allowed.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = Dtype.AUTO,
    mesh: Mesh = "",
    profile: ProfileTo = None,
    json: Json = False,
) -> None:
    """Generate offline, all prompts batched; results on stdout, in order."""
    if (prompt is None) == (prompts_file is None):
        raise typer.BadParameter("give either --prompt or --prompts-file")

    from serve.commands import generate as command
    from serve.request import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    prompts = command.read_prompts(prompts_file) if prompts_file is not None else [prompt or ""]
    command.run(model, prompts, sampling, dtype=dtype, mesh=mesh, as_json=json, profile=profile)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint's directory.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A directory to be made.")],
    dtype: Annotated[Dtype, typer.Option(help="auto keeps the checkpoint's.")] = Dtype.AUTO,
    quantize: Annotated[
        Quantization | None, typer.Option(help="Weights of products in 8 bits.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Round for what the model computes (GPTQ): better, and slower."
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Calibrate on this text, not on what the model writes itself.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="To calibrate on; 16,384 unless told.")
    ] = None,
    to: Annotated[Format, typer.Option(help="Orbax to serve from, hf for others.")] = Format.ORBAX,
) -> None:
    """Convert a checkpoint, verified, and all or nothing."""
    if calibrate and quantize is None:
        raise typer.BadParameter("--calibrate is of a quantization; give --quantize int8 or fp8")
    if text is not None and not calibrate:
        raise typer.BadParameter("--text is to calibrate on; give --calibrate, too")
    if tokens is not None and not calibrate:
        raise typer.BadParameter("--tokens are to calibrate on; give --calibrate, too")

    from serve.commands import convert as command

    to_dtype = None if dtype is Dtype.AUTO else dtype.value
    command.run(
        source,
        destination,
        to_dtype,
        quantize.value if quantize else None,
        command.Calibration(tokens or command.NUM_TOKENS, text) if calibrate else None,
        to.value,
    )


@bench.command()
def offline(
    model: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint; a random one of 125M parameters unless told."),
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="An engine to time beside ours; repeatable.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Figures are medians of as many.")] = 3,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = Dtype.FLOAT32,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here, too.")] = None,
    json: Json = False,
) -> None:
    """Time generation without the wire, on the same prompts as the peers."""
    from serve.commands import bench as command

    command.offline(model, peer or [], runs, dtype=dtype.value, out=out, as_json=json)


@bench.command()
def quality(
    model: Model,
    other: Annotated[
        Path | None, typer.Option(help="Its other form, such as a quantized conversion.")
    ] = None,
    overrides: Overrides = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text to score; the model's own, if none."),
    ] = None,
    positions: Annotated[int, typer.Option(min=1, help="Tokens to score.")] = 1_000,
    json: Json = False,
) -> None:
    """Compare two forms of a model on the same tokens: --set is how the other is served."""
    from bench.quality import run

    found = run(model, other, overrides or [], text, positions)
    print(found.to_json() if json else found.to_markdown())


@bench.command()
def start(
    model: Model,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts after the first.")] = 3,
    json: Json = False,
) -> None:
    """Time a first start and those after it, and say on what the time goes."""
    from bench.start import run

    report = run(model, overrides or [], repeats)
    print(report.to_json() if json else report.to_markdown())


@bench.command()
def long(
    model: Annotated[
        Path | None, typer.Argument(help="A checkpoint; a small random one unless told.")
    ] = None,
    overrides: Overrides = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the long prompt.")] = 200_000,
    streams: Annotated[int, typer.Option(min=1, help="Others, that decode meanwhile.")] = 15,
    json: Json = False,
) -> None:
    """Compute a long prompt beside others' streams, and say what they notice."""
    from bench.long import Load, run

    load = Load(num_prompt=prompt, num_streams=streams)
    report = run(model, overrides or [], load, tell=lambda line: print(line, file=sys.stderr))
    print(report.to_json() if json else report.to_markdown())


@bench.command()
def cache(
    model: Annotated[
        Path | None, typer.Argument(help="A checkpoint; a random one of 125M unless told.")
    ] = None,
    overrides: Overrides = None,
    turns: Annotated[int, typer.Option(min=1, help="Of a conversation.")] = 20,
    cached: Annotated[int, typer.Option(min=1, help="Tokens of a long prefix.")] = 4096,
    runs: Annotated[int, typer.Option(min=1, help="Figures are medians of as many.")] = 5,
    json: Json = False,
) -> None:
    """Time first tokens of a conversation and after a long prefix, cached and not."""
    from bench.cache import Load, run

    load = Load(num_turns=turns, num_cached=cached, runs=runs)
    report = run(model, overrides or [], load, tell=lambda line: print(line, file=sys.stderr))
    print(report.to_json() if json else report.to_markdown())


@bench.command()
def split(
    model: Annotated[Path | None, typer.Argument(help="models/demo unless told.")] = None,
    overrides: Overrides = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a long prompt.")] = 768,
    prompts: Annotated[int, typer.Option(min=1, help="Long prompts of a round.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Others, that decode meanwhile.")] = 4,
    spacing: Annotated[
        float, typer.Option(min=0.1, help="Between long prompts, in times of what one takes alone.")
    ] = 4.0,
    rounds: Annotated[int, typer.Option(min=0, help="Figures are medians of as many.")] = 5,
    soak: Annotated[int, typer.Option(min=0, help="Requests with cancels and kills.")] = 1000,
    json: Json = False,
) -> None:
    """Compute prompts apart from where they are decoded, and compare with one engine.

    Exits 1 if a request was lost, or anything left behind.
    """
    from bench.split import run
    from bench.split_load import Load
    from bench.split_soak import Soak

    report = run(
        model,
        overrides or [],
        Load(num_prompt=prompt, num_prompts=prompts, num_streams=streams, spacing=spacing),
        rounds,
        Soak(num_requests=soak),
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report.to_json() if json else report.to_markdown())
    raise typer.Exit(0 if report.is_clean else 1)


@app.command()
def mesh(
    path: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="A TOML file, or several.")],
    out: Annotated[Path, typer.Option(help="Where each experiment gets a folder.")] = Path(
        ".cache/mesh"
    ),
    only: Annotated[str, typer.Option(help="Just points with this in their name.")] = "",
    limit_s: Annotated[
        float, typer.Option(min=0, help="Stop after as long; the next run goes on.")
    ] = float("inf"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report what was measured, at any commit.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure or compile a matrix of models and meshes; goes on where it was cut.

    Exits 1 if a point failed or was not reached.
    """
    from serve.commands import mesh as command

    if report_only:
        command.report(path, out, as_json=json)
    elif not command.measure(path, out, only, limit_s, fresh, as_json=json):
        raise typer.Exit(1)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="Check that this file's mesh fits.")] = None,
    fit: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Say whether this fits, and what would, in bytes."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --fit: of configs/hardware, there or not."),
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Show devices, versions and memory, what is wrong, and what to do. Exits 1 if something is."""
    if fit is not None:
        from serve.commands.fit import run

        is_well = run(fit, overrides or [], hardware, as_json=json)
    elif hardware is not None:
        raise typer.BadParameter("--hardware goes with --fit CONFIG")
    else:
        from serve.commands import doctor as command

        is_well = command.run(config, overrides or [], as_json=json)
    if not is_well:
        raise typer.Exit(1)


def main() -> None:
    """The console script. A user's mistake ends in one line, ours in a traceback."""
    try:
        app()
    except Exception as error:
        from serve.commands.refusals import REFUSED, USAGE

        if not isinstance(error, REFUSED):
            raise
        print(f"weft: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, USAGE) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
