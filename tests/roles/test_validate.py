"""playbooks/validate.yml: measurements on a node, thresholds, and the report."""

from __future__ import annotations

import base64
import copy
import json
import os
import socket
import stat
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, Cluster
from programs import loaded, play

ACCEPTANCE = loaded(ROOT / "playbooks/plugins/filter/acceptance.py")

DISK = {"write": 9e8, "read": 2e9, "tool": "fio"}
NODES: dict[str, Any] = {
    name: {
        "disks": {"/var/tmp": DISK},
        "peers": {"gpu1": {"failed": 0, "tries": 10, "round_trip": 2e-4}},
        "clock": {"offset": -1e-4},
    }
    for name in ("gpu2", "gpu3", "gpu4")
}
LINKS: dict[str, Any] = {
    "backend": "nccl",
    "ranks": 24,
    "size_bytes": 256_000_000,
    "nodes": ["gpu2", "gpu3", "gpu4"],
    "together": 300e9,
    "inside": {"gpu2": 400e9, "gpu3": 400e9, "gpu4": 410e9},
    "pairs": [["gpu2", "gpu3", 340e9], ["gpu2", "gpu4", 330e9], ["gpu3", "gpu4", 335e9]],
    "clocks": {"gpu3": [2e-3, 1e-3], "gpu4": [-1e-3, 1e-3]},
}
KERNELS = {
    f"gpu{node}-{gpu}": f"NVIDIA H100, torch 2.13\ncopy 3.0{gpu} TB/s, bfloat16 product 700 TFLOP/s\n"
    for node in (2, 3, 4)
    for gpu in (0, 1)
}


def report(thresholds: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """Returns the report of three healthy nodes, with changes."""
    job = {"links": LINKS, "kernels": KERNELS, "problem": "", "out": {}} | changed.pop("job", {})
    found: dict[str, Any] = ACCEPTANCE.acceptance(
        changed.get("measured", NODES), job, changed.get("pods", {"kgpu1": ""}), thresholds or {}
    )
    return found


def test_nodes_that_are_well_pass_and_what_has_no_threshold_is_only_reported() -> None:
    found = report()
    assert found["failures"] == []
    assert found["passed"] is True
    write = next(line for line in found["checks"] if line["check"] == "write /var/tmp")
    assert (write["value"], write["unit"], write["passed"]) == (900, "MB/s", None)


def slow_pair() -> dict[str, Any]:
    links = copy.deepcopy(LINKS)
    links["pairs"][1][2] = 100e9
    return links


@pytest.mark.parametrize(
    ("thresholds", "changed", "failure"),
    [
        ({"disk_write_mb_s": 1000}, {}, "gpu2: write /var/tmp: 900 MB/s, threshold ≥ 1000 MB/s (fio)"),
        ({"round_trip_ms": 0.1}, {}, "gpu2: round trip to gpu1: 0.2 ms, threshold ≤ 0.1 ms"),
        ({"pair_gb_s": 350}, {}, "gpu2 gpu3: all-reduce of the pair: 340 GB/s, threshold ≥ 350 GB/s"),
        ({"all_gb_s": 350}, {}, "3 nodes: all-reduce of all, nccl: 300 GB/s, threshold ≥ 350 GB/s"),
        ({"inside_gb_s": 405}, {}, "gpu2: all-reduce inside: 400 GB/s, threshold ≥ 405 GB/s"),
        ({"clock_ms": 0.5}, {}, "gpu3: clock, beside gpu2's: 1 ms, threshold ≤ 0.5 ms (± 1.000 ms)"),
        ({"product_tflop_s": 800}, {}, "gpu2-0: product: 700 TFLOP/s, threshold ≥ 800 TFLOP/s (NVIDIA H100)"),
        # Less than 0.7 of the median of all pairs, without a threshold in the inventory.
        ({}, {"job": {"links": slow_pair()}}, "gpu2 gpu4: all-reduce of the pair: 100 GB/s, threshold ≥ 234.5 GB/s"),
        (
            {},
            {"job": {"kernels": KERNELS | {"gpu3-1": "x\nRuntimeError: no kernel image"}}},
            "gpu3-1: kernels: RuntimeError: no kernel image",
        ),
        (
            {},
            {"job": {"kernels": KERNELS | {"gpu3-1": KERNELS["gpu3-1"].replace("3.01", "1.5")}}},
            "gpu3-1: copy: 1.5 TB/s, threshold ≥ 2.55 TB/s (NVIDIA H100)",
        ),
        ({}, {"job": {"problem": "job 7 failed"}}, "SLURM: job in a container on all nodes: job 7 failed"),
        ({}, {"job": {"out": {"gpu2": "IDLE+DRAIN: a fan"}}}, "gpu2: in service: IDLE+DRAIN: a fan"),
        ({}, {"pods": {"kgpu1": "the pod is Failed"}}, "kgpu1: pod: the pod is Failed"),
        ({}, {"measured": NODES | {"gpu3": None}}, "gpu3: reachable: unreachable, or the measurement failed"),
        (
            {},
            {
                "measured": NODES
                | {"gpu3": NODES["gpu3"] | {"disks": {"/shared": {"problem": "Read-only file system"}}}}
            },
            "gpu3: disk /shared: Read-only file system",
        ),
    ],
)
def test_what_is_below_a_threshold_or_does_not_work_is_one_line(
    thresholds: dict[str, Any], changed: dict[str, Any], failure: str
) -> None:
    found = report(thresholds, **changed)
    assert failure in found["failures"]
    assert found["passed"] is False
    same = {line.split(": ", 1)[1] for line in found["failures"] if line.split(": ")[1] == failure.split(": ")[1]}
    assert len(same) == len({line.split(": ", 1)[1] for line in found["failures"]}), "nothing else fails"


def test_what_the_job_left_is_read_and_a_job_that_failed_has_its_reason() -> None:
    def slurped(path: str, text: str) -> dict[str, str]:
        return {"item": path, "content": base64.b64encode(text.encode()).decode()}

    files = [
        slurped("/shared/runs/alice/7/links.json", json.dumps(LINKS)),
        slurped("/shared/runs/alice/7/kernels/gpu2-0.txt", "copy"),
        slurped("/shared/runs/alice/7.log", "a\nb\nc\nfailed with exit status 1\n"),
    ]
    host = {"validate_job": {"rc": 0, "stderr": ""}, "validate_found": {"results": files}, "validate_out": {"n": "x"}}
    assert ACCEPTANCE.job_found(host) == {
        "out": {"n": "x"}, "links": LINKS, "kernels": {"gpu2-0": "copy"}, "problem": "",
    }  # fmt: skip
    host["validate_job"] = {"rc": 1, "stderr": "sbatch: error"}
    assert ACCEPTANCE.job_found(host)["problem"] == "sbatch: error; b; c; failed with exit status 1"
    assert ACCEPTANCE.job_found({"validate_job": {"skipped": True}}) == {"out": {}}


def test_the_report_has_every_check_and_a_picture_of_every_pair() -> None:
    cluster = Cluster(ROOT / "inventories/lab")
    found = report({"pair_gb_s": 338}, pods={"kgpu1": "<b>&"}) | {"date": "2026-01-01"}
    text = cluster.render(
        ROOT / "playbooks/templates/validate.html.j2", {"validate_report": found, "ictx_cluster_name": "lab"}
    )
    assert text.count('<tr class="') == len(found["checks"])
    assert "<b>&<" not in text
    assert "Acceptance of lab: failed" in text
    picture = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in picture.iter(f"{space}title")]
    assert sorted(titles) == sorted(
        f"{one} {other}: {value:.3f} GB/s"
        for one, other, value in [
            *((one, other, value / 1e9) for one, other, value in LINKS["pairs"]),
            *((other, one, value / 1e9) for one, other, value in LINKS["pairs"]),
            *((node, node, value / 1e9) for node, value in LINKS["inside"].items()),
        ]
    )


