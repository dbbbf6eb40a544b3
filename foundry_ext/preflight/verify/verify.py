"""A run's own configuration, held to what packing and resuming promise, for a few steps.

Packed equals unpacked (verify_packing.py), stopped and resumed equals uninterrupted
(verify_resume.py). Nothing of the run is written: no checkpoint, record or log outlives it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from foundry_ext.preflight.verify.checks import Check
from foundry_ext.utils.errors import UserError

DEFAULT_STEPS = 4
DEFAULT_PACKS = 2
DEFAULT_TOKENS = 512


@dataclass
class Verification:
    name: str
    notes: list[str] = field(default_factory=list)
    """What of the configuration was not taken as it stands."""
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify_config(
    config: Mapping[str, Any],
    *,
    name: str,
    steps: int = DEFAULT_STEPS,
    packs: int = DEFAULT_PACKS,
    tokens: int = DEFAULT_TOKENS,
) -> Verification:
    """
    Args:
        config: resolved.
        steps: optimizer steps of the uninterrupted run; the other is stopped half way.
        packs: of the first global batches, compared with their documents.
        tokens: of a pack that are looked at.

    Raises:
        UserError: an argument too small; what cannot be verified, or training itself refuses.
    """
    from foundry_ext.preflight.verify.packing import check_packing
    from foundry_ext.preflight.verify.resume import check_resume

    for key, value, least in (("steps", steps, 2), ("packs", packs, 1), ("tokens", tokens, 8)):
        if value < least:
            raise UserError(f"{key}: {value} is below {least}")
    model = config.get("model") or {}
    if model.get("name") != "smollm2_packed":
        raise UserError(
            f"model.name: {model.get('name')!r} cannot be verified; verify knows smollm2_packed"
        )
    found = Verification(name)
    config = _for_this_device(copy.deepcopy(dict(config)), found.notes)
    found.checks += check_packing(config, found.notes, num_packs=packs, most_tokens=tokens)
    found.checks += check_resume(config, found.notes, steps=steps, most_tokens=tokens)
    return found


def _for_this_device(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    if torch.cuda.is_available():
        return config
    for section, key, value in (
        (config, "precision", "fp32"),
        (config["model"], "frozen_dtype", "fp32"),
    ):
        if section.get(key, value) != value:
            notes.append(f"{key}: {value} in place of {section[key]}, as there is no GPU")
            section[key] = value
    return config


def render(found: Verification) -> str:
    lines = [f"verify {found.name}"]
    lines += [f"  note  {note}" for note in found.notes]
    lines += [
        f"  {'ok  ' if one.passed else 'FAIL'}  {one.name}: {one.said}" for one in found.checks
    ]
    kept = sum(one.passed for one in found.checks)
    lines.append(
        f"{'verified' if found.passed else 'NOT verified'}: {kept} of {len(found.checks)} checks"
    )
    return "\n".join(lines)
