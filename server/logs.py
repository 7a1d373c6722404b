"""Log lines: one per call where the operator wants them, as text or as JSON, each with the id of its request.

Neither prompts, pictures, query strings nor keys are written; a key appears by its name.
"""

import json
import logging
import time
from typing import Any

from .visit import Visit, current

STYLES = ("quiet", "text", "json")
_log = logging.getLogger("fewstep.server")


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, message, the request id, and `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (visit := current.get()) is not None:
            line["request_id"] = visit.id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(style: str) -> None:
    """Send this process's log to stderr: "quiet" only what went wrong, "text" and "json" every call too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("fewstep", logging.WARNING if style == "quiet" else logging.INFO), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log_visit(visit: Visit, seconds: float) -> None:
    """The line of a call that has ended."""
    if not _log.isEnabledFor(logging.INFO):
        return
    message = f"{visit.method} {visit.path} {visit.status} {seconds * 1e3:.1f} ms"
    _log.info(message, extra={"fields": visit_fields(visit, seconds)})


def visit_fields(visit: Visit, seconds: float) -> dict[str, Any]:
    """What is known of a call, by name; what it has not is left out."""
    found: dict[str, Any] = {
        "request_id": visit.id,
        "method": visit.method,
        "path": visit.path,
        "route": visit.route,
        "status": visit.status,
        "duration_ms": round(seconds * 1e3, 3),
    }
    if visit.caller is not None:
        found["key"] = visit.key_name
    if visit.ticket is not None:
        found["ticket"] = visit.ticket
    if visit.made is not None:
        timings = visit.made.timings
        found |= {"model": visit.made.model, "steps": visit.made.steps, "pictures": visit.pictures}
        for stage in ("queue", "text", "denoise", "decode"):
            found[f"{stage}_ms"] = round(getattr(timings, f"{stage}_s") * 1e3, 3)
        found["encode_ms"] = round(visit.encode_s * 1e3, 3)
    return found
