"""Requests to pictures: the library under the server. Names load when first used, so light modules stay light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.fake_engine import FakeEngine as FakeEngine
    from .engines.registry import open_engine as open_engine
    from .errors import FewstepError as FewstepError
    from .errors import InvalidRequest as InvalidRequest
    from .errors import Overloaded as Overloaded
    from .sampling.events import Failed as Failed
    from .sampling.events import Finished as Finished
    from .sampling.events import Progress as Progress
    from .sampling.events import Result as Result
    from .sampling.images import encode as encode
    from .sampling.request import Control as Control
    from .sampling.request import GenerateRequest as GenerateRequest
    from .sampling.request import Limits as Limits
    from .service.config import RuntimeConfig as RuntimeConfig
    from .service.local import Runtime as Runtime

_HOMES = {
    "Control": "sampling.request",
    "Failed": "sampling.events",
    "FakeEngine": "engines.fake_engine",
    "FewstepError": "errors",
    "Finished": "sampling.events",
    "GenerateRequest": "sampling.request",
    "InvalidRequest": "errors",
    "Limits": "sampling.request",
    "Overloaded": "errors",
    "Progress": "sampling.events",
    "Result": "sampling.events",
    "Runtime": "service.local",
    "RuntimeConfig": "service.config",
    "encode": "sampling.images",
    "open_engine": "engines.registry",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
