"""What a result will cost here: time, memory and disk of every step, from the model's configuration alone.

    python -m windquant estimate smollm2-135m --bits 2.0
    python -m windquant estimate path/to/config.json --bits 2.0 --gpu

`cost` has the formulas. Nothing heavy is imported: the Snakefile asks for every job. The command measures how fast this
machine multiplies first.
"""

import argparse
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from windquant import configuration, control_groups, memory, naming, own_model, validation
from windquant.cost import TIMES, Need, Settings, asked, cpu, gpu, needs, seconds, this
from windquant.errors import WindquantError
from windquant.progress import duration
from windquant.shape import UNKNOWN, Shape, known, read

FORCE = "WINDQUANT_FORCE"  # set: start in spite of what the estimate says
ROOT = Path(__file__).resolve().parents[1]


def resources(resolved: Settings, step: str, bits: float, cores: int, on_gpu: bool, attempt: int) -> dict[str, int]:
    """`mem_mb`, `runtime` (minutes) and `disk_mb` to ask a scheduler for, with room; more at every attempt.

    `beside` is how many such jobs this machine runs at once, each on its share of the cores. Where the model's
    configuration is not there yet, what a model of about a billion parameters would need.
    """
    shape = known(resolved["model"]) or UNKNOWN
    need = needs(shape, resolved, bits, gpu(cores) if on_gpu else cpu(cores), on_gpu)[step]
    return {
        "mem_mb": round(attempt * asked(need.memory) / 2**20),
        "runtime": round(attempt * (3 * need.seconds / 60 + 10)),
        "disk_mb": round(1.1 * need.disk / 2**20) + 16,
        "beside": need.beside,
    }


def find(model: str) -> tuple[Shape, Settings]:
    """Shape and settings of a model of config/config.yaml, a Hugging Face folder or a config.json.

    The settings of the latter two are those that `python -m windquant quantize` gives them.
    """
    schema = configuration.load(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    shared = configuration.load(ROOT / "config" / "config.yaml")
    path = Path(model).expanduser()
    if path.exists():
        shape = read(path / "config.json" if path.is_dir() else path)
        local = {"source": "folder", "path": model, **own_model.WITHOUT_HUB, **own_model.units(shape.hidden)}
        return shape, configuration.resolve({**shared, "models": {path.name: local}}, schema, path.name)
    config = validation.validate(shared, schema)
    resolved = configuration.resolve(config, schema, model)
    entry = resolved["model"]
    if found := known(entry):
        return found, resolved
    if entry["source"] != "hub":
        raise WindquantError(f"models.{model}.path: {entry.get('path') or 'missing'} has no config.json with its sizes")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read(Path(hf_hub_download(entry["id"], "config.json", revision=entry.get("revision", "main")))), resolved
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WindquantError(
            f"models.{model}.id: the Hub does not give the config.json of {entry['id']}; give the path of one"
        ) from error


def check_lowest(resolved: Settings, bits: float) -> None:
    """Refuse a budget that scales, orders and protected columns alone exceed, before the first step; the allocation
    does so by the byte.
    """
    shape = known(resolved["model"])
    if shape is None or bits >= 2:  # no sensible setting takes so much
        return
    from windquant.bank import lowest_bits  # torch takes seconds
    from windquant.plan import Units
    from windquant.quantizers import menu
    from windquant.units import Linear

    settings = resolved["units"]
    units = Units(settings["chunk"], settings["protected"], settings["window"], settings["order"], "bfloat16")
    linears = [
        Linear(str(place), "", 0, str(owner), *size)
        for place, (owner, size) in enumerate(zip(shape.OWNERS, shape.linears, strict=True))
    ]
    lowest = lowest_bits(linears, units, menu(settings["treatment"]))
    if bits < lowest:
        name = resolved["model"]["name"]
        raise WindquantError(
            f"{name} at {bits:g} bits: with scales, orders and protected columns the lowest possible target is about "
            f"{lowest:.2f}; ask for more bits, larger chunks (units.chunk) or less protection (units.protected)"
        )


def check_room(
    resolved: Settings, bits: float, allocator: str, cores: int, on_gpu: bool, made: Collection[str] = ()
) -> None:
    """Refuse a result that this machine has no memory or disk for, before its first step; nothing where unknown.

    made: the steps whose outputs exist.
    """
    shape = known(resolved["model"])
    if shape is None or os.environ.get(FORCE):
        return
    wanted = needs(shape, resolved, bits, gpu(cores) if on_gpu else cpu(cores), on_gpu)
    if allocator not in naming.LEARNED:
        wanted["search"] = wanted["bank"]
    if allocator not in ("ppo", "evolution"):  # these measure plans
        wanted["allocation"] = wanted["bank"]
    wanted = {step: need for step, need in wanted.items() if step not in made}
    name = resolved["model"]["name"]
    step, most = max(wanted.items(), key=lambda item: item[1].memory)
    if most.memory > (there := memory.total()):
        raise WindquantError(
            f"{name} at {bits:g} bits: the step {step} needs about {_size(most.memory)} of memory, this machine has "
            f"{_size(there)} (python -m windquant estimate {name} --bits {bits:g} shows every step); use a machine "
            f"with more, or set {FORCE}=1 to try"
        )
    disk = sum(need.disk for need in wanted.values())
    if disk > (free := shutil.disk_usage(".").free):
        raise WindquantError(
            f"{name} at {bits:g} bits: the results need about {_size(disk)} of disk, {_size(free)} are free here; make "
            f"room, or set {FORCE}=1 to try"
        )


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def table(wanted: Mapping[str, Need], on_gpu: bool) -> str:
    """A row per step, and the sum."""
    rows = [["step", "time", "memory", *(["GPU memory"] if on_gpu else []), "disk"]]
    for name, need in wanted.items():
        count = TIMES.get(name, 1)
        cells = [name + (" (twice)" if count == 2 else ""), duration(count * need.seconds), _size(need.memory)]
        rows.append([*cells, *([_size(need.gpu)] if on_gpu else []), _size(need.disk)])
    most = max(need.memory for need in wanted.values())
    disk = sum(need.disk for need in wanted.values())
    beside = max(need.beside for need in wanted.values())
    total = "sum" if beside == 1 else f"sum, {beside} evaluations at once"
    rows.append([total, duration(seconds(wanted)), _size(most), *([_size(most)] if on_gpu else []), _size(disk)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant estimate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a name in config/config.yaml, a Hugging Face folder, or a config.json")
    parser.add_argument("--bits", type=float, default=2.0, help="target bits (default %(default)s)")
    parser.add_argument("--cores", type=int, default=control_groups.cores(), help="of the machine (default: all)")
    parser.add_argument("--gpu", action="store_true", help="with a GPU: its rates are assumed, not measured")
    parser.add_argument("--json", action="store_true", help="print JSON: seconds and bytes by step")
    options = parser.parse_args(arguments)
    naming.check_bits(f"{options.bits:g}")
    shape, settings = find(options.model)
    if options.cores < 1:
        raise WindquantError(f"--cores {options.cores}: give at least 1")
    machine = gpu(options.cores) if options.gpu else this(options.cores)
    wanted = needs(shape, settings, options.bits, machine, options.gpu)
    if options.json:
        print(json.dumps({name: vars(need) for name, need in wanted.items()}, indent=1))
        return
    print(f"{options.model}: {shape.parameters / 1e6:,.0f}M parameters, {shape.weights / 1e6:,.0f}M quantized weights,")
    print(f"{shape.units(settings['units']['chunk']):,} units; {machine.name}\n\n{table(wanted, options.gpu)}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
