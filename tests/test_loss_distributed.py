"""The ring against a float64 double loop over the global batch, on one to four processes with gloo.

The processes of a world size are started once and compute all cases; what they return is compared here.
"""

import multiprocessing
import os
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pe_av.config import CAPTIONS, HEADS, PAIRINGS, LossConfig, Pairing
from pe_av.config.compose import read_yaml
from pe_av.loss import contrastive_loss, gathered_loss, sigmoid_loss

ROOT = Path(__file__).parent.parent
DIM, BLOCK, UPSTREAM = 24, 4, 3.0
ROWS = {1: [13], 2: [9, 4], 3: [6, 0, 7], 4: [5, 5, 0, 3]}  # of each rank: 13 in all, ragged, one rank without any
WORLDS = list(ROWS)
SIX = LossConfig().pairings
TEN = read_yaml(LossConfig, ROOT / "configs/loss/ten.yaml").pairings
MASKS = {"plain": (), "valid": ("valid",), "captions": ("captions",), "both": ("valid", "captions")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@cache
def global_batch(pairings: str, masks: str) -> tuple[list[Pairing], dict, dict, dict, dict]:
    """Pairings, embeddings, scales and biases, flags and caption keys of the 13 rows that the ranks share."""
    chosen = [replace(p, weight=0.25 + k / 8) for k, p in enumerate({"six": SIX, "ten": TEN}[pairings])]
    generator = torch.Generator().manual_seed(1)
    rows = sum(ROWS[1])
    common = torch.randn(rows, DIM, generator=generator)
    names = list(dict.fromkeys(name for p in chosen for name in p.embeddings))
    embeds = {name: (common + torch.randn(rows, DIM, generator=generator)) / 4 for name in names}
    logits = {name: (torch.tensor([1.5 + k]), torch.tensor([k - 3.0])) for k, name in enumerate(PAIRINGS)}
    valid, keys = {}, {}
    if "valid" in MASKS[masks]:
        for name in embeds:
            if "text_video" not in name:  # which every clip has
                valid[name] = torch.rand(rows, generator=generator) < 0.7
                embeds[name][~valid[name]] = torch.nan  # what is missing may be anything
    if "captions" in MASKS[masks]:
        keys = {kind: torch.randint(1 << 40, (4,), generator=generator)[torch.arange(rows) % 4] for kind in CAPTIONS}
        keys = keys if pairings == "ten" else {None: keys["audio"]}
    return chosen, embeds, logits, valid, keys


def part(values: dict, rank: int, world: int) -> dict:
    """The rows of `rank`."""
    return {name: torch.split(rows, ROWS[world])[rank] for name, rows in values.items()}


@cache
def brute_force(pairings: str, masks: str, dtype: torch.dtype) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Total, losses and gradients by a loop over the pairs, in float64, one scalar logit at a time."""
    chosen, embeds, logits, valid, keys = global_batch(pairings, masks)
    gradients = {name: torch.zeros(e.shape, dtype=torch.float64) for name, e in embeds.items()}
    gradients |= {f"{name} {which}": torch.zeros(1, dtype=torch.float64) for name in logits for which in ("s", "b")}
    total, losses = 0.0, {}
    for p in chosen:
        left, right = p.embeddings
        text_alone = p.left.startswith("text") or p.right.startswith("text")
        x, y = embeds[left].to(dtype).double(), embeds[right].to(dtype).double()
        s, b = (value.double() for value in logits[p.logits])
        here = [valid.get(side, torch.ones(len(x), dtype=torch.bool)) for side in (left, right)]
        n = sum(bool(here[0][i] and here[1][i]) for i in range(len(x)))
        loss = 0.0
        for i in range(len(x)):
            for j in range(len(y)):
                same = text_alone and i != j and p.caption in keys and keys[p.caption][i] == keys[p.caption][j]
                if not here[0][i] or not here[1][j] or same or n == 0:
                    continue
                z = 1 if i == j else -1
                similarity = x[i] @ y[j]
                logit = s * similarity + b
                loss += torch.log1p(torch.exp(-z * logit)).item() / n
                slope = -z / (1 + torch.exp(z * logit)) * p.weight / n
                gradients[left][i] += slope * s * y[j]
                gradients[right][j] += slope * s * x[i]
                gradients[f"{p.logits} s"] += slope * similarity
                gradients[f"{p.logits} b"] += slope
        losses[p.name] = loss
        total += p.weight * loss
    return total, losses, gradients


def computed(loss_of, pairings: str, masks: str, dtype: torch.dtype, rank: int, world: int, **options) -> dict:
    """Loss and gradients as this rank gets them."""
    chosen, embeds, logits, valid, keys = global_batch(pairings, masks)
    embeds = {name: rows.to(dtype).requires_grad_() for name, rows in part(embeds, rank, world).items()}
    own = torch.float64 if dtype == torch.float64 else torch.float32
    logits = {name: tuple(v.clone().to(own).requires_grad_() for v in pair) for name, pair in logits.items()}
    out = loss_of(embeds, logits, chosen, part(valid, rank, world), part(keys, rank, world), **options)
    (UPSTREAM * out.total).backward()
    gradients = {name: value.grad for name, value in embeds.items()}
    for name, pair in logits.items():
        gradients |= {f"{name} {which}": v.grad for which, v in zip("sb", pair, strict=True) if v.grad is not None}
    losses = {name: loss.item() for name, loss in out.losses.items()}
    return {"total": out.total.item(), "losses": losses, "gradients": gradients, "dtype": out.total.dtype}


CASES = [(p, m, torch.float32) for p in ("six", "ten") for m in MASKS]
CASES += [(p, "both", dtype) for p in ("six", "ten") for dtype in DTYPES[1:]]


def message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def all_cases(rank: int, world: int) -> dict:
    found = {}
    for case in CASES:
        found["ring", *case] = computed(contrastive_loss, *case, rank, world, block=BLOCK)
    for case in CASES[:8]:
        found["gathered", *case] = computed(gathered_loss, *case, rank, world)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found["autocast"] = computed(contrastive_loss, *CASES[3], rank, world, block=BLOCK)
    found["one block"] = computed(contrastive_loss, *CASES[3], rank, world)
    with torch.no_grad():
        chosen, embeds, logits, valid, keys = global_batch(*CASES[3][:2])
        shares = [part(values, rank, world) for values in (embeds, valid, keys)]
        found["no gradient"] = contrastive_loss(shares[0], logits, chosen, *shares[1:], block=BLOCK)
    found["empty"] = empty_batch(rank)
    found["none valid"] = none_valid(rank, world)
    found["replicas"] = replicas(rank, world)
    found["mistakes"] = mistakes(rank, world)
    found["sent"] = sent(rank, world)
    return found


def empty_batch(rank: int) -> tuple[float, Tensor]:
    """No rank has any row."""
    embeds = {name: torch.zeros(0, DIM).requires_grad_() for name in HEADS}
    logits = {name: (torch.ones(1).requires_grad_(), torch.zeros(1)) for name in PAIRINGS}
    total = contrastive_loss(embeds, logits, SIX).total
    total.backward()
    return total.item(), logits["audio_text"][0].grad


def none_valid(rank: int, world: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Sound here, captions there, but no clip with both: nothing is learned from that pairing."""
    _, embeds, logits, _, _ = global_batch("six", "plain")
    embeds = {name: rows.clone().requires_grad_() for name, rows in part(embeds, rank, world).items()}
    every_other = torch.arange(sum(ROWS[world])) % 2 == 0
    valid = part({"audio": every_other, "text_audio": ~every_other}, rank, world)
    logits = {name: tuple(v.clone().requires_grad_() for v in pair) for name, pair in logits.items()}
    out = contrastive_loss(embeds, logits, [SIX[0], SIX[1]], valid)
    out.total.backward()
    gradients = {name: embeds[name].grad for name in ("audio", "text_audio", "video", "text_video")}
    gradients |= {f"{name} {w}": v.grad for name in PAIRINGS for w, v in zip("sb", logits[name], strict=True)}
    return {name: loss.item() for name, loss in out.losses.items()}, gradients


class Towers(nn.Module):
    """Stands in for the model: one linear map per embedding, and the scale and bias of every pairing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.heads = nn.ModuleDict({name: nn.Linear(DIM, DIM, bias=False) for name in HEADS})
        self.logits = nn.ParameterDict(
            {f"{n}_{w}": torch.full((1,), v) for n in PAIRINGS for w, v in (("s", 2.0), ("b", -2.0))}
        )

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        pairs = {name: (self.logits[f"{name}_s"] * 1, self.logits[f"{name}_b"] * 1) for name in PAIRINGS}
        return {name: head(x) for name, head in self.heads.items()}, pairs


def replicas(rank: int, world: int) -> dict[str, Tensor]:
    """Gradients of the parameters after DDP has averaged them."""
    x = torch.randn(sum(ROWS[world]), DIM, generator=torch.Generator().manual_seed(4))
    towers = Towers()
    wrapped = DistributedDataParallel(towers) if world > 1 else towers
    embeds, logits = wrapped(torch.split(x, ROWS[world])[rank])
    contrastive_loss(embeds, logits, SIX).total.backward()
    return {name: parameter.grad for name, parameter in towers.named_parameters()}


def mistakes(rank: int, world: int) -> dict[str, str]:
    """What a rank is told when it, or another, is given something that does not fit."""
    odd = rank == world - 1
    embeds = {name: torch.randn(3, 8) for name in HEADS}
    wide = {name: torch.randn(3, 12) for name in HEADS}
    logits = {name: (torch.ones(1), torch.zeros(1)) for name in PAIRINGS}
    flags = {"audio": torch.ones(3, dtype=torch.bool)}
    without = {name: rows for name, rows in embeds.items() if name != "video"}
    doubled = {name: rows.double() for name, rows in embeds.items()}
    return {
        "pairings": message(contrastive_loss, embeds, logits, SIX[:3] if odd else SIX),
        "weights": message(contrastive_loss, embeds, logits, [replace(SIX[0], weight=1.0 + odd)]),
        "order": message(contrastive_loss, embeds, logits, SIX[::-1] if odd else SIX),
        "dims": message(contrastive_loss, wide if odd else embeds, logits, SIX),
        "masks": message(contrastive_loss, embeds, logits, SIX, flags if odd else None),
        "dtypes": message(contrastive_loss, doubled if odd else embeds, logits, SIX),
        "missing": message(contrastive_loss, without if odd else embeds, logits, SIX),
        "then": message(contrastive_loss, embeds, logits, SIX),
    }


def sent(rank: int, world: int) -> list[list[int]]:
    """Numbers in each message of one loss, with gradient and without."""
    sizes: list[list[int]] = [[], []]
    exchange = dist.batch_isend_irecv
    chosen, embeds, logits, _, _ = global_batch("six", "plain")
    for wanted in (True, False):
        embeds = {name: rows.detach().requires_grad_(wanted) for name, rows in part(embeds, rank, world).items()}

        def counted(operations: list[dist.P2POp], seen: list[int] = sizes[not wanted]):
            seen += [operation.tensor.numel() for operation in operations if operation.op is dist.isend]
            return exchange(operations)

        dist.batch_isend_irecv = counted
        contrastive_loss(embeds, logits, chosen)
        dist.batch_isend_irecv = exchange
        embeds = global_batch("six", "plain")[1]
    return sizes


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(all_cases(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    """World size -> what every rank found; 1 runs here, without a process group."""

    @cache
    def run(world: int) -> list[dict]:
        if world == 1:
            return [all_cases(0, 1)]
        folder = tmp_path_factory.mktemp(f"world{world}")
        multiprocessing.set_forkserver_preload(["torch"])  # imported once for all ranks, before there are any threads
        mp.start_processes(rank_main, (world, str(folder)), nprocs=world, start_method="forkserver")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return run


def expect(ranks: list[dict], pairings: str, masks: str, dtype: torch.dtype, loss: float, gradient: float) -> None:
    """Each rank's loss, and its gradients by the rule of pe_av/loss.py, against the loop."""
    total, losses, gradients = brute_force(pairings, masks, dtype)
    world = len(ranks)
    for rank, found in enumerate(ranks):
        assert found["total"] == pytest.approx(total, rel=loss)
        assert found["losses"] == pytest.approx(losses, rel=loss)
        for name, expected in gradients.items():
            if " " in name:  # a scale or bias: the same everywhere
                error = abs(found["gradients"][name].double() - UPSTREAM * expected) / (UPSTREAM * abs(expected))
                assert error.item() <= gradient, (rank, name)
            else:
                expected = UPSTREAM * world * torch.split(expected, ROWS[world])[rank]
                error = (found["gradients"][name].double() - expected).norm()
                assert error <= gradient * expected.norm(), (rank, name, error / expected.norm())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", ["ring", "gathered"])
@pytest.mark.parametrize(("pairings", "masks"), [case[:2] for case in CASES[:8]])
def test_value_and_gradients(world: int, form: str, pairings: str, masks: str, results):
    case = (pairings, masks, torch.float32)
    ranks = [found[form, *case] for found in results(world)]
    expect(ranks, *case, loss=1e-6, gradient=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pairings", ["six", "ten"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_precision(world: int, pairings: str, dtype: torch.dtype, results):
    """The loss is float32 whatever the embeddings, whose gradient is rounded once, to what they are."""
    ranks = [found["ring", pairings, "both", dtype] for found in results(world)]
    double = dtype == torch.float64
    assert {found["dtype"] for found in ranks} == {torch.float64 if double else torch.float32}
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}[dtype]
    expect(ranks, pairings, "both", dtype, loss=1e-12 if double else 1e-6, gradient=rounding)


@pytest.mark.parametrize("world", WORLDS)
def test_autocast_and_blocks_change_nothing(world: int, results):
    for name in ("autocast", "one block"):
        expect([found[name] for found in results(world)], *CASES[3], loss=1e-6, gradient=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_without_gradient(world: int, results):
    for found in results(world):
        out = found["no gradient"]
        assert not out.total.requires_grad
        assert out.total.item() == pytest.approx(brute_force(*CASES[3])[0], rel=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_without_rows(world: int, results):
    for found in results(world):
        assert found["empty"] == (0.0, torch.zeros(1))


@pytest.mark.parametrize("world", WORLDS)
def test_pairing_without_a_valid_pair(world: int, results):
    for rank, found in enumerate(results(world)):
        losses, gradients = found["none valid"]
        assert losses["audio_text"] == 0 and losses["video_text"] > 0
        for name in ("audio", "text_audio", "audio_text s", "audio_text b"):
            assert not gradients[name].any(), name
        for name in ("video", "text_video", "video_text s", "video_text b"):
            assert gradients[name].any() or not ROWS[world][rank], name
        assert gradients["audio_video s"] is None  # not among the pairings


@pytest.mark.parametrize("world", WORLDS[1:])
def test_data_parallel_training_gets_the_gradient_of_one_process(world: int, results):
    expected = results(1)[0]["replicas"]
    for found in results(world):
        for name, gradient in found["replicas"].items():
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_that_disagree_are_told(world: int, results):
    *most, last = (found["mistakes"] for found in results(world))
    odd = world - 1
    for told in most:
        assert (
            "disagree on the loss: rank 0 has audio_video_text = audio_video × text_audio_video in 8"
            in most[0]["pairings"]
        )
        assert f"where rank {odd} has nothing more" in told["pairings"]
        assert f"weight 1, logits audio_text, masks: none, where rank {odd} has audio_text" in told["weights"]
        assert "another order" in told["order"]
        assert f"where rank {odd} has audio_text = audio × text_audio in 12 dimensions" in told["dims"]
        assert "masks: valid audio" in told["masks"]
        assert f"has torch.float32, where rank {odd} has torch.float64" in told["dtypes"]
        assert told["missing"] == f"rank {odd}: {last['missing']}"
        assert told["then"] == "no error"  # every rank was told, so the next batch finds them together
    assert last["missing"].startswith("pairing video_text needs video embeddings; there are audio,")


@pytest.mark.parametrize("world", WORLDS)
def test_one_message_per_hop(world: int, results):
    """With the five embeddings that the six pairings have on their right, each once, and their gradients."""
    rows = max(ROWS[world]) * DIM * 5
    for found in results(world):
        with_gradient, without = found["sent"]
        assert with_gradient == ([2 * rows] * (world - 1) + [rows] if world > 1 else [])
        assert without == [rows] * (world - 1)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in (out if isinstance(out, list | tuple) else [out]) if isinstance(value, Tensor)]
        self.largest = max([self.largest, *(value.numel() for value in tensors)])
        return out


def test_no_matrix_of_all_pairs():
    n, dim, block = 512, 8, 64
    embeds = {name: torch.randn(n, dim).requires_grad_() for name in HEADS}
    logits = {name: (torch.ones(1), torch.zeros(1)) for name in PAIRINGS}
    flags = {name: torch.rand(n) < 0.9 for name in HEADS}
    for loss_of, expected in ((lambda *a: contrastive_loss(*a, block=block), block * block), (gathered_loss, n * n)):
        with Sizes() as sizes:
            loss_of(embeds, logits, SIX, flags, {None: torch.arange(n) // 2}).total.backward()
        assert sizes.largest == expected


def test_one_process_equals_the_plain_formula():
    chosen, embeds, logits, _, _ = global_batch("six", "plain")
    out = contrastive_loss(embeds, logits, chosen)
    for pairing in chosen:
        x, y = (embeds[name] for name in pairing.embeddings)
        scale, bias = logits[pairing.logits]
        plain = sigmoid_loss(scale * (x @ y.T) + bias).item()
        assert out.losses[pairing.name].item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_large_logits(logit: float):
    embeds = {name: torch.ones(3, 4).requires_grad_() for name in HEADS}
    logits = {name: (torch.tensor([logit / 4]), torch.zeros(1)) for name in PAIRINGS}
    out = contrastive_loss(embeds, logits, SIX)
    out.total.backward()
    assert out.losses["audio_text"].item() == pytest.approx(1e4 if logit < 0 else 2e4)
    assert all(rows.grad.isfinite().all() for rows in embeds.values())


def test_a_second_backward_pass_adds_the_same_again():
    embeds = {name: torch.randn(5, 4).requires_grad_() for name in HEADS}
    logits = {name: (torch.ones(1), torch.zeros(1)) for name in PAIRINGS}
    total = contrastive_loss(embeds, logits, SIX).total
    total.backward(retain_graph=True)
    once = embeds["audio"].grad.clone()
    total.backward()
    assert torch.equal(embeds["audio"].grad, 2 * once)


def test_what_needs_no_gradient_gets_none():
    """A locked tower."""
    embeds = {name: torch.randn(5, 4).requires_grad_(name != "audio") for name in HEADS}
    logits = {name: (torch.ones(1), torch.zeros(1)) for name in PAIRINGS}
    contrastive_loss(embeds, logits, SIX).total.backward()
    assert embeds["audio"].grad is None and embeds["video"].grad.any()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pairings": []}, "there are no pairings"),
        ({"block": 0}, "block=0 is not positive"),
        ({"audio": torch.zeros(4, 8)}, "(4, 8) audio and (3, 8) text_audio embeddings do not pair up"),
        ({"audio": torch.zeros(3, 9)}, "(3, 9) audio and (3, 8) text_audio embeddings do not pair up"),
        ({"audio": torch.zeros(3)}, "audio embeddings are torch.float32 (3,), not floats (B, D)"),
        ({"audio": torch.zeros(3, 8).long()}, "audio embeddings are torch.int64 (3, 8), not floats (B, D)"),
        ({"valid": {"audo": torch.ones(3).bool()}}, "valid names audo, but there are no such embeddings, only"),
        ({"valid": {"audio": torch.ones(3)}}, "valid of audio is torch.float32 (3,), not bool (3,)"),
        ({"caption_keys": {None: torch.ones(3)}}, "caption_keys of None are torch.float32 (3,), not int64 (3,)"),
        (
            {"caption_keys": {"sound": torch.ones(3).long()}},
            "caption_keys of 'sound': kinds are None and audio, visual",
        ),
        ({"logits": {}}, "pairing audio_text uses the scale and bias of audio_text"),
    ],
)
def test_wrong_arguments(change: dict, expected: str):
    embeds = {name: torch.zeros(3, 8) for name in HEADS} | {k: v for k, v in change.items() if k in HEADS}
    given = {"logits": {name: (torch.ones(1), torch.zeros(1)) for name in PAIRINGS}, "pairings": SIX}
    given |= {k: v for k, v in change.items() if k not in HEADS}
    assert expected in message(contrastive_loss, embeds, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("matmuls", ["highest", "high"])  # float32, TF32
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype, matmuls: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", matmuls == "high")

    def on_gpu(embeds, logits, chosen, valid, keys):
        moved = ({name: value.cuda() for name, value in values.items()} for values in (embeds, valid, keys))
        embeds, valid, keys = moved
        logits = {name: tuple(value.cuda() for value in pair) for name, pair in logits.items()}
        return contrastive_loss(embeds, logits, chosen, valid, keys, block=BLOCK)

    found = computed(on_gpu, "ten", "both", dtype, 0, 1)
    exact = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}[dtype]
    rounded = matmuls == "high" and dtype != torch.float64  # to the ten bits of TF32
    expect([found], "ten", "both", dtype, loss=1e-3 if rounded else 1e-6, gradient=max(exact, 3e-3 * rounded))
