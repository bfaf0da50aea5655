"""`icl report`: write one self-contained HTML page about a run, or about several runs side by side."""

from pathlib import Path

from icl.cli.outputs import require_output
from icl.command_line import CommandParser
from icl.runs.folder import require_place

HELP = "write one self-contained HTML page about a run or a sweep: curves, tables with verdicts, figures, settings"


def run(words: list[str]) -> int:
    """Write the HTML page. The page of a single run is also sent to the store of the run, if the run has one."""
    parser = CommandParser(
        "report",
        "Write all results of a run to one HTML page that needs no network: state, settings, environment, curves, tables with\n"
        "verdicts, figures, and the commands that produce missing results. For several runs, or a folder of runs,\n"
        "the page begins with a comparison.",
        "icl report runs/quickstart\n  icl report runs/a runs/b --out both.html\n  icl report runs\n  icl report runs --watch",
    )
    parser.add("paths RUN", "a run's folder or name, or a folder with runs below it", nargs="+", type=Path)
    text = "file of the page (default: report.html in the folder RUN; for several RUNs, in the working directory)"
    parser.add("--out FILE", text, type=Path)
    text = "write the page again whenever the runs change, until all runs have ended or you press Ctrl-C; a browser reloads the page automatically"
    parser.add("--watch", text)
    options = parser.parse_args(words)
    from icl.report.page import write_report
    from icl.report.watch import watch
    from icl.runs.delivery import send_results

    if options.out is not None and options.out.suffix.lower() in (".html", ".htm"):
        require_output(options.out)
    paths = [require_place(path) for path in options.paths]
    received = None
    if options.watch:
        report, received = watch(paths, out=options.out)
        if report is None:
            return 128 + received if received else 1
    else:
        report = write_report(paths, out=options.out)
    for facts in report.runs:
        for problem in facts.problems:
            print(f"{facts.name}: {problem}")
    runs = f"{len(report.runs)} runs, " if len(report.runs) > 1 else ""
    print(f"Report  {report.path} ({runs}{report.size / 1e6:.1f} MB)")
    if report.folder is not None and report.runs[0].config is not None:
        send_results(report.folder)
    return 128 + received if received else 0
