"""One name, several replicas: both clients, with real servers on 127.0.0.1 and 127.0.0.2 and the same port."""
# ruff: noqa: N802 (the names of RPCs)

import asyncio
import contextlib
import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event

import grpc
import pytest
from certificates import server_files
from test_client_calls import FOUND_MASK, SIZE, ScriptedDecoder, ScriptedEncoder, answer_to
from test_client_names import join

from splitsam.client import TLS, AsyncClient, Client, SplitsamError
from splitsam.client.aio_transport import AioTransport
from splitsam.client.channels import Channels
from splitsam.client.connection import connection
from splitsam.client.names import Address
from splitsam.common import errors
from splitsam.gateway.app import open_gateway
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc

IMAGES = [f"image {number}".encode() for number in range(12)]
KEYS = [hashlib.sha256(image).hexdigest() for image in IMAGES]
IPS = ["127.0.0.1", "127.0.0.2"]
NOBODY = "127.0.0.9"
LONG_S = 20.0


class Encoder(ScriptedEncoder):
    """Knows every image already."""

    def LookUpEmbedding(self, request, context):
        info = encoder_pb2.EmbeddingInfo(embedding_key=request.image_sha256.hex(), image_size=SIZE, input_size=SIZE)
        return encoder_pb2.LookUpEmbeddingResponse(found=True, embedding=info)


class Decoder(ScriptedDecoder):
    """Remembers the keys that it was asked for."""

    def __init__(self):
        super().__init__(GenerateMasks=[FOUND_MASK])
        self.keys = []
        self.prefetched = SimpleQueue()

    def PredictMasks(self, request, context):
        self.keys += [image.embedding_key for image in request.images]
        return answer_to(request)

    def GenerateMasks(self, request, context):
        self.keys.append(request.embedding_key)
        yield from super().GenerateMasks(request, context)

    def PredictMasksStream(self, requests, context):
        for each in requests:
            self.keys += [image.embedding_key for image in each.request.images]
            yield decoder_pb2.PredictMasksStreamResponse(request_id=each.request_id, result=answer_to(each.request))

    def PrefetchEmbedding(self, request, context):
        self.prefetched.put(request.embedding_key)
        return decoder_pb2.PrefetchEmbeddingResponse()

    def GetModelInfo(self, request, context):
        return decoder_pb2.DecoderServiceGetModelInfoResponse()


class Slow(Decoder):
    """Answers when it is let go on."""

    def __init__(self):
        super().__init__()
        self.has_begun, self.go_on = Event(), Event()

    def PredictMasks(self, request, context):
        self.has_begun.set()
        self.go_on.wait(LONG_S)
        return super().PredictMasks(request, context)


@pytest.fixture
def serve_at():
    """Serve servicers on IPS, one on each, all on one port; returns the port and the servers."""
    servers = []

    def start(servicers, credentials=None):
        for _ in range(20):  # until the port of the first is free at the others
            started, port = [], 0
            with contextlib.suppress(RuntimeError):
                for ip, servicer in zip(IPS, servicers, strict=False):
                    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
                    if isinstance(servicer, ScriptedEncoder):
                        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
                    else:
                        decoder_pb2_grpc.add_DecoderServiceServicer_to_server(servicer, server)
                    place = f"{ip}:{port}"
                    port = (
                        server.add_secure_port(place, credentials) if credentials else server.add_insecure_port(place)
                    )
                    started.append(server)
            if len(started) == len(servicers):
                break
        for server in started:
            server.start()
        servers.extend(started)
        return port, started

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.fixture
def hosts(monkeypatch):
    """What names stand for, in the place of the system's name service; looked up at every call."""
    known = {"decoder.test": list(IPS), "encoder.test": ["127.0.0.1"]}
    system = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        if host not in known:
            return system(host, port, *arguments, **options)
        if not known[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port or 0)) for ip in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("splitsam.client.names._FRESH_S", 0.0)
    return known


