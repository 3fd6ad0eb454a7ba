"""The errors that a user is meant to read: a line that names what is wrong and what would be right."""

import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterable

#: Problems of the environment that a person can mend, and how.
MENDABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and run again: finished steps stay"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable and run again"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a part of this path is a file; give another path"),
    errno.EFBIG: "lift the limit on file sizes (ulimit -f) and run again",
}


class WindquantError(Exception):
    """Bad input or an unusable environment; the message names the key or file and the remedy."""


def reported(error: BaseException, what: str) -> int | None:
    """Print the line `error: ...` of what a person can mend; the exit code, or None for anything else.

    what: the step or command, named where the error names no file.
    """
    if isinstance(error, WindquantError):
        line, code = " ".join(str(error).split()), 2
    elif isinstance(error, KeyboardInterrupt):
        line, code = "interrupted", 128 + signal.SIGINT
    elif (number := _errno(error)) in MENDABLE:
        line, code = f"{getattr(error, 'filename', None) or what}: {os.strerror(number)}; {MENDABLE[number]}", 2
    else:
        return None
    print("error:", line, file=sys.stderr)
    return code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a message says about an unknown name: the near miss, if there is one."""
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def _errno(error: BaseException) -> int:
    """The operating system's reason; safetensors has it in its text only. 0 where there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
