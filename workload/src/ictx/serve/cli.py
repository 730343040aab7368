"""The command line of the registry: `ictx pull`, `ictx promote`, `ictx register`, `ictx adapters`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ictx.errors import UserError, printable
from ictx.settings import config_path

POLICY = "promote.yaml"
REFUSED = 3
"""Exit status where the policy refuses a version: the alias stays, and nothing is broken."""

PULL_EXAMPLES = """
The server, name and password are MLflow's: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD. The
folder appears complete and verified, or not at all; a pull that was interrupted goes on where it was.

examples:
  ictx pull models:/ictx-tiny@champion --to /models/ictx-tiny/champion
  ictx pull models:/ictx-tiny/3 --to /models/ictx-tiny/3
  ictx pull models:/ictx-tiny@champion --to /models/ictx-tiny/champion --promoted    # as the server does
"""
PROMOTE_EXAMPLES = """
What `ictx eval` measured of the version is compared with the policy and with the version behind the alias; a version
that is refused leaves the alias where it is (status 3). Its files are compared with the checksums that the job logged,
and the checksums are recorded where only promoters (ictx_promoters in the inventory) may write: a file that changes
afterwards is not served.

examples:
  ictx promote 3 --alias champion
  ictx promote 3 --alias champion --policy my-policy.yaml
  ictx promote 2 --alias champion --force --reason 'version 3 fails in production'
  ictx promote candidate --alias champion --model ictx-tiny    # the version that another alias stands for
"""
REGISTER_EXAMPLES = """
examples:
  ictx eval judge-model --out judge && ictx register judge --model ictx-judge
  ictx register runs/support/adapter --model ictx-1b-support        # what a run with train.lora learned
"""
ADAPTERS_EXAMPLES = """
The list has lines NAME: models:/MODEL@ALIAS (or /VERSION); it is read anew on each pass. The chart runs this beside
vLLM, and writes the list from `adapters.serve`.

examples:
  ictx adapters --list adapters.yaml --to /adapters --base /models/ictx-1b/3 --state /run/ictx
  ictx adapters --list adapters.yaml --to /adapters --base /models/ictx-1b/3 --state /run/ictx --once
"""


def register(areas: Any) -> None:
    """Adds the commands to `ictx`."""
    raw = argparse.RawDescriptionHelpFormatter
    other = areas.add_parser(
        "register",
        help="register a folder with a model as a new version",
        epilog=REGISTER_EXAMPLES,
        formatter_class=raw,
    )
    other.add_argument("folder", type=Path, metavar="FOLDER", help="as transformers writes it")
    other.add_argument("--model", required=True, help="registered model; a new one where there is none")
    other.add_argument("--alias", default="candidate", help="alias to set on the version (candidate)")
    other.set_defaults(run=run_register)
    _register_adapters(areas)
    pull = areas.add_parser(
        "pull", help="fetch a registered model and verify it", epilog=PULL_EXAMPLES, formatter_class=raw
    )
    pull.add_argument("uri", help="models:/<name>@<alias> or models:/<name>/<version>")
    pull.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="target folder")
    pull.add_argument(
        "--promoted",
        action="store_true",
        default=os.environ.get("ICTX_PROMOTED_ONLY") == "true",
        help="refuse a version that no promoter verified (also: ICTX_PROMOTED_ONLY=true)",
    )
    pull.set_defaults(run=run_pull)

    promote = areas.add_parser(
        "promote",
        help="verify a registered version and point an alias to it",
        epilog=PROMOTE_EXAMPLES,
        formatter_class=raw,
    )
    promote.add_argument("version", help="number, or an alias that stands for it")
    promote.add_argument("--alias", required=True, help="alias to set on the version, such as champion")
    promote.add_argument("--model", default="", help="registered model; needed where there are several")
    promote.add_argument(
        "--policy",
        default=POLICY,
        metavar="FILE",
        help=f"what a version must meet, here or below the configs ({POLICY})",
    )
    promote.add_argument("--force", action="store_true", help="promote a version that the policy refuses")
    promote.add_argument("--reason", default="", metavar="TEXT", help="why; tags of the version keep it")
    promote.set_defaults(run=run_promote)


def _register_adapters(areas: Any) -> None:
    adapters = areas.add_parser(
        "adapters",
        help="keep the LoRA adapters of a running vLLM what a list names",
        epilog=ADAPTERS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    adapters.add_argument("--list", type=Path, required=True, metavar="FILE", dest="list_file", help="what is served")
    adapters.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder of the adapters' files")
    adapters.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="the model that is served")
    adapters.add_argument("--state", type=Path, required=True, metavar="FOLDER", help="ICTX_ADMIN of the server")
    adapters.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL", help="(http://127.0.0.1:8000)")
    adapters.add_argument("--certificate", type=Path, metavar="FILE", help="what it presents, where it serves HTTPS")
    adapters.add_argument("--rank", type=int, metavar="R", help="largest rank that it takes (--max-lora-rank)")
    adapters.add_argument("--seconds", type=float, default=10.0, help="between two passes (10)")
    adapters.add_argument("--once", action="store_true", help="make one pass; status 1 where something is not loaded")
    adapters.add_argument(
        "--promoted",
        action="store_true",
        default=os.environ.get("ICTX_PROMOTED_ONLY") == "true",
        help="refuse a version that no promoter verified (also: ICTX_PROMOTED_ONLY=true)",
    )
    adapters.set_defaults(run=run_adapters)


def run_adapters(arguments: argparse.Namespace) -> int:
    """`ictx adapters`."""
    from ictx.registry import new_client
    from ictx.serve.adapters import Adapters, Server
    from ictx.serve.gate import ADMIN_KEY

    server = Server(arguments.server.rstrip("/"), arguments.state / ADMIN_KEY, arguments.certificate)
    adapters = Adapters(
        new_client(),
        server,
        arguments.list_file,
        arguments.to,
        arguments.base,
        arguments.state,
        promoted=arguments.promoted,
        rank=arguments.rank,
    )
    if arguments.once:
        if not server.key_file.is_file():
            adapters.open()
        return 0 if adapters.update() else 1
    # As the first process of a container it would not end by it otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    adapters.open()
    adapters.follow(arguments.seconds)
    return 0


def run_register(arguments: argparse.Namespace) -> int:
    """`ictx register`."""
    from ictx.registry import explained
    from ictx.serve.register import register

    with explained():
        print(register(arguments.folder, arguments.model, arguments.alias))
    return 0


def run_pull(arguments: argparse.Namespace) -> int:
    """`ictx pull`."""
    from ictx.registry import ModelRef, explained, new_client
    from ictx.serve.pull import pull

    with explained():
        pull(new_client(), ModelRef.parse(arguments.uri), arguments.to, arguments.promoted)
    return 0


def run_promote(arguments: argparse.Namespace) -> int:
    """`ictx promote`."""
    reason = " ".join(arguments.reason.split())
    if arguments.force != bool(reason):
        raise UserError("--force and --reason go together: the version keeps why the policy did not count")
    from ictx.registry import explained, new_client
    from ictx.serve.policy import Policy, Refused
    from ictx.serve.promote import promote

    policy = Policy.read(config_path(arguments.policy))
    try:
        with explained():
            print(promote(new_client(), arguments.version, arguments.alias, arguments.model, policy, reason))
    except Refused as refusal:
        print(f"ictx: {printable(str(refusal))}", file=sys.stderr)
        return REFUSED
    return 0
