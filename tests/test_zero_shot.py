"""Zero-shot: the records made from articles, lm-eval's scores against our own, local files in the Hub's columns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests import paper_tasks
from tests.families import FullGpu, memory_for
from windquant import calibration, compute, memory, models, step, streaming
from windquant.articles import Article
from windquant.decoder import decoder_layers
from windquant.errors import WindquantError
from windquant.evaluation import local, tasks, zero_shot
from windquant.evaluation.perplexity import token_losses
from windquant.evaluation.tasks import cloze_records, next_sentence_records, sentences


@pytest.fixture(scope="module")
def articles(text_file: Path) -> list[Article]:
    documents = text_file.read_text().strip().split("\n\n")[:12]
    return [Article(f"T{number}", text.split("\n")) for number, text in enumerate(documents)]


# -- records


def test_sentences_are_not_cut_at_abbreviations_and_initials() -> None:
    text = "Mr. Smith met J. K. Rowling in St. Louis. It was 5 p.m. on a cold day! \n “Why?” he asked (again). The end."
    assert sentences(text) == [
        "Mr. Smith met J. K. Rowling in St. Louis.",
        "It was 5 p.m. on a cold day!",
        "“Why?” he asked (again).",
        "The end.",
    ]


def test_cloze_asks_for_a_word_that_the_context_mentions(articles: list[Article]) -> None:
    records = cloze_records(articles, 30)
    assert len(records) == 30
    assert cloze_records(articles, 30) == records
    texts = {article.title: article.text.replace("\n\n", " ") for article in articles}
    for record in records:
        assert f"{record['context']} {record['target']}." in texts[record["title"]]
        words = record["context"].split()
        assert record["target"] in record["context"]
        assert record["target"] != words[-1]
    assert len({record["title"] for record in records}) == 12  # drawn evenly


def test_next_sentence_has_one_true_choice_and_no_telling_position(articles: list[Article]) -> None:
    records = next_sentence_records(articles, 60)
    texts = {article.title: article.text.replace("\n\n", " ") for article in articles}
    for record in records:
        truth = record["choices"][record["label"]]
        assert f"{record['context']} {truth}" in texts[record["title"]]
        assert len(set(record["choices"])) == 4
        for choice in record["choices"]:
            assert (choice in texts[record["title"]]) == (choice == truth)
            assert 0.8 < len(choice) / len(truth) < 1.25 or choice == truth
    counts = [sum(record["label"] == label for record in records) for label in range(4)]
    assert min(counts) > 5, counts


def test_articles_without_sentences_give_no_records() -> None:
    assert cloze_records([Article("A", ["no sentence here"]), Article("B", [])], 5) == []
    assert next_sentence_records([Article("A", ["One. Two. Three."])], 5) == []


def test_records_come_from_enough_articles_and_none_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def article(number: int) -> Article:
        lines = [f"Sentence {n} of story {number} tells what the people of the valley did in spring." for n in range(4)]
        return Article(f"{number}", [" ".join(lines)])

    articles = [article(number) for number in range(60)]
    assert len({record["title"] for record in next_sentence_records(articles, 1000)}) == 60
    monkeypatch.setattr(tasks, "ENOUGH", 10 * len(articles[0].text))
    assert len({record["title"] for record in next_sentence_records(articles, 1000)}) == 11
    assert next_sentence_records(articles, 0) == cloze_records(articles, 0) == []


# -- scores


@pytest.fixture(scope="module")
def artifact(tiny_model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero_shot") / "calibration"
    argv = f"--model {tiny_model_folder} --output {folder} --source file --path {text_file} --samples 1 --length 64"
    argv += " --reward-samples 2 --recovery-samples 1 --context 64 --cloze-records 20 --next-sentence-records 20"
    step.main("calibration", calibration.run, calibration.Settings, ("model",), argv=argv.split())
    return folder


def evaluate(model: Path, artifact: Path, output: Path, *flags: str) -> dict[str, Any]:
    argv = ["--checkpoint", str(model), "--calibration", str(artifact), "--output", str(output), *flags]
    step.main("zero_shot", zero_shot.run, zero_shot.Settings, ("checkpoint", "calibration"), argv=argv)
    scores: dict[str, Any] = json.loads(output.read_text())
    return scores


def test_scores_are_those_of_our_own_likelihoods(
    tiny_model_folder: Path,
    artifact: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compute, "native_bfloat16", lambda: False)  # as our own are
    capfd.readouterr()  # what the fixtures have written
    scores = evaluate(tiny_model_folder, artifact, tmp_path / "x.json", "--limit", "12")
    assert "it/s]" not in capfd.readouterr().err  # a log is no place for lm-eval's bars
    assert scores.keys() == {"cloze", "next_sentence"}
    model, tokenizer = models.load(tiny_model_folder), models.load_tokenizer(tiny_model_folder)

    def loss(context: str, continuation: str) -> float:
        whole = tokenizer(f"{context} {continuation}").input_ids
        losses = token_losses(model, torch.tensor([whole]))
        return float(losses[0, len(tokenizer(context).input_ids) - 1 :].sum())

    records = [json.loads(line) for line in (artifact / "next_sentence.jsonl").read_text().splitlines()[:12]]
    right = 0
    for record in records:
        losses = [loss(record["context"], choice) for choice in record["choices"]]
        right += losses.index(min(losses)) == record["label"]
    found = scores["next_sentence"]
    assert found["accuracy"] == pytest.approx(right / 12)
    assert found["stderr"] == pytest.approx((right / 12 * (1 - right / 12) / 11) ** 0.5)
    assert (found["samples"], found["metric"]) == (12, "acc")


@pytest.mark.parametrize("native", [True, False])
def test_products_are_bfloat16_where_they_are_native(
    native: bool, tiny_model_folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "native_bfloat16", lambda: native)
    seen = set()

    def watch(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.add(out.dtype)

    with nn.modules.module.register_module_forward_hook(watch):
        evaluate(tiny_model_folder, artifact, tmp_path / "x.json", "--limit", "2")
    assert seen == {torch.bfloat16 if native else torch.float32}


def test_a_streamed_model_scores_the_same_with_one_layer_in_memory(
    tiny_model_folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny_model_folder, artifact, tmp_path / "whole.json", "--limit", "12")
    size = 4 * streaming.open_source(tiny_model_folder).parameters
    monkeypatch.setenv(memory.LIMIT, memory_for(0.9 * size))
    most = []
    call = LlamaDecoderLayer.forward

    def counted(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        most.append(sum(not parameter.is_meta for layer in layers(self) for parameter in layer.parameters()))
        return call(self, *arguments, **options)

    def layers(layer: nn.Module) -> list[nn.Module]:
        return next(list(found) for found in lists if layer in found)

    lists: list[nn.ModuleList] = []
    load = streaming.load

    def remembered(*arguments: Any) -> Any:
        model = load(*arguments)
        lists.append(decoder_layers(model)[1])
        return model

    monkeypatch.setattr(streaming, "load", remembered)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    streamed = evaluate(tiny_model_folder, artifact, tmp_path / "streamed.json", "--limit", "12")
    assert streamed == whole
    assert most
    assert set(most) == {9}, "the weights of one layer: seven linears and two norms"


def test_a_batch_that_does_not_fit_is_halved(
    tiny_model_folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks are asked again from the start."""
    whole = evaluate(tiny_model_folder, artifact, tmp_path / "whole.json", "--limit", "12")
    gpu = FullGpu(monkeypatch, 2)
    assert evaluate(tiny_model_folder, artifact, tmp_path / "small.json", "--limit", "12") == whole
    assert sorted(set(gpu.sizes)) == [2, 4, 8]


