"""The card of an uploaded model or bundle: front matter for the hub, then what it is and how to run it.

Torch-free. All that is said is the checkpoint's, the bundle's manifest's or the given parity report's own.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint, is_hub_id
from edgeflow.generate import default_runtime
from edgeflow.inspect import describe
from edgeflow.measure import precision_of
from edgeflow.parity_report import METRICS, ParityReport, show, show_gate

#: Licence identifiers that the hub knows, of those that models and their data come under here.
LICENCES = (
    "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd-2-clause", "bsd-3-clause", "cc0-1.0",
    "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-4.0",
    "creativeml-openrail-m", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "isc", "mit", "mpl-2.0", "openrail",
    "openrail++", "unlicense", "unknown",
)  # fmt: skip
_FRAMEWORKS = {"onnx": "ONNX", "openvino": "OpenVINO", "coreml": "Core ML", "cuda": "CUDA"}
_MIB = 2**20


def model_card(
    model: Bundle | Checkpoint,
    repo_id: str,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    parity: ParityReport | None = None,
) -> str:
    """The card as Markdown. ``base_model`` is a hub id; by default the model's own name, where it is one."""
    facts = describe(model.root)
    recipe = recipe_of(model)
    base = base_model or _base_model(model, repo_id)
    parts = [
        f"---\n{_front_matter(model, base).strip()}\n---",
        f"# {_title(model)}",
        _summary(model, base),
        _table(("", ""), [(f"**{name}**", text) for name, text in _facts(model, facts)]),
        _table(("part", "class", "parameters", "MiB"), _parts(facts))
        if isinstance(model, Checkpoint)
        else "",
        "" if recipe is None else _recipe(recipe),
        "## Run it\n\n" + _how_to_run(model, repo_id, revision),
        "" if parity is None else "## How close it is to PyTorch\n\n" + _parity(parity),
        _own_card(model),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def recipe_of(model: Bundle | Checkpoint) -> dict[str, Any] | None:
    """The recipe whose integers the model holds; None for a float one."""
    return model.manifest.recipe if isinstance(model, Bundle) else (model.quantization or {}).get("recipe")


def _front_matter(model: Bundle | Checkpoint, base: str | None) -> str:
    from huggingface_hub import ModelCardData

    facts, recipe = _model_facts(model), recipe_of(model)
    licence = str(facts["licence"]).strip()
    known = licence.lower() in LICENCES
    tags = ["text-to-image", "edgeflow"]
    tags += ["one-step", "rectified-flow"] if facts["steps"] == 1 else []
    tags += [model.manifest.backend] if isinstance(model, Bundle) else []
    tags += [recipe["name"]] if recipe else []
    diffusers = isinstance(model, Checkpoint) and recipe is None
    return ModelCardData(
        license=licence.lower() if known else "other",
        license_name=None if known else "-".join(licence.lower().split()),
        library_name="diffusers" if diffusers else "edgeflow",
        pipeline_tag="text-to-image",
        base_model=base,
        base_model_relation="quantized" if base and recipe else None,
        tags=tags,
    ).to_yaml()


def _base_model(model: Bundle | Checkpoint, repo_id: str) -> str | None:
    """The hub id that the model was opened by, or that it was quantized from; None where it has none."""
    name = str(_model_facts(model)["name"])
    if isinstance(model, Checkpoint) and model.quantization is not None:
        name = model.quantization["source"]["name"]
    return name if is_hub_id(name) and name != repo_id else None


def _model_facts(model: Bundle | Checkpoint) -> Mapping[str, Any]:
    """What both kinds say of the model: name, licence, origin, steps, picture_size, prompts."""
    if isinstance(model, Bundle):
        return model.manifest.model
    spec = model.generation
    return {
        **model.facts,
        "name": model.name,
        "picture_size": spec.picture_size,
        "max_tokens": spec.max_tokens,
        "checkpoint_hash": model.hash,
    }


def _title(model: Bundle | Checkpoint) -> str:
    name = _model_facts(model)["name"]
    if not isinstance(model, Bundle):
        return f"{name}, {precision_of(model)}" if model.quantization else str(name)
    return f"{name} for {_framework(model)}, {precision_of(model)}"


def _framework(bundle: Bundle) -> str:
    return _FRAMEWORKS.get(bundle.manifest.backend, bundle.manifest.backend)


def _summary(model: Bundle | Checkpoint, base: str | None) -> str:
    facts = _model_facts(model)
    side, steps = facts["picture_size"], facts["steps"]
    kind = "A text-to-image model" if isinstance(model, Checkpoint) else "A text-to-image model as a bundle"
    said = f"{kind}: {side} × {side} pixels from a prompt in {steps} step{'s' * (steps > 1)}."
    return said + (f" Made from [{base}](https://huggingface.co/{base})." if base else "")


def _facts(model: Bundle | Checkpoint, facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    about = _model_facts(model)
    yield "model", f"{about['name']} (checkpoint `{about['checkpoint_hash'][:16]}…`)"
    yield "origin", str(about["origin"])
    yield "licence", str(about["licence"])
    if isinstance(model, Bundle):
        manifest = model.manifest
        yield "backend", _framework(model)
        yield "precision", precision_of(model)
        yield "graphs", ", ".join(f"`{graph.file}`" for graph in manifest.graphs)
        kept = sum(map(len, manifest.fp32_ops.values()))
        if kept:
            yield "kept in float32", f"{kept} operations that float16 would overflow"
        yield (
            "size",
            f"{facts['bytes'] / _MIB:.2f} MiB (graphs and weights {facts['graph_bytes'] / _MIB:.2f})",
        )
        yield "made by", ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    else:
        if model.quantization:
            source = model.quantization["source"]
            yield "quantized from", f"{source['name']} (`{source['hash'][:16]}…`)"
        yield "parameters", f"{facts['parameters']:,}"
        yield "size", f"{facts['bytes'] / _MIB:.2f} MiB"
    yield "prompt", f"up to {about['max_tokens']} tokens"


def _parts(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (part["name"], part["class"], f"{part['parameters']:,}", f"{part['bytes'] / _MIB:.2f}")
        for part in facts["parts"]
    ]


def _recipe(recipe: Mapping[str, Any]) -> str:
    """The rules in the order in which they are tried."""
    rows = [(rule["component"], f"`{rule['pattern']}`", rule["scheme"]) for rule in recipe["rules"]]
    rounding = recipe.get("rounding", {}).get("method", "nearest")
    said = (
        f"Recipe `{recipe['name']}`, rounding: {rounding}. A layer takes the first rule that fits its name."
    )
    return f"## Quantization\n\n{said}\n\n{_table(('component', 'layers', 'scheme'), rows)}"


def _how_to_run(model: Bundle | Checkpoint, repo_id: str, revision: str | None) -> str:
    folder, prompt = repo_id.partition("/")[2], shlex.quote(_model_facts(model)["prompts"][0])
    branch = f" --revision {shlex.quote(revision)}" if revision else ""
    extra = model.manifest.backend if isinstance(model, Bundle) else "export"
    return (
        "From a checkout of edgeflow"
        + (", without PyTorch" if extra in ("onnx", "openvino") else "")
        + f":\n\n```sh\npip install '.[{extra}]' huggingface_hub\n"
        f"hf download {repo_id}{branch} --local-dir {folder}\n"
        f"edgeflow generate ./{folder} {prompt} --seed 7 -o picture.png\n```\n\n"
        f"It is drawn by the runtime `{default_runtime(model)}`; `edgeflow inspect ./{folder}` verifies it"
        + (" against the hashes of its manifest." if isinstance(model, Bundle) else ".")
    )


def _parity(report: ParityReport) -> str:
    """The rows of a parity report that hold a figure; each says what it is against."""
    measured = [m for m in report.measurements if m.values]
    rows = [
        (
            m.gap.replace("_", " "),
            m.component,
            m.against,
            METRICS[m.metric][0],
            show(m.metric, m.worst),
            show(m.metric, m.median),
            show_gate(m),
        )
        for m in measured
    ]
    prompts = max((len(m.prompts) for m in measured), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    said = f"Over {prompts} of the model's own prompts, by `edgeflow parity` ({versions})."
    columns = ("gap", "component", "against", "metric", "worst", "median", "gate")
    return "\n\n".join([said, _table(columns, rows), *report.notes])


def _own_card(model: Bundle | Checkpoint) -> str:
    """What the checkpoint's own card says below its front matter: its data, its sources, its licences."""
    if isinstance(model, Bundle) or not (model.root / "README.md").is_file():
        return ""
    from huggingface_hub import ModelCard

    text = ModelCard((model.root / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True).text
    return f"## The checkpoint's own card\n\n{_deeper(text.strip())}" if text.strip() else ""


def _deeper(text: str) -> str:
    """Markdown whose headings stand two levels lower, but not those within a block of code."""
    lines, code = [], False
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        lines.append(f"##{line}" if line.startswith("#") and not code else line)
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )
