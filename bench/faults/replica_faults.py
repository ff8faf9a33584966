"""What can happen to the processes of the services."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from bench.faults.deployment import Deployment, Replica
from splitsam.common.process import DEVICE_LOST_STATUS

_END_S = 30.0
Choose = Callable[[Deployment], Sequence[Replica]]


def kill(choose: Choose) -> Callable[[Deployment], contextlib.AbstractContextManager[None]]:
    """SIGKILL the first replica in the middle of its work; the fault ends when it is started again."""

    @contextlib.contextmanager
    def inject(deployment: Deployment) -> Iterator[None]:
        replica = choose(deployment)[0]
        replica.kill()
        yield
        replica.start()

    return inject


def roll(choose: Choose) -> Callable[[Deployment], contextlib.AbstractContextManager[None]]:
    """A rolling restart: SIGTERM, start, wait until ready, then the next one."""

    @contextlib.contextmanager
    def inject(deployment: Deployment) -> Iterator[None]:
        for replica in choose(deployment):
            replica.terminate()
            replica.start()
            replica.until_ready()
        yield

    return inject


@contextlib.contextmanager
def run_out_of_memory(deployment: Deployment) -> Iterator[None]:
    """Three calls of each replica's model in a row do not fit."""
    for replica in deployment.all:
        (deployment.beside / str(replica.port)).write_text("out-of-memory 3")
    yield


@contextlib.contextmanager
def lose_device(deployment: Deployment) -> Iterator[None]:
    """One replica of each service can compute no more: it must end by itself, for its successor to start."""
    victims = (deployment.encoders[0], deployment.decoders[0])
    for replica in victims:
        replica.may_end()
        (deployment.beside / str(replica.port)).write_text("lost")
    for replica in victims:
        if not replica.wait(_END_S) or replica.exit_status() != DEVICE_LOST_STATUS:
            raise RuntimeError(f"{replica.name} did not end with status {DEVICE_LOST_STATUS}: {replica.exit_status()}")
    yield
    for replica in victims:
        (deployment.beside / str(replica.port)).unlink()
        replica.start()
