"""Runs `gelu_product_hopper`'s Gluon on the CPU: a thread for each of its parts, what is asynchronous ends late.

A product reads its operands, and a store what it stores, when it is waited for; a copy overwrites its slot when it
starts. What a GPU might overwrite too soon, or read too soon, is thus wrong or NaN here; who waits in vain gives up.
"""

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import torch
from gluon_on_cpu import Barriers, Pointer, Product, Shared
from triton.language import constexpr

from splitsam.kernels import gelu_product_hopper as hopper

PATIENCE_S = 10
LAYOUTS = ("NVMMADistributedLayout", "BlockedLayout", "SliceLayout", "NVMMASharedLayout", "SwizzledSharedLayout")
PARTS = ("_corner", "_copy", "_finish", "_multiply", "hopper_product_kernel")


class Barrier:
    def __init__(self):
        self.changed, self.phase, self.bytes = threading.Condition(), 0, 0

    def expect_arrivals(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, nbytes: int = 0, arrivals: int = 0) -> None:
        with self.changed:
            self.bytes += nbytes
            self.missing -= arrivals
            assert self.missing >= 0, "arrives more often than anybody waits for"
            if self.missing == 0 and self.bytes == 0:
                self.phase += 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE_S), "waits in vain"


class Sums(torch.Tensor):
    def split(self):
        return self[..., 0], self[..., 1]


class Part:
    """What one part of a program has in flight."""

    def __init__(self):
        self.products, self.stores = [], []

    def multiply(self, a, b, total, use_acc=True, is_async=False):
        assert is_async
        result = Product()

        def run():
            before = total.values if isinstance(total, Product) else total
            product = a.values.float() @ b.values.float()
            result.values = (product + before if use_acc else product).as_subclass(Sums)

        self.products.append(run)
        return result

    def wait(self, pending, results):
        while len(self.products) > pending:
            self.products.pop(0)()
        [result] = results
        return result if result.values is None else result.values

    def start_store(self, matrix, start, source):
        self.stores.append((matrix[start[0] :, start[1] :], source.values))

    def wait_for_stores(self, pending):
        while len(self.stores) > pending:
            target, values = self.stores.pop(0)
            target = target[: values.shape[0], : values.shape[1]]
            target.copy_(values[: target.shape[0], : target.shape[1]])


def _copy(matrix, start, barrier, target):
    found = matrix[start[0] :, start[1] :][: target.values.shape[0], : target.values.shape[1]]
    target.values.zero_()
    target.values[: found.shape[0], : found.shape[1]] = found
    barrier.arrive(-target.values.nbytes)


def _load(pointer, mask=None, other=None):
    if mask is None:
        return pointer.values[pointer.offsets]
    return torch.where(mask, pointer.values[pointer.offsets.clamp(max=len(pointer.values) - 1)], other)


def _store(pointer, values, mask):
    pointer.values[pointer.offsets[mask]] = values[mask]


def _allocate(dtype, shape, layout):
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) == 2 else Barrier()
    return Shared(torch.full(shape, float("nan")).to(dtype))


def program(index: int, programs: int, parts: list) -> dict:
    """The kernel's functions for one program; its parts are appended to `parts` to be run together."""
    gl = types.SimpleNamespace(
        constexpr=lambda value: value, float32=torch.float32, float8e4nv=torch.float8_e4m3fn, int64=torch.int64,
        program_id=lambda _: index, num_programs=lambda _: programs, static_range=range, minimum=min,
        cdiv=lambda a, b: -(-a // b), arange=lambda a, b, _: torch.arange(a, b), load=_load, store=_store,
        zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype), convert_layout=lambda x, _: x,
        full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype),
        inline_asm_elementwise=lambda *arguments, **_: torch.tanh(arguments[2][0]),
        allocate_shared_memory=_allocate, warp_specialize=lambda functions, *_: parts.extend(functions),
        **dict.fromkeys(LAYOUTS, lambda *_: None),
    )  # fmt: skip
    mbarrier = types.SimpleNamespace(
        init=lambda barrier, count: barrier.expect_arrivals(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        expect=lambda barrier, nbytes: barrier.arrive(nbytes, 1),
        arrive=lambda barrier, pred=True: barrier.arrive(0, 1) if pred else None,
        MBarrierLayout=lambda: "barrier",
    )
    part = Part()
    tma = types.SimpleNamespace(
        async_copy_global_to_shared=_copy,
        async_copy_shared_to_global=part.start_store,
        store_wait=part.wait_for_stores,
    )
    names = {"gl": gl, "tma": tma, "mbarrier": mbarrier, "range": range}
    names |= dict.fromkeys(("fence_async_shared", "wait_for_group"), lambda: None)
    names |= {"warpgroup_mma": part.multiply, "warpgroup_mma_wait": part.wait}
    names |= {name: value.value for name, value in vars(hopper).items() if isinstance(value, constexpr)}
    for name in PARTS:
        names[name] = types.FunctionType(getattr(hopper, name).fn.__code__, names, name)
    return names


def gelu_product(rows, row_scales, weight, weight_scales, bias, out_scale, programs: int):
    """What `launch_hopper_product` returns."""
    (m, k), n = rows.shape, len(weight)
    out, scales = torch.zeros(m, n).to(rows.dtype), torch.full((m, 1), float("nan"))
    pointers = [Pointer(values) for values in (row_scales, weight_scales, bias)]
    steps = -(-k // hopper.BLOCK_K.value)
    for index in range(programs):
        parts: list = []
        program(index, programs, parts)["hopper_product_kernel"](
            rows, weight, out, *pointers, Pointer(out_scale), Pointer(scales), m, n, steps
        )
        with ThreadPoolExecutor(len(parts)) as threads:
            # A part of its own is what each has in flight.
            calls = [(program(index, programs, [])[part.__name__], arguments) for part, arguments in parts]
            for done in [threads.submit(part, *arguments) for part, arguments in calls]:
                done.result()
    return out, scales