class Awaited:
    """An AsyncClient with the methods of a Client."""

    def __init__(self, *arguments, **options):
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._runner.run(self._client.close())
        self._runner.close()

    def __getattr__(self, method):
        def call(*arguments, **options):
            async def wait():
                result = getattr(self._client, method)(*arguments, **options)
                return [each async for each in result] if hasattr(result, "__anext__") else await result

            return self._runner.run(wait())

        return call


@pytest.fixture(params=[Client, Awaited])
def kind(request):
    return request.param


@pytest.fixture
def decoders():
    return [Decoder(), Decoder()]


@pytest.fixture
def encoder(serve_at):
    port, _ = serve_at([Encoder()])
    return f"127.0.0.1:{port}"


def test_clicks_on_an_image_meet_the_decoder_that_has_prefetched_it(kind, serve_at, encoder, hosts, decoders):
    port, _ = serve_at(decoders)
    with kind(encoder, f"decoder.test:{port}") as client:
        for image, key in zip(IMAGES, KEYS, strict=True):
            handle = client.encode(image)
            assert client.predict(handle, points=[(1, 1)])
            [decoder] = [each for each in decoders if key in each.keys]
            assert decoder.prefetched.get(timeout=LONG_S) == key
            assert client.predict_batch([(key, [])])
            assert list(client.generate(key))
            assert decoder.keys.count(key) == 3
    assert all(decoder.keys for decoder in decoders)
    assert not set(decoders[0].keys) & set(decoders[1].keys)


def test_first_click_of_a_new_client_meets_the_same_decoder_by_another_name(kind, serve_at, encoder, hosts, decoders):
    hosts["replicas.test"] = hosts["decoder.test"][::-1]
    port, _ = serve_at(decoders)
    for name in ("decoder.test", "replicas.test"):
        for key in KEYS[:6]:
            with kind(encoder, f"{name}:{port}") as client:
                assert client.predict(key, points=[(1, 1)])
    assert sorted(decoders[0].keys + decoders[1].keys) == sorted(2 * KEYS[:6])
    assert not set(decoders[0].keys) & set(decoders[1].keys)


async def test_a_pointer_meets_it_too(serve_at, encoder, hosts, decoders):
    port, _ = serve_at(decoders)
    for key in KEYS:
        async with AsyncClient(encoder, f"decoder.test:{port}") as client, client.pointer(key) as pointer:
            await pointer.send(points=[(1, 1)])
            assert (await anext(pointer)).masks
            assert await client.predict(key, points=[(1, 1)])
    assert not set(decoders[0].keys) & set(decoders[1].keys)
    assert all(decoder.keys for decoder in decoders)


def test_decoder_that_is_killed_is_passed_over(kind, serve_at, encoder, hosts, decoders):
    port, servers = serve_at(decoders)
    with kind(encoder, f"decoder.test:{port}") as client:
        results = client.predict_batch([(key, []) for key in KEYS])
        assert [result.key for result in results] == KEYS
        own = set(decoders[0].keys)
        assert own
        servers[0].stop(None).wait()
        for key in KEYS:
            assert client.predict(key, points=[(1, 1)])
        assert set(KEYS) == set(decoders[1].keys)
        for key in own:
            assert list(client.generate(key))


def test_images_go_to_the_next_encoder_when_theirs_is_away(kind, serve_at, hosts):
    hosts["encoder.test"] = IPS
    going = ScriptedEncoder(LookUpEmbedding=[errors.NotReady("draining", retry_delay_s=60)])
    port, _ = serve_at([going, Encoder()])
    with kind(f"encoder.test:{port}", prefetch=False) as client:
        assert [client.encode(image).key for image in IMAGES] == KEYS
    assert going.calls


