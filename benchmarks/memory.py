"""Peak memory beyond the weights and the inputs: of long sound through the codec, and of many frames.

    python -m benchmarks memory [--preset small] [--seconds 10 60 3600] [--frames 16 64 1000]

Ours takes all of the sizes, the peer those up to `--peer-seconds` and `--peer-frames`. Every one is a new process.
At `small`, an hour of sound takes about 26 minutes on two cores, and a thousand frames take about 40.
"""

import argparse

from rich.console import Console
from rich.table import Table

from benchmarks.growing import CPU, series
from benchmarks.peer import apart, checkpoints, chip, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seconds", type=int, nargs="*", default=[10, 60])
    parser.add_argument("--frames", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--peer-seconds", type=int, default=60)
    parser.add_argument("--peer-frames", type=int, default=64)
    options = parser.parse_args()
    wanted = [("codec", f"{s} s of sound", s, s <= options.peer_seconds) for s in options.seconds]
    wanted += [("frames", f"{f} frames", f, f <= options.peer_frames) for f in options.frames]
    rows = []
    with checkpoints(options.preset) as (native, hf):
        for part, name, size, with_peer in wanted:
            row = {"case": name}
            for side, folder in (("ours", native), ("theirs", hf))[: 1 + with_peer]:
                # the smallest size first, which loads what is loaded once
                first = 1 if size > 1 else size
                points = apart(series, part, side == "ours", options.preset, folder, [first, size], float("inf"))
                if points[-1]["size"] == size:
                    row[f"{side}_mib"] = points[-1]["mib"]
            rows.append(row)
            print(row, flush=True)
    table = Table("case", "ours MiB", "theirs MiB", "ratio", title=f"memory on {chip(CPU)}: {options.preset}")
    for row in rows:
        ours, theirs = (row.get(f"{side}_mib") for side in ("ours", "theirs"))
        cells = [f"{value:,.0f}" if value is not None else "" for value in (ours, theirs)]
        table.add_row(row["case"], *cells, f"{theirs / ours:.1f}" if ours and theirs else "")
    Console().print(table)
    save("memory", rows, {"preset": options.preset}, CPU)


if __name__ == "__main__":
    main()
