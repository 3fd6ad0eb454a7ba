"""A search's state on disk: tensors as safetensors, the rest as JSON, in one file that is replaced as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from windquant import tensor_file
from windquant.allocation import features

FORMAT = f"1.{features.VERSION}"


def save(path: Path, tensors: dict[str, torch.Tensor | NDArray[Any]], document: dict[str, Any]) -> None:
    """Write beside, then rename: a kill leaves the previous state."""
    packed = {name: torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value).contiguous().clone()
              for name, value in tensors.items()}  # fmt: skip
    beside = path.with_name(path.name + ".new")
    tensor_file.save(beside, packed, FORMAT, document)
    beside.replace(path)


def load(path: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state if there is a whole one of this format whose document's "key" is `key`, else None."""
    if not path.exists():
        return None
    try:
        tensors, document = tensor_file.load(path, FORMAT)
    except tensor_file.UNREADABLE:
        return None  # half a file, or of another format: start over
    return (tensors, document) if document.get("key") == key else None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's moments and step counts by parameter index; empty before the first step."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    document = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    document["state"] = state
    optimizer.load_state_dict(document)


def random_state() -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The global generators that stable-baselines3 draws from: tensors, and what JSON can hold."""
    name, numbers, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "numpy": torch.as_tensor(np.asarray(numbers, dtype=np.int64))}, [
        name,
        *rest,
    ]


def restore_random_state(numbers: dict[str, torch.Tensor], state: list[Any]) -> None:
    """Inverse of `random_state`."""
    name, *rest = state
    np.random.set_state((name, numbers["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(numbers["torch"])
