"""Event localization: how well the spans that `PEAudioFrame` marks agree with those that are asked for.

At a threshold, the detections of a recording are its runs of positions with at least that probability. All figures are
exact over all thresholds, of which each recording has as many as it has different probabilities. There is one class,
"what the caption describes", and a recording is asked for its own caption only.

- Event-based F1 (Mesaros et al., Metrics for Polyphonic Sound Event Detection, 2016): a detection is right if it begins
  within 200 ms of a true span and ends within max(200 ms, 20 % of the span's length) of its end. Each detection is
  matched with at most one span and each span with at most one detection, as many as possible.
- PSDS (Bilen et al., arXiv 1910.08440), with the tolerance ρ for detections (DTC) and for spans (GTC): a detection is
  wrong if less than ρ of it lies in true spans; a span is found if at least ρ of it lies in detections that are not
  wrong. The score is the mean share of spans that are found, over 0 … 100 wrong detections per hour. With one class
  there are no cross-triggers and no spread between classes.

Own code, because none of the libraries is kept: sed_scores_eval 0.0.4 (2024) fails with pandas 3, psds_eval 0.5.3 is of
2022 and sed_eval 0.2.1 of 2018. The tests hold it to figures that sed_scores_eval has computed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

COLLAR, COLLAR_SHARE = 0.2, 0.2  # seconds; of the true span's length, at its end
TOLERANCES = (0.7, 0.1)  # ρ of PSDS: exact times count much, or little (DCASE challenge, scenarios 1 and 2)
WRONG_PER_HOUR = 100.0  # up to which PSDS looks
NEGLIGIBLE = 1e-6  # seconds, which floating-point times may be off


def event_metrics(
    scores: Sequence[Tensor], spans: Sequence[Sequence[Sequence[float]]], seconds_per_position: float, threshold: float
) -> dict[str, float | int]:
    """
    Args:
        scores: of each recording, (positions,) probabilities.
        spans: of each recording, the true [start_s, end_s]. Those that overlap or touch become one, and what is beyond
            the recording is cut off.
        threshold: positions with a higher score are marked.
    Returns:
        "event F1" at the threshold; "best event F1", the highest that any threshold gives, and that "best event
        threshold", the lowest score that is marked then; "PSDS 0.7" and "PSDS 0.1", by ρ; all but the threshold in
        percent. "events" is the number of true spans. Without any, only that is given.
    """
    values, deltas, hours, events = [], [], 0.0, 0
    for score, true in zip(scores, spans, strict=True):
        seconds = len(score) * seconds_per_position
        merged = merge_spans(true, seconds)
        thresholds, counts = _counts(score.double().numpy(), merged, seconds_per_position)
        values.append(thresholds)
        deltas.append(np.diff(counts, axis=0, prepend=0))
        hours += seconds / 3600
        events += len(merged)
    if not events:
        return {"events": 0}
    thresholds, changes = np.concatenate(values), np.concatenate(deltas)
    order = np.argsort(-thresholds, kind="stable")
    thresholds, totals = thresholds[order], changes[order].cumsum(0)
    last = np.append(np.diff(thresholds) != 0, True)  # of equal thresholds
    thresholds, totals = thresholds[last], totals[last]
    f1 = 200 * totals[:, 1] / (totals[:, 0] + events)
    above = int((thresholds > threshold).sum())
    metrics: dict[str, float | int] = {
        "event F1": float(f1[above - 1]) if above else 0.0,
        "best event F1": float(f1.max()),
        "best event threshold": float(thresholds[f1.argmax()]),
    }
    for number, tolerance in enumerate(TOLERANCES):
        wrong, found = totals[:, 2 + 2 * number] / hours, totals[:, 3 + 2 * number] / events
        metrics[f"PSDS {tolerance}"] = 100 * _area(wrong, found)
    return metrics | {"events": events}


def merge_spans(spans: Sequence[Sequence[float]], seconds: float) -> list[tuple[float, float]]:
    """Spans cut to 0 … seconds, in order; those that overlap or touch become one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((max(start, 0.0), min(end, seconds)) for start, end in spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1] + NEGLIGIBLE:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _counts(score: NDArray, spans: Sequence[tuple[float, float]], step: float) -> tuple[NDArray, NDArray]:
    """(K,) the different scores of a recording, from the highest down, and (K, 2 + 2 · tolerances), for each of them as
    a threshold: detections, those matched with a span, and for each tolerance wrong detections and found spans."""
    thresholds = np.unique(score)[::-1]
    marked = np.zeros((len(thresholds), len(score) + 2), dtype=np.int8)
    marked[:, 1:-1] = score >= thresholds[:, None]
    edges = np.diff(marked, axis=1)
    row, first = (edges == 1).nonzero()  # one entry for each detection at each threshold
    _, behind = (edges == -1).nonzero()
    start, end = first * step, behind * step
    true = np.array(spans).reshape(-1, 2)
    # how much of each span lies before each boundary between positions
    before = np.clip(np.arange(len(score) + 1)[:, None] * step - true[:, 0], 0, true[:, 1] - true[:, 0])
    shared = before[behind] - before[first]  # (detections, spans) seconds

    counts = np.zeros((len(thresholds), 2 + 2 * len(TOLERANCES)), dtype=np.int64)
    counts[:, 0] = np.bincount(row, minlength=len(thresholds))
    late = np.maximum(COLLAR, COLLAR_SHARE * (true[:, 1] - true[:, 0]))
    fits = np.abs(start[:, None] - true[:, 0]) <= COLLAR + NEGLIGIBLE
    fits &= np.abs(end[:, None] - true[:, 1]) <= late + NEGLIGIBLE
    bounds = np.searchsorted(row, np.arange(len(thresholds) + 1))
    for k in np.unique(row[fits.any(1)]):
        counts[k, 1] = largest_matching(fits[bounds[k] : bounds[k + 1]])
    for number, tolerance in enumerate(TOLERANCES):
        right = shared.sum(1) >= tolerance * (end - start) - NEGLIGIBLE
        counts[:, 2 + 2 * number] = np.bincount(row[~right], minlength=len(thresholds))
        covered = np.zeros((len(thresholds), len(true)))
        np.add.at(covered, row[right], shared[right])
        found = covered >= tolerance * (true[:, 1] - true[:, 0]) - NEGLIGIBLE
        counts[:, 3 + 2 * number] = found.sum(1)
    return thresholds, counts


