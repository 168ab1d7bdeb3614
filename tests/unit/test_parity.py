"""Parity held against errors of known size: a NumPy model, and runtimes that are off by so many dB."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeflow import metrics, parity, registry
from edgeflow.bundle import REFERENCE, Bundle, Manifest, write_bundle_files, write_reference
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import (
    BackendMissing,
    BundleError,
    CheckpointError,
    GateFailed,
    RuntimeFailure,
    UnknownNameError,
    UsageError,
)
from edgeflow.noise import gaussian_noise
from edgeflow.parity_report import FAIL, PASS, UNGATED, UNMEASURED, Measurement, ParityReport, judged, render
from edgeflow.spec import COMPONENTS, FIRST_TIMESTEP, PIPELINE, GenerationSpec, GraphSpec, TensorSpec

PROMPTS = ("red apple", "sailboat", "cat", "grinning face")
SCALE = 0.5
Array = np.ndarray[Any, Any]


def amplitude(db: float) -> float:
    """The relative amplitude that lies ``db`` below."""
    return 10 ** (-db / 20)


# --- metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("db", [20.0, 60.0, 120.0])
def test_sqnr_of_a_relative_error_is_its_level(db: float) -> None:
    reference = np.random.default_rng(0).standard_normal((1, 3, 5))
    assert metrics.sqnr_db(reference, reference * (1 + amplitude(db))) == pytest.approx(db, abs=1e-6)


@pytest.mark.parametrize(("peak", "offset", "db"), [(1.0, 0.01, 40.0), (255.0, 2.55, 40.0), (1.0, 1.0, 0.0)])
def test_psnr_of_an_offset_is_its_level_below_the_peak(peak: float, offset: float, db: float) -> None:
    reference = np.random.default_rng(0).uniform(0, peak, (1, 3, 4, 4))
    assert metrics.psnr_db(reference, reference + offset, peak) == pytest.approx(db)


def test_sqnr_is_of_the_sums_not_the_mean_of_ratios() -> None:
    assert metrics.sqnr_db([10.0, 0.0], [10.0, 1.0]) == pytest.approx(20.0)
    assert metrics.max_abs([10.0, 0.0], [8.0, 1.0]) == 2.0


def test_equal_arrays_are_infinitely_close() -> None:
    values = np.array([0.0, 1.0, -2.0], np.float16)
    assert metrics.sqnr_db(values, values) == metrics.psnr_db(values, values, 1.0) == math.inf
    assert metrics.max_abs(values, values) == 0.0
    assert metrics.sqnr_db([0.0], [0.0]) == math.inf
    assert metrics.sqnr_db([0.0], [0.1]) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_unbounded(bad: float, side: int) -> None:
    pair = [np.array([1.0, 2.0]), np.array([1.0, 2.0])]
    pair[side][0] = bad
    assert metrics.sqnr_db(*pair) == metrics.psnr_db(*pair, 1.0) == -math.inf
    assert metrics.max_abs(*pair) == math.inf
    assert metrics.sqnr_db([bad], [bad]) == -math.inf  # equal, yet no picture


def test_bytes_do_not_wrap_around() -> None:
    assert metrics.max_abs(np.array([0], np.uint8), np.array([255], np.uint8)) == 255.0


@pytest.mark.parametrize("metric", [metrics.sqnr_db, metrics.max_abs, lambda a, b: metrics.psnr_db(a, b, 1)])
def test_arrays_that_cannot_be_compared_are_misuse(metric: Callable[[Any, Any], float]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\), got \(2,\)"):  # would broadcast
        metric(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ValueError, match="at least one value"):
        metric(np.zeros(0), np.zeros(0))


def test_a_peak_of_nothing_is_misuse() -> None:
    with pytest.raises(ValueError, match="peak"):
        metrics.psnr_db([1.0], [1.0], 0.0)


# --- a model in NumPy, its bundle, and runtimes that err by a known amount --------------------------------


class Model:
    """A small model in NumPy, with the named inputs and outputs of a bundle's graphs."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.table = rng.standard_normal((16, 3)).astype(np.float32)
        self.mix = rng.standard_normal((3, 2)).astype(np.float32)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Array:
        return getattr(self, graph)(**inputs)

    def text_encoder(self, input_ids: Array) -> Array:
        return self.table[input_ids]

    def unet(self, sample: Array, timestep: Array, encoder_hidden_states: Array) -> Array:
        assert timestep.dtype == np.float32 and timestep.tolist() == [FIRST_TIMESTEP]
        return np.tanh(sample + encoder_hidden_states.mean(dtype=np.float32))

    def decoder(self, latent: Array) -> Array:
        mixed = np.einsum("oc,nchw->nohw", self.mix, latent)
        return np.tanh(mixed.repeat(2, axis=2).repeat(2, axis=3) / 4)

    def pipeline(self, input_ids: Array, noise: Array) -> Array:
        t = np.array([FIRST_TIMESTEP], np.float32)
        latent = (noise + self.unet(noise, t, self.text_encoder(input_ids))) / np.float32(SCALE)
        return np.clip(self.decoder(latent) / 2 + np.float32(0.5), 0, 1)


