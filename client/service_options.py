"""The options of `splitsam up` and `splitsam demo` that are handed on to the services."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class ServiceOptions:
    """Arguments for each service's own command line, which checks them."""

    encoder_args: tuple[str, ...]
    decoder_args: tuple[str, ...]


def collect(
    model: Annotated[str | None, typer.Option(help="vit_t, vit_b, vit_l or vit_h; read from the weights.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights: path or URL; default: the shipped vit_t.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the weights must have.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for downloaded weights.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the image encoder: fp32 (default), bf16, fp8, int8, int8_sparse, seed or auto."),
    ] = None,
    encoder_arg: Annotated[
        list[str], typer.Option("--encoder-arg", help="Another argument of serve-encoder, e.g. --batch-sizes=1,4.")
    ] = [],  # noqa: B006 (typer reads the default from here)
    decoder_arg: Annotated[list[str], typer.Option("--decoder-arg", help="Another argument of serve-decoder.")] = [],  # noqa: B006
) -> ServiceOptions:
    """Sort options into the arguments of each service."""
    shared = {
        "--model": model,
        "--checkpoint": checkpoint,
        "--sha256": sha256,
        "--cache-dir": cache_dir,
        "--device": device,
    }
    common = tuple(str(word) for flag, value in shared.items() if value is not None for word in (flag, value))
    of_encoder = ("--precision", precision) if precision is not None else ()
    return ServiceOptions((*common, *of_encoder, *encoder_arg), (*common, *decoder_arg))


def service_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `collect`, and in their place its first argument: the `ServiceOptions`."""
    handed_on = inspect.signature(collect).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        command(collect(**{name: options.pop(name) for name in handed_on}), **options)

    parameters = [*own, *handed_on.values()]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run
