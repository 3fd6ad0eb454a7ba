"""Where and how precisely the heavy passes run: the device, and BF16 where the processor multiplies it natively."""

import fcntl
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import nn

from windquant import gpus, processor
from windquant.errors import WindquantError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
_held: list[IO[str]] = []  # locks of GPUs, open for the life of the process
_own = threading.local()  # `turn`: the lock of a thread that computes in turns


@cache
def device() -> torch.device:
    """The GPU, where there is one, else the CPU. The first call takes a GPU for this process alone."""
    if not torch.cuda.is_initialized():
        claim(gpus.visible())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def claim(names: list[str], folder: Path | None = None) -> str | None:
    """Take one of the GPUs for this process, and see no other; waits until one is free. None without GPUs.

    A lock file per GPU in `folder` (that of temporary files), held as long as the process lives, keeps other steps of
    this machine away, whatever started them.
    """
    if not names:
        return None
    folder = folder or Path(tempfile.gettempdir())
    waiting = False
    while True:
        for name in names:
            try:
                file = (folder / f"windquant-{os.getuid()}-gpu-{name.replace('/', '-')}.lock").open("a")
            except OSError:  # no place for locks: the scheduler must do
                break
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return name
        else:
            if not waiting:
                print("every GPU has a step already: waiting for one", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(1)
            continue
        return None


def move(model: M) -> M:
    """The model on the device."""
    nn.Module.to(model, device())
    return model


def native_bfloat16() -> bool:
    """Whether BF16 matrix products are faster than FP32 ones here (two to three times, where they are native)."""
    return torch.cuda.is_bf16_supported() if device().type == "cuda" else processor.this().fast_bfloat16


def autocast() -> AbstractContextManager[object]:
    """BF16 products with FP32 parameters for passes whose noise averages out: statistics, search and distillation.

    Perplexity is never measured under it.
    """
    return torch.autocast(device().type, torch.bfloat16) if native_bfloat16() else nullcontext()


@contextmanager
def products_by_onednn(rounded: bool = False) -> Iterator[None]:
    """FP32 products on the CPU by oneDNN: on an AMD processor they take half the time, as MKL leaves its wide vectors
    unused. Where oneDNN would round their factors to BF16 (it does with AMX) they stay MKL's, unless `rounded` allows
    it, for passes under `autocast`, whose linears round the same factors; sums are FP32 always.
    """
    onednn = torch.backends.mkldnn
    kept = {"enabled": onednn.enabled, "deterministic": onednn.deterministic, "allow_tf32": onednn.allow_tf32}
    # torch's only way to hand it FP32 products
    chosen = "bf16" if rounded or onednn_keeps_float32() else "none"
    with onednn.flags(**kept, fp32_precision=chosen):
        yield


@cache
def onednn_keeps_float32() -> bool:
    """Whether oneDNN computes FP32 products exactly although it may round: no AMX, and a product says so too."""
    if any(flag.startswith("amx") for flag in processor.this().flags):
        return False
    one, other = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    with products_by_onednn(rounded=True):
        product = one @ other
    exact = one.double() @ other.double()
    return bool((product - exact).norm() < 1e-5 * exact.norm())  # FP32: 1e-7, BF16: 2e-3


@contextmanager
def threads(count: int) -> Iterator[int]:
    """Run with `count` torch threads; gives the number from before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def in_turns(work: Callable[..., T], *items: Iterable[object], most: int) -> Iterator[T]:
    """`map(work, *items)` in up to `most` threads, of which one computes at a time, but for what it does `aside`.

    Without gradients, and no more than `most` items ahead of who takes the results.
    """
    turn = threading.Lock()

    def run(*item: object) -> T:
        with turn, torch.no_grad():
            _own.turn = turn
            return work(*item)

    with ThreadPoolExecutor(most) as pool:
        ahead: deque[Future[T]] = deque()
        for item in zip(*items, strict=True):
            if len(ahead) == most:
                yield ahead.popleft().result()
            ahead.append(pool.submit(run, *item))
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def aside() -> Iterator[None]:
    """Others may have their turn: this thread only waits for compiled code."""
    turn: threading.Lock | None = getattr(_own, "turn", None)
    if turn is None:
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()


def with_smaller_batches(batch: int, compute: Callable[[int], T]) -> T:
    """`compute(batch)`; where the GPU's memory does not suffice, again with half the batch, and says so.

    Raises WindquantError where a batch of one does not fit.
    """
    while True:
        try:
            return compute(batch)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
        if batch == 1:
            raise WindquantError(f"out of GPU memory with a batch of 1 ({reason}); use a GPU with more, or the CPU")
        batch //= 2  # outside of `except`: the error's traceback holds what filled the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of GPU memory ({reason}): again with a batch of {batch}", file=sys.stderr, flush=True)
