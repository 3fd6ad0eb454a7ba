"""A decoder's proportions, as its config.json describes them, without loading anything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from windquant.errors import WindquantError

#: What configurations call a proportion; the usual name comes first.
NAMES = {
    "layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "hidden": ("hidden_size", "d_model", "n_embd", "n_embed"),
    "heads": ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads"),
    "intermediate": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
}


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json describes it."""

    layers: int
    hidden: int
    intermediate: int
    queries: int  # rows of q_proj
    keys: int  # rows of k_proj and of v_proj
    vocabulary: int
    tied: bool  # the head is the embedding

    @classmethod
    def of(cls, config: Mapping[str, Any], where: object) -> "Shape":
        """From the document of a config.json; WindquantError naming a key that is missing."""
        config = config.get("text_config") or config
        try:
            heads, hidden = _entry(config, "heads"), _entry(config, "hidden")
            width = config.get("head_dim") or hidden // heads
            return cls(
                layers=_entry(config, "layers"),
                hidden=hidden,
                intermediate=_entry(config, "intermediate", 4 * hidden),
                queries=heads * width,
                keys=(config.get("num_key_value_heads") or heads) * width,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WindquantError(f"{where}: no configuration of a decoder ({error!r})") from error

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Rows and columns of the linears of one layer."""
        h, i = self.hidden, self.intermediate
        return [(self.queries, h), (self.keys, h), (self.keys, h), (h, self.queries), (i, h), (i, h), (h, i)]

    #: Of each of these, the first one that reads the same input.
    OWNERS: ClassVar = (0, 0, 0, 3, 4, 4, 6)

    @property
    def inputs(self) -> list[int]:
        """Columns of the groups of one layer: what a covariance is taken of."""
        return [self.hidden, self.queries, self.hidden, self.intermediate]

    @cached_property
    def layer(self) -> int:
        """Weights of one layer's linears."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def weights(self) -> int:
        """Weights of all linears that are quantized."""
        return self.layers * self.layer

    @property
    def outside(self) -> int:
        """Parameters outside of the decoder layers."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.weights + self.outside + 2 * self.layers * self.hidden

    def units(self, chunk: int) -> int:
        return self.layers * sum(-(-columns // chunk) for _, columns in self.linears)


def _entry(config: Mapping[str, Any], proportion: str, otherwise: int | None = None) -> int:
    """The highest value, where layers differ; KeyError where there is none."""
    found = next((value for name in NAMES[proportion] if (value := config.get(name)) is not None), otherwise)
    if found is None:
        raise KeyError(NAMES[proportion][0])
    return int(max(found)) if isinstance(found, list) else int(found)


#: Not made yet, so without a config.json: wheels of PyPI hold them.
EMBEDDED = {
    "smollm2-135m": Shape(30, 576, 1536, 576, 192, 49152, True),
    "gemma3-270m": Shape(18, 640, 2048, 1024, 256, 262144, True),
}
UNKNOWN = Shape(16, 2048, 8192, 2048, 512, 128256, True)


def known(entry: Mapping[str, Any]) -> Shape | None:
    """The shape of a model of the configuration, if there is a config.json on this machine that gives it."""
    folders = [Path("resources/models") / entry["name"]]
    if entry.get("path"):
        folders.append(Path(str(entry["path"])).expanduser())
    for folder in folders:
        if (folder / "config.json").is_file():
            try:
                return read(folder / "config.json")
            except WindquantError:  # the step `model` says what is wrong with it, if anything is
                return None
    return EMBEDDED.get(entry["name"]) if entry.get("source") == "embedded" else None


def read(path: Path) -> Shape:
    """The shape that a config.json describes."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WindquantError(f"{path}: not a readable configuration ({error})") from error
    return Shape.of(document, path)
