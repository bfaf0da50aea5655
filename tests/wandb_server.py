"""A local W&B backend, as small as the real client allows. It fails or disappears when a test asks it to.

It answers the requests of `wandb sweep`, `wandb agent`, `wandb.init`, `log` and `finish`. These are a few fields of GraphQL,
and the file stream with a run's rows, summary and exit code. A sweep is a grid. If a run that was marked as preempting exits
with an error, it goes back into the queue of its sweep, as W&B documents it ("Resume preemptible Sweeps runs").
"""

import gzip
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

KEY = "0123456789" * 4
"""An API key of the length of W&B's keys."""


@dataclass
class WandbRun:
    """A run, as the backend knows it."""

    id: str
    sweep: str | None = None
    point: dict[str, Any] = field(default_factory=dict)
    """Settings that its sweep chose."""
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Metrics from `define_metric`, as the client encodes them."""
    was_preempting: bool = False
    exit_code: int | None = None
    """Exit code of the last program that ended."""
    exit_codes: list[int] = field(default_factory=list)

    def axes(self) -> set[str]:
        """Return the declared horizontal axis of all metrics ("*").

        The keys are field numbers of the client's protocol. A metric refers to its axis by a number that starts at 1.
        """
        return {self.metrics[metric["5"] - 1]["1"] for metric in self.metrics if metric.get("2") == "*"}

    @property
    def steps(self) -> list[int]:
        """Step of every row."""
        return [row["step"] for row in self.rows]


@dataclass
class Sweep:
    """A grid, with the queue of runs that are still to be handed out."""

    id: str
    config: dict[str, Any]
    queue: list[WandbRun]


class WandbServer:
    """The backend. If `answer(path)` returns a status, the request fails with it; if it returns None, the request succeeds."""

    def __init__(self) -> None:
        self.runs: dict[str, WandbRun] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.refused: list[str] = []
        """Fields that the client asked for and that the backend does not have."""
        self.answer: Callable[[str], int | None] = lambda path: None
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop the backend, so that connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Return the environment with which a client uses this backend."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": "team",
            "WANDB_PROJECT": "icl",
            "WANDB_MODE": "online",
            "WANDB_AGENT_DISABLE_FLAPPING": "true",
        }

    def query(self, document: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a GraphQL document, which asks for one field."""
        asked = re.search(r"\{\s*(?:(\w+)\s*:\s*)?(\w+)", document)
        assert asked is not None
        answer = getattr(self, "_" + re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", asked[2]), None)
        with self._lock:
            if answer is None:
                self.refused.append(asked[2])
                return {"errors": [{"message": f"There is no field {asked[2]} here."}]}
            return {"data": {asked[1] or asked[2]: answer(**variables)}}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """Store the rows, the summary and the exit code of a run."""
        with self._lock:
            run, files = self.runs[run_id], sent.get("files") or {}
            if rows := files.get("wandb-history.jsonl"):
                start = rows.get("offset", 0)
                run.rows[start : start + len(rows["content"])] = map(json.loads, rows["content"])
            if summary := files.get("wandb-summary.json"):
                run.summary = json.loads(summary["content"][-1])
            run.was_preempting |= bool(sent.get("preempting"))
            if sent.get("complete"):
                run.exit_code = sent["exitcode"]
                run.exit_codes.append(sent["exitcode"])
                if run.was_preempting and run.exit_code and run.sweep:
                    self.sweeps[run.sweep].queue.insert(0, run)

    # One method for each field of GraphQL: the field upsertSweep is answered by _upsert_sweep.

    def _viewer(self) -> dict[str, Any]:
        return {"id": "me", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}

    def _server_info(self, **_: Any) -> dict[str, Any]:
        return {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}

    def _entity(self, **_: Any) -> dict[str, Any]:
        return {"organization": None}

    def _model(self, *, name: str | None = None, **_: Any) -> dict[str, Any]:
        """Return what the client needs to resume a run, or a null bucket for a run without rows."""
        run = self.runs.get(name or "")
        if run is None or not run.rows:
            return {"bucket": None}
        last = {"historyLineCount": len(run.rows), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"summaryMetrics": run.summary, "config": {key: {"value": value} for key, value in run.config.items()}}
        tails = {"historyTail": [json.dumps(run.rows[-1])], "eventsTail": []}
        encoded = {key: json.dumps(value) for key, value in (texts | tails).items()}
        began = {"wandbConfig": json.dumps({"t": 1})}  # this tells the client that the run has begun
        return {"bucket": {"id": run.id, "name": run.id, "tags": [], **last, **encoded, **began}}

    def _project(self, *, sweep: str | None = None, **_: Any) -> dict[str, Any]:
        known = self.sweeps.get(sweep or "")
        about = known and {"id": known.id, "name": known.id, "state": "RUNNING", "config": yaml.dump(known.config)}
        return _PROJECT | {"sweep": about and about | {"method": "grid", "runs": {"edges": []}}}

    def _upsert_sweep(self, *, config: str, **_: Any) -> dict[str, Any]:
        tree = yaml.safe_load(config)
        sweep = Sweep(f"sweep{next(self._numbers)}", tree, [])
        sweep.queue = [WandbRun(f"run{next(self._numbers)}", sweep.id, point) for point in _grid(tree["parameters"])]
        self.sweeps[sweep.id] = sweep
        self.runs |= {run.id: run for run in sweep.queue}
        return {"sweep": {"name": sweep.id, "project": _PROJECT}, "configValidationWarnings": []}

    def _create_agent(self, *, sweep: str, **_: Any) -> dict[str, Any]:
        return {"agent": {"id": sweep}}

    def _agent_heartbeat(self, *, id: str, runState: str, **_: Any) -> dict[str, Any]:
        queue = self.sweeps[id].queue
        commands: list[dict[str, Any]] = []
        if not json.loads(runState):
            run = queue.pop(0) if queue else None
            commands = [{"type": "exit"}]
            if run is not None:
                arguments = {name: {"value": value} for name, value in run.point.items()}
                commands = [{"type": "run", "run_id": run.id, "program": "", "args": arguments}]
        return {"agent": {"id": id}, "commands": json.dumps(commands)}

    def _upsert_bucket(self, *, config: str | None = None, sweep: str | None = None, **known: Any) -> dict[str, Any]:
        run_id = known.get("name") or known["id"]
        run = self.runs.setdefault(run_id, WandbRun(run_id))
        run.name = known.get("displayName") or run.name
        if config:
            values = {key: entry["value"] for key, entry in json.loads(config).items()}
            run.metrics = values.pop("_wandb", {}).get("m", run.metrics)
            run.config = values
        about = {"id": run.id, "name": run.id, "displayName": run.name, "sweepName": sweep, "project": _PROJECT}
        return {"bucket": about | {"config": config, "historyLineCount": len(run.rows)}, "inserted": True}

    def _create_run_files(self, *, run: str, files: list[str], **_: Any) -> dict[str, Any]:
        links = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in files]
        return {"runID": run, "uploadHeaders": [], "files": links}


_PROJECT = {"id": "project", "name": "icl", "entity": {"id": "team", "name": "team"}}


def _grid(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every point of a grid, by outermost names. Nested parameters become tables."""
    axes = [
        [(name, value) for value in _grid(entry["parameters"])]
        if "parameters" in entry
        else [(name, value) for value in entry.get("values", [entry.get("value")])]
        for name, entry in sorted(parameters.items())
    ]
    return [dict(choice) for choice in itertools.product(*axes)]


def _handler(backend: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _take(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = backend.answer(self.path)
            if status is not None:
                self._reply(status, {})
                return
            data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                asked = json.loads(data)
                answer = backend.query(asked["query"], asked.get("variables") or {})
            elif self.path.endswith("/file_stream"):
                backend.stream(self.path.split("/")[-2], json.loads(data))
            self._reply(200, answer)

        def _reply(self, status: int, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET = _take  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # clients that end drop their connections
                return

    return Handler


@pytest.fixture
def wandb_server() -> Iterator[WandbServer]:
    """Start a new backend."""
    server = WandbServer()
    yield server
    server.close()
