"""Which addresses are of the internet at large, and how addresses are read."""

import ipaddress

import pytest

from splitsam.gateway.addresses import AllowedHosts, BadAddress, Target, is_public, parse_target


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_address_of_the_internet_is_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),  # noqa: S104
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fc00::1", "fd12:3456::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ],
)
def test_address_of_a_network_of_ours_is_not(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://Host.example/a/b.jpg", Target("http", "host.example", 80, "/a/b.jpg")),
        ("https://host.example:8443", Target("https", "host.example", 8443, "/")),
        ("https://host.example./x?y=z&a=%2F#part", Target("https", "host.example", 443, "/x?y=z&a=%2F")),
        ("http://[::1]:8080/x", Target("http", "::1", 8080, "/x")),
        ("http://b\u00fccher.example/\u00e4.png", Target("http", "xn--bcher-kva.example", 80, "/%C3%A4.png")),
    ],
)
def test_address_is_read_in_parts(url, target):
    assert parse_target(url) == target
    assert parse_target(target.url) == target


@pytest.mark.parametrize(
    "url",
    [
        "",
        "photo.jpg",
        "http://",
        "http://a b/",
        "http://h:99999/",
        "http://u@h/",
        "file:///x",
        "http://h/\ud800",
        "http://\ud800/",
    ],
)
def test_address_that_cannot_be_called_is_refused(url):
    with pytest.raises(BadAddress):
        parse_target(url)


@pytest.mark.parametrize(
    ("pattern", "url", "is_allowed"),
    [
        ("host.example", "http://host.example/x", True),
        ("host.example", "https://HOST.example/x", True),
        ("host.example", "http://host.example:8080/x", False),
        ("host.example:8080", "http://host.example:8080/x", True),
        ("host.example", "http://host.example.evil.example/x", False),
        ("host.example", "http://evil-host.example/x", False),
        ("*.host.example", "http://a.b.host.example/x", True),
        ("*.host.example", "http://host.example/x", False),
        ("*.host.example", "http://evilhost.example/x", False),
        ("*.host.example", "http://a.host.example:8080/x", False),
        ("*", "http://host.example/x", False),
        ("host.example", "http://host.example%2eevil.example/", False),
        ("host.example", "http://host.example\\@evil.example/", False),
    ],
)
def test_host_has_to_be_listed_with_its_port(pattern, url, is_allowed):
    try:
        AllowedHosts((pattern,)).check(parse_target(url))
    except BadAddress:
        assert not is_allowed
    else:
        assert is_allowed