MODEL = Model()


def _tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, shape, dtype, name)


def _graph_specs(picture: str = "float32") -> dict[str, GraphSpec]:
    ids, text, latent = _tensor("input_ids", 1, 4, dtype="int64"), (1, 4, 3), (1, 2, 4, 4)
    inputs = {
        "text_encoder": (ids,),
        "unet": (
            _tensor("sample", *latent),
            _tensor("timestep", 1),
            _tensor("encoder_hidden_states", *text),
        ),
        "decoder": (_tensor("latent", *latent),),
        PIPELINE: (ids, _tensor("noise", *latent)),
    }
    outputs = {
        "text_encoder": _tensor("last_hidden_state", *text),
        "unet": _tensor("velocity", *latent),
        "decoder": _tensor("image", 1, 3, 8, 8),
        PIPELINE: _tensor("image", 1, 3, 8, 8, dtype=picture),
    }
    return {name: GraphSpec(name, f"{name}.bin", inputs[name], (outputs[name],)) for name in outputs}


def reference_arrays(model: Model) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for seed in range(len(PROMPTS)):
        ids, noise = np.array([[15, seed + 1, 2, 15]]), gaussian_noise(seed, (1, 2, 4, 4))
        hidden = model.text_encoder(ids)
        velocity = model.unet(noise, np.array([FIRST_TIMESTEP], np.float32), hidden)
        latent = (noise + velocity) / np.float32(SCALE)
        arrays |= {
            f"prompt{seed}/input_ids": ids,
            f"prompt{seed}/noise": noise,
            f"prompt{seed}/text_encoder/last_hidden_state": hidden,
            f"prompt{seed}/unet/velocity": velocity,
            f"prompt{seed}/decoder/latent": latent,
            f"prompt{seed}/decoder/image": model.decoder(latent),
            f"prompt{seed}/pipeline/image": model.pipeline(ids, noise),
        }
    return arrays


def make_bundle(
    root: Path,
    *,
    layout: str = "pipeline",
    precision: str = "fp32",
    spec: GenerationSpec | None = None,
    arrays: dict[str, Array] | None = None,
    picture: str = "float32",
) -> Path:
    """A bundle of the backend ``fake``: by default the NumPy model's, without a checkpoint anywhere."""
    root.mkdir(parents=True)
    spec = spec or GenerationSpec(
        name="numpy-model",
        checkpoint_hash="0" * 64,
        licence="Apache-2.0",
        tokenizer_dir=root,
        max_tokens=4,
        latent_shape=(2, 4, 4),
        latent_scale=SCALE,
        picture_size=8,
        steps=1,
        timestep=FIRST_TIMESTEP,
        prompts=PROMPTS,
    )
    facts = {k: v for k, v in asdict(spec).items() if k != "tokenizer_dir"}
    names = (PIPELINE,) if layout == "pipeline" else COMPONENTS
    for name in names:
        (root / f"{name}.bin").write_bytes(b"graph")
    write_reference(root / REFERENCE, arrays or reference_arrays(MODEL))
    manifest = Manifest(
        backend="fake",
        precision=precision,
        layout=layout,
        model={**facts, "origin": "edgeflow tests"},
        recipe=None,
        graphs=tuple(_graph_specs(picture)[name] for name in names),
        files={},
        versions={"edgeflow": "0"},
    )
    write_bundle_files(root, manifest)
    return root


