"""The data card of a built dataset: what is in it, whose it is, what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def data_card(summary: Mapping[str, Any]) -> str:
    """``README.md`` for a folder of shards: a YAML header as dataset hubs read it, then tables."""
    sources: Sequence[Mapping[str, Any]] = summary["sources"]
    train, test = summary["num_images"]["train"], summary["num_images"]["test"]
    return "\n".join(
        [
            _header(summary),
            "# Emoji: captioned pictures",
            "",
            f"{train + test} pictures of {summary['num_concepts']} concepts, {summary['size']} × "
            f"{summary['size']} pixels on white, rendered from open emoji artwork: {train} train, {test} "
            "test.",
            "",
            "A caption is the emoji's name in words and the style it is drawn in: "
            "“grinning face with big eyes, noto style”.",
            "",
            "The test split holds out (concept, style) pairs: the concept is in train in at least two other "
            "styles, and the style on other concepts. A pair is chosen by its own hash, so a further source "
            "never brings a held-out pair back into train.",
            "",
            "## Layout",
            "",
            "webdataset shards `train-*.tar` and `test-*.tar`; a sample is `KEY.webp` (lossless), `KEY.txt` "
            "(the caption) and `KEY.json` (caption, concept, style, source, licence). `dataset.json` holds "
            "the counts and the shards' SHA-256.",
            "",
            "## Sources, licences, attribution",
            "",
            _sources_table(sources),
            "",
            "The pictures were rasterised and otherwise not changed. Whoever passes on pictures of a "
            "CC-BY-4.0 source names its author and links the licence: https://creativecommons.org/licenses/by/4.0/.",
            "",
            "The packages, as fetched with the npm client:",
            "",
            *(f"- `{s['package']}@{s['version']}` `{s['integrity']}`" for s in sources),
            "",
            "## What was left out",
            "",
            _dropped_table(sources),
            "",
            "Families of writing (letters, ideographs, words on buttons) and of many of a kind (flags, clock "
            "faces) keep a few examples.",
            "",
            *_problems(summary["problems"]),
        ]
    )


def _header(summary: Mapping[str, Any]) -> str:
    sources: Sequence[Mapping[str, Any]] = summary["sources"]
    licences = sorted({str(source["licence"]).lower() for source in sources})
    splits = [
        line
        for split, number in summary["num_images"].items()
        for line in (f"      - name: {split}", f"        num_examples: {number}")
    ]
    files = [
        line
        for split, number in summary["num_images"].items()
        if number
        for line in (f"      - split: {split}", f"        path: {split}-*.tar")
    ]
    return "\n".join(
        [
            "---",
            "pretty_name: Emoji, captioned",
            "language: [en]",
            "license:",
            *(f"  - {licence}" for licence in licences),
            "task_categories: [text-to-image]",
            "tags: [webdataset, emoji]",
            "configs:",
            "  - config_name: default",
            "    data_files:",
            *files,
            "dataset_info:",
            "  - config_name: default",
            "    splits:",
            *splits,
            "---",
            "",
        ]
    )


def _sources_table(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| source | style | by | licence | train | test |",
        "|---|---|---|---|---:|---:|",
    ]
    for s in sources:
        by = f"[{s['attribution']}]({s['homepage']})"
        rows.append(f"| {s['name']} | {s['style']} | {by} | {s['licence']} | {s['train']} | {s['test']} |")
    return "\n".join(rows)


def _dropped_table(sources: Sequence[Mapping[str, Any]]) -> str:
    reasons = sorted({reason for source in sources for reason in source["dropped"]})
    rows = [
        "| reason | " + " | ".join(str(s["name"]) for s in sources) + " |",
        "|---" + "|---:" * len(sources) + "|",
    ]
    for reason in reasons:
        rows.append(f"| {reason} | " + " | ".join(str(s["dropped"].get(reason, 0)) for s in sources) + " |")
    return "\n".join(rows)


def _problems(problems: Sequence[str]) -> list[str]:
    if not problems:
        return []
    return ["## Problems met", "", *(f"- {problem}" for problem in problems), ""]
