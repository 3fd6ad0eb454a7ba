"""A packed model whose linears run on the kernels: the logits of decoded weights, token by token or at once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.making import Made, make
from windquant import kernels
from windquant.checkpoint.linear import PackedLinear

IDS = torch.randint(1, 320, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model with biases, of two actions: the interpreter takes its time for every launch."""
    folder = tmp_path_factory.mktemp("qwen2")
    return make(folder / "packed", folder / "original", "qwen2", protected=0.0, names=["trellis-2", "scalar-3"])


@pytest.fixture
def model(made: Made, device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float16, device_map=device).eval()


def packed(model: Any) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@torch.no_grad()
def test_logits_are_those_of_decoded_weights(made: Made, model: Any, device: torch.device) -> None:
    assert all(module.dense is None for module in packed(model))
    for ids in (IDS, IDS[:1, :1], IDS[:, :2]):  # 24, 1 and 4 rows: decoded, one vector, a few
        found = model(ids.to(device)).logits.float().cpu()
        expected = made.model(ids).logits
        assert found.isfinite().all()
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_generate_steps_through_the_kernels(made: Made, model: Any, device: torch.device) -> None:
    arguments = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(IDS[:, :9].to(device), **arguments).cpu()
    expected = made.model.generate(IDS[:, :9], **arguments)
    assert found.shape == expected.shape
    assert (found == expected).float().mean() > 0.8  # random logits lie close together


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_steps_on_new_inputs(model: Any, device: torch.device) -> None:
    static = model.generate(
        IDS[:1].to(device), max_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation="static"
    )
    eager = model.generate(IDS[:1].to(device), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(static, eager)
    module = packed(model)[0]
    x = torch.randn(1, module.in_features, device=device, dtype=torch.float16)
    with torch.no_grad():
        module(x)  # compiles, and makes the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, module(x.clone()), rtol=0, atol=0)


@torch.no_grad()
def test_the_products_of_a_group_wait_only_for_the_same_input(model: Any, device: torch.device) -> None:
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    x = torch.randn(1, 1, q.in_features, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    first = q(x), k(x)
    for change in (lambda: x.mul_(2), lambda: x.add_(1)):
        q(x)
        change()
        torch.testing.assert_close(k(x), k(x.clone()), rtol=0, atol=0)
    other = torch.zeros_like(x)
    q(x)
    expected = torch.zeros_like(first[1]) + (0 if k.bias is None else k.bias)
    torch.testing.assert_close(k(other), expected, rtol=0, atol=1e-4)
    with torch.inference_mode():
        inside = x.clone()
        torch.testing.assert_close(q(inside), q(x), rtol=0, atol=0)


def test_gradients_take_the_decoded_weight(model: Any, device: torch.device) -> None:
    module = packed(model)[0]
    x = torch.randn(1, module.in_features).to(device, torch.float16).requires_grad_()
    module(x).float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], module.weight.float().sum(0).half(), rtol=1e-2, atol=1e-2)


def test_tensors_that_move_or_change_their_dtype_are_found_again(model: Any, device: torch.device) -> None:
    module = packed(model)[0]
    x = torch.randn(1, module.in_features, generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        half = module(x.half())
        model.to(torch.float32)
        assert module.dense is not None
        single = module(x)
        model.to(torch.bfloat16)
        assert module.dense is None
        brain = module(x.bfloat16())
    for found in (half, brain):
        assert (found.float() - single).norm() < 1e-2 * single.norm()
    assert kernels.serve(device, torch.bfloat16)
    assert not kernels.serve(device, torch.float32)


def test_saved_again_it_is_the_same(made: Made, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (made.folder / "model.safetensors").read_bytes()


@torch.no_grad()
def test_a_copy_reads_its_own_tensors(model: Any, device: torch.device) -> None:
    module = packed(model)[0]
    x = torch.randn(1, module.in_features, device=device, dtype=torch.float16)
    expected = module(x)
    copied = copy.deepcopy(model)
    for name in module.tensors:
        if name in ("codes", "scales", "row_scales"):
            module.get_buffer(name).zero_()
    twin = packed(copied)[0]
    assert twin.fused is not module.fused
    assert torch.equal(twin(x), expected)
