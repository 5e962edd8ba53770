"""The two ways this project says no, and the one-line guard that raises the first.

`InvalidInput` is a refusal: an argument, tensor or file that is not accepted (commands exit 2).
`MissingEnvironment` is a machine that lacks what was demanded: a GPU, an optional package (commands exit 3)."""


class InvalidInput(ValueError):
    """An argument, tensor or file is not accepted; the message names it and the value found."""


class MissingEnvironment(RuntimeError):
    """The machine lacks what was demanded; the message says what, and how to get it."""


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInput(message)` unless `condition`. Called before any allocation or launch."""
    if not condition:
        raise InvalidInput(message)
