"""AutoRound: rounding learned by signed gradients, block by block. Options: `bits`, `group_size`, `iters`, and
`compile`, which needs a C compiler and takes a fifth off long runs.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from auto_round import AutoRound
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import frame


def quantize(folder: Path, tokens: Tensor, options: frame.Options) -> Path:
    """AutoRound's own packed checkpoint."""
    target = Path(tempfile.mkdtemp())
    AutoRound(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        AutoTokenizer.from_pretrained(folder),
        scheme=f"W{options['bits']}A16",
        group_size=options["group_size"],
        iters=options["iters"],
        dataset=list(tokens.split(8)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        enable_torch_compile=options.get("compile", False),
    ).quantize_and_save(str(target), format="auto_round")
    return next(target.rglob("config.json")).parent  # it makes a folder of its own


def linears(packed: Path) -> Iterator[frame.Stored]:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype="float32", device_map="cpu")
    yield from frame.gptq_layout(model, packed)


if __name__ == "__main__":
    frame.main(quantize, linears)
