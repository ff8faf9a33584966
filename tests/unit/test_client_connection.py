"""Addresses, channel options and the choice of a decoder."""

import pytest

from splitsam.client.connection import TLS, channel_options, connection, rendezvous

ADDRESSES = [f"decoder-{number}:50052" for number in range(5)]
KEYS = [f"{number:064x}" for number in range(2000)]


def test_rendezvous_is_the_same_in_any_order():
    assert all(rendezvous(ADDRESSES, key) == rendezvous(ADDRESSES[::-1], key) for key in KEYS[:100])


def test_rendezvous_spreads_keys():
    shares = [sum(rendezvous(ADDRESSES, key) == address for key in KEYS) for address in ADDRESSES]
    assert min(shares) > len(KEYS) / len(ADDRESSES) / 1.3


def test_rendezvous_moves_only_the_keys_of_a_removed_address():
    for key in KEYS:
        before = rendezvous(ADDRESSES, key)
        if before != ADDRESSES[2]:
            assert rendezvous(ADDRESSES[:2] + ADDRESSES[3:], key) == before


def test_one_decoder_or_several():
    assert connection("e:1", "d:1").decoders == ("d:1",)
    assert connection("e:1", ["d:1", "d:2"]).decoders == ("d:1", "d:2")


@pytest.mark.parametrize(("encoder", "decoder"), [("", "d:1"), ("e:1", []), ("e:1", ["d:1", ""])])
def test_missing_addresses_are_refused(encoder, decoder):
    with pytest.raises(ValueError, match="at least one decoder"):
        connection(encoder, decoder)


def test_token_is_sent_as_bearer():
    assert connection("e:1", "d:1", token="t").metadata == (("authorization", "Bearer t"),)
    assert connection("e:1", "d:1").metadata == ()


def test_proxies_are_not_asked_for_the_own_machine():
    assert ("grpc.enable_http_proxy", 0) in channel_options("127.0.0.1:50051")
    assert ("grpc.enable_http_proxy", 0) not in channel_options("encoder.example:443")


def test_tls_needs_both_halves_of_a_pair():
    with pytest.raises(ValueError, match="both cert and key"):
        TLS(cert="cert.pem").credentials()