def largest_matching(fits: NDArray) -> int:
    """The most pairs of a row and a column that fit, each row and column in one pair at most (augmenting paths)."""
    if (fits.sum(0) <= 1).all() and (fits.sum(1) <= 1).all():
        return int(fits.sum())
    row_of: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column in fits[row].nonzero()[0].tolist():
            if column not in tried:
                tried.add(column)
                if column not in row_of or place(row_of[column], tried):
                    row_of[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(fits)))


def _area(wrong: NDArray, found: NDArray) -> float:
    """The mean of the highest `found` with at most w wrong detections per hour, over w = 0 … WRONG_PER_HOUR."""
    order = np.argsort(wrong, kind="stable")
    at, best = wrong[order], np.maximum.accumulate(found[order])
    inside = at <= WRONG_PER_HOUR
    widths = np.diff(np.append(at[inside], WRONG_PER_HOUR))
    return float((best[inside] * widths).sum() / WRONG_PER_HOUR)


def plot_recordings(recordings: Sequence[dict[str, Any]], seconds_per_position: float, threshold: float) -> Figure:
    """Recordings side by side: waveform, spectrogram, and probability with true and marked spans.

    Args:
        recordings: each {"caption", "waveform" (samples,), "sampling_rate" in Hz, "scores" (positions,), "spans"}.
    """
    figure = Figure(figsize=(4.6 * max(len(recordings), 1), 6), dpi=130, layout="constrained")
    panels = figure.subplots(3, max(len(recordings), 1), squeeze=False, height_ratios=(1, 2, 2))
    for (wave, picture, curve), recording in zip(panels.T, recordings, strict=True):
        waveform, rate, score = recording["waveform"].float().cpu(), recording["sampling_rate"], recording["scores"]
        seconds = len(waveform) / rate
        wave.plot(np.arange(len(waveform)) / rate, waveform, linewidth=0.3, color="0.3")
        wave.set_title(recording["caption"][:60], fontsize=9, wrap=True)
        mel = MelSpectrogram(rate, n_fft=2048, hop_length=rate // 100, n_mels=80)(waveform)
        levels = AmplitudeToDB(top_db=80)(mel)
        picture.imshow(levels.numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, 80), cmap="magma")
        picture.set_ylabel("mel band")
        for start, end in merge_spans(recording["spans"], len(score) * seconds_per_position):
            curve.axvspan(start, end, color="tab:green", alpha=0.25, linewidth=0)
        edges = np.arange(len(score) + 1) * seconds_per_position
        curve.stairs(score.float().numpy(), edges, color="tab:blue", baseline=None)
        marked = np.diff(np.pad((score > threshold).numpy().astype(int), 1))
        for first, behind in zip((marked == 1).nonzero()[0], (marked == -1).nonzero()[0], strict=True):
            curve.hlines(-0.04, edges[first], edges[behind], color="tab:orange", linewidth=5)
        curve.axhline(threshold, color="0.6", linewidth=0.8, linestyle=":")
        curve.set(ylim=(-0.1, 1.02), xlabel="seconds")
        for panel in (wave, picture, curve):
            panel.set_xlim(0, seconds)
    panels[2, 0].set_ylabel("probability")
    for color, label in (("tab:green", "asked for"), ("tab:blue", "probability"), ("tab:orange", "marked")):
        panels[2, 0].plot([], [], color=color, linewidth=4, alpha=0.6, label=label)
    panels[2, 0].legend(loc="upper right", fontsize=7)
    return figure
