"""The programs in the guide of `cloudinary_analyze.stage`, each run as it is printed."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from examples import read_examples
from machines_support import build_urls, emulate_in_environment
from notification_support import start_redis

from cloudinary_analyze import stage as room

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
RESUMED = {"pool", "dask dataframe"}  # the others would resume alike, and start slowly


def find_recipe(begin):
    (recipe,) = [text for text in read_examples(room.__doc__) if f"\n{begin}" in f"\n{text}"]
    return recipe


@pytest.mark.parametrize("name", NEEDED)
def test_a_recipe_analyses_every_row_once(name, tmp_path, monkeypatch):
    begin, modules = NEEDED[name]
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if name == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    urls = build_urls(1200)
    parquet.write_table(arrow.table({"url": urls}), tmp_path / "urls.parquet")
    (tmp_path / "recipe.py").write_text(find_recipe(begin), encoding="utf-8")
    server = start_redis(tmp_path, fsync="no")
    try:
        with emulate_in_environment(monkeypatch, latency=0.01) as emulator:
            for run in range(2 if name in RESUMED else 1):
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
                            "HF_DATASETS_CACHE": str(tmp_path / f"cache{run}"),
                        },
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        timeout=120,
                    )
                assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
                (found,) = tmp_path.glob("results*")
                table = parquet.read_table(found)
                assert Counter(table["status"].to_pylist()) == {"answered": 1200}
                assert sorted(table["source"].to_pylist()) == sorted(urls)
                assert set(table["restored"].to_pylist()) == {run == 1}
                shutil.rmtree(found) if found.is_dir() else found.unlink()
            assert emulator.counts.total_received == 1200
    finally:
        server.kill()
