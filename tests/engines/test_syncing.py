"""sync_adapters against a server that keeps a table of adapters as vLLM and SGLang do; `make vllm` runs it against vLLM."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eigenpeft.cli import load
from eigenpeft.engines import sync_adapters
from eigenpeft.errors import EigenPeftError


class Server(ThreadingHTTPServer):
    def __init__(self, prefix):
        super().__init__(("127.0.0.1", 0), Handler)
        self.prefix, self.adapters, self.refuses, self.log = prefix, {}, set(), []
        self.is_ill = False  # answers 503 where it lists its models
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        paths = {f"{self.server.prefix}/load_lora_adapter": {}} if self.server.prefix is not None else {}
        models = [{"id": "base", "root": "base"}, *({"id": n, "root": p} for n, p in self.server.adapters.items())]
        if self.server.is_ill and self.path == "/v1/models":
            return self.answer(503, {"error": {"message": "out of memory"}})
        return self.answer(200, {"/openapi.json": {"paths": paths}, "/v1/models": {"data": models}}[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, adapters = body["lora_name"], self.server.adapters
        self.server.log.append((self.path, name))
        loading = self.path == f"{self.server.prefix}/load_lora_adapter"
        assert loading or self.path == f"{self.server.prefix}/unload_lora_adapter"
        if loading and (name in adapters or name in self.server.refuses):
            return self.answer(400, {"error": {"message": f"{name} cannot be loaded"}})
        if not loading and name not in adapters:
            return self.answer(404, {"error": {"message": f"no {name}"}})
        if loading:
            assert (Path(body["lora_path"]) / "adapter_config.json").is_file()
            adapters[name] = body["lora_path"]
        else:
            del adapters[name]
        return self.answer(200, "Success")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@pytest.fixture(params=["/v1", ""], ids=["vllm", "sglang"])
def server(request):
    with Server(request.param) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_server_follows_the_store(server, shelf, tmp_path):
    def sync(**options):
        return sync_adapters(server.url, store=shelf.folder, out_dir=tmp_path / "loras", **options)

    server.adapters["somebody/else"] = "/elsewhere"
    report = sync()
    assert report.loaded == ["shop/anna", "shop/bert", "shop/carla"]
    assert set(server.adapters) == {"somebody/else", "shop/anna", "shop/bert", "shop/carla"}
    assert sync().kept == ["shop/anna", "shop/bert", "shop/carla"]
    before = dict(server.adapters)
    shelf.write("anna", ("bert", 9), "dora")
    report = sync()
    # The bases of this store were fitted anew, so that all members changed.
    assert report.loaded == ["shop/anna", "shop/bert", "shop/dora"]
    assert report.unloaded == ["shop/carla"]
    assert set(server.adapters) == {"somebody/else", "shop/anna", "shop/bert", "shop/dora"}
    assert server.adapters["shop/bert"] != before["shop/bert"]
    assert {str(path) for path in (tmp_path / "loras" / "shop").iterdir()} == {
        path for name, path in server.adapters.items() if name.startswith("shop/")
    }
    assert sync(names=["anna"]).unloaded == ["shop/bert", "shop/dora"] or sync(names=["anna"]).kept == ["shop/anna"]


def test_what_the_server_refuses_is_reported_and_the_others_are_loaded(server, shelf, tmp_path):
    server.refuses.add("shop/bert")
    report = sync_adapters(server.url, store=shelf.folder, out_dir=tmp_path / "loras")
    assert report.failed == {"shop/bert": "400: shop/bert cannot be loaded"}
    assert report.loaded == ["shop/anna", "shop/carla"]
    arguments = [
        "sync-adapters",
        "--server",
        server.url,
        "--store",
        str(shelf.folder),
        "--out",
        str(tmp_path / "loras"),
    ]
    result = CliRunner().invoke(load(), arguments)
    assert result.exit_code == 1
    assert "Loaded 0, kept 2, unloaded 0, failed 1." in result.stdout
    server.refuses.clear()
    result = CliRunner().invoke(load(), [*arguments, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["loaded"] == ["shop/bert"]
    result = CliRunner().invoke(load(), [*arguments, "--member", "anna", "--json"])
    assert json.loads(result.stdout)["kept"] == ["shop/anna"]


def test_servers_that_cannot_be_told(shelf, tmp_path):
    with Server(None) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with pytest.raises(EigenPeftError, match="has no endpoint for loading adapters. Start vLLM with --enable-lora"):
            sync_adapters(running.url, store=shelf.folder, out_dir=tmp_path / "loras")
        running.shutdown()
        url = running.url
    with pytest.raises(EigenPeftError, match="No answer from"):
        sync_adapters(url, store=shelf.folder, out_dir=tmp_path / "loras")
    with pytest.raises(EigenPeftError, match="server='localhost' must be an address such as"):
        sync_adapters("localhost", store=shelf.folder, out_dir=tmp_path / "loras")
    assert not (tmp_path / "loras").exists()


def test_a_server_that_lists_nothing_is_named_with_its_answer(server, shelf, tmp_path):
    server.is_ill = True
    with pytest.raises(EigenPeftError, match=f"{server.url}/v1/models answered 503: .*out of memory"):
        sync_adapters(server.url, store=shelf.folder, out_dir=tmp_path / "loras")
