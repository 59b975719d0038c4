"""Connects the ranks' processes: gloo on CPUs; on GPUs NCCL too, which the host then only meets by gloo."""

import socket
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch import distributed

from tritium.engine.engine import Engine
from tritium.kernels.communicator import Communicator
from tritium.runtime.gloo import LOOPBACK, TIMEOUT, GlooCommunicator
from tritium.runtime.nccl import NcclCommunicator, nccl_on_loopback


def host_store(host: str, num_ranks: int) -> distributed.TCPStore:
    """Where ranks of several machines find each other, at this address alone. The first rank makes it, and keeps it."""
    with socket.create_server((host, 0)) as listener:
        port, descriptor = listener.getsockname()[1], listener.detach()
    return distributed.TCPStore(
        host, port, num_ranks, True, TIMEOUT, wait_for_workers=False, master_listen_fd=descriptor
    )


def connect(
    engine: Engine,
    store: distributed.Store,
    rank: int,
    num_ranks: int,
    *,
    address: str = LOOPBACK,
    timeout: timedelta = TIMEOUT,
) -> Communicator:
    """Wait for the others. address: this machine's, for the others; the rank's GPU is the current one. Raises
    `EngineError`."""
    host = GlooCommunicator(store, rank, num_ranks, address=address, timeout=timeout)
    if engine.manifest.backend != "cuda":
        return host
    try:
        with nccl_on_loopback() if address == LOOPBACK else nullcontext():
            return NcclCommunicator(host, torch.device("cuda", torch.cuda.current_device()))
    except BaseException:
        host.close()
        raise
