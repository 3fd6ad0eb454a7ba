"""Commands for people: `python -m windquant <command> --help`.

The steps of the workflow are modules of their own (`python -m windquant.recovery`). A command is a module with a
function `main(arguments)`; a new one takes a line in COMMANDS.
"""

import importlib
import os
import signal
import sys

from windquant.errors import reported

COMMANDS = {  # name: module, what it does
    "quantize": ("windquant.own_model", "quantize a model of your own: a checkpoint with its card, in one line"),
    "doctor": ("windquant.doctor", "what this machine can do, and which ready models fit"),
    "inspect": ("windquant.checkpoint.inspection", "size, effective bits and plan of a packed checkpoint"),
    "check": ("windquant.integrity", "compare every artifact of the workflow with its digest"),
    "sync": ("windquant.sender", "send the runs that the MLflow store has not got yet"),
    "estimate": ("windquant.estimate", "time, memory and disk that a result will take, step by step"),
    "generate": ("windquant.checkpoint.generation", "continue a text with a model, token by token"),
    "publish": ("windquant.checkpoint.publishing", "upload a packed checkpoint to the Hugging Face Hub, with its card"),
    "push": ("windquant.reproduce.push", "send data/ and the results to the DVC remote"),
    "pull": ("windquant.reproduce.pull", "get them, and the models they were made from"),
    "verify": ("windquant.reproduce.verify", "make results again from the configuration and compare"),
    "why": ("windquant.reproduce.why", "how an artifact came about, and whether it is current"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m windquant <command> ...", "", *lines, "", "--help after a command says more."])


def main(arguments: list[str]) -> int:
    """Run a command; the exit code is 2 for bad input, whose reason is one line on stderr."""
    if arguments[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        print(usage(), file=sys.stderr)
        return 2
    module, _ = COMMANDS[arguments[0]]
    try:
        importlib.import_module(module).main(arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left for the exit to flush
        return 128 + signal.SIGPIPE
    except BaseException as error:
        if (code := reported(error, arguments[0])) is None:
            raise
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
