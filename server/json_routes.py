"""JSON in and out by the shortest way: a body straight into its model, a reply written by pydantic.

FastAPI finds every parameter of a route anew at each call and Starlette makes an encoder for each reply: together a
third of a millisecond beside networks that take four (`fewstep bench load`, a request alone, 3.3 ms beyond the engine
and 2.8 without).
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

Handler = Callable[[Request], Awaitable[Response]]


class JSONReply(JSONResponse):
    """What is no JSON number (infinity, NaN) becomes null."""

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


class JSONRoute(APIRoute):
    """For endpoints `(body, request, headers with defaults) -> Response`; others are as FastAPI has them.

    A call that sends one of those headers or says another content type, or whose body is not valid, goes FastAPI's way:
    its answers and errors are the same.
    """

    def get_route_handler(self) -> Any:
        usual = super().get_route_handler()
        return self._direct(usual) or usual

    def _direct(self, usual: Handler) -> Handler | None:
        """The shorter way, where this route allows it."""
        needs, endpoint = self.dependant, self.endpoint
        returns = inspect.signature(endpoint).return_annotation
        if len(needs.body_params) != 1 or needs.path_params or needs.query_params or needs.cookie_params:
            return None
        if any(parameter.field_info.is_required() for parameter in needs.header_params):
            return None
        if needs.dependencies or not (inspect.isclass(returns) and issubclass(returns, Response)):
            return None
        model = needs.body_params[0].field_info.annotation
        if not (inspect.isclass(model) and issubclass(model, BaseModel)):
            return None
        headers = [parameter.alias for parameter in needs.header_params]
        known = {parameter.name: parameter.default for parameter in needs.header_params}
        body_name, request_name = needs.body_params[0].name, needs.request_param_name

        async def handle(request: Request) -> Response:
            sent = request.headers
            if sent.get("content-type") != "application/json" or any(name in sent for name in headers):
                return await usual(request)
            try:
                body = model.model_validate_json(await request.body())
            except ValidationError:
                return await usual(request)
            found: dict[str, Any] = {body_name: body, **known}
            if request_name is not None:
                found[request_name] = request
            response: Response = await endpoint(**found)
            return response

        return handle
