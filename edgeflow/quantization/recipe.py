"""Recipes: which layer is stored how, as versioned JSON. Torch-free.

::

    {"schema": 1, "name": "…",
     "rules": [{"component": "unet", "pattern": "conv_in", "scheme": "w8"},
               {"component": "unet", "pattern": "*", "scheme": "w4g32", "fallback": "w8"}],
     "gates": {"sqnr_db": 20}, "found_by": "…", "measured": {…}}

A layer takes the scheme of the first rule of its component whose pattern (``*``, ``?``, ``[…]`` over the
whole name, dots included) matches its name; a layer without a rule stays float, as with the scheme ``float``.
A rule that no layer takes is an error, or a line of the report where it says ``"unmatched": "report"``. A
layer that does not divide into groups takes the rule's ``fallback`` scheme and is reported; without one it is
an error.
``rounding`` (optional) is how the integers were chosen: ``{"method": "nearest"}``, or ``gptq`` with the
prompts, pictures and seed it was calibrated on.
``gates`` (optional) is what the quantization gap must hold at the pipeline's picture (``sqnr_db``,
``psnr_db``);
``found_by`` says where the recipe comes from, ``measured`` what a search found on one model; both are free in
form. The shipped recipes are for any model and say nothing of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edgeflow.errors import ConfigError, UnknownNameError
from edgeflow.quantization.schemes import FLOAT, PALETTES, SCHEMES
from edgeflow.spec import COMPONENTS

SCHEMA = 1
RECIPES = Path(__file__).parent / "recipes"
#: What a recipe's own gates may limit, at the pipeline's picture.
GATES = ("sqnr_db", "psnr_db")
#: How integers are chosen: each weight by itself, or so that layers keep outputs (quantization.gptq).
NEAREST, GPTQ = METHODS = ("nearest", "gptq")
_KEYS = {"schema", "name", "rules", "rounding", "gates", "found_by", "measured"}
_RULE_KEYS = {"component", "pattern", "scheme", "fallback", "unmatched"}


@dataclass(frozen=True)
class Rule:
    """Layers of one component by name → scheme."""

    component: str
    pattern: str
    scheme: str
    fallback: str | None = None
    unmatched: str = "error"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; ``raw`` is the JSON as it was read, which bundles carry verbatim."""

    name: str
    rules: tuple[Rule, ...]
    gates: Mapping[str, float] = field(default_factory=dict)
    rounding: str = NEAREST
    raw: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Plan:
    """What a recipe means for a model: layer → scheme by component, and what should be said of it."""

    schemes: dict[str, dict[str, str]]
    notes: tuple[str, ...]


def builtin_recipes() -> list[str]:
    """Names of the recipes shipped in the package."""
    return sorted(p.stem for p in RECIPES.glob("*.json"))


def read_recipe(source: str | Path) -> Recipe:
    """A recipe by its shipped name or from a file.

    Raises UnknownNameError for what is neither, ConfigError naming everything that is wrong in the file.
    """
    shipped = RECIPES / f"{source}.json"
    path = shipped if str(source) in builtin_recipes() else Path(source)
    if not path.is_file():
        raise UnknownNameError("recipe", str(source), [*builtin_recipes(), "the path of a recipe file"])
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"recipe: {path}: expected JSON, got: {error}") from error
    return parse_recipe(raw, str(source))


def parse_recipe(raw: Any, where: str) -> Recipe:
    """JSON → recipe. Raises ConfigError, one sentence for all that is wrong; ``where`` names the source."""
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe: {where}: expected a JSON object, got a {type(raw).__name__}")
    if raw.get("schema") != SCHEMA:
        raise ConfigError(f"recipe: {where}: expected schema {SCHEMA}, got {raw.get('schema')!r}")
    wrong = [
        f"key {key!r} is not known; known: {', '.join(sorted(_KEYS))}" for key in sorted(set(raw) - _KEYS)
    ]
    if not isinstance(raw.get("name"), str) or not raw["name"].strip():
        wrong.append(f"name: expected a text, got {raw.get('name')!r}")
    gates = raw.get("gates", {})
    if not isinstance(gates, dict) or not all(
        k in GATES and type(v) in (int, float) for k, v in gates.items()
    ):
        wrong.append(f"gates: expected numbers for some of {', '.join(GATES)}, got {gates!r}")
    rounding = raw.get("rounding", {"method": NEAREST})
    if not isinstance(rounding, dict) or rounding.get("method") not in METHODS:
        wrong.append(f"rounding: expected a method, one of {', '.join(METHODS)}, got {rounding!r}")
    rules = raw.get("rules")
    if not isinstance(rules, list) or not rules:
        wrong.append(f"rules: expected a list of rules, got {rules!r}")
        rules = []
    for i, rule in enumerate(rules):
        wrong += [f"rule {i}: {reason}" for reason in _wrong_rule(rule)]
    if wrong:
        raise ConfigError(f"recipe: {where}: {'; '.join(wrong)}")
    return Recipe(raw["name"], tuple(Rule(**rule) for rule in rules), dict(gates), rounding["method"], raw)


