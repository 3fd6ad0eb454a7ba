"""The machine code of compiled.py, kept in a file of its own and called without numba.

To import numba and let it load functions that it has cached takes 0.2 s and 140 MB: more than half of all else that
loading a small model takes. So numba compiles once on a machine, and what it made is kept as an object file in
`$XDG_CACHE_HOME/windquant` (or `~/.cache/windquant`), under a name that tells sources, versions and processors apart.
Where that folder cannot be written every process compiles for itself, which takes two seconds.
"""

import ctypes
import hashlib
import mmap
import platform
import struct
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
#: ELF's numbers of a processor; of sections with content, symbols, relocations; of x86-64's relocations by distance.
X86_64, CONTENT, SYMBOLS, RELOCATIONS, DISTANCES = 62, 1, 2, 4, (2, 4)
LOADED = 2  # flag of sections that have a place in memory

_lock = Lock()
_loaded: list[Any] = []  # what holds machine code; never let go


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
    linked = link(elf)
    if linked is None:
        return _load_by_llvm(elf)
    image, entry = linked
    memory = mmap.mmap(-1, len(image), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(image)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    length, rights = ctypes.c_size_t(len(image)), mmap.PROT_READ | mmap.PROT_EXEC
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), length, rights):
        return _load_by_llvm(elf)
    _loaded.append(memory)
    return start + entry


def _load_by_llvm(elf: bytes) -> int:
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(elf))
    engine.finalize_object()
    _loaded.append(engine)
    return int(engine.get_function_address(ENTRY))


def link(elf: bytes) -> tuple[bytes, int] | None:
    """The loaded sections of an object file, one behind the other, and where in them the function begins.

    None if it is not for x86-64, or needs more than distances between its sections. LLVM can link those too, but to
    load LLVM takes 15 ms and 50 MB.
    """
    if elf[:4] != b"\x7fELF" or struct.unpack_from("<H", elf, 18) != (X86_64,):
        return None
    (table,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + size * index) for index in range(count)]
    image, places = bytearray(), {}  # the places of sections in the image
    for index, (_, kind, flags, _, start, length, _, _, align, _) in enumerate(sections):
        if kind == CONTENT and flags & LOADED:
            image += bytes(-len(image) % align)
            places[index] = len(image)
            image += elf[start : start + length]
    entry, symbols = None, []  # the places of symbols
    for _, kind, _, _, start, length, names, _, _, _ in sections:
        if kind == SYMBOLS:
            for name, _, _, section, value, _ in struct.iter_unpack("<IBBHQQ", elf[start : start + length]):
                symbols.append(places[section] + value if section in places else None)
                if elf.startswith(ENTRY.encode() + b"\0", sections[names][4] + name):
                    entry = symbols[-1]
    for _, kind, _, _, start, length, _, target, _, _ in sections:
        if kind == RELOCATIONS and target in places:
            for offset, info, addend in struct.iter_unpack("<QQq", elf[start : start + length]):
                symbol = symbols[info >> 32]
                if symbol is None or info & 0xFFFFFFFF not in DISTANCES:
                    return None
                here = places[target] + offset
                struct.pack_into("<i", image, here, symbol + addend - here)
    return None if entry is None else (bytes(image), entry)
