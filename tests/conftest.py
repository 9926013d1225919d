import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's package, which would try to connect for a minute


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    from tests.ranks import start_fork_server

    torch.set_num_threads(1)  # threads that wait for each other on cores that others use take many times as long
    if torch.cuda.is_available():
        return
    start_fork_server()
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
