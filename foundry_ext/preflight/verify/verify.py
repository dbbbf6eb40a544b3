"""Checks what packing and resumption promise, on a run's own configuration.

Packed must equal unpacked (packing.py), and stopped and resumed must equal uninterrupted
(resume.py). No checkpoint, record or log remains.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from foundry_ext.preflight.verify.checks import Check
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.progress import announce


@dataclass
class Verification:
    """The checks of one configuration."""

    name: str
    notes: list[str] = field(default_factory=list)
    """Settings that were not used as configured."""
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify_config(
    config: Mapping[str, Any], *, name: str, steps: int, packs: int, tokens: int
) -> Verification:
    """Check a resolved configuration; see `preflight.runs.verify_run` for the arguments.

    Raises:
        UserError: an argument is too small, the model is not smollm2_packed, or training would
            refuse the configuration.
    """
    from foundry_ext.preflight.verify.packing import check_packing
    from foundry_ext.preflight.verify.resume import check_resume

    for key, value, least in (("steps", steps, 2), ("packs", packs, 1), ("tokens", tokens, 8)):
        if value < least:
            raise UserError(f"{key}: {value}; give at least {least}")
    model = config.get("model") or {}
    if model.get("name") != "smollm2_packed":
        raise UserError(
            f"model.name: {model.get('name')!r} cannot be verified; only smollm2_packed can"
        )
    result = Verification(name)
    config = _for_this_device(copy.deepcopy(dict(config)), result.notes)
    announce("comparing packs with their documents")
    result.checks += check_packing(config, result.notes, num_packs=packs, most_tokens=tokens)
    announce(f"training {steps} steps three times: uninterrupted, stopped, resumed")
    result.checks += check_resume(config, result.notes, steps=steps, most_tokens=tokens)
    return result


def _for_this_device(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    if torch.cuda.is_available():
        return config
    for section, key, value in (
        (config, "precision", "fp32"),
        (config["model"], "frozen_dtype", "fp32"),
    ):
        if section.get(key, value) != value:
            notes.append(f"{key}: {value} instead of {section[key]}, because there is no GPU")
            section[key] = value
    return config


def format_verification(verification: Verification) -> str:
    """Return the verification as text: notes, one line per check, a summary."""
    lines = [f"verify {verification.name}"]
    lines += [f"  note  {note}" for note in verification.notes]
    lines += [
        f"  {'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}"
        for check in verification.checks
    ]
    num_passed = sum(check.passed for check in verification.checks)
    state = "verified" if verification.passed else "NOT verified"
    lines.append(f"{state}: {num_passed} of {len(verification.checks)} checks")
    return "\n".join(lines)
