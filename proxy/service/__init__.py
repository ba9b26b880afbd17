"""What a service manager and this process say to each other: sockets handed over, readiness, reload, watchdog.

systemd's protocols, which anybody may speak: without one of its variables in the environment, nothing here does
anything. Own code and no library: both protocols are a few lines over a datagram socket and two variables, and the
libraries for them block, need a C toolchain, or have had no release for years.
"""
