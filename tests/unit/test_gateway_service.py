"""The gateway's own socket."""

import asyncio
import socket

import pytest

from splitsam.common.settings import SettingsProblem
from splitsam.gateway.service import bind
from splitsam.gateway.settings import GatewaySettings


async def test_answers_are_sent_without_delay():
    accepted = asyncio.get_running_loop().create_future()
    listener = bind(GatewaySettings.load(["--port", "0"]))
    server = await asyncio.start_server(lambda _reader, writer: accepted.set_result(writer), sock=listener)
    async with server:
        _, caller = await asyncio.open_connection(*listener.getsockname())
        writer = await accepted
        assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for each in (caller, writer):
            each.close()
            await each.wait_closed()


def test_port_that_is_taken_is_said():
    with bind(GatewaySettings.load(["--port", "0"])) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsProblem, match=f"port: cannot listen on 127.0.0.1:{port}"):
            bind(GatewaySettings.load(["--port", str(port)]))
