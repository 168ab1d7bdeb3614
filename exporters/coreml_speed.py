"""coremltools on programs of gigabytes: two things that it does to every operation, done in less time.

What it writes stays the same, byte for byte. Converting InstaFlow's UNet otherwise takes twice the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision
from coremltools.converters.mil.mil.program import Program

_validate = Program.validate
_overflows = FP16ComputePrecision.fp16_overflow
_LARGEST = float(np.finfo(np.float16).max)


@contextmanager
def quickly() -> Iterator[None]:
    """While the block runs, a program is checked at a conversion's end alone, and weights in one look."""
    overflows = staticmethod(_overflows_float16)
    with (
        patch.object(Program, "validate", _validate_at_the_end),
        patch.object(FP16ComputePrecision, "fp16_overflow", overflows),
    ):
        yield


def _validate_at_the_end(program: Any, check_essential_scope: bool | None = False) -> None:
    """What writes the program asks for the scopes to be checked too; the hundred passes before it do not."""
    if check_essential_scope:
        _validate(program, check_essential_scope=True)


def _overflows_float16(op: Any) -> bool:
    """Whether a constant that ``op`` takes overflows float16; coremltools' own answer, wherever one may.

    Its own way gathers the indices of every weight, eight bytes for each dimension.
    """
    values = (
        v for bound in op.inputs.values() for v in (bound if isinstance(bound, list | tuple) else (bound,))
    )
    constants = (v for v in values if v.op is not None and v.op.op_type == "const")
    if all(_fits(np.asarray(v.op.val.val)) for v in constants if v.is_tensor_or_scalar_of(dtype="fp32")):
        return False
    return bool(_overflows(op))


def _fits(array: Any) -> bool:
    """Whether float16 certainly holds every value; False where one is NaN."""
    return not array.size or bool(array.max() <= _LARGEST and array.min() >= -_LARGEST)
