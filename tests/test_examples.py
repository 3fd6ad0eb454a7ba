"""The examples in docs/tutorials/extend.md do what they say: each block is taken from the page and used."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.families import Prepared, prepare
from windquant import configuration, models, validation
from windquant.allocation import BASELINES
from windquant.bank import Bank
from windquant.errors import WindquantError
from windquant.evaluation import zero_shot
from windquant.storage import pack

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorials" / "extend.md").read_text()


def example(name: str) -> str:
    found = re.search(rf"^```\w+ example={name}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def module(name: str) -> SimpleNamespace:
    """The names that an example defines."""
    content: dict[str, Any] = {"__name__": name}
    exec(compile(example(name), f"extend.md {name}", "exec"), content)
    return SimpleNamespace(**content)


@pytest.fixture(scope="module")
def prepared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("examples"), tiny_model_folder)


def test_the_allocator_meets_its_budget_and_beats_the_random_one(prepared: Prepared) -> None:
    bank = Bank.load(prepared.bank)
    target = bank.lowest_bits() + 1
    choice = module("allocator").allocate(bank, target)
    assert target - 0.5 < bank.effective_bits(choice) <= target
    assert bank.predicted_loss(choice) < bank.predicted_loss(BASELINES["random"](bank, target, 0))
    assert bank.plan(choice, allocator="perlinear", target_bits=target, seed=0).effective_bits <= target


def test_the_quantizer_keeps_the_promises_of_a_treatment() -> None:
    entry = module("quantizer").Powers()
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn(75, 12, generator=generator) * 0.1
    energy = torch.rand(12, generator=generator) + 0.1
    fit = entry.fit(chunk, energy)
    coded = entry.encode(chunk.T.clone().contiguous(), fit, torch.ones(75), torch.eye(12))
    assert torch.equal(entry.decode(coded.codes, fit), coded.decoded)
    assert torch.equal(entry.unscaled(pack(coded.codes, entry.pattern), 75) * fit.scale[:, None], coded.decoded.T)
    torch.testing.assert_close(((chunk - coded.decoded.T).square() * energy).sum(1), entry.error(chunk, energy))
    assert entry.error(chunk, energy).sum() < 0.1 * (chunk.square() * energy).sum(), "3 bits leave less than a tenth"


def test_the_kernels_refuse_the_quantizer_that_they_do_not_know() -> None:
    """They would read its codes as a scalar one's."""
    from windquant.kernels.decoding import Kind

    with pytest.raises(WindquantError, match="powers-3: the kernels cannot decode it"):
        Kind.of(module("quantizer").Powers())


def test_the_quantizer_makes_up_for_errors() -> None:
    """With correlated channels, error feedback loses less than rounding alone."""
    entry = module("quantizer").Powers()
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 16, generator=generator)
    covariance = mix @ mix.T / 16 + 0.05 * torch.eye(16)
    upper = torch.linalg.cholesky(torch.linalg.inv(covariance), upper=True)
    chunk = torch.randn(64, 16, generator=generator)
    fit = entry.fit(chunk, torch.ones(16))
    losses = []
    for feedback in (upper, torch.eye(16)):
        error = chunk - entry.encode(chunk.T.clone().contiguous(), fit, torch.ones(64), feedback).decoded.T
        losses.append(float(((error @ covariance) * error).sum()))
    assert losses[0] < 0.9 * losses[1]


def test_the_models_entry_resolves() -> None:
    schema = configuration.load(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    resolved = configuration.resolve(validation.validate(yaml.safe_load(example("model")), schema), schema, "my-model")
    assert resolved["model"] == {"name": "my-model", "source": "folder", "path": "local/model"}
    assert (resolved["units"]["chunk"], resolved["recovery"]["steps"]) == (16, 2)
    flags = configuration.flags(resolved, "calibration")
    assert "--path=local/text.txt" in flags


def test_the_task_is_evaluated(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opposites.yaml").write_text(example("task"))
    (tmp_path / "opposites.test.jsonl").write_text(example("records"))
    monkeypatch.setattr(zero_shot.embedded, "DEFINITIONS", tmp_path)
    zero_shot._definitions.cache_clear()
    files = {"opposites": zero_shot.data_files("opposites", tmp_path, str(tmp_path))}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with zero_shot._quiet():
        loaded = zero_shot.load_tasks(files, scratch)
        model, tokenizer = models.load(tiny_model_folder), models.load_tokenizer(tiny_model_folder)
        results = zero_shot.evaluate(model, tokenizer, loaded)
    zero_shot._definitions.cache_clear()
    found = zero_shot.score(results, "opposites", "acc")
    records = [json.loads(line) for line in example("records").splitlines()]
    assert found["samples"] == len(records) == 2
    assert found["accuracy"] in np.arange(3) / 2
