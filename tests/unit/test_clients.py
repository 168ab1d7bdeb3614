"""What clients of the ecosystem read beside the graphs, held against their own code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeflow.clients import STEP_FACTOR, scheduler_config, write_client_configs
from edgeflow.errors import CheckpointError

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies a checkpoint's code before it runs it; not into the user's home."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_one_step_of_diffusers_own_scheduler_is_the_flows_up_to_the_factor() -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler.from_config(scheduler_config())
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000] and scheduler.init_noise_sigma == 1.0
    noise, velocity = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scheduler.scale_model_input(noise, 1000), noise)
    moved = scheduler.step(velocity, scheduler.timesteps[0], noise).prev_sample
    assert torch.allclose(moved, STEP_FACTOR * (noise + velocity), rtol=0, atol=5e-7)
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`: 2"):
        scheduler.set_timesteps(2)  # a one-step model has no second step, and diffusers says so


def test_the_factor_is_taken_back_by_the_scale_that_clients_divide_by(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from edgeflow.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(tiny_checkpoint)
    write_client_configs(checkpoint, tmp_path, "onnx")
    stated = json.loads((tmp_path / "vae_decoder" / "config.json").read_text())["scaling_factor"]
    assert stated / STEP_FACTOR == pytest.approx(checkpoint.generation.latent_scale, rel=1e-12)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]


def test_a_whole_timestep_is_fed_to_a_client_of_integers_and_no_other() -> None:
    from edgeflow.runtimes import checks
    from edgeflow.spec import GraphSpec, TensorSpec

    graph = GraphSpec("unet", "unet.xml", (TensorSpec("timestep", (1,), "int64", "timestep"),), ())
    fed = checks.feed(graph, {"timestep": np.array([1000.0], np.float32)})["timestep"]
    assert fed.dtype == np.int64 and fed.tolist() == [1000]
    with pytest.raises(ValueError, match="input timestep: expected int64, got float32"):
        checks.feed(graph, {"timestep": np.array([999.5], np.float32)})


def test_the_shipped_scheduler_follows_a_straight_flow_exactly() -> None:
    from edgeflow.training.rectified_flow_scheduler import RectifiedFlowScheduler

    noise, picture = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    scheduler = RectifiedFlowScheduler()
    for steps in (1, 4):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == [1000 * (steps - i) / steps for i in range(steps)]
        sample = noise
        for timestep in scheduler.timesteps:
            sample = scheduler.step(picture - noise, timestep, sample).prev_sample
        assert torch.allclose(sample, picture, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="expected 1 or more, got 0"):
        scheduler.set_timesteps(0)


def test_diffusers_opens_a_checkpoint_and_draws_edgeflows_picture(tiny_checkpoint: Path) -> None:
    from diffusers import DiffusionPipeline

    from edgeflow.generate import Generator

    generator = Generator.open(tiny_checkpoint)
    _, noise = generator.inputs("red apple", 5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tiny_checkpoint)
    pipeline = DiffusionPipeline.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "red apple",
        num_inference_steps=1,
        guidance_scale=0.0,
        latents=torch.from_numpy(noise),
        output_type="np",
    ).images[0]
    assert np.abs(drawn * 255 - generator.draw("red apple", 5).pixels).max() <= 0.5 + 1e-3


def test_the_built_in_model_ships_the_scheduler_as_it_is() -> None:
    import edgeflow.training.rectified_flow_scheduler as source
    from edgeflow.checkpoint import MODELS

    shipped = MODELS / "emoji" / "scheduler" / "rectified_flow_scheduler.py"
    assert shipped.read_bytes() == Path(source.__file__).read_bytes()


def test_an_older_checkpoint_is_brought_up_to_date(own_checkpoint: Path) -> None:
    from edgeflow.training.client_files import update_checkpoint

    path = own_checkpoint / "model_index.json"
    index = json.loads(path.read_text())
    older = {**index, "_class_name": "RectifiedFlowPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    path.write_text(json.dumps(older))
    update_checkpoint(own_checkpoint)
    assert json.loads(path.read_text()) == index
    facts = json.loads((own_checkpoint / "edgeflow.json").read_text())
    (own_checkpoint / "edgeflow.json").write_text(json.dumps({**facts, "kind": "diffusion", "steps": 25}))
    with pytest.raises(CheckpointError, match="expected kind one-step or rectified-flow, got diffusion"):
        update_checkpoint(own_checkpoint)


def test_the_tokenizer_as_a_graph_gives_clips_ids(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino_tokenizers")
    import shutil

    import openvino

    from edgeflow.exporters.openvino_tokenizer import FILES, write_tokenizer
    from edgeflow.tokenizer import ClipTokenizer

    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(tiny_checkpoint / "tokenizer", folder)
        write_tokenizer(folder)
    for name in FILES:
        for ending in ("xml", "bin"):
            first, second = ((folder / f"{name}.{ending}").read_bytes() for folder in folders)
            assert first == second, "equal inputs give equal bytes"
    core, ours = openvino.Core(), ClipTokenizer.from_folder(folders[0])
    encode = core.compile_model(folders[0] / f"{FILES[0]}.xml", "CPU")
    for prompt in ("Red  APPLE, noto style", "", "it's 2024!! café 🦉", "owl " * 40):
        ids = encode([prompt])["input_ids"][0]
        padded = np.full(ours.max_length, ours.pad_id)
        padded[: len(ids)] = ids
        assert padded.tolist() == ours.encode(prompt)[0].tolist(), prompt


def test_components_without_the_tokenizers_package_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openvino")
    import sys

    from edgeflow.errors import BackendMissing
    from edgeflow.export import plan

    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    assert len(plan(["openvino"], ["fp32"], ["pipeline"], "float32")) == 1
    with pytest.raises(BackendMissing, match="openvino_tokenizers is not installed"):
        plan(["openvino"], ["fp32"], ["components"], "float32")
