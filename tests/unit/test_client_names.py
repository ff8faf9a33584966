"""Names that stand for several replicas: what is looked up, when, and what is made of the answer."""

import socket
import threading

import pytest

from splitsam.client.connection import rendezvous
from splitsam.client.names import Address, Names, ip_addresses

NAME = "decoder.test:50052"
KEYS = [f"{number:064x}" for number in range(2000)]
PROXIES = [f"{name}_proxy" for name in ("grpc", "https", "http", "no", "no_grpc")]


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Directory:
    """Resolves, as it is told; remembers who was asked for."""

    def __init__(self, **hosts):
        self.hosts = {name.replace("_", "."): ips for name, ips in hosts.items()}
        self.asked = []

    def __call__(self, host):
        self.asked.append(host)
        if isinstance(found := self.hosts.get(host, OSError("no such name")), Exception):
            raise found
        return found


def join():
    for thread in threading.enumerate():
        if thread.name == "splitsam-names":
            thread.join(10)


def look_up(names):
    names.refresh(0.0)
    join()


def places(names, *given):
    return sorted(address.place for address in names.addresses(given or (NAME,)))


def test_name_of_several_hosts_stands_for_all_of_them():
    names = Names([NAME, "10.9.9.9:1"], Directory(decoder_test=["10.0.0.1", "10.0.0.2"]))
    assert places(names) == [NAME]
    look_up(names)
    assert names.look_up.done()
    found = names.addresses(["10.9.9.9:1", NAME])
    assert found[0] == Address("10.9.9.9:1")
    assert set(found[1:]) == {Address("10.0.0.1:50052", NAME), Address("10.0.0.2:50052", NAME)}
    assert names.current == set(found)


def test_ipv6_addresses_are_bracketed():
    names = Names([NAME], Directory(decoder_test=["fd00::1", "fd00::2"]))
    look_up(names)
    assert places(names) == ["[fd00::1]:50052", "[fd00::2]:50052"]


def test_name_of_one_host_stays_what_it_is():
    names = Names([NAME], Directory(decoder_test=["10.0.0.1"]))
    look_up(names)
    assert names.addresses([NAME]) == (Address(NAME),)


def test_several_names_of_the_same_hosts_are_told_apart():
    """As behind one entrance, which routes by the name."""
    other = "encoder.test:50052"
    names = Names([NAME, other], Directory(decoder_test=["10.0.0.1", "10.0.0.2"], encoder_test=["10.0.0.1"]))
    look_up(names)
    names.addresses([NAME, other])
    assert {address.name for address in names.current} == {NAME, ""}
    assert len(names.current) == 3


@pytest.mark.parametrize(
    "given",
    [
        "127.0.0.1:50052",
        "[::1]:50052",
        "ipv4:10.0.0.1:1,10.0.0.2:1",
        "ipv6:%5B::1%5D:1",
        "dns:///decoder.test:50052",
        "dns:decoder.test:50052",
        "unix:/run/decoder.test",
        "unix:50052",
        "unix-abstract:50052",
        "xds:///decoder.test:50052",
        "decoder.test",
    ],
)
def test_other_targets_are_left_to_grpc(given):
    directory = Directory()
    names = Names([given], directory)
    look_up(names)
    assert names.addresses([given]) == (Address(given),)
    assert directory.asked == []