def test_a_call_that_ended_half_way_does_no_harm(tiny_model_folder: Path) -> None:
    whole, streamed = models.load(tiny_model_folder), streaming.load(tiny_model_folder)
    ids = torch.arange(20)[None]
    with torch.no_grad(), streaming.on_call(streamed):
        _, layers = decoder_layers(streamed)
        broken = layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamed(ids)
        broken.remove()
        for _ in range(2):
            assert torch.equal(streamed(ids).logits, whole(ids).logits)
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_metric_by_length_where_a_task_has_it(tiny_model_folder: Path, artifact: Path, tmp_path: Path) -> None:
    scores = evaluate(tiny_model_folder, artifact, tmp_path / "x.json", "--limit", "2", "--metric", "acc_norm")
    assert (scores["cloze"]["metric"], scores["next_sentence"]["metric"]) == ("acc", "acc_norm")


def test_no_tasks_is_an_empty_document(tiny_model_folder: Path, artifact: Path, tmp_path: Path) -> None:
    assert evaluate(tiny_model_folder, artifact, tmp_path / "x.json", "--tasks", "") == {}


def test_the_papers_tasks_run_from_local_files(tiny_model_folder: Path, artifact: Path, tmp_path: Path) -> None:
    names = paper_tasks.write(tmp_path, 3)
    scores = evaluate(
        tiny_model_folder, artifact, tmp_path / "x.json", "--tasks", ",".join(names), "--data-dir", str(tmp_path)
    )
    assert list(scores) == names
    for score in scores.values():
        assert score["samples"] == 3
        assert score["accuracy"] in (0.0, 1.0)
        assert score["stderr"] == 0.0


