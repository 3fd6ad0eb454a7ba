"""Continue a text with a packed checkpoint, or any other local Hugging Face folder; tokens appear as they are made.

python -m windquant generate data/checkpoints/smollm2-135m_2.0bits.ppo/quantized "Once upon a time"
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from windquant.errors import WindquantError


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m windquant generate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a packed checkpoint")
    parser.add_argument("text", help="text to continue")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens to add (default %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token, more draws them (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or not 0 <= options.temperature < math.inf or not 0 <= options.seed < 2**63:
        raise WindquantError("--tokens takes a number above 0, --temperature and --seed one that is not below 0")
    generate(options.checkpoint, options.text, options.tokens, options.temperature, options.seed)


def generate(folder: Path, text: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> None:
    """Print the text and up to `tokens` more, as they come. WindquantError as `windquant.models.load`."""
    import torch
    from transformers import TextStreamer

    from windquant.models import load_for, load_tokenizer, positions

    tokenizer = load_tokenizer(folder)
    model: Any = load_for(folder)  # transformers declares `generate` on a protocol of its own
    if not model.can_generate():
        raise WindquantError(f"{folder}: {type(model).__name__} does not generate text; give a causal language model")
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    if inputs.input_ids.shape[1] == 0:
        raise WindquantError("the text has no tokens; give one that has a word")
    room = (positions(model.config) or sys.maxsize) - inputs.input_ids.shape[1]
    if room < 1:
        raise WindquantError(f"the text has {inputs.input_ids.shape[1]} tokens, as many as the model takes; shorten it")
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.get("attention_mask"),
        num_beams=1,  # tokens are shown as they come
        max_new_tokens=min(tokens, room),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **drawn,
    )
