"""The checks as nox sessions, in the environment nox itself runs in: a torch environment weighs 5.5 GB."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, types, import direction."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests that take minutes in all."""
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests behind the marker."""
    session.run("pytest", "-m", "slow", *session.posargs)
