"""The Python client, the command line and the demo."""

from splitsam.client.async_client import AsyncClient
from splitsam.client.client import Client
from splitsam.client.connection import TLS
from splitsam.client.errors import SplitsamError
from splitsam.client.prompts import GridOptions, OutputOptions, Prompt
from splitsam.client.results import (
    BulkResult,
    DeploymentInfo,
    Embedding,
    EncodedImage,
    FoundMask,
    ImageMasks,
    Mask,
    PointerAnswer,
    ServiceInfo,
)

__all__ = [
    "TLS",
    "AsyncClient",
    "BulkResult",
    "Client",
    "DeploymentInfo",
    "Embedding",
    "EncodedImage",
    "FoundMask",
    "GridOptions",
    "ImageMasks",
    "Mask",
    "OutputOptions",
    "PointerAnswer",
    "Prompt",
    "ServiceInfo",
    "SplitsamError",
]
