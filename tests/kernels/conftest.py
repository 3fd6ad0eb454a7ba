"""Where the kernels run: compiled on a GPU, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and then holds for the whole process. Without a GPU the
tests of this folder therefore run in a process of their own, which `test_interpreter.py` starts;
`TRITON_INTERPRET=1 python -m pytest tests/kernels` does the same by hand.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

NEED_A_DEVICE = ["test_product.py", "test_dequantize.py", "test_quantize.py", "test_model.py"]
collect_ignore = NEED_A_DEVICE if not INTERPRETED and not torch.cuda.is_available() else []


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def generator() -> torch.Generator:
    """Seeded afresh for every test run; the seed is shown where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
