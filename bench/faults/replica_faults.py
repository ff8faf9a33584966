"""What can happen to the processes of the services."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from bench.faults.deployment import Deployment, Replica

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
