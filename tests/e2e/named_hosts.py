"""A name for two addresses of this machine, in the place of a name server; as a program, the gateway under it."""

import runpy
import socket

NAME = "decoder.test"
IPS = ("127.0.0.1", "127.0.0.2")
_system = socket.getaddrinfo


def getaddrinfo(host, *arguments, **options):
    if host != NAME:
        return _system(host, *arguments, **options)
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in IPS]


if __name__ == "__main__":
    socket.getaddrinfo = getaddrinfo
    runpy.run_module("splitsam.gateway", run_name="__main__")
