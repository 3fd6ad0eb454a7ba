"""A safetensors file with one JSON document in its header: how artifacts and training states are stored."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

#: What reading raises, here and where the document is taken apart: a file that is missing, damaged, or another one.
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError)


def save(path: Path, tensors: dict[str, Tensor], key: str, document: Any) -> None:
    """Write tensors and a document under `key`: one key, because safetensors puts several in a random order."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {key: json.dumps(document)})


def load(path: Path, key: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, on the CPU, and the document under `key`; raises one of UNREADABLE."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()[key])
    return load_file(path), document
