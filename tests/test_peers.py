"""The peers' rows: a real peer measured, peers that fail for real, the table and the picture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers import collect, environment, frame, ours, page, row
from benchmarks.peers.recipes import RECIPES, Recipe
from benchmarks.peers.with_rtn import round_to_nearest
from tests import paper_tasks
from tests.families import save_calibration, token_ids
from windquant import calibration, models
from windquant.evaluation.perplexity import perplexity
from windquant.manifest import Manifest

RTN = Recipe("RTN", "2 bits", "rtn", {"bits": 2, "group_size": 32})
UNINSTALLABLE = Recipe("nobody", "2 bits", "rtn", {}, "uninstallable")
CRASHING = Recipe("RTN", "no options", "rtn", {})


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_calibration(tmp_path_factory.mktemp("peers") / "calibration", token_ids(32, 24))


@pytest.fixture(scope="module")
def rows(tiny_model_folder: Path, articles: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, row.Row]:
    """One peer after the other, as the Snakefile asks for them."""
    folder = tmp_path_factory.mktemp("environments")
    tasks = tmp_path_factory.mktemp("tasks")
    assert paper_tasks.write(tasks, 2) == list(row.TASKS)
    texts = row.Texts(articles, wikitext2=articles, tasks=tasks)
    (folder / "uninstallable.txt").write_text("no-such-peer-of-windquant==1.0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")  # pip says no at once, network or not
        return {
            recipe.peer + recipe.recipe: row.measure(recipe, tiny_model_folder, texts, folder, locks=folder)
            for recipe in (UNINSTALLABLE, CRASHING, RTN)
        }


def test_a_peer_that_cannot_be_installed_leaves_its_reason(rows: dict[str, row.Row]) -> None:
    found = rows["nobody2 bits"]
    assert found["reason"].startswith("cannot be installed: ")
    assert "no-such-peer-of-windquant==1.0" in found["reason"]
    assert found["bits"] is found["perplexity"] is found["seconds"] is None


def test_a_peer_that_crashes_leaves_its_reason(rows: dict[str, row.Row]) -> None:
    assert rows["RTNno options"]["reason"].startswith("exit code 1: TypeError: round_to_nearest() missing")
    assert rows["RTNno options"]["perplexity"] is None


def test_a_peer_that_takes_too_long_is_stopped(tiny_model_folder: Path, articles: Path, tmp_path: Path) -> None:
    found = row.measure(RTN, tiny_model_folder, row.Texts(articles), tmp_path, hours=0.01 / 3600)
    assert found["reason"].startswith("stopped after ")


def test_the_others_are_measured(rows: dict[str, row.Row], tiny_model_folder: Path, articles: Path) -> None:
    found = rows["RTN2 bits"]
    assert found["reason"] is None
    assert found["bits"] == pytest.approx(2 + (16 + 2) / 32, abs=0.01)
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 1e8
    original = perplexity(models.load(tiny_model_folder), calibration.load(articles).test).perplexity
    assert found["perplexity"] != pytest.approx(original, rel=1e-4)
    assert found["wikitext2"] == found["perplexity"]  # the same text here
    assert found["accuracy"] * len(row.TASKS) == pytest.approx(
        round(found["accuracy"] * len(row.TASKS))
    )  # of each: 0, 1


@pytest.mark.parametrize("minimum", [False, True])
def test_rounding_to_nearest_keeps_to_its_levels(minimum: bool) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    stored = round_to_nearest("w", weight, 2, 32, minimum)
    groups = stored.weight.reshape(-1, 32)
    assert all(len(group.unique()) <= 4 for group in groups)
    width = (weight.reshape(-1, 32).amax(1) - weight.reshape(-1, 32).amin(1)) / 3
    assert ((weight - stored.weight).reshape(-1, 32).abs().amax(1) <= width * 1.01).all()
    assert stored.bytes == 8 * 64 * 2 // 8 + 16 * (32 if minimum else 18) // 8


# -- what the scripts share


def stored(folder: Path, leave: int = 0) -> list[frame.Stored]:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(frame.decoder_weights(tensors))[leave:]
    return [frame.Stored(name.removesuffix(".weight"), tensors[name].float() * 0.5, 10) for name in names]


def test_the_checkpoint_has_the_peers_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    linears = stored(tiny_model_folder)
    found = frame.write(tiny_model_folder, linears, tmp_path)
    assert found == {"bytes": 10 * len(linears), "weights": sum(linear.weight.numel() for linear in linears)}
    before, after = load_file(tiny_model_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        factor = 0.5 if name in frame.decoder_weights(before) else 1
        assert torch.equal(after[name], weight.to(after[name].dtype) * factor)
    models.load(tmp_path)


@pytest.mark.parametrize("problem", ["missing", "shape", "nan"])
def test_a_weight_that_is_not_what_it_should_be_is_refused(
    tiny_model_folder: Path, tmp_path: Path, problem: str
) -> None:
    linears = stored(tiny_model_folder, leave=1 if problem == "missing" else 0)
    first = linears[0]
    wrong: dict[str, Tensor] = {"shape": first.weight[:, :-1], "nan": first.weight * torch.nan}
    if problem in wrong:
        linears[0] = frame.Stored(first.name, wrong[problem], 10)
    with pytest.raises(ValueError, match=r"proj\.weight"):
        frame.write(tiny_model_folder, linears, tmp_path)


def test_decoding_by_the_identity_gives_the_weight() -> None:
    linear = torch.nn.Linear(5, 3, bias=False)
    assert torch.equal(frame.decoded(linear, 5), linear.weight)


# -- recipes, table, picture


def test_every_environment_is_pinned() -> None:
    for name, recipe in RECIPES.items():
        assert (Path(row.__file__).parent / f"with_{recipe.script}.py").is_file(), name
        if recipe.environment is not None:
            lines = (environment.LOCKS / f"{recipe.environment}.txt").read_text().splitlines()
            packages = [line for line in lines if not line.startswith("#")]
            assert packages
            assert all("==" in line for line in packages), name
            assert "torch==2.13.0" in packages


OURS = [
    {"peer": "original", "recipe": "", "bits": 16.0, "perplexity": 18.98},
    {"peer": "windquant", "recipe": "2 bits, ppo, before recovery", "bits": 2.0, "perplexity": 41.0},
    {"peer": "windquant", "recipe": "2 bits, ppo, recovered", "bits": 2.0, "perplexity": 31.5, "wikitext2": 29.25},
]


def test_table_and_picture(rows: dict[str, row.Row], tmp_path: Path) -> None:
    for number, found in enumerate(rows.values()):
        (tmp_path / f"{number}.json").write_text(json.dumps(found))
    (tmp_path / "ours.json").write_text(json.dumps(OURS))
    document = tmp_path / "peers.md"
    document.write_text(f"# Peers\n\n{page.BEGIN}\nold\n{page.END}\n\nMore.\n")
    results = tmp_path / "results.json"
    collect.main([str(tmp_path / f"{number}.json") for number in range(3)] + ["--output", str(results)])
    picture = tmp_path / "peers.png"
    page.main([str(results), "--ours", str(tmp_path / "ours.json"), "--page", str(document), "--picture", str(picture)])
    text = document.read_text()
    assert text.startswith("# Peers\n\n")
    assert text.endswith("\n\nMore.\n")
    assert "old" not in text
    assert "| **windquant** | 2 bits, ppo, recovered | 2.000 | 31.50 | 29.25 |" in text
    assert "| nobody | 2 bits | cannot be installed: " in text
    assert text.index("31.50") < text.index("41.00") < text.index("| RTN | 2 bits |") < text.index("18.98")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "peers.md").write_text("# Peers\n")
    (tmp_path / "rows.json").write_text(json.dumps(OURS))
    rows = str(tmp_path / "rows.json")
    with pytest.raises(SystemExit, match=r"peers\.md"):
        page.main([rows, "--ours", rows, "--page", str(tmp_path / "peers.md"), "--picture", str(tmp_path / "x.png")])
    assert (tmp_path / "peers.md").read_text() == "# Peers\n"


def test_our_rows_come_from_results(tmp_path: Path) -> None:
    result = {
        "model": "m",
        "target_bits": 2.0,
        "allocator": "ppo",
        "effective_bits": 1.9999,
        "perplexity": {"wikipedia": {"original": 19.0, "before_recovery": 41.0, "quantized": 31.5}},
        "seconds": {"statistics": 1, "bank": 2, "allocation": 3, "quantize": 4, "recovery": 5, "zero_shot": 100},
        "peak_memory_bytes": {"allocation": {"host": 7, "gpu": 0}, "recovery": {"host": 9, "gpu": 0}},
    }
    shared = {stage: {"path": f"data/checkpoints/{stage}", "sha256": ""} for stage in ours.STAGES}

    def rows(name: str) -> list[row.Row]:
        path = tmp_path / name
        Manifest("result", {}, 0, shared, {}, 0.0, {}, {}, None, None, None).save(path)
        return ours.of_result(path, result)

    before, after = rows("m_2.0bits.json")
    assert (before["perplexity"], before["seconds"], before["peak_memory_bytes"]) == (41.0, 10, 7)
    assert (after["perplexity"], after["seconds"], after["peak_memory_bytes"]) == (31.5, 15, 9)
    assert (before["checkpoint"], after["checkpoint"]) == (
        "data/checkpoints/before_recovery",
        "data/checkpoints/quantized",
    )
    assert after["recipe"] == "2 bits, ppo, recovered"
    assert after["bits"] == 1.9999
    for variant in ("ppo-chunk32", "ppo-1", "lagrangian-standard-1"):  # the result says ppo
        changed, _ = rows(f"m_2bits.{variant}.json")
        assert changed["recipe"] == f"2 bits, {variant}, before recovery"
    with pytest.raises(SystemExit, match=r"some\.json"):
        ours.of_result(Path("results/some.json"), result)
