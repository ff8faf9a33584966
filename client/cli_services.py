"""Commands that run the services, and what they serve."""

import importlib
from pathlib import Path
from typing import Annotated

import typer

from splitsam.client.service_options import ServiceOptions, service_options

commands = typer.Typer()
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@commands.command("serve-encoder", context_settings=_PASS_THROUGH, add_help_option=False)
def serve_encoder(context: typer.Context) -> None:
    """Run the encoder service; `serve-encoder --help` lists its settings."""
    raise typer.Exit(importlib.import_module("splitsam.encoder_service.__main__").main(context.args))


@commands.command("serve-decoder", context_settings=_PASS_THROUGH, add_help_option=False)
def serve_decoder(context: typer.Context) -> None:
    """Run the decoder service; `serve-decoder --help` lists its settings."""
    raise typer.Exit(importlib.import_module("splitsam.decoder_service.__main__").main(context.args))


@commands.command("gateway", context_settings=_PASS_THROUGH, add_help_option=False)
def gateway(context: typer.Context) -> None:
    """Run the HTTP gateway for tools and browsers; `gateway --help` lists its settings."""
    try:
        program = importlib.import_module("splitsam.gateway.__main__")
    except ModuleNotFoundError as error:
        raise ValueError(f"the gateway needs {error.name}: install splitsam[gateway]") from error
    raise typer.Exit(program.main(context.args))


@commands.command()
def optimize(
    precision: Annotated[str, typer.Option(help="bf16, int8, int8_sparse or seed.")],
    out: Annotated[Path, typer.Option(help="The file to write, x.safetensors.")],
    checkpoint: Annotated[str | None, typer.Argument(help="Weights: path or URL; default: the shipped vit_t.")] = None,
    model: Annotated[str | None, typer.Option(help="vit_t, vit_b, vit_l or vit_h; read from the weights.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the weights must have.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for downloaded weights.")] = None,
    device: Annotated[str, typer.Option(help="What will serve it: auto (as this machine), cpu or cuda.")] = "auto",
    image: Annotated[
        list[Path], typer.Option(help="Image to prune on, of the kind that will be served; once for each.")
    ] = [],  # noqa: B006 (typer reads the default from here)
) -> None:
    """Prune and quantise a checkpoint once, into a smaller file for one precision of the encoder."""
    ahead_of_time = importlib.import_module("splitsam.encoder_service.ahead_of_time")
    ahead_of_time.run_optimize(
        model=model,
        checkpoint=checkpoint,
        sha256=sha256,
        cache_dir=cache_dir,
        precision=precision,
        device=device,
        out=out,
        images=image,
    )


@commands.command()
def calibrate(
    images: Annotated[Path, typer.Option(help="Folder of images of the kind that will be served.", exists=True)],
    checkpoint: Annotated[str | None, typer.Option(help="Weights: path or URL; default: the shipped vit_t.")] = None,
    model: Annotated[str | None, typer.Option(help="vit_t, vit_b, vit_l or vit_h; read from the weights.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the weights must have.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for downloaded weights and reports.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    bound: Annotated[float, typer.Option(help="Least mean IoU with the masks of fp32, 0 to 1.")] = 0.99,
    precisions: Annotated[str, typer.Option(help="Which to measure, e.g. bf16,int8; default: all.")] = "",
    batch_sizes: Annotated[
        str | None, typer.Option(help="As of serve-encoder, e.g. 1,4,16, and by its default.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, max=10_000, help="How many of the images to take.")] = 64,
    limit_seconds: Annotated[
        float, typer.Option(min=1, max=86_400, help="When nothing more is begun; what is left is named.")
    ] = 1800,
) -> None:
    """Measure what each precision of the encoder does to masks and speed, for --precision auto to choose by."""
    from splitsam.client.image_list import find_images

    measured = importlib.import_module("splitsam.encoder_service.calibrate")
    measured.run_calibrate(
        model=model,
        checkpoint=checkpoint,
        sha256=sha256,
        cache_dir=cache_dir,
        device=device,
        images=[image.path for image in find_images([images])],
        bound=bound,
        precisions=precisions.split(",") if precisions else [],
        batch_sizes=batch_sizes,
        max_images=max_images,
        limit_s=limit_seconds,
    )


@commands.command()
@service_options
def up(
    services: ServiceOptions,
    encoder_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50051,
    decoder_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50052,
    encoder_metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50061,
    decoder_metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50062,
    gateway: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Run the HTTP gateway as well, on this port; 0 takes a free one."),
    ] = None,
    gateway_arg: Annotated[list[str], typer.Option("--gateway-arg", help="Another argument of the gateway.")] = [],  # noqa: B006
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Take a free port for everything.")] = False,
    redis_url: Annotated[str | None, typer.Option(help="An existing Redis in place of the embedded one.")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="Folder for logs; default: a temporary one.")] = None,
    tls_cert_file: Annotated[Path | None, typer.Option(help="Certificate of both services, PEM, for TLS.")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="The certificate's key, PEM.")] = None,
    tls_client_ca_file: Annotated[
        Path | None, typer.Option(help="Authorities, PEM; callers then need a certificate.")
    ] = None,
) -> None:
    """Run Redis, an encoder and a decoder on this machine until Ctrl-C."""
    from splitsam.client.stack import StackSettings
    from splitsam.client.up import run_until_stopped

    settings = StackSettings(
        encoder_port=encoder_port,
        decoder_port=decoder_port,
        encoder_metrics_port=encoder_metrics_port,
        decoder_metrics_port=decoder_metrics_port,
        gateway_port=gateway,
        redis_url=redis_url,
        run_folder=run_folder,
        tls_cert_file=tls_cert_file,
        tls_key_file=tls_key_file,
        tls_client_ca_file=tls_client_ca_file,
        encoder_args=services.encoder_args,
        decoder_args=services.decoder_args,
        gateway_args=tuple(gateway_arg),
    )
    run_until_stopped(settings.on_free_ports() if free_ports else settings)


@commands.command()
@service_options
def demo(
    services: ServiceOptions,
    out: Annotated[Path, typer.Option(help="Where the overlay is written.")] = Path("out/demo.png"),
    encoder: Annotated[str | None, typer.Option(help="Use a running encoder, with --decoder.")] = None,
    decoder: Annotated[str | None, typer.Option(help="Use a running decoder, with --encoder.")] = None,
) -> None:
    """Start everything on free ports, segment a photo over gRPC, draw the masks, stop everything."""
    from splitsam.client.demo import run_demo
    from splitsam.client.stack import StackSettings

    if (encoder is None) != (decoder is None):
        raise typer.BadParameter("give both --encoder and --decoder, or neither")
    addresses = None if encoder is None or decoder is None else (encoder, decoder)
    settings = StackSettings(encoder_args=services.encoder_args, decoder_args=services.decoder_args)
    run_demo(out, settings.on_free_ports(), addresses)
