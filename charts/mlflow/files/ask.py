"""`helm test`: checks that the server is healthy, rejects missing and wrong passwords, and accepts the administrator's.

Environment: the variables of MLflow's client.
"""

import base64
import os
import ssl
import sys
import urllib.error
import urllib.request

URL = os.environ["MLFLOW_TRACKING_URI"]
USER, PASSWORD = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
TLS = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))


def get(path, credentials=""):
    """Returns the status and text of the response."""
    request = urllib.request.Request(URL + path)
    if credentials:
        request.add_header("Authorization", "Basic " + base64.b64encode(credentials.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30, context=TLS if URL.startswith("https") else None) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def check(what, wanted, answer):
    """Prints the result of a check; exits at the first failure."""
    print(("ok: " if answer[0] == wanted else "FAILED: ") + what, flush=True)
    if answer[0] != wanted:
        sys.exit(f"{answer[0]} {answer[1][:2000]}")


check("the server is healthy", 200, get("/health"))
if USER:
    check("without a password: 401", 401, get(SEARCH))
    check("with a wrong password: 401", 401, get(SEARCH, f"{USER}:not-the-password"))
check("experiments can be listed", 200, get(SEARCH, f"{USER}:{PASSWORD}" if USER else ""))
