"""pytest-benchmark's results carry this project's environment header, and no name of a host or a path."""

import pytest

from bench.records import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment())


@pytest.hookimpl(trylast=True)
def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()
    commit_info["id"] = environment()["commit"]
