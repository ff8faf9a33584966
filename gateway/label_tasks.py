"""The images of Label Studio's tasks: where they are, how to ask for them, and which were opened lately."""

import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from splitsam.client.async_client import AsyncClient
from splitsam.client.results import EncodedImage
from splitsam.common.lru import ByteBudgetLRU
from splitsam.gateway.bodies import decoded
from splitsam.gateway.errors import GatewayError
from splitsam.gateway.fetch import Fetcher
from splitsam.gateway.label_config import LabelConfig
from splitsam.gateway.settings import GatewaySettings, read_secret

_JSON = ("application/json",)
_MAX_JSON_BYTES = 16 * 2**20
_PAGE = 100
# Access tokens made of a personal one are good for five minutes.
_ACCESS_S = 240.0
_REMEMBERED = 10_000
# Label Studio sets a project up whenever somebody looks at it.
_AHEAD_S = 6 * 3600.0
_NO_PLACE = (
    "This task's image is kept in Label Studio, and the gateway was not told where that is: whoever runs it has to "
    "set label_studio_url."
)


class TaskImages:
    """Opens the images of tasks.

    Args:
        fetcher: gets them.
        client: encodes them.
    """

    def __init__(self, settings: GatewaySettings, fetcher: Fetcher, client: AsyncClient):
        self._fetcher = fetcher
        self._client = client
        self._url = settings.label_studio_url
        self._max_bytes = settings.max_image_bytes
        self._token = read_secret("label_studio_token_file", settings.label_studio_token_file)
        self._access: tuple[str, float] | None = None
        # A click must not fetch the whole image again. It is only a shortcut: who lacks an entry fetches.
        self._opened: ByteBudgetLRU[bytes, tuple[EncodedImage, float]] = ByteBudgetLRU(_REMEMBERED)
        self._keep_s = settings.remember_images_ms / 1000
        self._ahead: ByteBudgetLRU[bytes, float] = ByteBudgetLRU(_REMEMBERED)

    def remembered(self, task: Mapping[str, Any], config: LabelConfig) -> EncodedImage | None:
        """The image of a task, without its bytes, if it was opened lately; raises GatewayError where it has none."""
        name = hashlib.sha256(_address(task, config.data_key).encode()).digest()
        opened, until_s = self._opened.get(name) or (None, 0.0)
        return opened if time.monotonic() < until_s else None

    async def open(self, task: Mapping[str, Any], config: LabelConfig) -> EncodedImage:
        """The image of a task, fetched and encoded, with its bytes.

        Raises:
            GatewayError: it cannot be had.
            SplitsamError: it cannot be encoded.
        """
        address = _address(task, config.data_key)
        name = hashlib.sha256(address.encode()).digest()
        image = await self._client.encode(await self._content(address))
        self._opened.put(name, (replace(image, source=None), time.monotonic() + self._keep_s), 1)
        return image

    async def encode_ahead(self, task: Mapping[str, Any], config: LabelConfig) -> bool:
        """Encode a task's image for nobody who waits: whoever does goes first. False when that was done lately.

        Raises:
            GatewayError: it cannot be had.
            SplitsamError: it cannot be encoded.
        """
        address = _address(task, config.data_key)
        name = hashlib.sha256(address.encode()).digest()
        if time.monotonic() < (self._ahead.get(name) or 0.0):
            return False
        await self._client.encode(await self._content(address), background=True)
        self._ahead.put(name, time.monotonic() + _AHEAD_S, 1)
        return True

    async def tasks(self, project: int, at_most: int) -> AsyncIterator[Mapping[str, Any]]:
        """The tasks of a project, in Label Studio's order.

        Raises:
            GatewayError: Label Studio does not tell.
        """
        if self._url is None:
            raise GatewayError(424, "NO_LABEL_STUDIO", _NO_PLACE)
        seen = 0
        while seen < at_most:
            query = urlencode({"project": project, "page": seen // _PAGE + 1, "page_size": _PAGE})
            address = urljoin(f"{self._url.rstrip('/')}/", f"api/tasks/?{query}")
            page = json.loads(await self._fetcher.get(address, await self._authorization(), _MAX_JSON_BYTES, _JSON))
            for task in page["tasks"][: at_most - seen]:
                yield task
            seen += len(page["tasks"])
            if len(page["tasks"]) < _PAGE:
                return

    async def _content(self, address: str) -> bytes:
        if address.startswith("data:"):
            return await decoded("image", address, self._max_bytes)
        if not urlsplit(address).scheme:
            if self._url is None:
                raise GatewayError(424, "NO_LABEL_STUDIO", _NO_PLACE)
            address = urljoin(f"{self._url.rstrip('/')}/", address)
        return await self._fetcher.image(address, await self._authorization())

    async def _authorization(self) -> str | None:
        """What Label Studio takes: an old token as it is, or what it gives for a personal one."""
        if self._token is None or self._url is None:
            return None
        if self._token.count(".") != 2:
            return f"Token {self._token}"
        access, until_s = self._access or ("", 0.0)
        if time.monotonic() >= until_s:
            address = urljoin(f"{self._url.rstrip('/')}/", "api/token/refresh/")
            answer = await self._fetcher.post_json(address, {"refresh": self._token})
            access = str(answer["access"])
            self._access = (access, time.monotonic() + _ACCESS_S)
        return f"Bearer {access}"


def _address(task: Mapping[str, Any], key: str) -> str:
    data = task.get("data")
    address = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(address, str) or not address.strip() or not _is_text(address):
        raise GatewayError(400, "NO_IMAGE", f"This task has no image under {key!r}.")
    return address.strip()


def _is_text(address: str) -> bool:
    """JSON may hold halves of characters, which nothing can be made of."""
    return not any("\ud800" <= letter <= "\udfff" for letter in address)
