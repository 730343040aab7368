"""Exposes the metrics of the server's processes without a password; the server exposes them to administrators only.

Arguments: folder of the metrics (--expose-prometheus), port, address.
"""

import os
import sys
import threading
import time

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

folder, port, address = sys.argv[1], int(sys.argv[2]), sys.argv[3]
while not os.path.isdir(folder):
    time.sleep(1)
registry = CollectorRegistry()
MultiProcessCollector(registry, folder)
start_http_server(port, address, registry=registry)
threading.Event().wait()
