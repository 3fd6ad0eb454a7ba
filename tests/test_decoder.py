"""The walk through the decoder layers against the model's own forward pass, for five architectures."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from tests.checkpoint.making import ARCHITECTURES
from tests.families import family, token_ids
from windquant.decoder import Enough, check_share, decoder_layers, embed, head, inputs, quantizable, run_layer, watch
from windquant.errors import WindquantError


def walk(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits by way of embed, run_layer and head."""
    _, layers = decoder_layers(model)
    hidden, calls = embed(model, ids)
    for layer, call in zip(layers, calls, strict=True):
        hidden = run_layer(layer, hidden, call)
    return head(model, ids, hidden)


@torch.no_grad()
def check(model: PreTrainedModel) -> None:
    ids = token_ids(2, 21)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(walk(model, ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    _, layers = decoder_layers(model)
    assert not any("forward" in vars(layer) for layer in layers), "the layers have their own forward again"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_by_layer_equals_the_model(name: str) -> None:
    check(family(name))


@pytest.mark.parametrize("name", ["bloom", "falcon", "mpt", "gptj"])
def test_layers_that_return_tuples(name: str) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_dim": 8, "vocab_size": 320}
    config = AutoConfig.for_model(name, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    check(model)
    linears = quantizable(model)
    assert len(linears) >= 8
    assert {linear.layer for linear in linears} == {0, 1}


def test_every_layer_gets_its_own_mask_and_positions() -> None:
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
    check(model)
    _, calls = embed(model, token_ids(2, 21))
    local, whole, again = (call.kwargs["attention_mask"] for call in calls)
    assert torch.equal(local, again)
    assert whole is None or not torch.equal(local, whole)
    local, whole, again = (call.kwargs["position_embeddings"][0] for call in calls)
    assert torch.equal(local, again)
    assert not torch.equal(local, whole)


def multimodal() -> Gemma3ForConditionalGeneration:
    """Three layers for texts, five for pictures."""
    config = Gemma3Config(
        text_config={
            "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 12,
            "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=319, boi_token_index=318, eoi_token_index=317,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()


def test_of_a_multimodal_model_the_layers_of_its_text_model_count() -> None:
    model = multimodal()
    prefix, layers = decoder_layers(model)
    assert (prefix, len(layers)) == ("model.language_model.layers", 3)
    check(model)
    assert len(quantizable(model)) == 3 * 7


def test_layers_that_share_weights_are_refused() -> None:
    model = family("llama")
    check_share(model)
    model.all_tied_weights_keys["model.layers.1.mlp.up_proj.weight"] = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(WindquantError, match=r"share model\.layers\.1\.mlp\.up_proj\.weight"):
        check_share(model)


def test_layers_that_depend_on_others_are_refused() -> None:
    model = family("llama")
    model.config.num_kv_shared_layers = 1  # Gemma 3n, Gemma 4
    with pytest.raises(WindquantError, match=r"read the keys and values of others"):
        check_share(model)

    wide = family("llama")
    wide.model.embed_tokens.register_forward_hook(lambda module, args, out: out.expand(4, *out.shape))
    with pytest.raises(WindquantError, match=r"hand on tensors of \(4, 1, 2, 48\), not one state a token"):
        embed(wide, torch.tensor([[1, 2]]))


def test_forwards_come_back_after_an_error() -> None:
    model = family("llama")
    with pytest.raises(IndexError):
        embed(model, torch.full((1, 2), -1))  # no such token
    check(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_that_read_the_same_input_share_a_group(name: str) -> None:
    model = family(name)
    linears = quantizable(model)
    kinds = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert [(linear.layer, linear.kind) for linear in linears] == [(layer, kind) for layer in (0, 1) for kind in kinds]
    for linear in linears:
        module = model.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        assert tuple(module.weight.shape) == (linear.rows, linear.columns)
        assert linear.name == f"model.layers.{linear.layer}.{linear.name.split('.')[3]}.{linear.kind}"
    for layer in (0, 1):
        groups: dict[str, list[str]] = {}
        for linear in linears:
            if linear.layer == layer:
                groups.setdefault(linear.group, []).append(linear.kind)
        assert {group.rsplit(".", 1)[1]: members for group, members in groups.items()} == {
            "q_proj": ["q_proj", "k_proj", "v_proj"],
            "o_proj": ["o_proj"],
            "gate_proj": ["gate_proj", "up_proj"],
            "down_proj": ["down_proj"],
        }


def test_a_linear_that_never_runs_has_a_group_of_its_own() -> None:
    model = family("llama")
    _, layers = decoder_layers(model)
    for layer in layers:
        layer.spare = nn.Linear(48, 8)
    spare = [linear for linear in quantizable(model) if linear.kind == "spare"]
    assert [linear.group for linear in spare] == ["model.layers.0.spare", "model.layers.1.spare"]


def test_watch_sees_inputs_and_outputs_only_inside_the_block() -> None:
    model = family("qwen2")
    _, layers = decoder_layers(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        hidden, calls = embed(model, token_ids(1, 6))
        with watch(layers[0], lambda name, x, out: seen.update({name: (x, out)})):
            run_layer(layers[0], hidden, calls[0])
        assert set(seen) == {name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)}
        for name, (x, out) in seen.items():
            assert torch.equal(layers[0].get_submodule(name)(x), out)
        seen.clear()
        run_layer(layers[0], hidden, calls[0])
    assert not seen


def test_inputs_are_seen_until_the_last_linear_which_is_not_computed() -> None:
    model = family("llama")
    _, layers = decoder_layers(model)
    names = [name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear)]
    wanted = ["self_attn.o_proj", "mlp.gate_proj"]
    everything: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    computed: list[str] = []
    for name in names:
        layers[0].get_submodule(name).register_forward_hook(lambda *_, name=name: computed.append(name))
    with torch.no_grad():
        hidden, calls = embed(model, token_ids(1, 6))
        with watch(layers[0], lambda name, x, _: everything.update({name: x})):
            run_layer(layers[0], hidden, calls[0])
        computed.clear()
        with inputs(layers[0], wanted, lambda name, x: seen[name].append(x)):
            for _ in range(2):
                with pytest.raises(Enough):
                    run_layer(layers[0], hidden, calls[0])
        assert [len(seen[name]) for name in wanted] == [2, 2]
        assert all(torch.equal(x, everything[name]) for name in wanted for x in seen[name])
        assert not any(seen[name] for name in names if name not in wanted)
        assert computed == 2 * [name for name in names if "self_attn" in name]
        run_layer(layers[0], hidden, calls[0])
    assert len(computed) == 8 + len(names), "afterwards it runs to its end"


def test_a_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(WindquantError, match=r"GPT2LMHeadModel: .*nn\.Linear"):
        quantizable(model)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(WindquantError, match="the token 320, the model's vocabulary has 320; make the calibration set"):
        embed(family("llama"), torch.tensor([[1, 320]]))
