"""A support bundle contains no secret of the platform, in any notation; redaction takes linear time."""

from __future__ import annotations

import base64
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import pytest
from cluster import ROOT
from hypothesis import given
from hypothesis import strategies as st

M3 = pytest.mark.attack(
    "M3",
    "A secret is in a log or configuration that a support bundle collects",
    before="Slack webhooks, URLs with passwords, --password X, Bearer tokens, base64 credentials were included",
    now="redacted by value and by pattern, before anything is written",
)


def load_filter() -> ModuleType:
    """Returns the filter plug-in."""
    spec = importlib.util.spec_from_file_location("redaction", ROOT / "playbooks/plugins/filter/redaction.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


FILTERS = load_filter()
# § stands for the secret, ⏎ for the end of a line.
FORMS = r"""
slack_api_url: https://hooks.slack.com/services/T0/B0/§
pull from https://user:§@registry.example/v2/ failed
clone https://§@git.example/x.git
dsn=postgresql://mlflow:§@db/mlflow
backup --password § --verbose
backup --password=§ --verbose
backup --db-password '§' --verbose
mysql -uroot -p§ slurm_acct_db
sshpass -p § ssh host
curl --user admin:§ https://host
curl -u admin:§ https://host
client --api-key §
client --api_key=§
client --token "§"
['client', '--token', '§']
["client","--secret-key","§"]
Authorization: Bearer §
authorization: bearer §
'Authorization': 'Basic §'
curl -H "X-Api-Key: §"
curl -H "Cookie: session=§"
MYSQL_PWD=§
Environment=PGPASSWORD=§
Environment="RESTIC_PASSWORD=§"
export AWS_SECRET_ACCESS_KEY=§
HF_TOKEN=hf_§
found hf_§ in
remote glpat-§ expired
remote ghp_§ refused
called with sk-§ refused
StoragePass=§
/etc/slurm/slurmdbd.conf:StoragePass=§
password: §
password: "§"
password = §
"password": "§"
'password' : '§'
{\"password\": \"§\", \"user\": \"x\"}
{"auths": {"svc1:5000": {"auth": "§"}}}
//registry.example/:_authToken=§
    client-key-data: §
    token: §
encryption_key: §
munge credential MUNGE:§:
-----BEGIN EC PRIVATE KEY-----⏎§⏎-----END EC PRIVATE KEY-----⏎
-----BEGIN OPENSSH PRIVATE KEY-----\n§\n-----END OPENSSH PRIVATE KEY-----
Nov 26 n1 x: -----BEGIN PRIVATE KEY-----⏎Nov 26 n1 x: §
GET /x?access_token=§&page=2
GET /x?page=2&sig=§
GET /x?X-Amz-Signature=§
eyJhbGciOiJIUzI1NiJ9.§.abc
admin:$2b$10$§
root:$6$salt$§:19000
admin:{SHA}§
<password>§</password>
CREATE USER x IDENTIFIED BY '§'
SET PASSWORD = PASSWORD('§')
password: |⏎  §⏎  §
secret: >-⏎  §
/etc/x.yml:password: |⏎/etc/x.yml:  §
"""
LINES = [line.replace("⏎", "\n") for line in FORMS.strip().splitlines()]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@M3
@pytest.mark.parametrize("line", LINES)
@given(st.text(ALPHABET, min_size=16, max_size=60))
def test_each_form_of_a_secret_is_taken_out(line: str, secret: str) -> None:
    text = f"before\n{line.replace('§', secret)}\nafter"
    made = FILTERS.redacted(text, {})
    assert secret not in made.replace("[redacted]", "")
    assert made.startswith("before\n")


@M3
@pytest.mark.parametrize("line", ["X_PWD=§", "--password §", "--password=§", "password: §", "https://u:§@h/x", "a='§'"])
@given(st.text(ALPHABET + "!#%&*+,.:;=?@^_`|~é", min_size=8, max_size=40))
def test_a_secret_with_signs_is_taken_out_whole(line: str, secret: str) -> None:
    made = FILTERS.redacted(line.replace("§", f"x{secret}x").replace("a=", "password="), {}).replace("[redacted]", "")
    assert secret not in made
    assert secret[-6:] + "x" not in made


@M3
@given(st.text(ALPHABET + "!/+=\"'\\é\n ", min_size=12, max_size=40), st.text(max_size=20), st.text(max_size=20))
def test_the_value_of_each_secret_is_taken_out_however_it_is_written(secret: str, before: str, after: str) -> None:
    secret = secret.strip()
    written = [secret, json.dumps(secret), base64.b64encode(secret.encode()).decode(), secret.encode().hex()]
    for form in written if len(secret) >= 8 else []:
        made = FILTERS.redacted(f"{before} {form} {after}", {"one": secret})
        assert form not in made.replace("[one]", "") or form in before + after


@given(
    st.text()
    | st.lists(st.sampled_from([*LINES, '"', "'", "\\", "password", "=", ": ", "--", "://", "@", "eyJ"])).map("".join)
)
def test_what_is_redacted_stays_as_it_is(text: str) -> None:
    made = FILTERS.redacted(text, {})
    assert FILTERS.redacted(made, {}) == made


@pytest.mark.parametrize(
    "line",
    [
        "path=/etc/passwd",
        "Listening on 0.0.0.0:5000",
        "docker run -p 5000:5000 -p5001:5001 image",
        "prompt throughput: 12.5 tokens/s, num_tokens: 512",
        "tokenizer: bpe",
        "AuthType=auth/munge",
        "https://svc1:5000/v2/ and https://10.0.0.1/x?page=2",
        "sha256:" + 64 * "a",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert FILTERS.redacted(line, {"salt": "b"}) == line


PARTS = [
    "a",
    "pass",
    "password",
    "password=",
    'password="',
    "password: \\",
    "://",
    "://a:",
    "-----BEGIN PRIVATE KEY-----",
    "eyJ",
]
PARTS += [
    "-",
    "--",
    '"',
    "'",
    "\\",
    "$6$",
    "$2b$10$",
    "?key=",
    "-u a:",
    "Bearer ",
    "hf_",
    "password: |\n ",
    " -p",
    "<",
    "@",
    "\n",
]


@M3
@pytest.mark.parametrize("part", PARTS)
def test_the_time_grows_with_the_length(part: str) -> None:
    """Four times the text takes about four times as long; a pattern that backtracks takes 16 times, or never ends."""

    def seconds(size: int) -> float:
        text = (part * size)[:size]
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            FILTERS.without_forms(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(32_000) < 9 * seconds(8_000) + 0.02


def test_a_secret_that_is_no_text_is_known_by_its_base64(tmp_path: Path) -> None:
    (tmp_path / "munge.key").write_bytes(bytes(range(256)))
    value = FILTERS.secret_value(str(tmp_path / "munge.key"))
    assert value == base64.b64encode(bytes(range(256))).decode()
    (tmp_path / "password").write_text("hunter2hunter2 salt=abc\n")
    assert FILTERS.secret_value(str(tmp_path / "password")) == "hunter2hunter2"
