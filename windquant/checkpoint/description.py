"""`quantization_config` of config.json: the layout of every packed linear, as JSON and back.

    {"quant_method": "windquant", "format_version": 3, "chunk": 64, "protected": 0.03, "window": 12,
     "dtype": "float16", "skip_dtype": "float16",
     "linears": {"model.layers.0.self_attn.q_proj":
                   [0, 576, 576, "model.layers.0.self_attn.q_proj", "scalar-4 trellis-2*7 trellis-1"], ...}}

A linear is its decoder layer, rows, columns, group, and the action of every chunk in column order; `name*n` stands for
n chunks in a row.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch

from windquant.errors import WindquantError
from windquant.packed import Format, Layout
from windquant.quantizers import actions
from windquant.quantizers.trellis import DISTORTION
from windquant.units import Linear

METHOD = "windquant"
FORMAT_VERSION = 3  # 1: no trellis codes of 2.5 and 3.5 bits, and other numbers of actions; 2: streams are no rings
KEYS = ("chunk", "protected", "window", "dtype", "skip_dtype", "linears")
WINDOWS = {window for _, window in DISTORTION}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def compact(names: tuple[str, ...]) -> str:
    """("a", "a", "b") -> "a*2 b"."""
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def expand(text: str) -> tuple[str, ...]:
    """The inverse of `compact`; ValueError if a count is no number."""
    result: list[str] = []
    for run in text.split():
        name, _, count = run.partition("*")
        result += [name] * int(count or 1)
    return tuple(result)


def describe(layouts: Mapping[str, Layout], dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config of these linears. dtype: that of the model's other parameters on disk."""
    forms = {layout.format for layout in layouts.values()}
    if len(forms) != 1:
        raise ValueError(f"a checkpoint has one format, not {len(forms)}")
    form = forms.pop()
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "chunk": form.chunk,
        "protected": form.protected,
        "window": form.window,
        "dtype": dtype_name(dtype),
        "skip_dtype": dtype_name(form.dtype),
        "linears": {
            name: [
                layout.linear.layer,
                layout.linear.rows,
                layout.linear.columns,
                layout.linear.group,
                compact(layout.names),
            ]
            for name, layout in layouts.items()
        },
    }


def _check(form: Format, linears: list[Linear]) -> None:
    """ValueError for numbers that no checkpoint has."""
    if form.chunk < 1 or not 0 <= form.protected < 1 or form.window not in WINDOWS:
        raise ValueError(f"chunk {form.chunk}, protected {form.protected}, window {form.window}")
    if not linears:
        raise ValueError("no linears")
    for linear in linears:
        sizes = (linear.layer + 1, linear.rows, linear.columns)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{linear.name}: layer {linear.layer}, {linear.rows} rows, {linear.columns} columns")


def layouts(description: Mapping[str, Any], where: object) -> dict[str, Layout]:
    """The layouts that a quantization_config describes.

    where: what the errors name, usually the path of config.json. Raises WindquantError for another method or format
    version, a missing key, an unknown action, or chunks that do not cover a linear's columns.
    """
    if not isinstance(description, Mapping):
        raise WindquantError(f"{where}: quantization_config is no table of keys; give a windquant checkpoint")
    method, version = description.get("quant_method"), description.get("format_version")
    if method != METHOD:
        raise WindquantError(f"{where}: quantized by {method}, not by {METHOD}; give a windquant checkpoint")
    if version != FORMAT_VERSION:
        raise WindquantError(
            f"{where}: checkpoint format version {version}, this windquant reads version {FORMAT_VERSION}; quantize "
            "the model again, or install the version that wrote the checkpoint"
        )
    if missing := [key for key in KEYS if key not in description]:
        raise WindquantError(f"{where}: quantization_config lacks {', '.join(missing)}; quantize the model again")
    try:
        form = Format(
            int(description["chunk"]),
            float(description["protected"]),
            int(description["window"]),
            DTYPES[description["skip_dtype"]],
        )
        DTYPES[description["dtype"]]
        found = {
            name: Layout(Linear(name, name.rpartition(".")[2], layer, group, rows, columns), expand(names), form)
            for name, (layer, rows, columns, group, names) in description["linears"].items()
        }
        _check(form, [layout.linear for layout in found.values()])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WindquantError(
            f"{where}: quantization_config is damaged ({error!r}); quantize the model again"
        ) from error
    known = actions()
    for name, layout in found.items():
        if unknown := sorted(set(layout.names) - known.keys()):
            raise WindquantError(
                f"{where}: action {unknown[0]!r} of {name} is unknown; this version has {', '.join(known)}"
            )
        if len(layout.names) != len(layout.widths):
            raise WindquantError(
                f"{where}: {name} has {len(layout.names)} actions for {len(layout.widths)} chunks; quantize the model "
                "again"
            )
        if layout.linear.group not in found:
            raise WindquantError(
                f"{where}: {name} takes its column order from {layout.linear.group}, which is not there; quantize the "
                "model again"
            )
    return found
