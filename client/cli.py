"""The command `splitsam`."""

import dataclasses
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from splitsam.client.cli_connection import with_client
from splitsam.client.client import Client
from splitsam.client.errors import SplitsamError
from splitsam.client.processes import StackError
from splitsam.client.results import ServiceInfo
from splitsam.client.service_options import ServiceOptions, service_options
from splitsam.client.stack import StackSettings
from splitsam.common.errors import CheckpointError

app = typer.Typer(
    name="splitsam",
    help="Segment Anything as two services: encode an image once, get masks on every click.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed (one line on stderr says why), 2 wrong usage."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="splitsam", standalone_mode=False)
    except typer.TyperException as error:
        _complain(error.format_message() + (" (see --help)" if error.exit_code == 2 else ""))
        sys.exit(error.exit_code)
    except (SplitsamError, StackError, CheckpointError, ValueError) as error:
        _complain(f"{error}{_hint(error)}")
        for line in getattr(error, "log_tail", ()):
            print(f"  | {line}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"splitsam {importlib.metadata.version('splitsam')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("serve-encoder", context_settings=_PASS_THROUGH, add_help_option=False)
def serve_encoder(context: typer.Context) -> None:
    """Run the encoder service; `serve-encoder --help` lists its settings."""
    raise typer.Exit(importlib.import_module("splitsam.encoder_service.__main__").main(context.args))


@app.command("serve-decoder", context_settings=_PASS_THROUGH, add_help_option=False)
def serve_decoder(context: typer.Context) -> None:
    """Run the decoder service; `serve-decoder --help` lists its settings."""
    raise typer.Exit(importlib.import_module("splitsam.decoder_service.__main__").main(context.args))


@app.command()
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


@app.command()
@service_options
def up(
    services: ServiceOptions,
    encoder_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50051,
    decoder_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50052,
    encoder_metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50061,
    decoder_metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 50062,
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
    from splitsam.client.up import run_until_stopped

    settings = StackSettings(
        encoder_port=encoder_port,
        decoder_port=decoder_port,
        encoder_metrics_port=encoder_metrics_port,
        decoder_metrics_port=decoder_metrics_port,
        redis_url=redis_url,
        run_folder=run_folder,
        tls_cert_file=tls_cert_file,
        tls_key_file=tls_key_file,
        tls_client_ca_file=tls_client_ca_file,
        encoder_args=services.encoder_args,
        decoder_args=services.decoder_args,
    )
    run_until_stopped(settings.on_free_ports() if free_ports else settings)


@app.command()
@service_options
def demo(
    services: ServiceOptions,
    out: Annotated[Path, typer.Option(help="Where the overlay is written.")] = Path("out/demo.png"),
    encoder: Annotated[str | None, typer.Option(help="Use a running encoder, with --decoder.")] = None,
    decoder: Annotated[str | None, typer.Option(help="Use a running decoder, with --encoder.")] = None,
) -> None:
    """Start everything on free ports, segment a photo over gRPC, draw the masks, stop everything."""
    from splitsam.client.demo import run_demo

    if (encoder is None) != (decoder is None):
        raise typer.BadParameter("give both --encoder and --decoder, or neither")
    addresses = None if encoder is None or decoder is None else (encoder, decoder)
    settings = StackSettings(encoder_args=services.encoder_args, decoder_args=services.decoder_args)
    run_demo(out, settings.on_free_ports(), addresses)


@app.command()
@with_client
def segment(
    client: Client,
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP file.")],
    point: Annotated[
        list[str], typer.Option("--point", help="x,y[:0|1] in pixels, 1 (default) on the object; may be repeated.")
    ] = [],  # noqa: B006 (typer reads the default from here)
    box: Annotated[str | None, typer.Option("--box", help="x0,y0,x1,y1 in pixels.")] = None,
    all_masks: Annotated[bool, typer.Option("--all", help="All three masks, not only the best.")] = False,
    everything: Annotated[bool, typer.Option("--everything", help="Every mask on a grid of points.")] = False,
    points_per_side: Annotated[int | None, typer.Option(help="With --everything: of the grid; default 32.")] = None,
    min_score: Annotated[float | None, typer.Option(help="With --everything: predicted IoU; default 0.88.")] = None,
    min_stability: Annotated[float | None, typer.Option(help="With --everything: default 0.95.")] = None,
    crop_layers: Annotated[
        int | None, typer.Option(min=0, help="With --everything: layers of ever smaller crops; default 0.")
    ] = None,
    others: Annotated[
        list[str], typer.Option("--set", help="With --everything: any other option of it, e.g. box_nms_threshold=0.5.")
    ] = [],  # noqa: B006 (typer reads the default from here)
    out: Annotated[Path | None, typer.Option("--out", help="Write the photo with the masks drawn, e.g. x.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Masks for points and a box on one image, or of everything in it."""
    from splitsam.client.segment import parse_box, parse_grid, parse_points, run_everything, run_segment

    grid = parse_grid(points_per_side, min_score, min_stability, crop_layers, others)
    if everything:
        if point or box is not None or all_masks:
            raise typer.BadParameter("--everything takes no --point, --box or --all")
        run_everything(client, image, grid, out=out, as_json=as_json)
        return
    if grid:
        raise typer.BadParameter("--points-per-side, --min-score and the like go with --everything")
    points = parse_points(point)
    corners = None if box is None else parse_box(box)
    if not points and corners is None:
        raise typer.BadParameter("give at least one --point or a --box, or --everything")
    run_segment(client, image, points, corners, all_masks=all_masks, out=out, as_json=as_json)


@app.command()
@with_client
def encode(
    client: Client,
    paths: Annotated[list[Path], typer.Argument(help="Images, and folders that are searched for images.")] = [],  # noqa: B006
    listed: Annotated[Path | None, typer.Option("--list", help="Text file, the path of an image on a line.")] = None,
    coco: Annotated[Path | None, typer.Option(help="COCO annotation file, for the images that it names.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the images of --list and --coco; default: that of the file.")
    ] = None,
    shard: Annotated[str, typer.Option(help="I/N: part I, counted from 0, of N; chosen by the images' names.")] = "0/1",
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Images under way at a time, at most.")] = 8,
    report: Annotated[Path | None, typer.Option(help="Write counts and failures to a file, as JSON.")] = None,
) -> None:
    """Encode many images ahead of time, those that are not yet; goes on past bad files and names them.

    Exits with 0 when all are encoded and stored, 3 when only images that will never be are missing (a file that is no
    image or does not exist), else 1: another run may do more.
    """
    from splitsam.client.bulk_encode import run_bulk_encode
    from splitsam.client.image_list import parse_shard, select_images

    images = select_images(paths, listed=listed, coco=coco, root=root, shard=parse_shard(shard))
    status = run_bulk_encode(client, images, in_flight, report)
    if status:
        raise typer.Exit(status)


@app.command()
@with_client
def info(client: Client, as_json: AsJson = False) -> None:
    """The model, precision, device and limits of the services."""
    found = client.info()
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    for service in (found.encoder, *found.decoders):
        print(_described(service))


@app.command()
def top(
    addresses: Annotated[
        list[str] | None, typer.Argument(help="Metrics of the replicas, host:port or URL; default: those of `up`.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one table of two looks and end; 1 if one is away.")
    ] = False,
) -> None:
    """Watch a running deployment: states, rates, times, queues, caches and memory of each replica."""
    from splitsam.client.top import DEFAULT_ADDRESSES, run_top

    status = run_top(addresses or DEFAULT_ADDRESSES, interval, once=once)
    if status:
        raise typer.Exit(status)


def _described(service: ServiceInfo) -> str:
    model = service.model + (" (demonstration model)" if service.demonstration else "")
    codec = f"{service.codec}, preprocessing {service.preprocess_version}" if service.codec != "unspecified" else ""
    rows = {
        "model": f"{model}, {service.precision} on {service.device}",
        "model id": service.model_id,
        **({"embeddings": codec} if codec else {}),
        "server": service.server_version,
        **{name.replace("_", " "): value for name, value in service.limits.items()},
        **{f"note {number}": note for number, note in enumerate(service.notes, start=1)},
    }
    lines = [f"{service.service} {service.address}"]
    for name, value in rows.items():
        lines.append(f"  {name:<24} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "\n".join(lines)


def _hint(error: Exception) -> str:
    is_unavailable = isinstance(error, SplitsamError) and error.reason == "UNAVAILABLE"
    is_nobody_there = is_unavailable and "CERTIFICATE" not in str(error)  # else somebody is, and shows another one
    return " (is `splitsam up` running?)" if is_nobody_there else ""


def _complain(message: str) -> None:
    print(f"splitsam: {' '.join(message.split())}", file=sys.stderr)
