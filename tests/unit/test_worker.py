"""Processes of their own: what they return, what they raise, how their death is told; equal bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from edgeflow import worker
from edgeflow.errors import CheckpointError, EdgeflowError, RuntimeFailure, UnknownNameError


def test_a_call_runs_in_another_process() -> None:
    assert worker.call("test", "os:getpid") != os.getpid()


def test_a_held_object_takes_calls_until_the_block_ends() -> None:
    with worker.worker("test") as child:
        child.call("collections:OrderedDict", {"a": 1}, hold=True)
        held = worker.Held(child)
        held.update({"b": 2})
        assert held.get("b") == 2
        pid = child.call("os:getpid")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("target", "args", "kind", "code"),
    [
        ("edgeflow.weights:read_safetensors_header", (Path("absent.safetensors"),), CheckpointError, 1),
        ("edgeflow.registry:runtime", ("absent",), EdgeflowError, 2),  # UnknownNameError is made from names
    ],
)
def test_errors_keep_their_words_and_exit_code(target: str, args: tuple, kind: type, code: int) -> None:
    with pytest.raises(kind, match=r"absent") as caught:
        worker.call("test", target, *args)
    assert caught.value.exit_code == code
    assert not isinstance(caught.value, UnknownNameError)


def test_a_killed_process_is_a_sentence() -> None:
    with worker.worker("export: unet") as child:
        pid = child.call("os:getpid")
        with pytest.raises(RuntimeFailure, match=r"export: unet: its process was killed, .* memory"):
            child.call("os:kill", pid, signal.SIGKILL)


def test_a_crash_says_its_last_words() -> None:
    with pytest.raises(RuntimeFailure, match=r"ended with 1: ValueError: .*bits"):
        worker.call("test", "random:getrandbits", -1)


@pytest.mark.slow  # five processes, each with its own import of torch
def test_isolated_exports_and_parity_are_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.export import export_model
    from edgeflow.parity import measure

    checkpoint = Checkpoint.open(tiny_checkpoint)
    asked = {"backends": ["onnx"], "precisions": ["fp16"], "num_prompts": 1}
    (here,) = export_model(checkpoint, out=tmp_path / "here", **asked)
    (there,) = export_model(checkpoint, out=tmp_path / "there", isolate=True, **asked)
    files = [p.relative_to(here) for p in sorted(here.rglob("*")) if p.is_file()]
    assert len(files) > 4
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file
    reports = [measure([here], against=checkpoint, num_prompts=1, isolate=i) for i in (False, True)]
    values = [[(m.gap, m.component, m.metric, m.values) for m in r.measurements] for r in reports]
    assert values[0] == values[1]
