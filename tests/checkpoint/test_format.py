"""A second reader, written from docs/format.md alone, decodes the same weights from the same bytes."""

import json
import math
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.checkpoint.making import Made
from windquant.quantizers import actions

DOCS = Path(__file__).parents[2] / "docs/format.md"
SEED = 0x57494E44
Array = NDArray[Any]


def documented() -> dict[int, list[str]]:
    """Rows of the document's table of actions: number -> name, bits, levels, scale, offset, rotated."""
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    return {int(number): [cell.strip() for cell in rest.split("|")] for number, rest in rows}


def number(data: Array) -> int:
    return int.from_bytes(data.tobytes(), "little")


def code_width(bits: str, row: int) -> int:
    """2 and 3 in turn of "2.5"; 2 of "2"."""
    whole, half, _ = bits.partition(".5")
    return int(whole) + (row % 2 if half else 0)


def read_codes(column: Array, rows: int, bits: str) -> list[int]:
    if bits == "1.6":
        return [int(column[row // 5]) // 3 ** (row % 5) % 3 for row in range(rows)]
    stream, result, place = number(column), [], 0
    for row in range(rows):
        width = code_width(bits, row)
        result.append(stream >> place & (1 << width) - 1)
        place += width
    return result


def read_states(codes: list[int], bits: str, window: int) -> list[int]:
    streams = math.ceil(len(codes) / 512)
    tile = math.ceil(len(codes) / streams)
    tile += tile % 2
    result = []
    for start in range(0, len(codes), tile):
        part = codes[start : start + tile]
        widths = [code_width(bits, row) for row in range(start, start + len(part))]
        stream = sum(code << sum(widths[:row]) for row, code in enumerate(part))
        before = stream >> sum(widths) - window if len(part) % 2 == 0 and sum(widths) >= window else 0
        ring = stream << window | before
        result += [ring >> sum(widths[: row + 1]) & (1 << window) - 1 for row in range(len(part))]
    return result


def hadamard(size: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def rotation(width: int) -> Array:
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(SEED)).numpy() * 2 - 1
    matrix, start = np.zeros((width, width)), 0
    for size in [1 << bit for bit in range(16, -1, -1) if width >> bit & 1]:
        matrix[start : start + size, start : start + size] = hadamard(size)
        start += size
    return signs[:, None] * matrix


def read_linear(name: str, quantization: dict[str, Any], tensors: dict[str, Array]) -> Array:
    _, rows, columns, group, text = quantization["linears"][name]
    names = [action for run in text.split() for action in [run.split("*")[0]] * int((run + "*1").split("*")[1])]
    stored = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
    table = documented()
    assert [table[int(entry)][0] for entry in stored["actions"]] == names
    protected = min(columns, round(quantization["protected"] * columns))
    widths = [min(quantization["chunk"], columns - start) for start in range(protected, columns, quantization["chunk"])]

    labels = len(widths) + bool(protected)
    bits = max(1, math.ceil(math.log2(labels)))
    chunk_of = np.array(read_codes(tensors[f"{group}.order"], columns, str(bits)))
    states = 1 << quantization["window"]
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / states) for i in range(states)])
    quantiles /= math.sqrt((quantiles**2).mean())
    values = quantiles[torch.randperm(states, generator=torch.Generator().manual_seed(SEED)).numpy()]

    weight = np.full((rows, columns), np.nan)
    if protected:
        weight[:, chunk_of == len(widths)] = (stored["protected"] * stored["protected_scales"][:, None].astype(float)).T
    base, step = (float(value) for value in stored["scale_grid"])
    place = scales = offsets = 0
    for chunk in sorted(range(len(names)), key=lambda chunk: (int(stored["actions"][chunk]), chunk)):
        action, width_bits, levels, has_scale, has_offset, rotated = table[int(stored["actions"][chunk])]
        bits = sum(code_width(width_bits, row) for row in range(rows)) if width_bits != "1.6" else 0
        length = math.ceil(bits / 8 if bits else rows / 5)
        found = np.empty((rows, widths[chunk]))
        for column in range(widths[chunk]):
            data = stored["codes"][place : place + length]
            place += length
            if action == "skip":
                found[:, column] = np.frombuffer(data.tobytes(), "<f2")
                continue
            codes = read_codes(data, rows, width_bits)
            if action.startswith("trellis"):
                found[:, column] = values[read_states(codes, width_bits, quantization["window"])]
            else:
                found[:, column] = np.array(codes) - (int(levels) - 1) / 2
        if has_offset == "yes":
            found += stored["offsets"][offsets][:, None].astype(float) * int(levels) / 256
            offsets += 1
        if has_scale == "yes":
            code = np.array(read_codes(stored["scales"][scales], rows, "4"))
            logs = base + stored["row_scales"] / 16 + float(stored["chunk_scales"][chunk]) + step * (code - 7.5)
            found *= (2.0**logs)[:, None]
            scales += 1
        weight[:, chunk_of == chunk] = found @ rotation(widths[chunk]).T if rotated == "yes" else found
    assert place == len(stored["codes"])
    return weight


def test_a_reader_written_from_the_document(whole: Made) -> None:
    quantization = json.loads((whole.folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(whole.folder / "model.safetensors")
    for name in quantization["linears"]:
        expected = whole.model.get_submodule(name).weight.detach().numpy()
        np.testing.assert_allclose(read_linear(name, quantization, tensors), expected, rtol=1e-4, atol=1e-5)


def test_the_documented_actions_are_those_of_the_registry() -> None:
    table = documented()
    assert [row[0] for row in table.values()] == list(actions())
    assert list(table) == list(range(len(table)))
    for name, bits, levels, scale, offset, rotated in table.values():
        entry = actions()[name]
        assert float(bits) == (1.6 if name == "scalar-1.5" else entry.bits)
        assert levels in ("", "2^window states", str(getattr(entry, "levels", "")))
        assert (scale, offset, rotated) == tuple(
            "yes" if flag else "no" for flag in (entry.has_scale, entry.has_offset, entry.rotated)
        )
