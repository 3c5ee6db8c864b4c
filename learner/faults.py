"""What goes wrong in a rank, told apart where it happens: the work itself, or the company it is done in.

A rank that dies breaks every collective of the others, whose errors then look like their own. They are given a name
here, before they cross to the driver: `PeerLost` is a failure of infrastructure, and the same step may well succeed in
a new process group. Everything else that a rank raises is about its work and would be raised again.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])

_TRANSPORT = ("gloo", "NCCL", "Connection closed", "Connection reset", "Socket Timeout", "Broken pipe")
"""How gloo, which raises a plain RuntimeError, and the store begin to say that a peer is gone."""


class PeerLost(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A collective broke off: another rank died, or the network between them did."""


def collective(method: Method) -> Method:
    """Of a method that all ranks call: a broken collective leaves it as PeerLost."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (torch.distributed.DistError, ConnectionError) as error:
            raise PeerLost(f"{method.__name__}: {error}") from error
        except RuntimeError as error:
            if any(word in str(error) for word in _TRANSPORT):
                raise PeerLost(f"{method.__name__}: {error}") from error
            raise

    return cast(Method, call)
