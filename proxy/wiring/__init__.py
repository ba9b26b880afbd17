"""The composition root: settings become running parts. The only room that knows everyone.

`watching` is who is told of events, `kept` what is on disk and what is known of it, `serving` the read path and its
listener, `appliance` all of it with operators' side, up, reloaded and down.
"""

from proxy.wiring.appliance import Appliance

__all__ = ["Appliance"]