def test_name_that_is_called_through_a_proxy_is_left_to_it(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", "localhost,.inside.test")
    directory = Directory()
    names = Names([NAME, "decoder.inside.test:50052"], directory)
    look_up(names)
    assert directory.asked == ["decoder.inside.test"]


def test_names_are_looked_up_again_when_that_is_long_ago():
    now_s = 100.0
    directory = Directory(decoder_test=["10.0.0.1", "10.0.0.2"])
    names = Names([NAME], directory, clock=lambda: now_s)
    for seconds, times in ((0, 1), (4, 1), (2, 2), (0, 2)):
        now_s += seconds
        names.refresh()
        join()
        assert len(directory.asked) == times
    names.refresh(0.5)
    join()
    assert len(directory.asked) == 2
    now_s += 0.6
    names.refresh(0.5)
    join()
    assert len(directory.asked) == 3


def test_a_change_is_seen():
    directory = Directory(decoder_test=["10.0.0.1", "10.0.0.2"])
    names = Names([NAME], directory)
    look_up(names)
    directory.hosts["decoder.test"] = ["10.0.0.2", "10.0.0.3"]
    look_up(names)
    assert places(names) == ["10.0.0.2:50052", "10.0.0.3:50052"]


@pytest.mark.parametrize("problem", [OSError("nobody answers"), UnicodeError("label too long")])
def test_name_that_cannot_be_looked_up_keeps_what_it_had(problem):
    directory = Directory(decoder_test=["10.0.0.1", "10.0.0.2"])
    names = Names([NAME], directory)
    look_up(names)
    directory.hosts["decoder.test"] = problem
    look_up(names)
    assert places(names) == ["10.0.0.1:50052", "10.0.0.2:50052"]


def test_name_that_was_never_found_is_left_to_grpc():
    names = Names([NAME], Directory())
    look_up(names)
    assert names.look_up.done()
    assert names.addresses([NAME]) == (Address(NAME),)


def test_nobody_waits_for_a_name_server_that_hangs():
    now_s, go_on, asked = 100.0, threading.Event(), []

    def resolve(host):
        asked.append(host)
        go_on.wait(10)
        return ["10.0.0.1", "10.0.0.2"]

    names = Names([NAME], resolve, clock=lambda: now_s)
    try:
        for _ in range(3):
            names.refresh(0.0)
            assert names.addresses([NAME]) == (Address(NAME),)
        assert names.patience_s(0.25) == 0.25
        assert names.patience_s(60.0) == 2.0
        now_s += 1.5
        assert names.patience_s(60.0) == 0.5
        now_s += 1.0
        assert names.patience_s(60.0) == 0.0
    finally:
        go_on.set()
        join()
    assert len(asked) == 1
    assert names.patience_s(60.0) == 0.0
    assert len(places(names)) == 2


def test_look_up_after_a_long_silence_is_waited_for_a_moment():
    now_s, go_on = 100.0, threading.Event()
    go_on.set()

    def resolve(host):
        go_on.wait(10)
        return ["10.0.0.1", "10.0.0.2"]

    names = Names([NAME], resolve, clock=lambda: now_s)
    look_up(names)
    go_on.clear()
    try:
        now_s += 50
        names.refresh()
        assert names.patience_s(60.0) == 0.0
        now_s += 11
        assert names.patience_s(60.0) == 0.0
        go_on.set()
        join()
        go_on.clear()
        now_s += 61
        names.refresh()
        assert names.patience_s(60.0) == pytest.approx(0.1)
        assert names.patience_s(0.05) == 0.05
        now_s += 1
        assert names.patience_s(60.0) == 0.0
    finally:
        go_on.set()
        join()


def entry(family, ip):
    return (family, socket.SOCK_STREAM, 6, "", (ip, 0))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(socket.AF_INET6, "fd00::1"), (socket.AF_INET, "10.0.0.1"), (socket.AF_INET, "10.0.0.1")], ["10.0.0.1"]),
        ([(socket.AF_INET6, "fd00::2"), (socket.AF_INET6, "fd00::1")], ["fd00::1", "fd00::2"]),
    ],
)
def test_hosts_of_both_families_are_counted_once(monkeypatch, found, expected):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry(*each) for each in found])
    assert ip_addresses("decoder.test") == expected


def test_addresses_are_those_of_the_system():
    assert ip_addresses("localhost") in (["127.0.0.1"], ["::1"])


def test_a_new_replica_takes_its_own_share_of_keys_and_no_other_moves():
    directory = Directory(decoder_test=["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    names = Names([NAME], directory)
    look_up(names)
    before = {key: rendezvous(names.addresses([NAME]), key)[0] for key in KEYS}
    directory.hosts["decoder.test"] = [*directory.hosts["decoder.test"], "10.0.0.4"]
    look_up(names)
    after = {key: rendezvous(names.addresses([NAME]), key)[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key].place for key in moved} == {"10.0.0.4:50052"}
    assert len(KEYS) / 4 / 1.3 < len(moved) < len(KEYS) / 4 * 1.3


def test_callers_who_know_the_replicas_by_other_names_agree():
    other = "decoder-replicas.splitsam.svc:50052"
    ips = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    names = Names([NAME, other], lambda _: ips)
    look_up(names)
    for key in KEYS[:50]:
        first, second = (rendezvous(names.addresses([given]), key)[0] for given in (NAME, other))
        assert first.place == second.place
