"""Where compilers keep what they made: a folder that is full or read-only must not stop the service."""

import atexit
import contextlib
import errno
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

log = logging.getLogger("splitsam.encoder")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_MEMORY = "/dev/shm"  # noqa: S108 (a folder in it with a name of its own is used)
_NEEDED_BYTES = 48 * 2**20
NOTE = "the compile cache cannot be written: what was compiled is lost at the next start"


def warm_up(compile_all: Callable[[], None]) -> tuple[str, ...]:
    """Compile; where the cache on disk takes nothing, once more with one that lives as long as this process.

    Inductor and Triton write what they compile before they run it, into TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR.

    Args:
        compile_all: may be called twice.

    Returns:
        What people should know of it.
    """
    try:
        compile_all()
    except Exception as error:
        if not _is_for_want_of_room(error):
            raise
        log.warning("the compile cache cannot be written", extra={"error": repr(error)[:300]})
    else:
        return ()
    torch.compiler.reset()
    lasting = contextlib.ExitStack()  # until the process ends: compiled code is loaded from there at any time
    lasting.enter_context(_cache_in_memory())
    atexit.register(lasting.close)
    compile_all()
    return (NOTE,)


@contextlib.contextmanager
def _cache_in_memory() -> Iterator[None]:
    from torch._inductor.utils import fresh_cache

    folders = [folder for folder in (_MEMORY, tempfile.gettempdir()) if Path(folder).is_dir()]
    roomy = [folder for folder in folders if shutil.disk_usage(folder).free >= _NEEDED_BYTES]
    with fresh_cache(dir=(roomy or folders)[0]):
        yield


def _is_for_want_of_room(error: BaseException | None) -> bool:
    """Whether an OSError of that kind is behind an error; compilers wrap what they meet, or quote it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        inner = getattr(error, "inner_exception", None)
        error = inner or error.__cause__ or error.__context__
    return False
