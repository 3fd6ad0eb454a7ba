"""GPTQ as GPTQModel does it. Options: those of its GPTQConfig, and `gptaq` (alpha) for the asymmetric calibration."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# It wants two threads for loading and takes half of the cores: on two cores that fails.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# It compiles what decodes the weights, for minutes; here that is done once.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTAQConfig, GPTQConfig
from torch import Tensor

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> Path:
    options = dict(options)
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(alpha=options["gptaq"])
    model = GPTQModel.load(str(folder), GPTQConfig(**options, device="cpu"))
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens], batch_size=8)
    target = Path(tempfile.mkdtemp())
    model.save(str(target))
    return target


def linears(packed: Path) -> Iterator[frame.Stored]:
    model = GPTQModel.load(str(packed), device="cpu", backend=BACKEND.TORCH)
    yield from frame.gptq_layout(model.model, packed)


if __name__ == "__main__":
    frame.main(quantize, linears)
