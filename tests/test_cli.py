"""The command line: what it prints, where its settings come from, and one line for everything that a user can cause."""

import io
import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_data import write_images

from gmcompress.cli import main
from gmcompress.cli.commands import COMMANDS
from gmcompress.cli.line import make_parser
from gmcompress.cli.printing import Table, show, watching
from gmcompress.runs import Settings, setting_kinds

SMALL = ["--model", "test_resnet", "--num-classes", "10", "--in-chans", "1", "--dataset", "digits", "--img-size", "8"]


def dense_weights(file, classes=10):
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=classes, in_chans=1).state_dict(), file)
    return str(file)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, the weights of a dense network outside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dense_weights(tmp_path / "dense.safetensors")
    return tmp_path / "here"


TRAINED = [*SMALL, "--checkpoint", "../dense.safetensors", "--group", "C4xC4", "--rank", "1"]
TRAIN = ["train", *TRAINED, "--epochs", "1", "--recalibrate", "never", "--output", "out"]


def assert_json(printed):
    """One document on standard output, and nothing besides."""
    assert json.loads(printed.out)
    assert not printed.err


def assert_refused(arguments, said, capsys, folder):
    """Exit code 2, one line on standard error, and no file that was not there."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    lines = [line for line in printed.err.splitlines() if not line.startswith(("compressing", "validating"))]
    assert len(lines) == 1
    assert lines[0].startswith("gmcompress: error: ")
    assert said in lines[0]
    assert sorted(folder.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gmcompress {version('gmcompress')}\n"


def test_as_a_module():
    command = [sys.executable, "-m", "gmcompress", "groups", "Y8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gmcompress: error: group string 'Y8'")
    assert done.stderr.count("\n") == 1


def test_without_a_command_it_explains_itself(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert max(map(len, printed.splitlines())) <= 130
    for action in make_parser()[1][name]._actions:
        assert all(flag in printed for flag in action.option_strings)


def test_the_examples_of_the_help_are_understood():
    parser, _ = make_parser()
    for name, command in COMMANDS.items():
        for example in command.examples:
            parser.parse_args([name, *example.replace("'", "").split()])


def test_train_has_a_flag_for_every_setting():
    given = {action.dest for action in make_parser()[1]["train"]._actions}
    assert set(setting_kinds()) <= given


def test_plan(place, capsys):
    literal = ["--group", "C4xC4", "--rank", "1"]
    assert main(["plan", "--model", "test_resnet", *literal, "--override", "layer4.*=none"]) == 0
    printed = capsys.readouterr()
    assert "left dense by the override 'layer4.*'" in printed.out
    assert "layers compressed: " in printed.out
    assert not printed.err
    assert not list(place.iterdir())


def test_compress_then_train_then_everything_that_reads_them(place, capsys):
    assert main(["compress", *TRAINED, "--output", "small"]) == 0
    printed = capsys.readouterr()
    assert "written to small: model/, report.html, report.json" in printed.out
    assert "validating the compressed network: top-1 " in printed.err
    assert main(["train", "--compressed", "small", "--epochs", "1", "--output", "out", "--experiment", "one"]) == 0
    printed = capsys.readouterr()
    assert "accuracy tuned, %" in printed.out
    assert "epoch 1 of 1: loss " in printed.err
    assert (place / "out" / "one" / "summary.csv").is_file()
    assert main(["validate", "--compressed", "out/one"]) == 0
    assert "360" in capsys.readouterr().out
    assert main(["report", "out/one"]) == 0
    assert "Compressed layers" in capsys.readouterr().out
    assert main(["report", "out/one", "--html", "page.html"]) == 0
    assert (place / "page.html").read_text().startswith("<!")
    assert main(["benchmark", "--compressed", "out/one", "-b", "2", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert (printed.count("frozen"), printed.count("densified")) == (2, 2)
    assert main(["train", "--resume", "out/one"]) == 0


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "test_resnet", "--rank", "1"],
        ["compress", *TRAINED, "--output", "out"],
        TRAIN,
        ["validate", *SMALL, "--checkpoint", "../dense.safetensors"],
        ["benchmark", "--model", "test_resnet", "--rank", "1", "--img-size", "16", "-b", "2", "--repeats", "2"],
        ["groups"],
        ["groups", "D4xC2"],
        ["demo", "--smoke", "--output", "out"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_json_is_all_that_is_printed(capsys, arguments):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    assert_json(capsys.readouterr())


def test_what_is_meant_for_people_is_no_json(capsys):
    assert main(["plan", "--model", "test_resnet", "--rank", "1"]) == 0
    with pytest.raises(json.JSONDecodeError):
        assert_json(capsys.readouterr())


def test_groups(capsys):
    assert main(["groups"]) == 0
    assert "C7:C3[2]" in capsys.readouterr().out
    assert main(["groups", "D4xC2"]) == 0
    printed = capsys.readouterr().out
    assert "normal subgroups    19" in printed
    assert "C2^3 (8)" in printed


def test_demo_ends_in_the_table_that_matters(place, capsys):
    assert main(["demo", "--smoke"]) == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["dense", "compressed", "tuned", "frozen", "written"]
    latencies = [row[-1] for row in rows[:-1]]
    assert latencies[1:3] == ["–", "–"]
    ratio = float(latencies[3]) / float(latencies[0])
    assert abs(float(re.search(r"latency ×([\d.]+)", printed.out)[1]) - ratio) < 0.05 * ratio + 0.01
    assert (place / "gmcompress-demo" / "report.html").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_a_bar_and_leaves_lines(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with watching(quiet=False) as progress:
        for what in ("epoch 1", "epoch 2"):
            for step in range(3):
                progress(what, step + 1, 3, f"[loss] {step}")
    printed = screen.getvalue()
    assert "epoch 1: [loss] 2" in printed
    assert "epoch 2: [loss] 2" in printed
    assert "\x1b" in printed  # bars are drawn over


def test_progress_elsewhere_is_a_line_for_each_thing_done(capsys):
    with watching(quiet=False) as progress:
        for step in range(3):
            progress("epoch 1", step + 1, 3, f"loss {step}")
    assert capsys.readouterr().err == "epoch 1: loss 2\n"


def test_tables_on_a_terminal_and_elsewhere_say_the_same(monkeypatch, capsys):
    table = Table("Title", ["name", "number#"], [["[a]", 1]])
    show([table])
    plain = capsys.readouterr().out
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    show([table])
    assert all(word in text for word in ("Title", "name", "number", "[a]") for text in (plain, screen.getvalue()))
    assert "\x1b" not in plain


# ---------------------------------------------------------------------------------------------------------------------
# Where settings come from


def test_a_file_sets_defaults_and_the_command_line_wins(place, capsys):
    (place / "mine.yaml").write_text("model: resnet18\ngroup: C8\nrank: 2\nexclude: [layer1.*]\n")
    assert main(["plan", "-c", "mine.yaml", "--model", "test_resnet", "--group", "C4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["group"] == "C4"
    assert plan["layers"]["layer2.0.conv1"] == "C4+displacement:2"
    assert plan["skipped"]["layer1.0.conv1"] == "excluded by 'layer1.*'"


def test_names_in_a_file_may_be_written_as_flags_are(place, capsys):
    (place / "mine.yaml").write_text("model: test_resnet\nin-chans: 1\nlr: 1e-3\nrank: 1\n")
    assert main(["plan", "-c", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["shape"][1] == 1


def test_the_settings_of_a_run_are_a_file_for_another(place):
    assert main(["compress", *TRAINED, "--lr", "0.003", "--output", "out"]) == 2  # a flag of train
    assert main(["compress", *TRAINED, "--output", "out", "--seed", "3"]) == 0
    assert main(["compress", "-c", "out/args.yaml", "--rank", "2", "--output", "again"]) == 0
    saved = [json.loads((place / name / "report.json").read_text())["settings"] for name in ("out", "again")]
    assert saved[0] | {"rank": 2} == saved[1]
    assert saved[0]["seed"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# What a user can cause


def with_nan(folder):
    found = load_file(folder / ".." / "dense.safetensors")
    found["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(found, folder / "nan.safetensors")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--group", "Y8"], "unknown group family 'Y'"),
        (["--group", "C4xx"], "group string 'C4xx': at position 3"),
        (["--group", "C5"], "no layer can be compressed with C5"),
        (["--rank", "-1"], "rank must be an integer of at least 0, not -1"),
        (["--rank", "two"], "rank is a whole number, not 'two'"),
        (["--include", "nothing.*"], "the rule 'nothing.*' matches no layer; the nearest are"),
        (["--override", "layer9=C4"], "the rule 'layer9' matches no layer"),
        (["--override", "layer1"], "an override is PATTERN=VALUE"),
        (["--budget", "25%"], "budget and rank do not go together"),
        (["--ties", "layer1.*"], "they do not go with rank"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--data-dir", "nowhere", "--dataset", ""], "nowhere does not exist"),
        (["--dataset", ""], "there are no images"),
        (["--dataset", "numbers"], "dataset 'numbers' is unknown"),
        (["--batch-size", "2000"], "fewer than one batch of 2000"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--in-chans", "3"], "does not fit test_resnet"),
        (["--num-classes", "7"], "does not fit test_resnet"),
        (["--num-classes", "-3"], "num_classes must be at least 0, not -3"),
        (["--in-chans", "0"], "in_chans must be at least 1, not 0"),
        (["--img-size", "4"], "img_size must be at least 8"),
        (["--model", "resnet1800"], "the nearest are 'resnet18'"),
        (["--opt", "sdg"], "timm knows no optimizer 'sdg'"),
        (["--lr", "-1"], "lr must be positive"),
        (["--trial-steps", "0"], "trial_steps must be positive"),
        (["--minutes", "1"], "a run lasts epochs or minutes, not both"),
        (["--features", "0.1", "--blocks", "layer9"], "the model has no module 'layer9'"),
        (["--anneal", "2"], "anneal is a share of the steps"),
        (["--decay", "all"], "invalid choice: 'all'"),
        (["--residual", "none"], "invalid choice: 'none'"),
        (["--modle", "x"], "unknown flag --modle; the nearest are '--model'"),
        (["--epoch", "3"], "unknown flag --epoch; the nearest are '--epochs'"),
        (["more"], "'more' belongs to no flag"),
        (["-c", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--resume", "nowhere"], "--output and --experiment do not go with it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(place, capsys, flags, said):
    assert_refused([*TRAIN, *flags], said, capsys, place)


def test_weights_that_hold_nan(place, capsys):
    with_nan(place)
    said = "layer 'layer2.0.conv1': the weight of shape (48, 32, 3, 3) holds NaN or infinity"
    assert_refused([*TRAIN, "--checkpoint", "nan.safetensors"], said, capsys, place)


def test_empty_data_folders(place, capsys):
    for split in ("train", "validation"):
        (place / "data" / split).mkdir(parents=True)
    assert_refused([*TRAIN, "--dataset", "", "--data-dir", "data"], "timm finds no images in", capsys, place)


def test_a_plan_that_needs_no_weights_refuses_those_it_cannot_read(place, capsys):
    arguments = ["plan", "--model", "test_resnet", "--rank", "1", "--checkpoint", "nowhere.pt"]
    assert_refused(arguments, "nowhere.pt does not exist", capsys, place)


def test_inputs_that_the_network_does_not_take(place, capsys):
    arguments = ["plan", "--model", "test_vit", "--rank", "1", "--img-size", "24"]
    assert_refused(arguments, "VisionTransformer does not run on inputs of shape (1, 3, 24, 24)", capsys, place)


def test_a_teacher_with_other_outputs(place, capsys):
    assert main(["compress", *TRAINED, "--output", "small"]) == 0
    file = dense_weights(place / "seven.safetensors", classes=7)
    arguments = ["train", "--compressed", "small", "--checkpoint", file, "--num-classes", "7", "--output", "out"]
    assert_refused(arguments, "digits has 10 classes, the model 7", capsys, place)
    for split in ("train", "validation"):
        write_images(place / "data" / split, list("0123456"))
    other = ["--dataset", "", "--data-dir", "data", "-b", "2", "-j", "0"]
    assert_refused([*arguments, *other], "was saved from another model: 'fc.weight' has shape", capsys, place)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1", "there is no flag for 'learning_rate'; the nearest are '--"),
        ("epocs: 1", "there is no flag for 'epocs'; the nearest are '--epochs'"),
        ("help: 1", "there is no flag for 'help'"),
        ("lr: fast", "lr is a number, not 'fast'"),
        ("[1, 2", "is not readable as YAML"),
        ("- lr", "must hold names with values"),
    ],
)
def test_a_bad_file_of_settings(place, capsys, text, said):
    (place / "mine.yaml").write_text(text)
    assert_refused([*TRAIN, "-c", "mine.yaml"], said, capsys, place)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["validate"], "which network?"),
        (["validate", "--compressed", "."], "holds no compressed model"),
        (["report", "."], "holds no report"),
        (["report"], "the following arguments are required: FOLDER (see: gmcompress report --help)"),
        (["train", "--resume", "."], "holds no run to resume"),
        (["groups", "C4x"], "at position 3"),
        (["benchmark", "--model", "test_resnet", "--repeats", "1"], "at least 2 repeats, not 1"),
        (["plan", "--model", "resnet18", "--rank", "1", "--group", "C7"], "no layer can be compressed with C7"),
        (["demo", "--output", "/proc/nothing"], "cannot create /proc/nothing"),
        (["trian"], "invalid choice: 'trian'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_refuse_in_one_line_too(place, capsys, arguments, said):
    assert_refused(arguments, said, capsys, place)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(_given, _progress):
        raise ValueError("a bug")

    monkeypatch.setitem(COMMANDS, "groups", COMMANDS["groups"]._replace(run=broken))
    with pytest.raises(ValueError, match="a bug"):
        main(["groups"])


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted(_given, _progress):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "groups", COMMANDS["groups"]._replace(run=interrupted))
    assert main(["groups"]) == 130
    assert capsys.readouterr().err.startswith("gmcompress: interrupted")


def test_all_settings_have_defaults_that_can_be_given():
    assert Settings.read(Settings().flat()) == Settings()
