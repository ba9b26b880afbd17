"""Settings: what may be written, what was written, and every problem of it at once.

    settings = parse(tomllib.loads(text))        # or read(layers) for the origins, too
    settings.server.listen                       # (TcpAddress("127.0.0.1", 5000),)
    settings.upstreams[SourceHost("docker.io")].tag_ttl      # 600.0 seconds

Pure: finding and reading the file and the environment is `proxy/settings_file.py`. Attributes mirror the TOML names
(see `model.py` and `upstreams.py`); durations are seconds, sizes bytes, rates bytes per second, lists tuples; nothing can
be changed.
"""

from proxy.settings.contradictions import effective_default
from proxy.settings.layers import Layer, Origin, built_in_layer, environment_layer, file_layer
from proxy.settings.model import Log, Policy, Project, Robot, Server, Settings, Store, Tls, Transfers
from proxy.settings.reading import Effective, parse, read
from proxy.settings.upstreams import Credentials, Endpoint, TimedRate, Upstream
from proxy.settings.values import FOREVER, Address, Amount, TcpAddress, UnixAddress

__all__ = [
    "FOREVER",
    "Address",
    "Amount",
    "Credentials",
    "Effective",
    "Endpoint",
    "Layer",
    "Log",
    "Origin",
    "Policy",
    "Project",
    "Robot",
    "Server",
    "Settings",
    "Store",
    "TcpAddress",
    "TimedRate",
    "Tls",
    "Transfers",
    "UnixAddress",
    "Upstream",
    "built_in_layer",
    "effective_default",
    "environment_layer",
    "file_layer",
    "parse",
    "read",
]
