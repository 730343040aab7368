"""Exposes what the server's processes count, without a password: the server itself answers administrators only.

Arguments: folder of the counts, port.
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
