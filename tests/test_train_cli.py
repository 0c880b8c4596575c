"""The command line: flags from declarations, settings from files and checkpoints, errors in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas_train import cli, flags, methods, progress
from atlas_train import compare as comparing
from atlas_train.config import SECTIONS, TrainConfig
from atlas_train.machine import usable_device

pytest.importorskip("tyro")
pytest.importorskip("sklearn")
# Width 2, one epoch of 64 images, one process: a second of digits.
QUICK = ["--epochs", "1", "--train-size", "64", "--width", "2", "--eval-size", "50", "--probe-size", "8"]


@pytest.fixture(autouse=True)
def _quiet_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def config_of(monkeypatch: pytest.MonkeyPatch, *argv: str) -> TrainConfig:
    """What `atlas train ...` would run."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(comparing, "compare", lambda config, command: seen.append(config))
    assert cli.main(["train", *argv]) == 0
    return seen[0]


def test_no_flags_mean_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of(monkeypatch) == TrainConfig()


def test_flags_reach_the_configuration_and_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = "--method atlas --dataset mnist --eps 8/255 --lr 0.1 --train-precision bf16 --channels-last --no-download"
    argv += " --radius 4/255 --steps 2 --local-objective ce --project --augment false --beside adv standard --threads 3"
    config = config_of(monkeypatch, *argv.split())
    assert config == TrainConfig(
        method="atlas",
        dataset="mnist",
        eps=8 / 255,
        lr=0.1,
        train_precision="bf16",
        channels_last=True,
        augment=False,
        threads=3,
        beside=("adv", "standard"),
        hyper={"radius": 4 / 255, "steps": 2, "local_objective": "ce", "project": True},
    )


def test_flags_are_written_with_dashes_or_underscores_or_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch, "--method=adv", "--batch_size=7", "--step-size=2/255", "--epochs", "auto")
    assert (config.method, config.batch_size, config.epochs) == ("adv", 7, None)
    assert config.hyper == {"step_size": 2 / 255}
    assert config_of(monkeypatch, "--beside", "none").beside == ()


def test_a_setting_that_nothing_is_chosen_for_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("--protocol", "--extra-data", "--init", "--resume", "--config")
    assert config_of(monkeypatch, *(word for name in names for word in (name, "none"))) == TrainConfig()
    assert config_of(monkeypatch, "--protocol", "auto", "--init", "auto", "--eps", "auto") == TrainConfig()
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, word in (*((name, "none") for name in names), ("--eps", "auto"), ("--width", "auto")):
        assert re.search(rf"{name} [A-Z{{].*?\(default: (\w+)\)", shown)[1] == word, name  # type: ignore[index]


