"""Bundles and checkpoints opened unchanged by the ecosystem's own clients, each in an environment of its own.

``make clients`` makes the environments and runs these. Every client draws the noise of edgeflow's seed in one
step; the picture is held against ``edgeflow generate``'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeflow.clients_process import CLIENTS, ClientProcess, client_job
from edgeflow.errors import RuntimeFailure
from edgeflow.generate import Generator
from edgeflow.measure_process import Configuration
from edgeflow.metrics import psnr_db

pytestmark = pytest.mark.clients

ENVIRONMENTS = Path(__file__).parents[2] / ".clients"
#: Equal but for rounding: edgeflow rounds to the nearest of 256 levels, GenAI cuts to the one below, so its
#: worst case is one level everywhere, 48.1 dB.
LIMIT_DB = {"optimum": 60.0, "genai": 48.0, "diffusers": 60.0}
#: client, precision of the bundle it opens
CASES = [("optimum", "fp32"), ("optimum", "fp16"), ("genai", "fp32"), ("genai", "fp16")]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """(model, backend, precision) → a bundle of components, exported once."""
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.export import export_model

    made: dict[tuple[str, str, str], Path] = {}

    def exported(model: str, backend: str, precision: str) -> Path:
        key = (model, backend, precision)
        if key not in made:
            asked = {"backends": [backend], "precisions": [precision], "layouts": ["components"]}
            out = tmp_path_factory.mktemp("clients")
            made[key] = export_model(Checkpoint.open(model), out=out, num_prompts=1, **asked)[0]
        return made[key]

    return exported


def drawn_by(name: str, model: Path, source: str, seed: int, work: Path) -> np.ndarray:
    """The client's picture (H, W, 3); the test is skipped where its environment was not made."""
    client = CLIENTS[name]
    try:
        python = Path(sys.executable) if name == "diffusers" else client.python(ENVIRONMENTS)
    except RuntimeFailure as error:
        pytest.skip(str(error))
    job = client_job(client, model, source, 1, seed, work)
    with ClientProcess(python, job, Configuration(str(model), threads=1)) as process:
        again = process.order("run", 1)  # raises where the second picture is not the first
        assert len(again["latency_ms"]) == 1
        return process.picture()


@pytest.mark.parametrize(("client", "precision"), CASES)
@pytest.mark.parametrize("model", ["emoji", "tiny"])
def test_a_bundle_of_components_draws_edgeflows_picture(
    client: str,
    precision: str,
    model: str,
    bundles: Callable[[str, str, str], Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    backend = {"optimum": "onnx", "genai": "openvino"}[client]
    bundle = bundles("emoji" if model == "emoji" else str(tiny_checkpoint), backend, precision)
    picture = drawn_by(client, bundle, str(bundle), 3, tmp_path)
    generator = Generator.open(bundle)
    expected = generator.draw(generator.spec.prompts[0], 3).pixels
    assert picture.shape == expected.shape
    assert psnr_db(expected, picture, 255.0) >= LIMIT_DB[client]
    assert np.abs(expected.astype(int) - picture).max() <= 1
    other = generator.draw(generator.spec.prompts[0], 4).pixels  # the gate can fail
    assert psnr_db(other, picture, 255.0) < LIMIT_DB[client]


def test_a_checkpoint_draws_edgeflows_picture_in_diffusers(tmp_path: Path) -> None:
    """In the diffusers that edgeflow is pinned to, in a process that knows nothing of edgeflow."""
    from edgeflow.checkpoint import MODELS

    picture = drawn_by("diffusers", MODELS / "emoji", "emoji", 3, tmp_path)
    generator = Generator.open("emoji")
    expected = generator.draw(generator.spec.prompts[0], 3).pixels
    assert psnr_db(expected, picture, 255.0) >= LIMIT_DB["diffusers"]