def test_new_replica_is_met_and_one_that_is_gone_is_left(kind, serve_at, encoder, hosts, decoders):
    port, _ = serve_at(decoders)
    with kind(encoder, f"decoder.test:{port}") as client:
        for ips in ([NOBODY, IPS[0]], IPS, [NOBODY, IPS[1]], []):
            join()
            hosts["decoder.test"] = ips
            client.info()  # has them looked up
            join()
            for decoder in decoders:
                decoder.keys.clear()
            assert len(client.predict_batch([(key, []) for key in KEYS])) == len(KEYS)
            met = {ip for ip, decoder in zip(IPS, decoders, strict=True) if decoder.keys}
            assert met == set(ips or IPS[1:]) - {NOBODY}  # the last known ones, when nobody knows the name


def test_replicas_that_have_all_been_replaced_are_looked_up_for_the_retry(kind, serve_at, encoder, hosts, decoders):
    hosts["decoder.test"] = ["127.0.0.8", NOBODY]
    port, _ = serve_at(decoders)
    with kind(encoder, f"decoder.test:{port}") as client:
        with pytest.raises(SplitsamError, match=f"127.0.0.[89]:{port} \\(decoder.test:{port}\\)"):
            client.predict(KEYS[0], points=[(1, 1)], timeout_s=0.5)
        join()
        hosts["decoder.test"] = IPS
        assert client.predict(KEYS[0], points=[(1, 1)])


def test_call_on_a_replica_whose_address_has_gone_ends_in_peace(serve_at, encoder, hosts):
    slow, other = Slow(), Decoder()
    hosts["decoder.test"] = [NOBODY, IPS[0]]
    port, _ = serve_at([slow, other])
    with Client(encoder, f"decoder.test:{port}") as client, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(client.predict, KEYS[0], points=[(1, 1)], timeout_s=LONG_S)
        assert slow.has_begun.wait(LONG_S)
        join()
        hosts["decoder.test"] = [NOBODY, IPS[1]]
        client.info()
        join()
        assert client.predict(KEYS[1], points=[(1, 1)])
        slow.go_on.set()
        assert answer.result(LONG_S)
    assert slow.keys == KEYS[:1]
    assert other.keys == KEYS[1:2]


async def test_awaited_call_on_a_replica_whose_address_has_gone_ends_in_peace(serve_at, encoder, hosts):
    slow, other = Slow(), Decoder()
    hosts["decoder.test"] = [NOBODY, IPS[0]]
    port, _ = serve_at([slow, other])
    async with AsyncClient(encoder, f"decoder.test:{port}") as client:
        answer = asyncio.create_task(client.predict(KEYS[0], points=[(1, 1)], timeout_s=LONG_S))
        assert await asyncio.to_thread(slow.has_begun.wait, LONG_S)
        await asyncio.to_thread(join)
        hosts["decoder.test"] = [NOBODY, IPS[1]]
        await client.info()
        await asyncio.to_thread(join)
        assert await client.predict(KEYS[1], points=[(1, 1)])
        slow.go_on.set()
        assert await answer
    assert slow.keys == KEYS[:1]
    assert other.keys == KEYS[1:2]


def test_channel_to_an_address_that_has_gone_is_closed_after_its_calls():
    gone, kept = (Address(f"{ip}:1", "decoder.test:1") for ip in IPS)
    channels = Channels(connection("e:1", "d:1"), {gone, kept})
    lines = [channels.begin(address) for address in (gone, gone, kept)]
    for line in lines:
        channels.keep({kept})
        with pytest.raises(grpc.RpcError):  # nobody listens there, but it may be called
            line.channel.unary_unary("/a/b")(b"", timeout=LONG_S)
        channels.end(line, None)
    with pytest.raises(ValueError, match="closed"):
        lines[0].channel.unary_unary("/a/b")(b"", timeout=LONG_S)
    assert channels.begin(gone) is not lines[0]
    channels.close()


