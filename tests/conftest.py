import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's package, which would try to connect for a minute


def pytest_configure(config: pytest.Config) -> None:
    # Else xdist begins with the files of many tests, which are quick, and at the end one core waits for several hosts.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    multinode, slow = (
        {item.path for item in items if item.get_closest_marker(marker)} for marker in ("multinode", "slow")
    )
    items.sort(key=lambda item: (item.path not in multinode, item.path not in slow))
    import torch

    from tests.ranks import start_fork_server

    torch.set_num_threads(1)  # threads that wait for each other on cores that others use take many times as long
    if torch.cuda.is_available():
        return
    start_fork_server()
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
