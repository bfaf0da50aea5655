"""Compare the speed of `icl` with other programs: `python -m benchmarks [--seconds S] [--out FOLDER]`, or `make bench`.

Each result is a ratio of times: the other program's time divided by our time, for the same work. Both programs run in turns, in one
process, with the same number of threads and the same precision. The ratio is the median over turns, with quartiles. Compared with
times, ratios depend much less on the machine and its other users. We use the fastest device of the machine. Example:

    python -m benchmarks --seconds 20 --out data/benchmarks

With `--only "icl evaluate"`, only the cases whose name contains these words are measured, and no file is written.
"""

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.cases import make_cases
from benchmarks.turns import Ratio
from icl.compute.devices import choose_device
from icl.files.writing import write_atomically
from icl.plotting.colours import BLACK, BLUE
from icl.plotting.style import new_figure, save_figure


def main() -> None:
    """Measure all cases and print a table. Write `<device>.json` after every case, and `<device>.png` at the end."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds for each ratio (default 10)")
    parser.add_argument(
        "--out", type=Path, default=Path("data/benchmarks"), help="folder of the output (default data/benchmarks)"
    )
    parser.add_argument(
        "--only", default="", help="measure only the cases whose name contains this text; write no file"
    )
    arguments = parser.parse_args()
    device = choose_device()
    machine = describe_machine(device)
    print(" · ".join(str(value) for value in machine.values()))
    print("Compiling the steps takes up to two minutes ...", flush=True)
    print(f"{'ratio of times, larger is better for us':46} {'median':>7} {'quartiles':>14} {'ms':>17} {'target':>7}")
    command, target = f"python -m benchmarks --seconds {arguments.seconds:g}", arguments.out / f"{device}.json"
    ratios: list[Ratio] = []
    for case in make_cases(device):
        if arguments.only not in case.name:
            continue
        ratios.append(Ratio.over(case.turns(arguments.seconds), name=case.name, target=case.target))
        print(row(ratios[-1]), flush=True)
        if arguments.only:
            continue
        content = {"command": command, **machine, "ratios": [ratio._asdict() for ratio in ratios]}
        write_atomically(target, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    if arguments.only:
        return
    figure = save_figure(plot_ratios(ratios, " · ".join(list(machine.values())[:3])), target.with_suffix(".png"))
    print(f"Wrote {target} and {figure}.")


def describe_machine(device: str) -> dict[str, str]:
    """Return a description of the device, threads, date, torch version and precision, on which the numbers depend."""
    chip = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": f"{device}: {chip}",
        "threads": f"{torch.get_num_threads()} threads",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": f"torch {torch.__version__}",
        "precision": f"float32, matrix products {torch.get_float32_matmul_precision()}",
    }


def row(ratio: Ratio) -> str:
    """Return a ratio as a line of the printed table."""
    spread, times = f"{ratio.low:.2f} - {ratio.high:.2f}", f"{ratio.peer_ms:.2f} / {ratio.ours_ms:.2f}"
    return f"{ratio.name:46} {ratio.ratio:7.2f} {spread:>14} {times:>17} {ratio.target:>7}"


def plot_ratios(ratios: list[Ratio], title: str) -> Figure:
    """Draw a bar for each ratio with its quartiles, and a vertical line at 1."""
    figure, (axes,) = new_figure(width=7.6, height=0.45 * len(ratios) + 1.2)
    for place, ratio in enumerate(reversed(ratios)):
        axes.barh(place, ratio.ratio, color=BLUE, height=0.6)
        axes.plot([ratio.low, ratio.high], [place, place], color=BLACK, linewidth=2)
        axes.text(max(ratio.high, ratio.ratio) * 1.05, place, f"{ratio.ratio:.2f}", va="center", fontsize=9)
    axes.axvline(1, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(ratios)), [ratio.name for ratio in reversed(ratios)], fontsize=9)
    axes.set(xscale="log", xlabel="ratio of times, other program / icl; lines: quartiles over turns")
    axes.set_xlim(right=1.4 * max(ratio.high for ratio in ratios))
    axes.grid(visible=False, axis="y")
    axes.set_title(title, fontsize=10)
    return figure


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
