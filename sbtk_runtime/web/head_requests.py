"""HEAD: what a GET would be answered, but for the body; `curl -I` and load balancers ask it."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.routing import APIRoute


def answer_head(router: APIRouter) -> APIRouter:
    """Returns `router`, whose routes that take GET take HEAD too.

    The API's description leaves them out: they would double it. The HTTP server drops the bodies.
    """
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], include_in_schema=False
            )
    return router
