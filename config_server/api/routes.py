"""The table of all routes."""

from __future__ import annotations

from typing import Final

from config_server.api.member_routes import MEMBER_ROUTES
from config_server.api.route import Route
from config_server.api.staff_routes import STAFF_ROUTES

ROUTES: Final[tuple[Route, ...]] = (*MEMBER_ROUTES, *STAFF_ROUTES)
