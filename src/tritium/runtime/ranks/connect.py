"""Connects the ranks' processes: gloo on CPUs; on GPUs NCCL too, which the host then only meets by gloo."""

import torch
from torch import distributed

from tritium.engine.engine import Engine
from tritium.kernels.communicator import Communicator
from tritium.runtime.gloo import GlooCommunicator
from tritium.runtime.nccl import NcclCommunicator


def connect(engine: Engine, store: str, rank: int, num_ranks: int) -> Communicator:
    """Wait for the others at the file `store`. The rank's GPU is the current one. Raises `EngineError`."""
    host = GlooCommunicator(distributed.FileStore(store, num_ranks), rank, num_ranks)
    if engine.manifest.backend != "cuda":
        return host
    return NcclCommunicator(host, torch.device("cuda", torch.cuda.current_device()))