def measured(folder: Path, **options: Any) -> dict[str, Any]:
    """Runs the module on this machine."""
    tasks = [
        {"measure_node": options, "register": "found"},
        {"ansible.builtin.copy": {"content": "{{ found | to_json }}", "dest": str(folder / "found.json")}},
    ]
    done = play(folder, tasks, {})
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_a_node_is_measured_and_nothing_is_left_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as closed:
        port, refused = listening.getsockname()[1], closed.getsockname()[1]
        closed.close()
        peers = {"near": {"address": "127.0.0.1", "port": port}, "gone": {"address": "127.0.0.1", "port": refused}}
        disks = [str(disk), str(tmp_path / "none")]
        found = measured(tmp_path, disks=disks, size_mb=8, seconds=5, peers=peers, tries=3)
    assert found["changed"] is False
    assert found["disks"][str(disk)]["write"] > 1e5
    assert found["disks"][str(disk)]["read"] > 1e5
    assert found["disks"][str(tmp_path / "none")] == {"problem": "No such file or directory"}
    assert list(disk.iterdir()) == []
    assert found["peers"]["near"]["failed"] == 0
    assert 0 < found["peers"]["near"]["round_trip"] < 1
    assert found["peers"]["gone"] == {"failed": 3, "tries": 3, "problem": "Connection refused"}


def test_fio_measures_where_it_is_and_a_full_disk_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/fio"
    program.parent.mkdir()
    # The output of fio 3.33, shortened; notes about changed options precede the report.
    program.write_text(
        "#!/bin/sh\necho 'note: both iodepth >= 1 and synchronous I/O engine are selected'\n"
        'echo \'{"jobs": [{"write": {"bw_bytes": 111}, "read": {"bw_bytes": 222}}]}\'\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    found = measured(tmp_path, disks=[str(tmp_path)], size_mb=8)
    assert found["disks"][str(tmp_path)] == {"tool": "fio", "write": 111.0, "read": 222.0}
    full = measured(tmp_path, disks=[str(tmp_path)], size_mb=1 << 30)
    assert "are free for the test, 1073741824 are needed" in full["disks"][str(tmp_path)]["problem"]
