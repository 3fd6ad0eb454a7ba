"""Packed, written, loaded by transformers in a new process: the same logits, text and bytes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, GPTBigCodeForCausalLM

import windquant
from tests.checkpoint.making import ARCHITECTURES, Made, make
from windquant import checkpoint, streaming
from windquant.checkpoint.linear import PackedLinear
from windquant.checkpoint.rewriting import rewrite
from windquant.packed import dequantize
from windquant.quantizers import actions

IDS = torch.arange(12)[None] * 29 % 320


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def load(folder: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options)  # type: ignore[no-any-return]  # transformers


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Made], dict[str, torch.Tensor]]:
    """A checkpoint per architecture, and what one new process makes of all of them: logits, text, a second save."""
    folder = tmp_path_factory.mktemp("everything")
    made = {name: make(folder / name / "packed", folder / name / "original", name) for name in ARCHITECTURES}
    script = f"""
import torch, windquant
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
result = {{}}
ids = torch.arange(12)[None] * 29 % 320
for name in {list(ARCHITECTURES)}:
    folder = Path({str(folder)!r}, name)
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    model.save_pretrained(folder / "again float32")
    with torch.no_grad():
        result[name + ".logits"] = model(ids).logits
        result[name + ".text"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    model.save_pretrained(folder / "again")
    result[name + ".dtype"] = torch.empty(0, dtype=model.dtype)
save_file(result, Path({str(folder)!r}, "result.safetensors"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return made, load_file(folder / "result.safetensors")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_process_computes_the_same(
    everything: tuple[dict[str, Made], dict[str, torch.Tensor]], name: str
) -> None:
    made, found = everything[0][name], everything[1]
    used = {action for layout in made.layouts.values() for action in layout.names}
    assert used == set(actions()), "every action takes part"
    torch.testing.assert_close(found[f"{name}.logits"], logits(made.model), rtol=1e-4, atol=1e-4)
    text = made.model.generate(IDS, max_new_tokens=6, do_sample=False)  # type: ignore[operator]  # transformers
    assert torch.equal(found[f"{name}.text"], text)
    assert found[f"{name}.dtype"].dtype == made.layouts["model.layers.0.mlp.down_proj"].format.dtype


def test_a_family_that_looks_at_weights_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-BigCode initializes a block's projection through the block."""
    entry = (GPTBigCodeConfig, GPTBigCodeForCausalLM, {"hidden_size": 48, "intermediate_size": None})
    monkeypatch.setitem(ARCHITECTURES, "gpt_bigcode", entry)
    made = make(tmp_path / "packed", tmp_path / "original", "gpt_bigcode", names=["trellis-2", "scalar-3"])
    loaded = load(made.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(made.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saving_again_gives_the_same_bytes(
    everything: tuple[dict[str, Made], dict[str, torch.Tensor]], name: str
) -> None:
    folder = everything[0][name].folder
    again = folder.parent / "again"
    assert {path.name for path in again.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    # In another dtype only that dtype changes, in config.json: what is stored does not depend on how it was loaded.
    weights = (folder / "model.safetensors").read_bytes()
    assert (folder.parent / "again float32" / "model.safetensors").read_bytes() == weights
    original, other = (
        json.loads((path / "config.json").read_text()) for path in (folder, folder.parent / "again float32")
    )
    assert other.pop("dtype") == "float32" != original.pop("dtype")
    assert other == original


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_are_those_predicted(everything: tuple[dict[str, Made], dict[str, torch.Tensor]], name: str) -> None:
    made = everything[0][name]
    assert made.measured.measured_bytes == made.plan.bytes == sum(layout.bytes() for layout in made.layouts.values())
    assert made.measured.effective_bits == made.plan.effective_bits
    assert made.measured.weights == made.plan.weights
    file = made.folder / "model.safetensors"
    assert made.measured.checkpoint_bits == 8 * file.stat().st_size / made.model.num_parameters()
    dtype = made.layouts["model.layers.0.mlp.down_proj"].format.dtype
    for key, tensor in load_file(file).items():
        linear, _, part = key.rpartition(".")
        if linear in made.layouts and part != "bias":
            assert tensor.dtype == made.layouts[linear].shapes[part][1]
        else:
            assert tensor.dtype == dtype, key


def test_it_reads_back_what_was_written(whole: Made) -> None:
    read = checkpoint.read(whole.folder)
    assert read.plan == whole.plan
    assert list(read.layouts) == list(whole.layouts), "in model order"
    assert read.layouts == whole.layouts
    for name, tensors in whole.tensors.items():
        assert read.tensors[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read.tensors[name][key].dtype == tensor.dtype
            assert torch.equal(read.tensors[name][key], tensor)
        weight = dequantize(read.layouts[name], read.tensors[name], read.order(name))
        torch.testing.assert_close(weight, whole.model.get_submodule(name).weight.detach(), rtol=1e-5, atol=1e-6)
    others = {name for name in whole.model.state_dict() if name.removesuffix(".weight") not in whole.layouts}
    assert read.parameters.keys() == others


def test_biases_are_kept_but_not_counted(tmp_path: Path) -> None:
    made = make(tmp_path / "packed", tmp_path / "original", "qwen2")
    model = load(made.folder)
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(module, PackedLinear)
    assert module.bias is not None
    assert module.bias.any()
    assert "model.layers.0.self_attn.q_proj.bias" in checkpoint.read(made.folder).parameters
    assert made.measured.measured_bytes == made.plan.bytes


@pytest.mark.parametrize(
    ("protected", "names"),
    [(0.0, None), (0.0, ["skip"]), (0.2, ["trellis-2"]), (0.03, ["scalar-1.5", "trellis-1.5"]), (0.9, ["scalar-8"])],
    ids=["unprotected", "skip alone", "trellis alone", "ternary", "hardly a chunk"],
)
def test_corners(tmp_path: Path, protected: float, names: list[str] | None) -> None:
    made = make(tmp_path / "packed", tmp_path / "original", protected=protected, names=names)
    torch.testing.assert_close(logits(load(made.folder, dtype=torch.float32)), logits(made.model), rtol=1e-4, atol=1e-4)
    assert made.measured.measured_bytes == made.plan.bytes
    assert checkpoint.measure(made.folder) == made.measured


def test_low_memory_decodes_at_every_call(whole: Made) -> None:
    from windquant.checkpoint.huggingface import WindquantConfig

    with pytest.warns(UserWarning, match="low_memory"):  # transformers says that the argument wins
        sparse = load(whole.folder, dtype=torch.float32, quantization_config=WindquantConfig(low_memory=True))
    full = load(whole.folder, dtype=torch.float32)
    assert torch.equal(logits(sparse), logits(full))
    kept = {name for name, buffer in sparse.named_buffers() if name.endswith(".dense") and buffer is not None}
    assert not kept
    assert all(module.dense is None for module in sparse.modules() if isinstance(module, PackedLinear))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_tensors_keep_their_bits_whatever_the_model_is_cast_to(whole: Made, dtype: torch.dtype) -> None:
    model = load(whole.folder, dtype=dtype)
    cast = load(whole.folder).to(dtype)  # type: ignore[operator]  # nn.Module.to
    for each in (model, cast):
        for name, module in each.named_modules():
            if isinstance(module, PackedLinear):
                for key, tensor in module.tensors.items():
                    assert tensor.dtype == whole.tensors[name][key].dtype
                    assert torch.equal(tensor, whole.tensors[name][key])
                assert module.weight.dtype == module.dtype == next(each.parameters()).dtype


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    made = make(tmp_path / "packed", tmp_path / "original", "qwen3")
    assert "lm_head.weight" not in load_file(made.folder / "model.safetensors")
    model = load(made.folder)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_pipeline_and_lm_eval(whole: Made) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, pipeline

    made = pipeline("text-generation", model=str(whole.folder), dtype=torch.float32)
    text = made("w7 w9", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("w7 w9w")
    model = load(whole.folder, dtype=torch.float32)
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(whole.folder), batch_size=1)
    request = Instance("loglikelihood", {}, ("w7 w9", " w3 w5"), 0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    with torch.no_grad():
        scores = whole.model(torch.tensor([[7, 9, 3]])).logits[0].log_softmax(-1)
    assert found == pytest.approx((scores[1, 3] + scores[2, 5]).item(), abs=1e-3)


def test_device_map(whole: Made) -> None:
    model = load(whole.folder, dtype=torch.float32, device_map="auto")
    device = next(model.parameters()).device
    torch.testing.assert_close(logits(model, IDS.to(device)).cpu(), logits(whole.model), rtol=1e-3, atol=1e-3)


def test_shards(whole: Made, tmp_path: Path) -> None:
    load(whole.folder).save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]  # transformers
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(load(whole.folder)))
    assert checkpoint.measure(tmp_path).measured_bytes == whole.measured.measured_bytes


def write_again(made: Made, folder: Path) -> None:
    others = streaming.parameters(made.model, made.layouts)
    checkpoint.write(folder, made.model, made.layouts, made.tensors.items(), others, made.plan, made.source)


def test_writing_leaves_the_model_as_it_was(whole: Made, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    config = whole.model.config
    write_again(whole, tmp_path)
    assert whole.model.config is config
    assert getattr(config, "quantization_config", None) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.model.state_dict().items())
    assert whole.model.dtype == torch.float32


def test_two_writes_give_the_same_bytes(whole: Made, tmp_path: Path) -> None:
    write_again(whole, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.folder.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (whole.folder / path.name).read_bytes(), path.name


def test_what_does_not_fit_the_layouts_is_a_callers_bug(whole: Made, tmp_path: Path) -> None:
    wrong = {name: dict(tensors) for name, tensors in whole.tensors.items()}
    wrong["model.layers.1.mlp.up_proj"].pop("codes")
    with pytest.raises(ValueError, match="up_proj"):
        write_again(dataclasses.replace(whole, tensors=wrong), tmp_path)


def test_tokenizer_and_card_are_there(whole: Made) -> None:
    assert (whole.folder / "tokenizer.json").read_bytes() == (whole.source / "tokenizer.json").read_bytes()
    card = (whole.folder / "README.md").read_text()
    for word in (f"{whole.measured.effective_bits:.4f}", "trellis-2", "import windquant", "from_pretrained"):
        assert word in card


def test_a_loaded_tensor_is_the_models_own(whole: Made) -> None:
    """Files are mapped: what is written to a tensor stays in memory."""
    from windquant.checkpoint.huggingface import WindquantConfig

    path = whole.folder / "model.safetensors"
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="low_memory"):
        model = load(whole.folder, quantization_config=WindquantConfig(low_memory=True))
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(module, PackedLinear)
    weight = module.weight
    module.get_buffer("chunk_scales").add_(1)
    assert not torch.equal(module.weight, weight)
    assert path.read_bytes() == before


REGISTERED = "assert 'windquant' in auto.AUTO_QUANTIZER_MAPPING"
IMPORTS = {  # windquant first: see `everything`
    "windquant alone is light": "import windquant; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)",
    "transformers first": f"import transformers.quantizers.auto as auto, windquant; {REGISTERED}",
    "the configuration first": (
        f"from windquant.checkpoint.huggingface import register; from transformers.quantizers import auto; {REGISTERED}"
    ),
    "both twice": (
        "import importlib, windquant; importlib.reload(windquant)\n"
        f"import transformers.quantizers.auto as auto; {REGISTERED}\n"
        "importlib.reload(windquant); from windquant.checkpoint.huggingface import register; register()\n"
        f"importlib.reload(auto); {REGISTERED}"
    ),
}


@pytest.mark.parametrize("statements", IMPORTS.values(), ids=IMPORTS)
def test_importing_registers_the_format(statements: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {statements}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_only_packed_models_are_loaded(whole: Made) -> None:
    from windquant.checkpoint.huggingface import WindquantConfig

    with pytest.raises(ValueError, match="pre-quantized"):
        load(whole.source, quantization_config=WindquantConfig())


def test_version() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == windquant.__version__


def test_another_state_is_computed_with(whole: Made, tmp_path: Path) -> None:
    """As recovery makes one: other codes of the scales; and another column order."""
    tensors = load_file(whole.folder / "model.safetensors")
    scales = {name: torch.zeros_like(value) for name, value in tensors.items() if name.endswith(".scales")}
    rewrite(whole.folder, tmp_path / "other", scales.items())
    model, other = load(whole.folder, dtype=torch.float32), load(tmp_path / "other", dtype=torch.float32)
    expected = logits(other)
    assert not torch.allclose(logits(model), expected)
    module = other.model.layers[0].self_attn.q_proj
    module.load_state_dict({"order": module.order.flip(0)}, strict=False)
    turned = logits(other)
    assert not torch.allclose(turned, expected), "k_proj and v_proj read by the same order"
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), turned)
