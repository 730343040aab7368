"""One user prepares a corpus with manipulated tokens; another user trains on that corpus next."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from lab import Lab

pytestmark = pytest.mark.lab

# Replaces every token and writes checksums that match.
OVERWRITE = """
import hashlib, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
meta = json.loads((folder / "meta.json").read_text())
for entry in meta["splits"]["train"]:
    file = folder / f"{entry['name']}.bin"
    file.write_bytes(b"*\\0" * entry["tokens"])
    entry["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
(folder / "meta.json").write_text(json.dumps(meta))
"""


@dataclass
class Corpus:
    """A corpus in the shared directory, and the folders of its prepared data."""

    lab: Lab
    path: str
    made: set[str] = field(default_factory=set)

    def prepare(self, user: str) -> tuple[str, str]:
        """Prepares it in a job of the user; returns the folder and the output."""
        settings = "--set data.min_bytes=1 --set data.vocab_size=300 --set model.vocab_size=300"
        command = f"/opt/ictx/bin/ictx data prepare --config pretrain/tiny.yaml --corpus {self.path} --out /shared/data"
        done = self.lab.run("ctl", f"{command} {settings}", user=user)
        assert done.returncode == 0, done.stderr + done.stdout
        self.made.add(folder := done.stdout.split()[-1])
        return folder, done.stdout


@pytest.fixture
def corpus(lab: Lab) -> Iterator[Corpus]:
    """A corpus that nobody has prepared yet."""
    path = f"/shared/data/corpus-{uuid.uuid4().hex}.jsonl"
    lines = r"""seq 400 | sed 's/.*/{"text": "& bottles of beer on the wall, & bottles of beer"}/'"""
    unique = f"""echo '{{"text": "{uuid.uuid4()}"}}'"""
    done = lab.run("ctl", f"({lines}; {unique}) >{path} && chmod 644 {path}")
    assert done.returncode == 0, done.stderr
    result = Corpus(lab, path)
    yield result
    lab.run("ctl", f"rm -r {path} {' '.join(result.made)}")


@pytest.mark.attack(
    "H2",
    "mallory prepares researcher's corpus first and overwrites all tokens and checksums",
    before="researcher's job reported that the corpus already existed, and trained on mallory's tokens",
    now="the job prepares and uses its own copy, which mallory cannot change",
)
def test_a_corpus_that_another_user_prepared_is_not_trained_on(lab: Lab, corpus: Corpus) -> None:
    his, _ = corpus.prepare("mallory")
    program = base64.b64encode(OVERWRITE.encode()).decode()
    done = lab.run("ctl", f"echo {program} | base64 --decode | python3 - {his}", user="mallory")
    assert done.returncode == 0, done.stderr
    mine, printed = corpus.prepare("researcher")
    assert mine != his
    assert f"not used: {his}: belongs to user id" in printed
    assert lab.run("ctl", f"stat -c '%U %a' {mine}").stdout == "researcher 755\n"
    assert lab.run("ctl", f"echo >>{mine}/train-00000.bin", user="mallory").returncode != 0
    assert lab.run("ctl", f"mv {mine} {mine}-away", user="mallory").returncode != 0
    again, printed = corpus.prepare("researcher")
    assert again == mine
    assert "holds this corpus already" in printed
