"""Text that the original model writes itself, for recoveries with more steps than their text has windows.

A model's own text is as good a text as any to distil it with (LLM-QAT, arXiv 2305.17888), and there is no end of it.
Every window goes on from a few tokens of recovery's text, so that it is about the same things; each next token is drawn
from the model's distribution as it is, nothing cut off.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

PROMPT = 64  # tokens of recovery's text that a window begins with, at most a quarter of it
BATCH = 128  # windows at a time


def beginnings(texts: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """Token ids int64 [count, prompt], each from a random place of a random window of texts [n, length]."""
    length = min(PROMPT, max(1, texts.shape[1] // 4))
    rows = torch.randint(len(texts), (count, 1), generator=chance)
    first = torch.randint(texts.shape[1] - length + 1, (count, 1), generator=chance)
    return texts[rows, first + torch.arange(length)]


@torch.no_grad()
def continued(
    model: PreTrainedModel, prompts: Tensor, length: int, chance: torch.Generator, update: Callable[[int], object]
) -> Tensor:
    """Token ids int64 [n, length] that begin with prompts [n, p] and go on as the model has it.

    `update` is called with the number of new tokens.
    """
    windows = latest = prompts
    cache = DynamicCache(config=model.config)
    while windows.shape[1] < length:
        found = model(input_ids=latest.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        latest = drawn(found.logits[:, -1], chance)
        windows = torch.cat([windows, latest], 1)
        update(len(windows))
    return windows


def drawn(logits: Tensor, chance: torch.Generator) -> Tensor:
    """A token [n, 1] of each of the distributions whose logits [n, vocabulary] are given, by their inverse.

    On the CPU: a GPU's cumulative sums are not the same twice.
    """
    sums = logits.float().cpu().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, torch.rand(len(sums), 1, generator=chance) * sums[:, -1:])
