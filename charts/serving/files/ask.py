"""`helm test`: checks that the endpoint completes and streams with the key, and rejects requests without it.

Environment: URL, MODEL, KEY, CA (the authority's file; if it does not exist, the system's), TIMEOUT (seconds).
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

URL, MODEL, KEY = os.environ["URL"], os.environ["MODEL"], os.environ["KEY"]
TIMEOUT = float(os.environ["TIMEOUT"])
CA = os.environ.get("CA", "")
CONTEXT = ssl.create_default_context(cafile=CA if os.path.exists(CA) else None)


def post(key, **more):
    """Returns the status and text of the response to a completion request."""
    asked = {"model": MODEL, "prompt": "The", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(URL + "/v1/completions", body, {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", "Bearer " + key)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=CONTEXT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def check(what, good, detail):
    """Prints the result of a check; exits at the first failure."""
    print(("ok: " if good else "FAILED: ") + what, flush=True)
    if not good:
        sys.exit(detail[:2000])


status, text = post("")
check("without a key: 401", status == 401, f"{status} {text}")
status, text = post("not-the-key")
check("with a wrong key: 401", status == 401, f"{status} {text}")
status, text = post(KEY)
check("with the key: 200", status == 200, f"{status} {text}")
answer = json.loads(text)
check("the response names the model", answer["model"] == MODEL, text)
check("the response has tokens", answer["usage"]["completion_tokens"] > 0, text)
print("completion:", json.dumps(answer["choices"][0]["text"]))
status, text = post(KEY, stream=True)
events = [line for line in text.splitlines() if line.startswith("data: ")]
check("a stream has several events and ends", status == 200 and len(events) > 2 and events[-1] == "data: [DONE]", text)
