"""The embeddings of a corpus on a cluster: as `python -m pe_av.embed`, but Ray Data hands out the parts.

    ray start --head                                                   # and `ray start --address=…` on other machines
    python -m pe_av.embed_ray checkpoint=DIR source=MANIFEST target=DIR actors=8 gpus_per_actor=1

A pool of actors, each with a model, takes the parts that are missing, one after the other; an actor that is lost is
replaced, and its part computed again. Source and target lie where all machines see them under the same path. The parts
are those that one process would write, to the bit on the same hardware.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError, RayEmbedConfig
from pe_av.config.compose import run_command
from pe_av.device import pick_device
from pe_av.embed import PartWriter, Plan, make_plan
from pe_av.index import Index, list_bad


class Actor:
    """Writes the parts whose numbers it is given; there is one of them in each process of the pool."""

    def __init__(self, plan: Plan):
        self.writer = PartWriter(plan, pick_device(plan.config.device))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        throughput = self.writer.write(batch["part"].tolist(), shows_progress=False)
        return {"part": batch["part"], "rows": np.array([throughput.rows])}


def embed_with_ray(config: RayEmbedConfig, _: Path | None = None) -> None:
    """Embed what is missing in the target, on the cluster that `ray.init` finds, or on one that it starts here.

    Raises:
        ConfigError, CheckpointError: as `make_plan` and `PartWriter.write`; or Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("this needs Ray Data: pip install 'pe-av[ray]'") from None
    config = _absolute(config)
    plan = make_plan(config, pick_device("cpu" if config.gpus_per_actor else config.device))
    missing = plan.missing()
    if missing:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources: dict[str, Any] = {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}
        parts = ray.data.from_items([{"part": number} for number in missing]).repartition(len(missing))
        pool = ray.data.ActorPoolStrategy(size=config.actors)
        done = parts.map_batches(Actor, fn_constructor_args=(plan,), batch_size=1, compute=pool, **resources)
        try:
            for _part in track(done.iter_rows(), "parts", total=len(missing), console=Console(stderr=True)):
                pass
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise cause if isinstance(cause, ValueError | OSError) else error from None
        finally:
            list_bad(plan.folder)
    print(f"{len(Index(plan.folder)):,} rows: {plan.folder}")


def _absolute(config: RayEmbedConfig) -> RayEmbedConfig:
    """The settings with paths that mean the same in the folders in which actors run."""
    paths = {name: getattr(config, name) for name in ("checkpoint", "target", "source")}
    absolute = {name: path and os.path.abspath(path) for name, path in paths.items()}
    return replace(
        config, **absolute, data=replace(config.data, eval=config.data.eval and os.path.abspath(config.data.eval))
    )


if __name__ == "__main__":
    run_command(RayEmbedConfig, "embed_ray", embed_with_ray)
