#!/usr/bin/python
"""Ansible module: creates the SBOM of an image in CycloneDX format."""

from __future__ import annotations

import re
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL
except ImportError:
    Bom = None

DOCUMENTATION = r"""
module: image_sbom
short_description: Creates the SBOM of an image in CycloneDX format
description:
  - Changes nothing. The output is the same for the same image.
options:
  created: {type: str, required: true, description: When the image was built (ISO 8601).}
  digest: {type: str, required: true, description: "Digest of the image, C(sha256:…)."}
  locks: {type: list, elements: path, default: [], description: Lock files with the hashes of Python packages.}
  name: {type: str, required: true, description: Name of the image.}
  packages:
    type: list
    elements: str
    required: true
    description: "Its packages: C(os NAME VERSION), C(deb NAME VERSION ARCHITECTURE) and C(pypi NAME VERSION)."
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Create the SBOM of the image
  image_sbom:
    name: ictx/training
    digest: sha256:…
    created: "2026-01-01T00:00:00Z"
    packages: ["os debian 12", "deb bash 5.2.15-2 amd64", "pypi numpy 2.4.0"]
"""

RETURN = r"""
sbom: {type: str, returned: success, description: The SBOM as JSON.}
"""

LOCKED = re.compile(
    r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)((?:[^\n]*\\\n\s+--hash=sha256:[0-9a-f]{64})*)", re.MULTILINE
)


def normal(name: str) -> str:
    """Returns the name of a Python package as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hashes(locks: list[str]) -> dict[tuple[str, str], list[str]]:
    """Returns the SHA-256 sums of the files that lock files allow, by package and version."""
    found: dict[tuple[str, str], list[str]] = {}
    for lock in locks:
        for name, version, rest in LOCKED.findall(Path(lock).read_text()):
            found[normal(name), version] = re.findall(r"sha256:([0-9a-f]{64})", rest)
    return found


def list_image(options: dict[str, Any]) -> str:
    """Returns the SBOM as JSON."""
    known = hashes(options["locks"])
    system, components = ("debian", ""), []
    for kind, name, version, *rest in (line.split() for line in options["packages"]):
        if kind == "os":
            system = (name, version)
            components.append(
                Component(type=ComponentType.OPERATING_SYSTEM, name=name, version=version, bom_ref=f"os:{name}")
            )
        elif kind == "deb":
            qualifiers = {"arch": rest[0], "distro": "-".join(system)}
            url = PackageURL("deb", system[0], name, version, qualifiers)
            components.append(Component(name=name, version=version, purl=url, bom_ref=str(url)))
        else:
            url = PackageURL("pypi", None, normal(name), version)
            # CPU builds report 2.13.0+cpu; the lock has 2.13.0.
            sums = known.get((normal(name), version)) or known.get((normal(name), version.split("+")[0]), [])
            # With several hashes, the installed file is unknown.
            allowed = [HashType(alg=HashAlgorithm.SHA_256, content=sums[0])] if len(sums) == 1 else []
            components.append(Component(name=name, version=version, purl=url, bom_ref=str(url), hashes=allowed))
    bom = Bom(components=components, serial_number=uuid.uuid5(uuid.NAMESPACE_URL, options["digest"]))
    bom.metadata.timestamp = datetime.fromisoformat(re.sub(r"\.\d+", "", options["created"]).replace("Z", "+00:00"))
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name=options["name"],
        version=options["digest"],
        purl=PackageURL("oci", None, options["name"].split("/")[-1], options["digest"]),
        bom_ref=options["digest"],
    )
    bom.register_dependency(bom.metadata.component, components)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "created": {"type": "str", "required": True},
            "digest": {"type": "str", "required": True},
            "locks": {"type": "list", "elements": "path", "default": []},
            "name": {"type": "str", "required": True},
            "packages": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    if Bom is None:
        module.fail_json(msg=f"{missing_required_lib('cyclonedx-python-lib')} Run scripts/bootstrap control")
    module.exit_json(changed=False, sbom=list_image(module.params))


if __name__ == "__main__":
    main()
