"""Runs `relpos_window_hopper`'s Gluon on the CPU as `gluon_on_cpu` does the others', and its PTX thread by thread."""

import re
import threading
import types

import torch
from gluon_on_cpu import Machine, Pointer, Shared
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr

from splitsam.kernels import relpos_window_hopper, window_copies, window_terms

KERNEL = types.SimpleNamespace(**vars(window_copies) | vars(window_terms) | vars(relpos_window_hopper))
PARTS = tuple(name for name, value in vars(KERNEL).items() if isinstance(value, GluonJITFunction) and name != "_like")
LAYOUTS = (
    "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "NVMMASharedLayout", "BlockedLayout",
    "DistributedLinearLayout",
)  # fmt: skip


class Tensor(torch.Tensor):
    type = types.SimpleNamespace(layout=None)

    def split(self):
        return self[..., 0], self[..., 1]


def tensors(*bounds):
    """What `range` counts through, as the numbers of a kernel are."""
    return map(torch.tensor, range(*map(int, bounds)))


class Window(Shared):
    def index(self, i):
        return Window(self.values[i])

    def slice(self, start, length):
        return Window(self.values[start : start + length])

    def permute(self, order):
        return Window(self.values.permute(order))

    def _reinterpret(self, _, shape, __):
        return Window(self.values.view(shape))

    def load(self, _):
        return self.values.clone().as_subclass(Tensor)


class WindowMachine(Machine):
    def __init__(self, program: int, programs: int):
        super().__init__((program, 0, 0), programs)
        for name in LAYOUTS:
            setattr(self.gl, name, lambda *_, **__: None)
        self.gl.num_programs = lambda _: torch.tensor(programs)
        self.gl.minimum = torch.minimum
        self.gl.where = lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y)
        self.gl.join = lambda x, y: torch.stack((x, y), -1)
        self.gl.inline_asm_elementwise = run_asm
        self.gl.load = lambda pointer: pointer.values[pointer.offsets]
        self.gl.store = lambda pointer, values, mask: self.store(pointer, values, mask.expand(values.shape))
        self.gl.warp_specialize = self.run_parts
        self.mbarrier.wait = self.wait_for
        self.mbarrier.arrive = self.finish
        self.copier: threading.Thread | None = None
        self.to_copy, self.copied = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None

    def functions(self) -> dict:
        names = super().functions(KERNEL, PARTS)
        constants = {name: value.value for name, value in vars(KERNEL).items() if isinstance(value, constexpr)}
        names.update(constants | {"range": tensors, "_like": lambda x, _: x})
        return names

    def allocate(self, dtype, shape, layout):
        made = super().allocate(dtype, shape, layout)
        return Window(made.values) if isinstance(made, Shared) else made

    def run_parts(self, parts, *_):
        """The part that copies runs as far as it may whenever the other gives something back."""
        (multiply, arguments), (copy, to_copy) = parts

        def run_copier():
            self.to_copy.acquire()
            try:
                copy(*to_copy)
            except Exception as failure:  # noqa: BLE001 raised where the other part waits
                self.failure = failure
            self.copied.release()

        self.copier = threading.Thread(target=run_copier, daemon=True)
        self.copier.start()
        self.let_copy()
        multiply(*arguments)
        self.copier.join(1)
        assert not self.copier.is_alive(), "the part that copies waits for ever"

    def let_copy(self):
        if self.copier.is_alive():
            self.to_copy.release()
            self.copied.acquire()
        if self.failure:
            raise self.failure

    def finish(self, barrier, pred=True):
        if not pred:
            return
        assert barrier.phases == barrier.waited, "nobody has waited for what was done before"
        barrier.phases += 1
        self.let_copy()

    def wait_for(self, barrier, parity, pred=True):
        if threading.current_thread() is self.copier:
            if not pred:
                return
            while barrier.phases % 2 == parity:
                self.copied.release()
                self.to_copy.acquire()
            barrier.waited += 1
        elif pred:
            self.arrive(barrier, parity)

    def copy(self, source, start, barrier, target, pred=True):
        """A box from `start` on, zeros beyond the source."""
        if not pred:
            return
        assert min(start) >= 0
        box = source[tuple(slice(int(a), int(a) + n) for a, n in zip(start, target.values.shape, strict=True))]
        arriving = torch.zeros_like(target.values)
        arriving[tuple(map(slice, box.shape))] = box
        target.values.fill_(float("nan"))
        barrier.copies.append((target.values, arriving))
        barrier.bytes -= arriving.nbytes

    def wait(self, pending, results):
        found = super().wait(pending, results)
        return found.as_subclass(Tensor) if isinstance(found, torch.Tensor) else [x.as_subclass(Tensor) for x in found]


