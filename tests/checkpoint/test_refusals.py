"""A checkpoint that is damaged, incomplete, of another version or off its plan: one line that names the file."""

import gc
import json
import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.checkpoint.making import Made
from windquant import checkpoint, kernels, models
from windquant.errors import WindquantError

Copied = Callable[[], Path]
LINEAR = "model.layers.1.mlp.up_proj"


def refused(folder: Path, *words: str, plan: bool = False) -> None:
    """`read`, `from_pretrained` and `models.load` refuse the folder in one line that has all the words."""
    readers: list[Callable[[Path], Any]] = [checkpoint.read, AutoModelForCausalLM.from_pretrained, models.load]
    if not plan:
        readers.append(checkpoint.measure)
    for reader in readers:
        with pytest.raises(WindquantError) as caught:
            reader(folder)
        text = str(caught.value)
        assert "\n" not in text
        for word in (str(folder), *words):
            assert word in text, (reader, text)
        assert gc.isenabled(), "loading switches it off for a while"


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(copied: Copied, left: float) -> None:
    folder = copied()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    refused(folder, "model.safetensors", "truncated")


def test_file_with_something_behind_it(copied: Copied) -> None:
    folder = copied()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(WindquantError, match=r"model\.safetensors: truncated or no safetensors"):
        checkpoint.read(folder)


def test_missing_shard(whole: Made, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copyfile(whole.folder / "plan.json", tmp_path / "plan.json")
    assert checkpoint.read(tmp_path).plan == whole.plan
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, shard.name, "missing")


def test_missing_file(copied: Copied) -> None:
    folder = copied()
    (folder / "model.safetensors").unlink()
    with pytest.raises(WindquantError, match=r"model\.safetensors: missing"):
        checkpoint.read(folder)
    with pytest.raises(WindquantError, match=r"model\.safetensors: missing"):
        models.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(WindquantError, match=r"config\.json: missing"):
        checkpoint.read(folder)


@pytest.mark.parametrize("version", [1, 2, 4])  # in version 1 the actions had other numbers
def test_other_format_version(copied: Copied, version: int) -> None:
    folder = copied()
    change_config(folder, lambda quantization: quantization.update(format_version=version))
    refused(folder, "config.json", f"format version {version}", "reads version 3")


def test_configuration_without_a_key(copied: Copied) -> None:
    folder = copied()
    change_config(folder, lambda quantization: quantization.pop("window"))
    refused(folder, "config.json", "lacks window")


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (1, 77, "codes"),  # rows
        (2, 80, "actions for 3 chunks"),  # columns: another number of chunks
        (2, 49, "codes"),  # columns: the same number of chunks
        (3, "model.layers.1.mlp.none", "column order"),  # group
        (4, "scalar-2 skip", "codes"),
        (4, "scalar-2 scalar-5", "scalar-5"),
        (4, "scalar-2*9", "9 actions for 2 chunks"),
        (4, "scalar-2*x", "damaged"),
    ],
)
def test_shapes_that_disagree(copied: Copied, place: int, value: object, word: str) -> None:
    folder = copied()

    change_config(folder, lambda quantization: operator.setitem(quantization["linears"][LINEAR], place, value))
    refused(folder, word)


@pytest.mark.parametrize(
    ("key", "value"),
    [("chunk", 0), ("protected", 1.0), ("protected", -0.1), ("window", 9), ("linears", {}), ("linears", [1])],
)
def test_numbers_that_no_checkpoint_has(copied: Copied, key: str, value: object) -> None:
    folder = copied()
    change_config(folder, lambda quantization: quantization.update({key: value}))
    refused(folder, "config.json", "damaged")


@pytest.mark.parametrize(("place", "value"), [(0, -1), (1, 0), (1, "75"), (2, 1.5)])
def test_shapes_that_are_none(copied: Copied, place: int, value: object) -> None:
    folder = copied()
    change_config(folder, lambda quantization: operator.setitem(quantization["linears"][LINEAR], place, value))
    refused(folder, "config.json", "damaged", LINEAR)


@pytest.mark.parametrize("content", ["[]", "{}", '{"quantization_config": null}', '{"quantization_config": [1]}'])
def test_configurations_of_something_else(copied: Copied, content: str) -> None:
    folder = copied()
    (folder / "config.json").write_text(content)
    for reader in (checkpoint.read, checkpoint.measure):
        with pytest.raises(WindquantError, match=r"config\.json: "):
            reader(folder)


def test_tensors_that_disagree(copied: Copied) -> None:
    def lack(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{LINEAR}.row_scales"]

    def shape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.codes"] = tensors[f"{LINEAR}.codes"][:-1].clone()

    def dtype(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.chunk_scales"] = tensors[f"{LINEAR}.chunk_scales"].float()

    def table(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LINEAR}.actions"] = tensors[f"{LINEAR}.actions"].flip(0).contiguous()

    for change, words in (
        (lack, ("lacks", "row_scales")),
        (shape, ("model.safetensors", "codes", "asks for uint8")),
        (dtype, ("model.safetensors", "chunk_scales is float32", "asks for float16")),
        (table, ("model.safetensors", "actions of", LINEAR)),
    ):
        folder = copied()
        change_tensors(folder, change)
        refused(folder, *words)


def test_another_architecture(copied: Copied) -> None:
    """The packed tensors agree with quantization_config, but the model around them has other shapes."""
    folder = copied()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(WindquantError, match="does not belong to these weights"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"actions": None}, "actions of"),
        ({"actions": {}}, "same linears"),
        ({"bytes": 1}, "predicts 1 bytes"),
        ({"format": 0}, "plan format 0"),
    ],
)
def test_plan_that_disagrees(copied: Copied, change: dict[str, Any], word: str) -> None:
    folder = copied()
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    if change == {"actions": None}:
        plan["actions"][LINEAR][0] = "skip" if plan["actions"][LINEAR][0] != "skip" else "scalar-8"
    else:
        plan |= change
    path.write_text(json.dumps(plan))
    refused(folder, "plan.json", word, plan=True)


def test_without_a_plan_it_loads_but_no_step_takes_it(copied: Copied) -> None:
    folder = copied()
    (folder / "plan.json").unlink()
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(WindquantError, match=r"plan\.json: not a readable plan"):
        checkpoint.read(folder)


def test_damaged_order(copied: Copied) -> None:
    folder = copied()
    name = "model.layers.0.self_attn.q_proj.order"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros_like(tensors[name])}))
    refused(folder, "model.safetensors", name, "column order")


def test_original_model(whole: Made) -> None:
    with pytest.raises(WindquantError, match=r"config\.json: not the configuration of a windquant checkpoint"):
        checkpoint.read(whole.source)


def test_disk_offload(whole: Made) -> None:
    with pytest.raises(WindquantError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(whole.folder, device_map={"": "disk"}, offload_folder="unused")


def test_unsupported_dtype(whole: Made) -> None:
    with pytest.raises(WindquantError, match=r"float64 is not supported; load it in float16"):
        AutoModelForCausalLM.from_pretrained(whole.folder, dtype=torch.float64)


def test_unsupported_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(WindquantError, match=r"Tesla T4: compute capability 7\.5, packed checkpoints need 8\.0"):
        kernels.check(torch.device("cuda"))
    kernels.check(torch.device("cpu"))
