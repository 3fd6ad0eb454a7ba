"""The peers and how they are asked."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    peer: str  # as the table calls it
    recipe: str
    script: str  # with_<script>.py
    options: dict[str, Any]  # of the script
    environment: str | None = None  # environments/<name>.txt; none: the environment of windquant
    hours: str = ""  # what is known about a time that nobody waits for: not run unless asked for
    note: str = ""  # for the table


def _hqq(bits: int, group_size: int, axis: int = 1) -> Recipe:
    text = f"{bits} bits, groups of {group_size}" + (" down the rows (axis 0)" if axis == 0 else "")
    return Recipe("HQQ", text, "hqq", {"bits": bits, "group_size": group_size, "axis": axis}, "hqq")


def _gptq(text: str, **options: Any) -> Recipe:
    return Recipe("GPTQ (GPTQModel)", text, "gptq", options, "gptq")


def _autoround(bits: int, iterations: int, hours: str = "", note: str = "", **more: Any) -> Recipe:
    options = {"bits": bits, "group_size": 64, "iters": iterations, **more}
    text = f"W{bits}A16, groups of 64, {iterations} iterations"
    return Recipe("AutoRound", text, "autoround", options, "autoround", hours, note)


def _llamacpp(kind: str) -> Recipe:
    return Recipe("llama.cpp", kind, "llamacpp", {"type": kind.lower()}, "llamacpp")


RECIPES = {
    "rtn-2-64": Recipe("RTN", "2 bits, groups of 64", "rtn", {"bits": 2, "group_size": 64}),
    "rtn-2-64-minimum": Recipe(
        "RTN", "2 bits, groups of 64, FP16 minimum", "rtn", {"bits": 2, "group_size": 64, "minimum": True}
    ),
    "rtn-3-64": Recipe("RTN", "3 bits, groups of 64", "rtn", {"bits": 3, "group_size": 64}),
    "hqq-2-32": _hqq(2, 32),
    "hqq-2-64": _hqq(2, 64),
    "hqq-2-64-axis0": _hqq(2, 64, axis=0),
    "hqq-2-128": _hqq(2, 128),
    "hqq-3-64": _hqq(3, 64),
    "hqq-4-64": _hqq(4, 64),
    "gptq-2-64": _gptq("2 bits, groups of 64", bits=2, group_size=64),
    "gptq-2-32": _gptq("2 bits, groups of 32", bits=2, group_size=32),
    "gptq-2-64-gptaq": _gptq("2 bits, groups of 64, GPTAQ", bits=2, group_size=64, gptaq=0.25),
    "gptq-2-64-asymmetric": _gptq("2 bits, groups of 64, asymmetric", bits=2, group_size=64, sym=False),
    "gptq-2-64-ordered": _gptq(
        "2 bits, groups of 64, asymmetric, columns in order of activation",
        bits=2, group_size=64, sym=False, desc_act=True,
    ),
    "gptq-2-64-searched": _gptq(
        "2 bits, groups of 64, asymmetric, scales searched (mse 2.4)",
        bits=2, group_size=64, sym=False, mse=2.4,
    ),
    "gptq-3-64": _gptq("3 bits, groups of 64", bits=3, group_size=64),
    "gptq-3-64-searched": _gptq(
        "3 bits, groups of 64, asymmetric, scales searched (mse 2.4)",
        bits=3, group_size=64, sym=False, mse=2.4,
    ),
    "autoround-2-50": _autoround(2, 50),
    "autoround-2-200": _autoround(2, 200, note="its defaults"),
    "autoround-2-1000": _autoround(
        2, 1000, hours="an hour and a half on two cores with BF16, more on others", note="its best recipe", compile=True
    ),
    "quanto-int2": Recipe("optimum-quanto", "qint2", "quanto", {"weights": "qint2"}, "quanto"),
    "quanto-int4": Recipe("optimum-quanto", "qint4", "quanto", {"weights": "qint4"}, "quanto"),
    "torchao-int2": Recipe(
        "torchao", "int2, groups of 64", "torchao", {"dtype": "int2", "group_size": 64}, "torchao",
        note="stores every code in a byte",
    ),
    "torchao-int4": Recipe(
        "torchao", "int4, groups of 64", "torchao", {"dtype": "int4", "group_size": 64}, "torchao",
        note="stores every code in a byte",
    ),
    "bitsandbytes-nf4": Recipe(
        "bitsandbytes", "nf4, double quantization", "bitsandbytes", {"type": "nf4", "double": True}, "bitsandbytes",
        note="its lowest width",
    ),
    "llamacpp-q2_0": _llamacpp("Q2_0"),
    "llamacpp-q2_k": _llamacpp("Q2_K"),
    "llamacpp-iq2_xxs": _llamacpp("IQ2_XXS"),
    "llamacpp-iq2_s": _llamacpp("IQ2_S"),
}  # fmt: skip
