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
class Job:
    output: str
    command: list[str]
    reason: str  # Snakemake's, without what follows from other jobs; empty if nothing else is left


@dataclass(frozen=True)
class Plan:
    """The jobs that targets need now, in the order in which they would run."""

    rules: dict[str, int]  # rule -> number of jobs
    jobs: dict[str, Job]  # by output

    @property
    def text(self) -> str:
        """E.g. "recovery, perplexity (2), result"."""
        return ", ".join(rule if count == 1 else f"{rule} ({count})" for rule, count in self.rules.items())


def plan(root: Path, targets: Sequence[str]) -> Plan:
    """Raises WindquantError with Snakemake's own reason if there is no way to make the targets."""
    options = ["--dry-run", "--printshellcmds", "--nolock", "--cores", "1", "--quiet", "host"]
    command = [sys.executable, "-m", "snakemake", *options, "--", *targets]
    done = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("error: ")), " ".join(lines[-3:]))
        raise WindquantError(reason.removeprefix("error: "))
    table = done.stdout.partition("Job stats:")[2].partition("total ")[0]
    rules = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    jobs, reason = {}, ""
    for line in done.stdout.splitlines():
        if line.startswith("Reason: "):
            parts = line.removeprefix("Reason: ").split("; ")
            reason = "; ".join(part for part in parts if not part.startswith("Input files updated by another job"))
        elif line.startswith("Shell command: "):
            words = shlex.split(line.removeprefix("Shell command: ").partition(" 2>&1 |")[0])
            output = flags(words)["output"]
            jobs[output], reason = Job(output, words, reason), ""
    return Plan(rules, jobs)


def flags(command: Sequence[str]) -> dict[str, str]:
    """{"steps": "30"} of [..., "--steps=30"] and of [..., "--steps", "30"]."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = [value] if value else []
        elif name:
            found[name].append(word)
    return {name: " ".join(values) for name, values in found.items()}
