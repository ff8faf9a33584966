"""Many large uploads at once: memory stays where the setting puts it, and everybody is answered."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e_support import Caller, Service, refusal, running_service
from grpc import StatusCode

MIB = 2**20
IMAGE_MIB, BUDGET_MIB, CALLERS, ROUNDS = 8, 40, 48, 2


def peak_mib(service: Service) -> float:
    """Of resident memory since the last `forget_peak` (Linux)."""
    lines = Path(f"/proc/{service.child.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak(service: Service) -> None:
    Path(f"/proc/{service.child.pid}/clear_refs").write_text("5")


def test_memory_is_bounded_however_many_upload_at_once(stack, alpha, encoder_args):
    arguments = ["--max-image-bytes", str(IMAGE_MIB * MIB), "--max-upload-bytes", str(BUDGET_MIB * MIB)]
    upload = b"\xff\xd8\xff" + bytes(IMAGE_MIB * MIB - 3)  # refused after it has been read
    with (
        running_service(stack, "encoder", *encoder_args, *arguments, "--upload-wait-ms", "60000") as service,
        ThreadPoolExecutor(CALLERS) as threads,
    ):
        callers = [Caller(service.address, stack.decoder, alpha.token) for _ in range(CALLERS)]
        callers[0].look_up(b"")
        forget_peak(service)
        before_mib = peak_mib(service)
        refusals = list(threads.map(lambda caller: refusal(lambda: caller.encode(upload)), callers * ROUNDS))
        grown_mib = peak_mib(service) - before_mib
        for caller in callers:
            caller.close()
    assert {refused.code for refused in refusals} == {StatusCode.INVALID_ARGUMENT}
    # Thrice the budget and what the allocator does not give back; all of them have 768 MiB, and were held twice.
    assert grown_mib < 7 * BUDGET_MIB