def test_the_files_of_tasks_are_known_beforehand(tmp_path: Path) -> None:
    for name in ("piqa.validation", "arc_easy.test", "arc_easy.train"):
        (tmp_path / f"{name}.jsonl").touch()
    found = local.of_tasks(["cloze", "piqa", "arc_easy"], str(tmp_path))
    assert [Path(file).name for file in found] == [
        "piqa.validation.jsonl",
        "arc_easy.train.jsonl",
        "arc_easy.test.jsonl",
    ]
    assert local.of_tasks(["piqa"], "") == []  # read from the Hub
    (tmp_path / "boolq.train.jsonl").touch()  # nothing to measure on
    with pytest.raises(WindquantError, match=r"has no boolq\.test\.jsonl or boolq\.validation\.jsonl; put the rows"):
        local.of_tasks(["piqa", "boolq"], str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "no_such_task"), ("evaluation.tasks", "no_such_task")),
        (("--tasks", "mmlu"), ("evaluation.tasks", "mmlu", "no groups")),
        (("--tasks", "piqa", "--data-dir", "nowhere"), ("evaluation.data_dir", "piqa.validation.jsonl")),
        (("--tasks", "piqa", "--data-dir", "{folder}"), ("evaluation.data_dir", "piqa", "columns")),
        (("--tasks", "boolq"), ("evaluation.tasks", "boolq", "evaluation.data_dir")),
    ],
)
def test_wrong_keys_are_named(
    tiny_model_folder: Path,
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    (tmp_path / "piqa.validation.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(SystemExit) as stop:
        evaluate(tiny_model_folder, artifact, tmp_path / "x.json", *(flag.format(folder=tmp_path) for flag in flags))
    assert stop.value.code == 2
    assert not (tmp_path / "x.json").exists()
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert all(word in line for word in words), line


def test_a_tokenizer_that_begins_no_text_is_refused(
    tiny_model_folder: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        evaluate(folder, artifact, tmp_path / "x.json", "--tasks", "cloze")
    assert "neither BOS nor EOS" in capsys.readouterr().err
    assert evaluate(folder, artifact, tmp_path / "x.json", "--tasks", "") == {}


def test_missing_records_are_named(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        evaluate(tiny_model_folder, tmp_path / "empty", tmp_path / "x.json")
    assert "cloze needs held-out articles" in capsys.readouterr().err


def test_a_task_that_measures_no_accuracy_is_refused_before_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "2 #### 2"}))
    with pytest.raises(WindquantError, match=r"gsm8k measures no accuracy \(acc\) but exact_match"):
        zero_shot.load_tasks({"gsm8k": {"train": file, "test": file}}, tmp_path)
