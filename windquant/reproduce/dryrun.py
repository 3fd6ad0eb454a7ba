"""What Snakemake would run for a target, by a dry run."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from windquant.errors import WindquantError


@dataclass(frozen=True)
class Plan:
    """The jobs that a target needs now."""

    rules: dict[str, int]  # rule -> number of jobs
    commands: dict[str, list[str]]  # artifact -> the command that would make it

    @property
    def text(self) -> str:
        """E.g. "recovery, perplexity (2), result"."""
        return ", ".join(rule if count == 1 else f"{rule} ({count})" for rule, count in self.rules.items())


def plan(root: Path, targets: Sequence[str]) -> Plan:
    """Raises WindquantError with Snakemake's own reason if there is no way to make the targets."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--nolock", "--cores", "1", "--", *targets]
    done = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("error: ")), " ".join(lines[-3:]))
        raise WindquantError(reason.removeprefix("error: "))
    table = done.stdout.partition("Job stats:")[2].partition("total ")[0]
    rules = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    commands = {}
    for line in done.stdout.splitlines():
        if line.startswith("Shell command: "):
            words = shlex.split(line.removeprefix("Shell command: ").partition(" 2>&1 |")[0])
            commands[words[words.index("--output") + 1]] = words
    return Plan(rules, commands)
