"""The machine code of compiled.py, kept in a file of its own and called without numba.

To import numba and let it load functions that it has cached takes 0.2 s and 140 MB: more than half of all else that
loading a small model takes. So numba compiles once on a machine, and what it made is kept as an object file in
`$XDG_CACHE_HOME/windquant` (or `~/.cache/windquant`), under a name that tells sources, versions and processors apart;
llvmlite links it, which takes 15 ms. Where that folder cannot be written every process compiles for itself, which takes
two seconds.
"""

import ctypes
import hashlib
import platform
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from os import environ
from pathlib import Path
from threading import Lock
from typing import Any

from windquant import atomic

SOURCES = (Path(__file__), Path(__file__).with_name("compiled.py"))
ENTRY = "windquant_decode"
DIGEST = hashlib.sha256().digest_size  # of what follows: the first bytes of a file

_lock = Lock()
_engines: list[Any] = []  # of LLVM, which hold machine code: never let go


def decoder(bits: int) -> Callable[..., None]:
    """`compiled.decode` of weights of 16 or 32 bits; arrays are given as addresses, and the GIL is let go meanwhile."""
    with _lock:  # threads that need it at the same time compile it once
        return _decoder(bits)


@lru_cache(maxsize=2)
def _decoder(bits: int) -> Callable[..., None]:
    address = load(kept(place(bits), lambda: _compile(bits)))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 10, *[ctypes.c_int64] * 9)(address)


def place(bits: int) -> Path | None:
    """Where the object file is kept; None without a home."""
    try:
        folder = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "windquant"
    except RuntimeError:
        return None
    key = hashlib.sha256("\0".join([version("numba"), version("llvmlite"), _processor()]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    return folder / f"decode{bits}-{key.hexdigest()[:32]}.o"


def _processor() -> str:
    """What the kernel says about the first processor, but for its clock."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            lines = file.read(1 << 14).partition("\n\n")[0].splitlines()
    except OSError:  # no Linux
        lines = [platform.processor()]
    return "\n".join([platform.machine(), *(line for line in lines if "mhz" not in line.lower())])


def kept(path: Path | None, make: Callable[[], bytes]) -> bytes:
    """What `make` has returned once; it is called again if the file is missing or damaged."""
    try:
        stored = path.read_bytes() if path else b""
    except OSError:
        stored = b""
    if len(stored) > DIGEST and hashlib.sha256(stored[DIGEST:]).digest() == stored[:DIGEST]:
        return stored[DIGEST:]
    content = make()
    if path is not None:
        try:
            with atomic.output(path) as partial:
                partial.write_bytes(hashlib.sha256(content).digest() + content)
        except OSError:
            pass  # the folder cannot be written
    return content


def _compile(bits: int) -> bytes:
    """An object file that needs nothing but itself.

    numba's counts of references and its ways to raise an exception call its runtime. They vanish once all is inlined,
    because no array here is counted and nothing raises.
    """
    from llvmlite import binding

    from windquant.kernels import compiled

    callback = compiled.callback(bits)
    module = binding.parse_assembly(callback.inspect_llvm())
    parts = [part for part in (*module.functions, *module.global_variables) if not part.is_declaration]
    for part in parts:
        if part.name == callback.native_name:
            part.name = ENTRY
        else:
            part.linkage = "internal"
    machine = _machine()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.inlining_threshold = 1 << 20
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    names = [part.name for part in (*module.functions, *module.global_variables) if part.is_declaration]
    if outside := [name for name in names if not name.startswith("llvm.")]:
        raise AssertionError(f"compiled.py calls {', '.join(outside)}")
    return bytes(machine.emit_object(module))


def _machine() -> Any:
    """This processor, for LLVM; code may lie anywhere."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="pic", codemodel="small")


def load(elf: bytes) -> int:
    """The address of the function in an object file, which is part of this process from now on."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(elf))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(ENTRY))
