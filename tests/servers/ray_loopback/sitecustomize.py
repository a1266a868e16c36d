"""Lets Ray listen on 127.0.0.1 alone where a test gives that as a node's address. For PYTHONPATH of a test's processes.

Ray replaces a loopback address by the machine's routable one and then listens on all interfaces. Here the function that
does so, `ray._private.services.resolve_ip_for_localhost`, returns what it is given.
"""

import importlib.util
import sys

SERVICES = "ray._private.services"


class _LoopbackFinder:
    """Changes the module when something imports it, so that processes without Ray import nothing more."""

    def find_spec(self, name, path=None, target=None):
        if name != SERVICES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            module.resolve_ip_for_localhost = lambda host: host

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, _LoopbackFinder())
