"""Commands that call services which run already."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from splitsam.client.cli_connection import with_client
from splitsam.client.client import Client
from splitsam.client.export_file import Choice, Form
from splitsam.client.results import ServiceInfo

commands = typer.Typer()
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@commands.command()
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


@commands.command()
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


@commands.command()
@with_client
def export(
    client: Client,
    coco: Annotated[Path, typer.Argument(help="COCO annotation file with boxes, points or keypoints.")],
    out: Annotated[Path, typer.Option(help="COCO file to write; an interrupted run goes on from OUT.progress.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the images; default: that of the file.")] = None,
    prompt: Annotated[
        list[str], typer.Option(help="bbox, point_coords or keypoints; several make one prompt together.")
    ] = ["bbox"],  # noqa: B006 (typer reads the default from here)
    form: Annotated[Form, typer.Option("--format", help="Polygons have no holes: they are filled.")] = "rle",
    selection: Annotated[Choice, typer.Option(help="Mask token 0, the best of three, or as fits the prompt.")] = "auto",
    tolerance: Annotated[float, typer.Option(min=0, max=100, help="How far polygons may stray, in pixels.")] = 1.0,
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Images being encoded at a time, at most.")] = 8,
    requests: Annotated[int, typer.Option(min=1, max=64, help="Requests to the decoder at a time.")] = 4,
    report: Annotated[Path | None, typer.Option(help="Write counts and failures to a file, as JSON.")] = None,
) -> None:
    """A mask for every annotation of a COCO file, after people's clicks; goes on past bad entries and names them.

    Annotations keep their order, ids and boxes; segmentation and area are the mask's, and predicted_iou and
    stability_score say what the model thinks of it. Exits with 0 when all have masks, 3 when only what never will is
    missing (an entry or a file that cannot be used), else 1: the same command goes on.
    """
    from splitsam.client.export import run_export
    from splitsam.client.export_pass import ExportOptions
    from splitsam.client.export_plan import FIELDS

    if unknown := [field for field in prompt if field not in FIELDS]:
        raise typer.BadParameter(f"--prompt takes {', '.join(FIELDS)}, not {unknown[0]!r}")
    options = ExportOptions(tuple(prompt), form, selection, tolerance, in_flight, requests)
    status = run_export(client, coco, root, out, options, report)
    if status:
        raise typer.Exit(status)


@commands.command()
@with_client
def info(client: Client, as_json: AsJson = False) -> None:
    """The model, precision, device and limits of the services."""
    found = client.info()
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    for service in (found.encoder, *found.decoders):
        print(_described(service))


@commands.command()
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
