"""Every kernel compiles for Hopper, GPU or not: Triton's interpreter forgives what its compiler does not."""

import os
from typing import Any

import pytest
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from windquant.kernels import dequantize, product, quantize
from windquant.kernels.launches import IDS, PROTECTED
from windquant.quantizers.scalar import LARGEST_OFFSET

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

SHARED = {"ALIGN": 8, "WINDOW": 12, "STORED": tl.float16}
TABLES = {
    "tasks": "*i64", "linears": "*i64", "linear": "*i64", "units": "*i64", "actions": "*i64", "blocks": "*i64",
    "splits": "*i64", "table": "*fp32", "one": "i32", "partial": "*fp32", "rotations": "*fp32", "order": "*i32",
    "depths": "*i32", "factors": "*fp32",
    "out": "*bf16", "x": "*bf16", "batch": "i32", "columns": "i32", "height": "i32", "protected": "i32",
}  # fmt: skip
CHUNK = {
    "columns": "*fp32", "energy": "*fp32", "clips": "*fp32", "scales": "*fp32", "offsets": "*fp32", "weights": "*fp32",
    "feedback": "*fp32", "table": "*fp32", "codes": "*u8", "decoded": "*fp32", "errors": "*fp32", "previous": "*u8",
    "packed": "*u8", "rows": "i32", "width": "i32", "tile": "i32", "side": "i32", "stride": "i32",
}  # fmt: skip
ONE = SHARED | {"STEP": 8, "VECTOR": True, "PADDED": 16, "GROUPS": 64}
SOME = SHARED | {"STEP": 32, "VECTOR": False, "PADDED": 16, "GROUPS": 8}
PREPARE = {"SIZE": 192, "SIDE": 256, "PADDED": 16}
FIT = {"LEVELS": 4, "OFFSET": True, "CLIPS": 12, "ROUNDS": 2, "LARGEST": LARGEST_OFFSET, "BLOCK": 16}
MIXED = 1 << IDS["scalar-2"] | 1 << IDS["trellis-1.5"]
REST = {name: 1 << IDS[name] for name in ("trellis-2.5", "trellis-3.5", "trellis-4", "scalar-1.5", "scalar-3", "skip")}
REST["protected"] = 1 << PROTECTED
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "prepare one": (product.prepare, TABLES | {"prepared": "*fp32"}, PREPARE | {"VECTOR": True}),
    "prepare some": (product.prepare, TABLES | {"prepared": "*bf16"}, PREPARE | {"VECTOR": False}),
    "product of one": (product.product, TABLES | {"prepared": "*fp32"}, ONE | {"PRESENT": MIXED}),
    "product of some": (product.product, TABLES | {"prepared": "*bf16"}, SOME | {"PRESENT": MIXED}),
    "product, unaligned": (product.product, TABLES | {"prepared": "*fp32"}, ONE | {"PRESENT": MIXED, "ALIGN": 1}),
    **{
        f"product, {name}": (product.product, TABLES | {"prepared": "*fp32"}, ONE | {"PRESENT": present})
        for name, present in REST.items()
    },
    "reduce": (product.reduce, TABLES, {"DEPTH": 64, "BLOCK": 32}),
    **{
        f"decode, {size} columns": (
            dequantize.decode,
            TABLES,
            SHARED | {"SIZE": size, "SIDE": 1 << stages, "STAGES": stages, "GROUPS": groups, "PRESENT": MIXED},
        )
        for size, stages, groups in ((64, 6, 8), (192, 8, 2), (576, 10, 1))
    },
    **{f"fit, {side} columns": (quantize.fit, CHUNK, FIT | {"SIDE": side}) for side in (64, 256, 1024)},
    "fit, one column": (quantize.fit, CHUNK, FIT | {"SIDE": 1, "width": 1}),  # arguments that are 1 become constants
    "encode, one column": (
        quantize.encode, CHUNK, {"LEVELS": 4, "OFFSET": True, "SIDE": 1, "BLOCK": 16, "width": 1}
    ),
    "search, one column": (
        quantize.search, CHUNK, {"EVEN": 1, "ODD": 2, "WINDOW": 12, "BLOCK": 512, "width": 1}
    ),
    **{
        f"encode, {side} columns": (
            quantize.encode, CHUNK, {"LEVELS": 4, "OFFSET": True, "SIDE": side, "BLOCK": 16}
        )
        for side in (64, 256, 1024)
    },
    "pack": (quantize.pack, CHUNK, {"EVEN": 1, "ODD": 2, "BLOCK": 256}),
    **{
        f"search, window {window}": (
            quantize.search, CHUNK, {"EVEN": 1, "ODD": 2, "WINDOW": window, "BLOCK": 512}
        )
        for window in (12, 14)
    },
    "decode, window 14": (
        dequantize.decode,
        TABLES,
        SHARED | {"WINDOW": 14, "SIZE": 64, "SIDE": 64, "STAGES": 6, "GROUPS": 8, "PRESENT": MIXED},
    ),
}  # fmt: skip
EXACT = ("fit", "encode", "search")
MOST_SHARED = 232_448  # bytes of shared memory that a block may have on Hopper


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles(name: str) -> None:
    kernel, types, constants = KERNELS[name]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    assert constants.keys() == {argument for argument, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    options: dict[str, Any] = {"num_warps": 2 if constants.get("VECTOR") else 4}
    if name.startswith(EXACT):
        options["enable_fp_fusion"] = False
    try:
        source = ASTSource(
            kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()}, aligned
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except RuntimeError as error:
        if "ptxas" in str(error) and "Cannot find" in str(error):
            pytest.skip(f"this Triton has no assembler: {error}")
        raise
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= MOST_SHARED
    code = compiled.asm["ptx"]
    if name.startswith(EXACT):
        assert "fma.rn.f32" not in code, "a fused multiply-add rounds otherwise than the reference"
