"""The options of the command line that say where the services are and who is calling."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from splitsam.client.client import Client
from splitsam.client.connection import DEFAULT_DECODER, DEFAULT_ENCODER, TLS
from splitsam.client.spans import program_span

Encoders = Annotated[list[str], typer.Option("--encoder", help="Address of the encoder service; may be repeated.")]
Decoders = Annotated[list[str], typer.Option("--decoder", help="Address of the decoder service; may be repeated.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the bearer token to send.")]
UseTls = Annotated[bool, typer.Option("--tls", help="Use TLS; implied by the four options below.")]
Ca = Annotated[Path | None, typer.Option("--ca", help="Authorities to trust, PEM; default: the system's.")]
Cert = Annotated[Path | None, typer.Option("--cert", help="The caller's certificate, PEM, for mutual TLS.")]
Key = Annotated[Path | None, typer.Option("--key", help="The certificate's key, PEM.")]
ServerName = Annotated[
    str | None, typer.Option("--server-name", help="Name in the services' certificate, if not that of the address.")
]
TimeoutS = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Longest wait for one image or one prompt, in seconds.")
]


def open_client(
    encoder: Encoders = [DEFAULT_ENCODER],  # noqa: B006 (typer reads the default from here)
    decoder: Decoders = [DEFAULT_DECODER],  # noqa: B006 (likewise)
    token_file: TokenFile = None,
    tls: UseTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    server_name: ServerName = None,
    timeout: TimeoutS = 60.0,
) -> Client:
    """Open the client that the options describe."""
    use_tls = tls or any(option is not None for option in (ca, cert, key, server_name))
    return Client(
        encoder,
        decoder,
        token=token_file.read_text().strip() if token_file else None,
        tls=TLS(ca, cert, key, server_name) if use_tls else None,
        encode_timeout_s=timeout,
        predict_timeout_s=timeout,
    )


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `open_client`, and in their place its first argument: an open client."""
    connection = inspect.signature(open_client).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        of_client = {name: options.pop(name) for name in connection}
        with program_span(f"splitsam {command.__name__}"), open_client(**of_client) as client:
            command(client, **options)

    parameters = [*own, *connection.values()]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run
