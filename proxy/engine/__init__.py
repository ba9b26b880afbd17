"""Orchestration over ports: asyncio, but no sockets, files or HTTP."""
