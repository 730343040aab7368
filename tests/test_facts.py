"""What Ansible found on a host in an earlier run decides nothing in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import play


def test_facts_are_gathered_afresh_on_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANSIBLE_CACHE_PLUGIN")  # the value in ansible.cfg counts
    fact = tmp_path / "mounted.fact"
    # As a play gathers them, which with `gathering = smart` trusts a cache.
    tasks = [{"ansible.builtin.debug": {"msg": "mounted: {{ ansible_facts.ansible_local.mounted }}"}}]
    for found in ("no", "yes"):
        fact.write_text(f'"{found}"')
        done = play(tmp_path, tasks, {}, gather_facts=True, fact_path=str(tmp_path), gather_subset=["!all", "local"])
        assert f"mounted: {found}" in done.stdout, done.stdout + done.stderr
