"""An inventory as Ansible evaluates it: its hosts, their variables, and the rendered templates of roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.playbook import Playbook
from ansible.playbook.play import Play
from ansible.playbook.play_context import PlayContext
from ansible.playbook.role import Role
from ansible.playbook.task import Task
from ansible.plugins.loader import action_loader, connection_loader, init_plugin_loader
from ansible.template import Templar
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager

init_plugin_loader()

ROOT = Path(__file__).resolve().parents[1]
FACTS: dict[str, Any] = yaml.safe_load((ROOT / "tests/facts.yml").read_text())
# The output of `slurmd -C` on such a node.
REPORT = """\
NodeName=gpu1 CPUs=128 Boards=1 SocketsPerBoard=2 CoresPerSocket=32 ThreadsPerCore=2 RealMemory=515842
UpTime=1-02:03:04
"""


def trusted(text: str) -> str:
    """Marks text of the repository as a trusted template, as ansible-core 2.19 and later require."""
    try:
        from ansible.template import trust_as_template
    except ImportError:
        return text
    return trust_as_template(text)


class Cluster:
    """The hosts of an inventory, with the facts of tests/facts.yml.

    Args:
        inventory: folder or file of the inventory.
        extra: variables that override all others, as with `ansible-playbook --extra-vars`.
        facts: whether the hosts are reachable and have facts.
    """

    def __init__(self, inventory: Path, extra: Mapping[str, Any] | None = None, facts: bool = True) -> None:
        self.loader = DataLoader()
        self.loader.set_basedir(str(ROOT))
        self.inventory = InventoryManager(self.loader, sources=[str(inventory)])
        self.manager = VariableManager(self.loader, self.inventory)
        self.manager._extra_vars = dict(extra or {})
        HostVars(self.inventory, self.manager, self.loader)
        for name in [*self.inventory.hosts, "localhost"] if facts else []:
            self.manager.set_host_facts(name, dict(FACTS))
            self.manager.set_nonpersistent_facts(name, {"_slurm_reported": {"stdout": REPORT}})

    @cached_property
    def hosts(self) -> dict[str, list[str]]:
        """Returns the hosts of each group."""
        return {name: list(hosts) for name, hosts in self.inventory.get_groups_dict().items()}

    def plays(self, playbook: str) -> list[Play]:
        """Returns the plays of a playbook of this repository and of those that it imports."""
        return Playbook.load(str(ROOT / playbook), self.manager, self.loader).get_plays()

    def uses(self, playbook: str) -> Iterator[tuple[Role, Play, list[str]]]:
        """Yields the roles that a playbook runs, each with its play and hosts."""
        for play in self.plays(playbook):
            hosts = [host.name for host in self.inventory.get_hosts(play.hosts)]
            for role in play.get_roles():
                yield role, play, hosts

    def variables(self, host: str, play: Play, role: Role | None = None) -> dict[str, Any]:
        """Returns the variables of the role's tasks on the host: defaults, inventory and the play's variables."""
        task = Task.load({"ansible.builtin.debug": {}}, role=role, loader=self.loader, variable_manager=self.manager)
        known = self.inventory.get_host(host)
        return {**self.manager.get_vars(play=play, host=known, task=task), "ansible_managed": "managed"}

    def render(self, template: Path, variables: Mapping[str, Any]) -> str:
        """Returns the template as `ansible.builtin.template` renders it; a missing variable is an error."""
        templar = Templar(self.loader, variables=dict(variables)).copy_with_new_env(searchpath=[str(template.parent)])
        return templar.template(trusted(template.read_text()), preserve_trailing_newlines=True, convert_data=False)

    def act(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Runs an action plug-in on the control host and returns its result."""
        play = Play.load(
            {"hosts": "localhost", "tasks": [{action: arguments}]}, variable_manager=self.manager, loader=self.loader
        )
        task = play.compile()[1].block[0]
        variables = self.manager.get_vars(play=play, host=self.inventory.get_host("localhost"), task=task)
        module = action_loader.get(
            action,
            task=task,
            connection=connection_loader.get("local", PlayContext()),
            play_context=PlayContext(),
            loader=self.loader,
            templar=Templar(self.loader, variables=variables),
            shared_loader_obj=None,
        )
        return module.run(task_vars=variables)
