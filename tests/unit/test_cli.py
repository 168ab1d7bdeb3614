"""The command line as a process: help, start-up cost, exit codes of what no verb foresees, signals, pipes."""

from __future__ import annotations

import importlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import click
import pytest

from edgeflow import __version__
from edgeflow import cli as command_line
from edgeflow.cli import VERBS, main, options

HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "coremltools",
    "diffusers",
    "transformers",
    "numpy",
    "PIL",
    "rich",
}
EDGEFLOW = [sys.executable, "-m", "edgeflow.cli"]


def test_help_lists_every_verb_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    code = f"""
import sys
from edgeflow.cli import main
assert main(["--help"]) == 0
loaded = set(sys.modules)
assert not loaded & {HEAVY!r}, loaded & {HEAVY!r}
verbs = [name for name in loaded if name.startswith("edgeflow.cli.")]
assert verbs == ["edgeflow.cli.options"], verbs
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb, line in VERBS.items():
        assert f"  {verb:<8}  {line}" in done.stdout
    assert done.stderr == ""


def test_help_takes_less_than_300_ms_of_cpu() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*EDGEFLOW, "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_starts_with_its_line_and_ends_with_a_runnable_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("-h", "--help"):
        assert main([verb, flag]) == 0
        out = capsys.readouterr().out
    assert out.startswith(f"Usage: edgeflow {verb}")
    examples = [line.strip() for line in out.split("Example")[-1].splitlines()[1:] if line.strip()]
    assert examples and all(line.startswith(f"edgeflow {verb}") for line in examples)
    for line in examples:
        parse(shlex.split(line)[1:])


def parse(arguments: list[str]) -> None:
    """Parse as click would, down to a verb's verb, without running anything."""
    command: click.Command = command_line.cli
    context = command.make_context("edgeflow", list(arguments))
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None and name is not None, arguments
        command, context = found, found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("verb", VERBS)
def test_shared_options_mean_the_same_in_every_verb(verb: str) -> None:
    """A flag of the common set is spelled, typed and named as edgeflow.cli.options does it."""

    @click.command()
    @options.out_option("")
    @options.seed_option
    @options.json_option
    @options.force_option
    @options.verbosity
    def common(**_: object) -> None: ...

    shared = {flag: param for param in common.params for flag in param.opts}
    command = importlib.import_module(f"edgeflow.cli.{verb}").command
    leaves = command.commands.values() if isinstance(command, click.Group) else [command]
    for leaf in leaves:
        flags = {flag: param for param in leaf.params for flag in param.opts}
        assert {"-v", "-q"} <= set(flags), f"{verb} {leaf.name} lacks -v or -q"
        for flag in set(flags) & set(shared):
            assert (flags[flag].name, flags[flag].opts) == (shared[flag].name, shared[flag].opts)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeflow {__version__}\n"


def test_no_arguments_print_the_help_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Commands:" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["paint"],
            f"error: command 'paint' is not known; known: {', '.join(sorted(VERBS))}\n",
        ),
        (["--paint"], "error: No such option '--paint'; see: edgeflow -h\n"),
        (["inspect"], "error: Missing argument 'PATH_OR_NAME'; see: edgeflow inspect -h\n"),
        (["generate", "emoji"], "error: Missing option '-o' / '--out'; see: edgeflow generate -h\n"),
        (
            ["generate", "emoji", "x", "-o", "a.png", "--seed", "-1"],
            "error: Invalid value for '--seed': expected 0 to 2**64 - 1, got -1; see: edgeflow generate -h\n",
        ),
    ],
)
def test_misuse_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


# --- what no verb foresees ----------------------------------------------------------------------------------


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A verb ``probe`` whose body the test sets as ``verb.body``."""
    holder = types.SimpleNamespace(body=lambda: None)

    @click.command()
    @options.verbosity
    def command() -> object:
        return holder.body()

    module = types.ModuleType("edgeflow.cli.probe")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edgeflow.cli.probe", module)
    monkeypatch.setitem(VERBS, "probe", "A verb of the tests.")
    return holder


def raising(error: BaseException):
    def body() -> None:
        raise error

    return body


def test_an_unexpected_error_is_one_sentence_and_a_traceback_with_v(
    verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.body = raising(KeyError("first\nsecond"))
    assert main(["probe"]) == 1
    err = capsys.readouterr().err
    assert err == "error: unexpected KeyError: 'first\\nsecond'; run with -v for the traceback\n"
    verb.body = raising(ValueError("first\nsecond"))
    assert main(["probe", "-v"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: unexpected ValueError: first second\n")


@pytest.mark.parametrize(
    ("package", "extra"), [("openvino", "openvino"), ("torch", "export"), ("webdataset", "train")]
)
def test_an_import_that_an_extra_brings_is_exit_4(
    verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    verb.body = raising(ModuleNotFoundError("No module", name=f"{package}.inner"))
    assert main(["probe"]) == 4
    expected = f"error: {package} is not installed; install it with: pip install 'edgeflow[{extra}]'\n"
    assert capsys.readouterr().err == expected


def test_another_missing_import_is_a_bug_not_a_backend(
    verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.body = raising(ModuleNotFoundError("No module named 'x'", name="x"))
    assert main(["probe"]) == 1
    assert "unexpected ModuleNotFoundError" in capsys.readouterr().err


def test_the_keyboard_interrupts(verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    verb.body = raising(KeyboardInterrupt())
    assert main(["probe"]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


def test_a_verbs_result_is_no_exit_code_unless_it_exits(verb: types.SimpleNamespace) -> None:
    verb.body = lambda: "a value"
    assert main(["probe"]) == 0
    verb.body = lambda: click.get_current_context().exit(3)
    assert main(["probe"]) == 3


def test_verbosity_does_not_outlast_its_command(verb: types.SimpleNamespace) -> None:
    heard: list[tuple[bool, bool]] = []
    verb.body = lambda: heard.append((options.verbose(), options.quiet()))
    for flags in (["-v"], [], ["-q"], []):
        main(["probe", *flags])
    assert heard == [(True, False), (False, False), (False, True), (False, False)]


# --- pipes and signals --------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_met_with_silence(tiny_checkpoint: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # whoever reads has already gone
    done = subprocess.run(
        [*EDGEFLOW, "inspect", str(tiny_checkpoint), "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_half_way_leaves_nothing_behind(tmp_path: Path, number: int, code: int) -> None:
    script = f"""
import sys, time, types
from pathlib import Path
import click
from edgeflow import cli
from edgeflow.staging import staged_folder

@click.command()
def command():
    with staged_folder(Path({str(tmp_path / "out")!r}), force=False) as stage:
        (stage / "half").write_text("half")
        print("ready", flush=True)
        time.sleep(60)

cli.VERBS["probe"] = ""
sys.modules["edgeflow.cli.probe"] = types.SimpleNamespace(command=command)
sys.exit(cli.main(["probe"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert list(tmp_path.iterdir())
    time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_inside_exec_keeps_its_exit_code(tmp_path: Path) -> None:
    """Dataclasses are made by exec: CPython remembers an interrupt there, and would end by the signal."""
    lines = [
        "import sys, click",
        "from edgeflow import cli",
        "@click.command()",
        "def command(): exec('raise KeyboardInterrupt')",
        "sys.exit(cli.main([], program=command))",
    ]
    (tmp_path / "interrupted.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (130, "error: interrupted")
