"""A tiny random model, a tiny trained tokenizer and a few hundred paragraphs, shared by all tests.

Tests run offline and on one thread each: pytest-xdist uses the cores.
"""

import hashlib
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

ADJECTIVES = "old small bright distant quiet northern heavy narrow famous wooden early silver broken public".split()
NOUNS = "river bridge garden market teacher engine castle forest letter harbour valley library painter winter".split()
VERBS = "crossed reached described followed replaced divided protected measured carried remembered opened".split()
TIMES = "in the spring,after the war,before the harvest,during the long winter,every second year,at the time".split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The workflow's files first: each takes minutes in one process, and the short ones fill the gaps at the end.

    The first of them makes the clone that the others copy (`finished_once`); until it is there, the second process
    works at those that need none.
    """
    sharing = [str(item.path) for item in items if "finished_once" in getattr(item, "fixturenames", ())]

    def order(item: pytest.Item) -> int:
        path = str(item.path)
        if not item.nodeid.startswith("tests/workflow/"):
            return 3
        if path not in sharing:
            return 1
        return 0 if path == sharing[0] else 2

    items.sort(key=order)


def sentence(chance: random.Random) -> str:
    """60 to 130 characters that end in a noun."""
    first, second, third = chance.sample(NOUNS, 3)
    time, number = chance.choice(TIMES), chance.randint(2, 90)
    forms = (
        f"The {chance.choice(ADJECTIVES)} {first} {chance.choice(VERBS)} the {chance.choice(ADJECTIVES)} {second} "
        f"{time}, and nobody {chance.choice(VERBS)} the {third}.",
        f"{time.capitalize()} about {number} people {chance.choice(VERBS)} the {first} near the {second}, "
        f"which was {chance.choice(ADJECTIVES)} like the {third}.",
        f"A {chance.choice(ADJECTIVES)} {first} with {number} rooms {chance.choice(VERBS)} the {second} {time} because "
        f"of the {chance.choice(ADJECTIVES)} {third}.",
    )
    return chance.choice(forms)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 documents of four paragraphs of five sentences, separated by blank lines; about 50,000 tiny tokens."""
    chance = random.Random(0)
    documents = ["\n".join(" ".join(sentence(chance) for _ in range(5)) for _ in range(4)) for _ in range(80)]
    path = tmp_path_factory.mktemp("text") / "paragraphs.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Hugging Face folder of a random float16 Llama: 2 layers, hidden 48, intermediate 80, 4 heads over 2, vocab 320.

    No usual chunk divides 48 or 80. Never write to it: every test of the session shares it.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    trained = ByteLevelBPETokenizer()
    trained.train([str(text_file)], vocab_size=320, show_progress=False, special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], Any]:
    """Function (member, content) -> WheelFile: a wheel `wqtestdata==1.0` that holds one file, where pip finds it."""
    from windquant.sources import Part, WheelFile

    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def make(member: str, content: bytes) -> WheelFile:
        information = "wqtestdata-1.0.dist-info"
        with zipfile.ZipFile(folder / "wqtestdata-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)
            archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: wqtestdata\nVersion: 1.0\n")
            archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{information}/RECORD", "")
        part = Part("wqtestdata", "1.0", member)
        return WheelFile(member.rpartition("/")[2], (part,), hashlib.sha256(content).hexdigest(), "MIT")

    return make


@pytest.fixture
def copy(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))