def test_what_is_given_wins_over_the_data_set_be_it_the_methods_own_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TRADES has 10 steps by itself, and 40 on MNIST."""
    mnist = ("--method", "trades", "--dataset", "mnist")
    assert config_of(monkeypatch, *mnist, "--steps", "10", "--step_size=auto").hyper == {"steps": 10}
    assert config_of(monkeypatch, "--method", "adv", "--no-bn-compat").hyper == {"bn_compat": False}
    Path("c.json").write_text(json.dumps({"method": "trades", "hyper": {"steps": 10}}))
    assert config_of(monkeypatch, *mnist, "--config", "c.json").hyper == {"steps": 10}
    assert config_of(monkeypatch, *mnist).hyper == {}


def test_numbers_for_each_channel_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch, "--mean", "0.5", "1/4", "0", "--std", "1", "1", "1")
    assert (config.mean, config.std) == ((0.5, 0.25, 0.0), (1.0, 1.0, 1.0))
    assert config_of(monkeypatch, "--mean", "auto").mean is None


def test_names_are_known_in_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (
        "--optimizer",
        "SGD",
        "--schedule",
        "Cosine",
        "--averaging",
        "EMA",
        "--device",
        "CPU",
        "--dataset",
        "MNIST",
    )
    config = config_of(monkeypatch, *flags)
    chosen = (config.optimizer, config.schedule, config.averaging, config.device, config.dataset)
    assert chosen == ("sgd", "cosine", "ema", "cpu", "mnist")
    assert usable_device("CPU").type == "cpu"


def test_flags_override_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {
        "method": "adv",
        "epochs": 3,
        "eps": "8/255",
        "beside": ["atlas"],
        "hyper": {"steps": 4, "atlas.count": 2},
    }
    Path("c.json").write_text(json.dumps(values))
    config = config_of(monkeypatch, "--config", "c.json", "--epochs", "5")
    assert (config.method, config.epochs, config.eps, config.beside) == ("adv", 5, 8 / 255, ("atlas",))
    assert config.hyper == {"steps": 4, "atlas.count": 2}
    assert config_of(monkeypatch, "--config", "c.json", "--steps", "6").hyper == {"steps": 6, "atlas.count": 2}
    other = config_of(monkeypatch, "--config", "c.json", "--method", "one_step_adv")
    assert other.method == "one_step_adv" and "steps" not in other.hyper


@pytest.mark.parametrize("flag", ["--old-setting", "--no-old-setting", "--old_setting=3", "--old-setting 3 4"])
def test_retired_flags_are_dropped_and_one_line_says_so(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.RETIRED, "old_setting", "it made nothing faster")
    assert config_of(monkeypatch, "--lr", "0.1", *flag.split(), "--epochs", "2") == TrainConfig(lr=0.1, epochs=2)
    said = capsys.readouterr().err
    assert said == "atlas: the setting old_setting no longer exists and is ignored: it made nothing faster\n"
    Path("c.json").write_text(json.dumps({"old_setting": 1}))
    assert config_of(monkeypatch, *flag.split(), "--config", "c.json") == TrainConfig()
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", methods.names())
def test_every_setting_and_hyper_parameter_is_a_flag_with_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--method", name, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    own = methods.hyper_parameters(methods.get(name))
    for field in [*dataclasses.fields(TrainConfig), *own.values()]:
        if field.name != "hyper":
            assert re.search(f"--{field.name.replace('_', '-')}[ ,]", text)
            assert field.metadata["help"] not in ("", "default: by data set")
    words = re.split(r"([\w-]+) options ", text)
    boxes = dict(zip((name.replace("-", "_") for name in words[1::2]), words[2::2], strict=True))
    assert list(boxes) == [*SECTIONS, *([name] if own else [])]
    assert all(f"--{key.replace('_', '-')}" in boxes[name] for key in own)
    for setting, box in {"val_size": "data", "clip_norm": "update", "swa_start": "averaging", "config": "run"}.items():
        assert f"--{setting.replace('_', '-')} " in boxes[box]


def test_no_hyper_parameter_hides_a_setting() -> None:
    settings = {f.name for f in dataclasses.fields(TrainConfig)} | {"config"}
    for name in methods.names():
        assert not settings & set(methods.hyper_parameters(methods.get(name)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--epochs", "1.5"], "epochs must be an integer >= 1, got '1.5'"),
        (["train", "--width", "1e30"], "width must be an integer >= 1, got '1e30', of more than 64 bits"),
        (["train", "--threads", "100000"], "threads must be an integer >= 1 and <= 1024, got '100000'"),
        (["train", "--radius", "0"], "radius must be a number > 0 and <= 1, got '0'"),
        (["train", "--local", "ball"], "local must be one of 'neighbours', 'worst', 'segment'"),
        (["train", "--augment", "maybe"], "augment must be true or false, got 'maybe'"),
        (["train", "--raduis", "0.1"], "--radius"),
        # --resume "$RUN" where RUN is not set: not another run
        (["train", "--resume", ""], "resume must be a text that is not empty, got ''"),
        (["train", "--out-dir", ""], "out_dir must be a text that is not empty, got ''"),
        (["evaluate", "x", "--json", ""], "json must be a text that is not empty, got ''"),
        (["train", "--method", "standard", "--radius", "0.1"], "--radius"),
    ],
)
def test_wrong_flags_name_what_is_allowed(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    plain = " ".join(shown.replace("│", " ").split())
    assert message in plain and "Traceback" not in plain


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--eps", "8"], "eps must be a number > 0 and < 1, got 8.0; images are in [0, 1], so write 8/255"),
        (["tarin"], "no command 'tarin'; the nearest is 'train'"),
        (["train", "--method", "atals"], "no method 'atals'; the nearest is 'atlas'"),
        (["train", "--dataset", "minst"], "no data set 'minst'; the nearest is 'mnist'"),
        (["train", "--dataset", "mnist", "--data-dir", "empty"], "no MNIST files"),
        (["train", "--beside", "nothing"], "no method 'nothing'"),
        (["train", "--config", "nowhere.json"], "nowhere.json does not exist"),
        (["train", "--resume", "nowhere"], "no checkpoint nowhere"),
        (["train", "--config", "a", "--resume", "b"], "give --config or --resume, not both"),
        (["evaluate", "nowhere"], "no checkpoint nowhere"),
        (["methods", "atlas"], "takes no arguments"),
        (["a\x1b[31m\nb"], "no command 'a\\x1b[31m\\nb'"),
        (["train", "--dataset", "a\x1b[31m\nb"], "no data set 'a\\x1b[31m\\nb'"),
        (["train", "--method", "a\x1b[31m\nb"], "no method 'a\\x1b[31m\\nb'"),
        (["train", "--config", "a\x1b[31m\nb"], "config file 'a\\x1b[31m\\nb' does not exist"),
        (["train", "--resume", "a\x1b[31m\nb"], "no checkpoint 'a\\x1b[31m\\nb'"),
        (["train", "--model", "a\x1b[31m\nb"], "nothing known as 'a\\x1b[31m\\nb'"),
        (["train", "--model", "a\x1b[31m\nb:c"], "model 'a\\x1b[31m\\nb:c'"),
        (["train", "--device", "a\x1b[31m\nb"], "device 'a\\x1b[31m\\nb' cannot be used"),
        (["evaluate", "a\x1b[31m\nb"], "no checkpoint 'a\\x1b[31m\\nb'"),
        (["train", "--device", "meta"], "device 'meta' cannot be used"),
        (["train", "--device", "gpu"], "device 'gpu' cannot be used: write cpu, cuda or cuda:N\n"),
        (["train", "--config", "."], "config file . is a folder: give the file in it"),
        (["evaluate", "nowhere", "--json", "."], "--json . is a folder: name a file"),
        (["train", "--out-dir", "a_file"], "a_file is a file, where a folder is needed"),
        (["train", "--out-dir", "a_file/out"], "a_file is a file, where a folder is needed"),
        (["train", "--out-dir", "x" * 300], "atlas: [Errno 36] File name too long: 'xxx"),
        (["train", "--out-dir", "a_link/out"], "a_link is a link to nothing, where a folder is needed"),
        (["train", "--model", "fac.py"], "'fac.py' is no network; for code of your own write fac.py:factory"),
        (["train", "--beside", "all", "standard"], "all means every method and stands alone"),
        (["train", "--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["train", "--method", "atlas", "--local", "start", "--bn", "joint"], "atlas: bn='joint' has no meaning"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATLAS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd()))
    Path("a_file").touch()
    Path("a_link").symlink_to("nothing")
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "\x1b" not in error
    assert error.startswith("atlas") and "atlas: atlas: " not in error


def test_a_missing_tyro_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["train"]) == 2
    assert "pip install 'atlas-kernels[train]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match="needs tyro"):
        flags.require_tyro()


def test_methods_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    text = capsys.readouterr().out
    for name in methods.names():
        assert f"\n{name}: " in "\n" + text
        for key in methods.hyper_parameters(methods.get(name)):
            assert f"--{key.replace('_', '-')} " in text
    assert "--radius auto   (a number > 0 and <= 1)" in text
    assert "\n    on mnist: step_size 0.6667 eps, radius 1 eps\n" in text
    trades = text[text.index("\ntrades: ") :]
    assert "\n    on cifar10: steps 10, step_size 0.2258 eps, beta 6.0\n" in trades[: trades.index("\nstandard: ")]


def test_usage_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    assert capsys.readouterr().out == 2 * cli.USAGE
    done = subprocess.run([sys.executable, "-m", "atlas_train"], capture_output=True, text=True, check=True)
    assert done.stdout == cli.USAGE


def run(*argv: str) -> int:
    return cli.main([*argv])


def test_train_resume_and_evaluate_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", *QUICK) == 0
    text = capsys.readouterr().out
    rows = text[text.index("method ") :].splitlines()
    assert [row.split()[0] for row in rows[2:5]] == ["standard", "one_step_adv", "atlas"]
    assert "files: runs/digits-1" in text and "standard: digits, 64 images" in text
    assert run("train", *QUICK, "--beside", "none") == 0
    assert "files: runs/digits-2" in capsys.readouterr().out  # a finished run is never written over

    assert run("train", "--resume", "runs/digits-2/atlas", "--epochs", "2") == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("atlas ", "atlas, last (epoch 2) "))]
    assert "epoch 2/2" in text and "epoch 1/2" not in text and len(rows) == 1
    assert run("train", "--resume", "runs/digits-2/atlas", "--method", "adv") == 2
    assert "cannot be resumed with another method" in capsys.readouterr().err

    asked = ("--size", "50", "--json", "e.json")
    for name in ("runs/digits-2/atlas", "runs/digits-2/atlas/last.pt"):
        assert run("evaluate", name, *asked) == 0
        written = json.loads(Path("e.json").read_text())
        after: dict[str, Any] = json.loads(Path("runs/digits-2/atlas/evaluation.json").read_text())
        same = ("clean", "fgsm", "pgd", "images", "eps_255", "pgd_steps")
        assert [written[k] for k in same] == [after[k] for k in same] and written["images"] == 50
    assert "PGD-20" in capsys.readouterr().out
    assert run("evaluate", "runs/digits-2/atlas", "--eps", "0.01", "--steps", "3", "--size", "20") == 0
    text = capsys.readouterr().out
    assert "eps 0.01 (l_inf)" in text and "PGD-3" in text and "20 test images" in text


def test_any_standard_output_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in ASCII, and none; a run is not lost for the name of its folder."""
    monkeypatch.setattr(comparing, "compare", lambda config, command: print(f"files: {config.out_dir}"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert cli.main(["train", "--out-dir", "r\u00fcn"]) == 0
    assert sys.stdout.buffer.getvalue() == b"files: r\\xfcn\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["methods"]) == 0 and isinstance(progress.make("auto"), progress.Plain)
