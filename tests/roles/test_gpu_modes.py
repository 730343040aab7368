"""ECC and MIG of GPUs are set as the inventory declares; nvidia-smi is a stub that keeps their state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT

PROGRAM = ROOT / "roles/nvidia_driver/files/ictx-gpu-modes"
SMI = ROOT / "molecule/gpu/files/nvidia-smi"


class Node:
    """A node with GPUs."""

    def __init__(self, folder: Path, *gpus: dict[str, Any]) -> None:
        self.folder, self.state = folder, folder / "gpus.json"
        self.state.write_text(json.dumps([{"ecc": True, "mig": False, "devices": [], **gpu} for gpu in gpus]))
        (folder / "nvidia-smi").symlink_to(SMI)

    def apply(self, ecc: str = "keep", *mig: dict[str, Any]) -> tuple[str, list[str]]:
        """Returns the error, and the changes."""
        (self.folder / "modes.json").write_text(json.dumps({"ecc": ecc, "mig": mig}))
        command = [sys.executable, str(PROGRAM), f"--config={self.folder}/modes.json"]
        environment = {"PATH": f"{self.folder}:/usr/bin", "STAND_IN_GPUS": str(self.state)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert bool(done.returncode) == bool(done.stderr)
        return done.stderr.strip(), done.stdout.splitlines()

    @property
    def devices(self) -> list[list[str]]:
        """Returns the MIG devices of each GPU."""
        return [gpu["devices"] for gpu in json.loads(self.state.read_text())]

    def restart(self) -> None:
        """Simulates a restart: pending modes take effect, and all instances are removed."""
        gpus = json.loads(self.state.read_text())
        for gpu in gpus:
            gpu.pop("busy", None)
            gpu["devices"] = []
            gpu["ecc"], gpu["mig"] = gpu.pop("ecc_next", gpu["ecc"]), gpu.pop("mig_next", gpu["mig"])
        self.state.write_text(json.dumps(gpus))


HALVES = {"gpus": [1], "profiles": ["3g.20gb", "3g.20gb"]}


def test_a_gpu_is_divided_once_and_the_others_stay_whole(tmp_path: Path) -> None:
    node = Node(tmp_path, {}, {})
    assert node.apply("keep", HALVES) == ("", ["GPU 1: MIG on", "GPU 1: MIG devices 3g.20gb, 3g.20gb"])
    assert node.devices == [[], ["3g.20gb", "3g.20gb"]]
    assert node.apply("keep", HALVES) == ("", [])


def test_instances_come_back_after_a_restart(tmp_path: Path) -> None:
    node = Node(tmp_path, {}, {})
    node.apply("keep", HALVES)
    node.restart()
    assert node.apply("keep", HALVES) == ("", ["GPU 1: MIG devices 3g.20gb, 3g.20gb"])


def test_other_profiles_replace_those_that_are_there_and_none_make_the_gpu_whole(tmp_path: Path) -> None:
    node = Node(tmp_path, {})
    every = {"profiles": ["1g.5gb"] * 7}
    node.apply("keep", {"profiles": ["7g.40gb"]})
    assert node.apply("keep", every)[1] == [f"GPU 0: MIG devices {', '.join(every['profiles'])}"]
    assert node.devices == [["1g.5gb"] * 7]
    assert node.apply("keep", {"profiles": []}) == ("", ["GPU 0: MIG off"])
    assert node.devices == [[]]


def test_ecc_waits_for_a_restart(tmp_path: Path) -> None:
    node = Node(tmp_path, {"ecc": False})
    waits = "restart: ECC of GPU 0 is on after the next reboot"
    assert node.apply("enabled") == ("", ["GPU 0: ECC on", waits])
    assert node.apply("enabled") == ("", [waits])
    node.restart()
    assert node.apply("enabled") == ("", [])


def test_a_busy_gpu_gets_mig_at_the_next_restart(tmp_path: Path) -> None:
    node = Node(tmp_path, {"busy": True})
    wanted = {"profiles": ["3g.20gb"]}
    assert node.apply("keep", wanted)[1][-1] == "restart: MIG of GPU 0 is on after the next reboot"
    assert node.devices == [[]]
    node.restart()
    assert node.apply("keep", wanted) == ("", ["GPU 0: MIG devices 3g.20gb"])


@pytest.mark.parametrize(
    ("gpu", "ecc", "mig", "problem"),
    [
        ({"ecc": None}, "enabled", [], "GPU 0 does not support ECC: remove it from nvidia_driver_ecc"),
        (
            {"mig": None},
            "keep",
            [{"profiles": ["1g.5gb"]}],
            "GPU 0 does not support MIG: remove it from nvidia_driver_mig",
        ),
        ({}, "keep", [{"gpus": [3], "profiles": []}], "GPU 3 does not exist: correct nvidia_driver_mig"),
        ({}, "keep", [{"profiles": ["9g.90gb"]}], "Failed to create GPU instances: Insufficient Resources"),
        (
            {"mig": True, "busy": True, "devices": ["7g.40gb"]},
            "keep",
            [{"profiles": ["1g.5gb"]}],
            "nvidia-smi mig -cgi 1g.5gb -C -i 0: Failed to create GPU instances",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, gpu: dict[str, Any], ecc: str, mig: list[dict[str, Any]], problem: str
) -> None:
    said, _ = Node(tmp_path, gpu).apply(ecc, *mig)
    assert problem in said
    assert "\n" not in said


def test_gpus_without_ecc_are_no_hindrance_to_ecc_that_is_off(tmp_path: Path) -> None:
    assert Node(tmp_path, {"ecc": None}).apply("disabled") == ("", [])
