"""Exposes the metrics of the server's processes without a password; the server exposes them to administrators only.

Arguments: folder of the metrics (--expose-prometheus), port.
"""

import os
import sys
import threading
import time

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

folder, port = sys.argv[1], int(sys.argv[2])
while not os.path.isdir(folder):
    time.sleep(1)
registry = CollectorRegistry()
MultiProcessCollector(registry, folder)
start_http_server(port, registry=registry)
threading.Event().wait()
