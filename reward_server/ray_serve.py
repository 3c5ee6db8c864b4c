"""Launcher: the app as a Ray Serve application, for RayService on Kubernetes and for `serve run`.

Its arguments are the values of a recipe's `reward` section. Each replica builds the app for itself and reads the token
from its own environment. Admission, limits and readiness are the app's, so that all launchers behave alike; what keys
have used and answers to idempotency keys are each replica's own.

Invariant: without a token or keys there is no application, as Serve's proxy, not this module, chooses the address.
"""

from typing import Any

from fastapi import FastAPI

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.model_process import model_processes
from services.errors import UserError

try:
    from ray import serve
except ImportError as error:  # Serve has dependencies of its own, which Ray does without
    raise UserError(f"Ray Serve is not installed ({error.name}): pip install 'attune[serve]'") from error

HEADROOM = 32
"""Requests beyond `max_requests` that a replica takes, so that the app refuses them, and not Serve's queue."""


def application(args: dict[str, Any]) -> serve.Application:
    """The application of a `reward` section's values. Replicas fail to start without a token or keys."""
    section = RewardSection.model_validate(args)

    def build() -> FastAPI:
        token = section.token()
        if token is None and section.keys_file is None:
            raise UserError(f"the reward server under Ray Serve needs {section.token_env} or reward.keys_file")
        return create_app(section, token=token, runners=model_processes(section), tells_id=False)

    deploy: Any = serve  # its types are unknown in parts
    return deploy.deployment(
        deploy.ingress(build)(),
        name="RewardServer",
        max_ongoing_requests=section.max_requests + HEADROOM,
        health_check_timeout_s=section.source_timeout_s + section.ready_timeout_s,
        graceful_shutdown_timeout_s=section.drain_s,
    ).bind()