async def test_channel_of_an_asyncio_client_to_an_address_that_has_gone_is_closed(hosts):
    where = connection("127.0.0.1:1", "decoder.test:1")
    transport = AioTransport(where)
    try:
        addresses = await transport.resolved(where.decoders, LONG_S)
        lines = {address: transport.line(address) for address in addresses}
        await asyncio.to_thread(join)
        hosts["decoder.test"] = [NOBODY, IPS[1]]
        for _ in range(2):
            assert {address.name for address in await transport.resolved(where.decoders, LONG_S)} == {"decoder.test:1"}
            await asyncio.to_thread(join)
        await asyncio.gather(*transport._left)
        states = {address.place: line.channel.get_state() for address, line in lines.items()}
        assert states["127.0.0.1:1"] is grpc.ChannelConnectivity.SHUTDOWN
        assert states["127.0.0.2:1"] is not grpc.ChannelConnectivity.SHUTDOWN
    finally:
        await transport.close()


def test_every_replica_behind_a_name_that_is_not_away_tells_of_itself(kind, serve_at, encoder, hosts, decoders):
    port, servers = serve_at(decoders)
    with kind(encoder, f"decoder.test:{port}") as client:
        assert {each.address for each in client.info().decoders} == {f"{ip}:{port}" for ip in IPS}
        servers[0].stop(None).wait()
        assert {each.address for each in client.info().decoders} == {f"127.0.0.2:{port}"}
        servers[1].stop(None).wait()
        with pytest.raises(SplitsamError):
            client.info(timeout_s=1.0)


async def test_gateway_is_ready_while_one_decoder_behind_a_name_answers(serve_at, encoder, hosts, decoders):
    port, servers = serve_at(decoders)
    settings = GatewaySettings(encoders=(encoder,), decoders=(f"decoder.test:{port}",))
    gateway = open_gateway(settings, GatewayMetrics(), None, None)
    try:
        assert len((await gateway.info(LONG_S)).decoders) == 2
        servers[0].stop(None).wait()
        [decoder] = (await gateway.info(LONG_S)).decoders
        assert decoder.address == f"127.0.0.2:{port}"
    finally:
        await gateway.close()


def test_localhost_is_one_server_whatever_it_resolves_to(kind, serve_at, encoder, decoders):
    port, _ = serve_at(decoders[:1])
    with kind(encoder, f"localhost:{port}") as client:
        assert client.predict(KEYS[0], points=[(1, 1)])
        assert [each.address for each in client.info().decoders] == [f"localhost:{port}"]


@pytest.fixture
def trusted(authority, tmp_path):
    path = tmp_path / "ca.crt"
    path.write_bytes(authority.cert_pem)
    return TLS(path)


@pytest.mark.parametrize("certified", ["decoder.test", "other.test"])
def test_certificates_are_for_the_name_that_was_given(kind, serve_at, hosts, authority, trusted, certified):
    hosts["encoder.test"] = IPS
    encoders = [Encoder(), Encoder()]
    decoders = [Decoder(), Decoder()]

    def credentials(host):
        pair = server_files(authority.issue(host, hosts=(host,)))
        return grpc.ssl_server_credentials([(pair["tls.key"], pair["tls.crt"])])

    encoder_port, _ = serve_at(encoders, credentials("encoder.test"))
    decoder_port, _ = serve_at(decoders, credentials(certified))
    where = f"encoder.test:{encoder_port}", f"decoder.test:{decoder_port}"
    with kind(*where, tls=trusted, prefetch=False) as client:
        assert client.encode(IMAGES[0]).key == KEYS[0]
        if certified == "decoder.test":
            for key in KEYS:
                assert client.predict(key, points=[(1, 1)])
            assert all(decoder.keys for decoder in decoders)
        else:
            with pytest.raises(SplitsamError) as caught:
                client.predict(KEYS[0], points=[(1, 1)], timeout_s=2.0)
            assert caught.value.reason == "UNAVAILABLE"
