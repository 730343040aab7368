"""Facts of an earlier run of Ansible are not reused in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import play


def test_facts_are_gathered_afresh_on_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANSIBLE_CACHE_PLUGIN")  # use the value of ansible.cfg
    fact = tmp_path / "mounted.fact"
    # Gathered by a play, which would use a cache with `gathering = smart`.
    tasks = [{"ansible.builtin.debug": {"msg": "mounted: {{ ansible_facts.ansible_local.mounted }}"}}]
    for found in ("no", "yes"):
        fact.write_text(f'"{found}"')
        done = play(tmp_path, tasks, {}, gather_facts=True, fact_path=str(tmp_path), gather_subset=["!all", "local"])
        assert f"mounted: {found}" in done.stdout, done.stdout + done.stderr
