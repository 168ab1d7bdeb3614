"""The tokenizer as OpenVINO graphs, which OpenVINO GenAI runs instead of reading vocabulary files.

Text to ids and back, by operations of openvino-tokenizers' extension. Ids are CLIP's own: start, byte pairs,
end, cut to the model's length with the end kept; GenAI fills the rest with the padding token.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import openvino

from edgeflow.errors import BackendMissing, ExportError

FILES = ("openvino_tokenizer", "openvino_detokenizer")


def check_installed() -> None:
    """Raises BackendMissing where openvino-tokenizers is absent."""
    try:
        import openvino_tokenizers  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendMissing("openvino_tokenizers", "export") from error


def write_tokenizer(folder: Path) -> None:
    """Beside the tokenizer's files in ``folder``: openvino_tokenizer.xml, openvino_detokenizer.xml and .bin.

    Raises BackendMissing, or ExportError for a tokenizer that has no such form.
    """
    check_installed()
    from openvino_tokenizers import convert_tokenizer
    from transformers import CLIPTokenizer

    from edgeflow.loading import quiet_libraries

    with quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            models = convert_tokenizer(tokenizer, with_detokenizer=True, truncation=True)
        except Exception as error:  # it raises bare exceptions
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"export: openvino: tokenizer: {reason}") from error
    for name, model in zip(FILES, models, strict=True):
        _settle_names(model)
        openvino.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)
        path = folder / f"{name}.xml"
        path.write_text(re.sub(r">\s+<", "><", path.read_text(encoding="utf-8")), encoding="utf-8")


def _settle_names(model: Any) -> None:
    """Names without the process-wide counters they got: equal inputs give equal bytes."""
    for i, op in enumerate(model.get_ordered_ops()):
        op.set_friendly_name(f"{op.get_type_name()}_{i}")
    for port in (*model.inputs, *model.outputs):
        names = {name for name in port.get_tensor().get_names() if not re.search(r"_\d+$", name)}
        port.get_tensor().set_names(names or {"input"})