def rounds_activations(raw: Mapping[str, Any] | None) -> bool:
    """Whether some rule of a recipe's JSON, None for no recipe, rounds the inputs of layers."""
    return bool(rounded_components(raw))


def rounded_components(raw: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The components of which some rule of a recipe's JSON, None for no recipe, rounds the layers' inputs."""
    rules = (raw or {}).get("rules")
    named = {
        rule.get("component")
        for rule in (rules if isinstance(rules, list) else ())
        if isinstance(rule, dict)
        for name in (rule.get("scheme"), rule.get("fallback"))
        if isinstance(name, str) and name in SCHEMES and SCHEMES[name].activations
    }
    return tuple(component for component in COMPONENTS if component in named)


def with_rounding(recipe: Recipe, rounding: Mapping[str, Any]) -> Recipe:
    """The recipe with another way of choosing integers, which its JSON says as well."""
    raw = {**recipe.raw, "rounding": dict(rounding)}
    return replace(recipe, rounding=str(rounding["method"]), raw=raw)


def _wrong_rule(rule: Any) -> list[str]:
    if not isinstance(rule, dict):
        return [f"expected a JSON object, got {rule!r}"]
    wrong = [
        f"key {key!r} is not known; known: {', '.join(sorted(_RULE_KEYS))}"
        for key in sorted(set(rule) - _RULE_KEYS)
    ]
    known = {
        "component": COMPONENTS,
        "scheme": (*SCHEMES, *PALETTES, FLOAT),
        "fallback": (*SCHEMES, *PALETTES, FLOAT),
        "unmatched": ("error", "report"),
    }
    for key, names in known.items():
        if (key in rule or key in ("component", "scheme")) and rule.get(key) not in names:
            wrong.append(f"{key} {rule.get(key)!r} is not known; known: {', '.join(names)}")
    if not isinstance(rule.get("pattern"), str) or not rule["pattern"]:
        wrong.append(f"pattern: expected a text, got {rule.get('pattern')!r}")
    return wrong


def plan(recipe: Recipe, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Plan:
    """Which layer takes which scheme. ``layers``: component → layer's name → its weight's shape (O, I, …).

    Raises ConfigError naming every rule that no layer takes and every layer that does not divide into its
    scheme's groups, where the rules say nothing of it.
    """
    chosen: dict[str, dict[str, str]] = {component: {} for component in layers}
    taken = [0] * len(recipe.rules)
    wrong, notes = [], []
    for component, shapes in layers.items():
        for name, shape in shapes.items():
            i = _first(recipe.rules, component, name)
            if i is None:
                chosen[component][name] = FLOAT
                continue
            taken[i] += 1
            rule = recipe.rules[i]
            if _divides(rule.scheme, shape):
                chosen[component][name] = rule.scheme
                continue
            text = (
                f"{component}: {name}: {shape[1]} input channels do not divide into "
                f"{rule.scheme}'s groups of {SCHEMES[rule.scheme].group}"
            )
            if rule.fallback is None or not _divides(rule.fallback, shape):
                wrong.append(f"{text}, and the rule has no fallback for it")
            else:
                notes.append(f"{text}: {rule.fallback} instead")
                chosen[component][name] = rule.fallback
    for rule, count in zip(recipe.rules, taken, strict=True):
        if not count:
            text = f"{rule.component}: pattern {rule.pattern!r} gives no layer its scheme"
            (notes if rule.unmatched == "report" else wrong).append(text)
    if wrong:
        raise ConfigError(f"recipe: {recipe.name}: {'; '.join(wrong)}")
    return Plan(chosen, tuple(notes))


def _first(rules: tuple[Rule, ...], component: str, name: str) -> int | None:
    for i, rule in enumerate(rules):
        if rule.component == component and fnmatchcase(name, rule.pattern):
            return i
    return None


def _divides(scheme: str, shape: tuple[int, ...]) -> bool:
    return scheme not in SCHEMES or SCHEMES[scheme].divides(shape)
