"""The rules of the design that nobody should have to trust: imports, packaging, versions, help texts."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from edgeflow import registry
from edgeflow.cli import VERBS, cli

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("edgeflow", "training", "exporters", "runtimes")
MODELS = ROOT / "edgeflow" / "models"


def _is_a_models(path: Path) -> bool:
    """Whether a file is part of a built-in model: data, even where it is the code of its scheduler."""
    return path.is_relative_to(MODELS) and path.parent != MODELS


SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if not _is_a_models(p))

HEAVY = {
    "torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "coremltools",
    "transformers", "diffusers", "safetensors", "huggingface_hub", "accelerate", "webdataset",
}  # fmt: skip
_TORCH = (
    "aot_package",
    "gpu_attention",
    "gpu_convolutions",
    "gpu_device",
    "gpu_norms",
    "gpu_precision",
    "gpu_rewrites",
    "split_einsum",
    "upsampling",
)
_TORCH_QUANTIZATION = (
    "allocate",
    "apply",
    "calibration",
    "fake",
    "gptq",
    "layers",
    "peers",
    "search",
    "sensitivity",
)
#: Parts of edgeflow whose import brings a backend, so the spine may not import them at import time.
BACKEND_SIDE = (
    "edgeflow.components",
    *(f"edgeflow.{name}" for name in _TORCH),
    *(f"edgeflow.quantization.{name}" for name in _TORCH_QUANTIZATION),
    "edgeflow.training",
    "edgeflow.exporters",
    "edgeflow.runtimes",
)
#: The spine's files that are torch's side themselves.
TORCH_SIDE = (
    "edgeflow/components.py",
    *(f"edgeflow/{name}.py" for name in _TORCH),
    *(f"edgeflow/quantization/{name}.py" for name in _TORCH_QUANTIZATION),
)
#: A runtime's file, by how its name begins → what it may import besides NumPy and the standard library.
OWN_BACKEND = {
    "onnx_": {"onnxruntime"},
    "openvino_": {"openvino"},
    "coreml_": {"coremltools", "torch"},
    "mil_": {"coremltools", "torch"},
    "torch_": {"torch"},
    "cuda_": {"torch", "torchao", "safetensors"},
}


def imports(source: str, *, at_import_time: bool = False) -> set[str]:
    """Every module a source imports, dotted; ``from a import b`` gives ``a`` and ``a.b``.

    ``at_import_time`` leaves out what only functions or type checkers import.
    """
    found: set[str] = set()
    for node in _walk(ast.parse(source), at_import_time):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _walk(node: ast.AST, at_import_time: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if at_import_time and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_import_time and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _walk(child, at_import_time)


def tops(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def broken_import_rules(path: Path, source: str) -> list[str]:
    """The import rules of the design that the file at ``path`` (relative to the root) breaks."""
    folder, everything = path.parts[0], imports(source)
    broken = [f"{m}: import it as edgeflow.{m}" for m in tops(everything) & set(FOLDERS[1:])]
    if folder == "runtimes":
        own = next((v for k, v in OWN_BACKEND.items() if path.name.startswith(k)), set())
        allowed = {"numpy", "edgeflow", *own, *sys.stdlib_module_names}
        broken += [f"{m}: not this runtime's backend" for m in tops(everything) - allowed]
    other = {"runtimes": "edgeflow.exporters", "exporters": "edgeflow.runtimes"}.get(folder)
    broken += [f"{m}: the other seam" for m in everything if other and inside(m, other)]
    if folder == "edgeflow" and path.as_posix() not in TORCH_SIDE:
        early = imports(source, at_import_time=True)
        broken += [f"{m}: a backend at import time" for m in tops(early) & HEAVY]
        broken += [
            f"{m}: a backend's side at import time" for m in early for s in BACKEND_SIDE if inside(m, s)
        ]
    return broken


# --- imports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p.relative_to(ROOT) for p in SOURCES], ids=str)
def test_sources_keep_the_import_rules(path: Path) -> None:
    assert broken_import_rules(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("edgeflow/a.py", "import torch"),
        (
            "edgeflow/a.py",
            "try:\n    from onnxruntime import InferenceSession\nexcept ImportError:\n    pass",
        ),
        ("edgeflow/a.py", "class A:\n    import openvino.runtime"),
        ("edgeflow/cli/a.py", "from edgeflow import components"),
        ("edgeflow/a.py", "from edgeflow.training.models import ModelShape"),
        ("edgeflow/a.py", "def f():\n    from training import models"),
        ("runtimes/onnx_runtime.py", "def f():\n    import onnx"),
        ("runtimes/onnx_runtime.py", "import click"),
        ("runtimes/openvino_runtime.py", "from edgeflow.exporters import layouts"),
        ("exporters/to_onnx.py", "def f():\n    import edgeflow.runtimes.onnx_runtime"),
        ("training/loop.py", "import exporters.program"),
    ],
)
def test_a_broken_import_rule_is_found(path: str, source: str) -> None:
    assert broken_import_rules(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("edgeflow/a.py", "def f():\n    import torch"),
        (
            "edgeflow/a.py",
            "if TYPE_CHECKING:\n    import torch\n    from edgeflow.components import Component",
        ),
        ("edgeflow/components.py", "import torch"),
        (
            "runtimes/onnx_runtime.py",
            "import onnxruntime as ort\nimport numpy\nfrom edgeflow.runtimes import checks",
        ),
        ("exporters/to_onnx.py", "import torch\nfrom edgeflow.exporters import layouts"),
    ],
)
def test_a_kept_import_rule_is_not_reported(path: str, source: str) -> None:
    assert broken_import_rules(Path(path), source) == []


def test_tests_import_the_packages_by_their_full_names() -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in (ROOT / "tests").rglob("*.py")
        if (found := tops(imports(path.read_text(encoding="utf-8"))) & set(FOLDERS[1:]))
    }
    assert wrong == {}


def _run_help(*argv: str) -> tuple[set[str], float]:
    """Modules loaded and CPU seconds used by ``edgeflow ARGV`` in a process of its own."""
    code = (
        "import sys, time\n"
        "from edgeflow.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print('\\n', code, *sys.modules, file=sys.stderr)\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=True
    )
    *_, modules, seconds = done.stderr.strip().splitlines()
    status, *names = modules.split()
    assert status == "0" and done.stdout.startswith("Usage: edgeflow")
    return set(names), float(seconds)


@pytest.mark.parametrize("argv", [["--help"], *([verb, "-h"] for verb in VERBS)], ids=" ".join)
def test_help_imports_no_backend(argv: list[str]) -> None:
    modules, _ = _run_help(*argv)
    assert "click" in modules
    assert tops(modules) & HEAVY == set()
    assert modules.isdisjoint({"numpy", "PIL", "rich.console"} if argv == ["--help"] else ())


def test_help_answers_within_a_third_of_a_second() -> None:
    assert min(_run_help("--help")[1] for _ in range(3)) < 0.3


# --- packaging ------------------------------------------------------------------------------------------


def _package(folder: Path) -> str:
    relative = folder.relative_to(ROOT)
    name = ".".join(relative.parts)
    return name if relative.parts[0] == "edgeflow" else f"edgeflow.{name}"


def test_every_folder_of_modules_is_a_package_and_is_listed() -> None:
    folders = {path.parent for path in SOURCES}
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []
    assert sorted(map(_package, folders)) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_the_folder_map_names_every_top_folder() -> None:
    expected = {_package(ROOT / folder): folder for folder in FOLDERS}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == expected


def test_every_data_file_of_a_package_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, globs in patterns.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    kept_out = {".py", ".pyc"}
    files = {p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix != ".pyc"}
    data = {p for p in files if p.suffix not in kept_out or _is_a_models(p)}
    assert {str(p.relative_to(ROOT)) for p in data - shipped} == set()


def _extras() -> dict[str, list[Requirement]]:
    return {
        name: [Requirement(line) for line in lines]
        for name, lines in PROJECT["project"]["optional-dependencies"].items()
    }


def test_the_base_install_is_torch_free() -> None:
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    assert base == {"click", "numpy", "pillow", "rich", "tokenizers"}


def test_the_laptop_extras_bring_no_torch() -> None:
    for extra in ("onnx", "openvino"):
        assert {r.name for r in _extras()[extra]}.isdisjoint({"torch", "diffusers", "transformers"})


def test_extras_named_in_errors_exist() -> None:
    call = re.compile(r"BackendMissing\([^,()]+(?:\([^()]*\))?[^,()]*,\s*\"(\w+)\"\)")
    written = {extra for path in SOURCES for extra in call.findall(path.read_text(encoding="utf-8"))}
    assert written, "no BackendMissing was found: the pattern no longer matches the sources"
    required = {extra for _, extra in registry.REQUIRES.values()}
    assert written | required <= set(_extras())


def test_an_extra_brings_the_package_it_is_named_for() -> None:
    builds = {"onnx-cuda": "onnxruntime-gpu"}  # imported as onnxruntime
    for runtime, (package, extra) in registry.REQUIRES.items():
        assert builds.get(runtime, package) in {r.name for r in _extras()[extra]}, extra


# --- versions -------------------------------------------------------------------------------------------


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pins = _pins()
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    direct = [Requirement(line) for line in lines] + [r for rs in _extras().values() for r in rs]
    wrong = [
        f"{r}: pinned {pins.get(canonicalize_name(r.name))}"
        for r in direct
        if canonicalize_name(r.name) not in {"edgeflow", "onnxruntime-gpu"}  # the GPU build is nobody's CI
        and Version(pins.get(canonicalize_name(r.name), "0")) not in r.specifier
    ]
    assert wrong == []


def test_torch_is_pinned_where_figures_were_measured() -> None:
    assert _pins()["torch"] == "2.13.0"


# --- help texts -----------------------------------------------------------------------------------------


def _commands(
    command: click.Command, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its words, groups before what is in them."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(child, (*path, name))


def _verb(name: str) -> click.Command:
    return importlib.import_module(f"edgeflow.cli.{name}").command


def _root() -> click.Context:
    """The group's context: click keeps the help option of a command's first context, so -h must be in it."""
    return click.Context(cli, info_name="edgeflow", **cli.context_settings)


def _help(command: click.Command, path: tuple[str, ...]) -> str:
    with click.Context(command, parent=_root(), info_name=" ".join(path[1:])) as context:
        return command.get_help(context)


def _examples(text: str) -> list[str]:
    """The lines of the block that ends a help text."""
    last = text.rstrip().split("\n\n")[-1].strip().splitlines()
    assert re.fullmatch(r"Examples?:", last[0]), f"expected the help to end with examples, got: {last[0]!r}"
    return [line.strip() for line in last[1:]]


def _parse(command: click.Command, words: list[str]) -> None:
    """Parse an example without running it. Raises click.UsageError for an option that does not exist."""
    with command.make_context(command.name or "", list(words), parent=_root()) as context:
        if isinstance(command, click.Group):
            _, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert child is not None
            _parse(child, rest)


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_examples_that_parse(verb: str) -> None:
    for path, command in _commands(_verb(verb), ("edgeflow", verb)):
        for example in _examples(_help(command, path)):
            words = shlex.split(example)
            assert words[:2] == ["edgeflow", verb], example
            _parse(_verb(verb), words[2:])


@pytest.mark.parametrize("verb", VERBS)
def test_help_documents_exit_codes(verb: str) -> None:
    for path, command in _commands(_verb(verb), ("edgeflow", verb)):
        if isinstance(command, click.Group):
            continue
        text = " ".join(_help(command, path).split())
        said = re.search(r"Exit codes: (.*)", text)
        assert said, f"{' '.join(path)} says nothing of its exit codes"
        assert [re.search(rf"\b{code} [a-z]", said[1]) is not None for code in (0, 1, 2)] == [True] * 3


def test_an_example_with_an_unknown_option_is_found() -> None:
    with pytest.raises(click.UsageError, match="no-such"):
        _parse(_verb("parity"), ["bundle", "--no-such"])


def test_flags_mean_the_same_everywhere() -> None:
    same = {"-o": "--out", "-v": "--verbose", "-q": "--quiet", "-h": "--help"}
    for verb in VERBS:
        for path, command in _commands(_verb(verb), ("edgeflow", verb)):
            for option in (p for p in command.params if isinstance(p, click.Option)):
                for short in set(option.opts) & set(same):
                    assert same[short] in option.opts, f"{' '.join(path)} {short}"


# --- the project's own files ----------------------------------------------------------------------------


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/quantization.md"]
)
def test_pages_link_to_what_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []


def test_commands_in_the_readme_and_the_docs_parse_and_show_every_verb() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("edgeflow ")]
    assert {words[1] for words in commands} == set(VERBS)
    for words in commands:
        _parse(_verb(words[1]), words[2:])


def test_licence_says_what_the_package_says() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
