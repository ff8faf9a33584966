"""Addresses, channel options and the choice of a decoder."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from splitsam.client import Client, SplitsamError
from splitsam.client.connection import TLS, channel_options, connection, rendezvous
from splitsam.client.names import Address
from splitsam.v1 import encoder_pb2, encoder_pb2_grpc

OPENSSL = shutil.which("openssl")

ADDRESSES = [Address(f"10.0.0.{number}:50052", "decoder:50052") for number in range(5)]
KEYS = [f"{number:064x}" for number in range(2000)]


def test_rendezvous_is_the_same_in_any_order():
    assert all(rendezvous(ADDRESSES, key) == rendezvous(ADDRESSES[::-1], key) for key in KEYS[:100])


def test_rendezvous_spreads_keys():
    shares = [sum(rendezvous(ADDRESSES, key)[0] == address for key in KEYS) for address in ADDRESSES]
    assert min(shares) > len(KEYS) / len(ADDRESSES) / 1.3


def test_rendezvous_moves_only_the_keys_of_a_removed_address():
    for key in KEYS:
        before = rendezvous(ADDRESSES, key)[0]
        if before != ADDRESSES[2]:
            assert rendezvous(ADDRESSES[:2] + ADDRESSES[3:], key)[0] == before


def test_one_decoder_or_several():
    assert connection("e:1", "d:1").decoders == ("d:1",)
    assert connection("e:1", ["d:1", "d:2"]).decoders == ("d:1", "d:2")


@pytest.mark.parametrize(("encoder", "decoder"), [("", "d:1"), ("e:1", []), ("e:1", ["d:1", ""])])
def test_missing_addresses_are_refused(encoder, decoder):
    with pytest.raises(ValueError, match="at least one encoder"):
        connection(encoder, decoder)


def test_token_is_sent_as_bearer():
    assert connection("e:1", "d:1", token="t").metadata == (("authorization", "Bearer t"),)
    assert connection("e:1", "d:1").metadata == ()


def test_proxies_are_not_asked_for_the_own_machine():
    assert ("grpc.enable_http_proxy", 0) in channel_options(Address("127.0.0.1:50051"))
    assert ("grpc.enable_http_proxy", 0) not in channel_options(Address("encoder.example:443"))


def test_tls_needs_both_halves_of_a_pair():
    with pytest.raises(ValueError, match="both cert and key"):
        TLS(cert="cert.pem").credentials()


def make_certificate(folder, name):
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    command = [OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


class Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    def LookUpEmbedding(self, request, context):  # noqa: N802 (the name of an RPC)
        embedding = encoder_pb2.EmbeddingInfo(embedding_key="k")
        return encoder_pb2.LookUpEmbeddingResponse(found=True, embedding=embedding)


@pytest.fixture
def mutual_tls(tmp_path):
    """A server that wants a client's certificate; returns its address and the files of both sides."""
    if OPENSSL is None:
        pytest.skip("needs openssl")
    server_cert, server_key = make_certificate(tmp_path, "server")
    client_cert, client_key = make_certificate(tmp_path, "client")
    server = grpc.server(ThreadPoolExecutor(2))
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(Encoder(), server)
    credentials = grpc.ssl_server_credentials(
        [(server_key.read_bytes(), server_cert.read_bytes())], client_cert.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}", server_cert, client_cert, client_key
    server.stop(None).wait()


def test_mutual_tls_is_spoken(mutual_tls):
    address, ca, cert, key = mutual_tls
    with Client(address, tls=TLS(ca, cert, key)) as client:
        assert client.encode(b"image").key == "k"


def test_mutual_tls_without_a_certificate_is_unavailable(mutual_tls):
    address, ca, _, _ = mutual_tls
    with Client(address, tls=TLS(ca)) as client, pytest.raises(SplitsamError) as caught:
        client.encode(b"image")
    assert caught.value.reason == "UNAVAILABLE"


def test_server_of_an_unknown_authority_is_not_trusted(mutual_tls):
    address, _, cert, key = mutual_tls
    with Client(address, tls=TLS(cert, cert, key)) as client, pytest.raises(SplitsamError) as caught:
        client.encode(b"image")
    assert caught.value.reason == "UNAVAILABLE"
