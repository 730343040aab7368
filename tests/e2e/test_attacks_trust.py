"""A compromised node cannot certify other hosts with its own certificate; each image has a list of its contents."""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from urllib.request import Request, urlopen

import pytest
from lab import SHARED, STATE, Lab

pytestmark = pytest.mark.lab

# As root, n1 signs a certificate for the registry with its own key and certificate.
FORGE = """set -e
cd $(mktemp -d)
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -subj /CN=svc1 -out csr 2>/dev/null
printf 'subjectAltName=DNS:svc1' >names
tls=/etc/ictx/tls
openssl x509 -req -in csr -CA $tls/host.crt -CAkey $tls/host.key -CAcreateserial -extfile names -out forged 2>/dev/null
openssl verify -CAfile $tls/ca.crt -untrusted $tls/host.crt forged 2>&1 || true
openssl verify -CAfile $tls/ca.crt $tls/host.crt
openssl x509 -in $tls/ca.crt -noout -ext basicConstraints"""


@pytest.mark.attack(
    "M1",
    "Root of a compute node signs a certificate for the registry with the node's key and certificate",
    before="a certificate requested with CA:TRUE was issued, and certificates signed with it verified",
    now="does not verify: a node's certificate is CA:FALSE, and the authority has pathlen:0",
)
def test_a_node_cannot_certify_another(lab: Lab) -> None:
    done = lab.run("n1", FORGE)
    assert done.returncode == 0, done.stderr
    assert "forged: OK" not in done.stdout
    assert "invalid CA certificate" in done.stdout
    assert "host.crt: OK" in done.stdout
    assert "CA:TRUE, pathlen:0" in done.stdout


@pytest.mark.parametrize("image", ["training", "mlflow", "serving"])
def test_each_image_is_listed_beside_it_in_the_registry(lab: Lab, image: str) -> None:
    layout = (SHARED / "images" / image / "current").resolve()
    digest = json.loads((layout / "image.json").read_text())["digest"]
    packages = {part["name"] for part in json.loads((layout / "sbom.cdx.json").read_text())["components"]}
    assert packages >= {"debian", "libc6", "mlflow" if image == "mlflow" else "ictx"}

    password = (STATE / "secrets/registry_password").read_text().split(" salt=")[0].strip()
    address = f"https://{lab.address('svc1')}:5000/v2/ictx/{image}/manifests/{digest.replace(':', '-')}.sbom"
    headers = {
        "Accept": "application/vnd.oci.image.manifest.v1+json",
        "Authorization": f"Basic {b64encode(f'ictx:{password}'.encode()).decode()}",
    }
    context = ssl.create_default_context(cafile=STATE / "ca/ca.crt")
    with urlopen(Request(address, headers=headers), context=context) as answer:
        assert json.load(answer)["layers"][0]["mediaType"] == "application/vnd.cyclonedx+json"