def _shuffle(values: torch.Tensor, lane: torch.Tensor, clamp: str, mask: str) -> torch.Tensor:
    assert (clamp, mask) == ("0x1c1f", "0xffffffff")  # of four neighbours, by all
    return values.gather(-1, (torch.arange(32) & 28) | (lane & 3))


def _permute_bytes(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    joined = a | b << 32
    picked = [(joined >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def run_asm(asm: str, constraints: str, arguments, dtypes, is_pure: bool, pack: int):
    """Of [64, 8] tensors in the layout of Hopper's sums: a thread has pairs of columns of two rows of a warp's 16."""
    assert (is_pure, pack) == (True, 2)

    def by_thread(values):  # [warp, upper or lower 8 rows, thread] of one of a pair
        return values.reshape(4, 2, 8, 4).flatten(2)

    registers: dict[str, torch.Tensor] = {}
    outputs = constraints.count("=")
    number = outputs
    for values in arguments:
        if values.dtype == torch.bfloat16:
            low, high = (by_thread(values.view(torch.int16)[:, i::2].long() & 0xFFFF) for i in range(2))
            registers[f"${number}"] = low | high << 16
            number += 1
        else:
            values = values.expand(64, 8)
            for i in range(2):
                registers[f"${number + i}"] = by_thread(values[:, i::2].long())
            number += 2
    assert number == len(constraints.split(","))
    registers["%tid.x"] = torch.arange(128).view(4, 1, 32).expand(4, 2, 32)

    def read(name):
        return registers[name] if name in registers else torch.full((4, 2, 32), int(name, 0))

    simple = {
        "mov.u32": lambda a: a, "and.b32": torch.bitwise_and, "shr.u32": torch.bitwise_right_shift,
        "add.u32": torch.add, "setp.lt.u32": torch.lt, "setp.ne.u32": torch.ne, "prmt.b32": _permute_bytes,
        "selp.b32": lambda a, b, p: torch.where(p, a, b),
    }  # fmt: skip
    for line in asm.strip().strip("{}").split(";"):
        found = re.fullmatch(r"\s*(\S+) (.*)", line)
        if not found or found[1] == ".reg":
            continue
        target, *sources = found[2].split(", ")
        if found[1] == "shfl.sync.idx.b32":
            registers[target] = _shuffle(read(sources[0]), read(sources[1]), *sources[2:])
        else:
            registers[target] = simple[found[1]](*map(read, sources))

    results = []
    for i in range(outputs):
        low, high = (registers[f"${i}"] >> shift & 0xFFFF for shift in (0, 16))
        pairs = torch.stack((low, high), -1).view(4, 2, 8, 8).view(64, 8)
        results.append(pairs.to(torch.uint16).view(torch.bfloat16).as_subclass(Tensor))
    return results


def attention(qkv, qkv_bias, rel_pos_h, rel_pos_w, gh, scale, programs, stages=3, dtype=torch.bfloat16):
    """What `launch_window` fills, computed by so many programs."""
    batch, tokens, _, heads, d = qkv.shape
    grid = qkv.view(batch, gh, 64, 3 * heads * d)
    out = torch.full((batch, tokens, heads * d), float("nan"), dtype=dtype)
    total = batch * heads * -(-gh // 14) * 5
    for program in range(min(programs, total)):
        machine = WindowMachine(program, min(programs, total))
        machine.functions()["hopper_window_kernel"](
            *([grid] * len(window_copies.BOXES) + [rel_pos_h, rel_pos_w]) * 2, Pointer(qkv_bias), Pointer(out),
            scale * 1.4426950408889634, 1 / scale, total, heads, gh, stages, d - 64,
        )  # fmt: skip
        assert not machine.in_flight
    return out
