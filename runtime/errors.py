"""Every error the runtime raises on purpose. Servers map them to statuses in one table of their own.

FewstepError (fewstep.models.errors)
├── BundleError, SpecError      the artifact is at fault
├── InvalidRequest              the request is at fault; `field` names the part, the message the remedy
├── Overloaded                  the queue is full; `retry_after_s` says when to come back
├── Cancelled                   somebody cancelled the request
├── DeadlineExceeded            it could not finish, or did not finish, in time
├── EngineFailed                an engine broke or returned NaN; only the requests in that call fail
├── EngineUnavailable           an engine cannot be had here: package, file or provider missing
└── Closed                      the runtime is shutting down
"""

from fewstep.models.errors import BundleError, FewstepError, SpecError

__all__ = [
    "BundleError",
    "Cancelled",
    "Closed",
    "DeadlineExceeded",
    "EngineFailed",
    "EngineUnavailable",
    "FewstepError",
    "InvalidRequest",
    "Overloaded",
    "SpecError",
]


class InvalidRequest(FewstepError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Overloaded(FewstepError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(FewstepError):
    pass


class DeadlineExceeded(FewstepError):
    pass


class EngineFailed(FewstepError):
    pass


class EngineUnavailable(FewstepError):
    pass


class Closed(FewstepError):
    pass
