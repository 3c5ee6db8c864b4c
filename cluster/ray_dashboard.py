"""Whether the dashboard of a Ray cluster lets strangers in: whoever reaches it may run code on every node.

Ray submits jobs through its dashboard, and asks for a token only where the cluster was started with RAY_AUTH_MODE=token
(CVE-2023-48022: it was never meant to be reached by others). The path that is asked here is public in Ray 2.52 and
later; an older one has no token to ask for.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from reward_server.serve import is_loopback
from services.errors import UserError

PATH = "/api/authentication_mode"
ANSWER_S, CONNECT_S = 10.0, 1.0


def check_dashboard(url: str | None, addresses: Sequence[str] | None = None) -> None:
    """Raises UserError where a cluster's dashboard ("host:port"; None or "": it has none) is open to others.

    `addresses`: of this machine, by default those of its network interfaces. A dashboard that names itself by loopback
    may listen on all of them (`ray start --dashboard-host 0.0.0.0 --node-ip-address 127.0.0.1`).
    """
    if not url:
        return
    place = urlsplit(f"//{url}")
    if is_loopback(place.hostname or ""):
        own = own_addresses() if addresses is None else addresses
        answering = next((address for address in own if _listens(address, place.port or 80)), None)
        if answering is None:
            return
        url = f"{answering}:{place.port}"
    mode = authentication_mode(url)
    if mode in (None, "disabled"):
        says = "does not say whether it asks for a token" if mode is None else "asks for no token"
        raise UserError(
            f"the Ray dashboard at {url} listens beyond loopback and {says}: whoever reaches it runs code on every "
            "node. Start the cluster with RAY_AUTH_MODE=token (docs/ray-jobs.md), or its dashboard on 127.0.0.1; "
            "cluster.open_dashboard=true goes on all the same"
        )


def own_addresses() -> list[str]:
    """The IPv4 addresses at which others may reach this machine."""
    found = (one.address for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET)
    return sorted({address for address in found if not is_loopback(address)})


def _listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), CONNECT_S):
        return True
    return False


def dashboard_of(ray: Any) -> str | None:
    """ "host:port" of the dashboard of the cluster that this process is connected to."""
    node = ray._private.worker._global_node
    return node.webui_url or None if node is not None else None


def authentication_mode(url: str) -> str | None:
    """ "token", "disabled" or another of Ray's; None where the dashboard ("host:port") gives no answer."""
    try:
        answer = httpx.get(f"http://{url}{PATH}", timeout=ANSWER_S, trust_env=False)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return "disabled"
        return str(answer.raise_for_status().json()["authentication_mode"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
