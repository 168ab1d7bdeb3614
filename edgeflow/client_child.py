"""One of the ecosystem's own clients in a process of its own: ``python -P client_child.py JOB``.

Run by path with the Python of the client's environment, where edgeflow is not installed: this file imports
nothing of edgeflow. It speaks the protocol of edgeflow.measure_child (``run N``, ``end``; events ``ready``,
``ran``, ``ended``, ``error``). JOB is JSON: ``{"client", "model", "prompt", "noise", "threads", "spawned",
"sizes"}``; ``noise`` is a .npy file, (1, C, h, w) float32, from which every picture is drawn, in one step and
without guidance.
"""

from __future__ import annotations

import time

_STARTED = time.monotonic()

import base64  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

#: Draws the job's picture: pixels (H, W, 3) uint8.
Draw = Callable[[], Any]


def load_optimum(job: dict[str, Any], clock: Any) -> tuple[Draw, str]:
    """optimum-onnx's Stable Diffusion pipeline on a bundle of ONNX components."""
    import numpy as np
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    clock("import")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    torch.set_num_threads(job["threads"])
    pipe = ORTStableDiffusionPipeline.from_pretrained(job["model"], session_options=options, export=False)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.load(job["noise"]))

    def draw() -> Any:
        drawn = pipe(
            job["prompt"],
            num_inference_steps=1,
            guidance_scale=0.0,
            latents=noise.clone(),
            output_type="np",
        ).images[0]
        return np.rint(drawn * 255).astype(np.uint8)

    return draw, f"optimum-onnx {_version('optimum-onnx')}, onnxruntime {onnxruntime.__version__}"


def load_genai(job: dict[str, Any], clock: Any) -> tuple[Draw, str]:
    """OpenVINO GenAI's text-to-image pipeline on a bundle of OpenVINO components."""
    import numpy as np
    import openvino
    import openvino_genai

    clock("import")
    noise = np.load(job["noise"])

    class Given(openvino_genai.Generator):
        """Hands out the job's noise in place of random numbers."""

        def next(self) -> float:
            raise RuntimeError("the noise is given as a whole")

        def seed(self, new_seed: int) -> None:
            pass

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(noise.reshape(tuple(shape)).copy())

    pipe = openvino_genai.Text2ImagePipeline(
        job["model"], "CPU", INFERENCE_NUM_THREADS=job["threads"], INFERENCE_PRECISION_HINT="f32"
    )
    given = Given()

    def draw() -> Any:
        image = pipe.generate(job["prompt"], num_inference_steps=1, guidance_scale=1.0, generator=given)
        return np.array(image.data[0])

    return draw, f"openvino-genai {_version('openvino-genai')}"


def load_diffusers(job: dict[str, Any], clock: Any) -> tuple[Draw, str]:
    """diffusers on a checkpoint, with the scheduler that the checkpoint ships."""
    import diffusers
    import numpy as np
    import torch

    clock("import")
    torch.set_num_threads(job["threads"])
    pipe = diffusers.DiffusionPipeline.from_pretrained(job["model"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.load(job["noise"]))

    def draw() -> Any:
        drawn = pipe(
            job["prompt"], num_inference_steps=1, guidance_scale=0.0, latents=noise, output_type="np"
        ).images[0]
        return np.rint(drawn * 255).astype(np.uint8)

    return draw, f"diffusers {diffusers.__version__}, torch {torch.__version__}"


def load_sdcpp(job: dict[str, Any], clock: Any) -> tuple[Draw, str]:
    """stable-diffusion.cpp on a single file whose last layer is negated: its flow runs the other way."""
    from stable_diffusion_cpp import StableDiffusion

    clock("import")
    import numpy as np

    engine = StableDiffusion(
        model_path=job["model"],
        prediction="flow",
        rng_type="cpu",
        sampler_rng_type="cpu",
        n_threads=job["threads"],
        wtype=job.get("wtype", "default"),
        vae_decode_only=True,
        verbose=False,
    )
    if not engine.model:
        raise ValueError("did not load the model; it builds networks of Stable Diffusion's sizes alone")
    size = job["picture_size"]

    def draw() -> Any:
        pictures = engine.generate_image(
            prompt=job["prompt"],
            width=size,
            height=size,
            sample_steps=1,
            cfg_scale=1.0,
            sample_method="euler",
            flow_shift=1.0,
            seed=job["seed"],
        )
        return np.asarray(pictures[0].convert("RGB"))

    return draw, f"stable-diffusion-cpp-python {_version('stable-diffusion-cpp-python')}"


LOADERS = {
    "optimum": load_optimum,
    "genai": load_genai,
    "diffusers": load_diffusers,
    "sdcpp": load_sdcpp,
}


def main(argv: list[str]) -> int:
    """Serve one job until stdin ends. Exit code 0, or 1 after the event ``error``."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a client prints is not part of the protocol

    def say(**event: Any) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    job = json.loads(argv[0])
    try:
        _serve(job, say)
    except Exception as error:  # whatever a client raises is the reason its row states
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = f"{job['client']}: {type(error).__name__}: {lines[-1] if lines else 'no reason given'}"
        say(event="error", message=words, exit_code=1)
        return 1
    return 0


def _serve(job: dict[str, Any], say: Callable[..., None]) -> None:
    stages = dict.fromkeys(("python", "import", "open", "session", "tokenizer", "first"), 0.0)
    stages["python"] = (_STARTED - job["spawned"]) * 1000
    last = [_STARTED]
    rss: dict[str, float] = {}

    def clock(stage: str) -> None:
        now = time.monotonic()
        stages[stage] += (now - last[0]) * 1000
        last[0] = now
        rss.setdefault("imported", peak_rss_mib())

    draw, backend = LOADERS[job["client"]](job, clock)
    clock("session")
    picture = draw()
    clock("first")
    pixels = base64.b64encode(zlib.compress(picture.tobytes(), 1)).decode()
    rss["ready"] = peak_rss_mib()
    facts = {"runtime": job["client"], "backend": backend, "threads": job["threads"], "rss_mib": rss}
    say(event="ready", stages=stages, pixels=pixels, shape=list(picture.shape), **facts)
    for line in sys.stdin:
        order, _, count = line.partition(" ")
        if order.strip() == "end":
            break
        say(event="ran", latency_ms=[_timed(draw, picture) for _ in range(int(count))], graphs_ms={})
    say(event="ended", peak_rss_mib=peak_rss_mib(), peak_gpu_mib=None)


def _timed(draw: Draw, expected: Any) -> float:
    """Milliseconds of a picture, which must be the first one again."""
    start = time.perf_counter()
    drawn = draw()
    elapsed = (time.perf_counter() - start) * 1000
    apart = abs(drawn.astype(int) - expected.astype(int)).max()
    if apart > 2:
        raise ValueError(f"a picture from the same prompt and noise differs by {apart} of 255 from the first")
    return elapsed


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def peak_rss_mib() -> float:
    """The most memory this process has held, in MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