Spoil = Callable[[str, Array, Mapping[str, Array]], Array]
Run = Callable[[str, Mapping[str, Array]], Array]
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Register the runtime ``fake``: what ``run`` gives (by default the NumPy model), then ``spoil``."""

    def register(spoil: Spoil = lambda graph, output, inputs: output, run: Run = MODEL.run) -> None:
        class Fake:
            name = "fake"

            @classmethod
            def load(cls, bundle: Bundle) -> Fake:
                return cls()

            def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
                return {parity.OUTPUTS[graph]: spoil(graph, run(graph, inputs), inputs)}

        module = ModuleType("edgeflow_fake_runtime")
        module.Fake = Fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry.RUNTIMES, "fake", f"{module.__name__}:Fake")

    return register


def scaled(graph: str, db: float) -> Spoil:
    """Errs in one graph alone, by a relative error of ``db`` below the signal."""
    return lambda name, output, inputs: output * (1 + amplitude(db)) if name == graph else output


def statuses(report: ParityReport) -> dict[tuple[str, str], str]:
    return {(m.gap, m.component): m.status for m in report.measurements}


# --- the bundle's own reference -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pipeline", "components"])
def test_an_exact_runtime_passes(tmp_path: Path, install: Install, layout: str) -> None:
    install()
    report = parity.measure([make_bundle(tmp_path / "b", layout=layout)])
    report.check()
    graphs = (PIPELINE,) if layout == "pipeline" else COMPONENTS
    expected = {("lowering", graph): PASS for graph in graphs} | {("end_to_end", PIPELINE): PASS}
    assert statuses(report) == {**expected, ("rewrite", "all"): UNMEASURED}
    assert all(m.worst == math.inf and len(m.values) == 4 for m in report.measurements if m.values)
    assert {m.against for m in report.measurements if m.bundle} == {REFERENCE}


@pytest.mark.parametrize("graph", COMPONENTS)
@pytest.mark.parametrize(
    ("precision", "db", "passes"),
    [("fp32", 60.5, True), ("fp32", 59.5, False), ("fp16", 40.5, True), ("fp16", 39.5, False)],
)
def test_lowering_gates_each_graph_by_itself(
    tmp_path: Path, install: Install, graph: str, precision: str, db: float, passes: bool
) -> None:
    install(scaled(graph, db))
    report = parity.measure([make_bundle(tmp_path / "b", layout="components", precision=precision)])
    (row,) = [m for m in report.measurements if (m.gap, m.component) == ("lowering", graph)]
    assert row.worst == pytest.approx(db, abs=0.01)
    assert row.status == (PASS if passes else FAIL)
    others = {s for (gap, c), s in statuses(report).items() if gap == "lowering" and c != graph}
    assert others == {PASS}  # an error upstream is not blamed on the graphs behind it


@pytest.mark.parametrize(
    ("precision", "db", "passes"),
    [("fp32", 50.2, True), ("fp32", 49.8, False), ("fp16", 35.2, True), ("fp16", 34.8, False)],
)
def test_end_to_end_gates_the_picture(
    tmp_path: Path, install: Install, precision: str, db: float, passes: bool
) -> None:
    install(lambda graph, output, inputs: output + amplitude(db))
    report = parity.measure([make_bundle(tmp_path / "b", precision=precision)])
    (row,) = [m for m in report.measurements if m.gap == "end_to_end"]
    assert (row.metric, row.status) == ("psnr_db", PASS if passes else FAIL)
    assert row.worst == pytest.approx(db, abs=0.01)


def test_the_worst_prompt_is_gated_and_named(tmp_path: Path, install: Install) -> None:
    noise = gaussian_noise(2, (1, 2, 4, 4))

    def spoil(graph: str, output: Array, inputs: Mapping[str, Array]) -> Array:
        return output * np.float32(1.1) if np.array_equal(inputs["noise"], noise) else output

    install(spoil)
    report = parity.measure([make_bundle(tmp_path / "b")])
    (row,) = [m for m in report.measurements if m.gap == "lowering"]
    assert row.status == FAIL and row.median == math.inf
    assert [math.isinf(v) for v in row.values] == [True, True, False, True]
    assert "lowering: pipeline: SQNR 20.0 dB, gate ≥ 60 dB (prompt 'cat')" in report.failures[0]


def test_a_runtime_that_overflows_fails_every_gate(tmp_path: Path, install: Install) -> None:
    def spoil(graph: str, output: Array, inputs: Mapping[str, Array]) -> Array:
        output = output.copy()
        output.flat[0] = np.nan
        return output

    install(spoil)
    bundle = make_bundle(tmp_path / "b")
    report = parity.measure([bundle], gates={"lowering": -1000.0, "end-to-end": -1000.0})
    assert {m.status for m in report.measurements if m.bundle} == {FAIL}
    assert "not finite" in report.failures[0]


def test_swapped_channels_fail(tmp_path: Path, install: Install) -> None:
    install(lambda graph, output, inputs: output[:, ::-1])
    report = parity.measure([make_bundle(tmp_path / "b", precision="fp16")])
    assert {m.status for m in report.measurements if m.bundle} == {FAIL}


def test_a_picture_of_another_shape_or_a_failing_runtime_is_a_failure_not_a_crash(
    tmp_path: Path, install: Install
) -> None:
    def spoil(graph: str, output: Array, inputs: Mapping[str, Array]) -> Array:
        if graph == "unet":
            raise RuntimeFailure("runtime fake: the op 'gelu' is not known")
        return output[:, :2] if graph == "decoder" else output

    install(spoil)
    report = parity.measure([make_bundle(tmp_path / "b", layout="components")])
    assert statuses(report)["lowering", "text_encoder"] == PASS
    assert len(report.failures) == 3
    assert "b: lowering: unet: runtime fake: the op 'gelu' is not known" in report.failures
    assert any("lowering: decoder: shapes differ" in failure for failure in report.failures)


def test_a_runtime_that_does_not_load_is_one_failure_and_the_other_bundle_is_measured(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    fake = sys.modules["edgeflow_fake_runtime"].Fake  # type: ignore[attr-defined]

    def load(bundle: Bundle) -> Any:
        if bundle.root.name == "one":
            raise RuntimeFailure("runtime fake: unet.bin: the op 'gelu' is not known")
        return fake()

    monkeypatch.setattr(fake, "load", load)
    report = parity.measure([make_bundle(tmp_path / name, layout="components") for name in ("one", "two")])
    assert report.failures == ("one: lowering: all: runtime fake: unet.bin: the op 'gelu' is not known",)
    assert [m.status for m in report.measurements if m.bundle == "one"] == [FAIL, UNMEASURED]
    assert [m.status for m in report.measurements if m.bundle == "two"] == [PASS] * 4


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[str]], list[str]]:
    """The graphs that each process was to load, and those that ran; processes are played, one at a time."""
    loaded: list[list[str]] = []
    runs: list[str] = []
    alive: list[str] = []

    class Child:
        def call(self, target: str, *args: Any, hold: bool = False) -> Any:
            if hold:
                loaded.append([graph.name for graph in args[0].manifest.graphs])
                return None
            assert target == ".run" and [args[0]] == loaded[-1]
            runs.append(args[0])
            return registry.runtime("fake").load(None).run(*args)  # type: ignore[arg-type]

    @contextmanager
    def played(what: str) -> Iterator[Child]:
        assert not alive
        alive.append(what)
        yield Child()
        alive.pop()

    monkeypatch.setattr(
        parity.parity_isolated, "worker", SimpleNamespace(worker=played, Held=parity.worker.Held)
    )
    return loaded, runs


def test_one_graph_in_turn_gives_what_all_at_once_give(
    tmp_path: Path, install: Install, in_turn: tuple[list[list[str]], list[str]]
) -> None:
    """Each graph is loaded once for all prompts, and not run again on what it has been given before."""
    install(scaled("unet", 70))
    path = make_bundle(tmp_path / "b", layout="components")
    whole, turns = (parity.measure([path], isolate=isolate) for isolate in (False, True))
    assert turns.measurements == whole.measurements
    loaded, runs = in_turn
    assert loaded == [[graph] for graph in COMPONENTS]
    # The text encoder is exact, so the picture's own chain parts from the reference's behind the UNet.
    n = len(PROMPTS)
    assert runs == ["text_encoder"] * n + ["unet"] * n + ["decoder"] * 2 * n


def test_in_turn_a_failing_graph_is_named_and_the_rest_is_measured(
    tmp_path: Path, install: Install, in_turn: tuple[list[list[str]], list[str]]
) -> None:
    def spoil(graph: str, output: Array, inputs: Mapping[str, Array]) -> Array:
        if graph == "unet":
            raise RuntimeFailure("runtime fake: the op 'gelu' is not known")
        return output

    install(spoil)
    report = parity.measure([make_bundle(tmp_path / "b", layout="components")], isolate=True)
    assert statuses(report)["lowering", "decoder"] == PASS
    assert sorted(report.failures) == [
        "b: end to end: pipeline: runtime fake: the op 'gelu' is not known",
        "b: lowering: unet: runtime fake: the op 'gelu' is not known",
    ]


def test_all_failures_of_all_bundles_are_named_at_once(tmp_path: Path, install: Install) -> None:
    install(scaled("decoder", 20))
    bundles = [make_bundle(tmp_path / name, layout="components") for name in ("one", "two")]
    report = parity.measure(bundles)
    with pytest.raises(GateFailed) as failed:
        report.check()
    assert failed.value.exit_code == 3
    for name in ("one", "two"):
        assert f"{name}: lowering: decoder" in str(failed.value)
        assert f"{name}: end to end: pipeline" in str(failed.value)
    assert "4 of 8 gates failed" in str(failed.value)


def test_a_picture_of_bytes_is_compared_with_the_rounded_reference(tmp_path: Path, install: Install) -> None:
    install(lambda graph, output, inputs: np.rint(output * 255).astype(np.uint8))
    report = parity.measure([make_bundle(tmp_path / "b", picture="uint8")])
    lowering, end = (m for m in report.measurements if m.bundle)
    assert (lowering.worst, lowering.status, end.status) == (math.inf, PASS, PASS)
    # An error spread evenly over ±½ of 1/255 has the power 1/(12·255²): 58.9 dB below 1.
    assert end.median == pytest.approx(10 * math.log10(12 * 255**2), abs=1.0)


def test_a_precision_without_a_gate_is_reported_and_not_passed(tmp_path: Path, install: Install) -> None:
    install(scaled(PIPELINE, 30))
    report = parity.measure([make_bundle(tmp_path / "b", precision="w8")])
    assert {m.status for m in report.measurements if m.bundle} == {UNGATED}
    assert PASS not in statuses(report).values()
    gated = parity.measure([tmp_path / "b"], gates={"lowering": 35})
    assert statuses(gated)["lowering", PIPELINE] == FAIL


def test_the_rewrite_is_never_a_pass_without_the_checkpoint(tmp_path: Path, install: Install) -> None:
    install()
    report = parity.measure([make_bundle(tmp_path / "b")])
    row = report.measurements[0]
    assert (row.gap, row.status, row.values, row.reason) == ("rewrite", UNMEASURED, (), "checkpoint absent")
    text = render(report)
    assert "not measured: checkpoint absent" in text
    assert "numpy-model: checkpoint absent: measured against each bundle's own reference.npz" in text
    assert "2 passed, 0 failed, 1 not measured" in text


def test_without_torch_the_report_says_so(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setitem(sys.modules, "torch", None)
    report = parity.measure([make_bundle(tmp_path / "b")])
    assert report.measurements[0].reason == "torch is not installed"


def test_measuring_against_the_bundle_imports_no_torch(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    code = (
        "import sys\n"
        "from edgeflow import parity\n"
        "from edgeflow.bundle import Bundle\n"
        "b = Bundle.open(sys.argv[1])\n"
        "parity.reference_from_bundle(b, None, *[parity.find_checkpoint(b, None)[1]])\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'diffusers', 'transformers'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_number_of_prompts(tmp_path: Path, install: Install) -> None:
    install()
    bundle = make_bundle(tmp_path / "b")
    report = parity.measure([bundle], num_prompts=2)
    assert {len(m.values) for m in report.measurements if m.values} == {2}
    with pytest.raises(UsageError, match="expected 1 to 4, got 5"):
        parity.measure([bundle], num_prompts=5)


def test_a_reference_that_lacks_an_array_is_an_error(tmp_path: Path, install: Install) -> None:
    install()
    arrays = reference_arrays(MODEL)
    del arrays["prompt2/unet/velocity"]
    with pytest.raises(BundleError, match=r"expected prompt2/unet/velocity, found none"):
        parity.measure([make_bundle(tmp_path / "b", layout="components", arrays=arrays)])
    parity.measure([make_bundle(tmp_path / "fused", arrays=arrays)]).check()  # which does not need it


def test_a_missing_backend_is_said_before_anything_is_measured(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setitem(registry.RUNTIMES, "fake", "no_such_backend_package:Runtime")
    with pytest.raises(BackendMissing):
        parity.measure([make_bundle(tmp_path / "b")], progress=lambda text: pytest.fail(text))


def test_labels_tell_bundles_apart(tmp_path: Path) -> None:
    roots = [tmp_path / "new" / "onnx", tmp_path / "old" / "onnx", tmp_path / "old" / "coreml"]
    bundles = [Bundle.open(make_bundle(root)) for root in roots]
    assert parity.labels(bundles) == ["new/onnx", "old/onnx", "coreml"]
    assert parity.labels([bundles[0], bundles[0]]) == ["onnx", "onnx"]


# --- the report -----------------------------------------------------------------------------------------


def measurement(metric: str, gate: float | None, *values: float) -> Measurement:
    return Measurement(
        "lowering", "m", "0", "b", "fake", "fp32", "unet", REFERENCE, metric, gate, PROMPTS, values, FAIL
    )


@pytest.mark.parametrize(
    ("metric", "gate", "values", "status"),
    [
        ("sqnr_db", 60.0, (60.0, 90.0), PASS),
        ("sqnr_db", 60.0, (90.0, 59.999), FAIL),
        ("max_abs", 1e-4, (1e-4, 0.0), PASS),
        ("max_abs", 1e-4, (0.0, 1.1e-4), FAIL),
        ("max_abs", 1e-4, (math.inf,), FAIL),
        ("sqnr_db", -math.inf, (math.nan,), FAIL),
        ("sqnr_db", None, (1.0,), UNGATED),
        ("sqnr_db", 60.0, (), UNMEASURED),
    ],
)
def test_judging(metric: str, gate: float | None, values: tuple[float, ...], status: str) -> None:
    assert judged(measurement(metric, gate, *values)) == status


def test_json_holds_all_of_it_and_is_valid(tmp_path: Path, install: Install) -> None:
    install(scaled("unet", 20))
    report = parity.measure([make_bundle(tmp_path / "b", layout="components")])
    raw = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (raw["schema"], raw["kind"], raw["passed"]) == (1, "parity", False)
    assert raw["failures"] == list(report.failures)
    rows = {(m["gap"], m["component"]): m for m in raw["measurements"]}
    assert rows["lowering", "decoder"]["worst"] == "inf"
    assert rows["lowering", "unet"]["worst"] == pytest.approx(20, abs=0.01)
    assert rows["lowering", "unet"]["gate"] == 60.0
    assert rows["rewrite", "all"]["worst"] is None
    assert rows["lowering", "unet"]["prompts"] == list(PROMPTS)
    assert str(tmp_path) not in json.dumps(raw)
    assert "edgeflow" in raw["versions"] and "torch" not in raw["versions"]


def test_the_report_is_the_same_when_repeated(tmp_path: Path, install: Install) -> None:
    install(scaled("unet", 45))
    bundle = make_bundle(tmp_path / "b", layout="components")
    assert parity.measure([bundle]).as_dict() == parity.measure([bundle]).as_dict()


# --- the command line -----------------------------------------------------------------------------------


def test_cli_prints_one_table_for_all_bundles(
    tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    bundles = [str(make_bundle(tmp_path / name, layout="components")) for name in ("one", "two")]
    assert main(["parity", *bundles]) == 0
    out, err = capsys.readouterr()
    assert out.count("Verdict") == 1 and err == ""
    assert all(word in out for word in ("one", "two", "text_encoder", "unet", "decoder", "end to end"))
    assert out.endswith("parity: 8 passed, 0 failed, 1 not measured; the worst of 4 prompts is gated\n")


def test_cli_prints_everything_before_it_fails(
    tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(scaled(PIPELINE, 20))
    bundle = str(make_bundle(tmp_path / "b"))
    assert main(["parity", bundle, "--json"]) == 3
    out, err = capsys.readouterr()
    raw = json.loads(out)
    assert not raw["passed"] and len(raw["measurements"]) == 3
    assert err.startswith("error: parity: 2 of 2 gates failed: ") and err.count("\n") == 1
    assert main(["parity", bundle, "--gate", "lowering=15", "--gate", "end-to-end=15"]) == 0


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--gate", "nonsense=3"], 2, "gate 'nonsense' is not known; known: end-to-end, lowering, rewrite"),
        (
            ["--gate", "lowering=high"],
            2,
            "gate: lowering=high: expected a number after lowering=, got 'high'",
        ),
        (["--gate", "lowering=nan"], 2, "expected a number"),
        (["--num-prompts", "9"], 2, "expected 1 to 4, got 9"),
        (["--runtime", "abacus"], 2, "runtime 'abacus' is not known"),
        (["--against", "no-such-model"], 2, "model 'no-such-model' is not known"),
    ],
)
def test_cli_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    message: str,
) -> None:
    install()
    assert main(["parity", str(make_bundle(tmp_path / "b")), *argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_cli_refuses_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err


# --- against a checkpoint -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def components(tiny_checkpoint: Path) -> Any:
    from edgeflow.components import load_components

    return load_components(Checkpoint.open(tiny_checkpoint))


@pytest.fixture
def exported(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., Path]:
    """A bundle that says it was exported from the tiny checkpoint; its own reference is of another model."""
    spec = Checkpoint.open(tiny_checkpoint).generation
    return lambda name="b", **facts: make_bundle(tmp_path / name, spec=spec, **facts)


def eager(components: Any) -> Run:
    """The export-ready modules themselves, as a runtime."""
    return lambda graph, inputs: components[graph].run(inputs)[parity.OUTPUTS[graph]]


@pytest.mark.parametrize("layout", ["pipeline", "components"])
def test_references_are_computed_afresh_from_the_checkpoint(
    tiny_checkpoint: Path, components: Any, exported: Any, install: Install, layout: str
) -> None:
    install(run=eager(components))
    report = parity.measure([exported(layout=layout)], against=str(tiny_checkpoint))
    report.check()
    rows = {(m.gap, m.component, m.metric): m for m in report.measurements}
    for graph in (*COMPONENTS, PIPELINE):
        assert rows["rewrite", graph, "sqnr_db"].status == PASS
        assert rows["rewrite", graph, "max_abs"].status == PASS
    lowered = [m for m in report.measurements if m.gap == "lowering"]
    assert all(m.worst == math.inf and m.against == "checkpoint" for m in lowered)
    assert not report.notes and "torch" in report.versions


def test_end_to_end_is_against_the_original_modules(
    tiny_checkpoint: Path, components: Any, exported: Any, install: Install
) -> None:
    from edgeflow.tokenizer import ClipTokenizer

    install(run=eager(components))
    report = parity.measure([exported()], against=str(tiny_checkpoint), num_prompts=1)
    spec = Checkpoint.open(tiny_checkpoint).generation
    ids = ClipTokenizer.from_folder(spec.tokenizer_dir).encode(spec.prompts[0])
    inputs = {"input_ids": ids, "noise": gaussian_noise(0, (1, *spec.latent_shape))}
    original = components[PIPELINE].run_original(inputs)["image"].astype(np.float64)
    error = np.mean((components[PIPELINE].run(inputs)["image"] - original) ** 2)
    (row,) = [m for m in report.measurements if m.gap == "end_to_end"]
    assert row.worst == pytest.approx(math.inf if error == 0 else -10 * math.log10(error))


def test_a_wrong_rewrite_is_not_hidden_by_an_exact_lowering(
    tiny_checkpoint: Path,
    components: Any,
    exported: Any,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import dataclasses

    decoder = components["decoder"]

    class Off(type(decoder)):  # type: ignore[misc]
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            return {k: v * np.float32(1.01) for k, v in super().run(inputs).items()}

    fields = {f.name: getattr(decoder, f.name) for f in dataclasses.fields(decoder)}
    wrong = {**components, "decoder": Off(**fields)}
    monkeypatch.setattr("edgeflow.components.load_components", lambda checkpoint, **how: wrong)
    install(run=eager(wrong))
    report = parity.measure([exported(layout="components")], against=str(tiny_checkpoint))
    rows = {(m.gap, m.component, m.metric): m.status for m in report.measurements}
    assert rows["rewrite", "decoder", "sqnr_db"] == rows["rewrite", "decoder", "max_abs"] == FAIL
    assert rows["rewrite", "unet", "sqnr_db"] == PASS
    assert rows["lowering", "decoder", "sqnr_db"] == PASS
    assert rows["end_to_end", PIPELINE, "psnr_db"] == FAIL


def test_the_rewrite_is_measured_once_for_all_bundles(
    tiny_checkpoint: Path, components: Any, exported: Any, install: Install
) -> None:
    install(run=eager(components))
    report = parity.measure([exported("a"), exported("b")], against=str(tiny_checkpoint), num_prompts=1)
    assert sum(m.gap == "rewrite" for m in report.measurements) == 8
    assert sum(m.gap == "end_to_end" for m in report.measurements) == 2


def test_a_checkpoint_that_is_not_the_one_exported_is_an_error(
    tmp_path: Path, tiny_checkpoint: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    bundle = make_bundle(tmp_path / "b")  # hash 000…
    with pytest.raises(CheckpointError, match="it was exported from, 000000000000…, got"):
        parity.measure([bundle], against=str(tiny_checkpoint))
    assert main(["parity", str(bundle), "--against", str(tiny_checkpoint)]) == 1


def test_the_checkpoint_that_the_manifest_names_is_found(
    tiny_checkpoint: Path, components: Any, exported: Any, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(run=eager(components))
    bundle = exported()
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert {m.against for m in parity.measure([bundle], num_prompts=1).measurements} == {"checkpoint"}


def test_another_checkpoint_of_that_name_is_not_taken(
    tmp_path: Path, tiny_checkpoint: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    install()
    spec = dataclasses.replace(Bundle.open(make_bundle(tmp_path / "a")).generation, name=tiny_checkpoint.name)
    monkeypatch.chdir(tiny_checkpoint.parent)
    report = parity.measure([make_bundle(tmp_path / "b", spec=spec)])
    assert report.measurements[0].status == UNMEASURED
    assert "not 000000000000…" in (report.measurements[0].reason or "")


def test_an_explicit_checkpoint_needs_torch(
    tiny_checkpoint: Path, exported: Any, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    bundle = exported()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BackendMissing, match=r"edgeflow\[export\]"):
        parity.measure([bundle], against=str(tiny_checkpoint))


def test_an_unknown_gate_is_said_by_the_function_too(tmp_path: Path, install: Install) -> None:
    install()
    with pytest.raises(UnknownNameError):
        parity.measure([make_bundle(tmp_path / "b")], gates={"quality": 1.0})
