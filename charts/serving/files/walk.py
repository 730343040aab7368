"""`helm test`: checks that only `GET /health` works without the key. Paths come from vLLM's own list and UNLISTED.

Environment: URL, KEY, CA (the authority's file; if it does not exist, the system's), TIMEOUT (seconds).
"""

import http.client
import json
import os
import ssl
import sys
import urllib.parse

SERVER, KEY = urllib.parse.urlsplit(os.environ["URL"]), os.environ["KEY"]
CA = os.environ.get("CA", "")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND")
# Paths that vLLM mounts or hides are not in its list.
UNLISTED = """
/ /docs /docs/oauth2-redirect /redoc /openapi.json /metrics /metrics/ /load /version /ping /server_info
/invocations /tokenize /detokenize /tokenizer_info /generative_scoring /scale_elastic_ep /is_scaling_elastic_ep
/v1/models /v1/completions /v1/chat/completions /v1/realtime /v2/rerank /rerank /score /classify /pooling
/inference/v1/generate /start_profile /reset_prefix_cache /sleep /wake_up /collective_rpc /nothing-of-this-name
/health/ //health /HEALTH /health/../v1/models /health%2f..%2fv1/models /%2e/health /v1/../health /health;/v1/models
"""
CREDENTIALS = {
    "a wrong key": {"Authorization": "Bearer not-the-key"},
    "an empty key": {"Authorization": "Bearer "},
    "the key as a password": {"Authorization": "Basic " + KEY},
    "the key in another header": {"X-Api-Key": KEY},
    "a preflight": {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"},
    "a WebSocket": {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    },
}


def connection():
    """Returns a connection to the server; it is reused for all requests."""
    timeout = float(os.environ["TIMEOUT"])
    if SERVER.scheme == "http":
        return http.client.HTTPConnection(SERVER.netloc, timeout=timeout)
    context = ssl.create_default_context(cafile=CA if os.path.exists(CA) else None)
    return http.client.HTTPSConnection(SERVER.netloc, timeout=timeout, context=context)


CONNECTION = connection()


def ask(method, path, headers=None):
    """Returns the status and text of the response; the path is sent without normalization."""
    try:
        CONNECTION.request(method, path, headers=headers or {})
        answer = CONNECTION.getresponse()
    except (http.client.HTTPException, ConnectionError):
        CONNECTION.close()  # the server closed it after a response; the next request reconnects
        CONNECTION.request(method, path, headers=headers or {})
        answer = CONNECTION.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def refused(what, method, path, headers=None):
    """Returns whether a request was rejected with 401; prints it if not."""
    status, text = ask(method, path, headers)
    if status != 401:
        print(f"FAILED: {method} {path} with {what}: {status} {text[:200]}", flush=True)
    return status == 401


status, text = ask("GET", "/openapi.json", {"Authorization": "Bearer " + KEY})
if status != 200:
    sys.exit(f"GET /openapi.json with the key: {status} {text[:2000]}")
listed = {path.replace("{", "").replace("}", "") for path in json.loads(text)["paths"]} - {"/health"}
if "/v1/completions" not in listed:
    sys.exit(f"/openapi.json does not list vLLM's paths: {sorted(listed)}")
tried = sorted({*listed, *UNLISTED.split()})
results = [refused("no key", method, path) for path in tried for method in METHODS]
results += [refused("no key", method, "/health") for method in METHODS if method != "GET"]
for path in tried:
    results += [refused(what, "GET", path, headers) for what, headers in CREDENTIALS.items()]
    results += [refused("the key in the query", "POST", f"{path}?{name}={KEY}") for name in ("api_key", "key", "token")]
status, text = ask("GET", "/health")
if status != 200:
    sys.exit(f"GET /health: {status} {text[:2000]}")
if not all(results):
    sys.exit(f"{results.count(False)} of {len(results)} requests without the key were not rejected with 401")
print(f"ok: {len(results)} requests without the key: 401; {len(listed)} paths are listed; GET /health: 200")
