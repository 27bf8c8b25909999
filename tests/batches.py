"""Taking batches from a loader over several epochs, alone or as several ranks that resume from one state."""

from collections.abc import Callable
from typing import Any

from pe_av.loading.loader import Loader


def take(loader: Loader, count: int, key: str) -> list[Any]:
    """`key` of the next batches; where an epoch ends, the next begins."""
    found: list[Any] = []
    while len(found) < count:
        for batch in loader:
            found.append(batch[key])
            if len(found) == count:
                break
    return found


def take_on_ranks(
    make: Callable[[int, int], Loader], world: int, state: dict[str, Any], count: int, key: str
) -> tuple[list[Loader], list[list[Any]]]:
    """The loaders of all ranks after so many steps from `state`, and of each step the sorted rows of all ranks.

    Args:
        make: (rank, world size) -> loader.
    """
    ranks = [make(rank, world) for rank in range(world)]
    for loader in ranks:
        loader.load_state_dict(state)
    steps = zip(*[take(loader, count, key) for loader in ranks], strict=True)
    return ranks, [sorted(sum(step, [])) for step in steps]
