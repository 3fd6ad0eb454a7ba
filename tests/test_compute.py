"""GPUs are taken by one step at a time, a batch that does not fit is tried again smaller, and threads take turns."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.families import family, token_ids
from windquant import compute, gpus, processor
from windquant.decoder import decoder_layers
from windquant.errors import WindquantError
from windquant.evaluation.perplexity import token_losses

TAKE = """
import sys
import threading
from pathlib import Path
from windquant import compute, gpus
print(compute.claim(["0", "1"], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def take(folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", TAKE, str(folder)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_every_gpu_has_one_step_and_the_next_one_waits(tmp_path: Path) -> None:
    first, second = take(tmp_path), take(tmp_path)
    names = [process.stdout.readline().strip() for process in (first, second) if process.stdout]
    assert sorted(names) == ["0", "1"]
    third = take(tmp_path)
    assert third.stderr is not None
    assert "waiting for one" in third.stderr.readline()
    second.communicate("")  # its end frees its GPU
    assert third.stdout is not None
    assert third.stdout.readline().strip() == names[1]
    for process in (first, third):
        process.communicate("")


def test_without_gpus_nothing_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible() == []
    assert compute.claim([], tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_scheduler_names_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7f")
    assert gpus.visible() == ["3", "GPU-7f"]
    assert compute.claim(gpus.visible(), tmp_path) == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    compute._held.pop().close()


def limited(model: nn.Module, most: int) -> None:
    """The last decoder layer runs out of memory for more than `most` samples: in the middle of a pass."""

    def check(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    decoder_layers(model)[1][-1].register_forward_pre_hook(check)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = family("llama"), token_ids(8, 12)
    expected = token_losses(model, ids, 2)
    limited(model, 2)
    found = compute.with_smaller_batches(8, lambda batch: token_losses(model, ids, batch))
    torch.testing.assert_close(found, expected)
    assert capsys.readouterr().err.splitlines() == [
        "out of GPU memory (CUDA out of memory): again with a batch of 4",
        "out of GPU memory (CUDA out of memory): again with a batch of 2",
    ]


def test_a_batch_of_one_that_does_not_fit_is_refused() -> None:
    model, ids = family("llama"), token_ids(4, 12)
    limited(model, 0)
    with pytest.raises(WindquantError, match=r"with a batch of 1 \(CUDA out of memory\); use a GPU with more"):
        compute.with_smaller_batches(4, lambda batch: token_losses(model, ids, batch))


def _error_of_products(rounded: bool) -> float:
    """Relative error of a product of large matrices."""
    one, other = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(1)).unbind()
    with compute.products_by_onednn(rounded):
        product = one @ other
    exact = one.double() @ other.double()
    return float((product - exact).norm() / exact.norm())


def test_products_stay_float32_unless_rounding_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _error_of_products(rounded=False) < 1e-6
    assert _error_of_products(rounded=True) < 1e-2
    monkeypatch.setattr(processor, "this", lambda: processor.described("flags : amx_tile amx_bf16"))
    assert not compute.onednn_keeps_float32.__wrapped__()


def test_the_way_of_products_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def precision() -> str:
        return str(torch._C._get_fp32_precision_getter("mkldnn", "matmul"))

    before = precision()
    monkeypatch.setattr(compute, "onednn_keeps_float32", lambda: False)
    with compute.products_by_onednn():
        assert precision() == before
    with compute.products_by_onednn(rounded=True):
        assert precision() == "bf16"
    assert precision() == before


def test_of_threads_in_turns_one_computes_at_a_time() -> None:
    computing, most = 0, 0
    waiting = threading.Barrier(3, timeout=60)

    def work(number: int, factor: int) -> int:
        nonlocal computing, most
        computing += 1
        most = max(most, computing)
        assert not torch.is_grad_enabled()
        torch.randn(200, 200) @ torch.randn(200, 200)  # lets other threads of Python run
        computing -= 1
        with compute.aside():
            waiting.wait()  # is passed by three together only
        return number * factor

    assert list(compute.in_turns(work, range(6), range(10, 16), most=3)) == [0, 11, 24, 39, 56, 75]
    assert most == 1


def test_an_error_in_turns_is_raised_and_nobody_waits_for_ever() -> None:
    def work(number: int) -> int:
        with compute.aside():
            if number == 1:
                raise KeyError(number)
        return number

    found = compute.in_turns(work, range(4), most=2)
    assert next(found) == 0
    with pytest.raises(KeyError):
        next(found)


def test_aside_of_no_turn_is_nothing() -> None:
    with compute.aside():
        pass
