"""The doctor: every weight has its verdict, what a run shows is told, and what does not work is not called well."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zoo
from torch import nn

import gmcompress as gm
from gmcompress.cli import main
from gmcompress.doctor import VERDICTS


def findings(model, inputs=None, group="C4"):
    return {each.name: each for each in gm.doctor(model, inputs, group).findings}


def assert_every_matrix_once(model, examination):
    wanted = [name for name, each in model.named_parameters() if each.dim() >= 2]
    assert [each.name for each in examination.findings] == wanted
    assert {each.verdict for each in examination.findings} <= set(VERDICTS)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert all(each.shape == shapes[each.name] for each in examination.findings)


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_matrix_appears_once_and_what_is_called_compressible_is_compressed(name, with_inputs):
    exhibit = zoo.MODELS[name]
    model, inputs = exhibit.build(), exhibit.inputs() if with_inputs else None
    found = gm.doctor(model, inputs, "C4")
    assert_every_matrix_once(model, found)
    compressible = {
        each.module if each.name.rpartition(".")[2] == "weight" else each.name
        for each in found.findings
        if each.verdict == "compressible"
    }
    assert compressible == set(exhibit.compressed)
    assert found.works == with_inputs  # without inputs nothing has run
    assert found.compressed < found.parameters
    plan = gm.plan(model, "C4", rank=0, inputs=inputs)
    assert found.compressed == plan.parameters
    assert sum(found.share(each) for each in VERDICTS) <= 1
    json.dumps(found.to_dict())
    assert found.findings[0].name in str(found)


def test_how_weights_are_used():
    used = {
        name: {each.name: each.use for each in gm.doctor(exhibit.build(), exhibit.inputs(), "C4").findings}
        for name, exhibit in zoo.MODELS.items()
        if name in ("called twice", "reads weight", "unreachable", "control flow")
    }
    assert used["called twice"] == {"body.weight": "called 2 times", "head.weight": "called"}
    assert used["reads weight"]["qkv.weight"] == "read functionally"
    assert used["reads weight"]["proj.weight"] == "called"
    assert used["unreachable"]["aux.weight"] == "never called"
    assert used["control flow"]["right.weight"] == "never called"


def test_without_inputs_torch_fx_tells_what_it_saw():
    assert findings(zoo.CalledTwice())["body.weight"].use == "called 2 times"
    assert findings(zoo.Unreachable())["aux.weight"].use == "not seen"
    found = gm.doctor(zoo.ControlFlow(), None, "C4")
    assert not found.traced
    assert "cannot trace" in str(found)
    assert {each.use for each in found.findings} == {""}
    assert gm.doctor(zoo.mlp(), None, "C4").traced


def test_a_shape_that_is_looked_at_is_not_read():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.looked_at, self.table, self.body = nn.Linear(8, 8), nn.Parameter(torch.ones(8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.body(x).view(-1, self.looked_at.weight.shape[0]).to(self.table.dtype)

    found = findings(Looks(), torch.randn(2, 8))
    assert {name: each.use for name, each in found.items()} == {
        "table": "never read",
        "looked_at.weight": "never called",
        "body.weight": "called",
    }


def test_attention_of_torch():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "head": nn.Linear(8, 8)})

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["head"](self.parts["attention"](x, x, x)[0])

    found = findings(Attends(), torch.randn(2, 3, 8))
    inner, outer = found["parts.attention.in_proj_weight"], found["parts.attention.out_proj.weight"]
    assert inner.verdict == outer.verdict == "compressible"
    assert inner.kind.endswith("MultiheadAttention")
    assert outer.use == "read functionally"
    assert "parts.attention (MultiheadAttention)" in outer.remarks()
    assert not found["parts.head.weight"].leaf


def test_verdicts_and_quotients():
    found = findings(zoo.Convolutions(), torch.randn(1, 3, 9, 9), "C16")
    verdicts = {name: (each.verdict, each.group) for name, each in found.items()}
    assert verdicts == {
        "stem.weight": ("stem", ""),
        "dilated.weight": ("compressible", "C8"),
        "grouped.weight": ("compressible", "C8"),
        "depthwise.weight": ("grouped", ""),
        "odd.weight": ("widths", ""),
        "head.weight": ("classifier", ""),
    }
    assert "16 convolution groups" not in found["dilated.weight"].remarks()
    assert "in 2 convolution groups" in found["grouped.weight"].remarks()
    assert "1 rows and 1 columns in each convolution group" in found["depthwise.weight"].remarks()


def test_obstacles():
    tied = findings(zoo.Tied(), torch.arange(4)[None])
    assert (tied["embedding.weight"].verdict, tied["embedding.weight"].aliases) == ("compressible", ("head.weight",))
    assert "shared with head, and stays so" in tied["embedding.weight"].remarks()
    assert tied["embedding.weight"].use == "called 2 times"
    twice = findings(zoo.TwoNames(), torch.randn(1, 8))["first.weight"]
    assert (twice.verdict, twice.aliases) == ("compressible", ("second.weight",))  # one module, which is no tie
    parametrized = findings(zoo.MODELS["parametrized"].build(), torch.randn(1, 8))
    verdicts = [each.verdict for each in parametrized.values()]
    assert verdicts == ["parametrized", "parametrized", "compressible", "classifier"]
    frozen = findings(zoo.frozen_strided(), torch.randn(1, 8))["0.weight"]
    assert frozen.verdict == "compressible"
    assert "no obstacle" in frozen.remarks()
    recurrent = findings(zoo.MODELS["recurrent"].build(), zoo.MODELS["recurrent"].inputs())
    assert recurrent["lstm.weight_hh_l0"].verdict == "unsupported"
    assert "one flat list" in recurrent["lstm.weight_hh_l0"].remarks()
    replaced = zoo.mlp()
    replaced[0].forward = lambda x: x
    assert findings(replaced)["0.weight"].verdict == "obstructed"


def test_a_model_in_which_nothing_fits_is_examined_all_the_same():
    found = gm.doctor(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 2)), torch.randn(1, 7), "C4")
    assert [each.verdict for each in found.findings] == ["widths", "widths", "classifier"]
    assert not found.works
    assert found.compressed is None
    assert "cannot be compressed" in str(found)


def test_a_model_that_does_not_run_on_the_inputs_is_examined_without():
    found = gm.doctor(zoo.mlp(), torch.randn(1, 9), "C4")
    assert not found.works
    assert "does not run on inputs of shape (1, 9)" in str(found)
    assert found.compressed is not None
    assert found.findings[0].use == "called"


class Fails(nn.Module):
    """Refuses to run with a layer whose weight repeats itself, which no rehearsal finds."""

    def __init__(self, returns):
        super().__init__()
        self.body, self.head, self.returns = nn.Linear(8, 8), nn.Linear(8, 3), returns

    def forward(self, x):
        plain = self.body.weight.unique().numel() == 64
        if not plain and not self.returns:
            raise TypeError("no such weight was expected")
        found = self.head(F.relu(self.body(x)))
        return found if plain else (found, found)


@pytest.mark.parametrize(
    ("returns", "said"), [(False, "no such weight was expected"), (True, "the compressed model returns")]
)
def test_a_compressed_model_that_fails_is_not_called_well(returns, said):
    found = gm.doctor(Fails(returns), torch.randn(2, 8), "C4")
    assert not found.works
    assert found.compressed is not None
    assert said in found.problem
    assert "does not run as before" in str(found)


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(gm.GMError, match="not initialised"):
        gm.doctor(nn.LazyLinear(3))
    with pytest.raises(gm.GMError, match="trivial group"):
        gm.doctor(zoo.mlp(), group="C1")
    with pytest.raises(gm.GMError, match="wrapped"):
        gm.doctor(nn.DataParallel(zoo.mlp()))
    with pytest.raises(gm.GMError, match="no verdict 'good'"):
        gm.doctor(zoo.mlp()).share("good")


def test_the_model_is_left_alone():
    model = zoo.mlp().train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    gm.doctor(model, torch.randn(1, 8), "C4")
    assert model.training
    assert all(each.requires_grad for each in model.parameters())
    assert not any(each._forward_pre_hooks for each in model.modules())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


MODELS = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)), torch.zeros(2, 64)

def alone():
    return good()[0]

def narrow():
    return nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 3)), torch.zeros(2, 7)

def broken():
    raise RuntimeError("no such file")

number = 3
none = lambda: None
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "mine_" + tmp_path.name.replace("-", "_")  # a name of its own: what is imported once stays imported
    (tmp_path / f"{name}.py").write_text(MODELS)
    return name


@pytest.mark.parametrize(("function", "status"), [("good", 0), ("alone", 1), ("narrow", 1)])
def test_the_exit_status_says_whether_it_works(place, capsys, function, status):
    assert main(["doctor", f"{place}:{function}", "--group", "C8xC8", "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["works"] == (status == 0)
    assert found["group"] == "C8xC8"


def test_a_network_of_timm(capsys):
    assert main(["doctor", "test_vit", "--group", "C8"]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.attn.qkv.weight" in printed
    assert "outputs of the same structure" in printed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet1", "timm knows no model 'resnet1'"),
        ("no_such_package.models:build", "cannot import no_such_package.models"),
        ("{place}:god", "has no 'god'; the nearest are 'good'"),
        ("{place}:number", "'number' of {place} is no function"),
        ("{place}:none", "gave NoneType"),
        ("{place}:broken", "RuntimeError: no such file"),
        ("{place}:good --pretrained", "comes with its weights"),
        ("test_vit --group C8x", "C8x"),
        ("test_vit --checkpoint nowhere.pth", "does not exist"),
    ],
)
def test_a_bad_name_is_one_line(place, capsys, name, said):
    assert main(["doctor", *name.format(place=place).split()]) == 2
    printed = capsys.readouterr()
    assert said.format(place=place) in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
