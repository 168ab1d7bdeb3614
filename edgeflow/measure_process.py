"""One model drawing in a process of its own, and what its launch took. Torch-free.

The child (edgeflow.measure_child) draws its first picture, then waits for orders on its standard input; each
answer is a line of JSON.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeflow.bench_machine import gpu_used_mib
from edgeflow.errors import EdgeflowError, RuntimeFailure
from edgeflow.generate import open_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Configuration:
    """What is measured. ``runtime`` None is the model's own; ``threads`` None is what the machine has."""

    model: str
    runtime: str | None = None
    threads: int | None = None
    name: str = ""
    prompt: str | None = None  # the model's own first prompt
    seed: int = 0
    #: The picture (H, W, 3) that prompt and seed must give, to the byte or within REPEAT_PSNR_DB; without it
    #: a bundle's own first prompt is held against the reference that the bundle carries.
    expected: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        return self.name or (Path(self.model).name or self.model)


@dataclass(frozen=True)
class Launch:
    """One process: stages before the first picture (ms, see measure_child.STAGES), then warm pictures."""

    stages: Mapping[str, float]
    rounds: tuple[tuple[float, ...], ...]  # latency of each picture, by turn, ms
    graphs_ms: Mapping[str, tuple[float, ...]]  # by graph; empty for what has one graph alone
    peak_rss_mib: float
    rss_mib: Mapping[str, float]  # after importing, after the first picture
    #: torch's own count of what it reserved; of another library on a GPU, what the device had in use more
    #: after the first picture than before the process began, CUDA's own context with it.
    peak_gpu_mib: float | None = None

    @property
    def first_picture_ms(self) -> float:
        """From the start of the process to its first picture."""
        return math.fsum(self.stages.values())

    @property
    def load_ms(self) -> float:
        """Opening, verifying and creating sessions, without imports and without the first picture."""
        return math.fsum(self.stages[name] for name in ("open", "session", "tokenizer"))

    @property
    def warm_ms(self) -> tuple[float, ...]:
        return tuple(value for turn in self.rounds for value in turn)


class Process:
    """A child that has drawn its first picture and waits. Leaving the context ends it."""

    def __init__(self, job: Mapping[str, Any], configuration: Configuration):
        self._job, self._configuration = dict(job), configuration
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Process:
        env = dict(os.environ)
        if self._configuration.threads is not None:
            env["OMP_NUM_THREADS"] = str(self._configuration.threads)
        used = gpu_used_mib()
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        spawned = time.monotonic()
        self._child = subprocess.Popen(
            [*self.command(), json.dumps({**self._job, "spawned": spawned})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=env,
        )
        try:
            self.ready = self._listen("ready")
            self._taken_mib = self._gpu_taken_mib(used)
        except BaseException:
            self.__exit__()
            raise
        return self

    def command(self) -> list[str]:
        """What is run, less the job: this Python with edgeflow's own child."""
        return [sys.executable, "-P", "-m", "edgeflow.measure_child"]

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                _open(stream).close()

    def _gpu_taken_mib(self, used_before: float | None) -> float | None:
        if used_before is None or self.ready.get("device") != "cuda":
            return None
        used = gpu_used_mib()
        return None if used is None else used - used_before

    def picture(self) -> NDArray[np.uint8]:
        """The first picture (H, W, 3)."""
        import numpy as np

        raw = zlib.decompress(base64.b64decode(self.ready["pixels"]))
        return np.frombuffer(raw, np.uint8).reshape(self.ready["shape"])

    def order(self, what: str, count: int) -> dict[str, Any]:
        """``run`` or ``parts``, ``count`` times: the event ``ran``."""
        self._tell(f"{what} {count}")
        return self._listen("ran")

    def end(self, turns: Sequence[Mapping[str, Any]], parts: Mapping[str, Any]) -> Launch:
        """End the process and give all that it measured."""
        self._tell("end")
        last = self._listen("ended")
        return Launch(
            stages=self.ready["stages"],
            rounds=tuple(tuple(turn["latency_ms"]) for turn in turns),
            graphs_ms=_graphs([parts] if parts else turns),
            peak_rss_mib=last["peak_rss_mib"],
            rss_mib=self.ready["rss_mib"],
            peak_gpu_mib=self._taken_mib if last["peak_gpu_mib"] is None else last["peak_gpu_mib"],
        )

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the child's own words follow, and are the reason
            _open(self._child.stdin).write(line + "\n")
            _open(self._child.stdin).flush()

    def _listen(self, expected: str) -> dict[str, Any]:
        """The next event. Raises what the child says went wrong, with its exit code."""
        line = _open(self._child.stdout).readline()
        event: dict[str, Any] = json.loads(line) if line else {"event": "gone"}
        if event["event"] == expected:
            return event
        if event["event"] == "error":
            failure = RuntimeFailure(event["message"])
            failure.exit_code = int(event["exit_code"])
            raise failure
        raise RuntimeFailure(
            f"measure: {self._configuration.model}: the process ended with code {self._child.wait()}: "
            f"{self._last_words()}"
        )

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def _graphs(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Times by graph, joined over events."""
    names = list(dict.fromkeys(name for event in events for name in event["graphs_ms"]))
    return {name: tuple(v for event in events for v in event["graphs_ms"].get(name, ())) for name in names}


def _open(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise EdgeflowError("measure: the child process has no such stream")
    return stream


def cold_starts(wanted: Configuration, times: int) -> Iterator[float]:
    """Milliseconds from process start to a saved PNG, by ``edgeflow generate`` itself, ``times`` times."""
    env = {**os.environ, **({"OMP_NUM_THREADS": str(wanted.threads)} if wanted.threads else {})}
    prompt = wanted.prompt if wanted.prompt is not None else open_model(wanted.model).generation.prompts[0]
    asked = [wanted.model, prompt, "--seed", str(wanted.seed)]
    asked += ["--runtime", wanted.runtime] if wanted.runtime else []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(times):
            out = Path(folder) / f"{number}.png"
            argv = [sys.executable, "-P", "-m", "edgeflow.cli", "generate", *asked, "-o", str(out)]
            start = time.monotonic()
            done = subprocess.run(argv, capture_output=True, text=True, env=env)
            elapsed = (time.monotonic() - start) * 1000
            if done.returncode or not out.is_file():
                words = done.stderr.strip().splitlines() or ["it said nothing"]
                raise RuntimeFailure(f"measure: {wanted.model}: edgeflow generate failed: {words[-1]}")
            yield elapsed
