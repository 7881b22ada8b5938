"""Language models of Hugging Face's transformers, with random weights: compressed, run, trained and stored."""

import copy

import pytest
import torch
import transformers
from conftest import assert_close
from safetensors.torch import load_file

import gmcompress as gm
from gmcompress.attaching import structured
from gmcompress.kinds import layouts_of

TOKENS = 40
DECODER = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def bert(cls=transformers.BertForSequenceClassification):
    return cls(
        transformers.BertConfig(
            vocab_size=TOKENS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            num_labels=3,
        )
    )


def llama(*, tied):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            tie_word_embeddings=tied,
            **DECODER,
        )
    )


def gpt2(*, tied=False):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=TOKENS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def mixtral():
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            num_local_experts=4,
            **DECODER,
        )
    )
    model.set_experts_implementation("eager")  # the other one knows no float64
    return model


MODELS = {
    "bert": (bert, {"budget": "70%"}),
    "llama": (lambda: llama(tied=False), {"budget": "70%"}),
    "llama, tied": (lambda: llama(tied=True), {"budget": "70%"}),
    "mixtral": (mixtral, {"budget": "50%"}),
    "gpt2": (gpt2, {"budget": "97%", "include": "lm_head"}),  # not tied: at least the head is a linear layer of its own
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().double().eval()


def batch():
    tokens = torch.randint(2, TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.fixture(scope="module", params=[(name, way) for name in MODELS for way in ("rank", "budget")], ids=" ".join)
def subject(request):
    """The name of a network, and the result of compressing it."""
    name, way = request.param
    options = MODELS[name][1]
    if way == "rank":
        options = {"rank": 1} | {key: value for key, value in options.items() if key != "budget"}
    return name, gm.compress(build(name), "C4xC4", inputs=batch(), **options)


def test_the_outputs_keep_their_form(subject):
    name, result = subject
    assert structured(result.model)
    assert result.report.after.parameters < result.report.before.parameters
    dense, small = build(name)(**batch()), result.model(**batch())
    assert type(small) is type(dense)
    assert list(small) == list(dense)
    assert small.logits.shape == dense.logits.shape
    assert small.logits.isfinite().all()
    labels = torch.zeros_like(batch()["input_ids"])
    assert result.model(**batch(), labels=labels[:, 0] if name == "bert" else labels).loss.isfinite()


def test_densified_models_compute_the_same(subject):
    name, result = subject
    dense = gm.densify(result.model)
    assert not structured(dense)
    assert_close(result.model(**batch()).logits, dense(**batch()).logits)
    if name != "bert":
        chosen = {**batch(), "max_new_tokens": 8, "do_sample": False}
        found = result.model.generate(**chosen)
        assert found.shape == (2, 15)
        assert torch.equal(found, dense.generate(**chosen))


def test_the_disk(subject, tmp_path):
    name, result = subject
    gm.save(result, tmp_path / "small")
    loaded = gm.load(tmp_path / "small", build(name))
    assert structured(loaded).keys() == structured(result.model).keys()
    assert torch.equal(loaded(**batch()).logits, result.model(**batch()).logits)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (loaded, result.model)]
    assert sizes[0] == sizes[1], "a tie that is lost counts twice"


def test_gradients_reach_every_factor(subject):
    result = subject[1]
    model = copy.deepcopy(result.model).train()
    model(**batch()).logits.square().sum().backward()
    layers = structured(model)
    assert layers
    for each in layers.values():
        for part in each.parameters(recurse=False):
            assert part.grad is not None
            assert part.grad.isfinite().all()
    assert any(part.grad.any() for each in layers.values() for part in each.parameters(recurse=False))
    with torch.no_grad():
        for each in model.parameters():
            each.sub_(each.grad if each.grad is not None else 0, alpha=1e-3)
    assert not torch.equal(model.eval()(**batch()).logits, result.model(**batch()).logits)


def test_the_matrices_of_all_experts_are_one():
    """Found by the name of the class, in both orders of the axes."""
    sites = {site.name: site for site in gm.trace(build("mixtral"), batch())}
    experts = sites["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.shape, experts.obstacle) == ((4 * 2 * 64, 32), "")
    turned = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts
    assert layouts_of(turned)["down_proj"] == "oio"
    assert layouts_of(transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter) == {}


TIED = {
    "llama": lambda: llama(tied=True),
    "gpt2": lambda: gpt2(tied=True),
    "bert": lambda: bert(transformers.BertForMaskedLM),
}


@pytest.mark.parametrize("name", TIED)
def test_what_is_tied_stays_tied_in_the_hands_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = TIED[name]().double().eval()
    small = gm.compress(model, "C4xC4", rank=1).model
    expected, held = small(**batch()).logits, [id(each) for each in small.parameters()]
    for each in (small, copy.deepcopy(small)):
        each.tie_weights()
        each.resize_token_embeddings(TOKENS)
        assert torch.equal(each(**batch()).logits, expected)
        assert len(list(each.parameters())) == len(held)
    assert [id(each) for each in small.parameters()] == held
    small.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(each.numel() for each in stored.values() if each.is_floating_point()) == stored_parameters(small)
    with pytest.raises(gm.GMError, match="would be lost"):
        small.resize_token_embeddings(TOKENS + 8)
    head, words = small.get_output_embeddings(), small.get_input_embeddings()
    assert head.structured_weight.same_as(words.structured_weight)
    (table,) = (key for key, each in structured(small).items() if each is words.structured_weight)
    plain = gm.densify(small, [table])
    plain.resize_token_embeddings(TOKENS + 8)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert_close(plain(**batch()).logits[..., :TOKENS], expected)
    gm.densify(small).tie_weights()
    model.tie_weights()


def stored_parameters(model):
    return sum(each.numel() for each in model.parameters())
