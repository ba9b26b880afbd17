"""The words of the access gate, for those who may not know the rules themselves."""

from proxy.rules.gates.access import ANONYMOUS, OPERATOR, Access, Caller, Login, Robot

__all__ = ["ANONYMOUS", "OPERATOR", "Access", "Caller", "Login", "Robot"]
