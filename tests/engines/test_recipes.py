"""The programs in the guide of `cloudinary_analyze.stage`, executed as printed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from examples import read_examples
from machines_support import build_urls, emulate_in_environment
from notification_support import run_redis

from cloudinary_analyze import Captioning
from cloudinary_analyze import stage as room
from cloudinary_analyze.ledger.redis import RedisLedger

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEEDED = {
    "pool": ("from concurrent.futures", ()),
    "dask dataframe": ("import dask.dataframe", ("distributed", "dask", "pandas")),
    "dask bag": ("from dask import bag", ("distributed", "dask", "pandas")),
    "datasets": ("from datasets", ("datasets",)),
    "ray": ("import ray", ("ray", "pandas")),
    "spark": ("from pyspark", ("pyspark", "pandas")),
}


def find_recipe(begin):
    (recipe,) = [text for text in read_examples(room.__doc__) if f"\n{begin}" in f"\n{text}"]
    return recipe


@pytest.mark.parametrize("name", NEEDED)
def test_a_recipe_analyzes_every_row_once(name, tmp_path, monkeypatch):
    begin, modules = NEEDED[name]
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if name == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    urls = build_urls(1200)
    recorded = urls[::2]  # left by a job that stopped before the other rows
    parquet.write_table(arrow.table({"url": urls}), tmp_path / "urls.parquet")
    (tmp_path / "recipe.py").write_text(find_recipe(begin), encoding="utf-8")
    with (
        # the sockets of Ray must have short paths
        tempfile.TemporaryDirectory(prefix="ray") as short,
        run_redis(tmp_path, fsync="no") as server,
        emulate_in_environment(monkeypatch, latency=0.01) as emulator,
    ):
        room.AnalyzeStage(Captioning, ledger=RedisLedger(server.url))(recorded)
        room.close_sessions()
        assert emulator.counts.total_received == 600
        with (tmp_path / "log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "recipe.py"],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "REDIS_URL": server.url,
                    "PYTHONPATH": str(ROOT),
                    "PYSPARK_PYTHON": sys.executable,
                    "HF_HOME": str(tmp_path / "cache"),
                    "RAY_TMPDIR": short,
                    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=280,
            )
        assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
        (found,) = tmp_path.glob("results*")
        table = parquet.read_table(found)
        rows = table.select(["source", "status", "restored"]).to_pylist()
        assert Counter(row["status"] for row in rows) == {"answered": 1200}
        assert sorted(row["source"] for row in rows) == sorted(urls)
        assert {row["source"] for row in rows if row["restored"]} == set(recorded)
        assert emulator.counts.total_received == 1200
