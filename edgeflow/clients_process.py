"""The ecosystem's own clients as processes: which Python, and what each must be told. Torch-free.

Each client has an environment of its own, made by ``make clients`` from tests/clients/requirements-NAME.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeflow.errors import RuntimeFailure
from edgeflow.generate import open_model
from edgeflow.measure_process import Configuration, Process
from edgeflow.noise import gaussian_noise

ENVIRONMENTS = Path(".clients")
_CHILD = Path(__file__).with_name("client_child.py")


@dataclass(frozen=True)
class Client:
    """``name`` is its loader's in client_child.py, ``environment`` its folder's under .clients."""

    name: str
    environment: str
    title: str

    def python(self, environments: Path = ENVIRONMENTS) -> Path:
        """Its interpreter. Raises RuntimeFailure where there is none, with what pip said last."""
        folder = environments / self.environment
        python = folder / "bin" / "python"
        if (folder / "installed").is_file() and python.is_file():
            return python.absolute()
        log = environments / f"{self.environment}.log"
        words = (
            log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        )
        said = next(
            (line for line in reversed(words) if "error" in line.lower()), "make bench-peers has not made it"
        )
        raise RuntimeFailure(f"{self.title}: no environment {folder}: {said.strip()}")


CLIENTS = {
    client.name: client
    for client in (
        Client("optimum", "optimum", "optimum-onnx"),
        Client("genai", "genai", "OpenVINO GenAI"),
        Client("diffusers", "diffusers", "diffusers"),
        Client("sdcpp", "sdcpp", "stable-diffusion.cpp"),
    )
}


class ClientProcess(Process):
    """A client that has drawn its first picture from the noise of edgeflow's seed, and waits for orders."""

    def __init__(self, python: Path, job: dict[str, Any], configuration: Configuration):
        super().__init__(job, configuration)
        self._python = python

    def command(self) -> list[str]:
        """The client's Python with the child's file: edgeflow is not installed there."""
        return [str(self._python), "-P", str(_CHILD)]


def client_job(
    client: Client, model: Path, source: str, threads: int, seed: int, work: Path
) -> dict[str, Any]:
    """What a child is told: ``model``, with the first prompt and the noise of ``source``, edgeflow's own."""
    import numpy as np

    spec = open_model(source).generation
    noise = work / f"noise-{seed}.npy"
    if not noise.is_file():
        np.save(noise, gaussian_noise(seed, (1, *spec.latent_shape)))
    return {
        "client": client.name,
        "model": str(model),
        "prompt": spec.prompts[0],
        "noise": str(noise),
        "seed": seed,
        "threads": threads,
        "picture_size": spec.picture_size,
    }
