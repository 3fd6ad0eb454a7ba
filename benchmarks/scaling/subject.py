"""A random Llama of one of SIZES and a random text for it.

python -m benchmarks.scaling.subject FOLDER SIZE SAMPLES LENGTH
"""

import json
import math
import sys
from pathlib import Path

#: hidden, intermediate, layers, heads
SIZES = {
    "nothing": (64, 128, 1, 2),
    "10M": (256, 704, 12, 4),
    "40M": (512, 1408, 12, 8),
    "135M": (768, 2112, 18, 12),
    "500M": (1280, 3456, 24, 20),
    "shallow": (512, 1408, 6, 8),
    "deep": (512, 1408, 24, 8),
}
VOCABULARY = 8192
RECORDS = 32  # of the zero-shot task, of 64 tokens


def make_model(folder: Path, size: str) -> None:
    """A random Llama in float16, with a tokenizer that knows its alphabet."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, intermediate, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=1 / math.sqrt(hidden),
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({letter(index): index for index in range(VOCABULARY)}, unk_token=letter(0)))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=letter(0)).save_pretrained(folder)


def letter(index: int) -> str:
    """The word of a token."""
    return chr(0x4E00 + index)


def make_text(folder: Path, samples: int, length: int) -> None:
    """The artifact of the calibration step, of random tokens."""
    import torch
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(0)
    counts = {"calibration": samples, "reward": 4, "recovery": 8, "test": 4}
    tokens = {
        name: torch.randint(VOCABULARY, (n, length), generator=chance, dtype=torch.int32) for name, n in counts.items()
    }
    folder.mkdir(parents=True)
    save_file(tokens, folder / "tokens.safetensors")
    (folder / "info.json").write_text(json.dumps({"test_name": "random"}))
    rows = torch.randint(VOCABULARY, (RECORDS, 64), generator=chance).tolist()
    records = [{"context": "".join(map(letter, row[:-1])), "target": letter(row[-1])} for row in rows]
    (folder / "cloze.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    make_text(Path(sys.argv[1]) / "text", int(sys.argv[3]), int(sys.argv[4]))
    make_model(Path(sys.argv[1]) / "model", sys.argv[2])
