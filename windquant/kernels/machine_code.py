"""The machine code of compiled.py, kept in a file of its own and called without numba.

Importing numba and letting it load its cached functions takes a third of a second and 85 MB: as long as all else that
loading a small model takes. So numba compiles once on a machine, and what it made is written as an object file to
`$XDG_CACHE_HOME/windquant` (or `~/.cache/windquant`), under a name that tells the source, the versions of numba and
llvmlite and the processor apart. Where that folder cannot be written, every process compiles for itself: seconds more.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from windquant import atomic

SOURCE = Path(__file__).with_name("compiled.py")
ENTRY = b"windquant_decode"
DIGEST = 32  # bytes of SHA-256, the first of a file
#: Of ELF: a section that is loaded, one of relocations, the symbols; x86-64, and its relocations that are distances.
LOADED, RELOCATIONS, SYMBOLS = 1, 4, 2
X86_64, RELATIVE = 62, (2, 4)


def decoder(bits: int) -> Callable[..., None]:
    """`compiled.decode` of weights of 16 or 32 bits; arrays are given as addresses, and the GIL is let go."""
    with _lock:  # threads that need it at the same time do not all compile
        return _decoder(bits)


_lock = threading.Lock()


@lru_cache(maxsize=2)
def _decoder(bits: int) -> Callable[..., None]:
    address = _load(_kept(_path(bits), lambda: _compile(bits)))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 10, *[ctypes.c_int64] * 9)(address)


def _path(bits: int) -> Path | None:
    """Where the object file is kept; None where there is no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    parts = (SOURCE.read_text(), Path(__file__).read_text(), version("numba"), version("llvmlite"), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return cache / "windquant" / f"decode{bits}-{key[:32]}.o"


def _processor() -> str:
    """What the kernel says about the first processor, without what changes from one moment to the next."""
    with Path("/proc/cpuinfo").open() as file:
        lines = file.read(1 << 14).partition("\n\n")[0].splitlines()
    return "\n".join([platform.machine(), *(line for line in lines if "MHz" not in line and "bogomips" not in line)])


def _kept(path: Path | None, make: Callable[[], bytes]) -> bytes:
    """The content of a file that `make` has filled once; a damaged or missing one is made again."""
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
            pass  # a folder that cannot be written
    return content


def _compile(bits: int) -> bytes:
    """An object file that needs nothing else: numba's own checks and counts vanish once everything is inlined."""
    from llvmlite import binding

    from windquant.kernels import compiled

    callback = compiled.callback(bits)
    module = binding.parse_assembly(callback.inspect_llvm())
    for part in (*module.functions, *module.global_variables):
        if part.name == callback.native_name:
            part.name = ENTRY.decode()
        elif not part.is_declaration:
            part.linkage = "internal"
    machine = _machine()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.inlining_threshold = 1 << 20
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    outside = [part.name for part in (*module.functions, *module.global_variables) if part.is_declaration]
    if outside := [name for name in outside if not name.startswith("llvm.")]:
        raise AssertionError(f"compiled.py needs {', '.join(outside)}, which are numba's")
    return machine.emit_object(module)


def _machine() -> Any:
    """LLVM's idea of this processor, for code that may lie anywhere."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3, reloc="pic", codemodel="small"
    )


def _load(elf: bytes) -> int:
    """The address of the function in an object file, as part of this process from now on."""
    linked = link(elf)
    if linked is None:
        return _load_by_llvm(elf)
    image, entry = linked
    memory = mmap.mmap(-1, len(image), mmap.MAP_PRIVATE)
    memory.write(image)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start), len(image), mmap.PROT_READ | mmap.PROT_EXEC):
        return _load_by_llvm(elf)
    _images.append(memory)
    return start + entry


_images: list[mmap.mmap] = []  # never let go


def _load_by_llvm(elf: bytes) -> int:
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(elf))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(ENTRY.decode())


_engines: list[Any] = []


def link(elf: bytes) -> tuple[bytes, int] | None:
    """The loaded sections of an object file, side by side, and where in them the function is.

    None for another processor than x86-64, or where more is needed than distances between sections. LLVM could do it
    for all, but to load LLVM takes 15 ms and 50 MB.
    """
    (machine,) = struct.unpack_from("<H", elf, 18)
    if machine != X86_64:
        return None
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + size * index) for index in range(count)]
    image, places = bytearray(), {}
    for index, (_, kind, flags, _, start, length, _, _, align, _) in enumerate(sections):
        if kind == LOADED and flags & 2:
            image += bytes(-len(image) % max(align, 1))
            places[index] = len(image)
            image += elf[start : start + length]
    entry = None
    symbols = []
    for _, kind, _, _, start, length, names, _, _, _ in sections:
        if kind == SYMBOLS:
            for at in range(start, start + length, 24):
                name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
                symbols.append(places[section] + value if section in places else None)
                if elf[sections[names][4] + name :].startswith(ENTRY + b"\0"):
                    entry = symbols[-1]
    for _, kind, _, _, start, length, _, target, _, _ in sections:
        if kind == RELOCATIONS and target in places:
            for at in range(start, start + length, 24):
                offset, info, addend = struct.unpack_from("<QQq", elf, at)
                symbol = symbols[info >> 32]
                if symbol is None or info & 0xFFFFFFFF not in RELATIVE:
                    return None
                place = places[target] + offset
                struct.pack_into("<i", image, place, symbol + addend - place)
    return None if entry is None else (bytes(image), entry)
