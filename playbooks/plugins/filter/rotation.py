"""Ansible filters: plan a run of playbooks/rotate-secrets.yml from the secrets on the control host."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CATALOGUE = Path(__file__).resolve().parents[2] / "vars/secrets.yml"
NOTHING = "nothing.yml"


def names(chosen: object) -> list[str]:
    """Returns the names in a list, or in text with commas or spaces as separators."""
    words = chosen if isinstance(chosen, Sequence) and not isinstance(chosen, str) else [chosen or ""]
    return list(dict.fromkeys(name for word in words for name in re.split(r"[,\s]+", str(word)) if name))


def files(secret: Mapping[str, Any], found: Mapping[str, float]) -> list[str]:
    """Returns the files of a secret, without the .next and .previous files of a rotation."""
    return sorted(
        file for file in found if re.fullmatch(secret["files"], file) and not file.endswith((".next", ".previous"))
    )


def described(name: str, secret: Mapping[str, Any], found: Mapping[str, float], now: float) -> str:
    """Returns a line of the list: a secret, its age, a rotation in progress, and the cost of a rotation."""
    present = files(secret, found)
    if not present:
        return f"{name}: not generated yet"
    oldest = min(found[file] for file in present)
    words = [f"{name}: {max(0, int(now - oldest)) // 86400} days old"]
    if any(f"{file}.next" in found for file in present):
        words.append(f"a rotation was interrupted before it changed anything: complete it with -e rotate={name}")
    elif any(secret.get("kept", f"{file}.previous") in found for file in present):
        verb = "finish" if secret.get("overlap") else "rotate"
        words.append(f"a rotation is in progress: complete it with -e {verb}={name}")
    return "; ".join([*words, secret["cost"]])


def rotation(
    secrets: Mapping[str, Mapping[str, Any]], found: Mapping[str, float], rotate: object, finish: object, now: float
) -> dict[str, Any]:
    """Returns the plan of a run.

    Args:
        secrets: the catalogue, by name: `files` (pattern of file names), `cost`, and where they apply `length`,
            `overlap` (the previous secret is accepted until `finish` names it), `kept` (the file with it, if not
            NAME.previous), `issued` (it is not generated here).
        found: the files in the folder of secrets, with their modification times.
        rotate: names of secrets to rotate, or `all`.
        finish: names of secrets whose previous value is deleted.
        now: the current time.

    Returns:
        `problems`; `report`, a line for each secret; `secrets`, those chosen; `generate`, files that get a new secret
        beside them; `overlapping`, those to finish later; `drop`, the previous secrets to delete: `first`, or
        `last`, once the new one works.
    """
    wanted, finished = names(rotate), names(finish)
    if "all" in wanted:
        wanted = [name for name in secrets if files(secrets[name], found) and name not in finished]
    overlapping = [name for name in secrets if secrets[name].get("overlap")]
    problems = [
        f"{name} is not a secret of the platform: set rotate to all, or some of {', '.join(secrets)}"
        for name in wanted
        if name not in secrets
    ]
    problems += [
        f"{name} is not generated yet: run site.yml first"
        for name in wanted
        if name in secrets and not files(secrets[name], found)
    ]
    problems += [
        f"{name} has no overlap to finish: set finish to some of {', '.join(overlapping)}"
        for name in finished
        if name not in overlapping
    ]
    problems += [f"{name} cannot be rotated and finished in one run" for name in finished if name in wanted]
    chosen = [] if problems else [name for name in secrets if name in wanted + finished]
    present = {name: files(secrets[name], found) for name in chosen}
    return {
        "problems": problems,
        "report": [described(name, secret, found, now) for name, secret in secrets.items()],
        "secrets": chosen,
        "finished": [name for name in chosen if name in finished],
        # A secret with a .previous file was changed by an interrupted run: it is not generated again.
        "generate": [
            {"file": file, "length": secrets[name].get("length", 32)}
            for name in chosen
            if name in wanted and not secrets[name].get("issued")
            for file in present[name]
            if f"{file}.next" in found or f"{file}.previous" not in found
        ],
        "overlapping": [name for name in chosen if name in wanted and name in overlapping],
        "drop": {
            "first": [
                f"{file}.previous"
                for name in chosen
                if name in finished and not secrets[name].get("issued")
                for file in present[name]
            ],
            "last": [
                f"{file}.previous"
                for name in chosen
                if name in wanted and name not in overlapping
                for file in present[name]
            ],
        },
    }


def rotated_playbook(playbook: str, rotate: object, finish: object) -> str:
    """Returns the playbook's file if a chosen secret is used there, otherwise that of a playbook that does nothing.

    Ansible evaluates it before the first play: a condition on the import would be evaluated for each task and host.
    """
    secrets = yaml.safe_load(CATALOGUE.read_text())["rotation_secrets"]
    chosen = names(rotate) + names(finish)
    used = any(playbook in secret["playbooks"] for name, secret in secrets.items() if name in chosen or "all" in chosen)
    return f"{playbook}.yml" if used else NOTHING


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"rotated_playbook": rotated_playbook, "rotation": rotation}
