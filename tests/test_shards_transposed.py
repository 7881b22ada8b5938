"""Weights stored as inputs × outputs: recognised or named, compressed as their transposes, and put back as they lay."""

import json

import pytest
import torch
from checkpoint_files import stored
from conftest import must_fail
from torch import Tensor, nn

import gmcompress as gm
from gmcompress.cli import main
from gmcompress.layers import GMWeight
from gmcompress.shards import describe_shards, fitting


class Turned(nn.Module):
    """A linear layer whose weight is (inputs, outputs)."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows) / columns**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


gm.register(Turned, weight="io")


class Net(nn.Module):
    """Layers of both kinds, some of them square, under the names that GPT-2 has."""

    def __init__(self, first: type[nn.Module] = Turned) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": first(16, 48), "c_proj": Turned(16, 16)})
        self.up = nn.ConvTranspose2d(8, 16, 3)
        self.plain = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.attn["c_attn"](x)[..., :16]
        return self.plain(self.attn["c_proj"](inner)) + self.up(x.reshape(-1, 8, 2, 1)).mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def gpt2(folder, model_type: str = "gpt2"):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


TURNED = ["attn.c_attn", "attn.c_proj"]
OPTIONS = [{}, {"rank": 0, "group": "C4xC2"}, {"residual": "lowrank"}, {"overrides": {"attn.c_attn": "adapted:2:4x2"}}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_weights_are_those_of_compress(options, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "NUMBERS", 200)  # so that weights are fitted in several blocks of rows
    dense = gpt2(stored(net(), tmp_path / "dense"))
    options = {"group": "C8", **options}
    found = gm.compress_shards(dense, tmp_path / "small", transposed=["re:attn[.].*", "up"], **options)
    assert found.transposed == [*TURNED, "up"]
    assert found.shapes["attn.c_attn"] == [48, 16]
    assert found.shapes["up"] == [16, 8, 3, 3]
    expected = gm.compress(net(), **{"rank": 1, **options, "include": ["*"]}).model
    loaded = gm.load_shards(tmp_path / "small", net())
    assert isinstance(loaded.attn["c_attn"].structured_weight, GMWeight)
    for name, each in loaded.state_dict().items():
        torch.testing.assert_close(each, expected.state_dict()[name])
    x = torch.randn(2, 16)
    torch.testing.assert_close(loaded(x), expected(x))
    must_fail(torch.testing.assert_close, loaded(x), net()(x))


def test_a_config_says_which_they_are(tmp_path):
    dense = gpt2(stored(net(), tmp_path / "dense"))
    options = {"group": "C8", "exclude": "up"}
    assert gm.compress_shards(dense, tmp_path / "small", **options).transposed == TURNED
    gm.load_shards(tmp_path / "small", net())
    gpt2(dense, "llama")
    assert gm.compress_shards(dense, tmp_path / "plain", **options).transposed == []
    with pytest.raises(
        gm.GMError, match=r"holds its weight as inputs × outputs, and was compressed as outputs × inputs"
    ):
        gm.load_shards(tmp_path / "plain", net())
    with pytest.raises(gm.GMError, match="another source, or compressed with other settings"):
        gm.compress_shards(dense, tmp_path / "plain", transposed=TURNED, **options)
    one = stored(net(), tmp_path / "one", files=1, index=False)
    assert gm.compress_shards(gpt2(one) / "model-1.safetensors", tmp_path / "a file", **options).transposed == TURNED


def test_a_layer_of_the_other_kind_is_refused(tmp_path):
    dense = stored(net(), tmp_path / "dense")
    gm.compress_shards(dense, tmp_path / "small", group="C8", exclude="up", transposed="*c_*")
    square = Net()
    square.attn["c_proj"] = nn.Linear(16, 16, bias=False)
    with pytest.raises(
        gm.GMError, match=r"Linear, which holds its weight as outputs × inputs, and was compressed as inp"
    ):
        gm.load_shards(tmp_path / "small", square)
    with pytest.raises(gm.GMError, match=r"'attn.c_attn' has shape \(48, 16\) there, \(32, 16\) in the model"):
        gm.load_shards(tmp_path / "small", Net(lambda columns, _: Turned(columns, 32)))
    with pytest.raises(gm.GMError, match=r"matches no layer; the nearest are .attn"):
        gm.compress_shards(dense, tmp_path / "other", group="C8", transposed="attn.c_atn")
    (dense / "config.json").write_text("[]")
    with pytest.raises(gm.GMError, match="must hold a JSON object"):
        gm.compress_shards(dense, tmp_path / "other", group="C8")


def test_on_the_command_line(tmp_path, capsys):
    dense, small = stored(net(), tmp_path / "dense"), tmp_path / "small"
    command = ["compress", "--from-safetensors", str(dense), "--to", str(small), "--group", "C8"]
    assert not main([*command, "--transposed", "attn.*", "up"])
    assert "4 of 4 matrices" in capsys.readouterr().out
    assert describe_shards(small).transposed == [*TURNED, "up"]


def test_a_small_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "dense")
    found = gm.compress_shards(tmp_path / "dense", tmp_path / "small", group="C32", rank=1)
    assert len(found.layers) == len(found.transposed) == 8
    loaded = gm.load_shards(tmp_path / "small", model)
    tokens = torch.arange(8)[None]
    expected = gm.compress(model, "C32", rank=1, include=["*"], exclude=["*wte", "*wpe"]).model
    torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits)
    must_fail(torch.testing.assert_close, loaded(tokens).logits, model(tokens).logits)
