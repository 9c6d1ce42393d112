"""Gives pytest-benchmark's results this project's environment header, without the name of a host or a path."""

from typing import Any

import pytest

from bench.records import environment


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Put the environment in place of what pytest-benchmark knows of the machine."""
    machine_info.clear()
    machine_info.update(environment())


@pytest.hookimpl(trylast=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keep the commit's id alone."""
    commit_info.clear()
    commit_info["id"] = environment()["commit"]
