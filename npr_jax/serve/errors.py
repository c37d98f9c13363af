"""What a request is refused with: an HTTP status, and the error object of OpenAI's API."""

_LONGEST = 1000  # characters of a message
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    415: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Becomes `{"error": {message, type, param, code}}` with this status.

    `param`: the field of the request that is at fault; `code`: what OpenAI calls it, such as
    "model_not_found"; `headers`: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        if len(message) > _LONGEST:  # it repeats what was sent
            message = message[:_LONGEST] + "..."
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.headers = code, headers or {}

    def body(self) -> dict:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
