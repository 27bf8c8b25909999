"""The processes that share one job: how they find each other, and the small messages between them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pe_av.config import ConfigError


@contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Iterator[torch.device]:
    """The process group that `torchrun` describes in the environment, or none; gives this rank's own device.

    Raises:
        ConfigError: the description is incomplete, or a GPU is missing.
        ConnectionError: inside, another rank ended, or others waited for it longer than `timeout_minutes`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and "MASTER_ADDR" not in os.environ:
        yield device
        return
    unset = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ConfigError(
            f"{', '.join(unset)} not set: start with torchrun, which sets what ranks need to find each other, "
            "or as docs/slurm.md does"
        )
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local} of this machine has no GPU: this process sees {torch.cuda.device_count()}; start no "
                "more ranks than GPUs, and under Slurm ask for --gpus-per-node, not --gpus-per-task"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank_, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts ranks again, with the addresses of those that are gone
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # messages between hosts, such as how many rows each has, go over gloo and never wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_, world_size=world, timeout=timeout)
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        # the group is left as it is: taking it down would wait for the lost rank
        raise ConnectionError(
            f"rank {rank()} lost another one, which ended or hangs ({reason}): its own message says why; resume=auto "
            "goes on from the newest state, and torchrun --max-restarts=3 starts again by itself"
        ) from error
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def of_all_ranks(value: Any) -> list[Any]:
    """What every rank gives, on every rank; a message between hosts."""
    found = [value]
    if world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, value)
    return found


def of_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank."""
    shared = [value]
    if world_size() > 1:
        dist.broadcast_object_list(shared)
    return shared[0]
