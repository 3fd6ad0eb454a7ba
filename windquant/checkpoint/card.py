"""The model card of a packed checkpoint."""

from collections.abc import Mapping
from typing import Any

from windquant.packed import Layout
from windquant.plan import Plan
from windquant.quantizers import actions


def shares(layouts: Mapping[str, Layout]) -> dict[str, float]:
    """Share of the weights per action, cheapest first; `protected` are the INT8 columns."""
    counts = dict.fromkeys([*actions(), "protected"], 0)
    for layout in layouts.values():
        counts["protected"] += layout.protected * layout.linear.rows
        for name, width in zip(layout.names, layout.widths, strict=True):
            counts[name] += width * layout.linear.rows
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items() if count}


def quality(result: Mapping[str, Any]) -> str:
    """What a result of the workflow says of perplexity and zero-shot accuracy, as a section of the card."""
    lines = ["", "## Quality", "", "| | original | quantized |", "|---|---|---|"]
    for data, found in result["perplexity"].items():
        lines.append(f"| perplexity, {data} | {found['original']:.2f} | {found['quantized']:.2f} |")
    for task, found in result["zero_shot"].items():
        lines.append(
            f"| accuracy, {task} ({found['samples']} samples) | {found['original']:.3f} | {found['quantized']:.3f} |"
        )
    return "\n".join([*lines, ""])


def making(result: Mapping[str, Any], command: str) -> str:
    """How a result was made, as a section of the card: the command, its seed, and which configuration it needs."""
    return (
        f"## How it was made\n\n    {command}\n\nwith seed {result['seed']}, under the configuration with the digest "
        f"`{result['config_sha256']}`.\n"
    )


def card(
    plan: Plan,
    layouts: Mapping[str, Layout],
    effective_bits: float,
    checkpoint_bits: float,
    measured_bytes: int,
    result: Mapping[str, Any] | None = None,
    command: str = "",
) -> str:
    """README.md of the checkpoint; with the result of its evaluation also what that found, and the `command` for it.

    A checkpoint is written before it is evaluated, so that its own card has no `result` yet.
    """
    evaluated = "" if result is None else f"{quality(result)}\n{making(result, command)}"
    form = next(iter(layouts.values())).format
    rows = "\n".join(f"| {name} | {share:.1%} |" for name, share in shares(layouts).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- windquant
- quantized
---

# {plan.model} at {effective_bits:.3f} bits

`{plan.model}`, quantized by WINDQuant: every chunk of {form.chunk} input
channels of a linear weight has a width of its own, chosen by the `{plan.allocator}` allocator.

| | |
|---|---|
| effective bits (all stored tensors of the quantized linears) | {effective_bits:.4f} |
| target bits | {plan.target_bits:g} |
| checkpoint bits (whole file, all parameters) | {checkpoint_bits:.4f} |
| bytes of the quantized linears | {measured_bytes:,} |
| weights quantized | {plan.weights:,} |
| seed of the plan | {plan.seed} |

Share of the quantized weights per action (`protected`: the most salient columns, in 8 bits):

| action | share |
|---|---|
{rows}

The whole plan is in `plan.json`; `python -m windquant inspect .` prints it per layer.
{evaluated}
## Use

```python
import windquant  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
```

or `python -m windquant generate . "Once upon a time"`.
"""
