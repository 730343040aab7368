"""preStop hook: waits until Services have removed the pod, then until no request is left.

Arguments: delay and timeout in seconds, URL of the metrics, names of the metrics that count requests.
"""

import sys
import time
import urllib.request

METRICS, *COUNTED = sys.argv[3:]
# The variables of a proxy (HTTP_PROXY) are for other hosts.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def requests_left():
    """Returns the number of running and waiting requests of this server."""
    with LOCAL.open(METRICS, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    # Exact names: metrics such as `vllm:num_requests_waiting_by_reason` would count a request twice.
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] in COUNTED)


def drain(delay, timeout):
    """Returns when the server is idle or does not respond, or after the timeout."""
    time.sleep(delay)
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end and requests_left() > 0:
            time.sleep(1)
    except OSError:
        pass  # a server that does not respond has nothing to drain


drain(float(sys.argv[1]), float(sys.argv[2]))
