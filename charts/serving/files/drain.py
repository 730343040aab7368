"""preStop: serves on while Services forget the pod, then waits until no request is left.

Arguments: delay, timeout, URL of the metrics, and those that count requests.
"""

import sys
import time
import urllib.request

METRICS, *COUNTED = sys.argv[3:]


def requests_left():
    """Returns how many requests run or wait in this server."""
    with urllib.request.urlopen(METRICS, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    # `vllm:num_requests_waiting_by_reason` and the like would count a request twice.
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] in COUNTED)


def drain(delay, timeout):
    """Ends when the server is idle, gone, or the time is up."""
    time.sleep(delay)
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end and requests_left() > 0:
            time.sleep(1)
    except OSError:
        pass  # a server that does not answer has nothing to drain


drain(float(sys.argv[1]), float(sys.argv[2]))
