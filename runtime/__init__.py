"""Requests to pictures: the library under the server. Names load when first used, so light modules stay light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RuntimeConfig as RuntimeConfig
    from .engines import open_engine as open_engine
    from .errors import FewstepError as FewstepError
    from .errors import InvalidRequest as InvalidRequest
    from .errors import Overloaded as Overloaded
    from .events import Failed as Failed
    from .events import Finished as Finished
    from .events import Progress as Progress
    from .events import Result as Result
    from .fake_engine import FakeEngine as FakeEngine
    from .images import encode as encode
    from .local import Runtime as Runtime
    from .request import Control as Control
    from .request import GenerateRequest as GenerateRequest
    from .request import Limits as Limits

_HOMES = {
    "Control": "request",
    "Failed": "events",
    "FakeEngine": "fake_engine",
    "FewstepError": "errors",
    "Finished": "events",
    "GenerateRequest": "request",
    "InvalidRequest": "errors",
    "Limits": "request",
    "Overloaded": "errors",
    "Progress": "events",
    "Result": "events",
    "Runtime": "local",
    "RuntimeConfig": "config",
    "encode": "images",
    "open_engine": "engines",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
