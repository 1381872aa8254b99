"""ASGI middlewares, in the order in which a request passes them:

access_log, auth, body_limit, timeouts, fault_injection. The other files help these.
"""
