"""Ansible filter: makes a node's kubeconfig safe for the control host."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any

import yaml
from ansible.errors import AnsibleFilterError

CLUSTER = ("certificate-authority-data",)
USER = ("client-certificate-data", "client-key-data")


def plain_kubeconfig(text: str, server: str) -> str:
    """Returns a kubeconfig for an address with only the certificates of another one.

    A kubeconfig may contain programs to run (`exec`), files to read, and other servers. A compromised node must not
    set these for the control host. Raises AnsibleFilterError.
    """
    try:
        found = yaml.safe_load(text)
        cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
        parts = [{name: encoded(each[name]) for name in names} for each, names in ((cluster, CLUSTER), (user, USER))]
    except (yaml.YAMLError, LookupError, TypeError, ValueError, binascii.Error) as error:
        raise AnsibleFilterError(f"plain_kubeconfig: certificates are missing or cannot be read: {error!r}") from error
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "ictx", "cluster": {"server": str(server), **parts[0]}}],
        "users": [{"name": "admin", "user": parts[1]}],
        "contexts": [{"name": "ictx", "context": {"cluster": "ictx", "user": "admin"}}],
        "current-context": "ictx",
    }
    return str(yaml.safe_dump(made, sort_keys=False))


def encoded(data: Any) -> str:
    """Returns base64 text unchanged. Raises ValueError for anything else."""
    base64.b64decode(data, validate=True)
    return str(data)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"plain_kubeconfig": plain_kubeconfig}
