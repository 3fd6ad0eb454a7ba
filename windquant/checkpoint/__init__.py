"""The packed checkpoint: a Hugging Face folder whose linears are stored as docs/format.md describes.

`write` makes one, `read` gives its parts back to a step, and `AutoModelForCausalLM.from_pretrained` loads it as a
model once `windquant` is imported (huggingface.py).
"""

from windquant.checkpoint.description import FORMAT_VERSION
from windquant.checkpoint.files import Measured, Packed, measure, read
from windquant.checkpoint.writing import write

__all__ = ["FORMAT_VERSION", "Measured", "Packed", "measure", "read", "write"]
