"""Which operations stay float32, by their ranges and by the names that a backend's values keep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeflow.errors import ExportError
from edgeflow.exporters.regions import Op, wide_ops
from edgeflow.overflow import LIMIT, Range, Wide, check_strict, described, merged, wide_nodes

OPS = [
    Op("a", ("x", "weight"), ("conv",)),
    Op("b", ("conv",), ("val_1",)),  # conv, then a norm in two pieces
    Op("c", ("val_1", "weight"), ("norm",)),
    Op("d", ("norm",), ("val_2",)),  # another in two pieces
    Op("e", ("val_2",), ("norm_1",)),
    Op("f", ("norm_1",), ("out",)),
]
NODES = frozenset({"conv", "norm", "norm_1", "out"})


def named(wide: Wide, *, squares: bool = False) -> set[str]:
    return wide_ops(OPS, wide, ["weight"], squares=squares)


def test_what_makes_and_what_takes_a_large_value_stay_float32_whole() -> None:
    assert named(Wide(values=frozenset({"conv"}), nodes=NODES)) == {"a", "b", "c"}


def test_a_weight_that_two_regions_share_does_not_join_them() -> None:
    assert named(Wide(inside=frozenset({"norm"}), nodes=NODES)) == {"b", "c"}


def test_squares_matter_only_where_norms_are_taken_apart() -> None:
    wide = Wide(squares=frozenset({"norm_1"}), nodes=NODES)
    assert named(wide) == set()
    assert named(wide, squares=True) == {"d", "e"}


def test_nothing_large_is_nothing_wide() -> None:
    assert not wide_nodes([Range("a", "conv2d", "m", LIMIT)])
    assert named(Wide(nodes=NODES)) == set()


def test_the_largest_of_several_prompts_counts() -> None:
    runs = [[Range("a", "conv2d", "m", 1.0)], [Range("a", "conv2d", "m", 1e5)]]
    (found,) = merged(runs)
    wide = wide_nodes([found])
    assert wide.values == {"a"}
    assert described([found], wide, squares=False) == ("m (conv2d): 1.0e+05",)


def test_strict_names_the_first_of_each_graph() -> None:
    check_strict({"unet": ()})
    with pytest.raises(ExportError, match=r"--strict-precision.*unet: 1 operations, the first m \(conv2d\)"):
        check_strict({"unet": ("m (conv2d): 1.0e+05",)})


def test_ranges_are_those_of_the_values() -> None:
    torch = pytest.importorskip("torch")
    import numpy as np

    from edgeflow.components import Component, ComponentSpec
    from edgeflow.exporters.program import build_program
    from edgeflow.exporters.ranges import run_recorded
    from edgeflow.spec import TensorSpec

    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.GroupNorm(2, 4)

        def forward(self, x):
            y = (self.norm(x) * 3).reshape(1, 1, 4, 4)
            return torch.nn.functional.scaled_dot_product_attention(y, y, y)

    spec = ComponentSpec(
        "g",
        (TensorSpec("x", (1, 4, 2, 2), "float32", "x"),),
        (TensorSpec("y", (1, 1, 4, 4), "float32", "y"),),
    )
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 300
    module = Attend().eval()
    outputs, ranges = run_recorded(build_program(Component(spec, module, module, {"x": x})), {"x": x.numpy()})
    by_op = {r.op: r for r in ranges}
    np.testing.assert_array_equal(outputs["y"], module(x).detach().numpy())
    grouped = x.reshape(1, 2, 8)
    squares = (grouped - grouped.mean(-1, keepdim=True)).abs().max().item() ** 2
    assert by_op["group_norm"].inside == pytest.approx(squares, rel=1e-5)
    y = (module.norm(x) * 3).reshape(4, 4)
    assert by_op["scaled_dot_product_attention"].inside == pytest.approx((y @ y.T / 2).abs().max().item())
    assert by_op["mul"].largest == pytest.approx(y.abs().max().item())


def test_importing_openvino_reports_to_nobody(tmp_path: Path) -> None:
    """Its packages report their very import, in forks of the process, where no opt-out lies in HOME."""
    pytest.importorskip("openvino_telemetry")
    code = (
        "import sys, time; seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(event) if event in ('os.fork', 'socket.connect') "
        "else None)\n"
        "import edgeflow.runtimes.openvino_runtime, edgeflow.exporters.to_openvino\n"
        "time.sleep(1)\n"
        "assert 'openvino_telemetry' in sys.modules\n"
        "print(seen)"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_exporting_to_openvino_reports_to_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("openvino")
    telemetry = pytest.importorskip("openvino_telemetry")
    from openvino_telemetry.backend import backend_ga4

    from edgeflow.components import Component, ComponentSpec
    from edgeflow.exporters.program import build_program
    from edgeflow.exporters.to_openvino import OpenVinoExporter
    from edgeflow.spec import TensorSpec

    sent: list[object] = []
    monkeypatch.delenv("CI", raising=False)
    for name in ("send_event", "send_error", "start_session"):
        real = getattr(telemetry.Telemetry, name)

        def noted(self, *args, real=real, **kwargs):
            if self.consent:
                sent.append(args)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(telemetry.Telemetry, name, noted)
    monkeypatch.setattr(backend_ga4.GA4Backend, "send", lambda self, message: sent.append(message))
    ids = TensorSpec("input_ids", (1, 4), "int32", "input_ids")
    out = TensorSpec("last_hidden_state", (1, 4, 8), "float32", "last_hidden_state")
    module = torch.nn.Embedding(5, 8).eval()
    example = {"input_ids": torch.zeros(1, 4, dtype=torch.int32)}
    program = build_program(Component(ComponentSpec("text_encoder", (ids,), (out,)), module, module, example))
    OpenVinoExporter().lower(program, tmp_path, precision="fp32", layout="components")
    assert sent == []
