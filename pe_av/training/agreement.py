"""Batches on which all ranks have agreed: how many micro-batches, and which passes of the towers each of them takes.

With every batch the ranks exchange one message. It also carries damaged items, requests to stop and to save, and errors
of the thread that writes states, so that all ranks act on them at the same step.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

from pe_av.checkpoint import CheckpointError
from pe_av.config import ConfigError
from pe_av.loading.bad_items import BadItems
from pe_av.ranks import of_all_ranks
from pe_av.training.states import StateWriter
from pe_av.training.stopping import Requests
from pe_av.training.task import Task

MOST_FRUITLESS = 100_000  # a run gives up after this many items in a row (or all items) with nothing to learn from


class AgreedBatch(NamedTuple):
    """One batch, as this rank sees it."""

    rows: dict[str, Any]  # this rank's rows, as the loader gave them
    micro_batches: list[dict[str, Any]]  # as many on every rank, and the same passes in each
    counts: dict[str, int]  # what each objective can use, over all ranks
    clips: int  # rows of all ranks


class _Message(NamedTuple):
    """What a rank tells the others about its batch and itself."""

    passes: list[list[str]]  # of each micro-batch
    counts: dict[str, int]
    clips: int
    items: tuple[int, list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]  # read, bad, partial, cut
    requests: tuple[int, bool]
    problem: str | None  # why the last state could not be written


def agreed_batches(
    task: Task, micro_batch_size: int | None, bad_items: BadItems, requests: Requests, states: StateWriter
) -> Iterator[AgreedBatch]:
    """Training batches of one epoch after another, without those in which no objective has anything to learn.

    They end only if the run is asked to stop while there is nothing to learn from.

    Raises:
        ConfigError: too many items are damaged, or nothing can be learned from the data.
        CheckpointError: a rank could not write its last state.
    """
    fruitless = 0
    for batch in _endless(task.train_loader):
        micro_batches = task.split(batch, micro_batch_size)
        everyone = of_all_ranks(
            _Message(
                passes=[task.passes_of(micro_batch) for micro_batch in micro_batches],
                counts=task.count(batch),
                clips=len(batch["ids"]),
                items=(batch["read"], batch["bad"], batch["partial"], batch["cut"]),
                requests=requests.own(),
                problem=states.problem(),
            )
        )
        for message in everyone:
            if message.problem is not None:
                raise CheckpointError(message.problem)
        read, bad, partial, cut = zip(*(message.items for message in everyone), strict=True)
        bad_items.add(sum(read), sum(bad, []), sum(partial, []), sum(cut, []))
        requests.agree([message.requests for message in everyone])

        counts: Counter[str] = Counter()
        for message in everyone:
            counts.update(message.counts)
        # a rank with fewer micro-batches than another takes part in the remaining ones without rows
        of_all = [set().union(*each) for each in zip_longest(*(message.passes for message in everyone), fillvalue=[])]
        passes = [task.needed(counts, sorted(each)) for each in of_all]
        if any(passes):
            fruitless = 0
            agreed = [task.with_passes(*each) for each in zip_longest(micro_batches, passes)]
            yield AgreedBatch(batch, agreed, counts, sum(message.clips for message in everyone))
            continue
        fruitless += sum(read)
        if fruitless > min(task.items, MOST_FRUITLESS):
            raise ConfigError(
                f"the last {fruitless} items gave no batch with two clips to pair: partial_items.jsonl and "
                f"bad_items.jsonl in {bad_items.files['bad'].parent} say what they lack"
            )
        if requests.stop:
            return


def _endless(loader: Any) -> Iterator[dict[str, Any]]:
    """Epoch after epoch."""
    empty_epochs = 0
    # the first epoch of a resumed run is the rest of one, and may have no batch left
    while empty_epochs < 2:
        empty_epochs += 1
        for batch in loader:
            empty_epochs = 0
            yield batch
    raise ConfigError("the data give no batch at all: lower batch_size, or raise data.batch_tokens")
