"""Everything that makes many processes train one model, applied from outside: the model knows nothing of it.

The logit scales and biases stay out of DDP and FSDP: they are used in the loss and not in the model's forward, and the
loss already gives every rank their whole gradient (pe_av/loss.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..config import ConfigError, ParallelConfig
from ..evaluation.embed import Embedder
from ..model.peav import PEAudioVideo


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
            f"{', '.join(unset)} not set: start with torchrun, which sets what ranks need to find each other"
        )
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local} of this machine has no GPU: it has {torch.cuda.device_count()}, lower --nproc"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank_, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts ranks again, with the addresses of those that are gone
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
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


def parallelize(model: PEAudioVideo, config: ParallelConfig, device: torch.device) -> nn.Module:
    """Recomputation, compilation and sharding per block, then DDP or FSDP2 around the whole.

    Returns:
        an `Embedder`, possibly inside DDP; its parameters are those of `model`.
    """
    for block in model.blocks():
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.compile()
    if world_size() == 1:
        return Embedder(model)
    outside = set(model.logits.parameters())
    if config.strategy == "fsdp":
        mesh = init_device_mesh(device.type, (world_size(),))
        half = torch.bfloat16 if config.shard_bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        for block in model.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        embedder = Embedder(model)
        fully_shard(embedder, mesh=mesh, mp_policy=policy, ignored_params=outside)
        return embedder
    embedder = Embedder(model)
    ignored = [name for name, parameter in embedder.named_parameters() if parameter in outside]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(embedder, ignored)
    # a rank whose rows all lack a modality gives its tower no gradient; DDP must not wait for one
    return DistributedDataParallel(
        embedder,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )


@contextmanager
def gradients_stay_local(embedder: nn.Module, local: bool) -> Iterator[None]:
    """Backward passes inside are not averaged over the ranks yet: the last micro-batch's are."""
    if isinstance(embedder, FSDPModule):
        embedder.set_requires_gradient_sync(not local)
        embedder.set_is_last_backward(not local)
    with embedder.no_sync() if local and isinstance(embedder, DistributedDataParallel) else nullcontext():
        yield


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], norm: float) -> Tensor:
    """Scale all gradients down to the global `norm`, whole or sharded; returns what it was before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = {False: torch.zeros((), device=gradients[0].device), True: torch.zeros((), device=gradients[0].device)}
    for sharded in squares:
        local = [_local(g) for g in gradients if isinstance(g, DTensor) == sharded]
        if local:
            squares[sharded] = torch.stack(torch._foreach_norm(local)).float().square().sum()
    if any(isinstance(g, DTensor) for g in gradients):
        dist.all_reduce(squares[True])
    total = (squares[False] + squares[True]).sqrt()
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([_local(g) for g in gradients], factor)
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
