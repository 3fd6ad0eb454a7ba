"""The processor as Linux describes it, without importing torch: manifests and the workflow's estimates ask too."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Instructions that make a processor compute in another order or precision.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Processor:
    maker: str  # lower case; empty where Linux does not say
    flags: frozenset[str]  # what it can, lower case

    @property
    def instructions(self) -> list[str]:
        """Those of INSTRUCTIONS that it has."""
        return [name for name in INSTRUCTIONS if name in self.flags]

    @property
    def fast_bfloat16(self) -> bool:
        """Whether BF16 matrix products take less time than FP32 ones: with AMX, or AVX512-BF16 that is not Intel's.

        With Intel's they take twice as long (docs/decisions.md).
        """
        return "amx_bf16" in self.flags or ("avx512_bf16" in self.flags and "intel" not in self.maker)


def described(text: str) -> Processor:
    """The processor of a /proc/cpuinfo."""
    maker = ""
    flags: set[str] = set()
    for line in text.lower().splitlines():
        if line.startswith(("flags", "features")):
            flags.update(line.split())
        elif line.startswith("vendor_id"):
            maker = line.split()[-1]
    return Processor(maker, frozenset(flags))


@cache
def this() -> Processor:
    """This machine's; one without a name and instructions where Linux does not say."""
    try:
        return described(Path("/proc/cpuinfo").read_text())
    except OSError:
        return described("")
