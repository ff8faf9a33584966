"""Runs the Gluon of the Hopper kernels on the CPU, with torch tensors: what is asynchronous happens as late as it may.

A copy destroys its slot when it starts and arrives when somebody waits for it; a product reads its operands when it is
waited for. What a GPU might overwrite too soon, or read too soon, is thus NaN or an error here.
"""

import types

import torch

from splitsam.kernels import relpos_hopper_64, relpos_hopper_80

LAYOUTS = (
    "NVMMADistributedLayout",
    "DotOperandLayout",
    "SliceLayout",
    "NVMMASharedLayout",
    "SwizzledSharedLayout",
)
PARTS_64 = ("_start", "_store_terms", "_load_column_terms", "_block_weights", "_finish", "hopper_64_kernel")
PARTS_80 = ("_fetch", "_start_scores", "_start_sum", "_multiply", "_row_term", "_weights", "hopper_80_kernel")


class Pointer:
    def __init__(self, values: torch.Tensor, offsets=0):
        self.values, self.offsets = values.view(-1), offsets
        self.dtype = types.SimpleNamespace(element_ty=values.dtype)

    def __add__(self, offsets):
        return Pointer(self.values, self.offsets + offsets)


class Shared:
    """A view of shared memory."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def index(self, i):
        return Shared(self.values[i])

    def slice(self, start, length):
        return Shared(self.values[start : start + length])

    def permute(self, order):
        return Shared(self.values.permute(order))

    def load(self, _):
        return self.values.clone()

    def store(self, values):
        self.values.copy_(values)

    def _reinterpret(self, _, shape, __):
        return Shared(self.values.view(shape[::-1]).T)


class Barrier:
    def __init__(self):
        self.bytes, self.copies, self.phases, self.waited = 0, [], 0, 0


class Barriers(list):
    def index(self, i):
        return self[i]


class Product:
    def __init__(self, values=None):
        self.values = values


class Machine:
    """One program at a time, with the products that are in flight, oldest first."""

    def __init__(self, indices: tuple[int, int, int], tiles: int):
        self.in_flight = []
        self.gl = types.SimpleNamespace(
            constexpr=lambda value: value, float32=torch.float32, bfloat16=torch.bfloat16, int32=torch.int32,
            int64=torch.int64, num_programs=lambda _: tiles, static_range=range,
            program_id=lambda axis: torch.tensor(indices[axis]), exp2=torch.exp2,
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype), arange=lambda a, b, _: torch.arange(a, b),
            max=lambda x, axis: x.amax(axis), maximum=torch.maximum, sum=lambda x, axis: x.sum(axis), where=torch.where,
            convert_layout=lambda x, _: x, load=self.load, store=self.store, allocate_shared_memory=self.allocate,
            **dict.fromkeys(LAYOUTS, lambda *_: None),
        )  # fmt: skip
        self.tma = types.SimpleNamespace(async_copy_global_to_shared=self.copy)
        self.mbarrier = types.SimpleNamespace(
            init=lambda *_, **__: None, expect=self.expect, wait=self.arrive, MBarrierLayout=lambda: "barrier"
        )

    def functions(self, module, parts: tuple[str, ...]) -> dict:
        names = {"gl": self.gl, "tma": self.tma, "mbarrier": self.mbarrier, "fence_async_shared": lambda: None}
        names |= {"warpgroup_mma": self.multiply, "warpgroup_mma_init": Product, "warpgroup_mma_wait": self.wait}
        names |= {"range": range, "float": float, "wait_for_all": lambda: None, "_like": lambda x, _: x}
        for name in parts:
            names[name] = types.FunctionType(getattr(module, name).fn.__code__, names, name)
        return names

    def allocate(self, dtype, shape, layout):
        if layout == "barrier":
            return Barriers(Barrier() for _ in range(shape[0])) if len(shape) == 2 else Barrier()
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

    def load(self, pointer):
        assert pointer.offsets.min() >= 0
        return pointer.values[pointer.offsets]

    def store(self, pointer, values, mask=None):
        offsets, values = torch.as_tensor(pointer.offsets), torch.as_tensor(values)
        if mask is not None:
            offsets, values = offsets[mask], values[mask]
        assert offsets.min() >= 0
        pointer.values[offsets] = values.to(pointer.values.dtype)

    def expect(self, barrier, size, pred=True):
        if pred:
            assert not barrier.copies, "the copies before have not been waited for"
            barrier.bytes = size

    def copy(self, matrix, start, barrier, target, pred=True):
        if not pred:
            return
        found = matrix[start[0] :, start[1] :][: target.values.shape[0], : target.values.shape[1]]
        arriving = torch.zeros_like(target.values)
        arriving[: found.shape[0], : found.shape[1]] = found
        target.values.fill_(float("nan"))
        barrier.copies.append((target.values, arriving))
        barrier.bytes -= arriving.nbytes

    def arrive(self, barrier, parity):
        if barrier.phases % 2 == parity:
            assert barrier.copies, "would wait for ever"
            assert barrier.bytes == 0, "would wait for ever"
            for target, arriving in barrier.copies:
                target.copy_(arriving)
            barrier.copies = []
            barrier.phases += 1

    def multiply(self, a, b, total, use_acc=True, is_async=False):
        assert is_async
        result = Product()

        def read(operand):
            return (operand.values if isinstance(operand, Shared) else operand).float()

        def run():
            before = total.values if isinstance(total, Product) else total
            result.values = read(a) @ read(b) + (before if use_acc else 0)

        self.in_flight.append(run)
        return result

    def wait(self, pending, results):
        while len(self.in_flight) > pending:
            self.in_flight.pop(0)()
        found = [result.values if isinstance(result, Product) else result for result in results]
        assert all(values is not None for values in found), "a result is read while it is in flight"
        return found[0] if len(found) == 1 else found


def attention(qkv, rel_pos_h, rel_pos_w, gh: int, scale_log2: float, dtype=torch.bfloat16):
    """What `launch_64` or `launch_80` fills and returns, with the fewest stages."""
    heads, d = qkv.shape[3:]
    q = qkv.view(qkv.shape[0] * qkv.shape[1], -1)
    sources = [q, q, rel_pos_h, rel_pos_w]

    def run_64(machine, *targets):
        kernel = machine.functions(relpos_hopper_64, PARTS_64)["hopper_64_kernel"]
        kernel(*sources, *targets, scale_log2, heads, gh, 4)

    def run_80(machine, *targets):
        kernel = machine.functions(relpos_hopper_80, PARTS_80)["hopper_80_kernel"]
        kernel(*(source for source in sources for _ in range(2)), *targets, scale_log2, heads, gh, 2)

    return _each_program(run_64, qkv, 128, dtype) if d == 64 else _each_program(run_80, qkv, 64, dtype)


def _each_program(run, qkv, block_m: int, dtype: torch.dtype):
    batch, tokens, _, heads, d = qkv.shape
    tiles = tokens // block_m
    out = torch.full((batch, tokens, heads * d), float("nan"), dtype=dtype)
    unsafe = torch.full((batch, heads, tiles), -1, dtype=torch.int32)
    scratch = torch.full((batch * heads * tiles, 64 * block_m), float("nan"))
    for image in range(batch):
        for head in range(heads):
            for tile in range(tiles):
                run(Machine((tile, head, image), tiles), Pointer(scratch), Pointer(out), Pointer(unsafe))
    return out, unsafe
